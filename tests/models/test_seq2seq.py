"""llm_ext.Seq2Seq: its layers together, decoder steps, padding, dropout, input projections and configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import assert_close, assert_same_bits
from support.pairwise import parametrize_pairwise
from support.seq2seq import (
    CELLS,
    END,
    LENGTHS,
    SOURCE_VOCAB,
    VOCAB,
    E,
    H,
    expected_scores,
    model,
    search_model,
    sources,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import llm_ext

feeding = pytest.mark.parametrize("input_feeding", [False, True])
every_model = parametrize_pairwise(cell=CELLS, input_feeding=(False, True))


@every_model
def test_scores_and_gradients_are_those_of_torch_nn(cell: str, input_feeding: bool) -> None:
    m = model(cell=cell, input_feeding=input_feeding, nonlinearity="relu" if cell == "rnn" else "tanh")
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    expected, _ = expected_scores(m, source, target, LENGTHS)
    scores = m(source, target, LENGTHS)
    assert_close("model", scores, expected)
    parameters = list(m.parameters())
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    gradients = torch.autograd.grad(scores.square().sum(), parameters)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close("model", gradient, expected_gradient, "gradient")


@parametrize_pairwise(
    cell=CELLS,
    input_feeding=(False, True),
    with_lengths=(False, True),
    how=("with gradients", "inference", "input projections"),
)
def test_decoder_steps(cell: str, input_feeding: bool, with_lengths: bool, how: str) -> None:
    """K targets of each source, step by step, with and without the attention weights."""
    m, K = model(cell=cell, input_feeding=input_feeding).eval(), 3
    source, target = sources(), torch.randint(VOCAB, (4, K, 5))
    lengths = LENGTHS if with_lengths else None
    projections = m.input_projections() if how == "input projections" else None
    if projections is not None:
        assert [tensor.shape for tensor in projections.source or ()] == [
            (SOURCE_VOCAB, len(m.encoder.all_weights[0][1]))
        ] * 2
        assert (projections.target is None) == input_feeding
    with torch.set_grad_enabled(how == "with gradients"):
        encoder_output, state = m.encode(source, lengths, projections)
        state = state.repeat(K)
        for t in range(5):
            scores, state, weights = m.step(target[:, :, t], state, encoder_output, t % 2 == 0, projections)
            assert scores.requires_grad == (how == "with gradients")
            assert (weights is None) == (t % 2 == 1)
            for k in range(K):
                full = torch.full((4,), source.shape[1])
                expected, expected_weights = expected_scores(m, source, target[:, k], LENGTHS if with_lengths else full)
                assert_close("model", scores[:, k], expected[:, t])
                if weights is not None:
                    assert_close("model", weights[:, k], expected_weights[:, t])


@feeding
def test_scores_of_selected_positions(input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target, lengths = sources(), torch.randint(VOCAB, (4, 5)), torch.tensor([5, 2, 0, 4])
    keep = torch.arange(5) < lengths[:, None]
    scores = m(source, target, LENGTHS, lengths, keep)
    assert scores.shape == (11, VOCAB)
    assert_close("model", scores, m(source, target, LENGTHS)[keep])


@pytest.mark.parametrize("cell", CELLS)
def test_padding_has_no_effect(cell: str) -> None:
    """The ids in it change no bit of a score, and its width does not matter."""
    m = model(cell=cell)
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    scores = m(source, target, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        source[row, length:] = (source[row, length:] + 1) % SOURCE_VOCAB
    assert torch.equal(m(source, target, LENGTHS), scores)
    wider = torch.cat((source, sources()[:, :3]), 1)
    assert_close("model", m(wider, target, LENGTHS), scores)
    for row, length in enumerate(LENGTHS.tolist()):
        assert_close("model", m(source[row : row + 1, :length], target[row : row + 1])[0], scores[row])


@feeding
@pytest.mark.parametrize(("B", "S", "T"), [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
def test_empty_input(B: int, S: int, T: int, input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    scores = m(source, target, torch.full((B,), S))
    assert scores.shape == (B, T, VOCAB)
    assert scores.isfinite().all()
    assert len(m.search(source, END)) == B
    assert all(len(ids) == B for ids in m.stream(source, END))


@pytest.mark.parametrize(("cell", "input_feeding"), [("gru", False), ("lstm", True)])
def test_learns_to_reverse(cell: str, input_feeding: bool) -> None:
    """A training loop in float32, on a task that needs attention."""
    torch.manual_seed(0)
    m = llm_ext.Seq2Seq(
        VOCAB, VOCAB, 16, 32, cell=cell, input_feeding=input_feeding, share_embedding=True, dropout=0.05
    )
    optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
    lengths = torch.randint(1, 7, (64,))
    source = torch.randint(END, (64, 6))
    target = torch.full((64, 7), END)
    for row, n in enumerate(lengths.tolist()):
        target[row, :n] = source[row, :n].flip(0)
    inputs = torch.cat((torch.full((64, 1), END), target[:, :-1]), 1)
    keep = torch.arange(7) <= lengths[:, None]
    for _ in range(250):
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(m(source, inputs, lengths, lengths + 1, keep), target[keep])
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    m.eval()
    found = torch.stack(list(m.stream(source, END, lengths)), 1)
    right = [torch.equal(found[row, : n + 1], target[row, : n + 1]) for row, n in enumerate(lengths.tolist())]
    assert sum(right) >= 60


def test_dropout_masks() -> None:
    """Dropout is off in evaluation mode; in training mode a row drops the same features at all positions."""
    m = model(dropout=0.5, n_layers=1).train()
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    assert not torch.equal(m(source, target, LENGTHS), m(source, target, LENGTHS))
    inputs: list[Any] = []
    layers: list[Any] = [m.encoder, m.value, m.decoder, m.readout]
    hooks = [layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for layer in layers]
    full = torch.full((4,), source.shape[1])
    for lengths in (full, None):
        inputs.clear()
        m(source, target, lengths)
        # The input of the encoder and of the decoder has time first.
        for features, time in zip(inputs, (0, 1, 0, 1), strict=True):
            dropped = features == 0
            first = dropped.narrow(time, 0, 1)
            assert 0.2 < dropped.double().mean() < 0.8
            assert torch.equal(dropped, first.expand_as(dropped))
    inputs.clear()
    m(source, target, LENGTHS)
    packed = inputs[0]
    assert isinstance(packed, PackedSequence)
    for features in (packed.data, inputs[1]):  # the longest rows first
        steps = torch.split(features == 0, packed.batch_sizes.tolist())
        assert 0.2 < (features == 0).double().mean() < 0.8
        assert all(torch.equal(step, steps[0][: len(step)]) for step in steps)
    for hook in hooks:
        hook.remove()
    m.eval()
    assert torch.equal(m(source, target, LENGTHS), m(source, target, LENGTHS))
    # With input feeding each step is a call of its own.
    m = model(dropout=0.5, n_layers=1, input_feeding=True).train()
    inputs.clear()
    m.readout.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    m(source, target, LENGTHS)
    assert len(inputs) == target.shape[1]
    assert 0.2 < (inputs[0] == 0).double().mean() < 0.8
    assert all(torch.equal(features == 0, inputs[0] == 0) for features in inputs)
    # Without gradients a step in training mode drops features between its layers all the same.
    m = model(dropout=0.5, n_layers=2).train()
    with torch.no_grad():
        encoder_output, state = m.encode(source, LENGTHS)
        first, second = (m.step(target[:, :1], state, encoder_output)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_input_projections_are_for_inference() -> None:
    m = model(dropout=0.5)
    projections = m.input_projections()
    for train, gradients in ((True, False), (False, True), (True, True)):
        m.train(train)
        message = "Seq2Seq: input_projections are for inference: call eval"
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=message):
            m.encode(sources(), LENGTHS, projections)
    with pytest.raises(IndexError, match=r"ids must be from 0 to V - 1 = 10, got .* to 15"):
        next(m.eval().stream(sources() * 0 + 15, END, input_projections=projections))


def test_input_projections_that_do_not_apply() -> None:
    half = model(dtype=torch.bfloat16).eval()
    assert half.input_projections() == (None, None)
    assert len(list(half.stream(sources(), END, LENGTHS, 3, half.input_projections()))) <= 3
    m = model()
    with torch.autocast("cpu", torch.bfloat16):
        assert m.input_projections() == (None, None)
    m.encoder.register_forward_hook(lambda *_: None)
    assert m.input_projections().source is None
    assert m.input_projections().target is not None
    m.target_embedding.register_forward_hook(lambda *_: None)
    assert m.input_projections() == (None, None)


def test_hooked_and_replaced_layers_are_called() -> None:
    m = search_model()
    source = sources()
    expected = torch.stack(list(m.stream(source, END, LENGTHS)), 1)
    layers: list[Any] = [m.decoder, m.attention, m.readout, m.head]
    for layer in layers:
        calls: list[object] = []
        for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
            calls.clear()
            hook = register(lambda *_, calls=calls: calls.append(1))
            assert torch.equal(torch.stack(list(m.stream(source, END, LENGTHS)), 1), expected)
            assert len(calls) == expected.shape[1]
            hook.remove()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = 2 * self.inner(x)
            return doubled

    m.head = Doubled(m.head)  # type: ignore[assignment]
    assert torch.equal(torch.stack(list(m.stream(source, END, LENGTHS)), 1), expected)
    m.readout = Doubled(m.readout)  # type: ignore[assignment]
    with torch.no_grad():
        encoder_output, state = m.encode(source, LENGTHS)
        begin = torch.full((4, 1), END)
        scores = m.step(begin, state, encoder_output)[0]
    assert_close("model", scores, m(source, begin, LENGTHS))


def test_reorder_is_in_place() -> None:
    m = model(cell="lstm", input_feeding=True)
    with torch.no_grad():
        _, state = m.encode(sources(), LENGTHS)
        tensors = [tensor for tensor in state if tensor is not None]
        before = [tensor.clone() for tensor in tensors]
        pointers = [tensor.data_ptr() for tensor in tensors]
        state.reorder_(torch.tensor([3, 0, 0, 2]))
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    for tensor, old, dim in zip(tensors, before, (1, 1, 0), strict=True):
        assert torch.equal(tensor, old.index_select(dim, torch.tensor([3, 0, 0, 2])))


# ---- configuration and arguments


def test_sharing_and_tying() -> None:
    shared = llm_ext.Seq2Seq(VOCAB, VOCAB, E, H, share_embedding=True, tie_head=True)
    assert shared.source_embedding is shared.target_embedding
    assert shared.head.weight is shared.target_embedding.weight
    separate = llm_ext.Seq2Seq(VOCAB, VOCAB, E, H)
    sizes = [sum(parameter.numel() for parameter in m.parameters()) for m in (shared, separate)]
    assert sizes[1] - sizes[0] == 2 * VOCAB * E + E
    # Scores of a tied head are not of the order of the root of the size of the embedding.
    assert 0.9 / 8 < llm_ext.Seq2Seq(9, 99, 64, H, tie_head=True).head.weight.std() < 1.1 / 8
    with pytest.raises(ValueError, match="share_embedding needs one vocabulary, got sizes 3 and 4"):
        llm_ext.Seq2Seq(3, 4, E, H, share_embedding=True)


def test_config_and_state_dict() -> None:
    m = model(cell="lstm", input_feeding=True, tie_head=True)
    rebuilt = llm_ext.Seq2Seq(**json.loads(json.dumps(m.config()))).double()
    rebuilt.load_state_dict(m.state_dict())
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    assert torch.equal(rebuilt(source, target, LENGTHS), m(source, target, LENGTHS))
    assert rebuilt.config() == m.config()


BAD_CONSTRUCTORS: list[tuple[dict[str, Any], str]] = [
    ({"cell": "elman"}, "Seq2Seq: cell must be one of rnn, gru, lstm"),
    ({"dropout": 1.5}, "Seq2Seq: dropout must be a probability"),
    ({"n_layers": 0}, "Seq2Seq: n_layers must be at least 1"),
    ({"attn_dim": 0}, "Seq2Seq: attn_dim must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONSTRUCTORS)
def test_bad_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm_ext.Seq2Seq(3, 3, E, H, **options)


def test_bad_call() -> None:
    m = model().eval()
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    calls: list[tuple[Any, Any, type[Exception], str]] = [
        (source[0], target, ValueError, r"source must be \[B, S\], got \[9\]"),
        (source, target[0], ValueError, r"target must be \[B, T\], got \[5\]"),
        (source, target[:3], ValueError, "target must have the 4 rows of source, got 3"),
        (source.double(), target, TypeError, "source must be int64 or int32, got float64"),
        (source + 5, target, IndexError, "ids must be from 0 to 10"),
    ]
    for source_ids, target_ids, error, message in calls:
        with pytest.raises(error, match=message):
            m(source_ids, target_ids)


LONG = torch.tensor([9, 10, 6, 9])
BAD_LENGTHS: list[tuple[Tensor, type[Exception], str]] = [
    (LENGTHS.int(), TypeError, "Seq2Seq: {name} must be int64, got int32"),
    (LENGTHS[:3], ValueError, r"Seq2Seq: {name} must be \[B\] = \[4\], got \[3\]"),
    (LENGTHS[:, None], ValueError, r"Seq2Seq: {name} must be \[B\] = \[4\], got \[4, 1\]"),
    (LONG, ValueError, r"Seq2Seq: {name} must be from 0 to {T} = 9, got \[9, 10, 6, 9\]"),
    (-LENGTHS, ValueError, r"Seq2Seq: {name} must be from 0 to {T} = 9, got \[-9"),
]


@pytest.mark.parametrize(("lengths", "error", "message"), BAD_LENGTHS)
def test_bad_lengths(lengths: Tensor, error: type[Exception], message: str) -> None:
    """The message names the argument of the user."""
    m, source, target = model().eval(), sources(), torch.randint(VOCAB, (4, 9))
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: m(source, target, lengths), "source_lengths"),
        (lambda: m(source, target, None, lengths), "target_lengths"),
        (lambda: m.stream(source, END, lengths), "source_lengths"),
        (lambda: m.search(source, END, lengths), "source_lengths"),
        (lambda: m.encode(source, lengths), "lengths"),
    ]
    for call, name in calls:
        with pytest.raises(error, match=message.format(name=name, T="T" if name[0] == "t" else "S")):
            call()


def test_bad_keep() -> None:
    m, source, target = model().eval(), sources(), torch.randint(VOCAB, (4, 5))
    for shape in ((4, 4), (5, 4)):
        message = rf"Seq2Seq: keep must be \[B, T\] = \[4, 5\], got \[{shape[0]}, {shape[1]}\]"
        with pytest.raises(ValueError, match=message):
            m(source, target, keep=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(TypeError, match="Seq2Seq: keep must be bool, got int64"):
        m(source, target, keep=torch.ones(4, 5, dtype=torch.int64))


@feeding
@pytest.mark.parametrize("cell", CELLS)
def test_bad_step(cell: str, input_feeding: bool) -> None:
    """On both paths of a step."""
    m, ids = model(cell=cell, input_feeding=input_feeding).eval(), torch.zeros(4, 1, dtype=torch.int64)
    encoder_output, state = m.encode(sources())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(ValueError, match=r"Seq2Seq: state.hidden must be .* = \[2, 8, 17\], got \[2, 4, 17\]"):
                m.step(torch.zeros(4, 2, dtype=torch.int64), state, encoder_output)
            with pytest.raises(ValueError, match=r"Seq2Seq: ids must be \[B, K\] = \[4, \*\], got \[3, 1\]"):
                m.step(ids[:3], state, encoder_output)
            with pytest.raises(TypeError, match="Seq2Seq: state must be a Seq2SeqState, got tuple"):
                m.step(ids, tuple(state), encoder_output)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="Seq2Seq: encoder_output must be an EncoderOutput, got Tensor"):
                m.step(ids, state, encoder_output.keys)  # type: ignore[arg-type]
            if cell == "lstm":
                with pytest.raises(TypeError, match=r"Seq2Seq: state.cell must be a Tensor, got NoneType"):
                    m.step(ids, state._replace(cell=None), encoder_output)


@pytest.mark.parametrize("projected", [False, True])
@feeding
def test_ids_of_32_bits(input_feeding: bool, projected: bool) -> None:
    m = model(input_feeding=input_feeding).eval()
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    assert torch.equal(m(source.int(), target.int(), LENGTHS), m(source, target, LENGTHS))
    projections = m.input_projections() if projected else None
    for lengths in (None, LENGTHS):
        streams = [list(m.stream(ids, END, lengths, 5, projections)) for ids in (source, source.int())]
        assert torch.equal(torch.stack(streams[0]), torch.stack(streams[1]))
        found = [
            m.search(ids, END, lengths, max_length=5, input_projections=projections) for ids in (source, source.int())
        ]
        assert [row[0].ids.tolist() for row in found[0]] == [row[0].ids.tolist() for row in found[1]]


@feeding
def test_found_ids_can_be_trained_on(input_feeding: bool) -> None:
    """They are no inference tensors."""
    m, source = model(input_feeding=input_feeding), sources()
    for ids in (*m.stream(source, END, LENGTHS, 3), *(row[0].ids for row in m.search(source, END, LENGTHS))):
        assert not ids.is_inference()
        ids.add_(0)
        m(source[:1], ids[None]).sum().backward()


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([9, 0, 6, 9])])
def test_padding_may_hold_any_number(lengths: Tensor) -> None:
    """Such as the index that a loss ignores; the second lengths are not packed."""
    m, source, target = model(), sources(), torch.randint(VOCAB, (4, 5))
    target_lengths = torch.tensor([5, 3, 0, 4])
    results = []
    for fill in (0, -100):
        filled_source = source.masked_fill(torch.arange(9) >= lengths[:, None], fill)
        filled_target = target.masked_fill(torch.arange(5) >= target_lengths[:, None], fill)
        results.append(m(filled_source, filled_target, lengths, target_lengths))
    assert torch.equal(*results)


def test_nan_scores() -> None:
    m = model().eval()
    weights = (m.readout.weight, m.head.weight, m.decoder.weight_hh_l0, m.encoder.weight_ih_l1, m.head.bias)
    for weight in weights:
        assert isinstance(weight, Tensor)
        finite = weight.detach().clone()
        with torch.no_grad():
            weight[3] = math.nan
        for projections in (None, m.input_projections()):
            with pytest.raises(RuntimeError, match="not a number"):
                next(m.stream(sources(), END, input_projections=projections))
            with pytest.raises(RuntimeError, match="not a number"):
                m.search(sources(), END, input_projections=projections)
        with torch.no_grad():
            weight.copy_(finite)
    next(m.stream(sources(), END))


@feeding
def test_compiles_without_graph_breaks(input_feeding: bool) -> None:
    m = model(input_feeding=input_feeding)
    source, target = sources(), torch.randint(VOCAB, (4, 5))
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert_close("model", compiled(source, target), m(source, target))


@pytest.mark.parametrize("copy", [False, True])
def test_default_device(copy: bool) -> None:
    """A call works on the device of the model, whatever the default device is."""
    m, target = search_model(copy=copy), torch.randint(VOCAB, (4, 5))
    source = sources(vocab=VOCAB)

    def run() -> Any:
        return m(source, target, LENGTHS), [found.ids for row in m.search(source, END, LENGTHS) for found in row]

    with torch.device("meta"):
        found = run()
    assert_same_bits(found, run())
