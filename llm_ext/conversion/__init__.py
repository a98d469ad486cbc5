"""Conversion of existing models: layers of torch.nn become those of llm_ext, and back."""

from llm_ext.conversion.patching import patched
from llm_ext.conversion.quantize import Quantized, dequantize_, fake_quantize_, quantize_
from llm_ext.conversion.tree import Convertible, convert, convertible, revert, to_torch

__all__ = [
    "Convertible",
    "Quantized",
    "convert",
    "convertible",
    "dequantize_",
    "fake_quantize_",
    "patched",
    "quantize_",
    "revert",
    "to_torch",
]
