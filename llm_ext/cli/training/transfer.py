"""Initial weights from another run, and parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from llm_ext.cli.checkpoint import Model, Run, Vocabulary
from llm_ext.cli.errors import CommandError
from llm_ext.models import LLM, Seq2Seq, SequenceClassifier

__all__ = ["freeze", "initialize_from"]

# Prefixes of the parameters of each part that --freeze names.
_PREFIXES: dict[type[Model], dict[str, tuple[str, ...]]] = {
    LLM: {"embedding": ("embedding.",), "encoder": ("rnn.",), "attention": ("pool.",), "head": ("head.",)},
    SequenceClassifier: {
        "embedding": ("embedding.",),
        "encoder": ("encoder.",),
        "attention": ("pool.",),
        "head": ("head.",),
    },
    Seq2Seq: {
        "embedding": ("source_embedding.", "target_embedding."),
        "encoder": ("encoder.",),
        "attention": ("attention.", "value."),
        "decoder": ("bridge.", "cell_bridge.", "decoder."),
        "head": ("readout.", "head.", "gate."),
    },
}
_NAMES = {LLM: "a language model", Seq2Seq: "a translator", SequenceClassifier: "a classifier"}


def freeze(model: Model, parts: Sequence[str]) -> None:
    """Exclude the parameters of some parts from training; tied parameters belong to the embedding.

    Raises:
        CommandError: The model has no such part, or no parameter is left to train.
    """
    prefixes = _PREFIXES[type(model)]
    for part in parts:
        if part not in prefixes:
            raise CommandError(f"--freeze: this model has no {part}; it has {', '.join(prefixes)}")
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes[part]):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CommandError("--freeze leaves nothing to train")


@torch.no_grad()
def initialize_from(model: Model, vocabularies: Sequence[Vocabulary], path: Path, part: str) -> str:
    """Copy weights of the best checkpoint of another run into a model.

    Rows of embeddings and output layers are matched by token or label, whatever their ids; those that the other run
    does not have keep their new weights.

    Args:
        model: The model to initialize.
        vocabularies: Names of the rows of its embeddings, first, and of its head, last.
        path: Directory of the other run.
        part: "embedding"; "encoder", which includes the embedding it reads; or "all", for a run of the same task.

    Returns:
        What was copied, in words.

    Raises:
        CommandError: The other run cannot be read, or does not fit.
    """
    run = Run(path)
    checkpoint, other = run.load("best")
    if part == "all" and type(other) is not type(model):
        raise CommandError(
            f"--init-from {path}: holds {_NAMES[type(other)]}, but this run trains {_NAMES[type(model)]}; "
            "--init encoder or --init embedding takes what both have"
        )
    tokens = _tokens_of_rows(model, vocabularies)
    other_tokens = _tokens_of_rows(other, run.vocabularies(other, checkpoint.task))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    other_parameters = dict(other.named_parameters(remove_duplicate=False))
    count, matched = 0, 0
    for name, other_name in _matches(model, other, part):
        parameter, weights = parameters[name], other_parameters.get(other_name)
        shapes = [[] if each is None else list(each.shape) for each in (weights, parameter)]
        if name in tokens:
            del shapes[0][:1], shapes[1][:1]  # the vocabularies may differ
        if weights is None or shapes[0] != shapes[1]:
            found = "missing" if weights is None else list(weights.shape)
            raise CommandError(
                f"--init-from {path}: {other_name} is {found} there, but {name} is {list(parameter.shape)} here; "
                "sizes, layers and cell must be those of the other run"
            )
        if name in tokens:
            matched = max(matched, _copy_rows(parameter, tokens[name], weights, other_tokens[other_name]))
        else:
            parameter.copy_(weights)
        count += 1
    size = len(tokens[next(iter(tokens))])
    found = f", which has {matched:,} of the {size:,} tokens" if matched else ""
    return f"initialized {count} tensors from {path}{found}"


def _matches(model: Model, other: Model, part: str) -> Iterator[tuple[str, str]]:
    """Yield the names of parameters with the names of those they are copied from."""
    names = [name for name, _ in model.named_parameters()]
    if part == "all":
        yield from ((name, name) for name in names)
        return
    # The embedding of a language model serves both sides of a translator; that of the source serves a language model.
    embeddings = [
        (f"{mine}.{suffix}", f"{theirs}.{suffix}")
        for mine, theirs in zip(_embeddings(model), cycle(_embeddings(other)))
        for suffix in ("weight", "bias")
        if f"{mine}.{suffix}" in names
    ]
    if part == "embedding":
        yield from embeddings
        return
    yield from (pair for pair in embeddings if not pair[0].startswith("target_"))
    mine, theirs = ("rnn" if isinstance(each, LLM) else "encoder" for each in (model, other))
    for name in names:
        # Between one direction and two, only the forward direction of the first layer has the same input.
        if name.startswith(f"{mine}.") and (mine == theirs or name.endswith("_l0")):
            yield name, f"{theirs}.{name.partition('.')[2]}"


def _embeddings(model: Model) -> tuple[str, ...]:
    return ("source_embedding", "target_embedding") if isinstance(model, Seq2Seq) else ("embedding",)


def _tokens_of_rows(model: Model, vocabularies: Sequence[Vocabulary]) -> dict[str, list[bytes | None]]:
    """Return, for each parameter with one row per token or label, what names its rows.

    None is the end of a line, or the blank of CTC.
    """
    first, last = ([*vocabulary.pieces, None] for vocabulary in (vocabularies[0], vocabularies[-1]))
    if isinstance(model, Seq2Seq):
        rows = {name: last for name in ("target_embedding.weight", "head.weight", "head.bias")}
        return rows if model.source_embedding is None else {"source_embedding.weight": first, **rows}
    rows = {"embedding.weight": first, "head.weight": last, "head.bias": last}
    # Models without a None have one row less.
    return {
        name: tokens[: len(parameter)]
        for name, tokens in rows.items()
        if (parameter := dict(model.named_parameters()).get(name)) is not None
    }


def _copy_rows(parameter: Tensor, tokens: list[bytes | None], weights: Tensor, other_tokens: list[bytes | None]) -> int:
    """Copy the rows of the tokens that both have; return their number."""
    row_of = {token: row for row, token in enumerate(other_tokens)}
    pairs = [(row, row_of[token]) for row, token in enumerate(tokens) if token in row_of]
    if pairs:
        rows, other_rows = (torch.tensor(side, device=parameter.device) for side in zip(*pairs, strict=True))
        parameter[rows] = weights[other_rows].to(parameter)
    return len(pairs)
