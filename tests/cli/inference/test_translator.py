"""Translation of lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.inference import Translator, bleu, rouge, translator
from llm_ext.cli.inference.translator import SearchOptions
from llm_ext.models import InputProjections

CPU = torch.device("cpu")


@pytest.fixture
def trained(translator: Path) -> Translator:
    return Translator.load(Run(translator), "best", CPU)


def test_many_lines_keep_their_order(trained: Translator) -> None:
    """More lines than are read ahead, with lengths that batches mix."""
    lines = [(f"line {n}", "one two" if n % 3 else "six") for n in range(1100)]
    alone = {text: next(trained.translate_lines([("", text)], 1, print))[0] for text in ("one two", "six")}
    assert [row[0] for row in trained.translate_lines(lines, 32, print)] == [alone[text] for _, text in lines]


def test_input_projections_are_computed_once_for_many_tokens(
    trained: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for fewer tokens than the vocabulary has, nor if they need too much memory."""
    computed: list[InputProjections] = []
    compute = trained.model.input_projections

    def recorded() -> InputProjections:
        computed.append(compute())
        return computed[-1]

    monkeypatch.setattr(trained.model, "input_projections", recorded)
    lines = [("", text) for text in ("one two", "six", "ten ten") * 700]

    def translations(count: int, options: SearchOptions | None = None) -> list[str]:
        computed.clear()
        return [row[0] for row in trained.translate_lines(lines[:count], 32, print, options)]

    assert translations(1) == ["deux, un."]
    assert computed == []
    few = translations(3)
    assert few[0] == "deux, un."
    assert len(computed) == 1
    assert translations(len(lines)) == few * 700
    assert len(computed) == 1
    assert translations(len(lines), {"beam": 2}) == few * 700
    assert len(computed) == 1
    monkeypatch.setattr(translator, "MAX_PROJECTION_BYTES", 1000)
    assert translations(len(lines)) == few * 700
    assert computed == []


def test_a_translation_is_streamed_in_pieces(trained: Translator) -> None:
    pieces = list(trained.stream(trained.encode("one two", "", print)))
    assert "".join(pieces) == "deux, un."
    assert len(pieces) > 3


def test_bleu_with_several_references() -> None:
    assert bleu(["a b c d e"], [["a b c d e"]])[0] == pytest.approx(100)
    assert bleu(["a b c d e", "x y z u v"], [["q", "x y z u v"], ["a b c d e", None]])[0] == pytest.approx(100)
    assert bleu(["a b c d e"], [["f g h i j"]])[0] < 20


def test_rouge() -> None:
    """F1 of common words, pairs of words and the longest common subsequence; 'cats' has the stem of 'cat'."""
    found = rouge(["The cats sat on mats.", "nothing"], ["A cat on the mat sat.", "else"])
    # In the first line 5 words of 5 and of 6 are common, no pair of words, and a subsequence of 3 words: cat, on, mat.
    first = {"ROUGE-1": 10 / 11, "ROUGE-2": 0.0, "ROUGE-L": 6 / 11}
    assert found == pytest.approx({name: 50 * value for name, value in first.items()})
