"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.text.corpus import Corpus
from llm_ext.text.tokens import Tokens

# Streams read side by side, and tokens of each at a time. More of either is not quicker on a CPU; each stream
# starts without knowing what came before it, which at 32 of them raises the loss by less than 0.01.
STREAMS, CHUNK = 32, 256


@dataclass(frozen=True)
class Score:
    """The loss over a text.

    nats: summed over its tokens but the first, which nothing predicts.
    tokens: how many were predicted; `characters` and `bytes`: how much text they are.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits(self, per: int) -> float:
        """Bits for each of `per` tokens, characters or bytes."""
        return self.nats / math.log(2) / per if per else math.nan


class EvaluationStoppedError(Exception):
    """The evaluation was asked to stop."""


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    begin: int,
    end: int,
    tokens: Tokens,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    stop: Callable[[], bool] = lambda: False,
) -> Score:
    """Measure the loss over a range of a text, every token once, with the state carried along.

    The result depends on the text and the model alone: the range is cut into streams in the same way however
    many processes share them.

    Args:
        model: a `Carrier` without a state, or one that Fabric has wrapped; in evaluation mode.
        corpus: the text.
        begin: first token of the range.
        end: one past its last token.
        tokens: the vocabulary.
        device: of the model.
        rank: of this process.
        world: how many processes there are.
        total: adds up a tensor over the processes.
        stop: asked before each chunk.

    Raises:
        EvaluationStoppedError: `stop` said so.
    """
    count = max(1, min(STREAMS, (end - begin - 1) // CHUNK))
    length = -(-(end - begin - 1) // count)
    starts = begin + length * np.arange(count, dtype=np.int64)
    starts = starts[rank::world]
    left = np.minimum(length, end - 1 - starts)  # tokens to predict in each stream
    n_bytes = np.array([len(piece) for piece in tokens.pieces])
    n_characters = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokens.pieces])

    sums = np.zeros(4)
    with torch.inference_mode():
        for at in range(0, length, CHUNK):
            if stop():
                raise EvaluationStoppedError
            if not starts.size:
                continue
            size = min(CHUNK, length - at)
            rows = corpus.rows(starts + at, size + 1, begin, end)
            counted = torch.from_numpy(np.arange(at, at + size) < left[:, None])
            ids = rows[:, 1:][counted].numpy()
            sums += _nats(model, rows, counted, device), ids.size, n_characters[ids].sum(), n_bytes[ids].sum()
    nats, *counts = total(torch.from_numpy(sums).to(device)).tolist()
    return Score(nats, *(int(n) for n in counts))


def _nats(model: nn.Module, rows: Tensor, counted: Tensor, device: torch.device) -> float:
    """The loss of one chunk. In a function of its own, so that its scores are freed before the next are made:
    held a little longer, they leave holes in the heap that glibc 2.36 does not fill again.
    """
    y = rows[:, 1:].masked_fill(~counted, -100).to(device)
    scores = model(rows[:, :-1].to(device))
    return F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum").item()
