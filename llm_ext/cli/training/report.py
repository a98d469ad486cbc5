"""Progress of a training: a progress bar, lines on the terminal, a log of JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm_ext.cli.data.files import atomic_write

__all__ = ["Report", "read_log"]

# tqdm derives {remaining} from the fraction that is done, whether steps or time limit the training.
BAR = "{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left{postfix}"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log up to a line that a kill left incomplete."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


class Report:
    """Writes the progress of one training.

    Args:
        log: File of the log; its records of later steps than `step` are removed, at step 0 all of them.
        step: Step at which the training starts or continues.
        progress: Fraction of the training that is done, 0 to 1.
        silent: Write nothing, in all processes but the first.
        quiet: Print no lines; the bar and the log remain.
    """

    def __init__(self, log: Path, step: int, progress: float, silent: bool, quiet: bool = False) -> None:
        self.silent, self.quiet = silent, quiet
        self._progress = progress
        # disable=None: show the bar at a terminal only.
        self._bar = tqdm(
            total=1.0, initial=progress, bar_format=BAR, disable=silent or None, leave=False, dynamic_ncols=True
        )
        if silent:
            return
        with atomic_write(log) as file:
            if step and log.exists():
                for record in read_log(log):
                    if record.get("step", 0) <= step:
                        file.write(json.dumps(record).encode() + b"\n")
        self._log = log.open("a", encoding="utf-8")

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self.silent:
            self._log.close()

    def advance(self, progress: float, text: str) -> None:
        """Move the bar and replace the text beside it."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(progress - self._progress)
        self._progress = progress

    def record(self, event: str, step: int, **values: float | bool | str) -> None:
        """Append a record to the log."""
        if not self.silent:
            self._log.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self._log.flush()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not (self.silent or self.quiet):
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
