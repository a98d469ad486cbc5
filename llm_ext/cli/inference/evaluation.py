"""The loss of a model over a text or over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.cli.data.batches import PairBatch, make_batch, order_by_length
from llm_ext.cli.data.corpus import Corpus
from llm_ext.cli.data.pairs import EncodedPairs, Indices
from llm_ext.cli.data.tokenizer import Tokenizer

__all__ = ["EvaluationStoppedError", "Processes", "Score", "evaluate_pairs", "evaluate_text"]

# Streams read in parallel, and tokens of each per chunk. Larger values are not faster on a CPU. Each stream starts
# without its context, which at 32 streams raises the loss by less than 0.01.
STREAMS, CHUNK = 32, 256
# Pairs per batch.
PAIRS = 64


@dataclass(frozen=True)
class Score:
    """The loss over a text.

    Attributes:
        nats: Sum over all predicted tokens.
        tokens: Number of predicted tokens.
        characters: Length of their text in characters.
        bytes: Length of their text in bytes.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits(self, count: int) -> float:
        """Return the bits per token, character or byte, given the `count` of them."""
        return self.nats / math.log(2) / count if count else math.nan


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


def evaluate_text(
    model: nn.Module,
    corpus: Corpus,
    begin: int,
    end: int,
    tokenizer: Tokenizer,
    device: torch.device,
    processes: Processes = Processes(),
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
    totals = _Totals(tokenizer)
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
    processes: Processes = Processes(),
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
    order = indices[order_by_length(pairs, indices)]
    totals = _Totals(tokenizer)
    with torch.inference_mode():
        for begin in range(0, len(order), PAIRS * processes.count):
            if processes.stop():
                raise EvaluationStoppedError
            begin += PAIRS * processes.rank
            mine = order[begin : begin + PAIRS]
            if not len(mine):
                continue
            batch = make_batch(pairs, mine, ends)
            totals.add(_pair_nats(model, batch, device), batch.expected)
    return totals.score(device, processes)


class _Totals:
    """Sums over the predicted tokens of this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # The last entry is the end of a line, which has no text.
        self._bytes = np.array([*map(len, tokenizer.pieces), 0])
        self._characters = np.array([*(sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokenizer.pieces), 0])
        self._sums = np.zeros(4)

    def add(self, nats: float, predicted: Tensor) -> None:
        ids = predicted.numpy()
        self._sums += nats, ids.size, self._characters[ids].sum(), self._bytes[ids].sum()

    def score(self, device: torch.device, processes: Processes) -> Score:
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
