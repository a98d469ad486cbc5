"""torch.ao.quantization looks up the exact class of a layer and passes over those of llm_ext, which say so."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

__all__ = ["WarnsTorchAo"]


class WarnsTorchAo:
    """Mixin of layers: a warning when torch.ao.quantization sets the attribute that it gives every module."""

    # How torch.ao.quantization treats the layer; the warning ends with it.
    _torch_ao: ClassVar[str] = (
        "leaves layers of llm_ext in floating point; quantize the copy that llm_ext.to_torch(model) returns"
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            warnings.warn(f"{type(self).__name__}: torch.ao.quantization {self._torch_ao}", stacklevel=2)
        super().__setattr__(name, value)
