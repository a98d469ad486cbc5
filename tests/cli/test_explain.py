from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_ext import LLM, Seq2Seq
from llm_ext.text import explain
from llm_ext.text.errors import TextError
from llm_ext.text.explain import of_language_model, of_translation, words
from llm_ext.text.pairs import Language
from llm_ext.text.tokens import ByteTokens, CharTokens
from llm_ext.text.translation import Translator


def test_tokens_make_words() -> None:
    assert words([" the", " c", "at", "."]) == [("the", slice(0, 1)), ("cat.", slice(1, 4))]
    assert words([*"a bc"]) == [("a", slice(0, 1)), ("bc", slice(1, 4))]
    assert words([*"a  b "]) == [("a", slice(0, 1)), ("b", slice(1, 4)), ("␣", slice(4, 5))]
    assert words(["a", explain.END]) == [("a", slice(0, 1)), (explain.END, slice(1, 2))]
    assert words(["x" * 40]) == [("x" * 29 + "…", slice(0, 1))]
    assert words([]) == []


def test_characters_of_several_tokens() -> None:
    assert explain._texts(ByteTokens(), list("né!".encode())) == ["n", "", "é", "!"]
    assert explain._texts(ByteTokens(), [0xFF, 0x61]) == ["\ufffd", "a"]


@torch.no_grad()
def test_weights_of_a_translation_are_those_of_the_model() -> None:
    side = Language(ByteTokens())
    model = Seq2Seq(257, 257, 8, 16, n_layers=2).double().eval()
    picture = of_translation(Translator(model, side, side), "go on", "va y", print)
    assert list(picture.columns) == ["go", "on", explain.END]
    assert list(picture.rows) == ["va", "y", explain.END]
    source = torch.tensor([[*b"go on", side.end]])
    memory, state = model.encode(source)
    alpha = []
    for i in (side.end, *b"va y"):
        _, state, weights = model.step(torch.tensor([[i]]), state, memory, need_weights=True)
        assert weights is not None
        alpha.append(weights[0, 0])
    table = torch.stack(alpha).numpy()
    # Row t is what token t was written from; the words are its tokens 0-1, 2-3 and 4, of the source 0-1, 2-4 and 5.
    expected = [
        [table[a:b, c:d].sum(1).mean() for c, d in ((0, 2), (2, 5), (5, 6))] for a, b in ((0, 2), (2, 4), (4, 5))
    ]
    np.testing.assert_allclose(picture.weights, expected, rtol=1e-12)
    np.testing.assert_allclose(picture.weights.sum(1), 1)


@pytest.mark.parametrize("attention", ["hidden", "embedding"])
def test_weights_of_a_language_model_are_those_of_its_pool(attention: str) -> None:
    tokens = CharTokens("abc ")
    model = LLM(4, 8, 16, 4, 1, 0.0, attention=attention, score="tanh").double().eval()
    picture = of_language_model(model, tokens, "ab c ba")
    assert list(picture.columns) == ["ab", "c"]
    assert list(picture.rows) == ["c", "ba"]
    ids = torch.tensor([tokens.encode("ab c ba").tolist()])
    with torch.no_grad():
        e = model.embedding(ids)
        if attention == "hidden":
            e = model.rnn(e.transpose(0, 1))[0].transpose(0, 1)
        *_, alpha = model.pool(e, return_weights=True)
    table = alpha[0].numpy()
    # " c" are tokens 2 and 3, predicted at 1 and 2; " ba" 4 to 6, predicted at 3 to 5.
    assert np.isnan(picture.weights[0, 1])
    np.testing.assert_allclose(picture.weights[0, 0], table[1:3, :2].sum(1).mean())
    np.testing.assert_allclose(picture.weights[1], [table[3:6, :2].sum(1).mean(), table[3:6, 2:4].sum(1).mean()])


def test_nothing_to_look_at() -> None:
    side = Language(CharTokens("ab "))
    translator = Translator(Seq2Seq(4, 4, 8, 16).eval(), side, side)
    for text, target, message in (
        (" ", None, "--text must hold at least one word"),
        ("a", "", "--target must hold at least one word"),
        ("c", None, "--text: the character 'c'"),
        ("a", "c", "--target: the character 'c'"),
    ):
        with pytest.raises(TextError, match=message):
            of_translation(translator, text, target, print)
    model = LLM(3, 4, 8, 3, 1, 0.0, attention="none")
    with pytest.raises(TextError, match="the model has no attention to look at"):
        of_language_model(model, side.tokens, "a b")
