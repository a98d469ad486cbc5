"""Pictures of what a model attends to, word by word."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_ext.model import LLM
from llm_ext.text.errors import TextError
from llm_ext.text.files import beside
from llm_ext.text.tokens import Tokens
from llm_ext.text.translation import Translator

Weights = npt.NDArray[np.float64]

END = "⏎"  # of a line
LONGEST = 30  # characters of a word that are shown
# From nothing to all of the attention: white to dark blue, in a PNG and in HTML alike.
DARK = (8, 48, 107)


@dataclass(frozen=True)
class Picture:
    """What was attended to.

    title: what is shown.
    rows: what was written, or predicted, word by word; `rows_are` says which.
    columns: what was read; `columns_are` likewise.
    weights: [rows, columns], from 0 to 1; NaN where a row cannot look.
    summary: in a few words, for the terminal.
    """

    title: str
    rows: Sequence[str]
    rows_are: str
    columns: Sequence[str]
    columns_are: str
    weights: Weights
    summary: str


def words(pieces: Sequence[str]) -> list[tuple[str, slice]]:
    """Put pieces of a text together to its words.

    Args:
        pieces: texts of tokens, in order.

    Returns:
        Each word, with the tokens that make it up: a word begins where a piece begins with a space, or follows one.
    """
    found: list[tuple[str, slice]] = []
    begin = 0
    for at in range(1, len(pieces) + 1):
        ends = at == len(pieces) or pieces[at][:1].isspace() or pieces[at] == END
        # A space that is a token of its own goes with the word after it.
        if ends and ("".join(pieces[begin:at]).strip() or at == len(pieces)):
            word = "".join(pieces[begin:at]).strip() or "␣"
            found.append((word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…", slice(begin, at)))
            begin = at
    return found


def _texts(tokens: Tokens, ids: Sequence[int]) -> list[str]:
    """The text of each token; the bytes of a character that several tokens share count for the last of them."""
    pieces, texts = [tokens.pieces[i] for i in ids], []
    pending = b""
    for piece in pieces:
        pending += piece
        try:
            texts.append(pending.decode())
            pending = b""
        except UnicodeDecodeError as error:
            complete = error.reason == "unexpected end of data" and len(pending) < 4
            texts.append("" if complete else pending.decode("utf-8", "replace"))
            pending = pending if complete else b""
    return texts


def _by_words(weights: Weights, rows: list[tuple[str, slice]], columns: list[tuple[str, slice]]) -> Weights:
    """Weights between words: added up over the tokens read, the mean over those written."""
    summed = np.stack([weights[:, tokens].sum(1) for _, tokens in columns], 1)
    return np.stack([summed[tokens].mean(0) for _, tokens in rows])


@torch.inference_mode()
def of_translation(
    translator: Translator,
    text: str,
    target: str | None,
    say: Callable[[str], object],
    **options: Any,
) -> Picture:
    """Look at what a translator attends to in the source for each word it writes.

    Args:
        translator: the model.
        text: the source.
        target: the translation to look at; None for the translator's own.
        say: told what is odd about the source.
        options: of `Translator.translate`.

    Raises:
        TextError: a text is empty, or has tokens that the model does not know.
    """
    for name, value in (("text", text), ("target", target)):
        if value is not None and not value.strip():
            raise TextError(f"--{name} must hold at least one word, got {value!r}")
    ids = translator.encode(text.strip(), "--text", say)
    if target is None:
        ((target, *_),) = translator.translate([ids], **options)
    try:
        written = translator.target.encode(target.strip()).tolist()
    except TextError as error:
        raise TextError(f"--target: {error}") from None
    model, end = translator.model, translator.target.end
    source = torch.tensor([[*ids, translator.source.end]], device=translator.device)
    memory, state = model.encode(source)
    weights = []
    for i in (end, *written):
        _, state, of_step = model.step(torch.tensor([[i]], device=translator.device), state, memory, need_weights=True)
        assert of_step is not None
        weights.append(of_step[0, 0].double().cpu().numpy())
    columns = words([*_texts(translator.source.tokens, ids), END])
    rows = words([*_texts(translator.target.tokens, written), END])
    table = _by_words(np.stack(weights), rows, columns)
    return Picture(
        f"{text.strip()}\n→ {target}",
        [word for word, _ in rows],
        "written",
        [word for word, _ in columns],
        "read",
        table,
        target,
    )


@torch.inference_mode()
def of_language_model(model: LLM, tokens: Tokens, text: str) -> Picture:
    """Look at which earlier words each prediction of a language model leaned on.

    Args:
        model: in evaluation mode, with attention.
        tokens: its vocabulary.
        text: at least two words.

    Raises:
        TextError: the model has no attention, or the text is too short or has tokens that the model does not know.
    """
    if model.pool is None:
        raise TextError("the model has no attention to look at; train one with --attention hidden or embedding")
    ids = tokens.encode(text)
    pieces = _texts(tokens, ids.tolist())
    found = words(pieces)
    if len(found) < 2:
        raise TextError(f"--text must hold at least two words, got {text!r}")
    weights: list[Weights] = []

    def look(pool: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        *_, alpha = pool.forward(*arguments, **options, return_weights=True)
        weights.append(alpha[0].double().cpu().numpy())

    hook = model.pool.register_forward_hook(look, with_kwargs=True)
    try:
        scores, _ = model(torch.tensor([ids.tolist()], device=next(model.parameters()).device))
    finally:
        hook.remove()
    # Row t is what predicts token t + 1: the first token was predicted from nothing.
    (alpha,) = weights
    alpha = np.concatenate((np.zeros_like(alpha[:1]), alpha[:-1]))
    table = _by_words(alpha, found[1:], found[:-1])
    future = np.arange(len(found) - 1) > np.arange(len(found) - 1)[:, None]
    nats = torch.nn.functional.cross_entropy(scores[0, :-1], torch.tensor(ids[1:].tolist(), device=scores.device))
    return Picture(
        f"What each word of the text was predicted from ({nats.item():.2f} nats a token)",
        [word for word, _ in found[1:]],
        "predicted",
        [word for word, _ in found[:-1]],
        "read before it",
        np.where(future, np.nan, table),
        f"{nats.item():.4f} nats a token over {len(ids) - 1:,} tokens",
    )


def draw(picture: Picture, path: Path) -> None:
    """Draw a picture, HTML or PNG by the ending of its path.

    Raises:
        OSError: it could not be written; what stood there stays.
    """
    content = _html(picture).encode() if path.suffix == ".html" else _png(picture)
    with beside(path) as file:
        file.write(content)


def _png(picture: Picture) -> bytes:
    """As a PNG: a cell of a third of an inch, however many there are."""
    # Imported here: it takes a second.
    import io

    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows, columns = picture.weights.shape
    cell = 0.34
    labels = [max((len(word) for word in side), default=1) for side in (picture.rows, picture.columns)]
    margin_left, margin_top = 0.6 + 0.085 * labels[0], 0.6 + 0.085 * labels[1]
    width, height = max(columns * cell, 1.0), max(rows * cell, 1.0)
    title = _wrapped(picture.title, max(30, int((width + margin_left) / 0.1)))
    margin_top += 0.2 * len(title)
    size = (margin_left + width + 1.4, margin_top + height + 0.3)
    # A picture of very many words still fits what viewers take: 16,000 points a side.
    figure = Figure(figsize=size, dpi=min(150.0, 16000 / max(size)))
    axes = figure.add_axes((margin_left / size[0], 0.3 / size[1], width / size[0], height / size[1]))
    colours = LinearSegmentedColormap.from_list(
        "attention", ["white", "#{:02x}{:02x}{:02x}".format(*DARK)]
    ).with_extremes(bad="#eeeeee")
    image = axes.imshow(picture.weights, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(columns), [_literal(word) for word in picture.columns], rotation=90, fontsize=9)
    axes.set_yticks(range(rows), [_literal(word) for word in picture.rows], fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(picture.columns_are, fontsize=9, color="#555555")
    axes.set_ylabel(picture.rows_are, fontsize=9, color="#555555")
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for row, column in zip(*np.nonzero(np.nan_to_num(picture.weights) >= 0.1), strict=True):
        weight = picture.weights[row, column]
        axes.text(
            column, row, f"{100 * weight:.0f}", ha="center", va="center", fontsize=6.5,
            color="white" if weight > 0.5 else "black",
        )  # fmt: skip
    scale = figure.add_axes(((margin_left + width + 0.25) / size[0], 0.3 / size[1], 0.15 / size[0], height / size[1]))
    bar = figure.colorbar(image, cax=scale, format=lambda value, _: f"{100 * value:.0f} %")
    bar.ax.tick_params(labelsize=8)
    figure.text(0.15 / size[0], 1 - 0.15 / size[1], "\n".join(map(_literal, title)), va="top", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _literal(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none much wider than so many characters."""
    import textwrap

    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def _html(picture: Picture) -> str:
    """As a page that needs nothing else: a table whose heads stay in sight."""

    def cells(row: Weights) -> Iterator[str]:
        for weight in row:
            if np.isnan(weight):
                yield "<td class=none></td>"
                continue
            red, green, blue = (round(255 + (dark - 255) * weight) for dark in DARK)
            colour = f"background:rgb({red},{green},{blue})" + (";color:#fff" if weight > 0.5 else "")
            text = f"{100 * weight:.0f}" if weight >= 0.1 else ""
            yield f'<td style="{colour}" title="{100 * weight:.1f} %">{text}</td>'

    heads = "".join(f"<th><div>{html.escape(word)}</div></th>" for word in picture.columns)
    body = "\n".join(
        f"<tr><th>{html.escape(word)}</th>{''.join(cells(row))}</tr>"
        for word, row in zip(picture.rows, picture.weights, strict=True)
    )
    title = "<br>".join(html.escape(line) for line in picture.title.split("\n"))
    dark = "rgb({},{},{})".format(*DARK)
    return f"""<!doctype html>
<html><head><meta charset="utf-8"><title>{html.escape(picture.title)}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em; color: #222; }}
table {{ border-collapse: separate; border-spacing: 1px; background: #ddd; }}
td {{ min-width: 30px; height: 28px; text-align: center; font-size: 11px; background: #fff; }}
td.none {{ background: #eee; }}
th {{ font-weight: normal; background: #fff; position: sticky; }}
thead th {{ top: 0; vertical-align: bottom; padding: 6px 0; z-index: 1; }}
thead th div {{ writing-mode: vertical-rl; transform: rotate(180deg); margin: auto; white-space: pre; }}
tbody th {{ left: 0; text-align: right; padding: 0 8px; white-space: pre; }}
thead th:first-child {{ left: 0; z-index: 2; color: #777; font-size: 12px; padding: 6px; }}
.scale {{ display: inline-block; width: 200px; height: 12px; border: 1px solid #ddd; vertical-align: middle;
  background: linear-gradient(to right, #fff, {dark}); }}
</style></head><body>
<p>{title}</p>
<p>attention: 0 % <span class=scale></span> 100 %</p>
<table><thead><tr><th>{picture.rows_are} ↓<br>{picture.columns_are} →</th>{heads}</tr></thead>
<tbody>
{body}
</tbody></table>
</body></html>
"""
