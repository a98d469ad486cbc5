"""Files of any kind as sequences of vectors, encoded once into a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llm_ext.cli.data.audio import log_mel, sample_rate
from llm_ext.cli.data.cache import is_whole, write_cache
from llm_ext.cli.data.files import encode_name, read_json, write_json
from llm_ext.cli.data.images import image_size, image_vectors, read_image, video_frames, video_size
from llm_ext.cli.data.samples import KINDS, Sample
from llm_ext.cli.data.splits import Indices
from llm_ext.cli.data.tokenizer import Tokenizer
from llm_ext.cli.errors import CommandError

__all__ = ["EncodedSamples", "FeatureReader", "FrontEnd", "encode_samples"]

FORMAT = "llm_ext features"
# Pixels of the largest image or frame: 8,192 x 8,192.
LARGEST_IMAGE = 1 << 26

Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class FrontEnd:
    """How a file becomes a sequence of vectors.

    Attributes:
        kind: One of `KINDS` of the module samples.
        rate: Audio: samples per second to resample to; None: those of the first file.
        mels: Audio: bands of the mel scale.
        size: Images and video: height and width to resize to; None: those of the first file.
        patch: Images: height and width of a patch; 0: rows.
        colour: Images and video: three numbers per pixel in place of one.
        stack: Consecutive vectors that are joined into one.
        center: Subtract from each feature its mean over the sample.
    """

    kind: str
    rate: int | None = None
    mels: int = 40
    size: tuple[int, int] | None = None
    patch: int = 0
    colour: bool = False
    stack: int = 1
    center: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        size = (1, 1) if self.size is None else self.size
        if len(size) != 2 or min(size) < 1 or math.prod(size) > LARGEST_IMAGE:
            raise ValueError(f"size must be H, W with at most {LARGEST_IMAGE:,} pixels, got {self.size}")
        rate = 100 if self.rate is None else self.rate
        for name, value, least, most in (
            ("rate", rate, 1, 1 << 20),
            ("mels", self.mels, 2, 1000),
            ("patch", self.patch, 0, 1 << 13),
            ("stack", self.stack, 1, 1 << 20),
        ):
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value!r}")

    def fitted(self, first: Sample) -> FrontEnd:
        """Return the front end with rate or size of the first file where they are None; of an `.npz` file for arrays.

        Raises:
            CommandError: The file cannot be read, or patches do not divide the size.
        """
        if not isinstance(first.data, Path):
            return self if self.kind == "text" else replace(self, kind="array")
        if self.kind == "audio" and self.rate is None:
            return replace(self, rate=sample_rate(first.data))
        size = self.size
        if size is None and self.kind in ("image", "video"):
            size = (image_size if self.kind == "image" else video_size)(first.data)
        if self.kind == "image" and size is not None and self.patch and (size[0] % self.patch or size[1] % self.patch):
            raise CommandError(f"{first.name}: patches of {self.patch} do not divide images of {size[0]} x {size[1]}")
        return replace(self, size=size)

    def read(self, sample: Sample) -> Rows:
        """Return the features of a sample, ``[S, F]`` float32.

        Raises:
            CommandError: The file cannot be read, or has features that are not finite.
        """
        data = sample.data
        if not isinstance(data, Path):
            rows = np.asarray(data)
        elif self.kind == "audio":
            assert self.rate is not None
            rows = log_mel(data, self.rate, self.mels)
        elif self.kind == "image":
            rows = image_vectors(read_image(data, self.size, self.colour), self.patch)
        elif self.kind == "video":
            assert self.size is not None
            rows = video_frames(data, self.size, self.colour)
        else:
            rows = _read_array(data)
        if rows.ndim != 2 or not len(rows) or not np.issubdtype(rows.dtype, np.number):
            raise CommandError(
                f"{sample.name}: expected numbers [S, F] with S > 0, got {rows.dtype} {list(rows.shape)}"
            )
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            step = int(np.argmin(finite))
            raise CommandError(f"{sample.name}: features must be finite, got {rows[step].min()} in row {step + 1}")
        rows = rows.astype(np.float32)
        return _stack(rows - rows.mean(0) if self.center else rows, self.stack)

    def layout(self, feature_dim: int) -> tuple[int, int, int]:
        """Return the layout of a vector of F numbers: rows × width × channels."""
        width = {"audio": self.mels, "image": self.patch}.get(self.kind, 0)
        if not width:
            width = feature_dim // self.stack if self.size is None else self.size[1]
        channels = 3 if self.colour and self.size is not None else 1
        return feature_dim // (width * channels), width, channels


def _read_array(path: Path) -> Rows:
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CommandError(f"{path}: expected an array of numpy, got something else ({error})") from None
    if not isinstance(rows, np.ndarray):
        raise CommandError(f"{path}: expected one array (.npy), got an archive")
    return rows


def _stack(rows: Rows, count: int) -> Rows:
    """Join `count` consecutive vectors into one; the last one is completed with copies of the last vector."""
    if count == 1:
        return rows
    padded = np.concatenate((rows, np.repeat(rows[-1:], -len(rows) % count, 0)))
    return padded.reshape(-1, count * rows.shape[1])


@dataclass(frozen=True)
class FeatureReader:
    """Reads samples as the model does: a front end, and the normalization learned on the training samples.

    Attributes:
        front_end: From a file to vectors.
        mean: Mean of each feature over the training samples, ``[F]``; of text None.
        std: Standard deviation of each feature, ``[F]``; of text None.
        tokenizer: Of kind "text" the tokenizer, else None.
    """

    front_end: FrontEnd
    mean: Tensor | None = None
    std: Tensor | None = None
    tokenizer: Tokenizer | None = None

    def read(self, sample: Sample) -> Rows:
        """Return what `pad` takes: features ``[S, F]``, or of text the ids ``[S, 1]``.

        Raises:
            CommandError: The sample cannot be read, or its features do not have the size of the training samples.
        """
        if self.tokenizer is not None:
            return _read_text(sample, self.tokenizer)
        rows = self.front_end.read(sample)
        if self.mean is not None and rows.shape[1] != len(self.mean):
            raise CommandError(f"{sample.name}: has {rows.shape[1]} features, but the training had {len(self.mean)}")
        return rows

    def pad(self, sequences: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        """Put sequences side by side.

        Args:
            sequences: Results of `read`.

        Returns:
            Normalized features ``[B, S, F]`` float32, or ids ``[B, S]`` int64, with 0 as padding; and lengths ``[B]``.
        """
        lengths = torch.tensor([len(rows) for rows in sequences], dtype=torch.int64)
        if self.tokenizer is not None:
            tensors = [torch.from_numpy(rows[:, 0].astype(np.int64)) for rows in sequences]
        else:
            assert self.mean is not None
            assert self.std is not None
            tensors = [(torch.from_numpy(np.array(rows)) - self.mean) / self.std for rows in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths

    def save(self, path: Path) -> None:
        """Write front end and normalization as JSON; the tokenizer has a file of its own."""
        mean, std = (None if each is None else each.tolist() for each in (self.mean, self.std))
        value = {"format": FORMAT, "version": 1, "front_end": asdict(self.front_end), "mean": mean, "std": std}
        write_json(path, value)

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer | None) -> FeatureReader:
        """Read what `save` wrote.

        Raises:
            CommandError: The file is missing or damaged.
        """
        value = read_json(path, FORMAT)
        try:
            options = value["front_end"]
            front_end = FrontEnd(**{**options, "size": None if options["size"] is None else tuple(options["size"])})
            mean, std = (
                None if value[name] is None else torch.tensor(value[name], dtype=torch.float32)
                for name in ("mean", "std")
            )
            if (mean is None) != (front_end.kind == "text") or (mean is None) != (std is None):
                raise ValueError("mean and std must be given for all kinds but text")
            if mean is not None and std is not None:
                if mean.dim() != 1 or mean.shape != std.shape:
                    raise ValueError(f"mean and std must be [F], got {list(mean.shape)} and {list(std.shape)}")
                if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
                    raise ValueError("mean and std must be finite, and std above 0")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CommandError(f"{path}: damaged: {error}") from None
        return cls(front_end, mean, std, tokenizer if front_end.kind == "text" else None)


def _read_text(sample: Sample, tokenizer: Tokenizer) -> Rows:
    """Return the ids of a sample of kind "text", ``[S, 1]``.

    Raises:
        CommandError: The text is empty, or has characters that the vocabulary lacks.
    """
    try:
        ids = tokenizer.encode(str(sample.data))
    except CommandError as error:
        raise CommandError(f"{sample.name}: {error}") from None
    if not ids.size:
        raise CommandError(f"{sample.name}: expected a text, got an empty one")
    return ids.astype(np.int32)[:, None]


class EncodedSamples:
    """The features of samples in a memory-mapped file.

    Args:
        path: The file, as `encode_samples` wrote it; the lengths are in a file with the suffix `.lengths`.
        dtype: Type of one number.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        table = np.fromfile(path.with_suffix(".lengths"), dtype=np.int64)
        self.feature_dim, self.lengths = int(table[0]), table[1:]
        self._begins = np.concatenate(([0], np.cumsum(self.lengths)))
        self._rows = np.memmap(path, dtype=dtype, mode="r").reshape(-1, self.feature_dim)

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: int) -> Rows:
        """Return the features of a sample, ``[S, F]``."""
        return self._rows[self._begins[index] : self._begins[index + 1]]

    def normalization(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each feature over some samples, both ``[F]`` float32."""
        count, total, squares = 0, np.zeros(self.feature_dim), np.zeros(self.feature_dim)
        for index in indices.tolist():
            rows = self.rows(index).astype(np.float64)
            count, total, squares = count + len(rows), total + rows.sum(0), squares + (rows * rows).sum(0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean * mean, 0))
        # A feature that hardly varies, such as a pixel that is always black, must not be magnified.
        std = np.maximum(std, max(1e-2 * float(std.max()), 1e-6))
        return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32))

    def fingerprint(self) -> str:
        """Return a hash of the lengths and of 64 samples of the features, to detect changed files."""
        sha = hashlib.sha256(self.lengths.tobytes())
        for start in np.linspace(0, len(self._rows), num=64, endpoint=False).astype(np.int64).tolist():
            sha.update(self._rows[start : start + 4].tobytes())
        return sha.hexdigest()


def encode_samples(samples: Sequence[Sample], reader: FeatureReader, cache: Path) -> EncodedSamples:
    """Encode samples, or open those of an earlier call.

    Args:
        samples: The samples.
        reader: Reads them; its normalization is not applied.
        cache: Directory of encoded samples. The name of a file depends on the front end, and on path, size and
            modification time of each sample.

    Raises:
        CommandError: A sample cannot be read, or has another number of features than the first one.
    """
    dtype = np.dtype(np.float32 if reader.tokenizer is None else np.int32)
    sha = hashlib.sha256(json.dumps(asdict(reader.front_end)).encode())
    if reader.tokenizer is not None:
        sha.update(json.dumps([reader.tokenizer.kind, reader.tokenizer.contents()]).encode())
    for sample in samples:
        if isinstance(sample.data, Path):
            status = sample.data.stat()
            sha.update(encode_name(f"{sample.data.resolve()} {status.st_size} {status.st_mtime_ns}\n"))
        elif isinstance(sample.data, str):
            sha.update(f"{sample.data}\n".encode())
        else:
            sha.update(np.ascontiguousarray(sample.data).tobytes())
    path = cache / f"{sha.hexdigest()[:16]}.{dtype.name}"
    if not is_whole(path, path.with_suffix(".lengths")):
        lengths: list[int] = []
        bar = tqdm(samples, desc="encoding", unit=" samples", disable=None, delay=1, leave=False)
        with bar, write_cache(path, path.with_suffix(".lengths")) as (file, lengths_file):
            size = 0
            for sample in bar:
                rows = reader.read(sample)
                size = size or rows.shape[1]
                if rows.shape[1] != size:  # rows of a manifest or of arrays may differ in width
                    raise CommandError(f"{sample.name}: has {rows.shape[1]} features, but {samples[0].name} has {size}")
                file.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())
                lengths.append(len(rows))
            lengths_file.write(np.array([size, *lengths], dtype=np.int64).tobytes())
    return EncodedSamples(path, dtype)
