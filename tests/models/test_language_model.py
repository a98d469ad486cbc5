"""llm_ext.LLM: its layers together, the state between pieces of a text, training, dtypes and configuration."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from typing import Any

import numpy
import pytest
import torch
from support.comparison import assert_close, assert_same_bits, flatten
from support.pairwise import parametrize_pairwise
from support.tolerances import DTYPES, HALF_DTYPES
from torch import Tensor, nn

import llm_ext

V = 11
ATTENTION = ("hidden", "embedding", "none")
CELLS = ("rnn", "gru", "lstm")
every_cell = pytest.mark.parametrize("cell", CELLS)
# Every cell and every kind of attention, three pairs of nine.
cell_and_attention = pytest.mark.parametrize(
    ("cell", "attention"), [("rnn", "hidden"), ("gru", "embedding"), ("lstm", "none")]
)


def model(attention: str = "hidden", **options: Any) -> llm_ext.LLM:
    defaults: dict[str, Any] = {"n_layers": 2, "dropout": 0.0, "dtype": torch.float64}
    return llm_ext.LLM(V, 5, 17, V, attention=attention, **(defaults | options))


def expected_output(m: llm_ext.LLM, x: Tensor) -> Tensor:
    """The output with torch.nn alone: one-hot vectors, its recurrent layers, a softmax under a T × T mask."""
    config = m.config()
    embedded = nn.functional.one_hot(x, V).double() @ m.embedding.weight + m.embedding.bias
    options = {"nonlinearity": config["nonlinearity"]} if config["cell"] == "rnn" else {}
    layers = getattr(nn, str(config["cell"]).upper())
    rnn = layers(5, 17, config["n_layers"], batch_first=True, dtype=torch.float64, **options)
    rnn.load_state_dict(m.rnn.state_dict())
    h: Tensor = rnn(embedded)[0]
    features = h
    if m.pool is not None:
        e = h if config["attention"] == "hidden" else embedded
        inner = e @ m.pool.weight.T
        scores = (inner if m.pool.bias is None else torch.tanh(inner + m.pool.bias)) @ m.pool.v
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        alpha = torch.softmax(scores[:, None].expand(-1, T, T).masked_fill(future, -math.inf), -1)
        features = torch.cat((h, alpha @ e), -1)
    return features @ m.head.weight.T + m.head.bias


@parametrize_pairwise(cell=CELLS, attention=ATTENTION, score=("linear", "tanh"))
def test_output_is_that_of_torch_nn(cell: str, attention: str, score: str) -> None:
    m = model(attention, score=score, cell=cell, nonlinearity="relu")
    for parameter in m.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    x = torch.randint(V, (3, 9))
    output, state = m(x)
    assert_close("model", output, expected_output(m, x))
    assert output.is_contiguous()  # so that output.view(-1, V) works
    assert state.hidden.shape == (2, 3, 17)
    assert (state.attention is None) == (attention == "none")
    assert (state.cell is None) == (cell != "lstm")
    assert state.cell is None or state.cell.shape == (2, 3, 17)


@parametrize_pairwise(cell=CELLS, attention=ATTENTION, dtype=DTYPES)
def test_text_in_pieces(cell: str, attention: str, dtype: torch.dtype) -> None:
    m = model(attention, cell=cell, dtype=dtype)
    x = torch.randint(V, (3, 33))
    whole, last = m(x)
    outputs, state = [], None
    for piece in torch.split(x, [1, 0, 17, 3, 12], 1):
        output, state = m(piece, state)
        outputs.append(output)
    assert_close("model", torch.cat(outputs, 1), whole)
    for tensor, expected in zip(flatten(state), flatten(last), strict=True):
        assert_close("model", tensor, expected)


@cell_and_attention
def test_gradients_flow_through_the_state(cell: str, attention: str) -> None:
    """Backpropagation through two pieces is that through the whole text; a detached state stops it."""
    m = model(attention, cell=cell)
    x = torch.randint(V, (2, 8))
    parameters = list(m.parameters())
    expected = torch.autograd.grad(m(x)[0][:, 5:].square().sum(), parameters)
    _, state = m(x[:, :5])
    actual = torch.autograd.grad(m(x[:, 5:], state)[0].square().sum(), parameters)
    for a, b in zip(actual, expected, strict=True):
        assert_close("model", a, b, "gradient")
    _, state = m(x[:, :5])
    detached = state.detach()
    assert isinstance(detached, llm_ext.LLMState)
    assert all(tensor.requires_grad for tensor in flatten(state))
    assert not any(tensor.requires_grad for tensor in flatten(detached))
    assert_same_bits(state, detached)


@pytest.mark.parametrize("attention", ATTENTION)
def test_output_is_causal(attention: str) -> None:
    m = model(attention)
    x = torch.randint(V, (2, 9))
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % V
    before, after = m(x)[0], m(changed)[0]
    assert_close("model", after[:, :6], before[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


@pytest.mark.parametrize(("B", "T"), [(0, 3), (3, 0), (0, 0)])
@cell_and_attention
def test_empty_input(cell: str, attention: str, B: int, T: int) -> None:
    output, state = model(attention, cell=cell)(torch.zeros(B, T, dtype=torch.int64))
    assert output.shape == (B, T, V)
    assert not state.hidden.any()
    assert state.cell is None or not state.cell.any()


@cell_and_attention
def test_training_loop(cell: str, attention: str) -> None:
    m = model(attention, cell=cell, dropout=0.1, dtype=torch.float32)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(m.parameters(), lr=0.03)
    x = torch.arange(33).remainder(V).expand(4, -1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        output, _ = m(x[:, :-1])
        loss = criterion(output.view(-1, V), x[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.3
    assert all(p.grad is not None for p in m.parameters())
    m.eval()
    assert torch.equal(m.generate(x[0, :5], 28, temperature=0), x[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_layers", [1, 2])
def test_dropout_in_training_only(n_layers: int) -> None:
    """Between layers and before the head; a single layer has only the latter, and does not warn."""
    m = model(n_layers=n_layers, dropout=0.5)
    x = torch.randint(V, (2, 5))
    states = [m(x)[1].hidden[-1] for _ in range(2)]
    assert torch.equal(*states) == (n_layers == 1)
    assert not torch.equal(m(x)[0], m(x)[0])
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])


def test_dropout_before_the_head_has_one_mask_per_row() -> None:
    m = model("none", n_layers=1, dropout=0.5)
    inputs: list[Tensor] = []
    m.head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    m(torch.randint(V, (3, 7)))
    dropped = inputs[0] == 0  # [B, T, H]; a hidden state itself is never 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert dropped.any()
    assert not dropped.all()
    assert not torch.equal(dropped[0], dropped[1]) or not torch.equal(dropped[0], dropped[2])


@parametrize_pairwise(cell=CELLS, attention=ATTENTION, score=("linear", "tanh"))
def test_autocast(cell: str, attention: str, score: str) -> None:
    """Under autocast all layers run in bfloat16, and the state of the pool stays in float32."""
    m = model(attention, score=score, cell=cell, dtype=torch.float32)
    x = torch.randint(V, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = m(x)
        output.float().logsumexp(-1).sum().backward()
    assert output.dtype == torch.bfloat16
    assert state.hidden.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in state.attention or ())
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in m.parameters())
    torch.testing.assert_close(output.float(), m(x)[0], atol=0.1, rtol=0.1)


@parametrize_pairwise(cell=CELLS, attention=ATTENTION, dtype=HALF_DTYPES)
def test_16_bits(cell: str, attention: str, dtype: torch.dtype) -> None:
    """The model is initialized, takes a training step and generates in 16 bits."""
    m = model(attention, cell=cell, dtype=dtype)
    x = torch.randint(V, (3, 9))
    output, state = m(x)
    assert output.dtype == state.hidden.dtype == dtype
    exact = copy.deepcopy(m).double()
    torch.testing.assert_close(output.double(), exact(x)[0], atol=0.05, rtol=0)
    output.float().logsumexp(-1).sum().backward()
    exact(x)[0].logsumexp(-1).sum().backward()
    for parameter, exact_parameter in zip(m.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert exact_parameter.grad is not None
        error = (parameter.grad.double() - exact_parameter.grad).norm()
        assert error <= 0.02 * exact_parameter.grad.norm() + 1e-3
    ids = m.eval().generate(x, 5, temperature=0)
    assert ids.shape == (3, 14)


# ---- initialization and configuration


@every_cell
def test_initialization(cell: str) -> None:
    m = model(n_layers=3, cell=cell)
    for name, parameter in m.named_parameters():
        if "weight_hh" in name:
            assert len(parameter) == 17 * {"rnn": 1, "gru": 3, "lstm": 4}[cell]
            for gate in torch.split(parameter, 17):
                torch.testing.assert_close(gate @ gate.T, torch.eye(17, dtype=torch.float64))
        if "bias" in name:
            expected = torch.zeros_like(parameter)
            if cell == "lstm" and "bias_ih" in name:
                expected[17:34] = 1
            assert torch.equal(parameter, expected)


def test_an_lstm_keeps_its_cell_state_at_first() -> None:
    """Without input, each step multiplies c by sigmoid(1)."""
    m = model("none", n_layers=1, cell="lstm")
    for weight in m.rnn.all_weights[0][:2]:
        nn.init.zeros_(weight)
    state = llm_ext.LLMState(torch.zeros(1, 1, 17).double(), None, torch.ones(1, 1, 17).double())
    _, state = m(torch.zeros(1, 3, dtype=torch.int64), state)
    assert state.cell is not None
    assert_close("model", state.cell, torch.sigmoid(torch.ones(1, 1, 17).double()) ** 3)


@cell_and_attention
def test_config_and_copies(cell: str, attention: str) -> None:
    m = model(attention, cell=cell, nonlinearity="sigmoid", dropout=0.25, score="tanh").eval()
    x = torch.randint(V, (2, 5))
    config = json.loads(json.dumps(m.config()))
    constructor = inspect.signature(llm_ext.LLM.__init__).parameters
    assert set(config) == set(constructor) - {"self", "device", "dtype"}
    rebuilt = llm_ext.LLM(**config, dtype=torch.float64).eval()
    assert rebuilt.config() == m.config()
    assert repr(rebuilt) == repr(m)
    rebuilt.load_state_dict(m.state_dict())
    for other in (rebuilt, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other(x)[0], m(x)[0])


def test_config_and_state_without_a_cell() -> None:
    """Configurations and states that were saved before `cell` existed still work."""
    m = model()
    config = m.config()
    del config["cell"]
    rebuilt = llm_ext.LLM(**config, dtype=torch.float64)  # type: ignore[arg-type]
    rebuilt.load_state_dict(m.state_dict())
    x, (hidden, attention, _) = torch.randint(V, (2, 5)), m(torch.randint(V, (2, 5)))[1]
    assert torch.equal(rebuilt(x, llm_ext.LLMState(hidden, attention))[0], m(x, llm_ext.LLMState(hidden, attention))[0])


BAD_CONSTRUCTORS: list[tuple[dict[str, Any], str]] = [
    ({"n_layers": 0}, "LLM: n_layers must be at least 1, got 0"),
    ({"dropout": 1.5}, "LLM: dropout must be a probability from 0 to 1, got 1.5"),
    ({"attention": "all"}, "LLM: attention must be one of hidden, embedding, none, got 'all'"),
    ({"cell": "elman"}, "LLM: cell must be one of rnn, gru, lstm, got 'elman'"),
    ({"nonlinearity": "gelu"}, "nonlinearity must be one of"),
    ({"score": "dot"}, "score must be one of linear, tanh, got 'dot'"),
    ({"attn_dim": -1}, "LLM: attn_dim must be at least 1, got -1"),
    ({"attn_dim": -3, "attention": "none"}, "LLM: attn_dim must be at least 0, got -3"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONSTRUCTORS)
def test_bad_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


# ---- arguments of a call


BAD_CALLS: list[tuple[Tensor, type[Exception], str]] = [
    (torch.zeros(3, dtype=torch.int64), ValueError, r"LLM: x must be \[B, T\], got \[3\]"),
    (torch.zeros(3, 2), TypeError, "LLM: x must be int64 or int32, got float32"),
    (torch.tensor([[0, V]]), IndexError, f"ids must be from 0 to {V - 1}, got values from 0 to {V}"),
    (torch.tensor([[-1]]), IndexError, "got values from -1 to -1"),
]


@pytest.mark.parametrize(("x", "error", "message"), BAD_CALLS)
def test_bad_call(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model()(x)


@every_cell
def test_state_of_another_batch(cell: str) -> None:
    m = model(cell=cell)
    _, state = m(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"LLM: state.hidden must be \[L, N, H\] = \[2, 2, 17\], got \[2, 3, 17\]"):
        m(torch.zeros(2, 2, dtype=torch.int64), state)


def test_state_of_another_cell() -> None:
    x = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"LLM: state.cell must be None, got Tensor"):
        model(cell="gru")(x, model(cell="lstm")(x)[1])
    with pytest.raises(TypeError, match=r"LLM: state.cell must be a Tensor, got NoneType"):
        model(cell="lstm")(x, model(cell="gru")(x)[1])


@pytest.mark.parametrize("state", [torch.zeros(2, 3, 17), (torch.zeros(2, 3, 17),), [torch.zeros(2, 3, 17)] * 2])
def test_what_is_no_state(state: Any) -> None:
    with pytest.raises(TypeError, match=f"LLM: state must be an LLMState, got {type(state).__name__}"):
        model(cell="lstm")(torch.zeros(3, 2, dtype=torch.int64), state)


def test_ids_of_32_bits() -> None:
    m, x = model().eval(), torch.randint(V, (2, 5))
    assert torch.equal(m(x.int())[0], m(x)[0])
    for steps in (1, V):  # without and with the folded embedding
        generated = m.generate(x.int(), steps, temperature=0)
        assert generated.dtype == torch.int32
        assert torch.equal(generated, m.generate(x, steps, temperature=0))


@pytest.mark.parametrize("attention", ATTENTION)
def test_sampled_ids_can_be_trained_on(attention: str) -> None:
    """They are no inference tensors."""
    m, x = model(attention), torch.randint(V, (2, 5))
    ids = list(m.stream(x, 3))
    ids[0].add_(0)
    for text in (torch.stack(ids, 1), m.generate(x, 3), m.generate(x, 0), m.generate(x[0], 3)[None]):
        assert not text.is_inference()
        m(text)[0].sum().backward()


def test_sizes_of_numpy() -> None:
    sizes = [numpy.int64(size) for size in (V, 5, 17, V, 2)]
    options: dict[str, Any] = {"dropout": numpy.float64(0.25), "attn_dim": numpy.int32(4)}
    m = llm_ext.LLM(*sizes, **options)
    assert json.loads(json.dumps(m.config())) == llm_ext.LLM(V, 5, 17, V, 2, 0.25, attn_dim=4).config()


@cell_and_attention
def test_compiles_without_graph_breaks(cell: str, attention: str) -> None:
    """From the start of a text and from a state, forward and backward."""
    torch.compiler.reset()  # the cache of compiled graphs is limited
    m = model(attention, cell=cell, dtype=torch.float32)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randint(V, (2, 6))
    expected, state = m(x)
    assert_close("model", compiled(x)[0], expected)
    assert_close("model", compiled(x, state.detach())[0], m(x, state.detach())[0])
    compiled(x)[0].sum().backward()
    gradients = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad()
    m(x)[0].sum().backward()
    for gradient, p in zip(gradients, m.parameters(), strict=True):
        assert p.grad is not None
        assert_close("model", gradient, p.grad, "gradient")
