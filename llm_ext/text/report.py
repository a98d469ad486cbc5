"""What a training tells: a progress bar, lines on the terminal, a log of JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm_ext.text.files import beside

# {remaining} follows from the part of the training that is done, be it measured in steps or in time.
BAR = "{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left{postfix}"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, up to a line that a kill left unfinished."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


class Report:
    """The progress of one training.

    Args:
        log: path of the log; records of later steps than `step` are removed from it, all of them at step 0.
        step: at which the training starts or goes on.
        part: of the training that is done already, 0 to 1.
        silent: say and write nothing (processes other than the first).
    """

    def __init__(self, log: Path, step: int, part: float, silent: bool) -> None:
        self.silent = silent
        self._part = part
        # disable=None: no bar where nobody watches.
        self._bar = tqdm(
            total=1.0, initial=part, bar_format=BAR, disable=silent or None, leave=False, dynamic_ncols=True
        )
        if silent:
            return
        with beside(log) as file:
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

    def advance(self, part: float, text: str) -> None:
        """Move the bar, and write a text beside it."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(part - self._part)
        self._part = part

    def record(self, event: str, step: int, **values: float | bool | str) -> None:
        """Add a line to the log."""
        if not self.silent:
            self._log.write(json.dumps({"event": event, "step": step, **values}) + "\n")
            self._log.flush()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.silent:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
