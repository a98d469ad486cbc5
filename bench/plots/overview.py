"""All ratios of a run, a row for each kind of case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plots.scaling import SCALING_GROUP
from bench.plots.style import COLOURS, LIBRARY_NAMES, pyplot, save, title

__all__ = ["draw_overview"]


def draw_overview(run: dict[str, Any], path: Path) -> None:
    """Draw a dot for each comparison on a logarithmic axis; the cases of curves have a picture of their own."""
    plt = pyplot()
    points: dict[str, list[tuple[str, float]]] = {}
    for case in run["cases"]:
        ratios = [(entry["library"], entry["ratio"]) for entry in case["others"] if "ratio" in entry]
        if ratios and case["group"] != SCALING_GROUP:
            points.setdefault(case["case"].rsplit("/", 1)[0], []).extend(ratios)
    figure, axes = plt.subplots(figsize=(8, 1.3 + 0.19 * max(len(points), 1)), layout="constrained")
    # Libraries side by side within a row, so that their dots do not hide each other.
    libraries = [library for library in COLOURS if any(library == own for row in points.values() for own, _ in row)]
    for i, library in enumerate(libraries):
        dots = [(ratio, y) for y, row in enumerate(points.values()) for own, ratio in row if own == library]
        xs, ys = zip(*dots, strict=True)
        shift = 0.6 * ((i + 0.5) / len(libraries) - 0.5)
        axes.scatter(xs, [y + shift for y in ys], s=11, color=COLOURS[library], label=LIBRARY_NAMES[library])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(points)), list(points))
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.3)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("speed-up of llm_ext: time of the candidate / time of llm_ext")
    if libraries:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    axes.set_title(title(run), fontsize=9, loc="left")
    save(figure, path)
