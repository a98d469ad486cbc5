from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm_ext import LLM
from llm_ext.text import evaluate as evaluation
from llm_ext.text.carry import Carrier
from llm_ext.text.corpus import Corpus, encode
from llm_ext.text.evaluate import EvaluationStoppedError, Score, evaluate
from llm_ext.text.tokens import CharTokens

CPU = torch.device("cpu")


@pytest.fixture(params=["rnn", "lstm"])
def case(text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[LLM, Corpus, CharTokens]:
    text.write_text(text.read_text() + "äöü€" * 20, encoding="utf-8")
    tokens = CharTokens.train([text])
    model = LLM(tokens.size, 6, 12, tokens.size, 2, 0.0, cell=request.param).eval()
    return model, encode([text], tokens, tmp_path), tokens


@pytest.mark.parametrize(("begin", "end"), [(0, 300), (17, 300), (5000, None), (0, 2), (0, 258)])
def test_one_stream_is_the_text_as_a_whole(
    case: tuple[LLM, Corpus, CharTokens], monkeypatch: pytest.MonkeyPatch, begin: int, end: int | None
) -> None:
    model, corpus, tokens = case
    end = end or len(corpus)
    monkeypatch.setattr(evaluation, "STREAMS", 1)
    monkeypatch.setattr(evaluation, "CHUNK", 64)
    score = evaluate(Carrier(model), corpus, begin, end, tokens, CPU)
    ids = corpus.rows(torch.tensor([begin]).numpy(), end - begin, begin, end)[0]
    with torch.no_grad():
        scores, _ = model(ids[None, :-1])
    assert score.tokens == end - begin - 1
    assert score.loss == pytest.approx(F.cross_entropy(scores[0], ids[1:]).item(), rel=1e-5)
    predicted = tokens.decode(ids[1:].tolist())
    assert (score.characters, score.bytes) == (len(predicted), len(predicted.encode()))


@pytest.mark.parametrize("streams", [2, 5, 7])
def test_streams_cover_the_text_once(
    case: tuple[LLM, Corpus, CharTokens], monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    model, corpus, tokens = case
    monkeypatch.setattr(evaluation, "STREAMS", streams)
    monkeypatch.setattr(evaluation, "CHUNK", 33)
    score = evaluate(Carrier(model), corpus, 0, len(corpus), tokens, CPU)
    assert score.tokens == len(corpus) - 1
    length = -(-score.tokens // streams)
    nats = 0.0
    for start in range(0, score.tokens, length):
        count = min(length, score.tokens - start)
        ids = corpus.rows(torch.tensor([start]).numpy(), count + 1, 0, len(corpus))[0]
        with torch.no_grad():
            scores, _ = model(ids[None, :-1])
        nats += F.cross_entropy(scores[0], ids[1:], reduction="sum").item()
    assert score.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("end", [40, 3000])
def test_processes_add_up_to_one(case: tuple[LLM, Corpus, CharTokens], end: int) -> None:
    model, corpus, tokens = case
    whole = evaluate(Carrier(model), corpus, 0, end, tokens, CPU)
    parts: list[torch.Tensor] = []

    def collect(values: torch.Tensor) -> torch.Tensor:
        parts.append(values)
        return torch.stack(parts).sum(0)

    for rank in range(3):
        score = evaluate(Carrier(model), corpus, 0, end, tokens, CPU, rank=rank, world=3, total=collect)
    assert score.nats == pytest.approx(whole.nats, rel=1e-6)
    assert (score.tokens, score.characters, score.bytes) == (whole.tokens, whole.characters, whole.bytes)


def test_it_can_be_stopped(case: tuple[LLM, Corpus, CharTokens]) -> None:
    model, corpus, tokens = case
    with pytest.raises(EvaluationStoppedError):
        evaluate(Carrier(model), corpus, 0, len(corpus), tokens, CPU, stop=lambda: True)


def test_the_figures_of_a_score() -> None:
    score = Score(nats=math.log(8) * 10, tokens=10, characters=30, bytes=60)
    assert score.loss == pytest.approx(math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert [score.bits(per) for per in (10, 30, 60)] == pytest.approx([3, 1, 0.5])
    assert Score(1e9, 1, 1, 1).perplexity == math.inf
    assert math.isnan(score.bits(0))
