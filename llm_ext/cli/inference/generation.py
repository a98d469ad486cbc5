"""Text generation with a language model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llm_ext.cli.data.tokenizer import Tokenizer
from llm_ext.cli.device import device_of
from llm_ext.cli.errors import CommandError
from llm_ext.models import LLM

__all__ = ["generate"]


def generate(
    model: LLM,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a prompt, yielding text as soon as each character is complete.

    Args:
        model: Language model in evaluation mode.
        tokenizer: Tokenizer of the model.
        prompt: At least one token; it is not yielded.
        length: Number of tokens to sample.
        temperature: Divides the scores; 0 always takes the most likely token.
        top_k: Sample among the k most likely tokens.
        top_p: Sample among the fewest most likely tokens whose probabilities sum to at least p.
        seed: Seed of the random generator; None for a different text each time.

    Raises:
        CommandError: The prompt is empty or has characters that the vocabulary lacks.
        ValueError: A number is out of range.
    """
    ids = tokenizer.encode(prompt)
    if not ids.size:
        raise CommandError("the prompt must hold at least one character, got none")
    device = device_of(model)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    prompt_ids = torch.tensor(ids.tolist(), dtype=torch.int64, device=device)
    stream = model.stream(prompt_ids, length, temperature, top_k, top_p, generator)
    return tokenizer.stream(int(sampled) for sampled in stream)
