"""The settings of a training run: defaults, ranges and help texts."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from llm_ext.cli.data.augmentation import AUGMENTATIONS, augmentations_of
from llm_ext.cli.data.features import FrontEnd
from llm_ext.cli.data.samples import KINDS as SAMPLE_KINDS
from llm_ext.cli.data.tokenizer import KINDS
from llm_ext.models.recurrent_layers import CELLS
from llm_ext.ops.argument_checks import ELMAN_MODES

__all__ = [
    "CONFIGS",
    "ClassificationConfig",
    "Config",
    "LanguageConfig",
    "PrivateConfig",
    "SampleConfig",
    "SummaryConfig",
    "TranscriptionConfig",
    "TranslationConfig",
]

SCHEDULES = ("one-cycle", "cosine", "constant")
PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
# Parts of a model, as --freeze names them.
PARTS = ("embedding", "encoder", "attention", "decoder", "head")

DEFAULT_STEPS = 3000
# Ranges: sizes of a layer, numbers of samples or tokens, steps (whose number times a chunk fits in 64 bits), and
# numbers that float32 can hold.
LARGEST_SIZE, LARGEST_COUNT, MOST_STEPS, LARGEST_FLOAT = 1 << 20, 1 << 24, 1 << 40, 1e38


def _setting(
    default: Any,
    help: str,
    *,
    group: str,
    type: type | None = None,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    resume: bool = False,
    metavar: str | None = None,
) -> Any:
    """Return a field with the metadata of its command line option; `resume`: a resumed run may change it."""
    if (type or default.__class__) in (int, float) and (least is None or most is None):
        raise ValueError(f"a number must have a range: {help}")
    metadata = {"help": help, "group": group, "type": type or default.__class__}
    metadata |= {"least": least, "most": most, "choices": choices, "resume": resume, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def _with_default(name: str, default: Any, config: type[Config] | None = None) -> Any:
    """Return a field of `config`, by default of `Config`, with another default."""
    return dataclasses.field(default=default, metadata=(config or Config).__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Config:
    """The settings that all tasks share; the configs of the tasks add their own."""

    task: ClassVar[str]
    # The loss is the mean over these.
    unit: ClassVar[str] = "token"

    tokens: str = _setting(
        "bytes", "kind of tokens: bytes, characters, or byte pairs learned from the text", group="data", choices=KINDS
    )
    vocab_size: int = _setting(4096, "largest vocabulary of --tokens bpe", group="data", least=256, most=1 << 24)
    val_fraction: float = _setting(
        0.1,
        "without --val, fraction held out for validation: the end of the text, all pairs of some sources, or some "
        "samples or groups",
        group="data",
        least=0,
        most=0.9,
    )

    cell: str = _setting("rnn", "recurrent layer; rnn is the Elman network", group="model", choices=CELLS)
    nonlinearity: str = _setting("tanh", "nonlinearity of --cell rnn", group="model", choices=tuple(ELMAN_MODES))
    layers: int = _setting(1, "number of recurrent layers", group="model", least=1, most=1024)
    hidden: int = _setting(512, "hidden size", group="model", least=1, most=LARGEST_SIZE)
    embedding: int = _setting(128, "size of a token embedding", group="model", least=1, most=LARGEST_SIZE)
    attn_dim: int | None = _setting(
        None,
        "size of the attention space (default: size of the vectors attended to, for lm at most 128)",
        group="model",
        type=int,
        least=1,
        most=LARGEST_SIZE,
    )
    dropout: float = _setting(0.0, "dropout probability during training", group="model", least=0, most=0.99)

    init_from: str | None = _setting(
        None,
        "run directory whose best checkpoint provides initial weights, matched by token (default: none)",
        group="initialization",
        type=str,
        metavar="DIR",
    )
    init: str = _setting(
        "all", "weights to take from --init-from", group="initialization", choices=("all", "encoder", "embedding")
    )
    freeze: str = _setting(
        "",
        f"parts of the model to exclude from training, separated by commas: {', '.join(PARTS)} (default: none)",
        group="initialization",
        metavar="PARTS",
    )

    # With the defaults of batch, chunk, lr, schedule and clip an Elman network reaches 1.517 nats per character on the
    # plays of Shakespeare in 4,800 steps.
    batch: int = _setting(
        32, "streams, pairs or samples per step, those of all processes", group="training", least=1, most=LARGEST_SIZE
    )
    steps: int | None = _setting(
        None,
        f"number of steps to train (default: {DEFAULT_STEPS} without --minutes)",
        group="training",
        type=int,
        least=1,
        most=MOST_STEPS,
        resume=True,
    )
    minutes: float | None = _setting(
        None,
        "time to train; with --steps, the training ends at the earlier of both (default: no limit)",
        group="training",
        type=float,
        least=0.001,
        most=1e8,
        resume=True,
    )
    lr: float = _setting(2e-3, "peak learning rate of Adam", group="training", least=0, most=LARGEST_FLOAT)
    schedule: str = _setting(
        "one-cycle", "learning rate schedule after the warm-up", group="training", choices=SCHEDULES
    )
    warmup: float = _setting(
        0.3, "fraction of the training in which the learning rate rises", group="training", least=0, most=1
    )
    clip: float = _setting(
        1.0,
        "gradient norm above which gradients are scaled down; 0 disables clipping",
        group="training",
        least=0,
        most=LARGEST_FLOAT,
    )
    validate_every: int = _setting(
        250,
        "steps between validations; each one saves a checkpoint",
        group="training",
        least=1,
        most=MOST_STEPS,
        resume=True,
    )
    patience: int | None = _setting(
        None,
        "stop after this many validations without improvement (default: never)",
        group="training",
        type=int,
        least=1,
        most=MOST_STEPS,
        resume=True,
    )
    log_every: int = _setting(25, "steps between records of the log", group="training", least=1, most=MOST_STEPS)
    seed: int = _setting(1, "random seed of initial weights and dropout", group="training", least=0, most=(1 << 63) - 1)

    device: str = _setting(
        "auto",
        "device to train on: cpu or cuda; auto is the CPU, because GPUs are untested",
        group="hardware",
        resume=True,
    )
    devices: int = _setting(
        1, "number of devices, one process each; set by torchrun", group="hardware", least=1, most=4096, resume=True
    )
    strategy: str = _setting(
        "auto",
        "ddp: each process has the whole model; fsdp: model and optimizer are divided between processes; auto: ddp if "
        "there are several processes",
        group="hardware",
        choices=STRATEGIES,
        resume=True,
    )
    nodes: int = _setting(1, "number of machines, with torchrun", group="hardware", least=1, most=4096, resume=True)
    precision: str = _setting("32-true", "numeric precision", group="hardware", choices=PRECISIONS)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            accepted = (int, float) if meta["type"] is float else meta["type"]
            name = field.name.replace("_", "-")
            if not isinstance(value, accepted) or (isinstance(value, bool) and meta["type"] is not bool):
                raise ValueError(f"{name} must be of type {meta['type'].__name__}, got {value!r}")
            if meta["least"] is not None and not meta["least"] <= value <= meta["most"]:
                raise ValueError(f"{name} must be at least {meta['least']} and at most {meta['most']}, got {value}")
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(f"{name} must be one of {', '.join(meta['choices'])}, got {value!r}")
        for part in self.frozen:
            if part not in PARTS:
                raise ValueError(f"freeze must name some of {', '.join(PARTS)}, got {part!r}")

    @classmethod
    def from_saved(cls, settings: dict[str, Any]) -> Config:
        """Build a config from what `to_saved` returned.

        Raises:
            TypeError: A setting is unknown.
            ValueError: A setting is out of range.
        """
        return cls(**{"device" if name == "accelerator" else name: value for name, value in dict(settings).items()})

    def to_saved(self) -> dict[str, Any]:
        """Return the settings as JSON values; checkpoints store `device` under the name "accelerator"."""
        settings = dataclasses.asdict(self)
        return {"accelerator" if name == "device" else name: value for name, value in settings.items()}

    @property
    def frozen(self) -> list[str]:
        """The parts excluded from training."""
        return [part for part in self.freeze.split(",") if part]

    @property
    def last_step(self) -> float:
        """The largest number of steps."""
        if self.steps is None:
            return DEFAULT_STEPS if self.minutes is None else math.inf
        return self.steps

    def progress(self, step: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 0 to 1, by steps or by time, whichever is larger."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(max(step / self.last_step, by_time), 1.0)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at a fraction `progress` of the training.

        Source of the one-cycle schedule: "Super-convergence", arXiv 1708.07120.
        """
        # Fractions of lr at the beginning and at the end.
        first, last = 0.04, {"one-cycle": 4e-6, "cosine": 0.1, "constant": 1.0}[self.schedule]
        if progress < self.warmup:
            return self.lr * _cosine(first, 1.0, progress / self.warmup)
        return self.lr * _cosine(1.0, last, (progress - self.warmup) / max(1 - self.warmup, 1e-9))


@dataclass(frozen=True)
class PrivateConfig(Config):
    """The settings that the tasks share which can be trained with differential privacy."""

    dp_epsilon: float | None = _setting(
        None,
        "train with differential privacy, and spend this epsilon in --steps; lm, translate and summarize "
        "(default: without)",
        group="privacy",
        type=float,
        least=0.01,
        most=1000,
    )
    dp_delta: float = _setting(1e-5, "delta of --dp-epsilon", group="privacy", least=1e-15, most=0.1)
    dp_max_norm: float = _setting(
        1.0,
        "gradient norm above which the gradient of a sample is scaled down, in place of --clip",
        group="privacy",
        least=1e-6,
        most=LARGEST_FLOAT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dp_epsilon is None:
            return
        if self.minutes is not None and self.steps is None:
            raise ValueError("dp-epsilon needs --steps beside --minutes: the noise depends on the number of steps")
        if self.devices * self.nodes > 1:
            raise ValueError(f"dp-epsilon trains in one process, got {self.devices * self.nodes}")
        if self.precision != "32-true":
            raise ValueError(f"dp-epsilon needs --precision 32-true, got {self.precision!r}")


@dataclass(frozen=True)
class LanguageConfig(PrivateConfig):
    """Settings to train a language model.

    Raises:
        ValueError: A setting is out of range.
    """

    task: ClassVar[str] = "lm"

    attention: str = _setting(
        "hidden", "vectors that causal attention pools", group="model", choices=("hidden", "embedding", "none")
    )
    score: str = _setting("linear", "score function of the attention", group="model", choices=("linear", "tanh"))
    chunk: int = _setting(
        64, "tokens per stream and step; gradients reach back one chunk", group="training", least=1, most=LARGEST_SIZE
    )


@dataclass(frozen=True)
class TranslationConfig(PrivateConfig):
    """Settings to train a translator.

    Raises:
        ValueError: A setting is out of range.
    """

    task: ClassVar[str] = "translate"

    tokens: str = _with_default("tokens", "bpe")
    embedding: int = _with_default("embedding", 256)
    dropout: float = _with_default("dropout", 0.3)
    cell: str = _with_default("cell", "gru")
    batch: int = _with_default("batch", 64)
    lr: float = _with_default("lr", 1e-3)
    warmup: float = _with_default("warmup", 0.1)

    vocabularies: str = _setting(
        "shared", "one vocabulary and embedding for both sides, or two", group="data", choices=("shared", "two")
    )
    longest: int = _setting(
        200, "longest source or target in tokens; longer pairs are left out", group="data", least=1, most=LARGEST_COUNT
    )
    input_feeding: bool = _setting(
        False, "feed the output of each decoder step into the next one; slower", group="model"
    )
    tie_head: bool = _setting(True, "share the weights of the target embedding with the output layer", group="model")
    copy: bool = _setting(False, "copy words of the source, such as names; needs --vocabularies shared", group="model")
    label_smoothing: float = _setting(0.1, "label smoothing of the training loss", group="training", least=0, most=0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copy and self.vocabularies != "shared":
            raise ValueError(f"copy needs --vocabularies shared, got {self.vocabularies!r}")


@dataclass(frozen=True)
class SummaryConfig(TranslationConfig):
    """Settings to train a summarizer.

    Raises:
        ValueError: A setting is out of range.
    """

    task: ClassVar[str] = "summarize"

    copy: bool = _with_default("copy", True, TranslationConfig)
    longest_source: int = _setting(
        400,
        "longest source in tokens; longer ones are cut at the end of a word",
        group="data",
        least=1,
        most=LARGEST_COUNT,
    )


@dataclass(frozen=True)
class SampleConfig(Config):
    """The settings that the tasks on sound, images, video and arrays share."""

    cell: str = _with_default("cell", "gru")
    layers: int = _with_default("layers", 2)
    hidden: int = _with_default("hidden", 128)
    dropout: float = _with_default("dropout", 0.3)
    warmup: float = _with_default("warmup", 0.1)

    kind: str = _setting(
        "audio",
        "kind of files: audio (log-mel spectrogram), image (rows or patches), video (frames), array (.npy), or text",
        group="data",
        choices=SAMPLE_KINDS,
    )
    rate: int | None = _setting(
        None,
        "audio: samples per second to resample to (default: those of the first file)",
        group="data",
        type=int,
        least=100,
        most=1 << 20,
    )
    mels: int = _setting(40, "audio: bands of the mel scale", group="data", least=2, most=1000)
    image_size: str | None = _setting(
        None,
        "images and video: size to scale to (default: that of the first file)",
        group="data",
        type=str,
        metavar="HxW",
    )
    patch: int = _setting(
        0, "images: height and width of a patch; 0 reads row by row", group="data", least=0, most=1 << 13
    )
    colour: bool = _setting(False, "images and video: read red, green and blue, not brightness", group="data")
    stack: int = _setting(
        1, "consecutive vectors that are joined into one step", group="data", least=1, most=LARGEST_SIZE
    )
    center: bool = _setting(
        False,
        "subtract from each feature its mean over the sample, which removes the sound of a room or of a microphone",
        group="data",
    )
    val_column: str | None = _setting(
        None,
        "without --val, column of groups, such as speakers, that are held out whole (default: none)",
        group="data",
        type=str,
    )
    val_values: str = _setting(
        "",
        "groups of --val-column to hold out, separated by commas (default: a fraction of the groups)",
        group="data",
        metavar="NAMES",
    )
    augment: str = _setting(
        "",
        f"random changes of training samples, separated by commas: {', '.join(AUGMENTATIONS)} (default: none)",
        group="training",
        metavar="NAMES",
    )
    label_smoothing: float = _setting(0.0, "label smoothing of the training loss", group="training", least=0, most=0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                raise ValueError(f"augment must name some of {', '.join(AUGMENTATIONS)}, got {name!r}")
        if other := self.augmentations - augmentations_of(self.kind):
            raise ValueError(f"augment must not name {', '.join(sorted(other))} with --kind {self.kind}")
        if self.val_values and self.val_column is None:
            raise ValueError("val-values needs --val-column")
        if self.image_size is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", self.image_size):
            raise ValueError(f"image-size must be HxW, such as 28x28, got {self.image_size!r}")
        self.front_end()  # reports an error if its sizes are out of range

    @property
    def augmentations(self) -> frozenset[str]:
        """The random changes of training samples."""
        return frozenset(filter(None, self.augment.split(",")))

    @property
    def held_out(self) -> list[str]:
        """The groups to hold out."""
        return [value for value in self.val_values.split(",") if value]

    def front_end(self) -> FrontEnd:
        """Return how files become sequences of vectors."""
        size = None
        if self.image_size is not None and self.kind in ("image", "video"):
            size = tuple(map(int, self.image_size.split("x")))
        return FrontEnd(
            self.kind,
            self.rate,
            self.mels,
            cast("tuple[int, int] | None", size),
            self.patch,
            self.colour,
            self.stack,
            self.center,
        )


@dataclass(frozen=True)
class ClassificationConfig(SampleConfig):
    """Settings to train a classifier.

    Raises:
        ValueError: A setting is out of range.
    """

    task: ClassVar[str] = "classify"
    unit: ClassVar[str] = "sample"

    pooling: str = _setting(
        "attention",
        "vector from which the class is predicted: attention over the steps, or the last state",
        group="model",
        choices=("attention", "last"),
    )
    bidirectional: bool = _setting(True, "read in both directions", group="model")


@dataclass(frozen=True)
class TranscriptionConfig(SampleConfig):
    """Settings to train a transcriber.

    Raises:
        ValueError: A setting is out of range.
    """

    task: ClassVar[str] = "transcribe"

    tokens: str = _with_default("tokens", "chars")

    decoder: str = _setting(
        "ctc",
        "ctc: a token or none at each step; attention: a decoder that attends to the steps",
        group="model",
        choices=("ctc", "attention"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "text":
            raise ValueError("kind must not be text for --task transcribe; --task translate reads text")
        if "mix" in self.augmentations:
            raise ValueError("augment must not name mix for --task transcribe: two texts have no mean")


CONFIGS: dict[str, type[Config]] = {
    config.task: config
    for config in (LanguageConfig, TranslationConfig, SummaryConfig, ClassificationConfig, TranscriptionConfig)
}


def _cosine(start: float, end: float, fraction: float) -> float:
    """Interpolate from start to end along half a cosine wave."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
