"""Samples to classify or to transcribe: files of sound, images, video or arrays, with a label or a text."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_ext.cli.data.files import read_lines
from llm_ext.cli.errors import CommandError

__all__ = ["KINDS", "Sample", "read_samples"]

KINDS = ("audio", "image", "video", "array", "text")


@dataclass(frozen=True)
class Sample:
    """A sequence, and what is to be said about it.

    Attributes:
        name: File, or file and row, for messages and results.
        data: A file; the text itself of kind "text"; or features ``[S, F]`` of an `.npz` file.
        target: Its label or its text; None if unknown.
        columns: Further columns of the manifest.
        key: File relative to the manifest or directory, or number of the line or row. It does not change if the data
            are moved or named by another path.
    """

    name: str
    data: Path | str | npt.NDArray[Any]
    target: str | None
    columns: Mapping[str, str] = field(default_factory=dict)
    key: str = ""


def read_samples(path: Path, kind: str, target: str, need_target: bool = True) -> list[Sample]:
    """List samples.

    Args:
        path: One of these:

            - a manifest, `.tsv`: a line of column names, then a line for each sample, tab-separated. The column `file`
              is a path relative to the manifest; of kind "text", the column `text` is the text itself.
            - an `.npz` file with the array `x`, ``[N, S, F]`` or the rows of all samples ``[N S, F]``, the array
              `lengths` ``[N]`` (optional in the first case), and an array ``[N]`` for each further column.
            - a directory: its files, each labelled by the name of its subdirectory. The text of a file to transcribe is
              in a file of the same name that ends in `.txt`.
            - with ``need_target=False``, any other file: a sample without a target.
        kind: One of `KINDS`.
        target: Column of the target: "label" or "text".
        need_target: Whether every sample must have a target.

    Raises:
        CommandError: The samples cannot be listed.
    """
    if not path.exists():
        raise CommandError(f"{path}: no such file")
    if path.is_dir():
        samples = list(_in_directory(path, target))
    elif path.suffix == ".tsv":
        samples = list(_in_manifest(path, kind, target))
    elif path.suffix == ".npz":
        samples = list(_in_arrays(path, target))
    elif not need_target:
        samples = [Sample(str(path), path, None)]
    else:
        raise CommandError(f"{path}: expected a manifest (.tsv), arrays (.npz) or a directory")
    if not samples:
        raise CommandError(f"{path}: expected at least one sample, got none")
    if need_target:
        for sample in samples:
            if not sample.target:
                raise CommandError(f"{sample.name}: expected a {target}, got none")
    return samples


def _in_manifest(path: Path, kind: str, target: str) -> Iterator[Sample]:
    names: list[str] = []
    source = "text" if kind == "text" else "file"
    for number, line in read_lines(path):
        values = [value.strip() for value in line.split("\t")]
        if not names:
            names = values
            if source not in names:
                found = ", ".join(map(repr, names[:4]))
                raise CommandError(
                    f"{path}: line 1: expected the names of the columns, {source} and {target}, got {found}"
                )
            continue
        if not line.strip():
            continue
        if len(values) != len(names):
            raise CommandError(f"{path}: line {number}: expected {len(names)} columns, got {len(values)}")
        columns = dict(zip(names, values, strict=True))
        where, found_target = f"{path}: line {number}", columns.pop(target, None)
        if kind == "text":
            yield Sample(where, columns.pop("text"), found_target, columns, str(number))
            continue
        relative = columns.pop("file")
        file = path.parent / relative
        if not file.is_file():
            raise CommandError(f"{where}: {file}: no such file")
        yield Sample(str(file), file, found_target, columns, relative)


def _in_directory(path: Path, target: str) -> Iterator[Sample]:
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        key = str(file.relative_to(path))
        if target == "label":
            yield Sample(str(file), file, None if file.parent == path else file.parent.name, key=key)
        elif file.suffix != ".txt":
            text = file.with_suffix(".txt")
            lines = [line.strip() for _, line in read_lines(text)] if text.is_file() else []
            yield Sample(str(file), file, " ".join(filter(None, lines)) or None, key=key)


def _in_arrays(path: Path, target: str) -> Iterator[Sample]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CommandError(f"{path}: expected arrays of numpy, got something else ({error})") from None
    x, lengths = arrays.pop("x", None), arrays.pop("lengths", None)
    if x is None or x.ndim not in (2, 3) or (x.ndim == 2 and lengths is None):
        found = "none" if x is None else list(x.shape)
        raise CommandError(f"{path}: expected an array x of [N, S, F], or [N S, F] with lengths [N], got {found}")
    lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
    begins = np.concatenate(([0], np.cumsum(lengths)))
    if x.ndim == 2 and begins[-1] != len(x):
        raise CommandError(f"{path}: the lengths sum to {begins[-1]}, but x has {len(x)} rows")
    for name, values in arrays.items():
        if values.shape != lengths.shape:
            shape = list(values.shape)
            raise CommandError(f"{path}: {name} must have a value for each of {len(lengths)} samples, got {shape}")
    for row, length in enumerate(lengths.tolist()):
        data = x[row, :length] if x.ndim == 3 else x[begins[row] : begins[row + 1]]
        columns = {name: str(values[row]) for name, values in arrays.items()}
        yield Sample(f"{path}: row {row + 1}", data, columns.pop(target, None), columns, str(row + 1))
