"""llm_ext.RNN beside torch.nn.RNN, option by option, and the affine embedding."""

import copy
import io
import pickle
import warnings

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import llm_ext
from llm_ext import reference
from llm_ext.layers import AffineEmbedding

OPTIONS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([1, 3, 17]),
        "hidden_size": st.sampled_from([1, 3, 17, 33]),
        "num_layers": st.integers(1, 3),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
        "dtype": st.sampled_from(cases.DTYPES),
    }
)


def pair(options: dict[str, object]) -> tuple[llm_ext.RNN, torch.nn.RNN]:
    """Our layer, and torch's in float64 with the same weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_layers.*")
        layer, torch_layer = llm_ext.RNN(**options), torch.nn.RNN(**(options | {"dtype": torch.float64}))
    torch_layer.load_state_dict(layer.state_dict())
    return layer, torch_layer


def assert_same_layer(layer: llm_ext.RNN, torch_layer: torch.nn.RNN, x: object, hx: Tensor | None) -> None:
    """Outputs, and gradients of the input, hx and every parameter, agree; x may be a PackedSequence."""

    def run(layer: torch.nn.Module, dtype: torch.dtype) -> tuple[object, list[Tensor], dict[str, Tensor]]:
        data = x.data if isinstance(x, PackedSequence) else x
        leaves = {"input": data.detach().to(dtype).requires_grad_()}
        if hx is not None:
            leaves["hx"] = hx.detach().to(dtype).requires_grad_()
        given = x._replace(data=leaves["input"]) if isinstance(x, PackedSequence) else leaves["input"]
        output, h_n = layer(given, leaves["hx"]) if hx is not None else layer(given)
        tensors = [output.data if isinstance(output, PackedSequence) else output, h_n]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]
        leaves |= dict(layer.named_parameters())
        gradients = torch.autograd.grad(tensors, list(leaves.values()), weights)
        return output, tensors, dict(zip(leaves, gradients, strict=True))

    output, tensors, gradients = run(layer, layer.weight_hh_l0.dtype)
    true_output, true_tensors, true_gradients = run(torch_layer, torch.float64)
    assert type(output) is type(true_output)
    if isinstance(output, PackedSequence):
        for part, true_part in zip(output[1:], true_output[1:], strict=True):
            assert (part is None) == (true_part is None)
            assert part is None or torch.equal(part, true_part)
    for name, tensor, true_tensor in zip(("output", "h_n"), tensors, true_tensors, strict=True):
        cases.assert_close("rnn", tensor, true_tensor, name)
    assert list(gradients) == list(true_gradients)
    for name, gradient in gradients.items():
        cases.assert_close("rnn_backward", gradient, true_gradients[name], f"gradient of {name}")


@settings(max_examples=80)
@given(
    options=OPTIONS,
    T=st.sampled_from([1, 2, 9]),
    B=st.sampled_from([None, 0, 1, 3, 17]),
    with_hx=st.booleans(),
    contiguous=st.booleans(),
)
def test_every_option(options: dict[str, object], T: int, B: int | None, with_hx: bool, contiguous: bool) -> None:
    torch.manual_seed(0)
    layer, torch_layer = pair(options)
    batch = () if B is None else (B,)
    shape = (*batch, T) if options["batch_first"] else (T, *batch)
    x = torch.randn(*shape, layer.input_size, dtype=options["dtype"])
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = torch.randn(rows, *batch, layer.hidden_size, dtype=options["dtype"]) if with_hx else None
    if not contiguous:
        x, hx = cases.spread(x), None if hx is None else cases.spread(hx)
    assert_same_layer(layer, torch_layer, x, hx)
    assert layer(x)[0].stride() == torch_layer(x.double())[0].stride()


@settings(max_examples=60)
@given(
    options=OPTIONS,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    with_hx=st.booleans(),
    ordered=st.booleans(),
)
def test_every_option_packed(options: dict[str, object], lengths: list[int], with_hx: bool, ordered: bool) -> None:
    torch.manual_seed(0)
    layer, torch_layer = pair(options)
    if ordered:
        lengths = sorted(lengths, reverse=True)
    sequences = [torch.randn(n, layer.input_size, dtype=options["dtype"]) for n in lengths]
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = torch.randn(rows, len(lengths), layer.hidden_size, dtype=options["dtype"]) if with_hx else None
    assert_same_layer(layer, torch_layer, pack_sequence(sequences, enforce_sorted=ordered), hx)


def test_packed_is_each_sequence_alone() -> None:
    layer = llm_ext.RNN(3, 5, 2, bidirectional=True, nonlinearity="sigmoid", dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 7, 4)]
    packed, h_n = layer(pack_sequence(sequences, enforce_sorted=False))
    outputs = torch.nn.utils.rnn.unpack_sequence(packed)
    for b, sequence in enumerate(sequences):
        alone, last = layer(sequence)
        cases.assert_close("rnn", outputs[b], alone)
        cases.assert_close("rnn", h_n[:, b], last)


def test_sigmoid() -> None:
    layer = llm_ext.RNN(3, 5, nonlinearity="sigmoid", dtype=torch.float64)
    x, hx = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    y, h_n = reference.rnn(x, hx[0], *layer.all_weights[0], nonlinearity="sigmoid")
    output, last = layer(x, hx)
    cases.assert_close("rnn", output, y)
    cases.assert_close("rnn", last, h_n[None])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients(bidirectional: bool) -> None:
    layer = llm_ext.RNN(2, 3, 2, "sigmoid", bidirectional=bidirectional, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(4 if bidirectional else 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, hx: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, hx))

    assert torch.autograd.gradcheck(run, (x, hx, *parameters))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sequence_of_nothing(bidirectional: bool, given: bool, batch_first: bool) -> None:
    layer = llm_ext.RNN(3, 5, 2, batch_first=batch_first, bidirectional=bidirectional)
    rows, width = (4, 10) if bidirectional else (2, 5)
    hx = torch.randn(rows, 7, 5) if given else None
    output, h_n = layer(torch.zeros((7, 0, 3) if batch_first else (0, 7, 3)), hx)
    assert output.shape == ((7, 0, width) if batch_first else (0, 7, width))
    assert torch.equal(h_n, hx if given else torch.zeros(rows, 7, 5))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_as_torch_does(packed: bool, bidirectional: bool, training: bool) -> None:
    layer, torch_layer = pair(
        {
            "input_size": 3,
            "hidden_size": 17,
            "num_layers": 3,
            "dropout": 0.4,
            "bidirectional": bidirectional,
            "dtype": torch.float64,
        }
    )
    layer.train(training)
    torch_layer.train(training)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    given = pack_padded_sequence(x, torch.tensor([5, 4, 2, 2])) if packed else x
    outputs = []
    for each in (layer, torch_layer):
        torch.manual_seed(3)
        output, _ = each(given)
        outputs.append(output.data)
    cases.assert_close("rnn", *outputs)
    repeated = layer(given)[0].data
    assert torch.equal(repeated, outputs[0]) != training


def test_dropout_of_everything() -> None:
    layer, torch_layer = pair({"input_size": 3, "hidden_size": 4, "num_layers": 2, "dropout": 1.0})
    x = torch.randn(5, 2, 3)
    cases.assert_close("rnn", layer(x)[0], torch_layer(x.double())[0])


def test_dropout_needs_layers() -> None:
    with pytest.warns(UserWarning, match="num_layers=1"):
        llm_ext.RNN(3, 5, dropout=0.5)


POSITIONAL = [
    (3, 5),
    (3, 5, 2),
    (3, 5, 2, "relu"),
    (3, 5, 2, "relu", False),
    (3, 5, 2, "relu", False, True),
    (3, 5, 2, "relu", False, True, 0.25),
    (3, 5, 2, "relu", False, True, 0.25, True),
]
ATTRIBUTES = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout")


@pytest.mark.parametrize("arguments", POSITIONAL)
def test_constructor_seed_and_text(arguments: tuple[object, ...]) -> None:
    """From the same arguments and seed: attributes, text, names, order and values of the weights."""
    layers = []
    for kind in (llm_ext.RNN, torch.nn.RNN):
        torch.manual_seed(7)
        layers.append(kind(*arguments, dtype=torch.float64))
    layer, torch_layer = layers
    for name in (*ATTRIBUTES, "bidirectional", "training"):
        assert getattr(layer, name) == getattr(torch_layer, name)
    assert repr(layer) == repr(torch_layer)
    assert layer.extra_repr() == torch_layer.extra_repr()
    for layer_weights, torch_weights in zip(layer.all_weights, torch_layer.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer_weights, torch_weights, strict=True))
    named, torch_named = list(layer.named_parameters()), list(torch_layer.named_parameters())
    assert [name for name, _ in named] == [name for name, _ in torch_named]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, torch_named, strict=True))
    torch.manual_seed(8)
    layer.reset_parameters()
    torch.manual_seed(8)
    torch_layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), torch_layer.parameters(), strict=True))


def test_device_and_dtype() -> None:
    layer = llm_ext.RNN(3, 5, 1, "tanh", True, False, 0.0, False, "meta", torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert llm_ext.RNN(3, 5, device="cpu", dtype=torch.float32)(torch.zeros(1, 3))[0].dtype == torch.float32


def test_state_dicts_load_both_ways() -> None:
    options = {"num_layers": 2, "bidirectional": True}
    layer, torch_layer = llm_ext.RNN(3, 5, **options), torch.nn.RNN(3, 5, **options)
    x = torch.randn(4, 2, 3)
    layer.load_state_dict(torch_layer.state_dict())
    cases.assert_close("rnn", layer(x)[0], torch_layer(x)[0])
    layer.reset_parameters()
    torch_layer.load_state_dict(layer.state_dict())
    cases.assert_close("rnn", layer(x)[0], torch_layer(x)[0])


def test_copies_are_whole_and_apart() -> None:
    layer = llm_ext.RNN(3, 5, 2, "relu", bias=False, batch_first=True, dropout=0.5, bidirectional=True).eval()
    x = torch.randn(2, 4, 3)
    expected = layer(x)[0]
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ]
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    for other in copies:
        assert repr(other) == repr(layer)
        assert torch.equal(other(x)[0], expected)


def test_moving_and_replacing_parameters() -> None:
    """Whatever puts other tensors in place of the parameters, the next call uses them."""
    layer = llm_ext.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    before = layer(x)[0]
    assert layer.to(torch.float64)(x.double())[0].dtype == torch.float64
    layer.to(torch.float32)
    assert torch.equal(layer(x)[0], before)

    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    expected = reference.rnn(x, None, *doubled.values())[0]
    cases.assert_close("rnn", torch.func.functional_call(layer, doubled, (x,))[0], expected)
    assert torch.equal(layer(x)[0], before)

    layer.weight_hh_l0 = torch.nn.Parameter(doubled["weight_hh_l0"])
    weights = [layer.weight_ih_l0, doubled["weight_hh_l0"], layer.bias_ih_l0, layer.bias_hh_l0]
    cases.assert_close("rnn", layer(x)[0], reference.rnn(x, None, *weights)[0])
    layer.flatten_parameters()


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrize", "weight_norm"])
def test_reparametrized_weights(kind: str) -> None:
    layer, torch_layer = pair({"input_size": 3, "hidden_size": 5, "dtype": torch.float64})
    for each in (layer, torch_layer):
        if kind == "parametrize":
            parametrize.register_parametrization(each, "weight_hh_l0", Doubled())
        else:
            weight_norm(each, "weight_hh_l0")
            with torch.no_grad():
                each.weight_hh_l0_g.mul_(3)
    assert_same_layer(layer, torch_layer, torch.randn(4, 2, 3, dtype=torch.float64), None)


def test_training_step_changes_the_result() -> None:
    layer = llm_ext.RNN(3, 5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    x = torch.randn(4, 2, 3)
    losses = []
    for _ in range(20):
        loss = layer(x)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_gradients() -> None:
    layer = llm_ext.RNN(3, 5, 2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    expected = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, h_n = layer(x)
        assert not output.requires_grad
        assert torch.equal(output, expected[0])
        assert torch.equal(h_n, expected[1])


def test_autocast_keeps_the_dtype_of_the_weights() -> None:
    layer = llm_ext.RNN(3, 5)
    x = torch.randn(4, 2, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, pack_padded_sequence(x, torch.tensor([4, 1]))):
            output, h_n = layer(given)
            assert output.data.dtype == h_n.dtype == torch.float32


BAD_ARGUMENTS = [
    ((3.0, 5), {}, TypeError),
    ((3, "5"), {}, TypeError),
    ((0, 5), {}, ValueError),
    ((3, -1), {}, ValueError),
    ((3, 5, 0), {}, ValueError),
    ((3, 5), {"nonlinearity": "gelu"}, ValueError),
    ((3, 5), {"bias": 1}, TypeError),
    ((3, 5), {"batch_first": 0}, TypeError),
    ((3, 5), {"dropout": 1.5}, ValueError),
    ((3, 5), {"dropout": True}, ValueError),
    ((3, 5), {"dropout": "0.5"}, ValueError),
    ((3, 5), {"unheard_of": 1}, TypeError),
    ((3,), {}, TypeError),
]


@pytest.mark.parametrize(("arguments", "options", "error"), BAD_ARGUMENTS)
def test_bad_constructor(arguments: tuple[object, ...], options: dict[str, object], error: type) -> None:
    with pytest.raises(error):
        torch.nn.RNN(*arguments, **options)
    with pytest.raises(error):
        llm_ext.RNN(*arguments, **options)


# input, hx, batch_first, and our message
BAD_CALLS = [
    (torch.zeros(3), None, False, r"RNN: input must be \[T, B, I\] = \[\*, \*, 3\], got \[3\]"),
    (torch.zeros(1, 2, 2, 3), None, True, r"RNN: input must be \[B, T, I\] = .* got \[1, 2, 2, 3\]"),
    (torch.zeros(4, 2, 5), None, False, r"RNN: input must be .* = \[\*, \*, 3\], got \[4, 2, 5\]"),
    (
        torch.zeros(4, 2, 3),
        torch.zeros(2, 5),
        False,
        r"RNN: hx must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]",
    ),
    (torch.zeros(4, 2, 3), torch.zeros(2, 2, 5), False, r"RNN: hx must be .* got \[2, 2, 5\]"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 4, 5), False, r"RNN: hx must be .* = \[1, 2, 5\], got \[1, 4, 5\]"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 2, 5), True, r"RNN: hx must be .* = \[1, 4, 5\], got \[1, 2, 5\]"),
    (torch.zeros(4, 3), torch.zeros(1, 1, 5), False, r"RNN: hx must be \[L, H\] = \[1, 5\], got \[1, 1, 5\]"),
    (torch.zeros(4, 3), torch.zeros(1, 6), False, r"RNN: hx must be .* got \[1, 1, 6\]"),
    (torch.zeros(4, 2, 3).double(), None, False, r"rnn: x must be float32, got float64"),
    (torch.zeros(4, 2, 3, dtype=torch.int64), None, False, r"rnn: x must be float32, got int64"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 2, 5).double(), False, r"rnn: h0 must be float32, got f"),
    (
        pack_padded_sequence(torch.zeros(4, 2, 3), torch.tensor([4, 1])),
        torch.zeros(1, 3, 5),
        False,
        r"RNN: hx must be .* = \[1, 2, 5\], got \[1, 3, 5\]",
    ),
    (
        pack_padded_sequence(torch.zeros(4, 2, 7), torch.tensor([4, 1])),
        None,
        False,
        r"rnn: x must be \[N, I\] = \[\*, 3\], got \[5, 7\]",
    ),
]


@pytest.mark.parametrize(("x", "hx", "batch_first", "message"), BAD_CALLS)
def test_bad_call(x: object, hx: Tensor | None, batch_first: bool, message: str) -> None:
    """What torch.nn.RNN refuses we refuse, with an error that its error's handler catches too."""
    with pytest.raises((RuntimeError, ValueError)) as torch_error:
        torch.nn.RNN(3, 5, batch_first=batch_first)(x, hx)
    with pytest.raises(torch_error.type, match=message) as error:
        llm_ext.RNN(3, 5, batch_first=batch_first)(x, hx)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("sizes", [[1, 2], [3, 0], [2, 2]])
def test_a_packed_sequence_made_by_hand(sizes: list[int]) -> None:
    wrong = PackedSequence(torch.zeros(3, 3), torch.tensor(sizes))
    with pytest.raises(ValueError, match="rnn: batch_sizes must"):
        llm_ext.RNN(3, 5)(wrong)


def test_arguments_of_another_type() -> None:
    with pytest.raises(TypeError, match="rnn: w_ih must be float32 or float64, got bfloat16"):
        llm_ext.RNN(3, 5, dtype=torch.bfloat16)(torch.zeros(4, 2, 3, dtype=torch.bfloat16))


def test_affine_embedding_is_a_linear_map_of_one_hot_vectors() -> None:
    layer = AffineEmbedding(7, 5, dtype=torch.float64)
    assert not layer.bias.any()
    torch.nn.init.normal_(layer.bias)
    ids = torch.randint(7, (3, 4))
    one_hot = torch.nn.functional.one_hot(ids, 7).double()
    expected = torch.nn.functional.linear(one_hot, layer.weight.T, layer.bias)
    torch.testing.assert_close(layer(ids), expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(layer(ids), [layer.weight, layer.bias], weights)
    true_gradients = torch.autograd.grad(expected, [layer.weight, layer.bias], weights)
    torch.testing.assert_close(gradients, true_gradients)
    assert layer(ids[:0]).shape == (0, 4, 5)
    assert repr(layer) == "AffineEmbedding(7, 5)"


@pytest.mark.parametrize("bad", [-1, 7])
def test_affine_embedding_refuses_unknown_ids(bad: int) -> None:
    with pytest.raises(IndexError, match="ids must be from 0 to 6, got values from"):
        AffineEmbedding(7, 5)(torch.tensor([[3, bad]]))
