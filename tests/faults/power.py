"""Power failures: what is on a disk is what was flushed, and perhaps some of what was not.

A training is recorded: after each call that changes or flushes the disk, the names in every directory are noted, and
with each flush the content of the file or the names of the directory that it made durable. A power failure after any
of these calls leaves a tree that is built from them.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from support.cli_runs import assert_same_checkpoints, last_step

from faults.cases import Case
from faults.kills import check_checkpoints
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import resume, train

# For each directory, by the number of its inode, the inodes of its names.
Names = dict[int, dict[str, int]]


@dataclass
class Moment:
    """The disk after one call.

    Attributes:
        saved: The step of the last checkpoint that the training took for saved.
        names: The names in each directory.
        durable: Those that were flushed.
        contents: For each file what was flushed.
        lengths: For each file its length.
    """

    saved: int
    names: Names
    durable: Names
    contents: dict[int, bytes]
    lengths: dict[int, int]


@dataclass
class Recorder:
    """Records the calls that change a directory tree."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    durable: Names = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    saved: int = 0
    # An open file keeps the system from using the number of its inode again.
    _open: dict[int, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync"):
                stack.enter_context(mock.patch.object(os, name, self._recorded(getattr(os, name), name == "fsync")))
            save = Run.save

            def saved(run: Run, step: int, *arguments: object, **options: object) -> None:
                save(run, step, *arguments, **options)  # type: ignore[arg-type]
                if not options.get("rehearsal"):
                    self.saved = step

            stack.enter_context(mock.patch.object(Run, "save", saved))
            yield
        self._note(*self._look())
        for descriptor in self._open.values():
            os.close(descriptor)

    def _recorded(self, call: Callable[..., object], flushes: bool) -> Callable[..., object]:
        def recorded(*arguments: object, **options: object) -> object:
            result = call(*arguments, **options)
            names, lengths = self._look()
            if flushes:
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                inode = path.stat().st_ino
                if path.is_dir():
                    self.durable = {**self.durable, inode: names.get(inode, {})}
                else:
                    self.contents = {**self.contents, inode: path.read_bytes()}
            self._note(names, lengths)
            return result

        return recorded

    def _note(self, names: Names, lengths: dict[int, int]) -> None:
        self.moments.append(Moment(self.saved, names, self.durable, self.contents, lengths))

    def _look(self) -> tuple[Names, dict[int, int]]:
        names: Names = {}
        lengths: dict[int, int] = {}
        for folder, _, _ in os.walk(self.root):
            entries = names[os.stat(folder).st_ino] = {}
            for entry in os.scandir(folder):
                status = entry.stat(follow_symlinks=False)
                entries[entry.name], lengths[status.st_ino] = status.st_ino, status.st_size
                if status.st_ino not in self._open:
                    self._open[status.st_ino] = os.open(entry.path, os.O_RDONLY)
        return names, lengths


def build(moment: Moment, inode: int, path: Path, draw: random.Random, lost: float) -> None:
    """Write the tree that a power failure leaves; a change of a name is lost, if not flushed, with probability `lost`.

    Some file systems keep the order of such changes; here the later one may be kept and the earlier one lost.
    """
    path.mkdir()
    durable, names = moment.durable.get(inode, {}), moment.names.get(inode, {})
    for name in {**durable, **names}:
        child = (durable if draw.random() < lost else names).get(name)
        if child is None:
            continue
        if child in moment.names or child in moment.durable:
            build(moment, child, path / name, draw, lost)
            continue
        content = moment.contents.get(child)
        if content is None or len(content) != moment.lengths.get(child, len(content)):
            length = moment.lengths.get(child, 0)
            content = draw.choice((b"", bytes(length), (content or b"")[: length // 2]))
        (path / name).write_bytes(content)


def cut_power(case: Case, folder: Path, draw: random.Random, resumed: float) -> tuple[int, int]:
    """Train, and build what each power failure leaves; resume some of them.

    Args:
        case: The training.
        folder: Directory for its disk and for what is left of it.
        draw: Source of randomness.
        resumed: Fraction of them that are resumed and compared with the undisturbed training.

    Returns:
        The number of power failures, and of those resumed.
    """
    disk = folder / "disk"
    disk.mkdir()
    recorder = Recorder(disk)
    with recorder.recording():
        train(case.config, [case.data], disk / "new" / "run")
    root, count, continued = disk.stat().st_ino, 0, 0
    for number, moment in enumerate(recorder.moments):
        for turn, lost in enumerate((1.0, 0.0, 0.5, 0.5, 0.5)):
            left = folder / f"left-{number}-{turn}"
            build(moment, root, left, draw, lost)
            out = left / "new" / "run"
            check_checkpoints(out)
            count += 1
            if moment.saved:
                assert last_step(out) >= moment.saved, f"{left}: the checkpoint of step {moment.saved} is lost"
            if draw.random() < resumed:
                outcome = resume(out, {}) if Run(out).exists() else train(case.config, [case.data], out)
                assert not outcome.signal, "a signal has ended the training, such as that of `timeout`"
                assert_same_checkpoints(case.whole, out)  # the log is not flushed
                continued += 1
    return count, continued
