"""The loss of a run, drawn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_ext.text.files import beside


def plot_loss(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw the training and validation loss over the steps.

    Args:
        records: lines of the log.
        path: of the picture, SVG or PNG by its ending.
    """
    # Imported here: it takes a second, and only the end of a training needs it.
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {"training": [], "validation": []}
    for record in records:
        if record.get("event") in curves:
            curves[record["event"]].append((record["step"], record["loss"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            marker = "o" if name == "validation" else ""
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    if any(curves.values()):
        axes.legend()
    with beside(path) as file:
        figure.savefig(file, format=path.suffix[1:])
