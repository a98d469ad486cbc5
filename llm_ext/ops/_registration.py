"""Helpers of all families of ops: registration of autograd and autocast, and explanations of failures."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

import llm_ext._C  # importing it registers the ops
from llm_ext.ops._transforms import autograd_kernel, constant_in_graphs, is_traced
from llm_ext.ops.argument_checks import DtypeError

torch_ops = torch.ops.llm_ext

# An op raises one of these when it refuses its arguments, or when an argument is not a tensor.
FAILURES = (RuntimeError, TypeError, AttributeError)

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_library = torch.library.Library("llm_ext", "IMPL")  # type: ignore[no-untyped-call]


def explain(failure: Exception, check: Callable[..., None], *args: Any) -> NoReturn:
    """Raise the fault that `check` finds in the arguments of a failed call, or else the failure itself.

    The ops refuse whatever they cannot run, so a call that succeeds does not pay for the better messages.
    """
    try:
        check(*args)
    except Exception as explanation:
        raise explanation from None
    # Torch also raises NotImplementedError for sparse and quantized tensors, and names their backend.
    missing = re.match(r"Could not run 'llm_ext::\w+' with arguments from the '(\w+)' backend", str(failure))
    values = [value for arg in args for value in (arg if isinstance(arg, tuple) else (arg,))]
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "")
    if isinstance(failure, NotImplementedError) and missing is not None and missing[1].lower() == device:
        built = "without CUDA" if llm_ext._C.build_info()["cuda"] is None else "with CUDA"
        raise NotImplementedError(f"llm_ext: no kernel of this op for {device}; built {built}") from None
    raise_out_of_memory(failure)
    raise failure


def explain_cast(
    failure: Exception, check: Callable[..., None], given: tuple[Any, ...], cast: tuple[Any, ...]
) -> NoReturn:
    """Do as `explain` for the arguments of an op as autocast has cast them; a wrong dtype is named as it was given."""

    def checked(*args: Any) -> None:
        try:
            check(*cast)
        except DtypeError:
            check(*args)
            raise

    explain(failure, checked, *given)


def raise_out_of_memory(failure: Exception) -> None:
    """Raise torch.OutOfMemoryError if `failure` says that an op found no memory."""
    if "out of memory" in str(failure):
        raise torch.OutOfMemoryError(str(failure)) from None


def register_fake(op: str, kernel: Callable[..., Any]) -> None:
    """Register the fake kernel of `op`.

    Torch calls it, too, if some tensors are on the meta device and others are not. Results of the others' device would
    be uninitialized memory.
    """

    def checked(*args: Any) -> Any:
        items = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [item for item in items if isinstance(item, Tensor)]
        # Lengths and the like may be on the CPU beside tensors of another device, but not without memory beside these.
        devices = {t.device.type for t in tensors if t.is_floating_point() or t.is_meta}
        if len(devices) > 1:
            raise RuntimeError(f"{op}: tensors must be on one device, got {' and '.join(sorted(devices))}")
        return kernel(*args)

    torch.library.register_fake(f"llm_ext::{op}", checked)


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the derivative of `op`; gradients that are not needed are not materialized."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        try:
            return backward(ctx, *grads)
        except RuntimeError as failure:
            raise_out_of_memory(failure)
            raise

    kernel = autograd_kernel(getattr(torch_ops, op).default, differentiate, setup)
    _library.impl(op, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def refuse_derivative(op: str, why: str = "differentiate the function of llm_ext.ops") -> None:
    """Make differentiation of `op` an error instead of a silently missing gradient."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"llm_ext: torch.ops.llm_ext.{op} has no derivative; {why}")

    register_autograd(op, backward, setup_context)


def register_autocast(op: Any, float32_arguments: tuple[int, ...] = ()) -> None:
    """Run `op` in autocast's dtype under autocast, as torch's own layers do; float64 stays float64.

    Args:
        op: overload of an op.
        float32_arguments: indices of the arguments that are cast to float32, because they accumulate over a sequence.
    """

    def cast_on(device: str) -> Callable[..., Any]:
        def cast(*args: Any) -> Any:
            lower = torch.get_autocast_dtype(device)

            def cast_one(arg: Any, target: torch.dtype) -> Any:
                if isinstance(arg, list):
                    return [cast_one(a, target) for a in arg]
                return arg.to(target) if isinstance(arg, Tensor) and arg.dtype in AUTOCAST_DTYPES else arg

            with torch.autocast(device, enabled=False):
                return op(
                    *(cast_one(arg, torch.float32 if i in float32_arguments else lower) for i, arg in enumerate(args))
                )

        return cast

    name = op.name().removeprefix("llm_ext::")
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, cast_on(device), key)  # type: ignore[no-untyped-call]


def is_autocast_on(device: str) -> bool:
    """Return whether autocast is on for a type of device; the meta device, for one, has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> Any:
    """Return a context in which autocast is off for a type of device."""
    return torch.autocast(device, enabled=False) if is_autocast_on(device) else contextlib.nullcontext()


def autocast_arguments(*tensors: Tensor | None) -> Any:
    """Return `tensors` as autocast passes them to an op; for paths that do not call the registered op."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "meta")
    if not is_autocast_on(device):
        return tensors
    lower = torch.get_autocast_dtype(device)
    return tuple(t.to(lower) if isinstance(t, Tensor) and t.dtype in AUTOCAST_DTYPES else t for t in tensors)


def match_dtype(like: Tensor, *tensors: Tensor | None) -> Any:
    """Return `tensors` in the dtype of `like` where autocast is on and would cast them anyway.

    Layers under autocast pass each other rounded results; ops that are called through the dispatcher cast them there.
    """
    if not isinstance(like, Tensor) or like.dtype not in AUTOCAST_DTYPES:
        return tensors
    if not is_autocast_on(like.device.type):
        return tensors
    return tuple(t.to(like.dtype) if isinstance(t, Tensor) and t.dtype in AUTOCAST_DTYPES else t for t in tensors)


def is_on_cuda(x: Any) -> bool:
    """Return whether x is a tensor on a CUDA device."""
    return isinstance(x, Tensor) and x.is_cuda


@constant_in_graphs
def _matmul_allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def allows_tf32(x: Tensor) -> bool:
    """Return whether products with x may use TF32, by the setting of torch's own matrix products."""
    return x.is_cuda and x.dtype == torch.float32 and _matmul_allows_tf32()


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Return whether autograd records a call with these arguments; only then are activations saved.

    torch.jit.trace records calls without gradients, too, which may be trained later.
    """
    return (torch.is_grad_enabled() or is_traced()) and any(t is not None and t.requires_grad for t in tensors)


def fake_gradients(*tensors_and_needs: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    """Return fake gradients in the shapes of their tensors, empty where the gradient is not needed."""
    some = next(tensor for tensor, _ in tensors_and_needs if tensor is not None)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else some.new_empty(0)
        for tensor, need in tensors_and_needs
    )


def needed(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed, None for the others."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
