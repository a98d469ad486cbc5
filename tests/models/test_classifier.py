"""llm_ext.SequenceClassifier, and features in place of tokens in Seq2Seq and LLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import assert_close
from support.pairwise import parametrize_pairwise
from torch import Tensor, nn

import llm_ext

CELLS = ("rnn", "gru", "lstm")
LENGTHS = torch.tensor([9, 1, 6, 9])
C, F, V, E, H = 5, 7, 11, 6, 17


def model(source: str, **options: Any) -> llm_ext.SequenceClassifier:
    sizes: dict[str, Any] = {"feature_dim": F} if source == "features" else {"vocab_size": V, "embedding_dim": E}
    m = llm_ext.SequenceClassifier(C, H, 2, dtype=torch.float64, **sizes, **options)
    for parameter in m.parameters():  # biases too
        nn.init.normal_(parameter, std=0.4)
    return m


def inputs(source: str) -> Tensor:
    x = torch.randn(4, 9, F, dtype=torch.float64) if source == "features" else torch.randint(V, (4, 9))
    beyond = torch.arange(9) >= LENGTHS[:, None]
    x[beyond] = float("nan") if source == "features" else -1  # padding may be anything
    return x


def expected(m: llm_ext.SequenceClassifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and attention weights with torch.nn and formulas, row by row."""
    config = m.config()
    options = {"nonlinearity": config["nonlinearity"]} if config["cell"] == "rnn" else {}
    layers = getattr(nn, str(config["cell"]).upper())
    encoder = layers(
        m.encoder.input_size,
        H,
        2,
        bidirectional=config["bidirectional"],
        batch_first=True,
        dtype=torch.float64,
        **options,
    )
    encoder.load_state_dict(m.encoder.state_dict())
    scores, weights = [], []
    for row, length in zip(x, LENGTHS.tolist(), strict=True):
        row = row[:length]
        if m.embedding is not None:
            row = nn.functional.one_hot(row, V).double() @ m.embedding.weight + m.embedding.bias
        h = encoder(row[None])[0][0]  # [S, D H]
        alpha = torch.zeros(9, dtype=torch.float64)
        if m.pool is not None:
            inner = h @ m.pool.weight.T
            inner = inner if m.pool.bias is None else torch.tanh(inner + m.pool.bias)
            alpha[:length] = torch.softmax(inner @ m.pool.v, 0)
            h = alpha[:length] @ h
        elif config["pooling"] == "last":
            h = torch.cat((h[-1, :H], h[0, H:])) if config["bidirectional"] else h[-1]
        scores.append(h @ m.head.weight.T + m.head.bias)
        weights.append(alpha)
    if config["pooling"] == "none":
        return nn.utils.rnn.pad_sequence(scores, batch_first=True), torch.empty(0)
    return torch.stack(scores), torch.stack(weights)


@parametrize_pairwise(
    source=("features", "ids"),
    cell=CELLS,
    pooling=("attention", "last", "none"),
    bidirectional=(True, False),
    score=("linear", "tanh"),
)
def test_scores_are_those_of_torch_nn(source: str, cell: str, pooling: str, bidirectional: bool, score: str) -> None:
    m = model(source, cell=cell, pooling=pooling, bidirectional=bidirectional, score=score)
    x = inputs(source)
    scores, weights = expected(m, x)
    found = m(x, LENGTHS)
    if pooling == "none":
        found = found.masked_fill((torch.arange(9) >= LENGTHS[:, None])[..., None], 0)
    assert_close("model", found, scores)
    if pooling == "attention":
        output = m.attend(x, LENGTHS)
        assert_close("model", output.scores, scores)
        assert_close("model", output.weights, weights)
    gradients = torch.autograd.grad(found.sum(), list(m.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_is_the_same_at_all_steps() -> None:
    m = model("ids", pooling="none", dropout=0.5)
    features = torch.ones(3, 8, 2 * H, dtype=torch.float64)
    dropped = m._drop(features)
    assert (dropped == dropped[:, :1]).all()
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
    assert m.eval()._drop(features) is features


def test_configuration_and_arguments() -> None:
    m = model("features")
    again = llm_ext.SequenceClassifier(**json.loads(json.dumps(m.config())), dtype=torch.float64)
    again.load_state_dict(m.state_dict())
    x = inputs("features")
    assert torch.equal(again(x, LENGTHS), m(x, LENGTHS))
    with pytest.raises(ValueError, match="exactly one of vocab_size and feature_dim must be given, got 3 and 4"):
        llm_ext.SequenceClassifier(2, 8, vocab_size=3, feature_dim=4)
    with pytest.raises(ValueError, match="pooling must be one of attention, last, none, got 'mean'"):
        llm_ext.SequenceClassifier(2, 8, feature_dim=4, pooling="mean")
    with pytest.raises(ValueError, match=r"x must be \[B, S, F\] = \[\*, \*, 7\], got \[4, 9, 6\]"):
        m(x[..., :6])
    with pytest.raises(TypeError, match="x must be features of dtype float64, got int64"):
        m(x.nan_to_num().long())
    with pytest.raises(ValueError, match="lengths must be from 0 to S = 9"):
        m(x, LENGTHS + 1)
    with pytest.raises(RuntimeError, match="pooling='last' has no attention weights"):
        model("features", pooling="last").attend(x)


def test_mapped_lengths() -> None:
    """The lengths of every model may be mapped, as those of per-sample gradients are."""
    x, text = inputs("features"), torch.randint(V, (4, 5))
    classifier = model("features").eval()
    language_model = llm_ext.LLM(V, 4, 8, V, 1, 0.0, feature_dim=x.shape[-1], dtype=torch.float64).eval()
    translator = llm_ext.Seq2Seq(None, V, 4, 8, 1, source_feature_dim=x.shape[-1], dtype=torch.float64).eval()
    calls: list[Callable[[Tensor, Tensor, Tensor], Any]] = [
        lambda x, lengths, _: classifier(x, lengths),
        lambda x, lengths, _: language_model.condition(x, lengths).hidden.transpose(0, 1),
        lambda x, lengths, text: translator(x, text, lengths),
    ]
    for call in calls:
        rows = torch.func.vmap(lambda *row: call(*(each.unsqueeze(0) for each in row)).squeeze(0))  # noqa: B023
        assert_close("model", rows(x, LENGTHS, text), call(x, LENGTHS, text))


def embedded_twin(options: dict[str, Any]) -> tuple[llm_ext.Seq2Seq, llm_ext.Seq2Seq]:
    """A model of ids, and a model of features that reads the embeddings of the first one."""
    ids = llm_ext.Seq2Seq(V, C, E, H, 2, dtype=torch.float64, **options).eval()
    features = llm_ext.Seq2Seq(None, C, E, H, 2, source_feature_dim=E, dtype=torch.float64, **options).eval()
    features.load_state_dict({k: v for k, v in ids.state_dict().items() if not k.startswith("source_embedding.")})
    return ids, features


@pytest.mark.parametrize("lengths", [None, LENGTHS, torch.tensor([9, 0, 6, 9])], ids=["full", "packed", "empty"])
@pytest.mark.parametrize("options", [{"cell": "lstm"}, {"cell": "gru", "input_feeding": True}], ids=str)
def test_a_translator_of_features(options: dict[str, Any], lengths: Tensor | None) -> None:
    ids_model, features_model = embedded_twin(options)
    ids, target = torch.randint(V, (4, 9)), torch.randint(C, (4, 5))
    assert ids_model.source_embedding is not None
    features = ids_model.source_embedding(ids).detach()
    if lengths is not None:
        features[torch.arange(9) >= lengths[:, None]] = float("nan")
    scores = features_model(features, target, lengths)
    assert_close("model", scores, ids_model(ids, target, lengths))
    gradients = torch.autograd.grad(scores.sum(), list(features_model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    streams = (m.stream(x, 0, lengths, 6) for m, x in ((features_model, features), (ids_model, ids)))
    assert [row.tolist() for row in next(streams)] == [row.tolist() for row in next(streams)]
    searches = [m.search(x, 0, lengths, beam=3) for m, x in ((features_model, features), (ids_model, ids))]
    for ours, theirs in zip(*searches, strict=True):
        assert ours[0].ids.tolist() == theirs[0].ids.tolist()
    assert features_model.input_projections().source is None


def test_arguments_of_a_translator_of_features() -> None:
    with pytest.raises(ValueError, match="exactly one of source_vocab_size and source_feature_dim must be given"):
        llm_ext.Seq2Seq(V, C, E, H, source_feature_dim=E)
    with pytest.raises(ValueError, match="copy needs sources of token ids, got source_feature_dim"):
        llm_ext.Seq2Seq(None, C, E, H, source_feature_dim=E, copy=True)
    with pytest.raises(ValueError, match="share_embedding needs one vocabulary"):
        llm_ext.Seq2Seq(None, C, E, H, source_feature_dim=E, share_embedding=True)
    _, m = embedded_twin({})
    with pytest.raises(ValueError, match=r"source must be \[B, S, F\]"):
        m(torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64))


@parametrize_pairwise(cell=CELLS, attention=("hidden", "embedding", "none"), sequence=(True, False))
def test_a_language_model_reads_features_like_tokens(cell: str, attention: str, sequence: bool) -> None:
    """With features that are the embeddings of tokens, the text continues as after those tokens."""
    m = llm_ext.LLM(V, E, H, V, 2, 0.0, cell=cell, attention=attention, feature_dim=E, dtype=torch.float64)
    assert m.projection is not None
    nn.init.eye_(m.projection.weight)
    nn.init.zeros_(m.projection.bias)
    ids, text = torch.randint(V, (4, 9 if sequence else 1)), torch.randint(V, (4, 5))
    lengths = LENGTHS if sequence else torch.ones(4, dtype=torch.int64)
    features = m.embedding(ids).detach()
    features[torch.arange(ids.shape[1]) >= lengths[:, None]] = float("nan")
    state = m.condition(features, lengths) if sequence else m.condition(features[:, 0])
    scores, _ = m(text, state)
    for row, length in enumerate(lengths.tolist()):
        whole, _ = m(torch.cat((ids[row, :length], text[row]))[None])
        assert_close("model", scores[row], whole[0, length:])
    generated = m.eval().generate(text, 4, temperature=0, state=state)
    whole = m.generate(torch.cat((ids[0, : lengths[0]], text[0])), 4, temperature=0)
    assert generated[0, 5:].tolist() == whole[-4:].tolist()
    with pytest.raises(RuntimeError, match="condition needs a model with feature_dim"):
        llm_ext.LLM(V, E, H, V, 1, 0.0).condition(features)
