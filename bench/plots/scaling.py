"""Curves of the time of a call against B, H and T."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from bench.plots.style import COLOURS, pyplot, save, title

__all__ = ["SCALING_GROUP", "draw_scaling"]

SCALING_GROUP = "scaling"  # the group of the cases that are points of the curves
# By letter, the label of its axis, and the power of it that the matrix products of a step grow with.
_PANELS = {
    "B": ("B, sequences in the batch", 1),
    "H": ("H, hidden size (and input size)", 2),
    "T": ("T, time steps", 1),
}

Points = dict[str, list[tuple[dict[str, int], float]]]  # by candidate, sizes and milliseconds


def _points(run: dict[str, Any]) -> Points:
    points: Points = {}
    for case in run["cases"]:
        if case["group"] == SCALING_GROUP:
            sizes = {letter: int(size) for letter, size in re.findall(r"([A-Z])(\d+)", case["case"].split("/")[2])}
            for entry in (case["ours"], *case["others"]):
                if "median_s" in entry:
                    points.setdefault(entry["name"], []).append((sizes, entry["median_s"] * 1e3))
    return points


def draw_scaling(run: dict[str, Any], path: Path) -> None:
    """Draw the time of a call against B, H and T on logarithmic axes; without points, writes nothing."""
    points = _points(run)
    if not points:
        return
    plt = pyplot()
    # All curves go through the point whose sizes most cases have.
    all_sizes = [sizes for own in points.values() for sizes, _ in own]
    centre = {letter: statistics.mode(sizes[letter] for sizes in all_sizes) for letter in _PANELS}
    cells = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in points))
    palette = dict(zip(cells, (COLOURS["onnxruntime"], COLOURS["torch"], COLOURS["jax"]), strict=False))

    figure, panels = plt.subplots(1, len(_PANELS), figsize=(11, 4.4), sharey=True, layout="constrained")
    for (letter, (label, power)), axes in zip(_PANELS.items(), panels, strict=True):
        fixed = {other: size for other, size in centre.items() if other != letter}
        last = (1, 0.0)
        for name, own in points.items():
            curve = sorted((sizes[letter], time) for sizes, time in own if fixed.items() <= sizes.items())
            line, marker = ("-", "o") if name.startswith("llm_ext") else ("--", "x")
            colour = palette[name.rsplit(".", 1)[1]]
            xs, ys = [x for x, _ in curve], [y for _, y in curve]
            axes.plot(xs, ys, line, marker=marker, label=name, color=colour, markersize=4, linewidth=1.3)
            last = max([last, *curve])
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        # Back from the last point in proportion to the work; a flatter curve wastes time at small sizes.
        x, y = last
        start = max(axes.get_xlim()[0], x * (axes.get_ylim()[0] / y) ** (1 / power)) if y else x
        guide = [start, x], [y * (start / x) ** power, y]
        axes.plot(*guide, ":", color=COLOURS["limit"], linewidth=1, label="proportional to the work")
        axes.set_xlabel(label)
        axes.set_title(", ".join(f"{other} {size}" for other, size in fixed.items()), fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of a call (median), ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"Inference, whole layer: {title(run)}", fontsize=9)
    save(figure, path)
