"""Detection of torch's function transforms: torch.func (vmap, grad, jvp, ...) and forward-mode AD.

Torch has no public queries for them; this module alone uses its private parts. The registered ops have a reverse-mode
derivative only. Under a transform the public functions take another path, which is built of `torch.autograd.Function`
and torch's own ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

_torch_func_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# The vmap of is_grads_batched is older than torch.func and has no interpreter, only a dispatch key.
_OLD_VMAP: Any = torch._C._parse_dispatch_key("Batched")
_jit_is_tracing: Callable[[], bool] = torch._C._is_tracing
_is_exporting = torch.compiler.is_exporting
# A context in which ops run without autograd, and the number of the backward pass that runs in this thread.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
backward_pass_id: Callable[[], int] = torch._C._current_graph_task_id


def constant_in_graphs(function: Callable[[], bool]) -> Callable[[], bool]:
    """Let torch.compile call `function` when it records a graph, and keep the result.

    This is torch.compiler.assume_constant_result, which would import all of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def transforms_active() -> bool:
    """Return whether a transform of torch.func, forward-mode AD or an export to ONNX is active.

    All of them need torch's own ops in place of the registered ones.
    """
    return _torch_func_is_active() or forward_ad._current_level >= 0 or exports_to_onnx()


@constant_in_graphs
def exports_to_onnx() -> bool:
    """Return whether torch.onnx.export records."""
    return (_is_exporting() or _jit_is_tracing()) and torch.onnx.is_in_onnx_export()


def _has_tangent(arg: Any) -> bool:
    """Return whether an argument of an op has a tangent."""
    if isinstance(arg, list):
        return any(_has_tangent(item) for item in arg)
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None  # type: ignore[no-untyped-call]


def autograd_kernel(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Return the autograd kernel of an op: that of torch.library.register_autograd, but tangents are not lost."""
    name = op.name().replace("::", ".")
    differentiate = make_autograd_impl(op, Info(backward, setup_context))
    is_grad_enabled, any_requires_grad = torch._C.is_grad_enabled, torch._C._any_requires_grad
    after_autograd, redispatch = torch._C._after_autograd_keyset, op.redispatch

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(arg) for arg in args):
            raise NotImplementedError(
                f"llm_ext: torch.ops.{name} has no forward-mode derivative; the functions of llm_ext.ops have one"
            )
        if is_grad_enabled() and any_requires_grad(*args):
            return differentiate(keyset, *args)
        with below_autograd():  # the same, with fewer calls
            return redispatch(keyset & after_autograd, *args)

    return kernel


def is_mapped(tensor: Tensor) -> bool:
    """Return whether vmap maps over a dimension of `tensor`, at any level."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


@constant_in_graphs
def is_traced() -> bool:
    """Return whether torch.jit.trace records."""
    return _jit_is_tracing()


def is_recorded(tensor: Tensor) -> bool:
    """Return whether a graph is being recorded, which must be right for other values of `tensor`, too.

    Tensors of the meta device count as recorded: they have no values.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing() or type(tensor) is not Tensor or tensor.is_meta


def without_transforms() -> Any:
    """Return a context in which torch.func does not wrap new tensors, which may outlive its transforms."""
    return torch._C._DisableFuncTorch()


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of all transforms; it must not be mapped."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def forward_mode_is_nested() -> bool:
    """Return whether forward mode is active twice. The jvp of an autograd.Function would lose the outer tangents."""
    return sum(each.key() == _functorch.TransformType.Jvp for each in _functorch.get_interpreter_stack() or []) > 1


def forward_mode_once(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether a call on `tensors` is differentiated in forward mode only, where forward mode is not nested."""
    if any(each.key() == _functorch.TransformType.Grad for each in _functorch.get_interpreter_stack() or []):
        return False
    recorded = torch.is_grad_enabled() and any(t is not None and unwrapped(t).requires_grad for t in tensors)
    return forward_ad._current_level >= 0 and not recorded


def unpack_duals(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Tensor | None]] | None:
    """Return the values and the tangents of `tensors`, without the wrappers of transforms.

    None is returned if forward mode, as a dual level or as one torch.func.jvp, is not the only active transform.
    """
    if [each.key() for each in _functorch.get_interpreter_stack() or []] not in ([], [_functorch.TransformType.Jvp]):
        return None
    primals: list[Any] = []
    tangents: list[Tensor | None] = []
    for tensor in tensors:
        dual = (None, None) if tensor is None else forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        primals.append(None if dual[0] is None else unwrapped(dual[0]))
        tangents.append(None if dual[1] is None else unwrapped(dual[1]))
    if any(t is not None and torch._C._dispatch_keys(t).has(_OLD_VMAP) for t in tangents):
        return None
    return primals, tangents


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return a tensor with a tangent, at the active level."""
    dual: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return dual


def wanted_gradients(ctx: Any, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[bool]:
    """Return which of the needed gradients of a node's first inputs the running backward pass uses.

    torch.autograd.grad may ask for the gradients of some tensors only.
    """
    following = iter(ctx.next_functions)
    nodes = [None if tensor is None else next(following)[0] for tensor in inputs]
    return [need and is_executed(node) for need, node in zip(needs, nodes, strict=True)]


def is_executed(node: Any) -> bool:
    """Return whether the running backward pass comes to a node."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch does not say it of a leaf that torch.autograd.grad asks for
        return True


def differentiable_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of a call in a form that can be differentiated and mapped once more.

    Args:
        function: The call, built of ops that have rules for every transform.
        inputs: Its arguments.
        needs: For each input whether its gradient is needed.
        grads: Gradients of the first outputs; ``None`` means zeros.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases keep apart the gradients of two arguments that are the same tensor.
        aliases = [
            tensor.view_as(tensor) if tensor is not None and need else tensor
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        outputs = function(*aliases)
    pairs = zip(outputs, grads, strict=False)
    given = [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]
    wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    found: Any = iter(
        torch.autograd.grad(
            [output for output, _ in given],
            wanted,  # type: ignore[arg-type]
            [grad for _, grad in given],
            create_graph=create_graph,
            allow_unused=True,
        )
        if given
        else [None] * len(wanted)
    )
    return [next(found) if need else None for need in needs]
