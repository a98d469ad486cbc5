"""The recurrent layers and cells beside those of torch.nn, option by option, and the affine embedding."""

import copy
import io
import pickle
import re
import warnings
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import every_device
from torch import Tensor
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import llm_ext
from llm_ext import reference
from llm_ext.layers import AffineEmbedding

KINDS = ("RNN", "GRU", "LSTM")
every_kind = pytest.mark.parametrize("kind", KINDS)
# The option that one kind has and the others have not.
OWN: dict[str, dict[str, Any]] = {"RNN": {"nonlinearity": "sigmoid"}, "GRU": {}, "LSTM": {"proj_size": 2}}

OPTIONS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([1, 3, 17]),
        "hidden_size": st.sampled_from([1, 3, 17, 33]),
        "num_layers": st.integers(1, 3),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
        "projected": st.booleans(),
        "dtype": st.sampled_from(cases.DTYPES),
    }
)

State = Tensor | tuple[Tensor, Tensor] | None


def op(kind: str) -> str:
    """The op that a layer or cell calls."""
    return kind.removesuffix("Cell").lower()


def pair(kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Our layer or cell, and torch's in float64 with the same weights."""
    options = dict(options)
    if options.pop("projected", False) and kind == "LSTM":
        options["proj_size"] = options["hidden_size"] // 2
    if not kind.startswith("RNN"):
        options.pop("nonlinearity", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_layers.*")
        layer = getattr(llm_ext, kind)(**options)
        torch_layer = getattr(torch.nn, kind)(**(options | {"dtype": torch.float64}))
    torch_layer.load_state_dict(layer.state_dict())
    return layer, torch_layer


def state(layer: Any, *sizes: int) -> Any:
    """A random state for a layer or cell: [*sizes, H], of an LSTM a pair."""
    dtype = next(layer.parameters()).dtype
    h, c = (
        torch.randn(*sizes, size, dtype=dtype) for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)
    )
    return (h, c) if isinstance(layer, (llm_ext.LSTM, llm_ext.LSTMCell)) else h


def rows(layer: Any) -> int:
    return layer.num_layers * (2 if layer.bidirectional else 1)


def by_reference(kind: str, x: Tensor, hx: State, weights: dict[str, Tensor], **options: Any) -> Any:
    """One layer in one direction, its weights under the names that the layer gives them."""
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh", "weight_hr": "w_hr"}
    tensors = {names[name.removesuffix("_l0")]: tensor for name, tensor in weights.items()}
    return getattr(reference, op(kind))(x, hx, **tensors, **options)


def assert_same_layer(kind: str, layer: Any, torch_layer: Any, x: Any, hx: State) -> None:
    """Outputs, and gradients of the input, hx and every parameter, agree; x may be a PackedSequence."""

    def run(layer: Any, dtype: torch.dtype) -> tuple[Any, list[Tensor], dict[str, Tensor]]:
        data = x.data if isinstance(x, PackedSequence) else x
        leaves = {"input": data.detach().to(dtype).requires_grad_()}
        for i, part in enumerate([] if hx is None else cases.flatten(hx)):
            leaves[f"hx[{i}]"] = part.detach().to(dtype).requires_grad_()
        given = x._replace(data=leaves["input"]) if isinstance(x, PackedSequence) else leaves["input"]
        first = [leaf for name, leaf in leaves.items() if name != "input"]
        output = layer(given, *([] if hx is None else [tuple(first) if isinstance(hx, tuple) else first[0]]))
        tensors = cases.flatten((output[0].data, output[1]) if isinstance(x, PackedSequence) else output)
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu") for t in tensors]
        weights = [w.to(t.device, t.dtype) for w, t in zip(drawn, tensors, strict=True)]
        leaves |= dict(layer.named_parameters())
        gradients = torch.autograd.grad(tensors, list(leaves.values()), weights)
        return output, tensors, dict(zip(leaves, gradients, strict=True))

    output, tensors, gradients = run(layer, next(layer.parameters()).dtype)
    true_output, true_tensors, true_gradients = run(torch_layer, torch.float64)
    assert type(output) is type(true_output)
    if isinstance(x, PackedSequence):
        assert type(output[0]) is type(true_output[0])
        for part, true_part in zip(output[0][1:], true_output[0][1:], strict=True):
            assert (part is None) == (true_part is None)
            assert part is None or torch.equal(part, true_part)
    for i, (tensor, true_tensor) in enumerate(zip(tensors, true_tensors, strict=True)):
        cases.assert_close(op(kind), tensor, true_tensor, f"output {i}")
    assert list(gradients) == list(true_gradients)
    for name, gradient in gradients.items():
        cases.assert_close(f"{op(kind)}_backward", gradient, true_gradients[name], f"gradient of {name}")


@every_device
@every_kind
@settings(max_examples=60)
@given(
    options=OPTIONS,
    T=st.sampled_from([1, 2, 9]),
    B=st.sampled_from([None, 0, 1, 3, 17]),
    with_hx=st.booleans(),
    contiguous=st.booleans(),
)
def test_every_option(
    kind: str, options: dict[str, Any], T: int, B: int | None, with_hx: bool, contiguous: bool, device: str
) -> None:
    with torch.device(device):
        torch.manual_seed(0)
        layer, torch_layer = pair(kind, options)
        batch = () if B is None else (B,)
        shape = (*batch, T) if options["batch_first"] else (T, *batch)
        x = torch.randn(*shape, layer.input_size, dtype=options["dtype"])
        hx = state(layer, rows(layer), *batch) if with_hx else None
        if not contiguous:
            x = cases.spread(x)
            hx = None if hx is None else tuple(map(cases.spread, hx)) if isinstance(hx, tuple) else cases.spread(hx)
        assert_same_layer(kind, layer, torch_layer, x, hx)
        assert layer(x)[0].stride() == torch_layer(x.double())[0].stride()


@every_device
@every_kind
@settings(max_examples=40)
@given(
    options=OPTIONS,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    with_hx=st.booleans(),
    ordered=st.booleans(),
)
def test_every_option_packed(
    kind: str, options: dict[str, Any], lengths: list[int], with_hx: bool, ordered: bool, device: str
) -> None:
    with torch.device(device):
        torch.manual_seed(0)
        layer, torch_layer = pair(kind, options)
        if ordered:
            lengths = sorted(lengths, reverse=True)
        sequences = [torch.randn(n, layer.input_size, dtype=options["dtype"]) for n in lengths]
        hx = state(layer, rows(layer), len(lengths)) if with_hx else None
        assert_same_layer(kind, layer, torch_layer, pack_sequence(sequences, enforce_sorted=ordered), hx)


@every_kind
def test_packed_is_each_sequence_alone(kind: str) -> None:
    layer = getattr(llm_ext, kind)(3, 5, 2, bidirectional=True, dtype=torch.float64, **OWN[kind])
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 7, 4)]
    packed, last = layer(pack_sequence(sequences, enforce_sorted=False))
    outputs = torch.nn.utils.rnn.unpack_sequence(packed)
    for b, sequence in enumerate(sequences):
        output, last_alone = layer(sequence)
        cases.assert_close(op(kind), outputs[b], output)
        for part, alone in zip(cases.flatten(last), cases.flatten(last_alone), strict=True):
            cases.assert_close(op(kind), part[:, b], alone)


@every_device
@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_one_layer_is_the_reference(with_hx: bool, batch_first: bool, kind: str, device: str) -> None:
    with torch.device(device):
        layer = getattr(llm_ext, kind)(3, 5, batch_first=batch_first, dtype=torch.float64, **OWN[kind])
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        hx = state(layer, 1, 2) if with_hx else None
        options = OWN[kind] if kind == "RNN" else {}
        y, last = by_reference(kind, x, hx, dict(layer.named_parameters()), **options)
        output, h_n = layer(x.transpose(0, 1) if batch_first else x, hx)
        cases.assert_close(op(kind), output.transpose(0, 1) if batch_first else output, y)
        for part, expected in zip(cases.flatten(h_n), cases.flatten(last), strict=True):
            cases.assert_close(op(kind), part, expected if with_hx else expected[None])


@every_device
@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients(bidirectional: bool, kind: str, device: str) -> None:
    with torch.device(device):
        layer = getattr(llm_ext, kind)(2, 3, 2, bidirectional=bidirectional, dtype=torch.float64, **OWN[kind])
        names, parameters = zip(*layer.named_parameters(), strict=True)
        x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
        parts = [part.requires_grad_() for part in cases.flatten(state(layer, rows(layer), 2))]

        def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            hx = tensors[:2] if kind == "LSTM" else tensors[0]
            weights = dict(zip(names, tensors[len(parts) :], strict=True))
            return tuple(cases.flatten(torch.func.functional_call(layer, weights, (x, hx))))

        assert torch.autograd.gradcheck(run, (x, *parts, *parameters))


@every_device
@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_sequence_of_nothing(
    num_layers: int, bidirectional: bool, with_hx: bool, batch_first: bool, kind: str, device: str
) -> None:
    with torch.device(device):
        options = {"batch_first": batch_first, "bidirectional": bidirectional, **OWN[kind]}
        layer = getattr(llm_ext, kind)(3, 5, num_layers, **options)
        hx = state(layer, rows(layer), 7)
        output, h_n = layer(torch.zeros((7, 0, 3) if batch_first else (0, 7, 3)), hx if with_hx else None)
        width = (layer.proj_size or 5) * (2 if bidirectional else 1)
        assert output.shape == ((7, 0, width) if batch_first else (0, 7, width))
        for last, first in zip(cases.flatten(h_n), cases.flatten(hx), strict=True):
            assert torch.equal(last, first if with_hx else torch.zeros_like(first))


@every_kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_as_torch_does(packed: bool, bidirectional: bool, training: bool, kind: str) -> None:
    options = {"input_size": 3, "hidden_size": 17, "num_layers": 3, "dropout": 0.4, "dtype": torch.float64}
    layer, torch_layer = pair(kind, options | {"bidirectional": bidirectional, "projected": True})
    layer.train(training)
    torch_layer.train(training)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    given = pack_padded_sequence(x, torch.tensor([5, 4, 2, 2])) if packed else x
    outputs = []
    for each in (layer, torch_layer):
        torch.manual_seed(3)
        output, _ = each(given)
        outputs.append(output.data)
    cases.assert_close(op(kind), *outputs)
    repeated = layer(given)[0].data
    assert torch.equal(repeated, outputs[0]) != training


@every_kind
def test_dropout_of_everything(kind: str) -> None:
    layer, torch_layer = pair(kind, {"input_size": 3, "hidden_size": 4, "num_layers": 2, "dropout": 1.0})
    x = torch.randn(5, 2, 3)
    cases.assert_close(op(kind), layer(x)[0], torch_layer(x.double())[0])


@every_kind
def test_dropout_needs_layers(kind: str) -> None:
    with pytest.warns(UserWarning, match=f"{kind}: .*num_layers=1") as caught:
        getattr(llm_ext, kind)(3, 5, dropout=0.5)
    assert caught[0].filename == __file__


# All arguments but the sizes in their order, and not their defaults.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "RNN": (2, "relu", False, True, 0.25, True),
    "GRU": (2, False, True, 0.25, True),
    "LSTM": (2, False, True, 0.25, True, 3),
    "RNNCell": (False, "relu"),
    "GRUCell": (False,),
    "LSTMCell": (False,),
}
POSITIONAL = [(kind, (3, 5, *given[:n])) for kind, given in ARGUMENTS.items() for n in range(len(given) + 1)]
ATTRIBUTES = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout")


@pytest.mark.parametrize(("kind", "arguments"), POSITIONAL)
def test_constructor_seed_and_text(kind: str, arguments: tuple[object, ...]) -> None:
    """From the same arguments and seed: attributes, text, names, order and values of the weights."""
    layers = []
    for module in (llm_ext, torch.nn):
        torch.manual_seed(7)
        layers.append(getattr(module, kind)(*arguments, dtype=torch.float64))
    layer, torch_layer = layers
    for name in (*ATTRIBUTES, "bidirectional", "proj_size", "training"):
        if hasattr(torch_layer, name):
            assert getattr(layer, name) == getattr(torch_layer, name)
    assert repr(layer) == repr(torch_layer)
    assert layer.extra_repr() == torch_layer.extra_repr()
    assert list(layer._parameters) == list(torch_layer._parameters)
    if not kind.endswith("Cell"):
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


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_device_and_dtype(kind: str) -> None:
    layer = getattr(llm_ext, kind)(3, 5, *ARGUMENTS[kind], "meta", torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = getattr(llm_ext, kind)(3, 5, device="cpu", dtype=torch.float32)
    assert cases.flatten(layer(torch.zeros(1, 3)))[0].dtype == torch.float32


@every_kind
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_state_dicts_load_both_ways(kind: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    if kind != "LSTM":
        del options["proj_size"]
    layer, torch_layer = (getattr(module, kind)(3, 5, **options) for module in (llm_ext, torch.nn))
    x = torch.randn(4, 2, 3)
    layer.load_state_dict(torch_layer.state_dict())
    cases.assert_close(op(kind), layer(x)[0], torch_layer(x)[0])
    layer.reset_parameters()
    torch_layer.load_state_dict(layer.state_dict())
    cases.assert_close(op(kind), layer(x)[0], torch_layer(x)[0])


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_copies_are_whole_and_apart(kind: str) -> None:
    layer = getattr(llm_ext, kind)(3, 5, *ARGUMENTS[kind]).eval()
    x = torch.randn(4, 3)
    expected = cases.flatten(layer(x))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for other in copies:
        assert repr(other) == repr(layer)
        assert all(torch.equal(a, b) for a, b in zip(cases.flatten(other(x)), expected, strict=True))


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_moving_and_replacing_parameters(kind: str) -> None:
    """Whatever puts other tensors in place of the parameters, the next call uses them."""
    layer = getattr(llm_ext, kind)(3, 5)
    cell = kind.endswith("Cell")
    x = torch.randn(2, 3) if cell else torch.randn(4, 2, 3)

    def expected(weights: dict[str, Tensor]) -> Tensor:
        y, last = by_reference(kind, x[None] if cell else x, None, weights)
        return cases.flatten(last)[0] if cell else y

    def output(result: Any) -> Tensor:
        return cases.flatten(result)[0]

    before = output(layer(x))
    assert output(layer.to(torch.float64)(x.double())).dtype == torch.float64
    layer.to(torch.float32)
    assert torch.equal(output(layer(x)), before)

    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    called = torch.func.functional_call(layer, doubled, (x,))
    cases.assert_close(op(kind), output(called), expected(doubled))
    assert torch.equal(output(layer(x)), before)

    name = "weight_hh" if cell else "weight_hh_l0"
    # Again under the same name, but last in the order of the parameters.
    delattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(doubled[name]))
    weights = {each: getattr(layer, each) for each in doubled}
    cases.assert_close(op(kind), output(layer(x)), expected(weights))
    if not cell:
        layer.flatten_parameters()


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("by", ["parametrize", "weight_norm"])
@pytest.mark.parametrize(
    ("kind", "weight"),
    [(kind, weight) for kind in ARGUMENTS for weight in ("weight_hh", "bias_ih")] + [("LSTM", "weight_hr")],
)
def test_reparametrized_weights(kind: str, weight: str, by: str) -> None:
    options = {"input_size": 3, "hidden_size": 5, "dtype": torch.float64, "projected": True}
    if kind.endswith("Cell"):
        del options["projected"]
    else:
        weight += "_l0"
    layer, torch_layer = pair(kind, options)
    for each in (layer, torch_layer):
        if by == "parametrize":
            parametrize.register_parametrization(each, weight, Doubled())
        else:
            weight_norm(each, weight)
            with torch.no_grad():
                getattr(each, f"{weight}_g").mul_(3)
    assert_same_layer(kind, layer, torch_layer, torch.randn(4, 3, dtype=torch.float64), None)


@every_kind
def test_training_step_changes_the_result(kind: str) -> None:
    layer = getattr(llm_ext, kind)(3, 5)
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
@every_kind
@pytest.mark.parametrize("num_layers", [1, 2])
def test_without_gradients(num_layers: int, kind: str, device: str) -> None:
    with torch.device(device):
        layer = getattr(llm_ext, kind)(3, 5, num_layers, bidirectional=num_layers == 2, **OWN[kind])
        x = torch.randn(4, 2, 3)
        expected = cases.flatten(layer(x))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                tensors = cases.flatten(layer(x))
            for tensor, true_tensor in zip(tensors, expected, strict=True):
                assert not tensor.requires_grad
                assert torch.equal(tensor, true_tensor)


@every_device
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_autocast(kind: str, dtype: torch.dtype, with_hx: bool, device: str) -> None:
    """As a linear layer of torch: computed and returned in autocast's dtype, whatever x is; gradients in their own."""
    with torch.device(device):
        layer = getattr(llm_ext, kind)(3, 5)
        cell = kind.endswith("Cell")
        hx = state(layer, 2) if cell else state(layer, 1, 2)
        for x_dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 2, 3).to(x_dtype)
            for each in [x[0]] if cell else [x, pack_padded_sequence(x, torch.tensor([4, 1], device="cpu"))]:
                with torch.autocast(device, dtype):
                    output = layer(each, hx if with_hx else None)
                tensors = cases.flatten(output if cell else (output[0].data, output[1]))
                assert {tensor.dtype for tensor in tensors} == {dtype}
                sum(tensor.float().sum() for tensor in tensors).backward()
                assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
                half = copy.deepcopy(layer).to(dtype)
                first = tuple(t.to(dtype) for t in hx) if isinstance(hx, tuple) else hx.to(dtype)
                expected = half(each.to(dtype), first if with_hx else None)
                for a, b in zip(
                    tensors, cases.flatten(expected if cell else (expected[0].data, expected[1])), strict=True
                ):
                    assert torch.equal(a, b)


@every_device
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_autocast_leaves_float64(kind: str, device: str) -> None:
    with torch.device(device):
        layer = getattr(llm_ext, kind)(3, 5, dtype=torch.float64)
        x = (
            torch.randn(2, 3, dtype=torch.float64)
            if kind.endswith("Cell")
            else torch.randn(4, 2, 3, dtype=torch.float64)
        )
        with torch.autocast(device, torch.bfloat16):
            results = cases.flatten(layer(x))
        for a, b in zip(results, cases.flatten(layer(x)), strict=True):
            assert a.dtype == torch.float64
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_autocast_compiles_whole(kind: str) -> None:
    torch.compiler.reset()
    layer = getattr(llm_ext, kind)(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3) if kind.endswith("Cell") else torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = cases.flatten(compiled(x)), cases.flatten(layer(x))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@every_device
@pytest.mark.filterwarnings("ignore:TF32")  # of the switch for oneDNN
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(("T", "B", "H"), [(16, 9, 40), (200, 4, 65), (3, 40, 130), (5, 2, 96)])
def test_no_less_exact_than_torch_in_16_bits(
    T: int, B: int, H: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    """Results and gradients: the root mean square of the errors is at most 1.5 times that of torch.nn."""
    with torch.device(device):
        theirs = getattr(torch.nn, kind)(30, H, dtype=dtype)
        ours, truth = getattr(llm_ext, kind)(30, H, dtype=dtype), getattr(torch.nn, kind)(30, H, dtype=torch.float64)
        x, weights = torch.randn(T, B, 30).to(dtype), torch.randn(T, B, H).to(dtype)
        results = []
        for layer in (ours, theirs, truth):
            layer.load_state_dict(theirs.state_dict())
            given = x.to(next(layer.parameters()).dtype).requires_grad_()
            # Without oneDNN, whose LSTM wants machines that compute in bfloat16.
            with torch.backends.mkldnn.flags(enabled=False):
                y, last = layer(given)
                gradients = torch.autograd.grad((y * weights).sum(), [given, *layer.parameters()])
            results.append([t.detach().double() for t in (y, *cases.flatten(last), *gradients)])
        for mine, other, true in zip(*results, strict=True):
            assert (mine - true).square().mean().sqrt() <= 1.5 * (other - true).square().mean().sqrt()


@every_device
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_compiles_whole(kind: str, device: str) -> None:
    """torch.compile finds no reason to break the graph, with a state and without."""
    with torch.device(device):
        torch.compiler.reset()  # of what was compiled before it remembers so much only
        layer = getattr(llm_ext, kind)(3, 5)
        cell = kind.endswith("Cell")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, hx = (torch.randn(2, 3), state(layer, 2)) if cell else (torch.randn(4, 2, 3), state(layer, 1, 2))
        for first in (None, hx):
            actual, expected = cases.flatten(compiled(x, first)), cases.flatten(layer(x, first))
            for tensor, true_tensor in zip(actual, expected, strict=True):
                cases.assert_close(op(kind), tensor, true_tensor)
            gradients, true_gradients = (
                torch.autograd.grad(tensors[0].sum(), list(layer.parameters())) for tensors in (actual, expected)
            )
            for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
                cases.assert_close(f"{op(kind)}_backward", gradient, true_gradient)


BAD_ARGUMENTS: list[tuple[tuple[object, ...], dict[str, object], type[Exception]]] = [
    ((3.0, 5), {}, TypeError),
    ((3, "5"), {}, TypeError),
    ((0, 5), {}, ValueError),
    ((3, -1), {}, ValueError),
    ((3, 5, 0), {}, ValueError),
    ((3, 5), {"bias": 1}, TypeError),
    ((3, 5), {"batch_first": 0}, TypeError),
    ((3, 5), {"dropout": 1.5}, ValueError),
    ((3, 5), {"dropout": True}, ValueError),
    ((3, 5), {"dropout": "0.5"}, ValueError),
    ((3, 5), {"unheard_of": 1}, TypeError),
    ((3,), {}, TypeError),
]
BAD_OWN: list[tuple[str, dict[str, object], type[Exception]]] = [
    ("RNN", {"nonlinearity": "gelu"}, ValueError),
    ("LSTM", {"proj_size": -1}, ValueError),
    ("LSTM", {"proj_size": 5}, ValueError),
    ("LSTM", {"proj_size": 2.0}, TypeError),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "error"),
    [(kind, *bad) for kind in KINDS for bad in BAD_ARGUMENTS]
    + [(kind, (3, 5), options, error) for kind, options, error in BAD_OWN],
)
def test_bad_constructor(
    kind: str, arguments: tuple[object, ...], options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        getattr(torch.nn, kind)(*arguments, **options)
    with pytest.raises(error):
        getattr(llm_ext, kind)(*arguments, **options)


# input, hx, batch_first, and our message; an LSTM is given hx twice.
BAD_CALLS = [
    (torch.zeros(3), None, False, r"{kind}: input must be \[T, B, I\] = \[\*, \*, 3\], got \[3\]"),
    (torch.zeros(1, 2, 2, 3), None, True, r"{kind}: input must be \[B, T, I\] = .* got \[1, 2, 2, 3\]"),
    (torch.zeros(4, 2, 5), None, False, r"{op}: x must be .* = \[\*, \*, 3\], got \[4, 2, 5\]"),
    (torch.zeros(4, 2, 5), None, True, r"{kind}: input must be .* = \[\*, \*, 3\], got \[4, 2, 5\]"),
    (torch.zeros(4, 5), None, False, r"{kind}: input must be .* = \[\*, \*, 3\], got \[4, 5\]"),
    (
        torch.zeros(4, 2, 3),
        torch.zeros(2, 5),
        False,
        r"{kind}: {hx} must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]",
    ),
    (torch.zeros(4, 2, 3), torch.zeros(2, 2, 5), False, r"{kind}: {hx} must be .* got \[2, 2, 5\]"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 4, 5), False, r"{kind}: {hx} must be .* = \[1, 2, 5\], got \[1, 4, 5\]"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 2, 5), True, r"{kind}: {hx} must be .* = \[1, 4, 5\], got \[1, 2, 5\]"),
    (torch.zeros(4, 3), torch.zeros(1, 1, 5), False, r"{kind}: {hx} must be \[L, H\] = \[1, 5\], got \[1, 1, 5\]"),
    (torch.zeros(4, 3), torch.zeros(1, 6), False, r"{kind}: {hx} must be \[L, H\] = \[1, 5\], got \[1, 6\]"),
    (torch.zeros(4, 2, 3).double(), None, False, r"{op}: x must be float32, got float64"),
    (torch.zeros(4, 2, 3, dtype=torch.int64), None, False, r"{op}: x must be float32, got int64"),
    (torch.zeros(4, 2, 3), torch.zeros(1, 2, 5).double(), False, r"{op}: h0 must be float32, got f"),
    (
        pack_padded_sequence(torch.zeros(4, 2, 3), torch.tensor([4, 1])),
        torch.zeros(1, 3, 5),
        False,
        r"{kind}: {hx} must be .* = \[1, 2, 5\], got \[1, 3, 5\]",
    ),
    (
        pack_padded_sequence(torch.zeros(4, 2, 7), torch.tensor([4, 1])),
        None,
        False,
        r"{op}: x must be \[N, I\] = \[\*, 3\], got \[5, 7\]",
    ),
]


def assert_refused(layers: tuple[Any, Any], x: Any, hx: Any, message: str) -> None:
    """What torch.nn refuses we refuse, with an error that its error's handler catches too."""
    layer, torch_layer = layers
    with pytest.raises((RuntimeError, ValueError)) as torch_error:
        torch_layer(x, hx)
    with pytest.raises(torch_error.type, match=message) as error:
        layer(x, hx)
    assert isinstance(error.value, ValueError)


@every_kind
@pytest.mark.parametrize(("x", "hx", "batch_first", "message"), BAD_CALLS)
def test_bad_call(x: Any, hx: Tensor | None, batch_first: bool, message: str, kind: str) -> None:
    name = re.escape("hx[0]") if kind == "LSTM" else "hx"
    given = (hx, hx) if kind == "LSTM" and hx is not None else hx
    layers = tuple(getattr(module, kind)(3, 5, batch_first=batch_first) for module in (llm_ext, torch.nn))
    assert_refused(layers, x, given, message.format(kind=kind, op=op(kind), hx=name))


@pytest.mark.parametrize(
    ("h", "c", "message"),
    [
        ((2, 2, 5), (2, 2, 5), r"LSTM: hx\[0\] must be \[L, B, P\] = \[2, 2, 4\], got \[2, 2, 5\]"),
        ((2, 2, 4), (2, 2, 4), r"LSTM: hx\[1\] must be \[L, B, H\] = \[2, 2, 5\], got \[2, 2, 4\]"),
        ((2, 2, 4), (2, 5), r"LSTM: hx\[1\] must be \[L, B, H\] = \[2, 2, 5\], got \[2, 5\]"),
    ],
)
def test_bad_pair(h: tuple[int, ...], c: tuple[int, ...], message: str) -> None:
    layers = tuple(module.LSTM(3, 5, bidirectional=True, proj_size=4) for module in (llm_ext, torch.nn))
    assert_refused(layers, torch.zeros(4, 2, 3), (torch.zeros(h), torch.zeros(c)), message)


def test_a_state_of_the_wrong_kind() -> None:
    h = torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match=r"LSTM: hx\[0\] must be \[L, B, H\] = \[1, 2, 5\], got \[2, 5\]"):
        llm_ext.LSTM(3, 5)(torch.zeros(4, 2, 3), h)
    with pytest.raises(TypeError, match="GRU: hx must be a Tensor, got tuple"):
        llm_ext.GRU(3, 5)(torch.zeros(4, 2, 3), (h, h))
    with pytest.raises(TypeError, match="RNNCell: hx must be a Tensor, got tuple"):
        llm_ext.RNNCell(3, 5)(torch.zeros(2, 3), (h, h))


def test_a_pair_in_a_list() -> None:
    layer, cell, x = llm_ext.LSTM(3, 5), llm_ext.LSTMCell(3, 5), torch.randn(4, 2, 3)
    hx, one = state(layer, 1, 2), state(cell, 2)
    assert torch.equal(layer(x, list(hx))[0], layer(x, hx)[0])
    assert torch.equal(cell(x[0], list(one))[0], cell(x[0], one)[0])


@every_kind
def test_a_state_of_another_batch_is_not_sorted_into_this_one(kind: str) -> None:
    """As torch.nn does with sequences that are not in the order of their lengths."""
    layer = getattr(llm_ext, kind)(3, 5)
    packed = pack_padded_sequence(torch.zeros(4, 2, 3), torch.tensor([1, 4]), enforce_sorted=False)
    with pytest.raises(ValueError, match=rf"{kind}: hx.* must be .* = \[1, 2, 5\], got \[1, 3, 5\]"):
        layer(packed, state(layer, 1, 3))


@every_kind
@pytest.mark.parametrize("sizes", [[1, 2], [3, 0], [2, 2]])
def test_a_packed_sequence_made_by_hand(sizes: list[int], kind: str) -> None:
    wrong = PackedSequence(torch.zeros(3, 3), torch.tensor(sizes))
    with pytest.raises(ValueError, match=f"{op(kind)}: batch_sizes must"):
        getattr(llm_ext, kind)(3, 5)(wrong)


@every_kind
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_arguments_of_another_type(kind: str) -> None:
    layer = getattr(llm_ext, kind)(3, 5).to(torch.complex64)
    with pytest.raises(TypeError, match=f"{op(kind)}: w_ih must be .*float16, got complex64"):
        layer(torch.zeros(4, 2, 3, dtype=torch.complex64))


CELL_OPTIONS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([1, 3, 17]),
        "hidden_size": st.sampled_from([1, 3, 17, 33]),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "dtype": st.sampled_from(cases.DTYPES),
    }
)


@every_device
@every_kind
@settings(max_examples=40)
@given(
    options=CELL_OPTIONS,
    B=st.sampled_from([None, 0, 1, 3, 17]),
    with_hx=st.booleans(),
    contiguous=st.booleans(),
)
def test_every_option_of_a_cell(
    kind: str, options: dict[str, Any], B: int | None, with_hx: bool, contiguous: bool, device: str
) -> None:
    with torch.device(device):
        torch.manual_seed(0)
        cell, torch_cell = pair(f"{kind}Cell", options)
        batch = () if B is None else (B,)
        x = torch.randn(*batch, cell.input_size, dtype=options["dtype"])
        hx = state(cell, *batch) if with_hx else None
        if not contiguous:
            x = cases.spread(x)
            hx = None if hx is None else tuple(map(cases.spread, hx)) if isinstance(hx, tuple) else cases.spread(hx)
        assert_same_layer(kind, cell, torch_cell, x, hx)


@every_device
@every_kind
def test_steps_of_a_cell_are_a_layer(kind: str, device: str) -> None:
    with torch.device(device):
        options = OWN[kind] if kind == "RNN" else {}
        layer = getattr(llm_ext, kind)(3, 5, dtype=torch.float64, **options)
        cell = getattr(llm_ext, f"{kind}Cell")(3, 5, dtype=torch.float64, **options)
        cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
        x = torch.randn(6, 2, 3, dtype=torch.float64)
        output, last = layer(x)
        hx = None
        for step, expected in zip(x, output, strict=True):
            hx = cell(step, hx)
            cases.assert_close(op(kind), cases.flatten(hx)[0], expected)
        for part, expected in zip(cases.flatten(hx), cases.flatten(last), strict=True):
            cases.assert_close(op(kind), part, expected[0])


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (torch.zeros(1, 2, 3), None, r"{kind}: input must be \[B, I\] = \[\*, 3\], got \[1, 2, 3\]"),
        (torch.zeros(2, 4), None, r"{kind}: input must be .* = \[\*, 3\], got \[2, 4\]"),
        (torch.zeros(4), None, r"{kind}: input must be .* = \[\*, 3\], got \[4\]"),
        (torch.zeros(2, 3), torch.zeros(1, 2, 5), r"{kind}: {hx} must be \[B, H\] = \[2, 5\], got \[1, 2, 5\]"),
        (torch.zeros(2, 3), torch.zeros(3, 5), r"{kind}: {hx} must be \[B, H\] = \[2, 5\], got \[3, 5\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"{kind}: {hx} must be \[B, H\] = \[2, 5\], got \[2, 4\]"),
        (torch.zeros(3), torch.zeros(4), r"{kind}: {hx} must be \[H\] = \[5\], got \[4\]"),
        (torch.zeros(2, 3).double(), None, r"{op}: x must be float32, got float64"),
    ],
)
def test_bad_call_of_a_cell(x: Tensor, hx: Tensor | None, message: str, kind: str) -> None:
    name = re.escape("hx[0]") if kind == "LSTMCell" else "hx"
    given = (hx, hx) if kind == "LSTMCell" and hx is not None else hx
    cells = tuple(getattr(module, kind)(3, 5) for module in (llm_ext, torch.nn))
    assert_refused(cells, x, given, message.format(kind=kind, op=op(kind), hx=name))


@pytest.mark.parametrize(
    ("kind", "arguments", "error"),
    [
        ("RNNCell", (0, 5), ValueError),
        ("GRUCell", (3, 0), ValueError),
        ("LSTMCell", (3, 5.0), TypeError),
        ("GRUCell", (3, 5, 1), TypeError),
        ("RNNCell", (3, 5, True, "gelu"), ValueError),
    ],
)
def test_bad_constructor_of_a_cell(kind: str, arguments: tuple[Any, ...], error: type[Exception]) -> None:
    """Where it is called, not in the first step, as in torch."""
    with pytest.raises(error, match=f"{kind}: "):
        getattr(llm_ext, kind)(*arguments)


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
    assert torch.equal(layer(ids, layer.fold()), layer(ids))
    assert repr(layer) == "AffineEmbedding(7, 5)"


@pytest.mark.parametrize("bad", [-1, 7])
def test_affine_embedding_refuses_unknown_ids(bad: int) -> None:
    layer = AffineEmbedding(7, 5)
    for table in (None, layer.fold()):
        with pytest.raises(IndexError, match="ids must be from 0 to 6, got values from"):
            layer(torch.tensor([[3, bad]]), table)
