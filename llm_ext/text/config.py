"""The settings of a training run: one place for defaults, ranges and help."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from llm_ext.model import CELLS
from llm_ext.text.tokens import KINDS

SCHEDULES = ("one-cycle", "cosine", "constant")
PRECISIONS = ("32-true", "bf16-mixed")
# Of a model, as --freeze names them.
PARTS = ("embedding", "encoder", "attention", "decoder", "head")


def _option(
    default: Any,
    help: str,
    *,
    group: str,
    type: type | None = None,
    least: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] | None = None,
    resume: bool = False,
) -> Any:
    """A field with what the command line needs to know; `resume`: a resumed run may change it."""
    metadata = {"help": help, "group": group, "type": type or default.__class__}
    metadata |= {"least": least, "most": most, "choices": choices, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


def _again(name: str, default: Any) -> Any:
    """A field of `Config` with another default."""
    return dataclasses.field(default=default, metadata=Config.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Config:
    """What the settings of all tasks have in common; see the two below."""

    task: ClassVar[str]

    tokens: str = _option("bytes", "what a token is; bpe learns its vocabulary", group="text", choices=KINDS)
    vocab_size: int = _option(4096, "tokens in the vocabulary of bpe", group="text", least=256, most=1 << 24)
    val_fraction: float = _option(
        0.1, "part kept for validation unless --val is given: the end of the text, or the pairs of so many sources",
        group="text", least=0, most=0.9,
    )  # fmt: skip

    embedding: int = _option(128, "size of a token's embedding", group="model", least=1)
    hidden: int = _option(512, "size of the hidden state", group="model", least=1)
    layers: int = _option(1, "recurrent layers", group="model", least=1)
    dropout: float = _option(0.0, "probability of dropping a unit, in training", group="model", least=0, most=0.99)
    cell: str = _option("rnn", "of the recurrent layers; rnn is that of Elman", group="model", choices=CELLS)
    nonlinearity: str = _option("tanh", "of --cell rnn", group="model", choices=("tanh", "relu", "sigmoid"))
    attn_dim: int | None = _option(
        None, "size of the attention space (default: that of what is attended to, for lm at most 128)", group="model",
        type=int, least=1,
    )  # fmt: skip

    init_from: str | None = _option(
        None, "run whose best checkpoint lends its weights, matched by token", group="start", type=str
    )
    init: str = _option("all", "what is taken from it", group="start", choices=("all", "encoder", "embedding"))
    freeze: str = _option("", "parts that are not trained, with commas between: " + ", ".join(PARTS), group="start")

    # Batch, chunk, rate, schedule and clip: with them this network reaches 1.517 nats a character on the plays of
    # Shakespeare in 4,800 steps; docs/text.md has what else was tried.
    batch: int = _option(32, "streams read side by side, or pairs, in each process", group="training", least=1)
    steps: int | None = _option(
        None, "steps to train (default: 3000 if --minutes is not given)", group="training", type=int, least=1,
        resume=True,
    )  # fmt: skip
    minutes: float | None = _option(
        None, "time to train, in place of --steps or as well", group="training", type=float, least=0.001,
        resume=True,
    )  # fmt: skip
    lr: float = _option(2e-3, "highest learning rate of Adam", group="training", least=0)
    schedule: str = _option("one-cycle", "how the learning rate changes", group="training", choices=SCHEDULES)
    warmup: float = _option(
        0.3, "part of the training in which the learning rate rises", group="training", least=0, most=1
    )
    clip: float = _option(1.0, "largest norm of all gradients together; 0 does not limit it", group="training", least=0)
    validate_every: int = _option(
        250, "steps between validations, each of which saves", group="training", least=1, resume=True
    )
    patience: int | None = _option(
        None, "stop after so many validations without a new best (default: never)", group="training",
        type=int, least=1, resume=True,
    )  # fmt: skip
    log_every: int = _option(25, "steps between lines of the log", group="training", least=1)
    seed: int = _option(1, "of the first weights and of dropout", group="training", least=0, most=(1 << 63) - 1)

    accelerator: str = _option(
        "auto", "device, as Lightning Fabric names it: cpu, cuda, auto", group="machine", resume=True
    )
    devices: int = _option(
        1, "devices, each with its own process (torchrun sets it)", group="machine", least=1, resume=True
    )
    nodes: int = _option(1, "machines, with torchrun", group="machine", least=1, resume=True)
    precision: str = _option("32-true", "of the numbers", group="machine", choices=PRECISIONS)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            numeric = meta["type"] in (int, float)
            kinds = (int, float) if meta["type"] is float else meta["type"]
            name = field.name.replace("_", "-")
            if not isinstance(value, kinds) or (isinstance(value, bool) and meta["type"] is not bool):
                raise ValueError(f"{name} must be of type {meta['type'].__name__}, got {value!r}")
            if numeric and not (meta["least"] <= value <= meta["most"] and math.isfinite(value)):
                most = "" if meta["most"] == math.inf else f" and at most {meta['most']}"
                raise ValueError(f"{name} must be at least {meta['least']}{most}, got {value}")
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(f"{name} must be one of {', '.join(meta['choices'])}, got {value!r}")
        for part in self.frozen:
            if part not in PARTS:
                raise ValueError(f"freeze must name some of {', '.join(PARTS)}, got {part!r}")

    @property
    def frozen(self) -> list[str]:
        """The parts that are not trained."""
        return [part for part in self.freeze.split(",") if part]

    @property
    def last_step(self) -> float:
        """The step at which training ends at the latest."""
        if self.steps is None:
            return 3000 if self.minutes is None else math.inf
        return self.steps

    def progress(self, step: int, seconds: float) -> float:
        """Return the part that is done, 0 to 1: by steps or by the clock, whichever is further."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(max(step / self.last_step, by_time), 1.0)

    def rate(self, progress: float) -> float:
        """Return the learning rate after a part `progress` of the training.

        Source of the one-cycle schedule: "Super-convergence", arXiv 1708.07120.
        """
        # It starts at lr / 25, and ends near 0 (one-cycle), at lr / 10 (cosine) or where it is (constant).
        first, last = 0.04, {"one-cycle": 4e-6, "cosine": 0.1, "constant": 1.0}[self.schedule]
        if progress < self.warmup:
            return self.lr * _cosine(first, 1.0, progress / self.warmup)
        return self.lr * _cosine(1.0, last, (progress - self.warmup) / max(1 - self.warmup, 1e-9))


@dataclass(frozen=True)
class TrainConfig(Config):
    """How to train a language model: the text, the model, the training, the machine.

    Raises:
        ValueError: a setting is out of range.
    """

    task: ClassVar[str] = "lm"

    attention: str = _option(
        "hidden", "what attention pools over", group="model", choices=("hidden", "embedding", "none")
    )
    score: str = _option("linear", "how attention scores", group="model", choices=("linear", "tanh"))
    chunk: int = _option(64, "tokens a step and stream; gradients reach back no further", group="training", least=1)


@dataclass(frozen=True)
class TranslateConfig(Config):
    """How to train a model from line to line: the pairs, the model, the training, the machine.

    Raises:
        ValueError: a setting is out of range.
    """

    task: ClassVar[str] = "translate"

    tokens: str = _again("tokens", "bpe")
    embedding: int = _again("embedding", 256)
    dropout: float = _again("dropout", 0.3)
    cell: str = _again("cell", "gru")
    batch: int = _again("batch", 64)
    lr: float = _again("lr", 1e-3)
    warmup: float = _again("warmup", 0.1)

    vocabularies: str = _option(
        "shared", "one vocabulary, and embedding, for both sides, or one each", group="text", choices=("shared", "two")
    )
    longest: int = _option(200, "tokens; pairs with a longer side are left out of training", group="text", least=1)
    input_feeding: bool = _option(
        False, "let each step of the decoder read what the last one predicted from; slower", group="model"
    )
    tie_head: bool = _option(True, "give the head the weights of the embedding", group="model")
    label_smoothing: float = _option(
        0.1, "part of the training target spread over all tokens", group="training", least=0, most=0.9
    )


CONFIGS: dict[str, type[Config]] = {config.task: config for config in (TrainConfig, TranslateConfig)}


def _cosine(start: float, end: float, part: float) -> float:
    """Go from start to end on half a wave of the cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
