"""Fused recurrent layers and attention for PyTorch, on CPU and CUDA.

Layers: :class:`RNN`, :class:`GRU`, :class:`LSTM`, their cells, :class:`Linear`, :class:`AttentionPool` and
:class:`AdditiveAttention`. Models: :class:`LLM`, :class:`Seq2Seq` and :class:`SequenceClassifier`. The
functions behind them are in :mod:`llm_ext.ops`, and in plain torch in :mod:`llm_ext.reference`. :func:`convert`
replaces the layers of a model of torch.nn by those of llm_ext, :func:`quantize_` rounds their weights to 8 or 16 bits.
"""

from __future__ import annotations

import re as _re
from importlib import metadata as _metadata
from typing import TypedDict as _TypedDict
from typing import cast as _cast

import torch as _torch  # its libraries must be loaded before the compiled module

try:
    from llm_ext import _C
except ImportError as error:
    # A library or a symbol of CUDA, and not a folder with such a name.
    if not _re.search(r"lib\w*cuda\w*\.so|undefined symbol: \w*cuda", str(error)):
        raise
    raise ImportError(
        f"this llm_ext was built with CUDA, and torch {_torch.__version__} has another CUDA or none ({error}); "
        "install the llm_ext for the CPU, or a torch for the same CUDA"
    ) from error
from llm_ext import models, nn, ops, reference
from llm_ext.conversion import (
    Convertible,
    Quantized,
    convert,
    convertible,
    dequantize_,
    fake_quantize_,
    patched,
    quantize_,
    revert,
    to_torch,
)
from llm_ext.models import (
    LLM,
    BeamHypothesis,
    ClassifierOutput,
    EncoderOutput,
    LLMState,
    Seq2Seq,
    Seq2SeqState,
    SequenceClassifier,
)
from llm_ext.nn import GRU, LSTM, RNN, AdditiveAttention, AttentionPool, GRUCell, Linear, LSTMCell, RNNCell
from llm_ext.ops.argument_checks import ArgumentError

__version__ = _metadata.version("llm_ext")

__all__ = [
    "GRU",
    "LLM",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "ArgumentError",
    "AttentionPool",
    "BeamHypothesis",
    "BuildInfo",
    "ClassifierOutput",
    "Convertible",
    "EncoderOutput",
    "GRUCell",
    "LLMState",
    "LSTMCell",
    "Linear",
    "Quantized",
    "RNNCell",
    "Seq2Seq",
    "Seq2SeqState",
    "SequenceClassifier",
    "build_info",
    "clear_packed_weight_cache",
    "convert",
    "convertible",
    "cpu_cache_bytes",
    "dequantize_",
    "empty_cpu_cache",
    "fake_quantize_",
    "models",
    "nn",
    "ops",
    "packed_weight_cache_bytes",
    "patched",
    "quantize_",
    "reference",
    "revert",
    "to_torch",
]


class BuildInfo(_TypedDict):
    """The result of :func:`build_info`.

    Attributes:
        compiler: Compiler and version.
        torch: Version of torch that the module was compiled against.
        cuda: Version of CUDA, or ``None`` if the module was built without CUDA.
        openmp: Whether the module uses OpenMP.
        isa: ISA of the CPU kernels in use: ``"baseline"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"``.
    """

    compiler: str
    torch: str
    cuda: str | None
    openmp: bool
    isa: str


def build_info() -> BuildInfo:
    """Return how the compiled module was built, and the ISA of the CPU kernels in use.

    Raises:
        RuntimeError: The environment variable LLM_EXT_ISA names an ISA that does not exist or that the machine lacks.

    Example:
        >>> sorted(llm_ext.build_info())
        ['compiler', 'cuda', 'isa', 'openmp', 'torch']
    """
    return _cast(BuildInfo, _C.build_info())


def packed_weight_cache_bytes() -> int:
    """Return the size of the packed weight cache in bytes, at most 256 MiB.

    Weights that were packed twice without a change are cached, so that further calls do not pack them. They are found
    by a hash of their content: any change takes effect in the next call.
    """
    return _C.packed_weight_cache_bytes()


def clear_packed_weight_cache() -> None:
    """Free the memory of the packed weight cache."""
    _C.clear_packed_weight_cache()


def cpu_cache_bytes() -> int:
    """Return the unused bytes that the CPU caching allocator holds, at most 512 MiB.

    CPU tensors of 4 MB or more that the ops return come from this allocator, because fresh memory is slow to touch.
    """
    return _C.cpu_cache_bytes()


def empty_cpu_cache() -> None:
    """Return the unused memory of the CPU caching allocator to the system."""
    _C.empty_cpu_cache()
