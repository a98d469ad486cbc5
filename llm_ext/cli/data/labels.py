"""The labels of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_ext.cli.data.files import encode_name, read_json, write_json
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.errors import CommandError

__all__ = ["Labels", "load_labels"]

FORMAT = "llm_ext labels"


class Labels:
    """Maps labels to classes 0 .. size - 1, in alphabetical order.

    Args:
        names: The labels.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        self._classes = {name: number for number, name in enumerate(self.names)}

    @property
    def size(self) -> int:
        """C, the number of classes."""
        return len(self.names)

    @property
    def pieces(self) -> Sequence[bytes]:
        """The label of each class in UTF-8, by which `initialize_from` matches the rows of two heads."""
        return [encode_name(name) for name in self.names]

    def encode(self, samples: Iterable[Sample]) -> list[int]:
        """Return the class of each sample.

        Raises:
            CommandError: A sample has a label that is not among these.
        """
        classes = []
        for sample in samples:
            number = self._classes.get(str(sample.target))
            if number is None:
                shown = ", ".join(self.names[:10]) + (", …" if self.size > 10 else "")
                raise CommandError(f"{sample.name}: the label {sample.target!r} is not among those known: {shown}")
            classes.append(number)
        return classes

    def save(self, path: Path) -> None:
        """Write the labels as JSON."""
        write_json(path, {"format": FORMAT, "version": 1, "labels": self.names})


def load_labels(path: Path, size: int | None = None) -> Labels:
    """Read labels.

    Args:
        path: The file.
        size: The number that the model has.

    Raises:
        CommandError: The file is missing, damaged, or does not fit the model.
    """
    names = read_json(path, FORMAT).get("labels")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CommandError(f"{path}: damaged: no labels in it")
    labels = Labels(names)
    if labels.names != names:
        raise CommandError(f"{path}: damaged: the labels must be in order, each once")
    if size is not None and labels.size != size:
        raise CommandError(f"{path}: has {labels.size} labels, but the model has {size} classes")
    return labels
