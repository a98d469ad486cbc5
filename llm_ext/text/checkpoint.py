"""Checkpoints: saved so that a kill at any moment, or a full disk, leaves the last one whole.

A run directory holds `vocabulary.json`, one directory for each checkpoint kept, and `run.json`, which names
the last and the best of them. A new checkpoint is written in full under a name of its own. Replacing
`run.json` is the one moment at which it becomes the last; the ones no longer named go after that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from llm_ext.model import LLM
from llm_ext.seq2seq import Seq2Seq
from llm_ext.text import tokens as vocabulary
from llm_ext.text.errors import TextError
from llm_ext.text.files import read_json, sync_directory, write_json

RUN = "llm_ext run"
CHECKPOINT = "llm_ext checkpoint"
WEIGHTS, STATE = "model.safetensors", "state.safetensors"
MODELS: dict[str, Callable[..., LLM | Seq2Seq]] = {"lm": LLM, "translate": Seq2Seq}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on the disk.

    path: its directory.
    step: of the training at which it was saved.
    config: what its `config.json` holds.
    """

    path: Path
    step: int
    config: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of its files.

        Raises:
            TextError: it is missing, damaged, or not the one that was saved.
        """
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise TextError(f"{path}: missing; the checkpoint is not whole") from None
        if hashlib.sha256(data).hexdigest() != self.config["files"].get(name):
            raise TextError(f"{path}: damaged, or not the file that was saved here (its checksum differs)")
        try:
            return load_tensors(data)
        except SafetensorError as error:
            raise TextError(f"{path}: expected safetensors, got something else ({error})") from None

    @property
    def task(self) -> str:
        """What the model was trained for; those saved before there was a choice are language models."""
        return str(self.config.get("task", "lm"))

    def model(self) -> LLM | Seq2Seq:
        """Build the model and fill in its weights.

        Raises:
            TextError: the files are damaged or do not fit each other.
        """
        weights = self.tensors(WEIGHTS)
        try:
            model = MODELS[self.task](**self.config["model"]).to(next(iter(weights.values())).dtype)
            # Not strictly: weights that stand in two places are saved once.
            _, unknown = model.load_state_dict(weights, strict=False)
            names = {name for name, _ in model.named_parameters()}
            if missing := sorted(names - weights.keys()) + unknown:
                raise ValueError(f"only one of them has {', '.join(missing)}")
        except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
            raise TextError(f"{self.path}: the weights do not fit the configuration: {error}") from None
        return model


class Run:
    """The checkpoints of a run directory.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of a translator with two vocabularies, that of the sources.
        self.vocabulary, self.target_vocabulary = path / "vocabulary.json", path / "vocabulary.target.json"
        self._pointers = path / "run.json"

    def exists(self) -> bool:
        """Whether anything has been saved here."""
        return self._pointers.exists()

    def checkpoint(self, which: str) -> Checkpoint:
        """Find the "last" or the "best" checkpoint.

        Raises:
            TextError: there is none, or its description is damaged.
        """
        if not self.path.is_dir():
            raise TextError(f"{self.path}: no such run directory")
        if not self.exists():
            raise TextError(f"{self.path}: holds no checkpoint (run.json is missing)")
        name = read_json(self._pointers, RUN).get(which)
        if not isinstance(name, str) or name != Path(name).name:
            raise TextError(f"{self._pointers}: damaged: {which} must name a checkpoint, got {name!r}")
        path = self.path / name
        config = read_json(path / "config.json", CHECKPOINT)
        for key, kind in (("step", int), ("model", dict), ("files", dict), ("training", dict)):
            if not isinstance(config.get(key), kind):
                raise TextError(f"{path / 'config.json'}: damaged: no {key} in it")
        return Checkpoint(path, config["step"], config)

    def load(self, which: str) -> tuple[LLM, vocabulary.Tokens]:
        """Build the model of a checkpoint, in evaluation mode, and its vocabulary.

        Raises:
            TextError: something is missing, damaged, does not fit, or is not of a language model.
        """
        model = self.checkpoint(which).model()
        if not isinstance(model, LLM):
            raise TextError(f"{self.path}: holds a translator, not a language model; llm-ext translate uses it")
        (tokens,) = self.vocabularies(model)
        return model.eval(), tokens

    def vocabularies(self, model: LLM | Seq2Seq) -> tuple[vocabulary.Tokens, ...]:
        """Read the vocabulary of a model, or those of its source and its target, which may be the same.

        Raises:
            TextError: a file is missing, damaged, or does not fit the model.
        """
        if isinstance(model, LLM):
            return (vocabulary.load(self.vocabulary, model.vocab_size),)
        # The ends of lines have an id beyond the vocabulary's.
        source = vocabulary.load(self.vocabulary, model.source_vocab_size - 1)
        if model.config()["share_embedding"]:
            return source, source
        return source, vocabulary.load(self.target_vocabulary, model.target_vocab_size - 1)

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
        """Save a checkpoint and make it the last one, and the best one as well if `best`.

        Args:
            step: of the training.
            model: arguments of `LLM` or `Seq2Seq`.
            weights: of the model.
            training: what else is needed to continue, of JSON types.
            state: what else is needed to continue, in tensors.
            best: whether this is the best model so far.
            task: what the model is trained for.

        Raises:
            OSError: it could not be written; what was saved before is untouched.
        """
        pointers = read_json(self._pointers, RUN) if self.exists() else {}
        self._clean(pointers)
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
        self._clean(pointers)

    def _clean(self, pointers: Mapping[str, Any]) -> None:
        """Remove checkpoints that nothing names: replaced ones, and those a kill left unfinished."""
        keep = {pointers.get("last"), pointers.get("best")}
        for pattern in ("step-*", ".*.unfinished"):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file, down to the disk, and return its checksum."""
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
