"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_ext.cli.data.files import atomic_write
from llm_ext.cli.inference.picture import escape

__all__ = ["draw_confusion"]

# Largest number of classes whose counts are written into the cells.
WRITTEN = 40
# Largest number of classes whose names are beside the rows and columns.
NAMED = 200


def draw_confusion(table: npt.NDArray[np.int64], names: Sequence[str], path: Path) -> None:
    """Draw how often each class was taken for each class.

    Args:
        table: Counts ``[C, C]``, a row for each true class, a column for each predicted one.
        names: The classes.
        path: The picture, SVG or PNG by its suffix.

    Raises:
        OSError: The file could not be written; a previous one stays.
    """
    # Imported here because it takes a second.
    from matplotlib.figure import Figure

    count = len(names)
    side = min(max(3.0, 0.45 * count), 40.0)
    figure = Figure(figsize=(side + 1.5, side + 1.0), layout="constrained")
    axes = figure.add_subplot()
    rows = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(rows, cmap="Blues", vmin=0, vmax=1)
    if count <= NAMED:
        labels = [escape(name) for name in names]
        axes.set_xticks(range(count), labels, rotation=90)
        axes.set_yticks(range(count), labels)
    correct = 100 * np.trace(table) / max(table.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{correct:.2f} % of {table.sum():,} samples are correct")
    if count <= WRITTEN:
        for row, column in zip(*np.nonzero(table), strict=True):
            color = "white" if rows[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=color, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:])
