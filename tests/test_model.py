"""llm_ext.LLM: the parts put together, the state between pieces of a text, and sampling."""

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable
from functools import partial

import cases
import pytest
import torch
from torch import Tensor, nn

import llm_ext
from llm_ext.layers import AffineEmbedding
from llm_ext.model import sample

V = 11
ATTENTION = ("hidden", "embedding", "none")
CELLS = ("rnn", "gru", "lstm")
every_cell = pytest.mark.parametrize("cell", CELLS)


def model(attention: str = "hidden", **options: object) -> llm_ext.LLM:
    options = {"n_layers": 2, "dropout": 0.0, "attention": attention, "dtype": torch.float64} | options
    return llm_ext.LLM(V, 5, 17, V, **options)


def flat(state: llm_ext.LLMState) -> list[Tensor]:
    return [state.hidden, *(state.attention or ()), *(() if state.cell is None else (state.cell,))]


def by_hand(m: llm_ext.LLM, x: Tensor) -> Tensor:
    """The same model from torch.nn alone: one-hot vectors, its own layers, a softmax under a T × T mask."""
    config = m.config()
    embedded = nn.functional.one_hot(x, V).double() @ m.embedding.weight + m.embedding.bias
    options = {"nonlinearity": config["nonlinearity"]} if config["cell"] == "rnn" else {}
    layers = getattr(nn, config["cell"].upper())
    rnn = layers(5, 17, config["n_layers"], batch_first=True, dtype=torch.float64, **options)
    rnn.load_state_dict(m.rnn.state_dict())
    features = h = rnn(embedded)[0]
    if m.pool is not None:
        e = h if config["attention"] == "hidden" else embedded
        inner = e @ m.pool.weight.T
        scores = (inner if config["score"] == "linear" else torch.tanh(inner + m.pool.bias)) @ m.pool.v
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        alpha = torch.softmax(scores[:, None].expand(-1, T, T).masked_fill(future, -math.inf), -1)
        features = torch.cat((h, alpha @ e), -1)
    return features @ m.head.weight.T + m.head.bias


@every_cell
@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_is_its_parts(attention: str, score: str, cell: str) -> None:
    m = model(attention, score=score, cell=cell, nonlinearity="relu")
    for parameter in m.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    x = torch.randint(V, (3, 9))
    output, state = m(x)
    cases.assert_close("model", output, by_hand(m, x))
    assert output.is_contiguous()  # so that output.view(-1, V) works
    assert state.hidden.shape == (2, 3, 17)
    assert (state.attention is None) == (attention == "none")
    assert (state.cell is None) == (cell != "lstm")
    assert cell != "lstm" or state.cell.shape == (2, 3, 17)


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_pieces_are_the_whole(dtype: torch.dtype, attention: str, cell: str) -> None:
    m = model(attention, cell=cell, dtype=dtype)
    x = torch.randint(V, (3, 33))
    whole, last = m(x)
    outputs, state = [], None
    for piece in x.split([1, 0, 17, 3, 12], 1):
        output, state = m(piece, state)
        outputs.append(output)
    cases.assert_close("model", torch.cat(outputs, 1), whole)
    for part, expected in zip(flat(state), flat(last), strict=True):
        cases.assert_close("model", part, expected)


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_flow_through_the_state(attention: str, cell: str) -> None:
    """Backpropagation through two pieces is that through the whole; a detached state stops it."""
    m = model(attention, cell=cell)
    x = torch.randint(V, (2, 8))
    parameters = list(m.parameters())
    expected = torch.autograd.grad(m(x)[0][:, 5:].square().sum(), parameters)
    _, state = m(x[:, :5])
    actual = torch.autograd.grad(m(x[:, 5:], state)[0].square().sum(), parameters)
    for a, b in zip(actual, expected, strict=True):
        cases.assert_close("model", a, b, "gradient")
    _, state = m(x[:, :5])
    detached = state.detach()
    assert isinstance(detached, llm_ext.LLMState)
    assert all(t.requires_grad for t in flat(state))
    assert not any(t.requires_grad for t in flat(detached))
    assert len(flat(detached)) == len(flat(state))
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(detached), strict=True))


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_position_sees_the_future(attention: str) -> None:
    m = model(attention)
    x = torch.randint(V, (2, 9))
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % V
    before, after = m(x)[0], m(changed)[0]
    cases.assert_close("model", after[:, :6], before[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("B", "T"), [(0, 3), (3, 0), (0, 0)])
def test_nothing(B: int, T: int, attention: str, cell: str) -> None:
    output, state = model(attention, cell=cell)(torch.zeros(B, T, dtype=torch.int64))
    assert output.shape == (B, T, V)
    assert not state.hidden.any()
    assert state.cell is None or not state.cell.any()


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_usual_training_loop(attention: str, cell: str) -> None:
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
    """Between layers and before the head; one layer has only the latter, and that is no reason to warn."""
    m = model(n_layers=n_layers, dropout=0.5)
    x = torch.randint(V, (2, 5))
    states = [m(x)[1].hidden[-1] for _ in range(2)]
    assert torch.equal(*states) == (n_layers == 1)
    assert not torch.equal(m(x)[0], m(x)[0])
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])


def test_dropout_before_the_head_is_one_mask_a_row() -> None:
    m = model("none", n_layers=1, dropout=0.5)
    read = []
    m.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    m(torch.randint(V, (3, 7)))
    dropped = read[0] == 0  # [B, T, H]; a hidden state is never 0 by itself
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert dropped.any()
    assert not dropped.all()
    assert not torch.equal(dropped[0], dropped[1]) or not torch.equal(dropped[0], dropped[2])


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("score", ["linear", "tanh"])
def test_mixed_precision(score: str, attention: str, cell: str) -> None:
    """Under autocast everything runs in bfloat16, but the state of the pool goes on in float32."""
    m = model(attention, score=score, cell=cell, dtype=torch.float32)
    x = torch.randint(V, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = m(x)
        output.float().logsumexp(-1).sum().backward()
    assert output.dtype == torch.bfloat16
    assert state.hidden.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in state.attention or ())
    assert all(parameter.grad.dtype == torch.float32 for parameter in m.parameters())
    torch.testing.assert_close(output.float(), m(x)[0], atol=0.1, rtol=0.1)


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cell: str, attention: str, dtype: torch.dtype) -> None:
    """The whole model runs in 16 bits: initialised, trained by a step, and continuing a text."""
    m = model(attention, cell=cell, dtype=dtype)
    x = torch.randint(V, (3, 9))
    output, state = m(x)
    assert output.dtype == state.hidden.dtype == dtype
    exact = copy.deepcopy(m).double()
    torch.testing.assert_close(output.double(), exact(x)[0], atol=0.05, rtol=0)
    output.float().logsumexp(-1).sum().backward()
    exact(x)[0].logsumexp(-1).sum().backward()
    for parameter, true_parameter in zip(m.parameters(), exact.parameters(), strict=True):
        error = (parameter.grad.double() - true_parameter.grad).norm()
        assert error <= 0.02 * true_parameter.grad.norm() + 1e-3
    ids = m.eval().generate(x, 5, temperature=0)
    assert ids.shape == (3, 14)


@every_cell
def test_initialisation(cell: str) -> None:
    m = model(n_layers=3, cell=cell)
    for name, parameter in m.named_parameters():
        if "weight_hh" in name:
            assert len(parameter) == 17 * {"rnn": 1, "gru": 3, "lstm": 4}[cell]
            for gate in parameter.split(17):
                torch.testing.assert_close(gate @ gate.T, torch.eye(17, dtype=torch.float64))
        if "bias" in name:
            forget = parameter.new_zeros(parameter.shape)
            if cell == "lstm" and "bias_ih" in name:
                forget[17:34] = 1
            assert torch.equal(parameter, forget)


def test_an_lstm_remembers_from_the_start() -> None:
    """With no input to speak of, each step keeps sigmoid(1) of c."""
    m = model("none", n_layers=1, cell="lstm")
    nn.init.zeros_(m.rnn.weight_ih_l0)
    nn.init.zeros_(m.rnn.weight_hh_l0)
    state = llm_ext.LLMState(torch.zeros(1, 1, 17).double(), None, torch.ones(1, 1, 17).double())
    _, state = m(torch.zeros(1, 3, dtype=torch.int64), state)
    cases.assert_close("model", state.cell, torch.sigmoid(torch.ones(1, 1, 17).double()) ** 3)


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
def test_config_and_copies(attention: str, cell: str) -> None:
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


def test_what_was_saved_before_there_was_a_choice_of_cells() -> None:
    m = model()
    config = m.config()
    del config["cell"]
    rebuilt = llm_ext.LLM(**config, dtype=torch.float64)
    rebuilt.load_state_dict(m.state_dict())
    x, (hidden, attention, _) = torch.randint(V, (2, 5)), m(torch.randint(V, (2, 5)))[1]
    assert torch.equal(rebuilt(x, llm_ext.LLMState(hidden, attention))[0], m(x, llm_ext.LLMState(hidden, attention))[0])


@every_cell
@pytest.mark.parametrize("attention", ATTENTION)
def test_greedy_generation_is_the_best_token_of_the_whole_text(attention: str, cell: str) -> None:
    m = model(attention, cell=cell).eval()
    prompt = torch.randint(V, (3, 4))
    ids = m.generate(prompt, 12, temperature=0)
    assert ids.shape == (3, 16)
    assert torch.equal(ids[:, :4], prompt)
    for t in range(4, 16):
        assert torch.equal(m(ids[:, :t])[0][:, -1].argmax(-1), ids[:, t])
    for row, expected in zip(prompt, ids, strict=True):
        assert torch.equal(m.generate(row, 12, temperature=0), expected)
    assert torch.equal(m.generate(prompt, 12, top_k=1), ids)
    assert torch.equal(m.generate(prompt, 12, top_p=1e-9), ids)
    assert not ids.is_inference()


def test_one_step_a_token() -> None:
    m = model().eval()
    steps = []
    m.rnn.register_forward_hook(lambda _, arguments, __: steps.append(arguments[0].shape[0]))
    assert len(list(m.stream(torch.randint(V, (2, 7)), 5))) == 5
    assert steps == [7, 1, 1, 1, 1]


def greedy(m: llm_ext.LLM, prompt: Tensor, tokens: int) -> Tensor:
    """The best token of the whole text, again and again."""
    ids = prompt
    for _ in range(tokens):
        ids = torch.cat((ids, m(ids)[0][:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize(("tokens", "tables"), [(V - 1, 0), (V, 1)])
def test_what_weights_alone_decide_is_computed_once_a_stream(
    tokens: int, tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the embedding only where there are as many tokens as ids."""
    m = model().eval()
    folded = []
    for kind in (AffineEmbedding, llm_ext.AttentionPool):
        fold = kind.fold
        monkeypatch.setattr(kind, "fold", lambda layer, fold=fold: folded.append(type(layer)) or fold(layer))
    prompt = torch.randint(V, (2, 7))
    for times in (1, 2):
        m.generate(prompt, tokens)
        assert folded.count(AffineEmbedding) == tables * times
        assert folded.count(llm_ext.AttentionPool) == times


class Negative(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return -tensor


class ThriceTheWords(AffineEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class ThricePooled(llm_ext.AttentionPool):
    def forward(self, e: Tensor, *, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c, state = super().forward(e, state=state)
        return 3 * c, state


def hook_layers(m: llm_ext.LLM) -> None:
    m.embedding.register_forward_hook(lambda _, __, output: 3 * output)
    m.embedding.register_forward_pre_hook(lambda _, arguments: ((arguments[0] + 1) % V,))
    m.rnn.register_forward_hook(lambda _, __, output: (output[0] - 0.5, output[1]))
    m.pool.register_forward_hook(lambda _, __, output: (3 * output[0], output[1]))
    m.head.register_forward_hook(lambda _, __, output: -output)


def hook_weights(m: llm_ext.LLM) -> None:
    """As torch.nn.utils.spectral_norm: the weights are there only when the layers run."""

    def put(whole: Tensor, layer: nn.Module, _: object) -> None:
        layer.weight.data.copy_(whole)

    for layer in (m.embedding, m.pool):
        whole = layer.weight.detach().clone()
        layer.weight.data.zero_()
        layer.register_forward_pre_hook(partial(put, whole))


def parametrize(m: llm_ext.LLM) -> None:
    for layer, name in ((m.embedding, "bias"), (m.pool, "v"), (m.rnn, "weight_hh_l0"), (m.head, "weight")):
        nn.utils.parametrize.register_parametrization(layer, name, Negative())


def replace_layers(m: llm_ext.LLM) -> None:
    for name, other in (
        ("embedding", ThriceTheWords(V, 5, dtype=torch.float64)),
        ("pool", ThricePooled(17, 17, causal=True, dtype=torch.float64)),
    ):
        other.load_state_dict(getattr(m, name).state_dict())
        setattr(m, name, other)


def replace_forward(m: llm_ext.LLM) -> None:
    embed, pool = m.embedding.forward, m.pool.forward
    m.embedding.forward = lambda ids: 3 * embed(ids)
    m.pool.forward = lambda e, state: (pool(e, state=state)[0] + 1, pool(e, state=state)[1])


@pytest.mark.parametrize("change", [hook_layers, hook_weights, parametrize, replace_layers, replace_forward])
def test_generation_minds_changed_layers(change: Callable[[llm_ext.LLM], None]) -> None:
    m = model().eval()
    for parameter in m.parameters():
        nn.init.normal_(parameter, std=0.5)
    prompt = torch.randint(V, (4, 3))
    before = m.generate(prompt, 2 * V, temperature=0)
    change(m)
    after = m.generate(prompt, 2 * V, temperature=0)
    assert torch.equal(after, greedy(m, prompt, 2 * V))
    assert torch.equal(after, before) == (change is hook_weights)


def test_generation_in_a_functional_call() -> None:
    m, other = model().eval(), model().eval()
    prompt = torch.randint(V, (3, 4))

    class Generation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = m

        def forward(self, prompt: Tensor) -> Tensor:
            return self.model.generate(prompt, 2 * V, temperature=0)

    weights = {f"model.{name}": parameter for name, parameter in other.named_parameters()}
    ids = torch.func.functional_call(Generation(), weights, (prompt,))
    assert torch.equal(ids, other.generate(prompt, 2 * V, temperature=0))
    assert not torch.equal(ids, m.generate(prompt, 2 * V, temperature=0))


def test_stream_is_generate() -> None:
    m = model().eval()
    prompt = torch.randint(V, (2, 3))
    options = {"temperature": 1.3, "top_k": 7, "top_p": 0.9}
    ids = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    stream = m.stream(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.stack(list(stream), 1), ids[:, 3:])
    other = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(other, ids)
    with torch.inference_mode():
        same = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    assert torch.equal(same, ids)
    # Between two tokens the caller's own work records gradients as ever.
    for _ in m.stream(prompt, 2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(m.generate(prompt, 0), prompt)
    assert m.generate(prompt[:0], 4).shape == (0, 7)


def counts(scores: Tensor, **options: object) -> Tensor:
    """How often each id was drawn, as a share; of rows [1, V]."""
    drawn = sample(scores.expand(20000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=scores.shape[-1]) / 20000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sampling(dtype: torch.dtype) -> None:
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    scores = shares.log()[None].to(dtype) + 7  # what is added to all is nothing
    torch.testing.assert_close(counts(scores), shares, atol=0.02, rtol=0)
    sharper = shares.square() / shares.square().sum()
    torch.testing.assert_close(counts(scores, temperature=0.5), sharper, atol=0.02, rtol=0)
    best_two = torch.tensor([0, 4 / 7, 0, 3 / 7])
    torch.testing.assert_close(counts(scores, top_k=2), best_two, atol=0.02, rtol=0)
    # 0.4 does not reach 0.6, 0.4 + 0.3 does.
    torch.testing.assert_close(counts(scores, top_p=0.6), best_two, atol=0.02, rtol=0)
    torch.testing.assert_close(counts(scores, top_p=1.0), shares, atol=0.02, rtol=0)
    torch.testing.assert_close(counts(scores, top_k=9), shares, atol=0.02, rtol=0)
    only_best = torch.tensor([0.0, 1.0, 0.0, 0.0])
    # Of the best three 0.4 / 0.9 does not reach 0.75, and 0.7 / 0.9 does.
    torch.testing.assert_close(counts(scores, top_k=3, top_p=0.75), best_two, atol=0.02, rtol=0)
    sharp_two = torch.tensor([0, 16 / 25, 0, 9 / 25])
    torch.testing.assert_close(counts(scores, temperature=0.5, top_k=2), sharp_two, atol=0.02, rtol=0)
    # At temperature 0.5 the shares are 1, 16, 4 and 9 thirtieths.
    torch.testing.assert_close(counts(scores, temperature=0.5, top_p=0.8), sharp_two, atol=0.02, rtol=0)
    impossible = scores.where(shares != 0.2, -math.inf)
    torch.testing.assert_close(counts(impossible), torch.tensor([1, 4, 0, 3]) / 8, atol=0.02, rtol=0)
    assert torch.equal(counts(scores, temperature=1e-6), only_best)
    assert torch.equal(counts(scores, temperature=0), only_best)
    assert torch.equal(counts(scores, top_p=0.3), only_best)
    # Equal scores at the border of top_k: still no more than k.
    assert (counts(torch.zeros(1, 4, dtype=dtype), top_k=2) > 0).sum() == 2
    # Of many equals none is preferred.
    many = counts(torch.zeros(1, 500, dtype=dtype))
    assert abs(many[:250].sum() - 0.5) < 0.015
    assert many.max() < 90 / 20000


BAD_CALLS = [
    (torch.zeros(3, dtype=torch.int64), ValueError, r"LLM: x must be \[B, T\], got \[3\]"),
    (torch.zeros(3, 2), TypeError, "LLM: x must be int64, got float32"),
    (torch.tensor([[0, V]]), IndexError, f"ids must be from 0 to {V - 1}, got values from 0 to {V}"),
    (torch.tensor([[-1]]), IndexError, "got values from -1 to -1"),
]


@pytest.mark.parametrize("temperature", [0, 1])
def test_scores_that_are_not_numbers(temperature: float) -> None:
    """A sampled text must not come from NaN: neither at once nor when it appears later."""
    net = model()
    stream = net.stream(torch.zeros(1, 2, dtype=torch.int64), 5, temperature)
    next(stream)
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="token 5 of 5 are not a number"):
        list(stream)
    with pytest.raises(RuntimeError, match="token 1 of 3 are not a number"):
        net.generate(torch.zeros(2, dtype=torch.int64), 3, temperature)


@pytest.mark.parametrize(("x", "error", "message"), BAD_CALLS)
def test_bad_call(x: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model()(x)


@every_cell
def test_state_of_another_batch(cell: str) -> None:
    m = model(cell=cell)
    _, state = m(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"hx.* must be \[L, B, H\] = \[2, 2, 17\], got \[2, 3, 17\]"):
        m(torch.zeros(2, 2, dtype=torch.int64), state)


def test_state_of_another_cell() -> None:
    x = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="GRU: hx must be a Tensor, got tuple"):
        model(cell="gru")(x, model(cell="lstm")(x)[1])
    with pytest.raises(ValueError, match="LSTM: hx"):
        model(cell="lstm")(x, model(cell="gru")(x)[1])


BAD_SAMPLING = [
    ({"prompt_ids": torch.zeros(0, dtype=torch.int64)}, "prompt_ids must be .* got .0."),
    ({"prompt_ids": torch.zeros(2, 0, dtype=torch.int64)}, "prompt_ids must be .* got .2, 0."),
    ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
    ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_prompt_of_no_ids(method: str) -> None:
    with pytest.raises(TypeError, match="prompt_ids must be int64, got float32"):
        getattr(model(), method)(torch.zeros(3), 2)


@pytest.mark.parametrize(("options", "message"), BAD_SAMPLING)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_sampling(method: str, options: dict[str, object], message: str) -> None:
    arguments = {"prompt_ids": torch.zeros(3, dtype=torch.int64), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):  # at the call, before the first token is asked for
        getattr(model(), method)(**arguments)


BAD_CONSTRUCTORS = [
    ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
    ({"dropout": 1.5}, "dropout must be a probability from 0 to 1, got 1.5"),
    ({"attention": "all"}, "attention must be one of hidden, embedding, none, got 'all'"),
    ({"cell": "elman"}, "LLM: cell must be one of rnn, gru, lstm, got 'elman'"),
    ({"nonlinearity": "gelu"}, "nonlinearity must be one of"),
    ({"score": "dot"}, "score must be one of linear, tanh, got 'dot'"),
    ({"attn_dim": -1}, "attn_dim must be at least 1, got -1"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONSTRUCTORS)
def test_bad_constructor(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize(("attention", "cell"), [*((a, "rnn") for a in ATTENTION), ("hidden", "gru"), ("none", "lstm")])
def test_compiles_whole(attention: str, cell: str) -> None:
    """torch.compile finds no reason to break the graph, neither from the start of a text nor from a state."""
    torch.compiler.reset()  # of what was compiled before it remembers so much only
    m = model(attention, cell=cell, dtype=torch.float32)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randint(V, (2, 6))
    expected, state = m(x)
    cases.assert_close("model", compiled(x)[0], expected)
    cases.assert_close("model", compiled(x, state.detach())[0], m(x, state.detach())[0])
    compiled(x)[0].sum().backward()
    gradients = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    m(x)[0].sum().backward()
    for gradient, p in zip(gradients, m.parameters(), strict=True):
        cases.assert_close("model", gradient, p.grad, "gradient")
