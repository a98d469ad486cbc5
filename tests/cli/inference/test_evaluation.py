"""The loss over a text: coverage of the tokens, processes, stopping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_ext import LLM
from llm_ext.cli.data import CharTokenizer, Corpus, FeatureReader, FrontEnd, Sample, encode_samples, encode_text
from llm_ext.cli.inference import Score, StatefulLLM, evaluate_labels, evaluate_text, evaluation
from llm_ext.cli.inference.evaluation import EvaluationStoppedError, Processes, shared_batches

CPU = torch.device("cpu")


@pytest.fixture(params=["rnn", "lstm"])
def case(text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[LLM, Corpus, CharTokenizer]:
    text.write_text(text.read_text() + "äöü€" * 20, encoding="utf-8")
    tokenizer = CharTokenizer.from_files([text])
    model = LLM(tokenizer.size, 6, 12, tokenizer.size, 2, 0.0, cell=request.param).eval()
    return model, encode_text([text], tokenizer, tmp_path), tokenizer


@pytest.mark.parametrize(("begin", "end"), [(17, 300), (5000, None), (0, 2), (0, 258)])
def test_one_stream_has_the_loss_of_the_whole_text(
    case: tuple[LLM, Corpus, CharTokenizer], monkeypatch: pytest.MonkeyPatch, begin: int, end: int | None
) -> None:
    model, corpus, tokenizer = case
    end = end or len(corpus)
    monkeypatch.setattr(evaluation, "STREAMS", 1)
    monkeypatch.setattr(evaluation, "CHUNK", 64)
    score = evaluate_text(StatefulLLM(model), corpus, begin, end, tokenizer, CPU)
    ids = corpus.rows(torch.tensor([begin]).numpy(), end - begin, begin, end)[0]
    with torch.no_grad():
        scores, _ = model(ids[None, :-1])
    assert score.tokens == end - begin - 1
    assert score.loss == pytest.approx(F.cross_entropy(scores[0], ids[1:]).item(), rel=1e-5)
    predicted = tokenizer.decode(ids[1:].tolist())
    assert (score.characters, score.bytes) == (len(predicted), len(predicted.encode()))


@pytest.mark.parametrize("streams", [2, 5, 7])
def test_streams_cover_the_text_once(
    case: tuple[LLM, Corpus, CharTokenizer], monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    model, corpus, tokenizer = case
    monkeypatch.setattr(evaluation, "STREAMS", streams)
    monkeypatch.setattr(evaluation, "CHUNK", 33)
    score = evaluate_text(StatefulLLM(model), corpus, 0, len(corpus), tokenizer, CPU)
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
def test_processes_add_up_to_the_result_of_one(case: tuple[LLM, Corpus, CharTokenizer], end: int) -> None:
    model, corpus, tokenizer = case
    whole = evaluate_text(StatefulLLM(model), corpus, 0, end, tokenizer, CPU)
    parts: list[torch.Tensor] = []

    def collect(values: torch.Tensor) -> torch.Tensor:
        parts.append(values)
        return torch.stack(parts).sum(0)

    for rank in range(3):
        score = evaluate_text(StatefulLLM(model), corpus, 0, end, tokenizer, CPU, Processes(rank, 3, collect))
    assert score.nats == pytest.approx(whole.nats, rel=1e-6)
    assert (score.tokens, score.characters, score.bytes) == (whole.tokens, whole.characters, whole.bytes)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("samples", [0, 1, 64, 65, 300])
def test_processes_share_the_batches(samples: int, count: int) -> None:
    found = [list(shared_batches(np.arange(samples), Processes(rank, count))) for rank in range(count)]
    every = [index for batches in found for batch in batches for index in batch.tolist()]
    assert sorted(every) == list(range(samples))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_an_evaluation_can_be_stopped(case: tuple[LLM, Corpus, CharTokenizer]) -> None:
    model, corpus, tokenizer = case
    with pytest.raises(EvaluationStoppedError):
        evaluate_text(StatefulLLM(model), corpus, 0, len(corpus), tokenizer, CPU, Processes(stop=lambda: True))


def test_the_values_of_a_score() -> None:
    score = Score(nats=math.log(8) * 10, tokens=10, characters=30, bytes=60)
    assert score.loss == pytest.approx(math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert [score.bits(per) for per in (10, 30, 60)] == pytest.approx([3, 1, 0.5])
    assert Score(1e9, 1, 1, 1).perplexity == math.inf
    assert math.isnan(score.bits(0))


def test_the_state_of_a_training_outlasts_a_validation(case: tuple[LLM, Corpus, CharTokenizer]) -> None:
    model, corpus, tokenizer = case
    stateful = StatefulLLM(model)
    stateful(torch.zeros(2, 5, dtype=torch.int64))
    state = stateful.state
    with stateful.fresh_state():
        evaluate_text(stateful, corpus, 0, 50, tokenizer, CPU)
    assert stateful.state is state


def test_a_row_of_the_table_of_labels_is_the_true_class(tmp_path: Path) -> None:
    taken = [1, 0, 1, 0, 0]
    arrays = [np.eye(3, dtype=np.float32)[[label] * (1 + n)] for n, label in enumerate(taken)]
    reader = FeatureReader(FrontEnd("array"), torch.zeros(3), torch.ones(3))
    encoded = encode_samples([Sample("x", rows, None) for rows in arrays], reader, tmp_path)
    classes = np.array([0, 0, 1, 2])
    model: Any = lambda x, lengths: 50 * x[:, 0]  # noqa: E731
    score, table = evaluate_labels(model, encoded, reader, np.arange(1, 5), classes, 3, CPU)
    assert table.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert score.correct == 1
    assert score.loss == pytest.approx(3 / 4 * 50)
