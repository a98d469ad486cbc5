"""Transcription of samples with a trained model, its loss, and error rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.batches import make_targets
from llm_ext.cli.data.features import EncodedSamples, FeatureReader
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.data.splits import Indices
from llm_ext.cli.data.tokenizer import Ids
from llm_ext.cli.device import device_of
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import ALONE, Processes, Score, TokenTotals, shared_batches
from llm_ext.cli.inference.translator import SearchOptions
from llm_ext.models import LLM, Seq2Seq, SequenceClassifier
from llm_ext.ops.packing import within_lengths

__all__ = [
    "Transcriber",
    "TranscriptBatch",
    "ctc_nats",
    "encode_texts",
    "error_rates",
    "evaluate_transcripts",
    "fits_ctc",
    "make_transcript_batch",
]


class TranscriptBatch(NamedTuple):
    """Samples with their texts.

    Attributes:
        x: Features ``[B, S, F]``.
        lengths: Steps of each sample, ``[B]`` int64.
        target: ``[B, T]`` int64: the end id, and the text without its last id.
        expected: ``[B, T]`` int64: the text and the end id, which is the padding too.
        target_lengths: Ids of each row of `expected`, the end included, ``[B]`` int64.
        keep: Positions of `expected` before its padding, ``[B, T]`` bool.
    """

    x: Tensor
    lengths: Tensor
    target: Tensor
    expected: Tensor
    target_lengths: Tensor
    keep: Tensor


def encode_texts(samples: Sequence[Sample], tokenizer: LineTokenizer) -> list[Ids]:
    """Return the ids of the text of each sample.

    Raises:
        CommandError: The vocabulary cannot represent a text.
    """
    ids = []
    for sample in samples:
        try:
            ids.append(tokenizer.encode(str(sample.target)))
        except CommandError as error:
            raise CommandError(f"{sample.name}: {error}") from None
    return ids


def make_transcript_batch(x: Tensor, lengths: Tensor, ids: Sequence[Ids], end: int) -> TranscriptBatch:
    """Put samples and their texts side by side."""
    target, expected, padded, keep = make_targets(ids, end)
    target_lengths = torch.full((len(ids),), expected.shape[1]) if padded is None else padded
    return TranscriptBatch(x, lengths, target, expected, target_lengths, keep)


def fits_ctc(steps: int, ids: Ids) -> bool:
    """Return whether CTC can write a text in a number of steps: one for each id, and a blank between equal ones."""
    return len(ids) + int((np.diff(ids.astype(np.int64)) == 0).sum()) <= steps


def ctc_nats(scores: Tensor, batch: TranscriptBatch, blank: int) -> Tensor:
    """Return the summed CTC loss of scores ``[B, S, V + 1]``.

    Augmentation may shorten a sample until its text does not fit; it then counts as 0.

    Source: Graves et al., "Connectionist temporal classification", 2006.
    """
    log_probabilities = scores.float().log_softmax(-1).transpose(0, 1)
    lengths = batch.target_lengths - 1  # without the end
    return F.ctc_loss(
        log_probabilities, batch.expected, batch.lengths, lengths, blank, reduction="sum", zero_infinity=True
    )


def evaluate_transcripts(
    model: nn.Module,
    ctc: bool,
    encoded: EncodedSamples,
    reader: FeatureReader,
    indices: Indices,
    ids: Sequence[Ids],
    tokenizer: LineTokenizer,
    device: torch.device,
    processes: Processes = ALONE,
) -> Score:
    """Measure the loss of the texts given the samples; with a decoder the end of a text counts as a token.

    Args:
        model: A `Seq2Seq`, or for CTC a `SequenceClassifier`; possibly wrapped by Fabric; in evaluation mode.
        ctc: Which of them.
        encoded: All samples.
        reader: Reads samples as the model does.
        indices: The samples to measure.
        ids: The texts of all samples.
        tokenizer: Tokenizer of the texts.
        device: Device of the model.
        processes: The processes that share the work.

    Raises:
        EvaluationStoppedError: `processes.stop` returned True.
    """
    totals = TokenTotals(tokenizer.tokenizer)
    with torch.inference_mode():
        for mine in shared_batches(indices[np.argsort(-encoded.lengths[indices])], processes):
            x, lengths = reader.pad([encoded.rows(index) for index in mine.tolist()])
            batch = make_transcript_batch(x, lengths, [ids[index] for index in mine.tolist()], tokenizer.end)
            on_device = TranscriptBatch(*(tensor.to(device) for tensor in batch))
            if ctc:
                nats = ctc_nats(model(on_device.x, on_device.lengths), on_device, tokenizer.end)
                predicted = batch.expected[within_lengths(batch.target_lengths - 1, batch.keep.shape[1])]
            else:
                x, lengths, target, _, target_lengths, keep = on_device
                scores = model(x, target, lengths, target_lengths, keep)
                nats = F.cross_entropy(scores, on_device.expected[on_device.keep], reduction="sum")
                predicted = batch.expected[batch.keep]
            totals.add(nats.item(), predicted)
    return totals.score(device, processes)


class Transcriber:
    """A trained model that writes the text of samples.

    Args:
        model: Model in evaluation mode: a `Seq2Seq`, or for CTC a `SequenceClassifier`.
        reader: Reads samples as the model does.
        tokenizer: Tokenizer of the texts.
    """

    def __init__(self, model: Seq2Seq | SequenceClassifier, reader: FeatureReader, tokenizer: LineTokenizer) -> None:
        self.model, self.reader, self.tokenizer = model, reader, tokenizer

    @classmethod
    def load(cls, run: Run, which: str, device: torch.device) -> Transcriber:
        """Load a checkpoint of a run.

        Args:
            run: The run directory.
            which: "last" or "best".
            device: Device of the model.

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is no transcriber.
        """
        _, model = run.load(which, "transcribe")
        assert not isinstance(model, LLM)
        tokenizer, reader = run.transcript_tokenizer(model), run.feature_reader(model)
        return cls(model.to(device), reader, LineTokenizer(tokenizer))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    @property
    def ctc(self) -> bool:
        """Whether the model is one of CTC."""
        return isinstance(self.model, SequenceClassifier)

    def transcribe(
        self, samples: Sequence[Sample], batch: int = 32, options: SearchOptions | None = None
    ) -> Iterator[str]:
        """Yield the text of each sample in order.

        Args:
            samples: The samples.
            batch: Samples transcribed together.
            options: Options of the search of a decoder. CTC takes the best id of each step.

        Raises:
            CommandError: A sample cannot be read.
        """
        remaining = iter(samples)
        while group := list(islice(remaining, batch)):
            x, lengths = self.reader.pad([self.reader.read(sample) for sample in group])
            for ids in self.search(x.to(self.device), lengths.to(self.device), options):
                yield self.tokenizer.decode(ids)

    @torch.inference_mode()
    def search(self, x: Tensor, lengths: Tensor, options: SearchOptions | None = None) -> list[list[int]]:
        """Return the ids of the text of each sample of a batch, as `transcribe` does."""
        model, end, options = self.model, self.tokenizer.end, options or SearchOptions()
        if isinstance(model, SequenceClassifier):
            best = model(x, lengths).argmax(-1).tolist()
            rows = [row[:length] for row, length in zip(best, lengths.tolist(), strict=True)]
            return [[i for i, _ in groupby(row) if i != end] for row in rows]
        if options.get("beam", 1) == 1 and not options.get("no_repeat_ngram_size"):
            columns = list(model.stream(x, end, lengths, options.get("max_length")))
            written = torch.stack(columns, 1).tolist() if columns else [[] for _ in x]
            return [[i for i in row if i != end] for row in written]
        found = model.search(x, end, lengths, **options)
        return [row[0].ids.tolist() if row else [] for row in found]


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, float]:
    """Return the character error rate and the word error rate: edits per character or word of the references."""
    import jiwer

    return float(jiwer.cer(list(references), list(hypotheses))), float(jiwer.wer(list(references), list(hypotheses)))
