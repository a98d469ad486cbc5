"""DDP, FSDP2 and distributed checkpoints: two processes train like one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.distributed import WRAPPERS, build, continue_in_two_processes, load, optimizer_of, save, train
from support.process import run_ranks


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_continue_the_training_of_one(tmp_path: Path) -> None:
    """One process begins, two continue from its checkpoint, and one reads theirs."""
    trained = []
    for number, (name, _) in enumerate(WRAPPERS):
        model = build(name, 1)
        optimizer = optimizer_of(model)
        train(name, model, optimizer, slice(None), 1)
        save(model, optimizer, tmp_path / f"{number}")
        train(name, model, optimizer, slice(None), 2)
        trained.append((model, optimizer))
    run_ranks(2, continue_in_two_processes, tmp_path)
    for number, (name, _) in enumerate(WRAPPERS):
        model, optimizer = trained[number]
        other = build(name, 2)
        other_optimizer = optimizer_of(other)
        load(other, other_optimizer, tmp_path / f"{number}.two")
        torch.testing.assert_close(other.state_dict(), model.state_dict())
        torch.testing.assert_close(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
