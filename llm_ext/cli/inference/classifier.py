"""Classification of samples with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.features import EncodedSamples, FeatureReader
from llm_ext.cli.data.labels import Labels, load_labels
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.data.splits import Indices
from llm_ext.cli.device import device_of
from llm_ext.cli.inference.evaluation import ALONE, Processes, Score, shared_batches
from llm_ext.models import SequenceClassifier

__all__ = ["Classifier", "evaluate_labels"]


class Classifier:
    """A trained model that names the class of samples.

    Args:
        model: Model in evaluation mode.
        reader: Reads samples as the model does.
        labels: The labels.
    """

    def __init__(self, model: SequenceClassifier, reader: FeatureReader, labels: Labels) -> None:
        self.model, self.reader, self.labels = model, reader, labels

    @classmethod
    def load(cls, run: Run, which: str, device: torch.device) -> Classifier:
        """Load a checkpoint of a run.

        Args:
            run: The run directory.
            which: "last" or "best".
            device: Device of the model.

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is no classifier.
        """
        _, model = run.load(which, "classify")
        assert isinstance(model, SequenceClassifier)
        reader, labels = run.feature_reader(model), load_labels(run.labels, model.head.out_features)
        return cls(model.to(device), reader, labels)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    @torch.inference_mode()
    def predict(self, samples: Sequence[Sample], batch: int = 32) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the probability of each label, ``[C]``, for each sample in order.

        Args:
            samples: The samples.
            batch: Samples classified together.

        Raises:
            CommandError: A sample cannot be read.
        """
        remaining = iter(samples)
        while group := list(islice(remaining, batch)):
            x, lengths = self.reader.pad([self.reader.read(sample) for sample in group])
            yield from self.model(x.to(self.device), lengths.to(self.device)).softmax(-1).float().cpu().numpy()


def evaluate_labels(
    model: nn.Module,
    encoded: EncodedSamples,
    reader: FeatureReader,
    indices: Indices,
    classes: npt.NDArray[np.int64],
    count: int,
    device: torch.device,
    processes: Processes = ALONE,
) -> tuple[Score, npt.NDArray[np.int64]]:
    """Measure the loss and the accuracy of a classifier.

    Args:
        model: A `SequenceClassifier`, possibly wrapped by Fabric; in evaluation mode.
        encoded: All samples.
        reader: Reads samples as the model does.
        indices: The samples to measure.
        classes: Their classes, ``[len(indices)]``.
        count: C, number of classes.
        device: Device of the model.
        processes: The processes that share the work.

    Returns:
        The score, and how often each class (row) was taken for each class (column).

    Raises:
        EvaluationStoppedError: `processes.stop` returned True.
    """
    order = np.argsort(-encoded.lengths[indices])
    nats, counts = 0.0, torch.zeros(count * count, dtype=torch.float64)
    with torch.inference_mode():
        for mine in shared_batches(order, processes):
            x, lengths = reader.pad([encoded.rows(int(index)) for index in indices[mine]])
            scores = model(x.to(device), lengths.to(device)).float().cpu()
            expected = torch.from_numpy(classes[mine])
            nats += F.cross_entropy(scores, expected, reduction="sum").item()
            counts += torch.bincount(expected * count + scores.argmax(-1), minlength=count * count)
    total = processes.sum(torch.cat((counts, counts.new_tensor([nats]))).to(device)).cpu()
    table: npt.NDArray[np.int64] = total[:-1].view(count, count).numpy().astype(np.int64)
    return Score(float(total[-1]), int(table.sum()), 0, 0, int(np.trace(table))), table
