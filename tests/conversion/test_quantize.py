"""quantize_, dequantize_ and fake_quantize_: layers of 8 and 16 bits, alone and inside models."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, assert_same_bits, flatten
from support.pairwise import parametrize_pairwise
from support.quantized import LAYER, WEIGHTS
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from llm_ext.nn import AffineEmbedding
from llm_ext.nn.fake_quantized import FakeQuantizedStates
from llm_ext.reference.quantization import quantize_weight

OURS = {"RNN": llm_ext.RNN, "GRU": llm_ext.GRU, "LSTM": llm_ext.LSTM}
# A layer of each class that quantize_ changes.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(getattr(llm_ext, name), 5, 7) for name in ("RNN", "GRU", "LSTM")},
    **{name: partial(getattr(llm_ext, name), 5, 7) for name in ("RNNCell", "GRUCell", "LSTMCell", "Linear")},
    "AffineEmbedding": partial(AffineEmbedding, 5, 7),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_weights = pytest.mark.parametrize("weights", WEIGHTS)


def dequantized(layer: nn.Module) -> nn.Module:
    """A copy that computes in float32 with the rounded weights."""
    return llm_ext.dequantize_(copy.deepcopy(layer))


@parametrize_pairwise(
    name=("RNN", "GRU", "LSTM"),
    module=(llm_ext, nn),
    weights=WEIGHTS,
    layers=(1, 2),
    bidirectional=(False, True),
    batch_first=(False, True),
    bias=(False, True),
    proj_size=(0, 7),
    call=("batch", "state", "unbatched", "packed", "lengths"),
)
def test_layers_compute_with_rounded_weights(
    name: str,
    module: Any,
    weights: Any,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    proj_size: int,
    call: str,
) -> None:
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    options |= {"proj_size": proj_size} if name == "LSTM" else {}
    layer = getattr(module, name)(9, 21, bias=bias, **options)
    (entry,) = llm_ext.quantize_(layer, weights)
    assert entry.reason is None
    assert entry.error is not None
    assert 0 < entry.error < 1e-2
    assert type(layer).__name__ == f"Quantized{name}"
    assert not list(layer.parameters())
    expected = dequantized(layer)
    assert type(expected) is OURS[name]
    x: Any = torch.randn(*((5, 6) if batch_first else (6, 5)), 9)
    arguments: dict[str, Any] = {}
    if call == "state":
        R, P = layers * (1 + bidirectional), options.get("proj_size") or 21
        h, c = torch.randn(R, 5, P), torch.randn(R, 5, 21)
        arguments["hx"] = (h, c) if name == "LSTM" else h
    elif call == "unbatched":
        x = torch.randn(6, 9)
    elif call == "packed":
        x = pack_padded_sequence(x, torch.tensor([3, 6, 1, 6, 2]), batch_first, enforce_sorted=False)
    elif call == "lengths":
        arguments["lengths"] = torch.tensor([3, 6, 0, 6, 2])
    with torch.no_grad():
        actual, reference = layer(x, **arguments), expected(x, **arguments)
    if call == "packed":
        actual, reference = (actual[0].data, actual[1]), (reference[0].data, reference[1])
    assert_all_close(LAYER[weights], actual, reference)


@every_weights
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("module", [llm_ext, nn])
def test_cells_compute_with_rounded_weights(name: str, module: Any, weights: Any) -> None:
    cell = getattr(module, name)(9, 21, bias=module is nn)
    llm_ext.quantize_(cell, weights)
    assert type(cell).__name__ == f"Quantized{name}"
    expected = dequantized(cell)
    assert type(expected) is getattr(llm_ext, name)
    x, h, c = torch.randn(5, 9), torch.randn(5, 21), torch.randn(5, 21)
    hx: Any = (h, c) if name == "LSTMCell" else h
    calls: list[tuple[Any, ...]] = [(x,), (x, hx), (x[0],)]
    for call in calls:
        assert_all_close(LAYER[weights], cell(*call), expected(*call))
    reset = torch.tensor([True, False, True, False, False])
    actual, reference = (each(x, hx, reset=reset) for each in (cell, expected))
    assert_all_close(LAYER[weights], actual, reference)
    with pytest.raises(ValueError, match="input must be"):
        cell(torch.randn(5, 8))


def model_and_input() -> tuple[Any, Tensor]:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = AffineEmbedding(37, 12)
            self.rnn = nn.LSTM(12, 20, num_layers=2, bidirectional=True)
            self.head = llm_ext.Linear(40, 5, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            scores: Tensor = self.head(self.rnn(self.embedding(ids))[0])
            return scores

    return Tagger().eval(), torch.randint(37, (8, 3))


@every_weights
def test_a_model_is_saved_copied_and_loaded(weights: Any, tmp_path: Any) -> None:
    model, ids = model_and_input()
    before = model(ids)
    entries = llm_ext.quantize_(model, weights)
    assert [entry[:2] + entry[3:] for entry in entries] == [
        ("embedding", AffineEmbedding, None),
        ("rnn", nn.LSTM, None),
        ("head", llm_ext.Linear, None),
    ]
    expected = model(ids)
    assert (expected - before).abs().max() < 2e-2
    floating = dequantized(model)
    assert {name for name, _ in floating.named_parameters()} == {
        name for name, _ in model_and_input()[0].named_parameters()
    }
    assert (floating(ids) - expected).abs().max() < 1e-3
    assert_same_bits(copy.deepcopy(model)(ids), expected)

    stream = io.BytesIO()
    torch.save(model.rnn, stream)
    size = 4 * sum(p.numel() for p in nn.LSTM(12, 20, num_layers=2, bidirectional=True).parameters())
    assert len(stream.getvalue()) < size  # nothing of the float weights is left
    stream.seek(0)
    x = torch.randn(4, 2, 12)
    assert_same_bits(torch.load(stream, weights_only=False)(x), model.rnn(x))

    another, _ = model_and_input()
    llm_ext.quantize_(another, weights)
    another.load_state_dict(model.state_dict())
    assert_same_bits(another(ids), expected)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    another, _ = model_and_input()
    llm_ext.quantize_(another, weights)
    another.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert_same_bits(another(ids), expected)

    model.to(torch.bfloat16).to(torch.float32)  # scales and biases are rounded, packed weights are not
    assert (model(ids) - expected).abs().max() < 2e-2


@every_weights
def test_compile_and_export(weights: Any) -> None:
    model, ids = model_and_input()
    llm_ext.quantize_(model, weights)
    with torch.no_grad():
        expected = model(ids)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(ids), expected)
        exported: Any = torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert_same_bits(exported.module()(ids), expected)
        longer = torch.randint(37, (11, 3))
        assert_same_bits(exported.module()(longer), model(longer))


@every_weights
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "GRUCell", "LSTMCell"])
def test_layers_are_compiled_and_exported(name: str, weights: Any) -> None:
    """With a state, lengths, and batches of any size."""
    layer: Any = LAYERS[name]()
    llm_ext.quantize_(layer, weights)

    def arguments(B: int) -> tuple[Any, ...]:
        if name == "GRUCell":
            return torch.randn(B, 5), torch.randn(B, 7)
        if name == "LSTMCell":
            return torch.randn(B, 5), (torch.randn(B, 7), torch.randn(B, 7))
        h = torch.randn(1, B, 7)
        return torch.randn(4, B, 5), (h, torch.randn(1, B, 7)) if name == "LSTM" else h, torch.arange(B) % 5

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, hx: Any, lengths: Tensor | None = None) -> Any:
            return self.layer(x, hx) if lengths is None else self.layer(x, hx, lengths=lengths)

    torch.compiler.reset()
    with torch.no_grad():
        given, others = arguments(3), arguments(6)
        batch, cell = torch.export.Dim.DYNAMIC, "Cell" in name
        state: Any = {0 if cell else 1: batch}
        shapes: Any = (state, (state, state) if "LSTM" in name else state, *(() if cell else ({0: batch},)))
        exported: Any = torch.export.export(Call(), given, dynamic_shapes=shapes).module()
        compiled: Any = torch.compile(Call(), fullgraph=True, backend="aot_eager", dynamic=True)
        for each in (given, others):
            expected = flatten(Call()(*each))
            for run in (exported, compiled):
                for actual, ours in zip(flatten(run(*each)), expected, strict=True):
                    assert_same_bits(actual, ours)


def test_gradients_and_other_uses_are_refused_in_words() -> None:
    layer = llm_ext.GRU(4, 6)
    with pytest.raises(ValueError, match="weights must be one of int8, bfloat16, got 'int3'"):
        llm_ext.quantize_(layer, "int3")  # type: ignore[arg-type]
    llm_ext.quantize_(layer)
    x = torch.randn(5, 2, 4, requires_grad=True)
    y, _ = layer(x)
    with pytest.raises(RuntimeError, match=r"train with llm_ext\.fake_quantize_"):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match="quantized layers take no reset"):
        layer(x, reset=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="x must be float32 with quantized weights"):
        layer(torch.randn(5, 2, 4).double())
    with pytest.raises(ValueError, match=re.escape("GRU: input must be [T, B, I] = [*, *, 4], got [5, 2, 3]")):
        layer(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match="hx must be"):
        layer(x, torch.zeros(1, 3, 6))
    with pytest.raises(NotImplementedError, match="quantized layers take no return_all_states"):
        layer(x, return_all_states=True)
    two = llm_ext.LSTM(4, 6, num_layers=2)
    llm_ext.quantize_(two)
    with pytest.raises(ValueError, match=re.escape("hx[1] must be [L, B, H] = [2, 2, 6], got [3, 2, 6]")):
        two(x, (torch.zeros(2, 2, 6), torch.zeros(3, 2, 6)))


def test_layers_that_shared_a_bias_have_one_each() -> None:
    model: Any = nn.ModuleList([llm_ext.Linear(3, 4), llm_ext.Linear(3, 4)])
    model[0].bias = model[1].bias
    llm_ext.quantize_(model)
    model[0].bias.zero_()
    assert model[1].bias.any()


@every_weights
def test_dropout_between_layers(weights: Any) -> None:
    layer = llm_ext.GRU(5, 9, 3, dropout=0.5, bidirectional=True)
    llm_ext.quantize_(layer, weights)
    x, results = torch.randn(6, 4, 5), []
    for each in (layer, dequantized(layer)):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(each(x))
    assert_all_close(LAYER[weights], *results)


@every_layer
def test_gradients_are_refused(name: str) -> None:
    layer: Any = LAYERS[name]()
    llm_ext.quantize_(layer)
    if name == "AffineEmbedding":
        assert not layer(torch.tensor([1, 2])).requires_grad
        return
    y = layer(torch.randn(4, 2, 5, requires_grad=True)[slice(None) if "Cell" not in name else 0])
    with pytest.raises(RuntimeError, match=r"train with llm_ext\.fake_quantize_"):
        torch.autograd.backward(flatten(y)[0].sum())


@every_weights
@every_layer
def test_autocast(name: str, weights: Any) -> None:
    """Inputs and states of 16 bits are widened; those of float64 are refused as always."""
    if name == "AffineEmbedding":
        return
    layer: Any = LAYERS[name]()
    llm_ext.quantize_(layer, weights)
    leading = (4, 2) if "Cell" not in name and name != "Linear" else (2,)
    arguments = [torch.randn(*leading, 5)]
    if name != "Linear":
        states = tuple(torch.randn(*((1,) if len(leading) == 2 else ()), 2, 7) for _ in range(1 + ("LSTM" in name)))
        arguments.append(states if len(states) > 1 else states[0])  # type: ignore[arg-type]

    def cast(argument: Any, dtype: torch.dtype) -> Any:
        return tuple(t.to(dtype) for t in argument) if isinstance(argument, tuple) else argument.to(dtype)

    rounded = [cast(argument, torch.bfloat16) for argument in arguments]
    expected = flatten(layer(*[cast(argument, torch.float32) for argument in rounded]))
    with torch.autocast("cpu"):
        actual = flatten(layer(*rounded))
        with pytest.raises(TypeError, match="float32"):
            layer(*[cast(argument, torch.float64) for argument in arguments])
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)


@every_weights
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_saved_copied_and_loaded(name: str, weights: Any) -> None:
    cell: Any = LAYERS[name]()
    llm_ext.quantize_(cell, weights)
    x = torch.randn(3, 5)
    expected = flatten(cell(x))
    stream = io.BytesIO()
    torch.save(cell, stream)
    stream.seek(0)
    another = LAYERS[name]()
    llm_ext.quantize_(another, weights)
    another.load_state_dict(cell.state_dict())
    for each in (copy.deepcopy(cell), torch.load(stream, weights_only=False), another):
        for actual, ours in zip(flatten(each(x)), expected, strict=True):
            assert_same_bits(actual, ours)


def test_what_is_left_alone_and_why() -> None:
    class Own(nn.GRU):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(3, 3),
            "wide": nn.GRU(3, 3, dtype=torch.float64),
            "meta": nn.GRU(3, 3, device="meta"),
            "linear": nn.Linear(3, 3),
            "excluded": nn.GRU(3, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.GRU(3, 3), "weight_hh_l0"),
            "quantized": nn.GRU(3, 3),
            "long": llm_ext.Linear(133145, 1),
        }
    )
    entries = llm_ext.quantize_(model, filter=lambda module, fqn: fqn != "excluded")
    assert {entry.fqn: entry.reason for entry in entries} == {
        "own": "Own is a subclass",
        "wide": "weight_ih_l0 is torch.float64 on cpu, not float32 on the cpu",
        "meta": "weight_ih_l0 is torch.float32 on meta, not float32 on the cpu",
        "linear": "it is a layer of torch.nn that is not recurrent",
        "excluded": "the filter excludes it",
        "normed": "it has parametrizations; remove them first",
        "quantized": None,
        "long": "weight has 133145 columns, more than 133144",
    }
    for each in (llm_ext.quantize_, llm_ext.fake_quantize_):
        with pytest.warns(UserWarning, match=f"{each.__name__}: no layer of Linear has been changed"):
            each(nn.Linear(2, 2))


def test_layers_that_were_built_inside_patched_are_quantized() -> None:
    with llm_ext.patched(linear=True):
        model: Any = nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 2))
    assert isinstance(model[0], nn.GRU)
    assert [entry.reason for entry in llm_ext.fake_quantize_(model)] == [None, None]
    assert parametrize.type_before_parametrizations(model[0]) is llm_ext.GRU
    assert [entry.reason for entry in llm_ext.quantize_(model)] == [None, None]
    assert isinstance(model[0], llm_ext.nn.QuantizedGRU)
    assert type(llm_ext.dequantize_(model)[0]) is llm_ext.GRU  # type: ignore[index]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build", [partial(nn.GRU, 5, 7), *LAYERS.values()])
@pytest.mark.parametrize("hook", ["prune", "weight_norm", "spectral_norm", "own"])
def test_layers_with_other_parameters_are_left(build: Callable[[], nn.Module], hook: str) -> None:
    layer: Any = build()
    cut: Any = prune.random_unstructured
    remove: Any = prune.remove
    name, *_ = sorted(name for name, _ in layer.named_parameters() if name.startswith("weight"))
    if hook == "prune":
        cut(layer, name, 0.5)
    elif hook == "weight_norm":
        nn.utils.weight_norm(layer, name)
    elif hook == "spectral_norm":
        nn.utils.spectral_norm(layer, name)
    else:
        layer.register_parameter("own", nn.Parameter(torch.randn(3, 3)))
    before = list(layer.state_dict())
    for each in (llm_ext.quantize_, llm_ext.fake_quantize_):
        with pytest.warns(UserWarning, match="no layer"):
            (entry,) = each(layer)
        assert entry.reason is not None
        assert "remove hooks that compute its weights first" in entry.reason
        assert list(layer.state_dict()) == before
    if hook == "prune":
        remove(layer, name)
        (entry,) = llm_ext.quantize_(layer)
        assert entry.reason is None


@every_layer
def test_frozen_parameters_stay_frozen(name: str) -> None:
    layer = LAYERS[name]()
    parameters = dict(layer.named_parameters())
    frozen = next(iter(parameters))
    parameters[frozen].requires_grad_(False)
    llm_ext.quantize_(layer)
    llm_ext.dequantize_(layer)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(parameters) - {frozen}
    assert list(dict(layer.named_parameters())) == list(parameters)


@pytest.mark.parametrize("convert", [llm_ext.revert, llm_ext.to_torch])
@every_layer
def test_quantized_layers_do_not_become_those_of_torch(name: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.ReLU(), LAYERS[name]())
    llm_ext.quantize_(model)
    before, cls = {name: tensor.clone() for name, tensor in model.state_dict().items()}, type(model[1])
    if name == "AffineEmbedding":  # which torch.nn lacks
        assert type(convert(model)[1]) is cls  # type: ignore[index]
    else:
        with pytest.raises(ValueError, match=rf"1 is a Quantized{name}; call llm_ext\.dequantize_ first"):
            convert(model)
    assert type(model[1]) is cls
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    converted: Any = convert(llm_ext.dequantize_(model))
    assert type(converted[1]) is getattr(nn, name, AffineEmbedding)


@every_layer
def test_torch_ao_passes_over_quantized_layers(name: str) -> None:
    layer: Any = LAYERS[name]()
    llm_ext.quantize_(layer)
    with pytest.warns(UserWarning, match="quantize_ has quantized") if name != "AffineEmbedding" else nullcontext():
        layer.qconfig = None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_size_0() -> None:
    model = nn.ModuleDict(
        {
            "no inputs": llm_ext.Linear(0, 5),
            "no outputs": llm_ext.Linear(5, 0),
            "cell": llm_ext.GRUCell(0, 4),
            "no units": llm_ext.GRUCell(4, 0),
            "embedding": AffineEmbedding(0, 3),
        }
    )
    expected = copy.deepcopy(model)
    entries = llm_ext.quantize_(model)
    assert {entry.fqn: entry.reason for entry in entries if entry.reason} == {"no units": "it has no units"}
    for name, I in (("no inputs", 0), ("no outputs", 5), ("cell", 0), ("no units", 4)):  # noqa: E741
        x = torch.randn(3, I)
        assert_all_close(LAYER["int8"], model[name](x), expected[name](x))


@every_weights
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 1000.0, 1e5])
def test_the_error_of_outliers_is_reported(outlier: float, columns: int, weights: Any) -> None:
    """It is that of the other weights, which lose everything in int8."""
    layer = llm_ext.Linear(64, 64)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.weight[:, :columns] = outlier
    w = layer.weight.detach()
    rounded = quantize_weight(w).dequantize() if weights == "int8" else w.bfloat16().float()
    lost = (rounded - w)[:, columns:].norm() / w[:, columns:].norm()
    (entry,) = llm_ext.quantize_(layer, weights)
    assert entry.error is not None
    assert entry.error == pytest.approx(float(lost), rel=0.1)
    assert (entry.error > 0.01) == (weights == "int8" and outlier > 1)
    assert (entry.error > 0.5) == (weights == "int8" and outlier > 10)


@every_weights
def test_the_error_of_sparse_and_normal_weights(weights: Any) -> None:
    """Zeros are exact; a scale of a row has no effect."""
    dense, sparse, scaled = (llm_ext.Linear(512, 64) for _ in range(3))
    with torch.no_grad():
        w = torch.randn(64, 512)
        dense.weight[:] = w
        sparse.weight[:] = w * (torch.rand(64, 512) < 0.1)
        sparse.weight[3] = 0
        scaled.weight[:] = w * 2.0 ** torch.linspace(-90, 70, 64).round()[:, None]
    errors = [llm_ext.quantize_(layer, weights)[0].error for layer in (dense, sparse, scaled)]
    assert errors[0] == pytest.approx(7e-3 if weights == "int8" else 1.7e-3, rel=0.1)
    assert errors[1] == pytest.approx(errors[0], rel=0.3)
    assert errors[2] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize(("weight", "error"), [(0.0, 0.0), (torch.nan, torch.nan), (torch.inf, torch.nan)])
def test_the_error_of_weights_without_a_scale(weight: float, error: float) -> None:
    layer = llm_ext.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:] = weight
    (entry,) = llm_ext.quantize_(layer)
    assert entry.error == pytest.approx(error, nan_ok=True)


@pytest.mark.parametrize("quantize", [llm_ext.quantize_, llm_ext.fake_quantize_])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"])
@every_weights
def test_nan_in_any_matrix_is_reported(weights: Any, name: str, quantize: Callable[..., Any]) -> None:
    layer = llm_ext.GRU(4, 3, 2)
    with torch.no_grad():
        layer.get_parameter(name)[1, 2] = torch.nan
    (entry,) = quantize(layer, weights)
    assert math.isnan(entry.error)


@every_weights
def test_fake_quantization_trains_towards_rounded_weights(weights: Any) -> None:
    torch.manual_seed(0)
    layer: Any = nn.GRU(6, 10)
    x = torch.randn(12, 4, 6)
    llm_ext.fake_quantize_(layer, weights)
    y, _ = layer(x)
    y.square().sum().backward()
    original = layer.parametrizations.weight_hh_l0.original
    assert original.grad.abs().min() > 0
    with torch.no_grad():
        original -= 0.1 * original.grad
        expected, _ = layer(x)
        (entry,) = llm_ext.quantize_(layer, weights)
        assert entry.reason is None
        assert not parametrize.is_parametrized(layer)
        assert_all_close(LAYER[weights], layer(x)[0], expected)


@every_weights
def test_language_model_and_translator(weights: Any) -> None:
    torch.manual_seed(0)
    model = llm_ext.LLM(50, 12, 24, 50, 2, 0.1, cell="gru", attention="none").eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = model(ids)[0].log_softmax(-1)
        llm_ext.quantize_(model, weights)
        assert (model(ids)[0].log_softmax(-1) - expected).abs().max() < 5e-2
    assert model.generate(ids[:, :3], max_new_tokens=60, temperature=0).shape == (2, 63)

    translator = llm_ext.Seq2Seq(40, 45, embedding_dim=10, hidden_dim=16, tie_head=True).eval()
    source, lengths = torch.randint(40, (3, 7)), torch.tensor([7, 3, 5])
    target = torch.randint(45, (3, 5))
    with torch.no_grad():
        expected = translator(source, target, lengths)
        llm_ext.quantize_(translator, weights)
        actual = translator(source, target, lengths)
    assert all((a - b).abs().max() < 5e-2 for a, b in zip(flatten(actual), flatten(expected), strict=True))
    hypotheses = translator.search(source, 2, lengths, beam=2, max_length=5)
    assert len(hypotheses) == 3


@every_weights
@pytest.mark.parametrize("pooling", ["none", "attention", "last"])
def test_classifier(weights: Any, pooling: Any) -> None:
    model = llm_ext.SequenceClassifier(6, 12, feature_dim=4, pooling=pooling).eval()
    x, lengths = torch.randn(3, 9, 4), torch.tensor([9, 4, 1])
    with torch.no_grad():
        expected = model(x, lengths)
        llm_ext.quantize_(model, weights)
        assert (model(x, lengths) - expected).abs().max() < 5e-2
    with pytest.raises(TypeError, match="x must be features of dtype float32, got int64"):
        model(torch.ones(3, 9, 4, dtype=torch.int64))


def test_a_wrong_state_of_a_quantized_model_is_explained() -> None:
    model = llm_ext.LLM(50, 12, 24, 50, 2, 0.1).eval()
    ids = torch.randint(50, (2, 9))
    _, state = model(ids)
    wrong = state._replace(hidden=torch.zeros(2, 3, 24))
    with pytest.raises(ValueError) as floating:  # noqa: PT011
        model(ids, wrong)
    llm_ext.quantize_(model)
    with pytest.raises(ValueError, match=re.escape(str(floating.value))):
        model(ids, wrong)


@every_weights
@pytest.mark.parametrize("kind", ["language model", "translator"])
def test_models_are_trained_with_rounded_weights(kind: str, weights: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(40, (3, 7))
    if kind == "translator":
        model: Any = llm_ext.Seq2Seq(40, 40, embedding_dim=10, hidden_dim=16, tie_head=True)

        def run() -> Tensor:
            return flatten(model(ids, ids))[0]
    else:
        model = llm_ext.LLM(40, 12, 24, 40, 1, 0.0)

        def run() -> Tensor:
            return flatten(model(ids))[0]

    llm_ext.fake_quantize_(model, weights)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(run().flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.dim() > 1)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = run()
        assert all(entry.reason is None for entry in llm_ext.quantize_(model, weights))
        assert (run() - expected).abs().max() < 5e-2


ROUNDED_STATES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (partial(llm_ext.RNN, 5, 9, num_layers=2, nonlinearity="relu"), {}),
    (partial(llm_ext.GRU, 5, 9, bidirectional=True, batch_first=True), {"lengths": torch.tensor([4, 0, 7, 1])}),
    (partial(llm_ext.LSTM, 5, 9, 2, proj_size=4, bidirectional=True), {"lengths": torch.tensor([4, 0, 3, 1])}),
    (partial(nn.LSTM, 5, 9, bias=False), {}),
]


@pytest.mark.parametrize(("build", "options"), ROUNDED_STATES)
def test_states_are_rounded_in_training_as_after_it(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model: Any = nn.Sequential(build())
    quantized: Any = copy.deepcopy(model)
    llm_ext.quantize_(quantized)
    assert [entry.reason for entry in llm_ext.fake_quantize_(model, states=True)] == [None]
    x = torch.randn(4, 7, 5, requires_grad=True) if model[0].batch_first else torch.randn(7, 4, 5, requires_grad=True)
    y, last = model[0](x, **options)
    expected = quantized[0](x.detach(), **options)
    torch.testing.assert_close((y, last), expected, atol=1e-5, rtol=0)
    # Gradients are near those of states that are not rounded.
    plain: Any = copy.deepcopy(model)
    llm_ext.fake_quantize_(plain)
    assert not isinstance(plain[0], FakeQuantizedStates)
    weights = torch.randn_like(y)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(y, [x, *parameters], weights)
    reference = torch.autograd.grad(plain[0](x, **options)[0], [x, *plain.parameters()], weights)
    for actual, near in zip(gradients, reference, strict=True):
        assert (actual - near).norm() < 0.05 * near.norm()
    llm_ext.quantize_(model)
    assert_same_bits(model[0](x.detach(), **options), expected)


def test_states_of_cells_are_rounded_in_training() -> None:
    for cell in (llm_ext.RNNCell(5, 9), llm_ext.GRUCell(5, 9), llm_ext.LSTMCell(5, 9)):
        quantized: Any = copy.deepcopy(cell)
        llm_ext.quantize_(quantized)
        llm_ext.fake_quantize_(cell, states=True)
        x, h = torch.randn(3, 5), torch.randn(3, 9)
        hx = (h, torch.randn(3, 9)) if isinstance(cell, llm_ext.LSTMCell) else h
        torch.testing.assert_close(cell(x, hx), quantized(x, hx), atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert cell(x.bfloat16(), None)[0].dtype == torch.float32


def test_states_are_rounded_with_int8_weights_only() -> None:
    with pytest.raises(ValueError, match="fake_quantize_: states are rounded with int8 weights only, got 'bfloat16'"):
        llm_ext.fake_quantize_(llm_ext.GRU(3, 4), "bfloat16", states=True)
    layer = llm_ext.GRU(3, 4)
    llm_ext.fake_quantize_(layer, states=True)
    with pytest.raises(ValueError, match=r"x must be \[T, B, I\]|input must be"):
        layer(torch.randn(2, 3, 5))
