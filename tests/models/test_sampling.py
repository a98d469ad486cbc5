"""Sampling from scores, and generation of text by llm_ext.LLM."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_ext
from llm_ext.models import sample
from llm_ext.nn import AffineEmbedding

V = 11


def model(attention: str = "hidden", **options: Any) -> llm_ext.LLM:
    defaults: dict[str, Any] = {"n_layers": 2, "dropout": 0.0, "dtype": torch.float64}
    return llm_ext.LLM(V, 5, 17, V, attention=attention, **(defaults | options))


# ---- sample


def frequencies(scores: Tensor, **options: Any) -> Tensor:
    """The relative frequency of each id in 20,000 draws from scores [1, V]."""
    drawn = sample(scores.expand(20000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=scores.shape[-1]) / 20000


PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
ONLY_BEST = torch.tensor([0.0, 1.0, 0.0, 0.0])
BEST_TWO = torch.tensor([0, 4 / 7, 0, 3 / 7])
# At temperature 0.5 the probabilities are 1, 16, 4 and 9 thirtieths.
SHARP = torch.tensor([1, 16, 4, 9]) / 30
SHARP_TWO = torch.tensor([0, 16 / 25, 0, 9 / 25])
DISTRIBUTIONS: list[tuple[dict[str, Any], Tensor]] = [
    ({}, PROBABILITIES),
    ({"temperature": 0.5}, SHARP),
    ({"temperature": 1e-6}, ONLY_BEST),
    ({"temperature": 0}, ONLY_BEST),
    ({"top_k": 2}, BEST_TWO),
    ({"top_k": 9}, PROBABILITIES),
    ({"temperature": 0.5, "top_k": 2}, SHARP_TWO),
    ({"top_p": 0.6}, BEST_TWO),  # 0.4 is below 0.6, and 0.4 + 0.3 is not
    ({"top_p": 0.3}, ONLY_BEST),
    ({"top_p": 1.0}, PROBABILITIES),
    ({"temperature": 0.5, "top_p": 0.8}, SHARP_TWO),
    ({"top_k": 3, "top_p": 0.75}, BEST_TWO),  # among the best three 0.4 / 0.9 is below 0.75, and 0.7 / 0.9 is not
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_distribution(dtype: torch.dtype) -> None:
    scores = PROBABILITIES.log()[None].to(dtype) + 7  # a constant does not change the softmax
    for options, expected in DISTRIBUTIONS:
        error = (frequencies(scores, **options) - expected).abs().max()
        assert error <= (0 if expected is ONLY_BEST else 0.02), options
    impossible = scores.where(PROBABILITIES != 0.2, -math.inf)
    torch.testing.assert_close(frequencies(impossible), torch.tensor([1, 4, 0, 3]) / 8, atol=0.02, rtol=0)
    # Equal scores at the border of top_k: still no more than k ids.
    assert (frequencies(torch.zeros(1, 4, dtype=dtype), top_k=2) > 0).sum() == 2
    # Many equal scores are drawn equally often, large ones too, beside which noise in 16 bits would be rounded.
    many = frequencies(torch.full((1, 500), 200, dtype=dtype))
    assert abs(many[:250].sum() - 0.5) < 0.015
    assert many.max() < 90 / 20000


# ---- generation


@pytest.mark.parametrize(("cell", "attention"), [("rnn", "hidden"), ("gru", "embedding"), ("lstm", "none")])
def test_greedy_generation_takes_the_best_token_of_the_whole_text(cell: str, attention: str) -> None:
    m = model(attention, cell=cell).eval()
    prompt = torch.randint(V, (3, 4))
    ids = m.generate(prompt, 12, temperature=0)
    assert torch.equal(ids, greedy(m, prompt, 12))
    for row, expected in zip(prompt, ids, strict=True):
        assert torch.equal(m.generate(row, 12, temperature=0), expected)
    assert torch.equal(m.generate(prompt, 12, top_k=1), ids)
    assert torch.equal(m.generate(prompt, 12, top_p=1e-9), ids)
    assert not ids.is_inference()


def greedy(m: llm_ext.LLM, prompt: Tensor, tokens: int) -> Tensor:
    """Append the best next token of the whole text `tokens` times."""
    ids = prompt
    for _ in range(tokens):
        ids = torch.cat((ids, m(ids)[0][:, -1:].argmax(-1)), 1)
    return ids


def test_stream_is_generate() -> None:
    m = model().eval()
    prompt = torch.randint(V, (2, 3))
    options: dict[str, Any] = {"temperature": 1.3, "top_k": 7, "top_p": 0.9}
    ids = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    stream = m.stream(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.stack(list(stream), 1), ids[:, 3:])
    other = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(other, ids)
    with torch.inference_mode():
        same = m.generate(prompt, 8, **options, generator=torch.Generator().manual_seed(5))
    assert torch.equal(same, ids)
    # Between two tokens, the code of the caller runs with gradients as before.
    for _ in m.stream(prompt, 2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(m.generate(prompt, 0), prompt)
    assert m.generate(prompt[:0], 4).shape == (0, 7)


def test_one_step_per_token() -> None:
    m = model().eval()
    steps: list[int] = []
    m.rnn.register_forward_hook(lambda _, arguments, __: steps.append(arguments[0].shape[0]))
    assert len(list(m.stream(torch.randint(V, (2, 7)), 5))) == 5
    assert steps == [7, 1, 1, 1, 1]


@pytest.mark.parametrize(("tokens", "tables"), [(V - 1, 0), (V, 1)])
def test_weights_are_folded_once_per_stream(tokens: int, tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the embedding only for at least as many tokens as ids."""
    m = model().eval()
    folded: list[type[nn.Module]] = []

    def count_calls(kind: Any) -> None:
        fold = kind.fold

        def counted(layer: Any) -> Any:
            folded.append(kind)
            return fold(layer)

        monkeypatch.setattr(kind, "fold", counted)

    count_calls(AffineEmbedding)
    count_calls(llm_ext.AttentionPool)
    prompt = torch.randint(V, (2, 7))
    for times in (1, 2):
        m.generate(prompt, tokens)
        assert folded.count(AffineEmbedding) == tables * times
        assert folded.count(llm_ext.AttentionPool) == times


class Negative(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return -tensor


class TripledEmbedding(AffineEmbedding):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * super().forward(ids)


class TripledPool(llm_ext.AttentionPool):
    def forward(self, e: Tensor, *, state: tuple[Tensor, Tensor] | None) -> Any:  # type: ignore[override]
        result: Any = super().forward(e, state=state)
        return 3 * result[0], result[1]


def hook_layers(m: llm_ext.LLM) -> None:
    assert m.pool is not None
    m.embedding.register_forward_hook(lambda _, __, output: 3 * output)
    m.embedding.register_forward_pre_hook(lambda _, arguments: ((arguments[0] + 1) % V,))
    m.rnn.register_forward_hook(lambda _, __, output: (output[0] - 0.5, output[1]))
    m.pool.register_forward_hook(lambda _, __, output: (3 * output[0], output[1]))
    m.head.register_forward_hook(lambda _, __, output: -output)


def hook_weights(m: llm_ext.LLM) -> None:
    """Set the weights when the layers run, as torch.nn.utils.spectral_norm does."""

    def restore(weight: Tensor, layer: Any, _: object) -> None:
        layer.weight.data.copy_(weight)

    for layer in (m.embedding, m.pool):
        assert layer is not None
        weight = layer.weight.detach().clone()
        layer.weight.data.zero_()
        layer.register_forward_pre_hook(partial(restore, weight))


def parametrize(m: llm_ext.LLM) -> None:
    layers: list[tuple[Any, str]]
    layers = [(m.embedding, "bias"), (m.pool, "v"), (m.rnn, "weight_hh_l0"), (m.head, "weight")]
    for layer, name in layers:
        nn.utils.parametrize.register_parametrization(layer, name, Negative())


def replace_layers(m: llm_ext.LLM) -> None:
    others: dict[str, nn.Module] = {
        "embedding": TripledEmbedding(V, 5, dtype=torch.float64),
        "pool": TripledPool(17, 17, causal=True, dtype=torch.float64),
    }
    for name, other in others.items():
        other.load_state_dict(getattr(m, name).state_dict())
        setattr(m, name, other)


def replace_forward(m: llm_ext.LLM) -> None:
    assert m.pool is not None
    embedding: Any = m.embedding
    pool: Any = m.pool
    embed, pooled = embedding.forward, pool.forward
    embedding.forward = lambda ids: 3 * embed(ids)
    pool.forward = lambda e, state: (pooled(e, state=state)[0] + 1, pooled(e, state=state)[1])


@pytest.mark.parametrize("change", [hook_layers, hook_weights, parametrize, replace_layers, replace_forward])
def test_generation_with_changed_layers(change: Callable[[llm_ext.LLM], None]) -> None:
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

    weights: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in other.named_parameters()}
    ids = torch.func.functional_call(Generation(), weights, (prompt,))
    assert torch.equal(ids, other.generate(prompt, 2 * V, temperature=0))
    assert not torch.equal(ids, m.generate(prompt, 2 * V, temperature=0))


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_scores(temperature: float) -> None:
    """NaN raises, whether it is there at the first token or appears later."""
    m = model()
    stream = m.stream(torch.zeros(1, 2, dtype=torch.int64), 5, temperature)
    next(stream)
    with torch.no_grad():
        m.head.bias[0] = math.nan
    with pytest.raises(RuntimeError, match=r"LLM\.stream: the scores of token 5 of 5 are not a number"):
        list(stream)
    with pytest.raises(RuntimeError, match=r"LLM\.stream: the scores of token 1 of 3 are not a number"):
        m.generate(torch.zeros(2, dtype=torch.int64), 3, temperature)


BAD_GENERATION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt_ids": torch.zeros(3)}, TypeError, "prompt_ids must be int64 or int32, got float32"),
    ({"prompt_ids": torch.zeros(0, dtype=torch.int64)}, ValueError, "prompt_ids must be .* got .0."),
    ({"prompt_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "prompt_ids must be .* got .2, 0."),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
    ({"temperature": -0.5}, ValueError, "temperature must be at least 0 and at most 1e.30, got -0.5"),
    ({"temperature": math.nan}, ValueError, "temperature must be at least 0 and at most 1e.30, got nan"),
    ({"temperature": 1e300}, ValueError, "temperature must be at least 0 and at most 1e.30, got 1e.300"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
]


BAD_GENERATION += [
    ({"state": (torch.zeros(2, 1, 17),)}, TypeError, "state must be an LLMState, got tuple"),
    (
        {"state": llm_ext.LLMState(torch.zeros(2, 3, 17).double(), None)},
        ValueError,
        r"state\.hidden must be \[L, N, H\] = \[2, 1, 17\], got \[2, 3, 17\]",
    ),
]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_bad_sampling(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^sample: {next(iter(options))} must be "):
        llm_ext.models.sample(torch.zeros(2, 3), **options)


@pytest.mark.parametrize("autocast", [False, True])
def test_generation_from_a_state(autocast: bool) -> None:
    """Under autocast the state is in 16 bits, the weights are not."""
    m = llm_ext.LLM(5, 4, 17, 5, 2, 0.0).eval()
    ids = torch.randint(5, (3, 6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, state = m(ids[:, :4])
        found = m.generate(ids[:, 4:], 5, temperature=0, state=state)
        assert torch.equal(found[:, 2:], m.generate(ids, 5, temperature=0)[:, 6:])


@pytest.mark.parametrize(("options", "error", "message"), BAD_GENERATION)
def test_bad_generation(options: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults: dict[str, Any] = {"prompt_ids": torch.zeros(3, dtype=torch.int64), "max_new_tokens": 2}
    for method in (model().generate, model().stream):
        with pytest.raises(
            error, match=rf"^LLM\.stream: {message}"
        ):  # at the call, before the first token is requested
            method(**(defaults | options))
