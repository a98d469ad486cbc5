"""Greedy and beam search of llm_ext.Seq2Seq."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.pairwise import parametrize_pairwise
from support.seq2seq import CELLS, END, LENGTHS, VOCAB, model, search_model, sources
from torch import Tensor

import llm_ext
from llm_ext.models.beam_search import BeamSearch

feeding = pytest.mark.parametrize("input_feeding", [False, True])
every_model = parametrize_pairwise(cell=CELLS, input_feeding=(False, True))
some_models = pytest.mark.parametrize(("cell", "input_feeding"), [("rnn", True), ("gru", False), ("lstm", True)])


def greedy(m: llm_ext.Seq2Seq, source: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
    """All ids of `stream`, [B, T]."""
    return torch.stack(list(m.stream(source, END, lengths, **options)), 1)


def log_probability(m: llm_ext.Seq2Seq, source: Tensor, ids: Tensor) -> float:
    """Log-probability of a target and its end, by teacher forcing."""
    target = torch.cat((torch.tensor([END]), ids, torch.tensor([END])))
    scores = torch.log_softmax(m(source[None], target[None, :-1])[0], -1)
    return scores.gather(1, target[1:, None]).sum().item()


@every_model
def test_greedy_search_takes_the_best_token(cell: str, input_feeding: bool) -> None:
    m = search_model(cell=cell, input_feeding=input_feeding)
    source = sources()
    found = greedy(m, source, LENGTHS, max_length=12)
    for row, length in enumerate(LENGTHS.tolist()):
        ids = [END]
        while len(ids) <= 12 and (len(ids) == 1 or ids[-1] != END):
            scores = m(source[row : row + 1, :length], torch.tensor([ids]))
            ids.append(int(scores[0, -1].argmax()))
        assert found[row].tolist() == ids[1:] + [END] * (found.shape[1] - len(ids) + 1)


@some_models
def test_a_beam_of_one_is_greedy(cell: str, input_feeding: bool) -> None:
    m = search_model(cell=cell, input_feeding=input_feeding)
    lengths = torch.randint(1, 9, (33,))
    source = sources(lengths)
    found = greedy(m, source, lengths)
    for ids, (hypothesis,) in zip(found, m.search(source, END, lengths, beam=1), strict=True):
        assert hypothesis.ids.tolist() == ids[: int((ids != END).sum())].tolist()


@pytest.mark.parametrize(("cell", "beam"), [("rnn", 5), ("gru", 1), ("lstm", 3)])
def test_a_source_alone_and_in_a_batch(cell: str, beam: int) -> None:
    m = search_model(cell=cell, input_feeding=cell == "lstm")
    lengths = torch.randint(1, 9, (17,))
    source = sources(lengths)
    together = m.search(source, END, lengths, beam=beam, num_return_sequences=beam)
    streamed = greedy(m, source, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = source[row : row + 1, :length]
        (hypotheses,) = m.search(alone, END, beam=beam, num_return_sequences=beam)
        assert [h.ids.tolist() for h in hypotheses] == [h.ids.tolist() for h in together[row]]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in together[row]])
        ids = greedy(m, alone)[0]
        assert streamed[row].tolist() == ids.tolist() + [END] * (streamed.shape[1] - len(ids))


def test_targets_that_end_leave_a_full_beam() -> None:
    """In 16 bits, sums of log-probabilities are those in float32."""
    searches = [BeamSearch(1, 2, 2, torch.tensor([9]), 0.0, 0, torch.device("cpu")) for _ in range(2)]
    scores = torch.tensor([0.3, 0.1, 0.6]).log().bfloat16().expand(1, 2, 3)
    for beams, given in zip(searches, (scores, scores.float()), strict=True):
        beams.advance(given)
        assert beams.ids.tolist() == [[0, 1]]
        torch.testing.assert_close(beams.log_probabilities.exp(), torch.tensor([[0.3, 0.1]]), atol=1e-3, rtol=0)
        beams.advance(given)
    assert torch.equal(searches[0].log_probabilities, searches[1].log_probabilities)


@feeding
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_that_holds_all_targets(length_penalty: float, input_feeding: bool) -> None:
    """Each of the 1 + 6 + 36 targets of at most 2 ids and an end has the score of teacher forcing."""
    m = search_model(2.0, input_feeding=input_feeding)
    source = sources()
    options: dict[str, Any] = {"beam": 300, "num_return_sequences": 300, "max_length": 3}
    (found,) = m.search(source[:1], END, length_penalty=length_penalty, **options)
    every = [ids for n in range(3) for ids in itertools.product(range(END), repeat=n)]
    expected = {
        ids: log_probability(m, source[0], torch.tensor(ids, dtype=torch.int64)) / (len(ids) + 1) ** length_penalty
        for ids in every
    }
    # Targets of 3 ids are cut off at the limit, without an end.
    scores = {tuple(h.ids.tolist()): h.score for h in found if len(h.ids) < 3}
    assert scores == pytest.approx(expected)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("n", [1, 2])
def test_no_n_gram_occurs_twice(n: int) -> None:
    """The beam holds all targets of at most 3 ids; those without a repeated n-gram are found, with the same scores."""
    m = search_model(2.0)
    source = sources()
    options: dict[str, Any] = {"beam": 300, "num_return_sequences": 300, "max_length": 3, "length_penalty": 0.0}
    (every,), (found,) = (m.search(source[:1], END, no_repeat_ngram_size=size, **options) for size in (0, n))

    def repeats(ids: list[int]) -> bool:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        return len(set(grams)) < len(grams)

    expected = {tuple(h.ids.tolist()): h.score for h in every if not repeats(h.ids.tolist())}
    assert len(every) == 1 + 6 + 36 + 216
    assert len(expected) < len(every)
    assert {tuple(h.ids.tolist()): h.score for h in found} == pytest.approx(expected)
    (long,) = m.search(source[:1], END, beam=1, max_length=40, no_repeat_ngram_size=n)
    assert not repeats(long[0].ids.tolist())


@some_models
def test_a_beam_scores_better_than_greedy(cell: str, input_feeding: bool) -> None:
    m = search_model(2.0, cell=cell, input_feeding=input_feeding)
    lengths = torch.randint(1, 9, (33,))
    source = sources(lengths)
    narrow = m.search(source, END, lengths, beam=1, length_penalty=0.0)
    wide = m.search(source, END, lengths, beam=4, num_return_sequences=4, length_penalty=0.0)
    for row, length in enumerate(lengths.tolist()):
        for hypothesis in wide[row]:
            if len(hypothesis.ids) < 2 * length + 10:
                expected = log_probability(m, source[row, :length], hypothesis.ids)
                assert hypothesis.score == pytest.approx(expected)
        assert len({tuple(h.ids.tolist()) for h in wide[row]}) == len(wide[row])
    # In total, but not for each source: the prefix of the best target may leave the beam.
    assert sum(row[0].score for row in wide) > sum(row[0].score for row in narrow)


@every_model
def test_searches_with_input_projections(cell: str, input_feeding: bool) -> None:
    m = search_model(cell=cell, input_feeding=input_feeding)
    either = (None, m.input_projections())
    for lengths in (LENGTHS, torch.tensor([3, 3]), torch.tensor([2, 0, 5])):
        source = sources(lengths)
        plain, projected = (greedy(m, source, lengths, input_projections=p) for p in either)
        assert torch.equal(plain, projected)
        found = [m.search(source, END, lengths, beam=3, num_return_sequences=3, input_projections=p) for p in either]
        for row, other in zip(*found, strict=True):
            assert [h.ids.tolist() for h in row] == [h.ids.tolist() for h in other]
            assert [h.score for h in row] == pytest.approx([h.score for h in other])


def test_length_limits() -> None:
    m = model().eval()
    with torch.no_grad():
        m.head.bias[END] = -100  # no target ends before its limit
    source = sources()
    for length in (0, 1, 5):
        assert len(list(m.stream(source, END, LENGTHS, length))) == length
        hypotheses = m.search(source, END, LENGTHS, beam=2, max_length=length)
        assert [len(h.ids) for row in hypotheses for h in row] == [length] * (4 if length else 0)
    lengths = [len(row[0].ids) for row in m.search(source, END, LENGTHS, beam=2)]
    assert lengths == [2 * n + 10 for n in LENGTHS.tolist()]
    assert (greedy(m, source, LENGTHS) != END).sum(1).tolist() == lengths


BAD_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"beam": 0}, "beam must be at least 1, got 0"),
    ({"beam": 2, "num_return_sequences": 3}, "num_return_sequences must be from 1 to beam = 2, got 3"),
    ({"length_penalty": -1.0}, "length_penalty must be at least 0 and at most 5, got -1.0"),
    ({"length_penalty": 1e300}, "length_penalty must be at least 0 and at most 5, got 1e.300"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, got -1"),
    ({"end": VOCAB}, "end must be an id from 0 to 6, got 7"),
    ({"max_length": -1}, "max_length must be at least 0 and below 2\\*\\*63, got -1"),
    ({"max_length": 10**30}, "max_length must be at least 0 and below 2\\*\\*63, got 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SEARCHES)
def test_bad_search(options: dict[str, Any], message: str) -> None:
    m = model().eval()
    with pytest.raises(ValueError, match=f"Seq2Seq: {message}"):
        m.search(sources(), **({"end": END} | options))
    if options.keys() <= {"end", "max_length"}:
        with pytest.raises(ValueError, match=f"Seq2Seq: {message}"):  # at the call, before the first token is requested
            m.stream(sources(), **({"end": END} | options))
