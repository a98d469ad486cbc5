"""The results of a search: a table, a picture, the best settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from llm_ext.cli.data.files import atomic_write
from llm_ext.cli.training.config import CONFIGS
from llm_ext.cli.training.config_file import write_config
from llm_ext.cli.tuning.study import Definition, Study

__all__ = ["best_trial", "draw_trials", "in_bits", "measure", "table", "write_best"]

# Settings that change what a token is.
VOCABULARY = {"tokens", "vocab_size", "vocabularies"}
# Background of the labels of an axis.
LABEL = {"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 0.8}


def in_bits(definition: Definition) -> bool:
    """Return whether trials are compared by bits per character, because losses per token cannot be compared."""
    return CONFIGS[definition.task].unit == "token" and not VOCABULARY.isdisjoint(definition.space)


def measure(definition: Definition) -> str:
    """Return the unit of the losses."""
    return "bits per character" if in_bits(definition) else f"nats per {CONFIGS[definition.task].unit}"


def best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial of the lowest loss, the first one of equals, or None."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=_loss, default=None)


def write_best(study: Study, definition: Definition) -> None:
    """Write the settings of the best trial for `llm-ext train --config`."""
    with study.locked():
        trial = best_trial(study.trials())
        assert trial is not None
        loss = f"{trial.value:.4f} {measure(definition)}"
        how = f"the mean of {definition.folds} folds" if definition.folds > 1 else "on the held-out part"
        settings = {**definition.settings, **trial.params}
        write_config(study.best, definition.task, settings, f"Trial {trial.number} of {study.path}: {loss}, {how}.")


def table(trials: Sequence[FrozenTrial], definition: Definition) -> str:
    """Return a table of trials, best first; then pruned ones by the loss at which they ended, then the others."""
    order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
    begun = [trial for trial in trials if trial.params]
    ranked = sorted(begun, key=lambda trial: (order.get(trial.state, 3), _last(trial), trial.number))
    names = list(definition.space)
    rows = [["trial", "result", measure(definition), *(name.replace("_", "-") for name in names)]]
    for trial in ranked:
        loss = "" if trial.state == TrialState.FAIL or not trial.intermediate_values else f"{_last(trial):.4f}"
        results = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        result = results.get(trial.state, "under way")
        rows.append([str(trial.number), result, loss, *(_text(trial.params.get(name, "")) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw_trials(study: Study, definition: Definition) -> None:
    """Draw how much each setting matters, and each trial as a line through its values; write `study.picture`."""
    # Imported here because it takes a second.
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    complete = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in study.trials() if trial.state == TrialState.PRUNED]
    names, losses = list(definition.space), sorted(_loss(trial) for trial in complete)
    figure = Figure(figsize=(5 + 1.2 * len(names), 4.5), layout="constrained")
    importance, lines = figure.subplots(1, 2, width_ratios=(3, 1 + 1.2 * len(names)))

    found = _importances(study.optuna_study, complete)
    importance.barh([name.replace("_", "-") for name in found], list(found.values()), color="#4c72b0")
    importance.invert_yaxis()
    importance.set(xlabel="importance", xlim=(0, max([1e-9, *found.values()]) * 1.05))
    if not found:
        importance.set(xticks=[], yticks=[], title="too few complete trials", xlabel="")

    colours = colormaps["viridis"]
    # The worst quarter has one colour, because a single bad trial would leave one colour to all others.
    norm = Normalize(losses[0], losses[3 * (len(losses) - 1) // 4], clip=True)

    def heights(trial: FrozenTrial) -> list[float]:
        return [_height(definition.space[name], trial.params[name]) for name in names]

    for trial in pruned:
        lines.plot(heights(trial), color="#bbbbbb", linewidth=0.8)
    best = best_trial(complete)
    # The best ones last, on top.
    for trial in sorted(complete, key=_loss, reverse=True):
        place = float(norm(_loss(trial)))
        lines.plot([*heights(trial), place], color=colours(place), linewidth=3 if trial is best else 1.2)
    for x, name in enumerate(names):
        lines.axvline(x, color="#666666", linewidth=0.8)
        for value in _ticks(definition.space[name]):
            height = _height(definition.space[name], value)
            lines.text(x + 0.04, height, _text(value), fontsize=8, va="center", bbox=LABEL)
    lines.set_xticks(range(len(names) + 1), [*(name.replace("_", "-") for name in names), "loss"])
    lines.set(yticks=[], ylim=(-0.05, 1.05), xlim=(-0.1, len(names) + 0.02))
    lines.set_title(f"{len(complete)} complete trials, the best one bold; {len(pruned)} pruned ones grey", fontsize=10)
    figure.colorbar(ScalarMappable(norm, colours), ax=lines, label=measure(definition), pad=0.01, extend="max")
    with atomic_write(study.picture) as file:
        figure.savefig(file, format=study.picture.suffix[1:])


def _height(values: Any, value: Any) -> float:
    """Return where a value is on its axis, 0 to 1."""
    if isinstance(values, list):
        return float(values.index(value)) / max(len(values) - 1, 1)
    low, high = values["low"], values["high"]
    if values.get("log"):
        low, high, value = (math.log(each) for each in (low, high, value))
    return float((value - low) / (high - low))


def _ticks(values: Any) -> list[Any]:
    """Return the values to write beside an axis."""
    if isinstance(values, list):
        return values
    low, high = values["low"], values["high"]
    middle = math.sqrt(low * high) if values.get("log") else (low + high) / 2
    return [low, middle, high]


def _importances(study: optuna.Study, complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """Return the importance of each setting, largest first; none if there is nothing to compare."""
    if len({_loss(trial) for trial in complete}) < 2:
        return {}
    return get_param_importances(study)


def _loss(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _last(trial: FrozenTrial) -> float:
    """Return the last loss of a trial."""
    losses = trial.intermediate_values
    return losses[max(losses)] if losses else float("inf")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
