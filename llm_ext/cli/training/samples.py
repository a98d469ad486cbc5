"""Code that the tasks on samples share: reading, splitting and encoding them, batches, augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from lightning_fabric import Fabric
from torch import Tensor

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.augmentation import augment_features, drop_words
from llm_ext.cli.data.batches import Batches
from llm_ext.cli.data.features import EncodedSamples, FeatureReader, encode_samples
from llm_ext.cli.data.samples import Sample, read_samples
from llm_ext.cli.data.splits import Indices, group_fold, groups_of, hold_out
from llm_ext.cli.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_texts
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import SampleConfig
from llm_ext.cli.training.task import InputFiles, Task, rows_of_process

__all__ = ["SampleData", "SampleTask"]


@dataclass(frozen=True)
class SampleData:
    """Encoded samples.

    Attributes:
        reader: Reads samples as the model does.
        tokenizer: Of text, or of what is to be written; None for labels of something else than text.
        samples: The training samples, and the validation samples if they have a path of their own.
        encoded: The features of both.
        chosen: Indices of the samples to train on.
        held_out: Indices of the samples for validation, in the last of `samples`.
    """

    reader: FeatureReader
    tokenizer: Tokenizer | None
    samples: list[list[Sample]]
    encoded: list[EncodedSamples]
    chosen: Indices
    held_out: Indices

    @classmethod
    def prepare(
        cls,
        fabric: Fabric,
        config: SampleConfig,
        run: Run,
        files: InputFiles,
        target: str,
        save_vocabulary: Callable[[list[Sample]], object] | None,
    ) -> SampleData:
        """Read and encode the samples; the first process does it for all of them.

        Args:
            fabric: The processes.
            config: The settings.
            run: Directory of the front end, the normalization and the tokenizer.
            files: The samples.
            target: Column of the target: "label" or "text".
            save_vocabulary: Saves what else depends on the training samples; None to continue a run.

        Raises:
            CommandError: A file cannot be used, or a part has no samples.
        """
        parts = [read_samples(paths[0], config.kind, target) for paths in files.parts]
        if len(parts) == 2:
            chosen, held_out = (np.arange(len(part)) for part in parts)
        elif files.fold is not None:
            if config.held_out:
                raise CommandError("--val-values: each fold holds out other groups; leave it out, or give --folds 1")
            chosen, held_out = group_fold(groups_of(parts[0], config.val_column), *files.fold)
        else:
            chosen, held_out = hold_out(parts[0], config.val_column, config.held_out, config.val_fraction)
        for name, indices in (("to train on", chosen), ("for validation", held_out)):
            if not len(indices):
                raise CommandError(
                    f"there must be at least one sample {name}, got none; "
                    "give more samples, another --val-fraction, other --val-values, or --val"
                )
        training = [parts[0][index] for index in chosen.tolist()]
        front_end = config.front_end().fitted(training[0])
        has_tokens = config.kind == "text" or target == "text"
        first = save_vocabulary is not None and fabric.is_global_zero
        with fabric.rank_zero_first():
            if first:
                assert save_vocabulary is not None
                run.path.mkdir(parents=True, exist_ok=True)
                if has_tokens:
                    # Characters that occur in validation samples only must be known as well.
                    texts = [sample for part in parts for sample in part] if config.tokens == "chars" else training
                    written = (str(sample.data if config.kind == "text" else sample.target) for sample in texts)
                    tokenizer_from_texts(config.tokens, written, config.vocab_size).save(run.vocabulary)
                save_vocabulary(training)
            tokenizer = load_tokenizer(run.vocabulary) if has_tokens else None
            reader = FeatureReader(front_end, tokenizer=tokenizer if config.kind == "text" else None)
            encoded = [encode_samples(part, reader, files.cache) for part in parts]
            if first:
                normalization = (None, None) if config.kind == "text" else encoded[0].normalization(chosen)
                FeatureReader(front_end, *normalization).save(run.features)
            reader = FeatureReader.load(run.features, tokenizer)
        if encoded[-1].feature_dim != encoded[0].feature_dim:
            sizes = f"{encoded[0].feature_dim} and {encoded[-1].feature_dim}"
            raise CommandError(
                f"samples for training and validation must have the same number of features, got {sizes}"
            )
        return cls(reader, tokenizer, parts, encoded, chosen, held_out)


class SampleTask(Task):
    """The common half of the tasks on samples.

    Args:
        fabric: The processes.
        config: The settings.
        data: The samples.

    Raises:
        CommandError: There are too few samples.
    """

    unit = "samples per step"
    folds = True

    def __init__(self, fabric: Fabric, config: SampleConfig, data: SampleData) -> None:
        self.fabric, self.data, self.notes = fabric, data, []
        self.augmentations = config.augmentations
        self.training, self.validation = data.encoded[0], data.encoded[-1]
        targets = hashlib.sha256(repr([sample.target for part in data.samples for sample in part]).encode())
        self.fingerprints = [*(encoded.fingerprint() for encoded in data.encoded), targets.hexdigest()]
        self.batch, self.mine = config.batch, rows_of_process(fabric, config.batch)

    def make_batches(self, config: SampleConfig, chosen: Indices) -> Batches:
        """Return batches of samples of similar length."""
        return Batches(chosen, self.batch, config.seed, lambda indices: np.argsort(-self.training.lengths[indices]))

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the training samples of a batch, changed at random as the settings say, and their lengths."""
        x, lengths = self.data.reader.pad([self.training.rows(index) for index in indices])
        if self.data.reader.tokenizer is not None:
            return drop_words(x, lengths) if "words" in self.augmentations else (x, lengths)
        if not self.augmentations:
            return x, lengths
        mean, std = self.data.reader.mean, self.data.reader.std
        assert mean is not None
        assert std is not None
        layout = self.data.reader.front_end.layout(x.shape[-1])
        return augment_features(x, lengths, self.augmentations, layout, (mean, std))

    def describe_sizes(self) -> str:
        """Return the number of samples and features in words."""
        features = "" if self.data.reader.mean is None else f"{self.training.feature_dim} features per step, "
        return f"{features}{len(self.data.chosen):,} samples for training, {len(self.data.held_out):,} for validation"
