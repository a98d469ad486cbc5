"""The plot of a run's loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_ext.cli.data.files import atomic_write

__all__ = ["plot_loss"]


def plot_loss(records: Iterable[dict[str, Any]], path: Path, unit: str = "token") -> None:
    """Plot the training and validation loss over the steps.

    Args:
        records: Records of the log.
        path: The picture, SVG or PNG by its suffix.
        unit: Unit over which the loss is the mean.
    """
    # Imported here because it takes a second and is needed only at the end of a training.
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {"training": [], "validation": []}
    for record in records:
        curve, loss = curves.get(str(record.get("event"))), record.get("loss")
        if curve is not None and isinstance(loss, (int, float)):
            curve.append((record["step"], loss))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            marker = "o" if name == "validation" else ""
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel=f"loss, nats per {unit}")
    axes.grid(alpha=0.3)
    if any(curves.values()):
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:])
