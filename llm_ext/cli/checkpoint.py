"""Run directories: tokenizers and checkpoints, saved so that a kill or a full disk never damages the last one.

A run directory holds `vocabulary.json`, one directory for each checkpoint, and `run.json`, which names the last and the
best checkpoint. A new checkpoint is written completely under a new name; replacing `run.json` makes it the last one;
checkpoints that are no longer named are removed after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from llm_ext.cli.data.features import FeatureReader
from llm_ext.cli.data.files import atomic_write, check_file, lock_directory, read_json, sync_directory, write_json
from llm_ext.cli.data.labels import Labels, load_labels
from llm_ext.cli.data.tokenizer import Tokenizer, load_tokenizer
from llm_ext.cli.errors import CommandError
from llm_ext.models import LLM, Seq2Seq, SequenceClassifier

__all__ = ["STATE", "WEIGHTS", "Checkpoint", "Layout", "Model", "Run", "Vocabulary"]

Model = LLM | Seq2Seq | SequenceClassifier
T = TypeVar("T")
# Names of the rows of an embedding or of a head.
Vocabulary = Tokenizer | Labels

RUN = "llm_ext run"
CHECKPOINT = "llm_ext checkpoint"
WEIGHTS, STATE = "model.safetensors", "state.safetensors"
# The names that `Run.save` gives to checkpoints.
NAME = re.compile(r"step-\d+(-again)*", re.ASCII)
# The dtypes of tensors, as safetensors calls them.
DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


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


class Layout(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: list[int]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}".removeprefix("torch.")


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

    def layout(self, name: str) -> dict[str, Layout]:
        """Read the header of one of its files, `WEIGHTS` or `STATE`: names, shapes and dtypes.

        Raises:
            CommandError: The file is missing, or has no such header.
        """
        path = self.path / name
        check_file(path, "a part of the checkpoint")
        try:
            # By its descriptor, because the library takes paths of UTF-8 only.
            with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
                return {name: Layout(part.get_shape(), DTYPES[part.get_dtype()]) for name, part in parts.items()}
        except (KeyError, OSError, SafetensorError) as error:
            raise CommandError(f"{path}: damaged: expected safetensors, got something else ({error})") from None

    def tensors(self, name: str, expected: Mapping[str, Layout] | None = None) -> dict[str, Tensor]:
        """Read one of its files, `WEIGHTS` or `STATE`.

        Args:
            name: The file.
            expected: What it must hold, which its header is compared with before its tensors are read.

        Raises:
            CommandError: The file is missing, damaged, or not the one that was saved.
        """
        path = self.path / name
        if expected is not None:
            found = self.layout(name)
            for key in sorted(expected.keys() | found.keys()):
                if expected.get(key) != found.get(key):
                    needed, got = (each.get(key, "none") for each in (expected, found))
                    raise CommandError(f"{path}: damaged: {key} must be {needed}, got {got}")
        check_file(path, "a part of the checkpoint")
        data = path.read_bytes()
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

    def limit(self, name: str) -> int | None:
        """Return a limit that the training has recorded, in tokens, or None.

        Raises:
            CommandError: It is not a positive integer.
        """
        value = self.config["training"].get(name)
        if value is not None and not (type(value) is int and value >= 1):
            raise CommandError(f"{self.path / 'config.json'}: damaged: {name} must be at least 1, got {value!r}")
        return value

    def check_task(self, *tasks: str) -> None:
        """Raise a CommandError that names the right command unless the task is one of `tasks`."""
        if self.task not in tasks and self.task in COMMANDS:
            holds, command = COMMANDS[self.task]
            expected = " or ".join(COMMANDS[task][0] for task in tasks)
            raise CommandError(f"{self.path.parent}: holds {holds}, not {expected}; use it with llm-ext {command}")

    def model(self) -> Model:
        """Build the model and load its weights.

        The shapes in the header of the file are compared with those of the model before any memory is allocated, so
        that no configuration, even a hostile one, costs more than its file does.

        Raises:
            CommandError: The files are damaged or do not match.
        """
        found = self.layout(WEIGHTS)
        dtypes = {each.dtype for each in found.values()}
        try:
            if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64, torch.bfloat16, torch.float16}:
                raise ValueError(
                    f"they must be of one floating-point type, got {', '.join(map(str, dtypes)) or 'none'}"
                )
            if (layers := self.config["model"].get("n_layers", 1)) > len(found):
                raise ValueError(f"there are {len(found)} of them for {layers} layers")
            with torch.device("meta"):  # initial weights would take longer than to load the saved ones
                # An argument as well, so that the file cannot name another device.
                model = MODELS[self.task](**self.config["model"], device="meta")
            expected = {name: list(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
            # Tied weights are saved once.
            needed = {name for name, _ in model.named_parameters()}
            if different := sorted(needed - found.keys()) + sorted(found.keys() - expected.keys()):
                raise ValueError(f"only one of them has {', '.join(different)}")
            for name, layout in found.items():
                if layout.shape != expected[name]:
                    raise ValueError(f"{name} is {layout.shape}, but the configuration has {expected[name]}")
        except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]  # some errors of torch have a trace of the calls in C++
            raise CommandError(f"{self.path}: the weights do not fit the configuration: {reason}") from None
        weights = self.tensors(WEIGHTS)
        loaded = {each: nn.Parameter(weights[name].clone()) for name, each in model.named_parameters()}
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                setattr(module, name, loaded[parameter])
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

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here; the system ends the lock with the process, however that ends.

        Raises:
            CommandError: Another process trains here.
        """
        owner = self.path / ".lock.owner"
        try:
            lock = lock_directory(self.path, wait=False)
        except Timeout:
            who = owner.read_text(errors="replace") if owner.is_file() else "unknown"
            raise CommandError(f"{self.path}: another process trains here ({who}); choose another --out") from None
        with lock:
            with atomic_write(owner) as file:
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield

    def checkpoint(self, which: str) -> Checkpoint:
        """Find a checkpoint.

        Args:
            which: "last" or "best".

        Raises:
            CommandError: There is no checkpoint, or its description is damaged.
        """
        return self._read(which, self._open)

    def load(self, which: str, *tasks: str) -> tuple[Checkpoint, Model]:
        """Find a checkpoint and load its model, in evaluation mode.

        Args:
            which: "last" or "best".
            tasks: Tasks that the model may have; by default any.

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is of another task.
        """

        def load(name: str) -> tuple[Checkpoint, Model]:
            checkpoint = self._open(name)
            checkpoint.check_task(*(tasks or MODELS))
            return checkpoint, checkpoint.model().eval()

        return self._read(which, load)

    def _read(self, which: str, read: Callable[[str], T]) -> T:
        """Call `read` with the name of a checkpoint; once more if a training has replaced the checkpoint meanwhile."""
        while True:
            name = self._name(which)
            try:
                return read(name)
            except (CommandError, FileNotFoundError):
                if self._name(which) == name:
                    raise

    def _name(self, which: str) -> str:
        if not self.path.is_dir():
            raise CommandError(f"{self.path}: no such run directory")
        if not self.exists():
            raise CommandError(f"{self.path}: holds no checkpoint (run.json is missing)")
        name = read_json(self._pointers, RUN).get(which)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CommandError(f"{self._pointers}: damaged: {which} must name a checkpoint, got {name!r}")
        return name

    def _open(self, name: str) -> Checkpoint:
        path = self.path / name
        config = read_json(path / "config.json", CHECKPOINT)
        for key, kind in (("step", int), ("model", dict), ("files", dict), ("training", dict)):
            if not isinstance(config.get(key), kind):
                raise CommandError(f"{path / 'config.json'}: damaged: no {key} in it")
        if config.get("task", "lm") not in [*MODELS]:  # a list, because the file may have any type here
            raise CommandError(f"{path / 'config.json'}: damaged: no task is called {config['task']!r}")
        return Checkpoint(path, config["step"], config)

    def load_language_model(self, which: str) -> tuple[LLM, Tokenizer]:
        """Load the model of a checkpoint, in evaluation mode, and its tokenizer.

        Args:
            which: "last" or "best".

        Raises:
            CommandError: A file is missing, damaged, or does not match, or the model is of another task.
        """
        _, model = self.load(which, "lm")
        assert isinstance(model, LLM)
        return model, load_tokenizer(self.vocabulary, model.vocab_size)

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
        rehearsal: bool = False,
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
            rehearsal: Write all of it, then remove it, to find before a training what would keep it from being saved.

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
            if not rehearsal:
                os.rename(unfinished, self.path / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if rehearsal:
            return
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


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file, flush it to the disk, and return its checksum."""
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
