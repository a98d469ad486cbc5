"""Bar chart of the mean speed-up of each cell, for inference and training."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.comparison import is_peer
from bench.plots.style import COLOURS, LIBRARY_NAMES, pyplot, save, title

__all__ = ["draw_speedup", "mean_speedups"]

_CELLS = {"RNN": "", "GRU": "gru-", "LSTM": "lstm-"}
_PHASES = ("inference", "training")


def _groups(run: dict[str, Any], phase: str, cell: str) -> list[list[dict[str, Any]]]:
    """The measured peers of each case of whole sequences."""
    prefix = f"recurrence/{_CELLS[cell]}{phase}/"
    cases = [case for case in run["cases"] if case["case"].startswith(prefix)]
    return [[entry for entry in case["others"] if is_peer(entry) and "ratio" in entry] for case in cases]


def mean_speedups(run: dict[str, Any], phase: str, cell: str) -> tuple[float, float] | None:
    """Return the geometric means over whole-sequence cases of the speed-up over torch and the fastest other library.

    None if a case has no such ratio.
    """
    over_torch: list[float] = []
    over_others: list[float] = []
    for peers in _groups(run, phase, cell):
        for ratios, of_torch in ((over_torch, True), (over_others, False)):
            found = [entry["ratio"] for entry in peers if (entry["library"] == "torch") == of_torch]
            if not found:
                return None
            ratios.append(min(found))
    if not over_torch:
        return None
    return statistics.geometric_mean(over_torch), statistics.geometric_mean(over_others)


def draw_speedup(run: dict[str, Any], path: Path) -> None:
    """Draw the means of `mean_speedups` for each cell, in a panel each for inference and training."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(_PHASES), figsize=(6.4, 3.6), sharey=True, layout="constrained")
    for phase, axes in zip(_PHASES, panels, strict=True):
        cells = {cell: means for cell in _CELLS if (means := mean_speedups(run, phase, cell)) is not None}
        libraries = {
            entry["library"]: None
            for cell in cells
            for peers in _groups(run, phase, cell)
            for entry in peers
            if entry["library"] != "torch"
        }
        names = [LIBRARY_NAMES[library] for library in libraries]
        fastest = names[0] if len(names) == 1 else f"the fastest of\n{', '.join(names)}"
        labels = ("over torch.nn", f"over {fastest}")
        for i, (label, colour) in enumerate(zip(labels, (COLOURS["torch"], COLOURS["onnxruntime"]), strict=True)):
            heights = [means[i] for means in cells.values()]
            bars = axes.bar([x + 0.4 * (i - 0.5) for x in range(len(cells))], heights, 0.38, label=label, color=colour)
            axes.bar_label(bars, [f"{height:.2f}" for height in heights], padding=2, fontsize=10)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(cells)), list(cells), fontsize=11)
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", labelsize=9)
        axes.set_title(f"{phase.capitalize()}, {len(_groups(run, phase, 'RNN'))} shapes", fontsize=11)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=9.5, alignment="left")
        for side in ("right", "top"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("speed-up (geometric mean)", fontsize=10)
    panels[0].set_ylim(0, panels[0].get_ylim()[1] * 1.06)
    torch_version = run["versions"]["build_info"]["torch"].split("+")[0]
    figure.suptitle(f"Speed-up of llm_ext: {title(run)}, torch {torch_version}", fontsize=11)
    save(figure, path)
