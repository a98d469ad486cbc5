"""quantize_, dequantize_ and fake_quantize_: layers of 8 and 16 bits, alone and inside models."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, assert_same_bits, flatten
from support.pairwise import parametrize_pairwise
from support.quantized import LAYER, WEIGHTS
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from llm_ext.nn import AffineEmbedding
from llm_ext.reference.quantization import quantize_weight

OURS = {"RNN": llm_ext.RNN, "GRU": llm_ext.GRU, "LSTM": llm_ext.LSTM}
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
    with torch.autocast("cpu"):
        assert layer(x.detach().bfloat16())[0].dtype == torch.float32


def test_what_is_left_alone_and_why() -> None:
    class Own(nn.GRU):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(3, 3),
            "wide": nn.GRU(3, 3, dtype=torch.float64),
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
        "linear": "it is a layer of torch.nn that is not recurrent",
        "excluded": "the filter excludes it",
        "normed": "it has parametrizations; remove them first",
        "quantized": None,
        "long": "weight has 133145 columns, more than 133144",
    }
    with pytest.warns(UserWarning, match="no layer of Linear is quantized"):
        llm_ext.quantize_(nn.Linear(2, 2))


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_the_error_of_an_outlier_is_reported(outlier: float) -> None:
    layer = llm_ext.Linear(64, 64)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.weight[:, 0] = outlier
    (entry,) = llm_ext.quantize_(copy.deepcopy(layer))
    assert entry.error is not None
    small = layer.weight[:, 1:].detach()
    lost = (quantize_weight(layer.weight.detach()).dequantize()[:, 1:] - small).norm() / small.norm()
    assert (lost > 0.9) == (outlier > 1)
    assert entry.error == pytest.approx(float(lost * small.norm() / layer.weight.detach().norm()), rel=1e-3)
    (entry,) = llm_ext.quantize_(layer, "bfloat16")
    assert entry.error is not None
    assert entry.error < 4e-3


@pytest.mark.parametrize(("weight", "error"), [(0.0, 0.0), (torch.nan, torch.nan), (torch.inf, torch.nan)])
def test_the_error_of_weights_without_a_scale(weight: float, error: float) -> None:
    layer = llm_ext.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:] = weight
    (entry,) = llm_ext.quantize_(layer)
    assert entry.error == pytest.approx(error, nan_ok=True)


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
