"""make fuzz: random calls of every op and public function, between guard pages and under two fillings of fresh memory.

A call is made twice, with other bytes in fresh memory: it must raise the same error, of a kind that a caller expects,
or give the same bits in results and gradients. A valid call is compared with the reference as well. Calls run in a
process of their own; if it dies, or hangs, the next one goes on behind the call. run.py --replay SEED makes a call
again. What was found belongs in tests/ops/test_hostile_arguments.py.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HANG = 60  # seconds that no call takes
MEMORY = 3 << 30  # bytes that the calls may allocate
FILLINGS = (0xFF, 0x3F)  # NaN; 0.75 in float32
RECORD = struct.Struct("6q")  # next seed, calls, guarded blocks, refused calls, compared calls, findings


def build_guard(folder: Path) -> Path:
    library = folder / "guard.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", HERE / "guard.c", "-o", library, "-lpthread"], check=True)
    return library


# ---- the process that makes the calls


class Worker:
    def __init__(self) -> None:
        import torch

        self.torch = torch
        library = ctypes.CDLL(None)
        self.fill: Any = getattr(library, "guard_poison", lambda byte: None)
        self.blocks: Any = getattr(library, "guard_blocks", lambda: 0)
        torch.ones(3)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        warnings.simplefilter("ignore")

    def fault(self, seed: int) -> tuple[str | None, bool, bool]:
        """Make the calls of a seed; return what is wrong, whether they were refused, and whether compared."""
        from support.random_calls import Choices, fault, outcome, random_call

        self.torch.manual_seed(seed)
        call = random_call(Choices(seed))
        self.torch.set_num_threads(1 + seed // 256 % 3)
        self.fill(FILLINGS[0])
        first, refused = outcome(call)
        self.fill(FILLINGS[1])
        second, _ = outcome(call)
        compares = not call.changed and call.reference is not None and seed % 3 == 0
        return fault(call, first, second, refused, compares), refused, compares

    def run(self, record: mmap.mmap, end: float) -> None:
        seed, calls, before, refused, compared, findings = RECORD.unpack(record[: RECORD.size])
        while time.time() < end:
            record[: RECORD.size] = RECORD.pack(seed, calls, before + self.blocks(), refused, compared, findings)
            signal.alarm(HANG)
            try:
                fault, more, was_compared = self.fault(seed)
            except Exception as error:
                fault, more, was_compared = f"{type(error).__name__}: {error}", False, False
            if fault is not None:
                report(seed, fault)
                findings += 1
            seed, calls, refused = seed + 1, calls + 2 + 2 * was_compared, refused + more
            compared += was_compared
        signal.alarm(0)
        record[: RECORD.size] = RECORD.pack(seed, calls, before + self.blocks(), refused, compared, findings)


def report(seed: int, fault: str) -> None:
    import torch
    from support.random_calls import Choices, random_call

    torch.manual_seed(seed)
    print(f"seed {seed}: {random_call(Choices(seed))}\n    {fault}", flush=True)


# ---- the process that starts it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) * 1000, help="the first; default: the time")
    parser.add_argument("--replay", type=int, metavar="SEED", help="make one call again")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--guarded", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    if options.replay is not None and options.guarded:
        worker = Worker()
        report(options.replay, str(worker.fault(options.replay)))
        return 0
    if options.worker is not None:
        path, end = options.worker
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as record:
            Worker().run(record, float(end))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guarded = os.environ | {"LD_PRELOAD": str(build_guard(folder))}
        if options.replay is not None:
            command = [sys.executable, __file__, "--replay", str(options.replay), "--guarded"]
            return subprocess.run(command, env=guarded, check=False).returncode
        path = folder / "record"
        path.write_bytes(RECORD.pack(options.seed, 0, 0, 0, 0, 0).ljust(mmap.PAGESIZE, b"\0"))
        end = time.time() + 60 * options.minutes
        died = 0
        while time.time() < end:
            before = path.read_bytes()
            command = [sys.executable, __file__, "--worker", str(path), str(end)]
            done = subprocess.run(command, env=guarded, check=False)
            if done.returncode == 0:
                break
            seed, *others = RECORD.unpack(path.read_bytes()[: RECORD.size])
            report(seed, "hangs" if done.returncode == -signal.SIGALRM else f"ends the process: {done.returncode}")
            died += 1
            if path.read_bytes() == before and done.returncode > 0:
                break  # it cannot start
            path.write_bytes(RECORD.pack(seed + 1, *others).ljust(mmap.PAGESIZE, b"\0"))
        seed, calls, blocks, refused, compared, findings = RECORD.unpack(path.read_bytes()[: RECORD.size])
    print(
        f"fuzz: seeds {options.seed} to {seed - 1}: {calls:,} calls, {blocks:,} guarded blocks, {refused:,} refused,"
        f" {compared:,} compared with the reference; {findings + died} findings"
    )
    return 1 if findings + died else 0


if __name__ == "__main__":
    sys.exit(main())
