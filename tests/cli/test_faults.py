"""A short form of `make faults`: processes killed, power cut, disks full, several writers, flipped bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import disks
from faults.cases import Case, cases
from faults.flips import flip
from faults.kills import kill_trainings, kill_translations
from faults.power import cut_power
from faults.writers import jump, read_while_training, share_a_cache, write_together

pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("llm_ext.cli.training.pipeline.plot_loss", lambda *_: None)
        yield from cases(tmp_path_factory.mktemp("cases"), 9, ["translate-gru"])


def test_kills(case: Case, tmp_path: Path) -> None:
    kill_trainings(case, tmp_path, random.Random(0), 2)
    kill_translations(case, tmp_path, random.Random(0), 1)


def test_power_failures(case: Case, tmp_path: Path) -> None:
    failures, _ = cut_power(case, tmp_path, random.Random(0), 0.02)
    assert failures > 100


def test_writers_and_clocks(case: Case, tmp_path: Path) -> None:
    assert write_together(case, tmp_path, 2) == 1
    share_a_cache(case, tmp_path, 2)
    jump(case, tmp_path, random.Random(0))
    read_while_training(case, tmp_path, 30)


def test_disks(case: Case, tmp_path: Path) -> None:
    if not disks.can_mount(tmp_path):
        pytest.skip("to mount a disk needs the rights of root")
    disks.fill_while_training(case, tmp_path)
    disks.turn_read_only(case, tmp_path)
    assert disks.sizes(case, tmp_path, 3) == (2, 0)


def test_flipped_bytes(case: Case, tmp_path: Path) -> None:
    for file, counter in flip(case, tmp_path, random.Random(0), 2).items():
        assert counter["another result"] == 0, file
