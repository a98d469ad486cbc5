"""Pictures of attention weights: PNG and HTML."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from llm_ext.cli.data.files import atomic_write
from llm_ext.cli.errors import CommandError

__all__ = ["MOST_TOKENS", "AttentionMap", "Weights", "check_words", "draw", "escape"]

Weights = npt.NDArray[np.float64]

# Colour of a weight of 1, red, green and blue; 0 is white.
FULL = (8, 48, 107)
# Most words on each side of a picture: with 200 a PNG takes 0.7 GB while it is drawn, with 1,000 a page has 100 MB.
MOST_WORDS = {".png": 200, ".html": 1000}
# Most tokens of a text, whose weights are a matrix of 256 MB.
MOST_TOKENS = 8192
# Pixels of the longer side of a PNG, at most.
LONGEST_SIDE = 6000


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights between words.

    Attributes:
        title: Above the picture.
        rows: The words that attend.
        row_label: What the rows are.
        columns: The words attended to.
        column_label: What the columns are.
        weights: [rows, columns], 0 to 1; NaN where a row cannot attend.
        summary: One line for the terminal.
    """

    title: str
    rows: Sequence[str]
    row_label: str
    columns: Sequence[str]
    column_label: str
    weights: Weights
    summary: str


def check_words(name: str, words: int, suffix: str) -> None:
    """Raise a CommandError if the text of an option has too many words for a picture that ends in `suffix`."""
    if words > MOST_WORDS[suffix]:
        more = f"; one of .html shows {MOST_WORDS['.html']:,}" if suffix == ".png" else ""
        raise CommandError(
            f"--{name} has {words:,} words, but a {suffix} picture shows at most {MOST_WORDS[suffix]:,}{more}"
        )


def draw(attention: AttentionMap, path: Path) -> None:
    """Write a picture, as HTML if `path` ends in `.html`, else as PNG.

    Raises:
        CommandError: A side has too many words.
        OSError: The file could not be written; a previous one stays.
    """
    with atomic_write(path) as file:
        if path.suffix == ".html":
            for piece in _html(attention):
                file.write(piece.encode(errors="replace"))
        else:
            _png(attention, file)


def _png(attention: AttentionMap, file: IO[bytes]) -> None:
    """Draw cells of a third of an inch."""
    # Imported here because it takes a second.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows, columns = attention.weights.shape
    cell = 0.34
    labels = [max((len(word) for word in side), default=1) for side in (attention.rows, attention.columns)]
    margin_left, margin_top = 0.6 + 0.085 * labels[0], 0.6 + 0.085 * labels[1]
    width, height = max(columns * cell, 1.0), max(rows * cell, 1.0)
    title = _wrap(attention.title, max(30, int((width + margin_left) / 0.1)))
    margin_top += 0.2 * len(title)
    size = (margin_left + width + 1.4, margin_top + height + 0.3)
    figure = Figure(figsize=size, dpi=min(150.0, LONGEST_SIDE / max(size)))
    axes = figure.add_axes((margin_left / size[0], 0.3 / size[1], width / size[0], height / size[1]))
    colours = LinearSegmentedColormap.from_list(
        "attention", ["white", "#{:02x}{:02x}{:02x}".format(*FULL)]
    ).with_extremes(bad="#eeeeee")
    # Rectangles, because an image would be scaled to the size of the picture in many bytes per pixel.
    edges = (np.arange(count + 1) - 0.5 for count in (columns, rows))
    image = axes.pcolormesh(*edges, attention.weights, cmap=colours, vmin=0, vmax=1)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), [escape(word) for word in attention.columns], rotation=90, fontsize=9)
    axes.set_yticks(range(rows), [escape(word) for word in attention.rows], fontsize=9)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(attention.column_label, fontsize=9, color="#555555")
    axes.set_ylabel(attention.row_label, fontsize=9, color="#555555")
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for row, column in zip(*np.nonzero(np.nan_to_num(attention.weights) >= 0.1), strict=True):
        weight = attention.weights[row, column]
        axes.text(
            column,
            row,
            f"{100 * weight:.0f}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if weight > 0.5 else "black",
        )
    scale = figure.add_axes(((margin_left + width + 0.25) / size[0], 0.3 / size[1], 0.15 / size[0], height / size[1]))
    bar = figure.colorbar(image, cax=scale, format=lambda value, _: f"{100 * value:.0f} %")
    bar.ax.tick_params(labelsize=8)
    figure.text(0.15 / size[0], 1 - 0.15 / size[1], "\n".join(map(escape, title)), va="top", fontsize=10)
    figure.savefig(file, format="png")


def escape(text: str) -> str:
    """Escape the dollar signs, which begin a formula in matplotlib, and replace bytes that are not UTF-8."""
    return text.replace("$", r"\$").encode(errors="replace").decode()


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def _html(attention: AttentionMap) -> Iterator[str]:
    """Yield the pieces of a self-contained page: a table whose headers stay visible."""

    def cells(row: Weights) -> Iterator[str]:
        for weight in row:
            if np.isnan(weight):
                yield "<td class=none></td>"
                continue
            red, green, blue = (round(255 + (full - 255) * weight) for full in FULL)
            colour = f"background:rgb({red},{green},{blue})" + (";color:#fff" if weight > 0.5 else "")
            text = f"{100 * weight:.0f}" if weight >= 0.1 else ""
            yield f'<td style="{colour}" title="{100 * weight:.1f} %">{text}</td>'

    heads = "".join(f"<th><div>{html.escape(word)}</div></th>" for word in attention.columns)
    title = "<br>".join(html.escape(line) for line in attention.title.split("\n"))
    full = "rgb({},{},{})".format(*FULL)
    yield f"""<!doctype html>
<html><head><meta charset="utf-8"><title>{html.escape(attention.title)}</title>
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
  background: linear-gradient(to right, #fff, {full}); }}
</style></head><body>
<p>{title}</p>
<p>attention: 0 % <span class=scale></span> 100 %</p>
<table><thead><tr><th>{attention.row_label} ↓<br>{attention.column_label} →</th>{heads}</tr></thead>
<tbody>
"""
    for word, row in zip(attention.rows, attention.weights, strict=True):
        yield f"<tr><th>{html.escape(word)}</th>{''.join(cells(row))}</tr>\n"
    yield "</tbody></table>\n</body></html>\n"
