"""What a run looks like: the ratios, how time grows with B, H and T, and what pooling takes at each T."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

# Dark enough to be told apart on white, also by those who do not see red and green apart.
COLOURS = {
    "torch": "#c44e00",
    "compile": "#8a5a00",
    "onnxruntime": "#0067a8",
    "openvino": "#6a3d9a",
    "jax": "#00785a",
    "llm_ext": "#000000",
    "limit": "#666666",
}
CURVES = "scaling"  # the group of cases that `growth` draws
# The cases that `lengths` draws, but for T.
LENGTHS = {"pooling": r"pooling/training/B4-T(\d+)-D512", "prefix": r"prefix/training/B4-T(\d+)-D512"}
# Letter: what it counts, and the power of it that the matrix products of a step grow with.
PANELS = {
    "B": ("B, sequences in the batch", 1),
    "H": ("H, hidden size (and input size)", 2),
    "T": ("T, time steps", 1),
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text; ids that do not change from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def _title(run: dict[str, Any]) -> str:
    return f"{run['machine']['cpu']}, {run['settings']['threads']} threads, {run['settings']['dtype']}"


def ratios(run: dict[str, Any], path: Path) -> None:
    """Draw the ratio of every comparison on a logarithmic axis, with quartiles and bars, as SVG."""
    pyplot = _pyplot()
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for case in run["cases"]:
        timed = [peer for peer in case["peers"] if "ratio" in peer and case["group"] != CURVES]
        if timed:
            rows += [(case["case"], None), *((peer["name"], peer) for peer in timed)]
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.17 * max(len(rows), 1)), layout="constrained")
    for y, (_, peer) in enumerate(rows):
        if peer is None:
            continue
        colour = COLOURS[peer["library"]]
        axes.plot([1, peer["ratio"]], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([peer["ratio_q1"], peer["ratio_q3"]], [y, y], color="black", linewidth=1)
        if peer["bar"] is not None:
            axes.plot([peer["bar"]], [y], marker="|", markersize=9, markeredgewidth=2, color="black")
        axes.annotate(
            f"{peer['ratio']:.3g}",
            (max(peer["ratio"], peer["ratio_q3"], peer["bar"] or 0, 1), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    for tick, (_, peer) in zip(axes.get_yticklabels(), rows, strict=True):
        if peer is None:
            tick.set_fontweight("bold")
        else:
            tick.set_color(COLOURS[peer["library"]])
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("time of the peer / time of llm_ext\n(black line: quartiles; black mark: the bar of the project)")
    axes.set_title(_title(run), fontsize=9, loc="left")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def growth(run: dict[str, Any], path: Path) -> None:
    """Draw the time of a call against B, H and T, on logarithmic axes, from the cases of `CURVES`, as SVG."""
    pyplot = _pyplot()
    # Of each contestant: sizes and milliseconds of every point.
    points: dict[str, list[tuple[dict[str, int], float]]] = {}
    for case in run["cases"]:
        if case["group"] == CURVES:
            sizes = {letter: int(size) for letter, size in re.findall(r"([A-Z])(\d+)", case["case"].split("/")[2])}
            for entry in (case["ours"], *case["peers"]):
                if "median_s" in entry:
                    points.setdefault(entry["name"], []).append((sizes, entry["median_s"] * 1e3))
    if not points:
        return  # interrupted before the first
    # The point that all curves go through is the one with the sizes that most cases have.
    everywhere = [sizes for own in points.values() for sizes, _ in own]
    centre = {letter: statistics.mode(sizes[letter] for sizes in everywhere) for letter in PANELS}
    cells = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in points))
    palette = dict(zip(cells, (COLOURS["onnxruntime"], COLOURS["torch"], COLOURS["jax"]), strict=False))

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 4.4), sharey=True, layout="constrained")
    for (letter, (label, power)), axes in zip(PANELS.items(), panels, strict=True):
        fixed = {other: size for other, size in centre.items() if other != letter}
        last = (1, 0.0)
        for name, own in points.items():
            curve = sorted((sizes[letter], time) for sizes, time in own if fixed.items() <= sizes.items())
            line, marker = ("-", "o") if name.startswith("llm_ext") else ("--", "x")
            colour = palette[name.rsplit(".", 1)[1]]
            xs, ys = [x for x, _ in curve], [y for _, y in curve]
            axes.plot(xs, ys, line, marker=marker, label=name, color=colour, markersize=4, linewidth=1.3)
            last = max([last, *curve])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        # From the last point back, as if time went with the work; a flatter curve wastes time at small sizes.
        x, y = last
        start = max(axes.get_xlim()[0], x * (axes.get_ylim()[0] / y) ** (1 / power)) if y else x
        guide = [start, x], [y * (start / x) ** power, y]
        axes.plot(*guide, ":", color=COLOURS["limit"], linewidth=1, label="like the work")
        axes.set_xlabel(label)
        axes.set_title(", ".join(f"{other} {size}" for other, size in fixed.items()), fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of a call (median), ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"Inference, whole layer: {_title(run)}", fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def lengths(run: dict[str, Any], path: Path) -> None:
    """Draw time and peak memory of the cases of `LENGTHS` against T, on logarithmic axes, as SVG."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(2, len(LENGTHS), figsize=(10, 7), sharex=True, layout="constrained")
    rows = (("median_s", 1e3, "time of a call (median), ms"), ("peak_bytes", 1e-6, "memory at its peak, MB"))
    for column, (group, pattern) in enumerate(LENGTHS.items()):
        # Of each contestant its entries by T.
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for case in run["cases"]:
            if match := re.fullmatch(pattern, case["case"]):
                for entry in (case["ours"], *case["peers"]):
                    found.setdefault(entry["name"], {})[int(match[1])] = entry
        colours = dict(zip(found, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
        for (key, unit, label), axes in zip(rows, panels[:, column], strict=True):
            for name, entries in found.items():
                curve = sorted((T, entry[key] * unit) for T, entry in entries.items() if key in entry)
                xs, ys = [T for T, _ in curve], [y for _, y in curve]
                own = name.startswith("llm_ext")
                colour, line = (COLOURS["llm_ext"], "-") if own else (colours[name], "--")
                axes.plot(xs, ys, line, marker="o", label=name, color=colour, markersize=4, linewidth=1.3)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.set_ylabel(label)
        panels[0, column].set_title(f"{group}, forward and backward, B 4, D 512", fontsize=8)
        panels[1, column].set_xlabel("T, positions")
        if found:
            panels[0, column].legend(fontsize=7)
    figure.suptitle(_title(run), fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
