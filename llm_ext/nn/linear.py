"""Linear layers on the native GEMM."""

from __future__ import annotations

from torch import Tensor, nn

from llm_ext import ops
from llm_ext.nn.arguments import check_input
from llm_ext.nn.scripting import as_type
from llm_ext.nn.torch_ao import WarnsTorchAo

__all__ = ["Linear"]


class Linear(WarnsTorchAo, nn.Linear):
    """Apply an affine map ``y = x Wᵀ + b``; drop-in for :class:`torch.nn.Linear`, which it subclasses.

    On a CPU, in float32 and float64, the product runs on the native GEMM; elsewhere it is torch's.

    Args:
        in_features: I, features of the input.
        out_features: O, features of the output.
        bias: Whether the bias exists.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: W, ``[O, I]``.
        bias: b, ``[O]``.

    Example:
        >>> layer = llm_ext.Linear(20, 30)
        >>> layer(torch.randn(128, 20)).shape
        torch.Size([128, 30])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input ``[*, I]`` mapped to ``[*, O]``.

        Raises:
            ValueError: A shape or device does not fit.
            TypeError: The dtypes differ.
        """
        try:
            return ops.linear(input, self.weight, self.bias)
        except (RuntimeError, TypeError):
            if isinstance(input, Tensor):
                leading = (None,) * (input.dim() - 1)
                check_input("Linear", "input", input, "*, I", (*leading, self.in_features), self.weight)
            raise

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the torch.nn.Linear with the same parameters, which torch.jit.script compiles instead."""
        return as_type(self, nn.Linear) if type(self).forward is Linear.forward else self
