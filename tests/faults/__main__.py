"""Run all faults and print what came of them: `python -m faults --kills 200`."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from faults import disks
from faults.cases import NAMES, cases
from faults.flips import OUTCOMES, flip
from faults.kills import kill_trainings, kill_translations
from faults.power import cut_power
from faults.writers import jump, read_while_training, share_a_cache, write_together


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults of the machine under llm-ext.")
    parser.add_argument("--kills", type=int, default=60, help="processes to kill (default: 60)")
    parser.add_argument("--flips", type=int, default=20, help="bytes to flip in each file (default: 20)")
    parser.add_argument(
        "--resumed", type=float, default=0.02, help="part of the power failures to resume after (default: 0.02)"
    )
    parser.add_argument("--case", nargs="+", choices=NAMES, default=NAMES, help="trainings to disturb (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, begin = random.Random(options.seed), time.monotonic()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch("llm_ext.cli.training.pipeline.plot_loss"),
        mock.patch("llm_ext.cli.training.report.Report.say"),
    ):
        folder = Path(name)
        for number, case in enumerate(cases(folder, names=options.case)):
            here = folder / f"faults-{number}"
            here.mkdir()

            def say(text: str, case_name: str = case.name) -> None:
                print(f"{time.monotonic() - begin:6.1f} s  {case_name:15}  {text}", flush=True)

            share = options.kills // len(options.case) + (number < options.kills % len(options.case))
            killed = share // 4 if case.config.task == "translate" else 0
            found = kill_trainings(case, here, draw, share - killed)
            say(f"{share - killed} trainings killed, {found} checkpoints found whole, resumed: the same weights")
            if killed:
                lines = kill_translations(case, here, draw, killed)
                say(f"{killed} translations killed, {lines} lines found, as without a kill")
            failures, continued = cut_power(case, here, draw, options.resumed)
            say(f"{failures} power failures, {continued} resumed: the same weights")
            refused = write_together(case, here, 3)
            share_a_cache(case, here, 3)
            jump(case, here, draw)
            read_while_training(case, here, 100)
            say(f"3 trainings in one directory: {refused} refused; 3 with one cache; 100 loads; a clock that jumps")
            if disks.can_mount(here):
                disks.fill_while_training(case, here)
                disks.turn_read_only(case, here)
                full, _ = disks.sizes(case, here, 200 if number == 0 else 2)
                say(f"a disk that fills, a disk that turns read-only, {full} disks that are too small")
            else:
                say("no disks: to mount them needs the rights of root")
            for file, counter in flip(case, here, draw, options.flips).items():
                counts = ", ".join(f"{outcome} {counter[outcome]}" for outcome in OUTCOMES)
                say(f"{file}: {sum(counter.values())} bytes flipped: {counts}")
                assert not counter[OUTCOMES[2]], f"{file}: a flipped byte was not noticed"


if __name__ == "__main__":
    main()
