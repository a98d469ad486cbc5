"""Weights from one run to another, and parts of a model that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from llm_ext.model import LLM
from llm_ext.seq2seq import Seq2Seq
from llm_ext.text.checkpoint import Run
from llm_ext.text.errors import TextError
from llm_ext.text.tokens import Tokens

Model = LLM | Seq2Seq

# By how the names of their parameters begin, the parts that --freeze names.
_PARTS: dict[type[Model], dict[str, tuple[str, ...]]] = {
    LLM: {"embedding": ("embedding.",), "encoder": ("rnn.",), "attention": ("pool.",), "head": ("head.",)},
    Seq2Seq: {
        "embedding": ("source_embedding.", "target_embedding."),
        "encoder": ("encoder.",),
        "attention": ("attention.", "value."),
        "decoder": ("bridge.", "cell_bridge.", "decoder."),
        "head": ("readout.", "head."),
    },
}


def freeze(model: Model, parts: Sequence[str]) -> None:
    """Take the parameters of parts out of the training; tied ones belong to the embedding.

    Raises:
        TextError: the model has no such part, or nothing is left to train.
    """
    known = _PARTS[type(model)]
    for part in parts:
        if part not in known:
            raise TextError(f"--freeze: this model has no {part}; it has {', '.join(known)}")
        for name, parameter in model.named_parameters():
            if name.startswith(known[part]):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TextError("--freeze leaves nothing to train")


@torch.no_grad()
def take_over(model: Model, vocabularies: Sequence[Tokens], path: Path, part: str) -> str:
    """Put weights of the best checkpoint of another run in the places of a model's own.

    Rows of embeddings and heads go to the row of the same token, wherever either vocabulary has it; tokens that the
    other run does not know keep their new weights.

    Args:
        model: whose weights are changed.
        vocabularies: its own, one or two.
        path: of the other run.
        part: "embedding"; "encoder", with the embedding it reads; "all", from a run of the same task.

    Returns:
        What was taken, in words.

    Raises:
        TextError: the other run cannot be read, or does not fit.
    """
    run = Run(path)
    other = run.checkpoint("best").model()
    if part == "all" and type(other) is not type(model):
        kinds = {LLM: "a language model", Seq2Seq: "a translator"}
        raise TextError(
            f"--init-from {path}: holds {kinds[type(other)]}, this is {kinds[type(model)]}; "
            "--init encoder or --init embedding takes what both have"
        )
    ours, theirs = _rows(model, vocabularies), _rows(other, run.vocabularies(other))
    there = dict(other.named_parameters(remove_duplicate=False))
    here = dict(model.named_parameters(remove_duplicate=False))
    count, matched = 0, 0
    for name, their_name in _matches(model, other, part):
        mine, weights = here[name], there.get(their_name)
        sizes = [[] if each is None else list(each.shape) for each in (weights, mine)]
        if name in ours:
            del sizes[0][:1], sizes[1][:1]  # the tokens
        if weights is None or sizes[0] != sizes[1]:
            was = "missing" if weights is None else list(weights.shape)
            raise TextError(
                f"--init-from {path}: {their_name} is {was} there, {name} is {list(mine.shape)} here; "
                "sizes, layers and cell must be those of the other run"
            )
        if name in ours:
            matched = max(matched, _copy_rows(mine, ours[name], weights, theirs[their_name]))
        else:
            mine.copy_(weights)
        count += 1
    return f"{count} tensors from {path}; of {len(ours[next(iter(ours))]):,} tokens {matched:,} are known there"


def _matches(model: Model, other: Model, part: str) -> Iterator[tuple[str, str]]:
    """The names of parameters here, and of those there that they are taken from."""
    known = [name for name, _ in model.named_parameters()]
    # A language model's embedding is that of a source, and lends itself to both sides.
    embeddings = [
        (f"{here}.{of}", f"{there}.{of}")
        for here, there in zip(_embeddings(model), cycle(_embeddings(other)))
        for of in ("weight", "bias")
        if f"{here}.{of}" in known
    ]
    if part == "embedding":
        yield from embeddings
        return
    if part == "all":
        yield from ((name, name) for name in known)
        return
    yield from (pair for pair in embeddings if not pair[0].startswith("target_"))
    here, there = ("rnn" if isinstance(each, LLM) else "encoder" for each in (model, other))
    for name in known:
        # Between one direction and two only the first layer fits, and only forwards.
        if name.startswith(f"{here}.") and (here == there or name.endswith("_l0")):
            yield name, f"{there}.{name.partition('.')[2]}"


def _embeddings(model: Model) -> tuple[str, ...]:
    return ("embedding",) if isinstance(model, LLM) else ("source_embedding", "target_embedding")


def _rows(model: Model, vocabularies: Sequence[Tokens]) -> dict[str, list[bytes | None]]:
    """Of each parameter with a row for each token, which token that is; None stands for the end of a line."""
    if isinstance(model, LLM):
        pieces: list[bytes | None] = [*vocabularies[0].pieces]
        return {name: pieces for name in ("embedding.weight", "head.weight", "head.bias")}
    source, target = ([*tokens.pieces, None] for tokens in vocabularies)
    rows = {name: target for name in ("target_embedding.weight", "head.weight", "head.bias")}
    return {"source_embedding.weight": source, **rows}


def _copy_rows(mine: Tensor, tokens: list[bytes | None], weights: Tensor, their_tokens: list[bytes | None]) -> int:
    """Copy the rows of tokens that both know; return how many."""
    place = {token: row for row, token in enumerate(their_tokens)}
    pairs = [(row, place[token]) for row, token in enumerate(tokens) if token in place]
    if pairs:
        here, there = (torch.tensor(rows, device=mine.device) for rows in zip(*pairs, strict=True))
        mine[here] = weights[there].to(mine)
    return len(pairs)
