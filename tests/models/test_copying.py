"""Copying from the source: the mixture, and llm_ext.Seq2Seq with it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.comparison import assert_close
from support.pairwise import parametrize_pairwise
from support.seq2seq import CELLS, END, LENGTHS, VOCAB, E, H, expected_scores, model, search_model, sources
from torch import Tensor

import llm_ext
from llm_ext.models.copying import first_positions, pointer_generator

every_model = parametrize_pairwise(cell=CELLS, input_feeding=(False, True))


def mixture(scores: Tensor, gate: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Probabilities [N, V] by the formula, token by token."""
    p = torch.sigmoid(gate)
    rows = []
    for n in range(len(scores)):
        row = list((p[n] * torch.softmax(scores[n], 0)).unbind())
        for s, i in enumerate(ids[n].tolist()):
            row[i] = row[i] + (1 - p[n]) * weights[n, s]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_first_positions() -> None:
    ids = torch.randint(5, (3, 4, 9))
    expected = [[row.index(i) for i in row] for row in ids.flatten(0, 1).tolist()]
    assert first_positions(ids).flatten(0, 1).tolist() == expected
    assert first_positions(ids[..., :0]).shape == (3, 4, 0)


def test_the_mixture_and_its_gradients() -> None:
    """Repeated tokens, a masked position, and a weight of exactly 1."""
    N, S, V = 6, 8, 5
    scores, gate = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((N, V), (N,)))
    attended = torch.randn(N, S, dtype=torch.float64, requires_grad=True)
    masked = torch.arange(S) >= torch.tensor([8, 5, 1, 8, 3, 7])[:, None]
    weights = attended.masked_fill(masked, -math.inf).softmax(-1)
    ids = torch.randint(V, (N, S))
    found = pointer_generator(scores, gate, weights, ids, first_positions(ids)).softmax(-1)
    expected = mixture(scores, gate, weights, ids)
    assert_close("model", expected.sum(-1), torch.ones(N, dtype=torch.float64))
    assert_close("model", found, expected)
    direction = torch.randn_like(found)
    inputs = scores, gate, attended
    gradients = [torch.autograd.grad((each * direction).sum(), inputs, retain_graph=True) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close("model", ours, theirs, "gradient")


def test_the_mixture_of_16_bits_is_computed_in_float32() -> None:
    ids = torch.randint(5, (6, 8))
    scores, gate, weights = torch.randn(6, 5).bfloat16(), torch.randn(6).bfloat16(), torch.rand(6, 8).bfloat16()
    found = pointer_generator(scores, gate, weights, ids, first_positions(ids))
    expected = pointer_generator(scores.float(), gate.float(), weights.float(), ids, first_positions(ids))
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_and_no_source(dtype: torch.dtype) -> None:
    """A token that only copying can write, a gate that is shut, and weights of 0."""
    scores = torch.tensor([[0.0, 300.0, -300.0]] * 3, dtype=dtype, requires_grad=True)
    gate = torch.tensor([0.0, 200.0, 0.0], dtype=dtype, requires_grad=True)
    weights = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    ids = torch.tensor([[1, 2], [0, 2], [0, 0]])
    out = pointer_generator(scores, gate, weights, ids, first_positions(ids))
    assert out.dtype == dtype
    expected = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert_close("additive_attention", out.softmax(-1), expected.to(dtype))
    for gradient in torch.autograd.grad(torch.log_softmax(out, -1)[0].sum() + out[2].sum(), (scores, gate, weights)):
        assert gradient.isfinite().all()


@every_model
def test_scores_and_gradients_are_those_of_torch_nn(cell: str, input_feeding: bool) -> None:
    m = model(cell=cell, input_feeding=input_feeding, copy=True)
    source, target = sources(vocab=VOCAB), torch.randint(VOCAB, (4, 5))
    expected, _ = expected_scores(m, source, target, LENGTHS)
    found = m(source, target, LENGTHS).log_softmax(-1)
    assert_close("model", found, expected)
    parameters = [each for name, each in m.named_parameters() if name != "attention.bias"]  # no effect on a softmax
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close("model", gradient, expected_gradient, "gradient")
    keep = torch.rand(4, 5) > 0.4
    assert_close("model", m(source, target, LENGTHS, keep=keep).log_softmax(-1), expected[keep])
    # The loss of a target is that of the mixture, with label smoothing as well.
    loss = torch.nn.functional.cross_entropy(m(source, target, LENGTHS)[keep], target[keep], label_smoothing=0.1)
    smoothed = 0.9 * expected[keep].gather(1, target[keep][:, None]).mean() + 0.1 * expected[keep].mean()
    assert_close("model", loss, -smoothed)


@parametrize_pairwise(cell=CELLS, input_feeding=(False, True), with_lengths=(False, True), projected=(False, True))
def test_decoder_steps(cell: str, input_feeding: bool, with_lengths: bool, projected: bool) -> None:
    m, K = model(cell=cell, input_feeding=input_feeding, copy=True).eval(), 3
    source, target = sources(vocab=VOCAB), torch.randint(VOCAB, (4, K, 5))
    lengths = LENGTHS if with_lengths else torch.full((4,), source.shape[1])
    with torch.no_grad():
        encoder_output, state = m.encode(source, lengths, m.input_projections() if projected else None)
        state = state.repeat(K)
        for t in range(5):
            scores, state, weights = m.step(target[:, :, t], state, encoder_output, t % 2 == 0)
            assert (weights is None) == (t % 2 == 1)
            for k in range(K):
                expected, expected_weights = expected_scores(m, source, target[:, k], lengths)
                assert_close("model", scores[:, k].log_softmax(-1), expected[:, t])
                if weights is not None:
                    assert_close("model", weights[:, k], expected_weights[:, t])


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([9, 0, 6, 9])])
def test_padding_may_hold_any_number(lengths: Tensor) -> None:
    m, source, target = model(copy=True), sources(vocab=VOCAB), torch.randint(VOCAB, (4, 5))
    masked = torch.arange(9) >= lengths[:, None]
    assert torch.equal(*(m(source.masked_fill(masked, fill), target, lengths) for fill in (0, -100)))


@every_model
def test_searches(cell: str, input_feeding: bool) -> None:
    """Greedy search takes the best token; a beam that holds all targets has the score of teacher forcing for each."""
    m = search_model(2.0, cell=cell, input_feeding=input_feeding, copy=True)
    source = sources(vocab=VOCAB)
    found = torch.stack(list(m.stream(source, END, LENGTHS, 6)), 1)
    for row, length in enumerate(LENGTHS.tolist()):
        ids = [END]
        while len(ids) <= 6 and (len(ids) == 1 or ids[-1] != END):
            scores, _ = expected_scores(m, source[row : row + 1, :length], torch.tensor([ids]), LENGTHS[row : row + 1])
            ids.append(int(scores[0, -1].argmax()))
        assert found[row].tolist() == ids[1:] + [END] * (found.shape[1] - len(ids) + 1)
    (hypotheses,) = m.search(source[:1], END, beam=60, num_return_sequences=60, max_length=2, length_penalty=0.0)
    expected: dict[tuple[int, ...], float] = {}
    for written in [(), *itertools.product(range(END), repeat=1)]:
        target = torch.tensor([[END, *written, END]])
        scores, _ = expected_scores(m, source[:1], target[:, :-1], LENGTHS[:1])
        expected[written] = scores[0].gather(1, target[0, 1:, None]).sum().item()
    assert {tuple(h.ids.tolist()): h.score for h in hypotheses if len(h.ids) < 2} == pytest.approx(expected)


def test_a_model_learns_to_copy() -> None:
    """Sources of random tokens: with copying their order is learned in few steps."""
    torch.manual_seed(0)
    m = llm_ext.Seq2Seq(30, 30, 16, 32, share_embedding=True, copy=True)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
    source = torch.cat((torch.stack([torch.randperm(29)[:6] for _ in range(128)]), torch.full((128, 1), 29)), 1)
    begun = torch.cat((torch.full((128, 1), 29), source[:, :-1]), 1)
    for _ in range(120):
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.cross_entropy(m(source, begun).flatten(0, 1), source.flatten())
        loss.backward()
        optimizer.step()
    unseen = torch.stack([torch.randperm(29)[:6] for _ in range(64)])
    found = [row[0].ids for row in m.eval().search(torch.cat((unseen, torch.full((64, 1), 29)), 1), 29, beam=2)]
    assert sum(torch.equal(ids, row) for ids, row in zip(found, unseen, strict=True)) >= 56


def test_compiles_without_graph_breaks() -> None:
    m = model(copy=True)
    source, target = sources(vocab=VOCAB), torch.randint(VOCAB, (4, 5))
    assert_close("model", torch.compile(m, fullgraph=True, backend="aot_eager")(source, target), m(source, target))


@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_input(B: int, S: int, T: int) -> None:
    m = model(copy=True).eval()
    source, target = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    scores = m(source, target, torch.full((B,), S))
    assert (scores.shape, bool(scores.isfinite().all())) == ((B, T, VOCAB), True)
    assert len(m.search(source, END)) == B


def test_copying_needs_one_vocabulary() -> None:
    with pytest.raises(ValueError, match="Seq2Seq: copy needs one vocabulary, got sizes 3 and 4"):
        llm_ext.Seq2Seq(3, 4, E, H, copy=True)
    config: dict[str, Any] = llm_ext.Seq2Seq(3, 3, E, H).config()
    assert config.pop("copy") is False
    assert llm_ext.Seq2Seq(**config).gate is None  # checkpoints from before this option
