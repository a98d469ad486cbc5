"""Timing on a machine that others use as well: contestants take turns, and ratios are taken within a round.

A round gives every contestant one turn. A turn is a block of several calls rather than one, because the
thread pools of the libraries go on spinning after a call (ONNX Runtime's for about 50 ms) and would take a
core from whoever came next: between turns the process waits until it is quiet. The first calls of a turn,
which wake the contestant's own pool and fill the caches, are not counted.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

MIN_ROUNDS = 3
# To a call of so many seconds, waking a pool is nothing.
LONG_CALL = 0.25
# Longer than a scheduler tick, the grain of CPU time of threads that run.
QUIET_WINDOW = 0.01
QUIET_LIMIT = 1.0


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


Seconds = Sequence[float | None]  # a call, in each round; None in a round that a slow contestant sat out


@dataclass(frozen=True)
class Turns:
    """What was measured, by contestant: seconds a call in each round, and how many calls a turn had."""

    seconds: dict[str, Seconds]
    calls: dict[str, int]


def spread(values: Seconds) -> Spread:
    """Return median and quartiles of at least one value."""
    known = [value for value in values if value is not None]
    if len(known) == 1:
        return Spread(known[0], known[0], known[0])
    q1, median, q3 = statistics.quantiles(known, n=4, method="inclusive")
    return Spread(median, q1, q3)


def ratio(peer: Seconds, ours: Seconds) -> Spread:
    """Return how many times as long the peer took: the spread of the ratios of each round."""
    pairs = zip(peer, ours, strict=True)
    return spread([None if p is None or o is None else p / o for p, o in pairs])


def wait_until_quiet() -> None:
    """Wait until no thread of this process runs, for `QUIET_LIMIT` seconds at most."""
    end = time.perf_counter() + QUIET_LIMIT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(QUIET_WINDOW)
        if time.process_time() - before < 0.2 * QUIET_WINDOW:
            return


class Clock:
    """How time is taken on the CPU."""

    def block(self, call: Call, calls: int) -> float:
        """Return seconds a call, over a block of calls."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def quiet(self) -> None:
        """Wait until nothing of the turn before goes on."""
        wait_until_quiet()


class CudaClock(Clock):
    """How time is taken on a GPU: by events in its stream, from before the first call to after the last.

    Where the GPU has done a call before Python has queued the next one, the time is Python's.
    """

    def block(self, call: Call, calls: int) -> float:
        """Return seconds a call, over a block of calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        for _ in range(calls):
            call()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        return float(start.elapsed_time(end)) / 1e3 / calls  # type: ignore[no-untyped-call]

    def quiet(self) -> None:
        """Wait until nothing of the turn before goes on."""
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """Return the clock of a type of device."""
    return CudaClock() if device == "cuda" else Clock()


def estimate(call: Call, clock: Clock) -> float:
    """Return about how many seconds one call takes."""
    seconds = clock.block(call, 1)
    calls = 1
    while seconds * calls < 0.02:
        calls *= 4
        seconds = clock.block(call, calls)
    return seconds


def take_turns(calls: Mapping[str, Call], seconds: float, rounds: int, device: str = "cpu") -> Turns:
    """Time contestants in turns.

    Args:
        calls: what each contestant does; the first, to whom the others are compared, is in every round.
        seconds: about how long to measure altogether.
        rounds: how many; a contestant too slow for its share of the time sits some out, but has `MIN_ROUNDS`.
        device: where they do it, "cpu" or "cuda".
    """
    clock = clock_of(device)
    names = list(calls)
    turn = seconds / (rounds * len(names))
    once, count, every = {}, {}, {}
    for name in names:
        clock.quiet()
        once[name] = estimate(calls[name], clock)
        count[name] = max(1, round(turn / once[name]))
        every[name] = max(1, min(math.ceil(once[name] / turn), (rounds - 1) // (MIN_ROUNDS - 1)))
    every[names[0]] = 1

    measured: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            # A new order each time, so that nobody always follows the same neighbour.
            shuffle(names)
            for name in names:
                if i % every[name] == 0:
                    clock.quiet()
                    if once[name] < LONG_CALL:
                        clock.block(calls[name], math.ceil(count[name] / 4))
                    measured[name][i] = clock.block(calls[name], count[name])
    finally:
        gc.enable()
    return Turns({**measured}, count)
