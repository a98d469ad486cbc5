"""Generation of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_ext import LLM, quantize_
from llm_ext.cli import CommandError
from llm_ext.cli.data import ByteTokenizer, CharTokenizer
from llm_ext.cli.inference import generate


def test_text_is_yielded_in_whole_characters() -> None:
    model = LLM(256, 4, 8, 256, 1, 0.0).eval()
    pieces = list(generate(model, ByteTokenizer(), "a", 300, seed=1))
    assert len(pieces) == 301
    ids = model.generate(torch.tensor([ord("a")]), 300, generator=torch.Generator().manual_seed(1))
    assert "".join(pieces) == bytes(ids[1:].tolist()).decode("utf-8", "replace")


def test_each_text_without_a_seed_is_another() -> None:
    model = LLM(256, 4, 8, 256, 1, 0.0).eval()
    assert len({"".join(generate(model, ByteTokenizer(), "a", 50)) for _ in range(2)}) == 2


def test_a_prompt_that_cannot_be_used() -> None:
    model = LLM(2, 4, 8, 2, 1, 0.0).eval()
    with pytest.raises(CommandError, match="at least one character"):
        generate(model, CharTokenizer("ab"), "", 5)
    with pytest.raises(CommandError, match="the character 'c'"):
        generate(model, CharTokenizer("ab"), "c", 5)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_quantized_model_generates(weights: Any) -> None:
    """It has no parameters."""
    model = LLM(256, 8, 16, 256, 1, 0.0, attention="none").eval()
    quantize_(model, weights)
    assert not list(model.parameters())
    assert len(list(generate(model, ByteTokenizer(), "a", 20, seed=1))) == 21
