"""The conditions under which a model may use the weights of a layer without calling it, or mix the rows of a batch."""

from __future__ import annotations

from torch import nn

__all__ = ["keeps_samples_apart", "may_bypass"]


def may_bypass(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Return whether an op on the weights of `layer` computes the same as a call of `layer`.

    It does if the layer is exactly of one of `types`, its `forward` has not been replaced, and it has no forward hooks.
    A subclass, and a layer with a parametrization, which torch turns into one, may compute something else.
    """
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    return type(layer) in types and "forward" not in vars(layer) and not hooked


def keeps_samples_apart(model: nn.Module) -> bool:
    """Return whether the gradients of each sample are computed, so that each layer must read [B, ...].

    Opacus and the expanded weights of torch mark parameters by an attribute.
    """
    return model.training and any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
