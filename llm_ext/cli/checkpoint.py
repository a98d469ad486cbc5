"""Run directories: tokenizers and checkpoints, saved so that a kill or a full disk never damages the last one.

A run directory holds `vocabulary.json`, one directory for each checkpoint, and `run.json`, which names the last and the
best checkpoint. A new checkpoint is written completely under a new name; replacing `run.json` makes it the last one;
checkpoints that are no longer named are removed after that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from llm_ext.cli.data.features import FeatureReader
from llm_ext.cli.data.files import read_json, sync_directory, write_json
from llm_ext.cli.data.labels import Labels, load_labels
from llm_ext.cli.data.tokenizer import Tokenizer, load_tokenizer
from llm_ext.cli.errors import CommandError
from llm_ext.models import LLM, Seq2Seq, SequenceClassifier

__all__ = ["STATE", "WEIGHTS", "Checkpoint", "Model", "Run", "Vocabulary", "saved_tensor"]

Model = LLM | Seq2Seq | SequenceClassifier
# Names of the rows of an embedding or of a head.
Vocabulary = Tokenizer | Labels

RUN = "llm_ext run"
CHECKPOINT = "llm_ext checkpoint"
WEIGHTS, STATE = "model.safetensors", "state.safetensors"


def _transcriber(**config: Any) -> Model:
    return Seq2Seq(**config) if "target_vocab_size" in config else SequenceClassifier(**config)


MODELS: dict[str, Callable[..., Model]] = {
    "lm": LLM,
    "translate": Seq2Seq,
    "summarize": Seq2Seq,
    "classify": SequenceClassifier,
    "transcribe": _transcriber,
}
# For each task the model that its runs hold, and the command that uses it.
COMMANDS = {
    "lm": ("a language model", "generate"),
    "translate": ("a translator", "translate"),
    "summarize": ("a summarizer", "summarize"),
    "classify": ("a classifier", "predict"),
    "transcribe": ("a transcriber", "predict"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: Its directory.
        step: The training step at which it was saved.
        config: Contents of its `config.json`.
    """

    path: Path
    step: int
    config: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of its files, `WEIGHTS` or `STATE`.

        Raises:
            CommandError: The file is missing, damaged, or not the one that was saved.
        """
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CommandError(f"{path}: missing; the checkpoint is incomplete") from None
        if hashlib.sha256(data).hexdigest() != self.config["files"].get(name):
            raise CommandError(f"{path}: damaged, or not the file that was saved here (its checksum differs)")
        try:
            return load_tensors(data)
        except SafetensorError as error:
            raise CommandError(f"{path}: expected safetensors, got something else ({error})") from None

    @property
    def task(self) -> str:
        """The task of the model; checkpoints without this entry are language models."""
        return str(self.config.get("task", "lm"))

    def check_task(self, *tasks: str) -> None:
        """Raise a CommandError that names the right command unless the task is one of `tasks`."""
        if self.task not in tasks and self.task in COMMANDS:
            holds, command = COMMANDS[self.task]
            expected = " or ".join(COMMANDS[task][0] for task in tasks)
            raise CommandError(f"{self.path.parent}: holds {holds}, not {expected}; use it with llm-ext {command}")

    def model(self) -> Model:
        """Build the model and load its weights.

        Raises:
            CommandError: The files are damaged or do not match.
        """
        weights = self.tensors(WEIGHTS)
        try:
            model = MODELS[self.task](**self.config["model"]).to(next(iter(weights.values())).dtype)
            # Not strict: tied weights are saved once.
            _, unknown = model.load_state_dict(weights, strict=False)
            names = {name for name, _ in model.named_parameters()}
            if different := sorted(names - weights.keys()) + unknown:
                raise ValueError(f"only one of them has {', '.join(different)}")
        except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
            raise CommandError(f"{self.path}: the weights do not fit the configuration: {error}") from None
        return model


class Run:
    """A run directory.

    Args:
        path: The directory.

    Attributes:
        vocabulary: File of the tokenizer; of a translator with two vocabularies, that of the sources.
        target_vocabulary: File of the tokenizer of the targets.
        features: File of the front end and the normalization of a model that reads samples.
        labels: File of the labels of a classifier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vocabulary, self.target_vocabulary = path / "vocabulary.json", path / "vocabulary.target.json"
        self.features, self.labels = path / "features.json", path / "labels.json"
        self._pointers = path / "run.json"

    def exists(self) -> bool:
        """Return whether a checkpoint has been saved here."""
        return self._pointers.exists()

    def checkpoint(self, which: str) -> Checkpoint:
        """Find a checkpoint.

        Args:
            which: "last" or "best".

        Raises:
            CommandError: There is no checkpoint, or its description is damaged.
        """
        if not self.path.is_dir():
            raise CommandError(f"{self.path}: no such run directory")
        if not self.exists():
            raise CommandError(f"{self.path}: holds no checkpoint (run.json is missing)")
        name = read_json(self._pointers, RUN).get(which)
        if not isinstance(name, str) or name != Path(name).name:
            raise CommandError(f"{self._pointers}: damaged: {which} must name a checkpoint, got {name!r}")
        path = self.path / name
        config = read_json(path / "config.json", CHECKPOINT)
        for key, kind in (("step", int), ("model", dict), ("files", dict), ("training", dict)):
            if not isinstance(config.get(key), kind):
                raise CommandError(f"{path / 'config.json'}: damaged: no {key} in it")
        return Checkpoint(path, config["step"], config)

    def load_language_model(self, which: str) -> tuple[LLM, Tokenizer]:
        """Load the model of a checkpoint, in evaluation mode, and its tokenizer.

        Args:
            which: "last" or "best".

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is of another task.
        """
        checkpoint = self.checkpoint(which)
        checkpoint.check_task("lm")
        model = checkpoint.model()
        assert isinstance(model, LLM)
        return model.eval(), load_tokenizer(self.vocabulary, model.vocab_size)

    def tokenizers(self, model: Seq2Seq) -> tuple[Tokenizer, Tokenizer]:
        """Load the tokenizers of a translator: source and target, possibly the same.

        Raises:
            CommandError: A file is missing, damaged, or does not fit the model.
        """
        assert model.source_vocab_size is not None
        # The model has one more id, the end of a line.
        source = load_tokenizer(self.vocabulary, model.source_vocab_size - 1)
        if model.config()["share_embedding"]:
            return source, source
        return source, load_tokenizer(self.target_vocabulary, model.target_vocab_size - 1)

    def feature_reader(self, model: Seq2Seq | SequenceClassifier) -> FeatureReader:
        """Load the reader of the samples of a classifier or transcriber.

        Raises:
            CommandError: A file is missing, damaged, or does not fit the model.
        """
        tokenizer = None
        if isinstance(model, SequenceClassifier) and model.vocab_size is not None:
            tokenizer = load_tokenizer(self.vocabulary, model.vocab_size)
        reader = FeatureReader.load(self.features, tokenizer)
        size = model.feature_dim if isinstance(model, SequenceClassifier) else model.source_feature_dim
        if size != (None if reader.mean is None else len(reader.mean)):
            raise CommandError(f"{self.features}: does not fit the model, which reads {size} features")
        return reader

    def transcript_tokenizer(self, model: Seq2Seq | SequenceClassifier) -> Tokenizer:
        """Load the tokenizer of a transcriber; its head has one more row, the end of a text or the blank of CTC.

        Raises:
            CommandError: The file is missing, damaged, or does not fit the model.
        """
        return load_tokenizer(self.vocabulary, model.head.out_features - 1)

    def vocabularies(self, model: Model, task: str) -> tuple[Vocabulary, ...]:
        """Load the names of the rows of the model's embeddings, first, and of its head, last.

        Raises:
            CommandError: A file is missing, damaged, or does not fit the model.
        """
        if isinstance(model, LLM):
            return (load_tokenizer(self.vocabulary, model.vocab_size),)
        if task in ("translate", "summarize"):
            assert isinstance(model, Seq2Seq)
            return self.tokenizers(model)
        reader = self.feature_reader(model)  # reports an error if it does not fit the model
        if task == "transcribe":
            return (self.transcript_tokenizer(model),)
        labels = load_labels(self.labels, model.head.out_features)
        return (labels,) if reader.tokenizer is None else (reader.tokenizer, labels)

    def save(
        self,
        step: int,
        model: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        training: Mapping[str, Any],
        state: Mapping[str, Tensor],
        best: bool,
        task: str = "lm",
    ) -> None:
        """Save a checkpoint as the last one, and as the best one if `best`.

        Args:
            step: Step of the training.
            model: Arguments of the model's class.
            weights: Parameters of the model.
            training: JSON values needed to continue.
            state: Tensors needed to continue.
            best: Whether this is the best model so far.
            task: The task of the model, one of `MODELS`.

        Raises:
            OSError: The checkpoint could not be written; earlier ones are unchanged.
        """
        pointers = read_json(self._pointers, RUN) if self.exists() else {}
        self._remove_unnamed(pointers)
        name = f"step-{step}"
        while (self.path / name).exists():
            name += "-again"
        unfinished = self.path / f".{name}.unfinished"
        unfinished.mkdir()
        try:
            files = {WEIGHTS: _write(unfinished / WEIGHTS, weights), STATE: _write(unfinished / STATE, state)}
            config = {"format": CHECKPOINT, "version": 1, "step": step, "task": task, "model": dict(model)}
            write_json(unfinished / "config.json", {**config, "training": dict(training), "files": files})
            os.rename(unfinished, self.path / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_directory(self.path)
        pointers = {"last": name, "best": name if best else pointers.get("best", name)}
        write_json(self._pointers, {"format": RUN, "version": 1, **pointers})
        self._remove_unnamed(pointers)

    def _remove_unnamed(self, pointers: Mapping[str, Any]) -> None:
        """Remove checkpoints that `pointers` does not name: replaced ones, and those a kill left unfinished."""
        keep = {pointers.get("last"), pointers.get("best")}
        for pattern in ("step-*", ".*.unfinished"):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def saved_tensor(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return one of the tensors of a file after a check of its shape and of its dtype.

    Raises:
        ValueError: The tensor is missing, or has another shape or dtype.
    """
    tensor = tensors.get(name)
    expected = f"{dtype} {list(shape)}".removeprefix("torch.")
    if tensor is None:
        raise ValueError(f"expected {name} of {expected}, got none")
    if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
        got = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise ValueError(f"{name} must be {expected}, got {got}")
    return tensor


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file, flush it to the disk, and return its checksum."""
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
