"""The recurrent layers beside those of torch.nn, option by option."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import assert_all_close, assert_close, assert_same_bits, flatten, root_mean_square_errors
from support.devices import every_device
from support.inputs import noncontiguous
from support.layers import (
    LAYERS,
    OWN_OPTIONS,
    by_reference,
    compare_layers,
    layer_pair,
    noncontiguous_state,
    op_of,
    random_state,
    rows_of,
    run_layer,
)
from support.pairwise import parametrize_pairwise
from support.tolerances import DTYPES, HALF_DTYPES
from torch import Tensor, func
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence

import llm_ext
from llm_ext import ops

every_layer = pytest.mark.parametrize("name", LAYERS)
FLAGS = (False, True)

OPTIONS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([1, 3, 17]),
        "hidden_size": st.sampled_from([2, 3, 17, 33]),
        "num_layers": st.integers(1, 3),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
        "projected": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
    }
)


@every_device
@every_layer
@settings(max_examples=60)
@given(
    options=OPTIONS,
    T=st.sampled_from([1, 2, 9]),
    B=st.sampled_from([None, 0, 1, 3, 17]),
    with_hx=st.booleans(),
    contiguous=st.booleans(),
)
def test_torch_nn(
    name: str, options: dict[str, Any], T: int, B: int | None, with_hx: bool, contiguous: bool, device: str
) -> None:
    torch.manual_seed(0)
    layer, torch_layer = layer_pair(name, options, device)
    batch = () if B is None else (B,)
    shape = (*batch, T) if options["batch_first"] else (T, *batch)
    x = torch.randn(*shape, layer.input_size, dtype=options["dtype"], device=device)
    hx = random_state(layer, rows_of(layer), *batch) if with_hx else None
    if not contiguous:
        x, hx = noncontiguous(x), noncontiguous_state(hx)
    compare_layers(name, layer, torch_layer, x, hx)
    assert layer(x)[0].stride() == torch_layer(x.double())[0].stride()


@every_device
@every_layer
@settings(max_examples=40)
@given(
    options=OPTIONS,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    with_hx=st.booleans(),
    is_sorted=st.booleans(),
)
def test_torch_nn_on_packed_sequences(
    name: str, options: dict[str, Any], lengths: list[int], with_hx: bool, is_sorted: bool, device: str
) -> None:
    torch.manual_seed(0)
    layer, torch_layer = layer_pair(name, options, device)
    if is_sorted:
        lengths = sorted(lengths, reverse=True)
    sequences = [torch.randn(n, layer.input_size, dtype=options["dtype"], device=device) for n in lengths]
    hx = random_state(layer, rows_of(layer), len(lengths)) if with_hx else None
    compare_layers(name, layer, torch_layer, pack_sequence(sequences, enforce_sorted=is_sorted), hx)


@every_device
@parametrize_pairwise(
    name=LAYERS, bidirectional=FLAGS, num_layers=(1, 2), batch_first=FLAGS, with_hx=FLAGS, projected=FLAGS
)
def test_lengths_are_those_of_packed_sequences(
    name: str, bidirectional: bool, num_layers: int, batch_first: bool, with_hx: bool, projected: bool, device: str
) -> None:
    """A padded batch with lengths gives what torch.nn gives for the packed batch; with and without autograd."""
    options = {
        "input_size": 4,
        "hidden_size": 6,
        "num_layers": num_layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "projected": projected,
        "dtype": torch.float64,
    }
    layer, torch_layer = layer_pair(name, options, device)
    lengths = torch.tensor([4, 7, 1, 7, 2])
    x = torch.randn(5, 7, 4, dtype=torch.float64, device=device)
    x = x if batch_first else x.transpose(0, 1)
    hx = random_state(layer, rows_of(layer), 5) if with_hx else None

    def packed(x: Tensor, *hx: Any) -> Any:
        rows = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        y, last = torch_layer(rows, *hx)
        return pad_packed_sequence(y, batch_first, total_length=7)[0], last

    packed.named_parameters = torch_layer.named_parameters  # type: ignore[attr-defined]
    _, tensors, gradients = run_layer(layer, x, hx, torch.float64, lengths=lengths.to(device))
    _, torch_tensors, torch_gradients = run_layer(packed, x, hx, torch.float64)
    assert_all_close(op_of(name), tensors, torch_tensors)
    assert_all_close(f"{op_of(name)}_backward", list(gradients.values()), list(torch_gradients.values()))
    with torch.no_grad():
        assert_all_close(op_of(name), layer(x, hx, lengths=lengths.to(device)), tensors)


@every_device
@every_layer
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padding_is_ignored(name: str, garbage: float, device: str) -> None:
    """No bit of a result or gradient depends on it."""
    layer = getattr(llm_ext, name)(3, 5, 2, bidirectional=True, device=device)
    lengths = torch.tensor([2, 0, 4], device=device)
    x, padding = torch.randn(4, 3, 3, device=device), torch.arange(4, device=device)[:, None] >= lengths
    tensors = []
    for filled in (x, x.masked_fill(padding[..., None], garbage)):
        leaves = [filled.clone().requires_grad_(), *layer.parameters()]
        results = flatten(layer(leaves[0], lengths=lengths))
        seeds = [torch.ones_like(result) for result in results]
        tensors.append([*results, *torch.autograd.grad(results, leaves, seeds)])
        assert not tensors[-1][len(results)][padding].any()
    assert_same_bits(*tensors)


def test_lengths_belong_to_a_padded_batch() -> None:
    layer, lengths = llm_ext.GRU(4, 5), torch.tensor([2, 1])
    with pytest.raises(ValueError, match="GRU: lengths belong to a Tensor"):
        layer(pack_padded_sequence(torch.randn(2, 2, 4), lengths), lengths=lengths)
    with pytest.raises(ValueError, match="GRU: lengths belong to a batch"):
        layer(torch.randn(2, 4), lengths=lengths)


@every_layer
def test_packed_sequence_is_each_sequence_alone(name: str) -> None:
    layer = getattr(llm_ext, name)(3, 5, 2, bidirectional=True, dtype=torch.float64, **OWN_OPTIONS[name])
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 7, 4)]
    packed, last = layer(pack_sequence(sequences, enforce_sorted=False))
    outputs = unpack_sequence(packed)
    for b, sequence in enumerate(sequences):
        output, last_alone = layer(sequence)
        assert_close(op_of(name), outputs[b], output)
        assert_all_close(op_of(name), [state[:, b] for state in flatten(last)], last_alone)


@every_device
@every_layer
@pytest.mark.parametrize("batch_first", FLAGS)
@pytest.mark.parametrize("with_hx", FLAGS)
def test_one_layer_is_the_reference(with_hx: bool, batch_first: bool, name: str, device: str) -> None:
    """Options that torch.nn lacks: the sigmoid nonlinearity."""
    own = OWN_OPTIONS[name]
    layer = getattr(llm_ext, name)(3, 5, batch_first=batch_first, dtype=torch.float64, device=device, **own)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    hx = random_state(layer, 1, 2) if with_hx else None
    y, last = by_reference(name, x, hx, dict(layer.named_parameters()), **(own if name == "RNN" else {}))
    output, h_n = layer(x.transpose(0, 1) if batch_first else x, hx)
    assert_close(op_of(name), output.transpose(0, 1) if batch_first else output, y)
    for state, expected in zip(flatten(h_n), flatten(last), strict=True):
        assert_close(op_of(name), state, expected if with_hx else expected[None])


@every_device
@every_layer
@pytest.mark.parametrize("bidirectional", FLAGS)
def test_gradcheck(bidirectional: bool, name: str, device: str) -> None:
    own = OWN_OPTIONS[name]
    layer = getattr(llm_ext, name)(2, 3, 2, bidirectional=bidirectional, dtype=torch.float64, device=device, **own)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    states = [state.requires_grad_() for state in flatten(random_state(layer, rows_of(layer), 2))]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        hx = tensors[:2] if name == "LSTM" else tensors[0]
        weights = dict(zip(names, tensors[len(states) :], strict=True))
        return tuple(flatten(torch.func.functional_call(layer, weights, (x, hx))))

    assert torch.autograd.gradcheck(run, (x, *states, *parameters))


@every_device
@parametrize_pairwise(name=LAYERS, num_layers=(1, 2), bidirectional=FLAGS, with_hx=FLAGS, batch_first=FLAGS, grad=FLAGS)
def test_sequence_of_no_steps(
    name: str, num_layers: int, bidirectional: bool, with_hx: bool, batch_first: bool, grad: bool, device: str
) -> None:
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "device": device, **OWN_OPTIONS[name]}
    layer = getattr(llm_ext, name)(3, 5, num_layers, **options)
    hx = random_state(layer, rows_of(layer), 7)
    x = torch.zeros((7, 0, 3) if batch_first else (0, 7, 3), device=device)
    with torch.set_grad_enabled(grad):
        output, h_n = layer(x, hx if with_hx else None)
    width = (layer.proj_size or 5) * (2 if bidirectional else 1)
    assert output.shape == ((7, 0, width) if batch_first else (0, 7, width))
    for last, first in zip(flatten(h_n), flatten(hx), strict=True):
        assert torch.equal(last, first if with_hx else torch.zeros_like(first))


@parametrize_pairwise(name=LAYERS, training=FLAGS, bidirectional=FLAGS, packed=FLAGS, grad=FLAGS)
def test_dropout_draws_as_torch_does(name: str, training: bool, bidirectional: bool, packed: bool, grad: bool) -> None:
    options = {"input_size": 3, "hidden_size": 17, "num_layers": 3, "dropout": 0.4, "dtype": torch.float64}
    layer, torch_layer = layer_pair(name, options | {"bidirectional": bidirectional, "projected": True})
    layer.train(training)
    torch_layer.train(training)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    batch = pack_padded_sequence(x, torch.tensor([5, 4, 2, 2])) if packed else x
    outputs = []
    with torch.set_grad_enabled(grad):
        for each in (layer, torch_layer):
            torch.manual_seed(3)
            output, _ = each(batch)
            outputs.append(output.data)
        assert_close(op_of(name), *outputs)
        repeated = layer(batch)[0].data
    assert torch.equal(repeated, outputs[0]) != training


@every_layer
def test_dropout_of_one(name: str) -> None:
    layer, torch_layer = layer_pair(name, {"input_size": 3, "hidden_size": 4, "num_layers": 2, "dropout": 1.0})
    x = torch.randn(5, 2, 3)
    assert_close(op_of(name), layer(x)[0], torch_layer(x.double())[0])


@every_layer
def test_dropout_needs_layers(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}: .*num_layers=1") as caught:
        getattr(llm_ext, name)(3, 5, dropout=0.5)
    assert caught[0].filename == __file__


@every_layer
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_state_dicts_load_both_ways(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    if name != "LSTM":
        del options["proj_size"]
    layer, torch_layer = (getattr(module, name)(3, 5, **options) for module in (llm_ext, torch.nn))
    x = torch.randn(4, 2, 3)
    layer.load_state_dict(torch_layer.state_dict())
    assert_close(op_of(name), layer(x)[0], torch_layer(x)[0])
    layer.reset_parameters()
    torch_layer.load_state_dict(layer.state_dict())
    assert_close(op_of(name), layer(x)[0], torch_layer(x)[0])


@every_layer
def test_training_reduces_a_loss(name: str) -> None:
    layer = getattr(llm_ext, name)(3, 5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(4, 2, 3)
    losses = []
    for _ in range(40):
        loss = layer(x)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_device
@parametrize_pairwise(name=LAYERS, num_layers=(1, 3), bidirectional=FLAGS, projected=FLAGS, batch_first=FLAGS)
def test_inference(
    name: str, num_layers: int, bidirectional: bool, projected: bool, batch_first: bool, device: str
) -> None:
    """Without autograd a call may take the fused path; the results are those of training."""
    own = {"proj_size": 8} if projected and name == "LSTM" else {}
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "device": device, "dtype": torch.float64}
    layer = getattr(llm_ext, name)(5, 33, num_layers, **options, **own)
    x = torch.randn(2, 70, 5, dtype=torch.float64, device=device)
    expected = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            tensors = layer(x)
        assert not any(t.requires_grad for t in flatten(tensors))
        assert_all_close(op_of(name), tensors, expected)
        assert tensors[0].stride() == expected[0].stride()


@every_layer
@pytest.mark.parametrize("bidirectional", FLAGS)
def test_fused_op(name: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference of several layers, also over packed rows, is one op call; training is not."""
    calls: list[Any] = []
    original = ops.recurrence._multilayer_rnn_forward

    def record(*args: Any) -> Any:
        calls.append(args[8])
        return original(*args)

    monkeypatch.setattr(ops.recurrence, "_multilayer_rnn_forward", record)
    layer = getattr(llm_ext, name)(5, 33, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, lengths = torch.randn(7, 4, 5, dtype=torch.float64), torch.tensor([3, 7, 1, 4])
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
    sizes = [4, 3, 3, 2, 1, 1, 1]
    cases: list[tuple[Callable[[], Any], list[int] | None]] = [
        (lambda: layer(x), None),
        (lambda: layer(x, lengths=lengths), sizes),
        (lambda: layer(rows), sizes),
    ]
    for run, batch_sizes in cases:
        calls.clear()
        (y, last) = run()
        assert calls == []
        with torch.no_grad():
            (y_evaluated, last_evaluated) = run()
        assert [None if call is None else call.tolist() for call in calls] == [batch_sizes]
        data, data_evaluated = (t.data if isinstance(t, PackedSequence) else t for t in (y, y_evaluated))
        assert_all_close(op_of(name), (data_evaluated, last_evaluated), (data, last))


@every_device
@pytest.mark.filterwarnings("ignore:TF32")  # from the switch for oneDNN
@parametrize_pairwise(name=LAYERS, dtype=HALF_DTYPES, sizes=((16, 9, 40), (200, 4, 65), (3, 40, 130), (5, 2, 96)))
def test_precision_in_16_bits(name: str, dtype: torch.dtype, sizes: tuple[int, int, int], device: str) -> None:
    """Results and gradients: root mean square errors of at most 1.5 times those of torch.nn."""
    T, B, H = sizes
    with torch.device(device):
        theirs = getattr(torch.nn, name)(30, H, dtype=dtype)
        ours, exact = getattr(llm_ext, name)(30, H, dtype=dtype), getattr(torch.nn, name)(30, H, dtype=torch.float64)
        x, weights = torch.randn(T, B, 30).to(dtype), torch.randn(T, B, H).to(dtype)
    results = []
    for layer in (ours, theirs, exact):
        layer.load_state_dict(theirs.state_dict())
        leaf = x.to(next(layer.parameters()).dtype).requires_grad_()
        # Without oneDNN, whose LSTM needs machines that compute in bfloat16.
        with torch.backends.mkldnn.flags(enabled=False):
            y, last = layer(leaf)
            gradients = torch.autograd.grad((y * weights).sum(), [leaf, *layer.parameters()])
        results.append([t.detach().double() for t in (y, *flatten(last), *gradients)])
    errors = [root_mean_square_errors(result, results[2]) for result in results[:2]]
    for mine, other in zip(*errors, strict=True):
        assert mine <= 1.5 * other


@every_layer
def test_autocast_of_rounded_inputs(name: str) -> None:
    """With lengths: x from another layer under autocast, a state in two dtypes, several layers and directions."""
    layer = getattr(llm_ext, name)(4, 5, num_layers=2, bidirectional=True)
    x, h0 = torch.randn(6, 3, 4).bfloat16(), torch.randn(4, 3, 5).bfloat16()
    lengths = torch.tensor([6, 0, 4])
    hx = (h0, h0.float()) if name == "LSTM" else h0
    exact = (h0.float(), h0.float()) if name == "LSTM" else h0.float()
    expected = layer(x.float(), exact, lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = layer(x, hx, lengths=lengths)
    assert {t.dtype for t in flatten(results)} == {torch.bfloat16}
    for a, b in zip(flatten(results), flatten(expected), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)


@every_layer
def test_autocast_of_several_layers(name: str) -> None:
    """The fused path of inference too."""
    layer = getattr(llm_ext, name)(4, 17, num_layers=2, bidirectional=True)
    x = torch.randn(70, 2, 4)
    half = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        results = layer(x)
    with torch.no_grad():
        assert_same_bits(results, half(x.bfloat16()))


@every_layer
@pytest.mark.parametrize("num_layers", [1, 2])
def test_compiled(name: str, num_layers: int) -> None:
    """torch.compile takes the whole layer in one graph, with and without autograd."""
    torch.compiler.reset()
    layer = getattr(llm_ext, name)(5, 16, num_layers)
    x = torch.randn(7, 2, 5)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_all_close(op_of(name), compiled(x), layer(x))
    with torch.no_grad():
        assert_all_close(op_of(name), compiled(x), layer(x))


# ---- errors

BAD_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = [
    ((3.0, 5), {}, TypeError),
    ((3, "5"), {}, TypeError),
    ((0, 5), {}, ValueError),
    ((3, -1), {}, ValueError),
    ((3, 5, 0), {}, ValueError),
    ((3, 5), {"bias": 2}, TypeError),
    ((3, 5), {"batch_first": "no"}, TypeError),
    ((3, 5), {"dropout": 1.5}, ValueError),
    ((3, 5), {"dropout": True}, ValueError),
    ((3, 5), {"dropout": "0.5"}, ValueError),
    ((3, 5), {"unknown": 1}, TypeError),
    ((3,), {}, TypeError),
]
BAD_OWN_OPTIONS: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("RNN", {"nonlinearity": "gelu"}, ValueError),
    ("LSTM", {"proj_size": -1}, ValueError),
    ("LSTM", {"proj_size": 5}, ValueError),
    ("LSTM", {"proj_size": 2.0}, TypeError),
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error"),
    [
        *((name, *bad) for name in LAYERS for bad in BAD_ARGUMENTS),
        *((name, (3, 5), options, error) for name, options, error in BAD_OWN_OPTIONS),
    ],
)
def test_bad_constructor(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception]
) -> None:
    for module in (torch.nn, llm_ext):
        with pytest.raises(error):
            getattr(module, name)(*arguments, **options)


Z = torch.zeros
TWO_ROWS = torch.tensor([4, 1])
# input, hx, batch_first, and the message; an LSTM is given hx twice.
BAD_CALLS = [
    (Z(3), None, False, r"{name}: input must be \[T, B, I\] = \[\*, \*, 3\], got \[3\]"),
    (Z(1, 2, 2, 3), None, True, r"{name}: input must be \[B, T, I\] = .* got \[1, 2, 2, 3\]"),
    (Z(4, 2, 5), None, False, r"({op}: x|{name}: input) must be .* = \[\*, \*, 3\], got \[4, 2, 5\]"),
    (Z(4, 2, 5), None, True, r"{name}: input must be .* = \[\*, \*, 3\], got \[4, 2, 5\]"),
    (Z(4, 5), None, False, r"{name}: input must be .* = \[\*, \*, 3\], got \[4, 5\]"),
    (Z(4, 2, 3), Z(2, 5), False, r"{name}: {hx} must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]"),
    (Z(4, 2, 3), Z(2, 2, 5), False, r"{name}: {hx} must be .* got \[2, 2, 5\]"),
    (Z(4, 2, 3), Z(1, 4, 5), False, r"{name}: {hx} must be .* = \[1, 2, 5\], got \[1, 4, 5\]"),
    (Z(4, 2, 3), Z(1, 2, 5), True, r"{name}: {hx} must be .* = \[1, 4, 5\], got \[1, 2, 5\]"),
    (Z(4, 3), Z(1, 1, 5), False, r"{name}: {hx} must be \[L, H\] = \[1, 5\], got \[1, 1, 5\]"),
    (Z(4, 3), Z(1, 6), False, r"{name}: {hx} must be \[L, H\] = \[1, 5\], got \[1, 6\]"),
    (Z(4, 2, 3).double(), None, False, r"{op}: x must be float32, got float64"),
    (Z(4, 2, 3, dtype=torch.int64), None, False, r"{op}: x must be float32, got int64"),
    (Z(4, 2, 3), Z(1, 2, 5).double(), False, r"{op}: h0 must be float32, got f"),
    (
        pack_padded_sequence(Z(4, 2, 3), TWO_ROWS),
        Z(1, 3, 5),
        False,
        r"{name}: {hx} must be .* = \[1, 2, 5\], got \[1, 3, 5\]",
    ),
    (
        pack_padded_sequence(Z(4, 2, 7), TWO_ROWS),
        None,
        False,
        r"{op}: x must be \[N, I\] = \[\*, 3\], got \[5, 7\]",
    ),
]


def assert_refused(layers: tuple[Any, Any], x: Any, hx: Any, message: str) -> None:
    """Arguments that torch.nn refuses raise an exception that the same handler catches."""
    layer, torch_layer = layers
    with pytest.raises((RuntimeError, ValueError)) as torch_error:
        torch_layer(x, hx)
    with pytest.raises(torch_error.type, match=message) as error:
        layer(x, hx)
    assert isinstance(error.value, llm_ext.ArgumentError)


@every_layer
@pytest.mark.parametrize(("x", "hx", "batch_first", "message"), BAD_CALLS)
def test_bad_call(x: Any, hx: Tensor | None, batch_first: bool, message: str, name: str) -> None:
    label = re.escape("hx[0]") if name == "LSTM" else "hx"
    state = (hx, hx) if name == "LSTM" and hx is not None else hx
    layer, torch_layer = (getattr(module, name)(3, 5, batch_first=batch_first) for module in (llm_ext, torch.nn))
    assert_refused((layer, torch_layer), x, state, message.format(name=name, op=op_of(name), hx=label))


@pytest.mark.parametrize("enforce_sorted", FLAGS)
@every_layer
def test_packed_rows_take_no_state_without_a_layer(enforce_sorted: bool, name: str) -> None:
    """The op of one direction would take it."""
    packed = pack_padded_sequence(Z(4, 2, 3), TWO_ROWS, enforce_sorted=enforce_sorted)
    state = (Z(2, 5), Z(2, 5)) if name == "LSTM" else Z(2, 5)
    with pytest.raises(ValueError, match=r"hx(\[0\])? must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]"):
        getattr(llm_ext, name)(3, 5)(packed, state)


@pytest.mark.parametrize(
    ("h", "c", "message"),
    [
        ((2, 2, 5), (2, 2, 5), r"LSTM: hx\[0\] must be \[L, B, P\] = \[2, 2, 4\], got \[2, 2, 5\]"),
        ((2, 2, 4), (2, 2, 4), r"LSTM: hx\[1\] must be \[L, B, H\] = \[2, 2, 5\], got \[2, 2, 4\]"),
        ((2, 2, 4), (2, 5), r"LSTM: hx\[1\] must be \[L, B, H\] = \[2, 2, 5\], got \[2, 5\]"),
    ],
)
def test_bad_state_of_an_lstm(h: tuple[int, ...], c: tuple[int, ...], message: str) -> None:
    options: dict[str, Any] = {"bidirectional": True, "proj_size": 4}
    layers = llm_ext.LSTM(3, 5, **options), torch.nn.LSTM(3, 5, **options)
    assert_refused(layers, Z(4, 2, 3), (Z(h), Z(c)), message)


def test_state_of_another_type() -> None:
    h = Z(1, 2, 5)
    with pytest.raises((TypeError, ValueError), match=r"LSTM: hx"):
        llm_ext.LSTM(3, 5)(Z(4, 2, 3), h)
    with pytest.raises(TypeError, match=r"LSTM: hx must be a tuple \(h, c\), got a tuple of 3"):
        llm_ext.LSTM(3, 5)(Z(4, 2, 3), (h, h, h))
    with pytest.raises(TypeError, match="GRU: hx must be a Tensor, got tuple"):
        llm_ext.GRU(3, 5)(Z(4, 2, 3), (h, h))


@parametrize_pairwise(
    num_layers=(1, 2), bidirectional=FLAGS, grad=FLAGS, form=("batch", "no batch", "lengths", "sorted", "unsorted")
)
def test_lstm_state_in_a_list(num_layers: int, bidirectional: bool, grad: bool, form: str) -> None:
    layer = llm_ext.LSTM(3, 5, num_layers, bidirectional=bidirectional)
    hx = random_state(layer, rows_of(layer), *(() if form == "no batch" else (2,)))
    x: Any = torch.randn(4, 3) if form == "no batch" else torch.randn(4, 2, 3)
    options: dict[str, Any] = {"lengths": TWO_ROWS} if form == "lengths" else {}
    if form in ("sorted", "unsorted"):
        x = pack_padded_sequence(x, TWO_ROWS if form == "sorted" else TWO_ROWS.flip(0), enforce_sorted=False)
    with torch.set_grad_enabled(grad):
        assert_same_bits(flatten(layer(x, list(hx), **options)[1]), flatten(layer(x, hx, **options)[1]))


H1 = torch.zeros(2, 2, 5)
WRONG_STATES = [
    ("LSTM", (H1,), r"hx must be a tuple \(h, c\), got a tuple of 1"),
    ("LSTM", [H1, H1, H1], r"hx must be a tuple \(h, c\), got a list of 3"),
    ("LSTM", torch.stack((H1, H1)), r"hx must be a tuple \(h, c\), got Tensor"),
    ("LSTM", (H1, None), r"hx\[1\] must be a Tensor, got NoneType"),
    ("LSTM", [None, H1], r"hx\[0\] must be a Tensor, got NoneType"),
    ("GRU", (H1,), "hx must be a Tensor, got tuple"),
    ("RNN", [H1], "hx must be a Tensor, got list"),
    ("GRU", "h", "hx must be a Tensor, got str"),
]


@pytest.mark.parametrize(("name", "hx", "message"), WRONG_STATES)
@pytest.mark.parametrize("grad", FLAGS)
def test_what_is_no_state(name: str, hx: Any, message: str, grad: bool) -> None:
    layer = getattr(llm_ext, name)(3, 5, 2)
    cell = getattr(llm_ext, f"{name}Cell")(3, 5)
    x = Z(4, 2, 3)
    with torch.set_grad_enabled(grad):
        for input in (x, x[:, 0], pack_padded_sequence(x, TWO_ROWS, enforce_sorted=False)):
            with pytest.raises(TypeError, match=f"{name}: {message}"):
                layer(input, hx)
        with pytest.raises(TypeError, match=f"{name}: {message}"):
            layer(x, hx, lengths=TWO_ROWS)
        for input in (x[0], x[0, 0]):
            with pytest.raises(TypeError, match=f"{name}Cell: {message}"):
                cell(input, hx)


def test_each_tensor_of_a_state_has_the_batch() -> None:
    """The op of one layer takes a state without the dimension of layers, and the cell's takes one with it."""
    with pytest.raises(ValueError, match=r"LSTM: hx\[1\] must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]"):
        llm_ext.LSTM(3, 5)(Z(4, 2, 3), (Z(1, 2, 5), Z(2, 5)))
    with pytest.raises(ValueError, match=r"LSTMCell: hx\[1\] must be \[B, H\] = \[2, 5\], got \[1, 2, 5\]"):
        llm_ext.LSTMCell(3, 5)(Z(2, 3), (Z(2, 5), Z(1, 2, 5)))


@every_layer
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_state_without_a_batch_can_be_detached(name: str, num_layers: int) -> None:
    layer = getattr(llm_ext, name)(3, 5, num_layers)
    for hx in ((), (random_state(layer, num_layers),)):
        for tensor in flatten(layer(Z(4, 3), *hx)[1]):
            assert not tensor.detach_().requires_grad


@every_layer
def test_state_of_another_batch_is_not_sorted_into_this_one(name: str) -> None:
    """torch.nn does so with sequences that are not sorted by length."""
    layer = getattr(llm_ext, name)(3, 5)
    packed = pack_padded_sequence(Z(4, 2, 3), torch.tensor([1, 4]), enforce_sorted=False)
    with pytest.raises(ValueError, match=rf"{name}: hx.* must be .* = \[1, 2, 5\], got \[1, 3, 5\]"):
        layer(packed, random_state(layer, 1, 3))


@every_layer
@pytest.mark.parametrize("sizes", [[1, 2], [3, 0], [2, 2]])
def test_invalid_packed_sequence(sizes: list[int], name: str) -> None:
    wrong = PackedSequence(Z(3, 3), torch.tensor(sizes))
    with pytest.raises(ValueError, match=f"{op_of(name)}: batch_sizes must"):
        getattr(llm_ext, name)(3, 5)(wrong)


@every_layer
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_weights_are_refused(name: str) -> None:
    layer = getattr(llm_ext, name)(3, 5).to(torch.complex64)
    with pytest.raises(TypeError, match=f"{op_of(name)}: w_ih must be .*float16, got complex64"):
        layer(Z(4, 2, 3, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_an_empty_tuple_is_not_a_state(name: str) -> None:
    layer = getattr(llm_ext, name)(2, 3)
    x = torch.randn(4, 2) if name.endswith("Cell") else torch.randn(5, 4, 2)
    with pytest.raises(TypeError, match=f"{name}: hx must be a "):
        layer(x, ())


@every_device
@parametrize_pairwise(
    name=LAYERS, bidirectional=FLAGS, num_layers=(1, 2), rows=("whole", "batch_first", "unbatched", "packed")
)
def test_all_states(name: str, bidirectional: bool, num_layers: int, rows: str, device: str) -> None:
    """The states after every step are those of the op, in the layout of the input."""
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": rows == "batch_first"}
    layer = getattr(llm_ext, name)(3, 5, dtype=torch.float64, device=device, **options)
    x, hx = torch.randn(6, 4, 3, dtype=torch.float64, device=device), random_state(layer, rows_of(layer), 4)
    packed = pack_padded_sequence(x, torch.tensor([6, 6, 3, 1]))
    given: Any = {"batch_first": x.transpose(0, 1), "unbatched": x[:, 0], "packed": packed}.get(rows, x)
    data, sizes = (packed.data, packed.batch_sizes) if rows == "packed" else (x, None)
    if rows == "unbatched":
        data, hx = x[:, :1], tuple(h[:, 0] for h in hx) if name == "LSTM" else hx[:, 0]
    op_state = tuple(h.view(len(h), -1, 5) for h in flatten(hx))
    y, last, every = layer(given, hx, return_all_states=True)
    assert_same_bits(flatten([y[0], last]), flatten([layer(given, hx)[0][0], layer(given, hx)[1]]))
    _, _, expected = ops.multilayer_rnn(
        layer.mode,
        data,
        op_state,
        layer.all_weights,
        bidirectional=bidirectional,
        batch_sizes=sizes,
        return_all_states=True,
    )
    if rows == "batch_first":
        expected = tuple(tensor.transpose(1, 2) for tensor in expected)
    elif rows == "unbatched":
        expected = tuple(tensor.squeeze(2) for tensor in expected)
    assert isinstance(every, tuple) == (name == "LSTM")
    assert_same_bits(every, expected)


@every_layer
@pytest.mark.parametrize("form", ["resets", "mapped resets", "no steps", "forward mode twice"])
def test_all_states_of_one_layer_without_a_batch(name: str, form: str) -> None:
    """They are those of a batch of one row."""
    layer = getattr(llm_ext, name)(3, 5, dtype=torch.float64)
    x, hx = torch.randn(0 if form == "no steps" else 4, 3, dtype=torch.float64), random_state(layer, 1)
    state = tuple(h[:, None] for h in hx) if name == "LSTM" else hx[:, None]
    resets = torch.tensor([[False, True, False, True], [False, False, True, True]])[:, : len(x)]

    def run(x: Tensor, reset: Tensor | None, batched: bool) -> list[Tensor]:
        if not batched:
            return flatten(layer(x, hx, reset=reset, return_all_states=True))
        reset = None if reset is None else reset[:, None]
        y, *others = flatten(layer(x[:, None], state, reset=reset, return_all_states=True))
        last, every = others[: len(others) // 2], others[len(others) // 2 :]
        return [y.squeeze(1), *(tensor.squeeze(1) for tensor in last), *(tensor.squeeze(2) for tensor in every)]

    def results(batched: bool) -> Any:
        if form == "mapped resets":
            return func.vmap(lambda reset: run(x, reset, batched))(resets)
        if form == "forward mode twice":
            return func.jacfwd(func.jacfwd(lambda x: run(x, None, batched)))(x)
        return run(x, resets[0], batched)

    assert_all_close(op_of(name), results(False), results(True))
