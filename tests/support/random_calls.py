"""Random calls of every op and public function: valid ones, and changes that make them hostile.

All choices come from a `Choices`, so that a seed or hypothesis can make them.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import llm_ext
from llm_ext import ops
from llm_ext.ops.linear import use_native_gemm
from support.additive_attention import SELECTIONS, additive_functions, additive_inputs, key_selection
from support.comparison import compare, flatten
from support.inputs import leaf, noncontiguous
from support.multilayer import evaluated, multilayer_functions, multilayer_inputs
from support.op_cases import opcheck_cases
from support.pooling import op_name, pool_functions, pool_inputs
from support.recurrences import RECURRENCES, is_smooth, recurrence_functions, recurrence_inputs
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES

T = TypeVar("T")


class Choices:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.number(0, len(options) - 1)]

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def flag(self) -> bool:
        return self.number(0, 1) == 1


@dataclass
class Call:
    """A call of a function. `reference` is None where nothing is compared but two calls of the function itself."""

    name: str
    function: Callable[..., Any]
    arguments: list[Any] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    op: str = ""  # its row in the table of tolerances
    gradients: bool = True  # whether those of the reference can be compared
    changed: bool = False  # whether the arguments may be invalid
    refusals: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, IndexError)
    unread: tuple[int, ...] = ()  # results that may hold uninitialized memory, which nothing reads

    def run(self) -> object:
        return self.function(*self.arguments, **self.named)

    def __str__(self) -> str:
        given = [describe(a) for a in self.arguments] + [f"{n}={describe(a)}" for n, a in self.named.items()]
        return f"{self.name}({', '.join(given)})"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if value.layout != torch.strided or value.is_meta:
            return f"{text} {value.device} {value.layout}"
        if not value.is_contiguous():
            text += f" strides {list(value.stride())}"
        return text if value.is_floating_point() or value.numel() > 8 else f"{text} {value.tolist()}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)


# ---- valid calls

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 33, 40, 65)
_CASES = opcheck_cases()


def registered_op(choices: Choices) -> Call:
    op, arguments = choices.one_of(_CASES)
    call = Call(f"torch.ops.llm_ext.{op}", getattr(torch.ops.llm_ext, op), list(arguments))
    if op in ("gru_forward", "lstm_forward"):  # behind the rows within lengths nothing is saved
        call.unread = (2,) if op == "gru_forward" else (3,)
    return call


def linear(choices: Choices) -> Call:
    N, I, O = (choices.one_of((*SIZES, 129)) for _ in range(3))  # noqa: E741
    dtype = choices.one_of(DTYPES)
    leading = choices.one_of(([N], [2, N], [], [1] * 70))
    named = {"x": leaf(*leading, I, dtype=dtype), "weight": leaf(O, I, dtype=dtype, scale=max(I, 1) ** -0.5)}
    if choices.flag():
        named["bias"] = leaf(O, dtype=dtype)
    if O > 0 and choices.flag():
        named = evaluated(named)
        return Call("ops.linear_argmax", _native(ops.linear_argmax), [], named)
    reference = (lambda **n: (F.linear(**n),)) if len(leading) < 60 else None  # torch's loss takes up to 64 dimensions
    return Call("ops.linear", _native(ops.linear), [], named, reference, "linear")


def _native(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The function where it runs on the native GEMM. What torch's own product makes of a call is not the question."""
    return lambda **named: (function(**named),) if use_native_gemm(named["x"]) else ()


def _selection(choices: Choices, B: int, steps: int) -> dict[str, Tensor]:
    selection = {}
    if choices.flag():
        selection["lengths"] = torch.randint(0, steps + 1, (B,))
    if choices.flag():
        selection["mask"] = torch.rand(B, steps) < 0.5
    return selection


def pool(choices: Choices) -> Call:
    B, steps, D = choices.one_of(SIZES[:9]), choices.one_of(SIZES), choices.one_of((*SIZES, 130))
    prefix = choices.flag()
    inputs = pool_inputs(
        B, steps, D, choices.one_of(ALL_DTYPES), folded=choices.flag(), state=prefix and choices.flag()
    )
    function, reference = pool_functions(prefix, **_selection(choices, B, steps))
    return Call(f"ops.{op_name(prefix)}", function, [], inputs, reference, op_name(prefix))


def pool_of_options(choices: Choices) -> Call:
    """With lengths and mask as arguments, which may be changed."""
    B, steps, D = choices.one_of(SIZES[:9]), choices.one_of(SIZES), choices.one_of(SIZES)
    prefix = choices.flag()
    function: Callable[..., Any] = ops.prefix_pool if prefix else ops.attention_pool
    named = pool_inputs(B, steps, D, choices.one_of(ALL_DTYPES), folded=choices.flag())
    return Call(f"ops.{op_name(prefix)}", function, [], named | _selection(choices, B, steps))


def additive(choices: Choices) -> Call:
    B, Tq, Tk, A, Dv = (choices.one_of(SIZES[:most]) for most in (8, 13, 14, 17, 17))
    inputs = additive_inputs(B, Tq, Tk, A, Dv, choices.one_of(ALL_DTYPES))
    selection = key_selection(choices.one_of(SELECTIONS), B, Tq, Tk)
    weights = choices.flag()
    if choices.flag():
        return Call("ops.additive_attention", ops.additive_attention, [], inputs | selection)
    function, reference = additive_functions(need_weights=weights, **selection)
    return Call("ops.additive_attention", function, [], inputs, reference, "additive_attention")


def _batch_sizes(choices: Choices, steps: int, B: int) -> Tensor:
    sizes = sorted((choices.number(1, max(B, 1)) for _ in range(steps - 1)), reverse=True)
    return torch.tensor([B, *sizes])


def recurrence(choices: Choices) -> Call:
    cell = choices.one_of(RECURRENCES)
    steps, B = choices.one_of(SIZES[:14]), choices.one_of(SIZES[:12])
    I, H = choices.one_of(SIZES), choices.one_of(SIZES[1:])  # noqa: E741
    if cell.projected:
        H = max(H, 2)
    dtype, state = choices.one_of(ALL_DTYPES), choices.flag()
    kind = choices.one_of(("padded", "lengths", "packed"))
    options: dict[str, Any] = {"reverse": choices.flag()}
    shape: tuple[int, ...] = (steps, B, I)
    if kind == "lengths":
        options["lengths"] = torch.randint(0, steps + 1, (B,))
    elif kind == "packed" and steps > 0 and B > 0:
        options["batch_sizes"] = _batch_sizes(choices, steps, B)
        shape, state = (int(options["batch_sizes"].sum()), I), True
    inputs = recurrence_inputs(cell, shape, B, H, dtype, state=state, bias=choices.flag())
    if dtype in HALF_DTYPES and min(inputs["w_hh"].shape) > 0:
        # A single large weight would let the rounding of states grow from step to step.
        with torch.no_grad():
            inputs["w_hh"] /= torch.linalg.matrix_norm(inputs["w_hh"].float(), 2).clamp(min=1)
    function, reference = recurrence_functions(cell, **options)
    # In 16 bits the gradient of a single recurrent weight has a sum of errors of the same sign: that of torch.nn.RNN is
    # off by up to 5 times the tolerance.
    single = dtype in HALF_DTYPES and inputs["w_hh"].shape[1] == 1
    gradients = is_smooth(cell, dtype) and not single
    return Call(f"ops.{cell}", function, [], inputs, reference, cell.op, gradients=gradients)


def multilayer(choices: Choices) -> Call:
    cell = choices.one_of(RECURRENCES[:5])
    steps, B = choices.one_of(SIZES[:14]), choices.one_of(SIZES[:9])
    I, H = choices.one_of(SIZES), choices.one_of(SIZES[1:])  # noqa: E741
    both, dtype = choices.flag(), choices.one_of(DTYPES)
    inputs = multilayer_inputs(
        cell, (steps, B, I), B, H, dtype, layers=choices.number(1, 3), bidirectional=both, state=choices.flag()
    )
    if choices.flag():
        inputs = evaluated(inputs)
    function, reference = multilayer_functions(cell, bidirectional=both)
    return Call(f"ops.multilayer_rnn {cell}", function, [], inputs, reference, cell.op)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, requires_grad=True)


def _integers(most: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, most + 1, shape)


Modules = list[tuple[torch.nn.Module, list[Callable[[], Tensor]]]]


def _modules() -> Modules:
    """Layers and models, with what makes their arguments."""
    modules: Modules = [
        (llm_ext.RNN(5, 9, num_layers=2, nonlinearity="relu"), [_numbers(4, 3, 5), _numbers(2, 3, 9)]),
        (llm_ext.GRU(5, 9, bidirectional=True, batch_first=True), [_numbers(3, 4, 5), _numbers(2, 3, 9)]),
        (llm_ext.GRU(5, 9), [_numbers(4, 5), _numbers(1, 9)]),
        (llm_ext.LSTM(5, 9, proj_size=4), [_numbers(4, 3, 5)]),
        (llm_ext.RNNCell(5, 9), [_numbers(3, 5), _numbers(3, 9)]),
        (llm_ext.GRUCell(5, 9), [_numbers(5), _numbers(9)]),
        (llm_ext.LSTMCell(5, 9), [_numbers(3, 5)]),
        (llm_ext.Linear(5, 7), [_numbers(2, 3, 5)]),
        (llm_ext.AttentionPool(5, 3), [_numbers(2, 4, 5)]),
        (llm_ext.AttentionPool(5, 3, "tanh", causal=True), [_numbers(2, 4, 5)]),
        (llm_ext.AdditiveAttention(5, 6, 4), [_numbers(2, 3, 5), _numbers(2, 4, 6)]),
        (llm_ext.LLM(11, 6, 9, 11, 2, 0.0, cell="lstm"), [_integers(10, 2, 4)]),
        (llm_ext.Seq2Seq(11, 12, 6, 9), [_integers(10, 2, 4), _integers(11, 2, 3), _integers(4, 2)]),
        (llm_ext.SequenceClassifier(3, 9, feature_dim=5), [_numbers(2, 4, 5), _integers(4, 2)]),
    ]
    quantized: Modules = []
    for weights in ("int8", "bfloat16"):
        for module, arguments in copy.deepcopy(modules):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what has no layer to quantize
                entries = llm_ext.quantize_(module.requires_grad_(False), weights)
            if any(entry.reason is None for entry in entries):
                quantized.append((module.eval(), arguments))
    return [*modules, *quantized]


_MODULES = _modules()


def module(choices: Choices) -> Call:
    instance, arguments = choices.one_of(_MODULES)
    call = Call(type(instance).__name__, instance, [argument() for argument in arguments])
    if not any(parameter.requires_grad for parameter in instance.parameters()):  # quantized layers have no gradients
        call.function = torch.no_grad()(instance.forward)
    call.refusals = (*call.refusals, AttributeError)  # as torch.nn, which asks for input.dim() of anything
    return call


KINDS: tuple[Callable[[Choices], Call], ...] = (
    registered_op,
    registered_op,
    registered_op,
    linear,
    pool,
    pool_of_options,
    additive,
    recurrence,
    multilayer,
    module,
)

# ---- changes


def relaid(choices: Choices, t: Tensor) -> Tensor:
    """The same numbers in another layout."""
    kind = choices.one_of(("gaps", "swapped", "offset", "outer"))
    detached = t.detach()
    if kind == "gaps" and t.is_floating_point() and t.dim() <= 5:
        new = noncontiguous(t)
    elif kind == "swapped" and t.dim() >= 2:
        new = detached.transpose(0, -1).contiguous().transpose(0, -1)
    elif kind == "outer":
        new = torch.stack((detached, detached), -1)[..., 1]
    else:
        new = detached.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(detached)
    return new.requires_grad_(t.requires_grad)


OTHER_SIZES = (0, 1, 2, 3, 17, 1 << 20, 1 << 31, 1 << 50, (1 << 62) + (1 << 20))
OTHER_DTYPES = (*ALL_DTYPES, torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64, torch.int8)
OTHER_NUMBERS = (math.nan, math.inf, -math.inf, 1e30, -1e8, 1e-40, -0.0)
OTHER_INTEGERS = (-1, 0, 1, 2, 7, 1 << 31, 1 << 62, -(1 << 62), (1 << 63) - 1, -(1 << 63))
OTHER_STRINGS = ("GRU", "LSTM", "RNN_TANH", "tanh", "relu", "sigmoid", "", "é\0x")


def hostile_tensor(choices: Choices, t: Tensor) -> Any:
    """Another tensor, or something that is not a tensor."""
    detached = t.detach()
    kind = choices.number(0, 13)
    if kind == 0:
        return None
    if math.prod(max(size, 1) for size in t.shape) > 1 << 24:  # huge already: to copy it would take long
        return t
    if kind == 1:
        return detached.to(choices.one_of(OTHER_DTYPES))
    if kind == 2:
        return detached.to("meta")
    if kind == 3:
        return detached.unsqueeze(choices.number(0, t.dim()))
    if kind == 4 and t.dim() > 0:
        return detached.select(choices.number(0, t.dim() - 1), 0) if t.numel() else detached.flatten()
    if kind == 5:
        return detached.reshape(*[1] * choices.number(5, 90), *t.shape)
    if kind == 6 and t.dim() > 0:  # one size changed
        shape = list(t.shape)
        shape[choices.number(0, t.dim() - 1)] = choices.one_of(OTHER_SIZES[:6])
        return torch.randn(shape).to(t.dtype) if math.prod(shape) <= 1 << 20 else detached
    if kind == 7 and t.dim() > 0:  # a huge tensor that takes no memory
        shape = [choices.one_of((0, *OTHER_SIZES)) if choices.flag() else size for size in t.shape]
        shape[choices.number(0, t.dim() - 1)] = 0
        return _without_elements(shape, t.dtype)
    if kind == 8 and t.dim() > 0:  # expanded
        shape = [1 << choices.one_of((31, 40)) if choices.number(0, t.dim()) == 0 else size for size in t.shape]
        return detached.flatten()[:1].sum().to(t.dtype).expand(shape) if math.prod(shape) < 1 << 60 else detached
    if kind == 9 and t.numel() > 0:
        new = detached.clone()
        if t.is_floating_point():
            new.view(-1)[choices.number(0, t.numel() - 1)] = choices.one_of(OTHER_NUMBERS)
        elif t.dtype == torch.int64:
            new.view(-1)[choices.number(0, t.numel() - 1)] = choices.one_of(OTHER_INTEGERS)
        return new
    if kind == 10:
        return detached.to_sparse() if t.dim() > 0 and t.dtype != torch.bool else detached.tolist()
    if kind == 11 and t.numel() > 0:  # every row is the same memory
        return detached.as_strided(t.shape, [0] * t.dim())
    if kind == 12:
        return choices.one_of((0, 1.5, "x", [], (), detached.numpy() if t.dtype != torch.bfloat16 else {}))
    return detached.clone().requires_grad_(t.is_floating_point() and not t.requires_grad)


def _without_elements(shape: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape, or of one that torch allows, without elements."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        return torch.empty([min(size, 3) for size in shape], dtype=dtype)


def changed(choices: Choices, value: Any) -> Any:
    """Another value in place of an argument."""
    if isinstance(value, Tensor):
        try:
            return hostile_tensor(choices, value)
        except (RuntimeError, TypeError, ValueError):  # torch cannot make every change to what has been changed already
            return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return choices.one_of(OTHER_STRINGS)
    if isinstance(value, (list, tuple)) and value:
        items = list(value)
        i = choices.number(0, len(items) - 1)
        kind = choices.number(0, 3)
        if kind == 0:
            del items[i]
        elif kind == 1:
            items.insert(i, items[i])
        else:
            items[i] = changed(choices, items[i])
        return type(value)(items)
    return choices.one_of((None, torch.randn(3, 4), torch.randn(2), torch.tensor([2, 1]), 1, True))


def random_call(choices: Choices) -> Call:
    """A call, one in four of them as it should be, one in four in another layout, the others hostile."""
    call = choices.one_of(KINDS)(choices)
    kind = choices.number(0, 3)
    for _ in range((0, 2, 1, 3)[kind]):
        keys: list[Any] = [*range(len(call.arguments)), *call.named]
        if not keys:
            break
        key = choices.one_of(keys)
        holder: Any = call.arguments if isinstance(key, int) else call.named
        if kind == 1:
            if isinstance(holder[key], Tensor):
                holder[key] = relaid(choices, holder[key])
        else:
            holder[key] = changed(choices, holder[key])
            call.changed = True
    return call


# ---- what comes of a call


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts of anything."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _bits(t: Tensor) -> object:
    if t.is_meta or t.layout != torch.strided:
        return tuple(t.shape)
    content = t.detach().resolve_conj().reshape(-1).view(torch.uint8).numpy()
    short = len(content) <= 1 << 20  # of more, a digest: a copy would need as much memory again
    return tuple(t.shape), t.dtype, content.tobytes() if short else hashlib.blake2b(content.data).digest()


def outcome(call: Call) -> tuple[object, bool]:
    """The bits of results and gradients, or the error, and whether it was refused. Errors of other kinds are raised."""
    try:
        results = [t for i, t in enumerate(flatten(call.run())) if i not in call.unread]
        graded = [t for t in results if t.requires_grad and not t.is_meta and not t.is_complex()]
        leaves = [t for t in tensors_in([call.arguments, call.named]) if t.requires_grad and t.is_leaf]
        if graded and leaves:
            sums = [t.masked_fill(t.isinf(), 0).sum() for t in graded]
            results += [t for t in torch.autograd.grad(sums, leaves, allow_unused=True) if t is not None]
        return [_bits(t) for t in results], False
    except call.refusals as refusal:
        return (type(refusal), str(refusal)), True


def fault(call: Call, first: object, second: object, refused: bool, compares: bool) -> str | None:
    """What is wrong with a call that was made twice; if nothing and it is valid, it may be compared."""
    if first != second:
        return f"two calls differ: {str(first)[:300]} and {str(second)[:300]}"
    if refused:
        assert isinstance(first, tuple)
        message = str(first[1])
        if not call.changed:
            return f"a valid call is refused: {message}"
        unclear = any(word in message for word in ("INTERNAL ASSERT", "std::", "bad_alloc", "basic_string", "vector::"))
        return f"unclear message: {message}" if unclear else None
    if compares and call.reference is not None:
        try:
            functions = [call.function, call.reference]
            # The largest of many rounding errors of 16 bits; those of more bits are far from the tolerances.
            factor = 2.0 if any(t.element_size() == 2 for t in tensors_in(call.named)) else 1.0
            compare(call.op, functions, call.named, gradients=call.gradients, factor=factor)
        except AssertionError as difference:
            return str(difference)
    return None
