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

from llm_ext import ops
from support.comparison import flatten
from support.memory import memory_limit

SIZES = (0, 2, 1 << 40)
FUNCTIONS: dict[str, Callable[..., Any]] = {"RNN_TANH": ops.rnn, "GRU": ops.gru, "LSTM": ops.lstm}
GATES = {"RNN_TANH": 1, "GRU": 3, "LSTM": 4}


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ones, with memory for one element at most."""
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


def linear(N: int, I: int, O: int) -> None:  # noqa: E741
    run(ops.linear, tensor(N, I), tensor(O, I), tensor(O))


def linear_of_rows(A: int, B: int, I: int, O: int) -> None:  # noqa: E741
    run(ops.linear, tensor(A, B, I), tensor(O, I))


def linear_argmax(N: int, I: int, O: int) -> None:  # noqa: E741
    run(ops.linear_argmax, tensor(N, I).detach(), tensor(O, I).detach())


def packed(rows: int, columns: int, blocks: int = 1) -> Tensor:
    """A weight of bfloat16, as kernels read it."""
    return tensor(-(-rows // 16), blocks, -(-columns // 2), 16, 2, dtype=torch.int16)


def quantized_linear(N: int, I: int, O: int) -> None:  # noqa: E741
    run(torch.ops.llm_ext.quantized_linear_forward, tensor(N, I).detach(), packed(O, I), None, None, I, O)


def pool(B: int, T: int, D: int, *, function: Callable[..., Any], kind: str) -> None:
    if kind == "scores":
        run(lambda e, scores: function(e, scores=scores), tensor(B, T, D), tensor(B, T))
        return
    lengths = count(T, B) if kind == "lengths" else None
    mask = tensor(B, T, dtype=torch.bool) if kind == "mask" else None
    run(lambda e, u: function(e, u, lengths=lengths, mask=mask), tensor(B, T, D), tensor(D))


def additive(B: int, Tq: int, Tk: int, A: int, Dv: int, *, kind: str) -> None:
    lengths = count(Tk, B) if kind == "lengths" else None
    function = partial(ops.additive_attention, key_lengths=lengths, need_weights=kind == "weights")
    run(function, tensor(B, Tq, A), tensor(B, Tk, A), tensor(A), tensor(B, Tk, Dv))


def recurrence(T: int, B: int, I: int, H: int, *, mode: str, kind: str) -> None:  # noqa: E741
    rows, x = GATES[mode] * H, tensor(T, B, I)
    if kind == "layers":
        run(ops.multilayer_rnn, mode, x.detach(), None, [(tensor(rows, I).detach(), tensor(rows, H).detach())])
        return
    if kind == "quantized":
        weights = packed(H, I, GATES[mode]), None, packed(H, H, GATES[mode]), *[None] * 7
        run(torch.ops.llm_ext.quantized_rnn_forward, mode, x.detach(), None, None, *weights, I, H, H, False)
        return
    lengths = count(T, B) if kind == "lengths" else None
    sizes = count(B, T) if kind == "packed" else None
    state = (tensor(B, H), tensor(B, H)) if mode == "LSTM" else tensor(B, H)
    function: Callable[..., Any] = partial(FUNCTIONS[mode], lengths=lengths, batch_sizes=sizes)
    x = x if sizes is None else tensor(T * B, I)
    run(lambda x, *weights: function(x, state, *weights), x, tensor(rows, I), tensor(rows, H))


def prefix_pool_backward(B: int, T: int, D: int) -> None:
    e, u, share = tensor(B, T, D).detach(), tensor(D).detach(), tensor(B, T).detach()
    torch.ops.llm_ext.prefix_pool_backward(None, None, None, e, u, None, e, share, True, True, False, False)


def linearized(B: int, H: int, *, op: str) -> None:
    """A step of B rows."""
    w_hh, rows = tensor(H, H).detach(), tensor(B, H).detach()
    given = {
        "recurrence_tangent": (None,) * 5,
        "recurrence_adjoint": (None,) * 4,
        "recurrence_curvature": (rows, None, None, rows, None),
    }
    arguments = ("RNN_TANH", w_hh, None, None, rows, rows, None, *given[op], torch.tensor([B]), False)
    getattr(torch.ops.llm_ext, op)(*arguments)


def calls() -> dict[str, Callable[..., None]]:
    """Functions of sizes."""
    functions: list[Callable[..., None]] = [
        linear,
        linear_of_rows,
        linear_argmax,
        quantized_linear,
        prefix_pool_backward,
    ]
    found = {function.__name__: function for function in functions}
    for kind in ("u", "scores", "lengths", "mask"):
        found[f"attention_pool {kind}"] = partial(pool, function=ops.attention_pool, kind=kind)
        found[f"prefix_pool {kind}"] = partial(pool, function=ops.prefix_pool, kind=kind)
    for op in ("recurrence_tangent", "recurrence_adjoint", "recurrence_curvature"):
        found[op] = partial(linearized, op=op)
    for kind in ("plain", "lengths", "weights"):
        found[f"additive_attention {kind}"] = partial(additive, kind=kind)
    for kind in ("plain", "lengths", "packed", "layers", "quantized"):
        for mode in FUNCTIONS:
            found[f"{mode} {kind}"] = partial(recurrence, mode=mode, kind=kind)
    return found


def main(seconds: int, *names: str) -> None:
    with memory_limit(2000):
        for name, function in calls().items():
            parameters = inspect.signature(function).parameters.values()
            letters = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
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
