"""Attention weights between words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_ext import LLM, Seq2Seq, SequenceClassifier
from llm_ext.cli import CommandError
from llm_ext.cli.data import ByteTokenizer, CharTokenizer, LineTokenizer
from llm_ext.cli.data.features import FeatureReader, FrontEnd
from llm_ext.cli.data.labels import Labels
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.inference import (
    Classifier,
    Translator,
    explain_classification,
    explain_language_model,
    explain_translation,
)
from llm_ext.cli.inference.explanation import END_OF_LINE, group_into_words, token_texts


def test_tokens_make_words() -> None:
    assert group_into_words([" the", " c", "at", "."]) == [("the", slice(0, 1)), ("cat.", slice(1, 4))]
    assert group_into_words([*"a bc"]) == [("a", slice(0, 1)), ("bc", slice(1, 4))]
    assert group_into_words([*"a  b "]) == [("a", slice(0, 1)), ("b", slice(1, 4)), ("␣", slice(4, 5))]
    assert group_into_words(["a", END_OF_LINE]) == [("a", slice(0, 1)), (END_OF_LINE, slice(1, 2))]
    assert group_into_words(["x" * 40]) == [("x" * 29 + "…", slice(0, 1))]
    assert group_into_words([]) == []


def test_characters_of_several_tokens() -> None:
    assert token_texts(ByteTokenizer(), list("né!".encode())) == ["n", "", "é", "!"]
    assert token_texts(ByteTokenizer(), [0xFF, 0x61]) == ["\ufffd", "a"]


@torch.no_grad()
def test_weights_of_a_translation_are_those_of_the_model() -> None:
    side = LineTokenizer(ByteTokenizer())
    model = Seq2Seq(257, 257, 8, 16, n_layers=2).double().eval()
    attention_map = explain_translation(Translator(model, side, side), "go on", "va y", print)
    assert list(attention_map.columns) == ["go", "on", END_OF_LINE]
    assert list(attention_map.rows) == ["va", "y", END_OF_LINE]
    source = torch.tensor([[*b"go on", side.end]])
    encoder_output, state = model.encode(source)
    alpha = []
    for i in (side.end, *b"va y"):
        _, state, weights = model.step(torch.tensor([[i]]), state, encoder_output, need_weights=True)
        assert weights is not None
        alpha.append(weights[0, 0])
    table = torch.stack(alpha).numpy()
    # Row t is what token t was written from; the words are its tokens 0-1, 2-3 and 4, of the source 0-1, 2-4 and 5.
    expected = [
        [table[a:b, c:d].sum(1).mean() for c, d in ((0, 2), (2, 5), (5, 6))] for a, b in ((0, 2), (2, 4), (4, 5))
    ]
    np.testing.assert_allclose(attention_map.weights, expected, rtol=1e-12)
    np.testing.assert_allclose(attention_map.weights.sum(1), 1)


@pytest.mark.parametrize("attention", ["hidden", "embedding"])
def test_weights_of_a_language_model_are_those_of_its_pool(attention: str) -> None:
    tokenizer = CharTokenizer("abc ")
    model = LLM(4, 8, 16, 4, 1, 0.0, attention=attention, score="tanh").double().eval()
    attention_map = explain_language_model(model, tokenizer, "ab c ba")
    assert list(attention_map.columns) == ["ab", "c"]
    assert list(attention_map.rows) == ["c", "ba"]
    ids = torch.tensor([tokenizer.encode("ab c ba").tolist()])
    with torch.no_grad():
        e = model.embedding(ids)
        if attention == "hidden":
            e = model.rnn(e.transpose(0, 1))[0].transpose(0, 1)
        assert model.pool is not None
        *_, alpha = model.pool(e, need_weights=True)
    table = alpha[0].numpy()
    # " c" are tokens 2 and 3, predicted at 1 and 2; " ba" 4 to 6, predicted at 3 to 5.
    assert np.isnan(attention_map.weights[0, 1])
    np.testing.assert_allclose(attention_map.weights[0, 0], table[1:3, :2].sum(1).mean())
    np.testing.assert_allclose(attention_map.weights[1], [table[3:6, :2].sum(1).mean(), table[3:6, 2:4].sum(1).mean()])


@pytest.mark.parametrize("pooling", ["attention", "last"])
def test_the_influence_of_features(pooling: str) -> None:
    """It is the gradient of the score of the label times the normalized feature."""
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    reader, labels = FeatureReader(FrontEnd("array"), mean, std), Labels(["a", "b", "c"])
    model = SequenceClassifier(3, 6, feature_dim=3, pooling=pooling).eval()
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    explanation = explain_classification(Classifier(model, reader, labels), Sample("x", features, None))
    x = ((torch.from_numpy(features) - mean) / std)[None].requires_grad_()
    scores = model(x)[0]
    best = int(scores.argmax())
    (gradient,) = torch.autograd.grad(scores[best], x)
    assert explanation.rows == ["abc"[best]]
    np.testing.assert_allclose(explanation.influence, (x * gradient)[0].detach().abs().numpy(), rtol=1e-5, atol=1e-7)
    if pooling == "attention":
        np.testing.assert_allclose(explanation.weights, model.attend(x).weights.detach().numpy(), rtol=1e-5)


def test_what_cannot_be_explained() -> None:
    side = LineTokenizer(CharTokenizer("ab "))
    translator = Translator(Seq2Seq(4, 4, 8, 16).eval(), side, side)
    for text, target, message in (
        (" ", None, "--text must hold at least one word"),
        ("a", "", "--target must hold at least one word"),
        ("c", None, "--text: the character 'c'"),
        ("a", "c", "--target: the character 'c'"),
    ):
        with pytest.raises(CommandError, match=message):
            explain_translation(translator, text, target, print)
    model = LLM(3, 4, 8, 3, 1, 0.0, attention="none")
    with pytest.raises(CommandError, match="the model has no attention to look at"):
        explain_language_model(model, side.tokenizer, "a b")
