"""llm_ext.Seq2Seq: the parts put together, one step as good as the whole, and both searches."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import llm_ext

V_SOURCE, V, E, H, A = 11, 7, 6, 17, 5
END = V - 1
CELLS = ("rnn", "gru", "lstm")
LENGTHS = torch.tensor([9, 1, 6, 9])
every_cell = pytest.mark.parametrize("cell", CELLS)
feeding = pytest.mark.parametrize("input_feeding", [False, True])


def model(**options: Any) -> llm_ext.Seq2Seq:
    options = {"n_layers": 2, "attn_dim": A, "dtype": torch.float64} | options
    made = llm_ext.Seq2Seq(V_SOURCE, V, E, H, **options)
    for parameter in made.parameters():  # biases too
        nn.init.normal_(parameter, std=0.4)
    return made


def sources(lengths: Tensor = LENGTHS) -> Tensor:
    return torch.randint(V_SOURCE, (len(lengths), int(lengths.max())))


def by_hand(m: llm_ext.Seq2Seq, source: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same model from torch.nn alone: packed encoder, a decoder that goes step by step, attention as its formula.

    Returns the scores [B, T, V] and the weights [B, T, S].
    """
    config = m.config()
    L = config["n_layers"]
    kind = getattr(nn, config["cell"].upper())
    options = {"num_layers": L, "dtype": torch.float64}
    if config["cell"] == "rnn":
        options["nonlinearity"] = config["nonlinearity"]
    encoder = kind(E, H, bidirectional=True, **options)
    decoder = kind(m.decoder.input_size, H, **options)

    def run(theirs: nn.Module, ours: nn.Module, *arguments: Any) -> Any:
        return torch.func.functional_call(theirs, dict(ours.named_parameters()), arguments)

    def embed(layer: Any, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, layer.num_embeddings).double() @ layer.weight + layer.bias

    packed = pack_padded_sequence(embed(m.source_embedding, source.t()), lengths, enforce_sorted=False)
    read, last = run(encoder, m.encoder, packed)
    keys = pad_packed_sequence(read, total_length=source.shape[1])[0].transpose(0, 1)

    def both(h: Tensor) -> Tensor:
        return torch.stack([torch.cat((h[2 * layer], h[2 * layer + 1]), -1) for layer in range(L)])

    state: Any
    if config["cell"] == "lstm":
        state = torch.tanh(m.bridge(both(last[0]))), m.cell_bridge(both(last[1]))
    else:
        state = torch.tanh(m.bridge(both(last)))
    beyond = torch.arange(source.shape[1]) >= lengths[:, None]
    a = m.attention
    fed, scores, weights = torch.zeros(len(source), E, dtype=torch.float64), [], []
    for ids in target.unbind(1):
        x = embed(m.target_embedding, ids)
        if config["input_feeding"]:
            x = torch.cat((x, fed), -1)
        h, state = run(decoder, m.decoder, x[None], state)
        inner = torch.tanh((h[0] @ a.q_proj_weight.T)[:, None] + keys @ a.k_proj_weight.T + a.bias)
        alpha = torch.softmax((inner @ a.v).masked_fill(beyond, -math.inf), -1)
        fed = torch.tanh(m.readout(h[0]) + (alpha[:, :, None] * keys).sum(1) @ m.value.weight.T)
        scores.append(fed @ m.head.weight.T + m.head.bias)
        weights.append(alpha)
    return torch.stack(scores, 1), torch.stack(weights, 1)


@feeding
@every_cell
def test_is_its_parts(cell: str, input_feeding: bool) -> None:
    m = model(cell=cell, input_feeding=input_feeding, nonlinearity="relu" if cell == "rnn" else "tanh")
    source, target = sources(), torch.randint(V, (4, 5))
    expected, _ = by_hand(m, source, target, LENGTHS)
    scores = m(source, target, LENGTHS)
    cases.assert_close("model", scores, expected)
    parameters = list(m.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for got, want in zip(torch.autograd.grad(scores.square().sum(), parameters), wanted, strict=True):
        cases.assert_close("model", got, want, "gradient")


@pytest.mark.parametrize("how", ["recorded", "inference", "tables"])
@pytest.mark.parametrize("lengths", [LENGTHS, None])
@feeding
@every_cell
def test_steps_are_the_whole(cell: str, input_feeding: bool, lengths: Tensor | None, how: str) -> None:
    """With K targets of each source beside each other, too, and with the weights of the attention."""
    m, K = model(cell=cell, input_feeding=input_feeding).eval(), 3
    source, target = sources(), torch.randint(V, (4, K, 5))
    full = torch.full((4,), source.shape[1])
    tables = m.tables() if how == "tables" else None
    if tables is not None:
        assert [table.shape for table in tables.source or ()] == [(V_SOURCE, m.encoder.weight_hh_l0.shape[0])] * 2
        assert (tables.target is None) == input_feeding
    with torch.set_grad_enabled(how == "recorded"):
        memory, state = m.encode(source, lengths, tables)
        state = state.repeat(K)
        for t in range(5):
            scores, state, weights = m.step(target[:, :, t], state, memory, t % 2 == 0, tables)
            assert scores.requires_grad == (how == "recorded")
            for k in range(K):
                expected, expected_weights = by_hand(m, source, target[:, k], full if lengths is None else lengths)
                cases.assert_close("model", scores[:, k], expected[:, t])
                assert (weights is None) == (t % 2 == 1)
                if weights is not None:
                    cases.assert_close("model", weights[:, k], expected_weights[:, t])


@feeding
def test_only_the_positions_that_are_kept(input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target, lengths = sources(), torch.randint(V, (4, 5)), torch.tensor([5, 2, 0, 4])
    keep = torch.arange(5) < lengths[:, None]
    scores = m(source, target, LENGTHS, lengths, keep)
    assert scores.shape == (11, V)
    cases.assert_close("model", scores, m(source, target, LENGTHS)[keep])


@every_cell
def test_padding_changes_nothing(cell: str) -> None:
    """Neither what stands in it nor how much there is, to the last bit of what is kept."""
    m = model(cell=cell)
    source, target = sources(), torch.randint(V, (4, 5))
    scores = m(source, target, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        source[row, length:] = (source[row, length:] + 1) % V_SOURCE
    assert torch.equal(m(source, target, LENGTHS), scores)
    wider = torch.cat((source, sources()[:, :3]), 1)
    cases.assert_close("model", m(wider, target, LENGTHS), scores)
    for row, length in enumerate(LENGTHS.tolist()):
        cases.assert_close("model", m(source[row : row + 1, :length], target[row : row + 1])[0], scores[row])


@feeding
@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
def test_nothing(B: int, S: int, T: int, input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    scores = m(source, target, torch.full((B,), S))
    assert scores.shape == (B, T, V)
    assert scores.isfinite().all()
    assert len(m.search(source, END)) == B
    assert all(len(ids) == B for ids in m.stream(source, END))


def test_sharing_and_tying() -> None:
    shared = llm_ext.Seq2Seq(V, V, E, H, share_embedding=True, tie_head=True)
    assert shared.source_embedding is shared.target_embedding
    assert shared.head.weight is shared.target_embedding.weight
    two = llm_ext.Seq2Seq(V, V, E, H)
    sizes = [sum(parameter.numel() for parameter in m.parameters()) for m in (shared, two)]
    assert sizes[1] - sizes[0] == 2 * V * E + E
    with pytest.raises(ValueError, match="share_embedding needs one vocabulary, got sizes 3 and 4"):
        llm_ext.Seq2Seq(3, 4, E, H, share_embedding=True)


@feeding
@every_cell
def test_learns_to_reverse(cell: str, input_feeding: bool) -> None:
    """The usual loop, in float32, on something that only attention does well."""
    torch.manual_seed(0)
    m = llm_ext.Seq2Seq(V, V, 16, 32, cell=cell, input_feeding=input_feeding, share_embedding=True, dropout=0.05)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
    lengths = torch.randint(1, 7, (64,))
    source = torch.randint(END, (64, 6))
    target = torch.full((64, 7), END)
    for row, n in enumerate(lengths.tolist()):
        target[row, :n] = source[row, :n].flip(0)
    begun = torch.cat((torch.full((64, 1), END), target[:, :-1]), 1)
    keep = torch.arange(7) <= lengths[:, None]
    for _ in range(250):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(m(source, begun, lengths, lengths + 1, keep), target[keep])
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    m.eval()
    found = torch.stack(list(m.stream(source, END, lengths)), 1)
    right = torch.stack([(found[row, : n + 1] == target[row, : n + 1]).all() for row, n in enumerate(lengths.tolist())])
    assert right.sum() >= 60


def test_dropout_is_off_in_evaluation_and_the_same_along_a_row() -> None:
    m = model(dropout=0.5, n_layers=1).train()
    source, target = sources(), torch.randint(V, (4, 5))
    assert not torch.equal(m(source, target, LENGTHS), m(source, target, LENGTHS))
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for layer in (m.encoder, m.value, m.decoder, m.readout)
    ]
    full = torch.full((4,), source.shape[1])
    for lengths in (full, None):
        seen.clear()
        m(source, target, lengths)
        # All that is dropped, of the encoder's and the decoder's input with time first.
        for features, time in zip(seen, (0, 0, 0, 1), strict=True):
            dropped = features == 0
            first = dropped.narrow(time, 0, 1)
            assert 0.2 < dropped.double().mean() < 0.8
            assert torch.equal(dropped, first.expand_as(dropped))
    seen.clear()
    m(source, target, LENGTHS)
    packed = seen[0]
    assert isinstance(packed, PackedSequence)
    for features in (packed.data, seen[1]):  # the longest rows first
        steps = (features == 0).split(packed.batch_sizes.tolist())
        assert 0.2 < (features == 0).double().mean() < 0.8
        assert all(torch.equal(step, steps[0][: len(step)]) for step in steps)
    for hook in hooks:
        hook.remove()
    m.eval()
    assert torch.equal(m(source, target, LENGTHS), m(source, target, LENGTHS))


# ---- search


def ended(m: llm_ext.Seq2Seq, scale: float = 3.0) -> llm_ext.Seq2Seq:
    """Sharpen the predictions, so that targets are of all lengths."""
    with torch.no_grad():
        m.head.weight.mul_(scale)
    return m.eval()


def log_probability(m: llm_ext.Seq2Seq, source: Tensor, ids: Tensor) -> float:
    """Of a target with its end, by teacher forcing."""
    whole = torch.cat((ids, torch.tensor([END])))
    begun = torch.cat((torch.tensor([END]), ids))
    scores = torch.log_softmax(m(source[None], begun[None])[0], -1)
    return scores.gather(1, whole[:, None]).sum().item()


@feeding
@every_cell
def test_greedy_is_the_best_token_each_time(cell: str, input_feeding: bool) -> None:
    m = ended(model(cell=cell, input_feeding=input_feeding))
    source = sources()
    found = torch.stack(list(m.stream(source, END, LENGTHS, 12)), 1)
    for row, length in enumerate(LENGTHS.tolist()):
        ids = [END]
        while len(ids) <= 12 and (len(ids) == 1 or ids[-1] != END):
            scores = m(source[row : row + 1, :length], torch.tensor([ids]))
            ids.append(int(scores[0, -1].argmax()))
        expected = ids[1:] + [END] * (found.shape[1] - len(ids) + 1)
        assert found[row].tolist() == expected


@feeding
@every_cell
def test_a_beam_of_one_is_greedy(cell: str, input_feeding: bool) -> None:
    m = ended(model(cell=cell, input_feeding=input_feeding))
    lengths = torch.randint(1, 9, (33,))
    source = sources(lengths)
    found = torch.stack(list(m.stream(source, END, lengths)), 1)
    for ids, (hypothesis,) in zip(found, m.search(source, END, lengths, beam=1), strict=True):
        assert hypothesis.ids.tolist() == ids[: int((ids != END).sum())].tolist()


@pytest.mark.parametrize("beam", [1, 3, 5])
@every_cell
def test_the_same_alone_and_in_a_batch(cell: str, beam: int) -> None:
    m = ended(model(cell=cell, input_feeding=cell == "lstm"))
    lengths = torch.randint(1, 9, (17,))
    source = sources(lengths)
    together = m.search(source, END, lengths, beam=beam, num_return_sequences=beam)
    streamed = torch.stack(list(m.stream(source, END, lengths)), 1)
    for row, length in enumerate(lengths.tolist()):
        alone = source[row : row + 1, :length]
        (hypotheses,) = m.search(alone, END, beam=beam, num_return_sequences=beam)
        assert [h.ids.tolist() for h in hypotheses] == [h.ids.tolist() for h in together[row]]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in together[row]])
        ids = torch.stack(list(m.stream(alone, END)), 1)[0]
        assert streamed[row].tolist() == ids.tolist() + [END] * (streamed.shape[1] - len(ids))


@feeding
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_that_holds_everything_finds_the_best(length_penalty: float, input_feeding: bool) -> None:
    """Of all targets of at most 2 tokens and their end, scored one by one."""
    m = ended(model(input_feeding=input_feeding), 2.0)
    source = sources()
    # 1 + 6 + 36 targets; at the limit those without an end are there as well, and are worth no more for that.
    (found,) = m.search(
        source[:1], END, beam=300, num_return_sequences=300, length_penalty=length_penalty, max_length=3
    )
    every = [ids for n in range(3) for ids in itertools.product(range(END), repeat=n)]
    expected = {
        ids: log_probability(m, source[0], torch.tensor(ids, dtype=torch.int64)) / (len(ids) + 1) ** length_penalty
        for ids in every
    }
    got = {tuple(h.ids.tolist()): h.score for h in found if len(h.ids) < 3}
    assert got == pytest.approx(expected)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@feeding
@every_cell
def test_a_beam_does_better_than_greedy_and_scores_what_it_says(cell: str, input_feeding: bool) -> None:
    m = ended(model(cell=cell, input_feeding=input_feeding), 2.0)
    lengths = torch.randint(1, 9, (33,))
    source = sources(lengths)
    greedy = m.search(source, END, lengths, beam=1, length_penalty=0.0)
    beams = m.search(source, END, lengths, beam=4, num_return_sequences=4, length_penalty=0.0)
    for row, length in enumerate(lengths.tolist()):
        for hypothesis in beams[row]:
            if len(hypothesis.ids) < 2 * length + 10:
                expected = log_probability(m, source[row, :length], hypothesis.ids)
                assert hypothesis.score == pytest.approx(expected)
        assert len({tuple(h.ids.tolist()) for h in beams[row]}) == len(beams[row])
    # Not for each source: what leads to the best end may begin poorly, and leave the beam.
    assert sum(row[0].score for row in beams) > sum(row[0].score for row in greedy)


@feeding
@every_cell
def test_tables_find_the_same(cell: str, input_feeding: bool) -> None:
    m = ended(model(cell=cell, input_feeding=input_feeding))
    tables = m.tables()
    for lengths in (LENGTHS, torch.tensor([3, 3]), torch.tensor([2, 0, 5])):
        source = sources(lengths)
        plain, by_table = (torch.stack(list(m.stream(source, END, lengths, tables=t)), 1) for t in (None, tables))
        assert torch.equal(plain, by_table)
        found = [m.search(source, END, lengths, beam=3, num_return_sequences=3, tables=t) for t in (None, tables)]
        for row, other in zip(*found, strict=True):
            assert [h.ids.tolist() for h in row] == [h.ids.tolist() for h in other]
            assert [h.score for h in row] == pytest.approx([h.score for h in other])


def test_tables_are_for_inference() -> None:
    m = model(dropout=0.5)
    tables = m.tables()
    for train, record in ((True, False), (False, True), (True, True)):
        m.train(train)
        with torch.set_grad_enabled(record), pytest.raises(RuntimeError, match="tables are for inference: call eval"):
            m.encode(sources(), LENGTHS, tables)
    with pytest.raises(IndexError, match=r"ids must be from 0 to V - 1 = 10, got .* to 15"):
        next(m.eval().stream(sources() * 0 + 15, END, tables=tables))
    # Where they would not help there are none, and nothing changes.
    half = model(dtype=torch.bfloat16).eval()
    assert half.tables() == (None, None)
    assert len(list(half.stream(sources(), END, LENGTHS, 3, half.tables()))) <= 3
    with torch.autocast("cpu", torch.bfloat16):
        assert m.tables() == (None, None)


def test_layers_that_are_hooked_or_replaced_are_called() -> None:
    """One call of an op takes their place only where nobody would notice."""
    m = ended(model())
    source = sources()
    expected = torch.stack(list(m.stream(source, END, LENGTHS)), 1)
    for layer in (m.decoder, m.attention, m.readout, m.head):
        seen: list[object] = []
        for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
            seen.clear()
            hook = register(lambda *_, seen=seen: seen.append(1))
            assert torch.equal(torch.stack(list(m.stream(source, END, LENGTHS)), 1), expected)
            assert len(seen) == expected.shape[1]
            hook.remove()
    handle = m.encoder.register_forward_hook(lambda *_: None)
    assert m.tables().source is None
    handle.remove()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    m.head = Doubled(m.head)  # type: ignore[assignment]
    assert torch.equal(torch.stack(list(m.stream(source, END, LENGTHS)), 1), expected)
    m.readout = Doubled(m.readout)  # type: ignore[assignment]
    with torch.no_grad():
        memory, state = m.encode(source, LENGTHS)
        begin = torch.full((4, 1), END)
        scores = m.step(begin, state, memory)[0]
    cases.assert_close("model", scores, m(source, begin, LENGTHS))


def test_limits() -> None:
    m = model().eval()
    with torch.no_grad():
        m.head.bias[END] = -100  # never ends
    source = sources()
    for length in (0, 1, 5):
        assert len(list(m.stream(source, END, LENGTHS, length))) == length
        hypotheses = m.search(source, END, LENGTHS, beam=2, max_length=length)
        assert [len(h.ids) for row in hypotheses for h in row] == [length] * (4 if length else 0)
    lengths = [len(row[0].ids) for row in m.search(source, END, LENGTHS, beam=2)]
    assert lengths == [2 * n + 10 for n in LENGTHS.tolist()]
    streamed = torch.stack(list(m.stream(source, END, LENGTHS)), 1)
    assert (streamed != END).sum(1).tolist() == lengths


def test_reordering_is_in_place() -> None:
    m = model(cell="lstm", input_feeding=True)
    with torch.no_grad():
        _, state = m.encode(sources(), LENGTHS)
        before = [part.clone() for part in state]
        places = [part.data_ptr() for part in state]
        state.reorder_(torch.tensor([3, 0, 0, 2]))
    assert [part.data_ptr() for part in state] == places
    for part, old, dim in zip(state, before, (1, 1, 0), strict=True):
        assert torch.equal(part, old.index_select(dim, torch.tensor([3, 0, 0, 2])))


def test_wrong_arguments() -> None:
    m = model().eval()
    source, target = sources(), torch.randint(V, (4, 5))
    for call, error, message in (
        (lambda: m(source[0], target), ValueError, r"source must be \[B, S\], got \[9\]"),
        (lambda: m(source, target[:3]), ValueError, "target must have the 4 rows of source, got 3"),
        (lambda: m(source.double(), target), TypeError, "source must be int64, got float64"),
        (lambda: m(source + 5, target), IndexError, "ids must be from 0 to 10"),
        (lambda: m.search(source, END, beam=0), ValueError, "beam must be at least 1, got 0"),
        (lambda: m.search(source, END, beam=2, num_return_sequences=3), ValueError, "from 1 to beam = 2, got 3"),
        (lambda: m.search(source, END, length_penalty=-1.0), ValueError, "length_penalty must be at least 0"),
        (lambda: m.search(source, V), ValueError, "end must be an id from 0 to 6, got 7"),
        (lambda: m.stream(source, END, max_length=-1), ValueError, "max_length must be at least 0, got -1"),
    ):
        with pytest.raises(error, match=message):
            call()
    for options, message in (
        ({"cell": "elman"}, "cell must be one of rnn, gru, lstm"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"attn_dim": 0}, "attn_dim must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            llm_ext.Seq2Seq(3, 3, E, H, **options)


def test_scores_that_are_no_numbers() -> None:
    m = model().eval()
    broken = (m.readout.weight, m.head.weight, m.decoder.weight_hh_l0, m.encoder.weight_ih_l1, m.head.bias)
    for parameter in broken:
        good = parameter.detach().clone()
        with torch.no_grad():
            parameter[3] = math.nan
        for tables in (None, m.tables()):
            with pytest.raises(RuntimeError, match="not a number"):
                next(m.stream(sources(), END, tables=tables))
            with pytest.raises(RuntimeError, match="not a number"):
                m.search(sources(), END, tables=tables)
        with torch.no_grad():
            parameter.copy_(good)
    next(m.stream(sources(), END))


def test_configuration_and_weights_come_back() -> None:
    m = model(cell="lstm", input_feeding=True, tie_head=True)
    again = llm_ext.Seq2Seq(**json.loads(json.dumps(m.config()))).double()
    again.load_state_dict(m.state_dict())
    source, target = sources(), torch.randint(V, (4, 5))
    assert torch.equal(again(source, target, LENGTHS), m(source, target, LENGTHS))
    assert again.config() == m.config()


@feeding
def test_compiles_whole(input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target = sources(), torch.randint(V, (4, 5))
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    cases.assert_close("model", compiled(source, target), m(source, target))
