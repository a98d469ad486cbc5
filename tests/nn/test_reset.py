"""Layers and cells with resets beside a loop over the steps with the cells of torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, assert_close, assert_same_bits, flatten
from support.devices import every_device
from support.layers import CELLS, LAYERS, layer_pair, op_of, random_state
from support.pairwise import parametrize_pairwise
from support.tolerances import DTYPES
from torch import Tensor, func, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext

T, B, I, H = 6, 4, 3, 5  # noqa: E741


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def loop_over_cells(layer: Any, x: Tensor, hx: Any, reset: Tensor, reset_to: Any) -> tuple[Tensor, Any]:
    """The layers of a torch.nn layer over x [T, B, I], step by step, with resets [T, B]."""
    options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    states, outputs = [], []
    for row in range(layer.num_layers):
        cell = getattr(nn, f"{type(layer).__name__}Cell")(x.shape[-1], H, dtype=x.dtype, device=x.device, **options)
        weights = {
            name.removesuffix(f"_l{row}"): p for name, p in layer.named_parameters() if name.endswith(f"_l{row}")
        }
        state = tuple(tensor[row] for tensor in as_tuple(hx))
        to = tuple(tensor[row] for tensor in as_tuple(reset_to))
        ys = []
        for step, mask in zip(x, reset, strict=True):
            state = tuple(torch.where(mask[:, None], new, old) for new, old in zip(to, state, strict=True))
            given = state if len(state) == 2 else state[0]
            state = as_tuple(func.functional_call(cell, weights, (step, given)))
            ys.append(state[0])
        x = torch.stack(ys)
        outputs.append(x)
        states.append(state)
    last = tuple(torch.stack(tensors) for tensors in zip(*states, strict=True))
    return x, last if len(last) == 2 else last[0]


def gradients_of(results: Any, leaves: list[Tensor]) -> list[Tensor]:
    tensors = flatten(results)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]
    return list(torch.autograd.grad(tensors, leaves, seeds, allow_unused=True, materialize_grads=True))


@every_device
@parametrize_pairwise(
    name=LAYERS,
    num_layers=(1, 2),
    rows=("whole", "batch_first", "unbatched", "packed"),
    hx=(False, True),
    reset_to=(None, 1, B),
    dtype=DTYPES,
)
def test_torch_nn(
    name: str, num_layers: int, rows: str, hx: bool, reset_to: int | None, dtype: torch.dtype, device: str
) -> None:
    options = {"input_size": I, "hidden_size": H, "num_layers": num_layers, "dtype": dtype}
    layer, torch_layer = layer_pair(name, options, device)
    layer.batch_first = rows == "batch_first"
    batch = 1 if rows == "unbatched" else B
    x, reset = torch.randn(T, batch, I, dtype=dtype, device=device), torch.rand(T, batch, device=device) < 0.3
    zeros = tuple(torch.zeros_like(tensor) for tensor in as_tuple(random_state(layer, num_layers, batch)))
    first = random_state(layer, num_layers, batch) if hx else zeros if len(zeros) == 2 else zeros[0]
    to = None if reset_to is None else random_state(layer, num_layers, min(reset_to, batch))
    given = [x, *(flatten(first) if hx else ()), *flatten(to)]
    leaves, doubles = ([t.to(kind).clone().requires_grad_() for t in given] for kind in (dtype, torch.float64))

    def split(tensors: list[Tensor]) -> list[Any]:
        """Return x, hx and reset_to of the leaves."""
        count = len(zeros)
        groups = [tensors[1 : 1 + count * hx], tensors[1 + count * hx :]]
        return [tensors[0], *(None if not g else tuple(g) if count == 2 else g[0] for g in groups)]

    x, own_hx, own_to = split(leaves)
    if rows == "unbatched":

        def without_batch(state: Any) -> Any:
            found = tuple(tensor.squeeze(1) for tensor in flatten(state))
            return None if not found else found if len(found) == 2 else found[0]

        y, last = layer(x[:, 0], without_batch(own_hx), reset=reset[:, 0], reset_to=without_batch(own_to))
        results = [y.unsqueeze(1), *(tensor.unsqueeze(1) for tensor in flatten(last))]
    elif rows == "batch_first":
        y, last = layer(x.transpose(0, 1), own_hx, reset=reset.T, reset_to=own_to)
        results = [y.transpose(0, 1), *flatten(last)]
    elif rows == "packed":
        lengths = torch.tensor([4, 6, 1, 5])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        of_rows = pack_padded_sequence(reset, lengths, enforce_sorted=False).data
        y, last = layer(packed, own_hx, reset=of_rows, reset_to=own_to)
        results = [pad_packed_sequence(y)[0], *flatten(last)]
    else:
        results = flatten(layer(x, own_hx, reset=reset, reset_to=own_to))

    x, torch_hx, torch_to = split(doubles)
    everywhere = [tensor.double() for tensor in zeros]
    none: Any = tuple(everywhere) if len(everywhere) == 2 else everywhere[0]
    torch_hx, torch_to = none if torch_hx is None else torch_hx, none if torch_to is None else torch_to
    if rows == "packed":  # each row by itself
        found = []
        for b, length in enumerate([4, 6, 1, 5]):
            one = [tuple(t[:, b % t.shape[1] : b % t.shape[1] + 1] for t in as_tuple(s)) for s in (torch_hx, torch_to)]
            y, last = loop_over_cells(torch_layer, x[:length, b : b + 1], one[0], reset[:length, b : b + 1], one[1])
            found.append([nn.functional.pad(y, (0, 0, 0, 0, 0, T - length)), *flatten(last)])
        expected = [torch.cat(tensors, 1) for tensors in zip(*found, strict=True)]
    else:
        expected = flatten(loop_over_cells(torch_layer, x, torch_hx, reset, torch_to))

    assert_all_close(op_of(name), results, expected)
    found_gradients = gradients_of(results, [*leaves, *layer.parameters()])
    torch_gradients = gradients_of(expected, [*doubles, *torch_layer.parameters()])
    assert_all_close(f"{op_of(name)}_backward", found_gradients, torch_gradients, "gradient")


@every_device
@parametrize_pairwise(name=CELLS, batched=(True, False), hx=(True, False), reset_to=(None, 1, B), dtype=DTYPES)
def test_cells(name: str, batched: bool, hx: bool, reset_to: int | None, dtype: torch.dtype, device: str) -> None:
    cell, torch_cell = layer_pair(name, {"input_size": I, "hidden_size": H, "dtype": dtype}, device)
    batch = (B,) if batched else ()
    x = torch.randn(*batch, I, dtype=dtype, device=device)
    given = random_state(cell, *batch) if hx else None
    to = None if reset_to is None else random_state(cell, *((reset_to,) if batched else ()))
    for reset in (torch.tensor([True, False, True, False]),) if batched else (torch.tensor(True), torch.tensor(False)):
        reset = reset.to(device)
        leaves = [tensor.requires_grad_() for tensor in (x, *flatten(given), *flatten(to))]
        results = flatten(cell(x, given, reset=reset, reset_to=to))
        old = [tensor.double() for tensor in flatten(given)] or [torch.zeros(*batch, H).to(x).double()] * len(results)
        new = [tensor.double() for tensor in flatten(to)] or [torch.zeros(H).to(x).double()] * len(results)
        state = tuple(torch.where(reset[..., None], *pair) for pair in zip(new, old, strict=True))
        expected = flatten(torch_cell(x.double(), state if len(state) == 2 else state[0]))
        assert_all_close(op_of(name), results, expected)
        found = gradients_of(results, [*leaves, *cell.parameters()])
        torch_gradients = gradients_of(expected, [*leaves, *torch_cell.parameters()])
        assert_all_close(f"{op_of(name)}_backward", found, torch_gradients, "gradient")


@pytest.mark.parametrize("name", CELLS)
def test_cells_under_autocast(name: str) -> None:
    """The state that a reset puts in place may be float32 beside a rounded one."""
    cell = getattr(llm_ext, name)(3, 5)
    x, reset, zeros = torch.randn(4, 3), torch.tensor([True, False, True, False]), random_state(cell, 4)
    with torch.autocast("cpu", torch.bfloat16):
        state = cell(x)
        actual, expected = flatten(cell(x, state, reset=reset, reset_to=zeros)), flatten(cell(x, zeros))
        kept = flatten(cell(x, state))
    for result, replaced, old in zip(actual, expected, kept, strict=True):
        assert_same_bits(result, torch.where(reset[:, None], replaced, old))


def test_projection() -> None:
    """A loop over calls of one step, whose state is replaced in between."""
    layer = llm_ext.LSTM(I, H, 2, proj_size=2, dtype=torch.float64)
    x, reset, to = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3, random_state(layer, 2, 1)
    state: Any = tuple(torch.zeros(2, B, size, dtype=torch.float64) for size in (2, H))
    outputs = []
    for step, mask in zip(x, reset, strict=True):
        state = tuple(torch.where(mask[:, None], new, old) for new, old in zip(to, state, strict=True))
        y, state = layer(step[None], state)
        outputs.append(y)
    assert_all_close("lstm", layer(x, reset=reset, reset_to=to), (torch.cat(outputs), state))


def test_compiled() -> None:
    """One graph for a layer and a cell, which is right for other resets."""
    layer, cell = llm_ext.LSTM(I, H), llm_ext.LSTMCell(I, H)
    x, hx = torch.randn(2, B, I), random_state(cell, B)

    def run(reset: Tensor) -> Any:
        return layer(x, reset=reset), cell(x[0], hx, reset=reset[0])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for share in (0.0, 0.5):
        reset = torch.rand(2, B) < share
        assert_all_close("lstm", compiled(reset), run(reset))


def test_vmap_over_a_cell() -> None:
    cell = llm_ext.GRUCell(I, H)
    x, h, resets = torch.randn(2, B, I), torch.randn(2, B, H), torch.rand(2, B) < 0.5
    found = func.vmap(lambda x, h, reset: cell(x, h, reset=reset))(x, h, resets)
    for i in range(2):
        assert_close("gru", found[i], cell(x[i], h[i], reset=resets[i]))


RESET = torch.zeros(T, B).bool()
BAD: list[tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any], type[Exception], str]] = [
    ("GRU", {}, (T, B, I), {"reset": RESET.T}, ValueError, r"GRU: reset must be \[T, B\] = \[6, 4\], got \[4, 6\]"),
    (
        "GRU",
        {"batch_first": True},
        (B, T, I),
        {"reset": RESET},
        ValueError,
        r"GRU: reset must be \[B, T\] = \[4, 6\], got \[6, 4\]",
    ),
    ("RNN", {}, (T, I), {"reset": RESET}, ValueError, r"RNN: reset must be \[T\] = \[6\], got \[6, 4\]"),
    ("RNN", {}, (T, B, I), {"reset": RESET.long()}, TypeError, "RNN: reset must be bool, got int64"),
    ("RNN", {}, (T, B, I), {"reset": RESET.to("meta")}, ValueError, "RNN: reset must be on cpu like input, got meta"),
    (
        "LSTM",
        {"bidirectional": True},
        (T, B, I),
        {"reset": RESET},
        ValueError,
        "LSTM: reset needs one direction, got bidirectional=True",
    ),
    ("GRU", {}, (T, B, I), {"reset_to": torch.zeros(1, B, H)}, ValueError, "GRU: reset_to belongs to reset"),
    (
        "LSTM",
        {},
        (T, B, I),
        {"reset": RESET, "reset_to": torch.zeros(1, B, H)},
        TypeError,
        r"LSTM: reset_to must be a tuple \(h, c\), got Tensor",
    ),
    (
        "LSTM",
        {},
        (T, B, I),
        {"reset": RESET, "reset_to": (torch.zeros(1, B, H), torch.zeros(1, 2, H))},
        ValueError,
        r"LSTM: reset_to\[1\] must be \[L, B, H\] = \[1, 4, 5\], got \[1, 2, 5\]",
    ),
    ("GRUCell", {}, (B, I), {"reset": RESET}, ValueError, r"GRUCell: reset must be \[B\] = \[4\], got \[6, 4\]"),
    ("GRUCell", {}, (I,), {"reset": RESET[0]}, ValueError, r"GRUCell: reset must be \[\] = \[\], got \[4\]"),
    ("RNNCell", {}, (B, I), {"reset_to": torch.zeros(B, H)}, ValueError, "RNNCell: reset_to belongs to reset"),
    (
        "GRUCell",
        {},
        (B, I),
        {"reset": RESET[0], "reset_to": torch.zeros(B, H).double()},
        TypeError,
        "GRUCell: reset_to must be float32, got float64",
    ),
    (
        "GRUCell",
        {},
        (B, I),
        {"reset": RESET[0], "hx": torch.zeros(1, H)},
        ValueError,
        r"GRUCell: hx must be \[B, H\] = \[4, 5\], got \[1, 5\]",
    ),
]


@pytest.mark.parametrize(("name", "options", "shape", "given", "error", "message"), BAD)
def test_bad_arguments(
    name: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        getattr(llm_ext, name)(I, H, **options)(torch.zeros(shape), **given)


def test_bad_arguments_with_packed_rows() -> None:
    packed = pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([6, 5, 2, 1]))
    with pytest.raises(ValueError, match=r"GRU: reset must be \[N\] = \[14\], got \[6, 4\]"):
        llm_ext.GRU(I, H)(packed, reset=RESET)
