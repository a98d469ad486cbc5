"""The directory of a search: its definition, Optuna's database, and the trials that processes share.

A trial belongs to the process that holds its lock file, which the system releases when the process ends in any way. A
trial that is under way in the database but whose lock is free was interrupted, and the next process continues it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import AcquireReturnProxy, FileLock, Timeout
from optuna import Trial
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from llm_ext.cli.data.files import lock_directory, read_json, write_json
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import CONFIGS
from llm_ext.cli.tuning.space import encloses

__all__ = ["Definition", "Study"]

FORMAT = "llm_ext study"
# Seconds to wait for the database while other processes write.
PATIENCE = 60
# Times that a trial may end its process, such as by all memory that there is, before it counts as failed.
ATTEMPTS = 3


@dataclass(frozen=True)
class Definition:
    """The description of a search; it cannot change once the search has begun.

    Attributes:
        task: The task.
        files: Absolute paths of the training data.
        fingerprints: Hashes of the encoded data.
        settings: Settings that all trials share and that are not defaults.
        space: Values to try of other settings.
        folds: Trainings of each trial, with another part of the data held out in each; 1 holds out `val_fraction`.
        minutes: Limit of the time of each training, or None.
        steps: Limit of the steps of each training, or None.
    """

    task: str
    files: list[str]
    fingerprints: list[str]
    settings: dict[str, Any]
    space: dict[str, Any]
    folds: int
    minutes: float | None
    steps: int | None

    @property
    def name(self) -> str:
        """The name of the study in the database."""
        contents = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"llm-ext {self.task} {hashlib.sha256(contents.encode()).hexdigest()[:12]}"


class Study:
    """The directory of a search.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        database: File of Optuna's database.
        best: File of the best settings.
        picture: File of the picture.
        cache: Directory for the encoded text.
        optuna_study: Optuna's study, after `open`.
    """

    optuna_study: optuna.Study

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database, self.best, self.picture = path / "study.db", path / "best.toml", path / "trials.svg"
        self.cache = path / "cache"
        self._definition = path / "study.json"
        self._held: dict[int, AcquireReturnProxy[FileLock]] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the other processes of this search waiting."""
        with lock_directory(self.path, wait=True):
            yield

    def exists(self) -> bool:
        """Return whether a search has begun here."""
        return self._definition.exists()

    def definition(self) -> Definition:
        """Read the definition.

        Raises:
            CommandError: It is missing or damaged.
        """
        values = read_json(self._definition, FORMAT)
        try:
            definition = Definition(**{key: value for key, value in values.items() if key not in ("format", "version")})
            CONFIGS[definition.task](**definition.settings)
            return definition
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{self._definition}: damaged: {error}") from None

    def open(self, definition: Definition, first: dict[str, Any]) -> None:
        """Begin a search or join it; call it inside `locked`.

        Args:
            definition: The description of the search.
            first: Values of the first trial; those that the space does not have are drawn.

        Raises:
            CommandError: The directory holds another search, or its database cannot be used.
        """
        if self.exists():
            self._compare(self.definition(), definition)
        elif self.database.exists():
            raise CommandError(f"{self.database}: exists, but {self._definition.name}, which describes it, is missing")
        else:
            write_json(self._definition, {"format": FORMAT, "version": 1, **dataclasses.asdict(definition)})
        if self.database.exists():
            self._check_database()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = RDBStorage(
                f"sqlite:///{self.database.resolve()}", engine_kwargs={"connect_args": {"timeout": PATIENCE}}
            )
            self.optuna_study = optuna.create_study(storage=storage, study_name=definition.name, load_if_exists=True)
        # RuntimeError: written by another version of Optuna.
        except (RuntimeError, optuna.exceptions.StorageInternalError) as error:
            raise CommandError(f"{self.database}: cannot be used: {error}") from None
        self._storage = storage
        self._id = storage.get_study_id_from_name(definition.name)
        if not self.trials():
            space = definition.space
            self.optuna_study.enqueue_trial({name: first[name] for name in space if encloses(space[name], first[name])})

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that have begun or ended, and the first one while it waits."""
        return self.optuna_study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        """Return the present record of a trial."""
        return self._storage.get_trial(self._trial_id(number))

    def claim(self, count: int) -> Trial | None:
        """Return a trial for this process: an interrupted one, or a new one if there are fewer than `count`."""
        with self.locked():
            waiting = 0
            for frozen in self.trials():
                waiting += frozen.state == TrialState.WAITING
                if frozen.state != TrialState.RUNNING or not self._hold(frozen.number):
                    continue
                trial = Trial(self.optuna_study, self._trial_id(frozen.number))
                attempts = frozen.user_attrs.get("attempts", 0)
                if attempts < ATTEMPTS:
                    trial.set_user_attr("attempts", attempts + 1)
                    return trial
                self._end(trial, TrialState.FAIL, failure=f"its process ended {attempts} times without a message")
            if len(self.trials()) - waiting >= count:
                return None
            trial = self.optuna_study.ask()
            self._hold(trial.number)
            trial.set_user_attr("attempts", 1)
            return trial

    def folder(self, number: int) -> Path:
        """Return the directory for the files of a trial that is under way."""
        return self.path / "trials" / str(number)

    def end(self, trial: Trial, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        """Record the end of a trial, with attributes, and remove its files."""
        with self.locked():
            self._end(trial, state, value, **attributes)

    def release(self, trial: Trial) -> None:
        """Leave a trial, saved, to the next process."""
        trial.set_user_attr("attempts", 0)
        self._release(trial.number)

    def under_way(self) -> int:
        """Return the number of trials that other processes work on."""
        with self.locked():
            numbers = {trial.number for trial in self.trials() if trial.state == TrialState.RUNNING} - self._held.keys()
            free = [number for number in sorted(numbers) if self._hold(number)]
            for number in free:
                self._release(number)
            return len(numbers) - len(free)

    def _end(self, trial: Trial, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        for name, attribute in attributes.items():
            trial.set_user_attr(name, attribute)
        self.optuna_study.tell(trial, value, state)
        shutil.rmtree(self.folder(trial.number), ignore_errors=True)
        self._release(trial.number)

    def _hold(self, number: int) -> bool:
        """Lock a trial for this process; return False if another one has it."""
        try:
            self._held[number] = lock_directory(self.folder(number), wait=False)
        except Timeout:
            return False
        return True

    def _release(self, number: int) -> None:
        self._held.pop(number).lock.release()

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _compare(self, saved: Definition, mine: Definition) -> None:
        """Raise a CommandError that names what differs."""
        different = [
            f"{field.name} {getattr(saved, field.name)!r} there, {getattr(mine, field.name)!r} here"
            for field in dataclasses.fields(Definition)
            if field.name != "fingerprints" and getattr(saved, field.name) != getattr(mine, field.name)
        ]
        if different:
            raise CommandError(f"{self.path}: holds another search: {'; '.join(different)}; choose another --out")
        if saved.fingerprints != mine.fingerprints:
            raise CommandError(f"{self.path}: cannot continue: the text has changed since the search was started")

    def _check_database(self) -> None:
        """Raise a CommandError if the database is damaged or of another program, before Optuna writes into it."""
        try:
            with contextlib.closing(sqlite3.connect(self.database, timeout=PATIENCE)) as connection:
                tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
                (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise CommandError(f"{self.database}: damaged, or not a database of SQLite: {error}") from None
        if verdict != "ok":
            raise CommandError(f"{self.database}: damaged: {verdict}")
        # A kill may have left a database without tables.
        if tables and not {"studies", "trials"} <= tables:
            raise CommandError(f"{self.database}: expected a database of Optuna, got one of another program")
