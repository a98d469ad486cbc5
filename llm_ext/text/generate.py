"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llm_ext.model import LLM
from llm_ext.text.errors import TextError
from llm_ext.text.tokens import Tokens


def generate(
    model: LLM,
    tokens: Tokens,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a prompt, yielding text as soon as its characters are complete.

    Args:
        model: in evaluation mode.
        tokens: its vocabulary.
        prompt: at least one token; it is not yielded.
        length: tokens to sample.
        temperature: divides the scores; 0 takes the best token always.
        top_k: sample among the k best tokens only.
        top_p: sample among the fewest best tokens whose probabilities reach p.
        seed: for the same text again; None for another one each time.

    Raises:
        TextError: the prompt is empty or has characters that the model does not know.
        ValueError: a number out of range.
    """
    ids = tokens.encode(prompt)
    if not ids.size:
        raise TextError("the prompt must hold at least one character, got none")
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    prompt_ids = torch.tensor(ids.tolist(), dtype=torch.int64, device=device)
    stream = model.stream(prompt_ids, length, temperature, top_k, top_p, generator)
    return tokens.stream(int(sampled) for sampled in stream)
