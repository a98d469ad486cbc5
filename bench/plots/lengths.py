"""Time and peak memory of pooling against T."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.plots.style import COLOURS, pyplot, save, title

__all__ = ["draw_lengths"]

# By group, the names of the cases; T varies.
_CASES = {"pooling": r"pooling/training/B4-T(\d+)-D512", "prefix": r"prefix/training/B4-T(\d+)-D512"}
# Key of an entry, its factor to the unit of the axis, and the label of the axis.
_ROWS = (("median_s", 1e3, "time of a call (median), ms"), ("peak_bytes", 1e-6, "peak memory, MB"))


def draw_lengths(run: dict[str, Any], path: Path) -> None:
    """Draw time and peak memory against T on logarithmic axes."""
    plt = pyplot()
    figure, panels = plt.subplots(len(_ROWS), len(_CASES), figsize=(10, 7), sharex=True, layout="constrained")
    for column, (group, pattern) in enumerate(_CASES.items()):
        entries: dict[str, dict[int, dict[str, Any]]] = {}  # by candidate and T
        for case in run["cases"]:
            if match := re.fullmatch(pattern, case["case"]):
                for entry in (case["ours"], *case["others"]):
                    entries.setdefault(entry["name"], {})[int(match[1])] = entry
        colours = dict(zip(entries, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
        for (key, unit, label), axes in zip(_ROWS, panels[:, column], strict=True):
            for name, by_length in entries.items():
                curve = sorted((T, entry[key] * unit) for T, entry in by_length.items() if key in entry)
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
        if entries:
            panels[0, column].legend(fontsize=7)
    figure.suptitle(title(run), fontsize=9)
    save(figure, path)
