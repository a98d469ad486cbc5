"""The loss of a model over a text or over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.cli.data.batches import PairBatch, make_batch, order_by_length
from llm_ext.cli.data.corpus import Corpus
from llm_ext.cli.data.pairs import EncodedPairs, Indices
from llm_ext.cli.data.tokenizer import Tokenizer

__all__ = [
    "ALONE",
    "EvaluationStoppedError",
    "Processes",
    "Score",
    "TokenTotals",
    "evaluate_pairs",
    "evaluate_text",
    "shared_batches",
]

# Streams read in parallel, and tokens of each per chunk. Larger values are not faster on a CPU. Each stream starts
# without its context, which at 32 streams raises the loss by less than 0.01.
STREAMS, CHUNK = 32, 256
# Pairs or samples per batch.
PAIRS = 64


@dataclass(frozen=True)
class Score:
    """The loss over a text, or over samples with labels.

    Attributes:
        nats: Sum over all predicted tokens.
        tokens: Number of predicted tokens, or of samples.
        characters: Length of their text in characters; 0 for labels.
        bytes: Length of their text in bytes; 0 for labels.
        correct: Samples whose label was predicted; None for text.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int
    correct: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float | None:
        """Fraction of the samples whose label was predicted; None for text."""
        return None if self.correct is None else self.correct / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits(self, count: int) -> float:
        """Return the bits per token, character or byte, given the `count` of them."""
        return self.nats / math.log(2) / count if count else math.nan

    def record(self) -> dict[str, float]:
        """Return what the log of a training holds besides the loss."""
        if self.accuracy is not None:
            return {"accuracy": self.accuracy}
        return {"bits_per_character": self.bits(self.characters)}

    def describe(self, unit: str) -> str:
        """Return the loss in words; `unit` is what it is the mean over."""
        if self.accuracy is not None:
            return f"{self.loss:.4f} nats per {unit}, accuracy {100 * self.accuracy:.2f} %"
        return f"{self.loss:.4f} nats ({self.bits(self.tokens):.4f} bits) per {unit}"


class EvaluationStoppedError(Exception):
    """The evaluation was asked to stop."""


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation.

    Attributes:
        rank: Rank of this process.
        count: Number of processes.
        sum: Adds a tensor over the processes.
        stop: Called before each batch; the evaluation stops if it returns True.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = lambda values: values
    stop: Callable[[], bool] = lambda: False


ALONE = Processes()


def evaluate_text(
    model: nn.Module,
    corpus: Corpus,
    begin: int,
    end: int,
    tokenizer: Tokenizer,
    device: torch.device,
    processes: Processes = ALONE,
) -> Score:
    """Measure the loss over a range of a text, every token but the first once.

    The range is cut into the same streams for any number of processes, so that the result depends on the text and the
    model alone.

    Args:
        model: A `StatefulLLM` without a state, possibly wrapped by Fabric; in evaluation mode.
        corpus: The text.
        begin: First token of the range.
        end: One past the last token of the range.
        tokenizer: Tokenizer of the text.
        device: Device of the model.
        processes: The processes that share the work.

    Raises:
        EvaluationStoppedError: `processes.stop` returned True.
    """
    count = max(1, min(STREAMS, (end - begin - 1) // CHUNK))
    length = -(-(end - begin - 1) // count)
    starts = begin + length * np.arange(count, dtype=np.int64)
    starts = starts[processes.rank :: processes.count]
    left = np.minimum(length, end - 1 - starts)  # tokens to predict in each stream
    totals = TokenTotals(tokenizer)
    with torch.inference_mode():
        for offset in range(0, length, CHUNK):
            if processes.stop():
                raise EvaluationStoppedError
            if not starts.size:
                continue
            size = min(CHUNK, length - offset)
            rows = corpus.rows(starts + offset, size + 1, begin, end)
            counted = torch.from_numpy(np.arange(offset, offset + size) < left[:, None])
            totals.add(_text_nats(model, rows, counted, device), rows[:, 1:][counted])
    return totals.score(device, processes)


def evaluate_pairs(
    model: nn.Module,
    pairs: EncodedPairs,
    indices: Indices,
    ends: tuple[int, int],
    tokenizer: Tokenizer,
    device: torch.device,
    processes: Processes = ALONE,
) -> Score:
    """Measure the loss of targets given their sources; the end of a target counts as a token.

    Args:
        model: A `Seq2Seq`, possibly wrapped by Fabric; in evaluation mode.
        pairs: All pairs.
        indices: The pairs to measure.
        ends: The ids that end a source and a target.
        tokenizer: Tokenizer of the targets.
        device: Device of the model.
        processes: The processes that share the work.

    Raises:
        EvaluationStoppedError: `processes.stop` returned True.
    """
    totals = TokenTotals(tokenizer)
    with torch.inference_mode():
        for mine in shared_batches(indices[order_by_length(pairs, indices)], processes):
            batch = make_batch(pairs, mine, ends)
            totals.add(_pair_nats(model, batch, device), batch.expected)
    return totals.score(device, processes)


def shared_batches(order: Indices, processes: Processes) -> Iterator[Indices]:
    """Yield the indices of the batches that this process measures.

    Raises:
        EvaluationStoppedError: `processes.stop` returned True.
    """
    for begin in range(0, len(order), PAIRS * processes.count):
        if processes.stop():
            raise EvaluationStoppedError
        begin += PAIRS * processes.rank
        if len(mine := order[begin : begin + PAIRS]):
            yield mine


class TokenTotals:
    """Sums over the predicted tokens of this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # The last entry is the end of a line, which has no text.
        self._bytes = np.array([*map(len, tokenizer.pieces), 0])
        self._characters = np.array([*(sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokenizer.pieces), 0])
        self._sums = np.zeros(4)

    def add(self, nats: float, predicted: Tensor) -> None:
        """Add the loss of some predicted ids."""
        ids = predicted.numpy()
        self._sums += nats, ids.size, self._characters[ids].sum(), self._bytes[ids].sum()

    def score(self, device: torch.device, processes: Processes) -> Score:
        """Return the score of all processes."""
        nats, *counts = processes.sum(torch.from_numpy(self._sums).to(device)).tolist()
        return Score(nats, *(int(count) for count in counts))


def _text_nats(model: nn.Module, rows: Tensor, counted: Tensor, device: torch.device) -> float:
    """Return the summed loss of one chunk.

    A separate function, so that its scores are freed before the next chunk allocates: otherwise they leave holes in the
    heap that glibc 2.36 does not reuse.
    """
    y = rows[:, 1:].masked_fill(~counted, -100).to(device)
    scores = model(rows[:, :-1].to(device))
    return F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum").item()


def _pair_nats(model: nn.Module, batch: PairBatch, device: torch.device) -> float:
    """Return the summed loss of one batch; a separate function for the reason given above."""
    *inputs, expected = (None if tensor is None else tensor.to(device) for tensor in batch)
    assert expected is not None
    return F.cross_entropy(model(*inputs), expected, reduction="sum").item()
