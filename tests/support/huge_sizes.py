"""Calls of the ops over huge sizes that take no memory: of tensors without elements, and of expanded ones.

`python -m support.huge_sizes SECONDS [CALL]...` makes them all: each ends soon, or is refused for its memory. One that
takes longer than SECONDS ends the process, and its name is the last one printed.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_ext import ops
from support.comparison import flatten
from support.memory import memory_limit

OPS = torch.ops.llm_ext
SIZES = (0, 2, 1 << 40)
FUNCTIONS: dict[str, Callable[..., Any]] = {"RNN_TANH": ops.rnn, "GRU": ops.gru, "LSTM": ops.lstm}
GATES = {"RNN_TANH": 1, "GRU": 3, "LSTM": 4}


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ones, with memory for one element at most."""
    if max(shape) >= 1 << 63:
        raise ValueError(f"torch has no tensor of {shape}")
    whole = torch.empty(shape, dtype=dtype) if 0 in shape else torch.ones(1, dtype=dtype).expand(shape)
    return whole.requires_grad_(dtype.is_floating_point)


def count(n: int, rows: int) -> Tensor:
    """[rows] of n."""
    return torch.full((1,), n).expand(rows)


def run(function: Callable[..., Any], *arguments: Any) -> None:
    """Call, and differentiate the results."""
    results = [t for t in flatten(function(*arguments)) if t.requires_grad]
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    if results:
        grads = [torch.zeros(1).expand(t.numel()).view(t.shape) for t in results]
        torch.autograd.grad(results, leaves, grads, allow_unused=True)


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors without gradients."""
    return [tensor(*shape).detach() for shape in shapes]


def linear(N: int, I: int, O: int) -> None:  # noqa: E741
    run(ops.linear, tensor(N, I), tensor(O, I), tensor(O))


def linear_of_rows(A: int, B: int, I: int, O: int) -> None:  # noqa: E741
    run(ops.linear, tensor(A, B, I), tensor(O, I))


def linear_argmax(N: int, I: int, O: int) -> None:  # noqa: E741
    ops.linear_argmax(*inputs((N, I), (O, I), (O,)))


def packed(weights: str, rows: int, columns: int, blocks: int = 1, *, state: bool = False) -> tuple[Tensor, Any]:
    """A weight as kernels read it, and its scale."""
    panels, scale = -(-rows // 16), tensor(blocks * rows).detach()
    if weights == "bfloat16":
        return tensor(panels, blocks, -(-columns // 2), 16, 2, dtype=torch.int16), None
    if state:
        return tensor(panels, blocks, -(-columns // 4) + 1, 16, 4, dtype=torch.int8), scale
    return tensor(panels, blocks, -(-columns // 2), 16, 2, dtype=torch.int8), scale


def quantized_linear(N: int, I: int, O: int, *, weights: str) -> None:  # noqa: E741
    x, b = inputs((N, I), (O,))
    OPS.quantized_linear_forward(x, *packed(weights, O, I), b, I, O)


def pool(B: int, T: int, D: int, *, function: Callable[..., Any], kind: str) -> None:
    if kind == "scores":
        run(lambda e, scores: function(e, scores=scores), tensor(B, T, D), tensor(B, T))
        return
    lengths = count(T, B) if kind == "lengths" else None
    mask = tensor(B, T, dtype=torch.bool) if kind == "mask" else None
    run(lambda e, u: function(e, u, lengths=lengths, mask=mask), tensor(B, T, D), tensor(D))


def prefix_pool_state(B: int, T: int, D: int) -> None:
    run(lambda e, u, *state: ops.prefix_pool(e, u, state=state), tensor(B, T, D), tensor(D), tensor(B, 2), tensor(B, D))


def prefix_pool_backward(B: int, T: int, D: int) -> None:
    e, u, share = inputs((B, T, D), (D,), (B, T))
    OPS.prefix_pool_backward(None, None, None, e, u, None, e, share, True, True, False, False)


def additive(B: int, Tq: int, Tk: int, A: int, Dv: int, *, kind: str) -> None:
    lengths = count(Tk, B) if kind == "lengths" else None
    mask = tensor(B, Tq, Tk, dtype=torch.bool) if kind == "mask" else None
    function = partial(ops.additive_attention, key_lengths=lengths, mask=mask, need_weights=kind == "weights")
    run(function, tensor(B, Tq, A), tensor(B, Tk, A), tensor(A), tensor(B, Tk, Dv))


def attention_step(N: int, H: int, Tk: int, A: int, D: int, *, kind: str) -> None:
    """A step of N rows of H features, each with a source of its own."""
    lengths = count(Tk, N) if kind == "lengths" else None
    x = torch.zeros(1).long().expand(1, N) if kind == "ids" else tensor(1, N, H).detach()
    table = tensor(Tk, 4 * H).detach() if kind == "ids" else None
    state, w_ih, w_hh, b = inputs((1, N, H), (4 * H, 0 if kind == "ids" else H), (4 * H, H), (4 * H,))
    w_query, keys, v, values, w_out, b_out = inputs((A, H), (N, Tk, A), (A,), (N, Tk, D), (D, H), (D,))
    rest = table, w_query, keys, v, values, lengths, w_out, b_out
    OPS.attention_step("LSTM", x, state, state, [w_ih, w_hh, b, b], True, *rest)


def recurrence(T: int, B: int, I: int, H: int, *, mode: str, kind: str) -> None:  # noqa: E741
    rows = GATES[mode] * H
    sizes = count(B, T) if kind == "packed" else None
    state = (tensor(B, H), tensor(B, H)) if mode == "LSTM" else (tensor(B, H),)
    x = tensor(T, B, I) if sizes is None else tensor(T * B, I)
    leaves = [x, *state, tensor(rows, I), tensor(rows, H), tensor(rows), tensor(rows)]

    def function(x: Tensor, *tensors: Tensor) -> Any:
        h0 = tensors[: len(state)] if mode == "LSTM" else tensors[0]
        return FUNCTIONS[mode](x, h0, *tensors[len(state) :], batch_sizes=sizes)

    run(function, *leaves)


def recurrence_lengths(T: int, B: int, I: int, H: int, *, mode: str, projected: bool = False) -> None:  # noqa: E741
    """The ops themselves: their functions pack rows before they call them."""
    rows, P = GATES[mode] * H, 1 if projected else H
    x, h0, c0, w_ih, w_hh, b = inputs((T, B, I), (B, P), (B, H), (rows, I), (rows, P), (rows,))
    states, w_hr = ((h0, c0), inputs((P, H)) if projected else [None]) if mode == "LSTM" else ((h0,), [])
    name = mode.split("_")[0].lower()
    options = ("tanh", False, False) if name == "rnn" else (False, False)
    last = [] if name == "rnn" else [True]
    rest = None, count(T, B), *options
    forward, backward = getattr(OPS, f"{name}_forward"), getattr(OPS, f"{name}_backward")
    y, *results = forward(x, *states, w_ih, w_hh, b, b, *w_hr, *rest, *last)
    needs = [True] * (6 + 2 * len(w_hr))
    backward(y, *results[: len(states)], x, *states, w_ih, w_hh, *w_hr, y, *results[len(states) :], *rest, *needs)


def layers(T: int, B: int, I: int, H: int, *, mode: str, kind: str) -> None:  # noqa: E741
    """Two layers."""
    rows, ids = GATES[mode] * H, kind == "ids"
    x = torch.zeros(1).long().expand(T, B) if ids else inputs((T * B, I) if kind == "packed" else (T, B, I))[0]
    state, w_ih, w_hh, b, table = inputs((2, B, H), (rows, I), (rows, H), (rows,), (I, rows))
    c0 = state if mode == "LSTM" else None
    weights = [w_ih, w_hh, b, b, w_hh, w_hh, b, b]
    sizes = count(B, T) if kind == "packed" else None
    OPS.multilayer_rnn_forward(mode, x, state, c0, weights, True, False, [table] if ids else [], sizes, False)


def quantized(T: int, B: int, I: int, H: int, *, mode: str, weights: str, kind: str) -> None:  # noqa: E741
    G, P = GATES[mode], 1 if kind == "projected" else H
    x, h0, c0, b = inputs((T * B, I) if kind == "packed" else (T, B, I), (B, P), (B, H), (G * H,))
    w_hr = packed(weights, P, H, state=True) if kind == "projected" else (None, None)
    matrices = *packed(weights, H, I, G), *packed(weights, H, P, G, state=True), b, b, *w_hr
    sizes, lengths = (count(B, T) if kind == "packed" else None), (count(T, B) if kind == "lengths" else None)
    state = (h0, c0 if mode == "LSTM" else None)
    OPS.quantized_rnn_forward(mode, x, *state, *matrices, sizes, lengths, I, H, P, False)


def linearized(B: int, H: int, *, op: str, mode: str) -> None:
    """A step of B rows; an LSTM with a projection."""
    at: tuple[Any, ...]
    if mode == "RNN_TANH":
        w_hh, rows = inputs((H, H), (B, H))
        at = mode, w_hh, None, None, rows, rows, None
        given = {
            "recurrence_tangent": (rows, rows, None, rows, None),
            "recurrence_adjoint": (rows, rows, None, None),
            "recurrence_curvature": (rows, None, None, rows, None),
        }
    else:
        w_hh, w_hr, saved, y, c, a = inputs((4 * H, 1), (1, H), (B, 6 * H), (B, 1), (B, H), (B, 4 * H))
        at = mode, w_hh, w_hr, saved, y, y, c
        given = {
            "recurrence_tangent": (a, y, c, y, c),
            "recurrence_adjoint": (a, y, c, saved),
            "recurrence_curvature": (a, c, c, c, c),
        }
    getattr(OPS, op)(*at, *given[op], torch.tensor([B]), False)


def calls() -> dict[str, Callable[..., None]]:
    """Functions of sizes."""
    functions: list[Callable[..., None]] = [
        linear,
        linear_of_rows,
        linear_argmax,
        prefix_pool_state,
        prefix_pool_backward,
    ]
    found = {function.__name__: function for function in functions}
    for kind in ("u", "scores", "lengths", "mask"):
        found[f"attention_pool {kind}"] = partial(pool, function=ops.attention_pool, kind=kind)
        found[f"prefix_pool {kind}"] = partial(pool, function=ops.prefix_pool, kind=kind)
    for op in ("recurrence_tangent", "recurrence_adjoint", "recurrence_curvature"):
        for mode in ("RNN_TANH", "LSTM"):
            found[f"{op} {mode}"] = partial(linearized, op=op, mode=mode)
    for kind in ("plain", "lengths", "mask", "weights"):
        found[f"additive_attention {kind}"] = partial(additive, kind=kind)
    for kind in ("plain", "lengths", "ids"):
        found[f"attention_step {kind}"] = partial(attention_step, kind=kind)
    for mode in FUNCTIONS:
        for kind in ("plain", "packed"):
            found[f"{mode} {kind}"] = partial(recurrence, mode=mode, kind=kind)
        for kind in ("plain", "packed", "ids"):
            found[f"{mode} layers {kind}"] = partial(layers, mode=mode, kind=kind)
        found[f"{mode} lengths"] = partial(recurrence_lengths, mode=mode)
    found["LSTM projected lengths"] = partial(recurrence_lengths, mode="LSTM", projected=True)
    for weights in ("int8", "bfloat16"):
        found[f"linear {weights}"] = partial(quantized_linear, weights=weights)
        for mode in FUNCTIONS:
            for kind in ("plain", "lengths", "packed", *["projected"] * (mode == "LSTM")):
                found[f"{mode} {weights} {kind}"] = partial(quantized, mode=mode, weights=weights, kind=kind)
    return found


class _GivenTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the arguments of ops that are given tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if op.namespace == "llm_ext":
            values = zip(op._schema.arguments, arguments, strict=True)
            given = {
                each.name for each, value in values if isinstance(value, Tensor) or (isinstance(value, list) and value)
            }
            self.found |= {(op._opname, name) for name in given}
        return op(*arguments, **(options or {}))


def letters_of(function: Callable[..., None]) -> list[str]:
    """The names of the sizes."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def given_tensors() -> set[tuple[str, str]]:
    """Pairs of an op and its argument that a call gives a tensor, with sizes of 2."""
    mode = _GivenTensors()
    with mode:
        for function in calls().values():
            function(*[2] * len(letters_of(function)))
    return mode.found


def main(seconds: int, *names: str) -> None:
    with memory_limit(2000):
        for name, function in calls().items():
            letters = letters_of(function)
            for sizes in itertools.product(SIZES, repeat=len(letters)):
                if SIZES[-1] not in sizes or (names and name not in names):
                    continue
                print(name, *map("{}={}".format, letters, sizes), flush=True)
                signal.alarm(seconds)
                with contextlib.suppress(RuntimeError, ValueError):  # no memory, or sizes that torch does not allow
                    function(*sizes)
    signal.alarm(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
