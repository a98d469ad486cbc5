"""Progress of a training: a progress bar, lines on the terminal, a log of JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llm_ext.cli.data.files import atomic_write
from llm_ext.cli.streams import optional_output, warn

__all__ = ["Report", "read_log"]

# tqdm derives {remaining} from the fraction that is done, whether steps or time limit the training.
BAR = "{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left{postfix}"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log; damaged lines, such as one that a kill left incomplete, are left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int:
                    yield record


class Report:
    """Writes the progress of one training, which goes on if that cannot be written.

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
        self._path = log
        self._log: TextIO | None = None
        # disable=None: show the bar at a terminal only.
        self._bar = tqdm(
            total=1.0, initial=progress, bar_format=BAR, disable=silent or None, leave=False, dynamic_ncols=True
        )
        if silent:
            return
        try:
            with atomic_write(log) as file:
                for record in read_log(log) if step else ():
                    if record["step"] <= step:
                        file.write(json.dumps(record).encode() + b"\n")
            self._log = log.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up_log(error)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._log is not None:
            with contextlib.suppress(OSError):  # of a disk that is full, reported before
                self._log.close()

    def advance(self, progress: float, text: str) -> None:
        """Move the bar and replace the text beside it."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(progress - self._progress)
        self._progress = progress

    def record(self, event: str, step: int, **values: float | bool | str) -> None:
        """Append a record to the log."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self._log.flush()
        except OSError as error:
            self._give_up_log(error)

    def _give_up_log(self, error: OSError) -> None:
        warn(f"{self._path}: the log cannot be written: {error.strerror}; the training goes on without it")
        self._log = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.silent or self.quiet:
            return
        with optional_output():
            tqdm.write(line, file=sys.stdout)
