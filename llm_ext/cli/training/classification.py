"""Training of a classifier of sound, images, video, arrays or texts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.augmentation import mix_samples
from llm_ext.cli.data.labels import Labels, load_labels
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.classifier import evaluate_labels
from llm_ext.cli.inference.evaluation import Processes, Score
from llm_ext.cli.training.config import ClassificationConfig
from llm_ext.cli.training.samples import SampleData, SampleTask
from llm_ext.cli.training.task import InputFiles
from llm_ext.models import SequenceClassifier

__all__ = ["ClassificationTask"]


class ClassificationTask(SampleTask):
    """A classifier and its samples.

    Args:
        fabric: The processes.
        config: The settings.
        data: The samples.
        labels: The labels.
        model: The model to train.

    Raises:
        CommandError: There are too few samples or labels, or a validation sample has a label that is not known.
    """

    model: SequenceClassifier

    def __init__(
        self, fabric: Fabric, config: ClassificationConfig, data: SampleData, labels: Labels, model: SequenceClassifier
    ) -> None:
        super().__init__(fabric, config, data)
        self.model = self.module = model
        self.labels, self.label_smoothing = labels, config.label_smoothing
        self.vocabularies = (labels,) if data.tokenizer is None else (data.tokenizer, labels)
        # Held-out samples are encoded with the others, but only they may have a label that is not known.
        training = [data.samples[0][index] for index in data.chosen.tolist()]
        self.classes = np.zeros(len(data.samples[0]), dtype=np.int64)
        self.classes[data.chosen] = labels.encode(training)
        self.held_out_classes = np.array(labels.encode(data.samples[-1][index] for index in data.held_out.tolist()))
        self.batches = self.make_batches(config, data.chosen)

    @classmethod
    def create(
        cls,
        fabric: Fabric,
        config: ClassificationConfig,
        run: Run,
        files: InputFiles,
        model: SequenceClassifier | None = None,
    ) -> ClassificationTask:
        """Prepare the data and build the model, or continue with a saved `model`.

        Raises:
            CommandError: A file cannot be used, or there are too few samples or labels.
        """

        def save_labels(training: list[Sample]) -> None:
            labels = Labels(str(sample.target) for sample in training)
            if labels.size < 2:
                raise CommandError(f"there must be at least two labels to tell apart, got only {labels.names[0]!r}")
            labels.save(run.labels)

        data = SampleData.prepare(fabric, config, run, files, "label", save_labels if model is None else None)
        labels = load_labels(run.labels)
        return cls(fabric, config, data, labels, model or cls._new_model(config, data, labels.size))

    @staticmethod
    def _new_model(config: ClassificationConfig, data: SampleData, classes: int) -> SequenceClassifier:
        torch.manual_seed(config.seed)
        of_text = data.reader.tokenizer is not None
        return SequenceClassifier(
            classes,
            config.hidden,
            config.layers,
            config.dropout,
            vocab_size=None if data.reader.tokenizer is None else data.reader.tokenizer.size,
            embedding_dim=config.embedding if of_text else None,
            feature_dim=None if of_text else data.encoded[0].feature_dim,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            bidirectional=config.bidirectional,
            pooling=config.pooling,
            attn_dim=config.attn_dim,
        )

    def summary(self) -> str:
        return f"{self.labels.size} labels, {self.describe_sizes()}"

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        indices = self.batches.indices(step)[self.mine]
        x, lengths = self.read(indices.tolist())
        targets = F.one_hot(torch.from_numpy(self.classes[indices]), self.labels.size).to(torch.float32)
        if "mix" in self.augmentations:
            x, lengths, targets = mix_samples(x, lengths, targets)
        x, lengths, targets = self.fabric.to_device((x, lengths, targets))
        return F.cross_entropy(module(x, lengths), targets, label_smoothing=self.label_smoothing), self.batch

    def validate(self, module: nn.Module, processes: Processes) -> Score:
        score, _ = evaluate_labels(
            module,
            self.validation,
            self.data.reader,
            self.data.held_out,
            self.held_out_classes,
            self.labels.size,
            self.fabric.device,
            processes,
        )
        return score
