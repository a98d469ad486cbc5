"""Timing on a shared machine: candidates take turns, and ratios are taken within a round.

A round gives every candidate one turn. A turn is a block of several calls, because the thread pools of some libraries
keep spinning after a call (ONNX Runtime's for about 50 ms) and would take a core from the next candidate: before each
turn the process waits until its threads are idle. The first calls of a turn wake the candidate's own pool and fill the
caches; they are not counted.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = [
    "Call",
    "Clock",
    "CudaClock",
    "Seconds",
    "Spread",
    "Turns",
    "clock_for",
    "estimate",
    "ratio",
    "spread",
    "take_turns",
]

Call = Callable[[], Any]
Seconds = Sequence[float | None]  # per call, one value a round; None in a round that a slow candidate skipped

MIN_ROUNDS = 3
LONG_CALL = 0.25  # seconds from which waking a thread pool no longer matters, so that the call needs no warm-up
IDLE_WINDOW = 0.01  # seconds; longer than a scheduler tick, the resolution of the CPU time of running threads
IDLE_TIMEOUT = 1.0


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Turns:
    """Measurements by candidate: seconds per call in each round, and the number of calls in a turn.

    device: likewise, without the time of Python and of launches, for those that can be recorded.
    """

    seconds: dict[str, Seconds]
    calls: dict[str, int]
    device: dict[str, Seconds] = field(default_factory=dict)


def spread(values: Seconds) -> Spread:
    """Return median and quartiles of at least one value."""
    known = [value for value in values if value is not None]
    if len(known) == 1:
        return Spread(known[0], known[0], known[0])
    q1, median, q3 = statistics.quantiles(known, n=4, method="inclusive")
    return Spread(median, q1, q3)


def ratio(other: Seconds, ours: Seconds) -> Spread:
    """Return the spread of `other / ours`, taken within each round."""
    pairs = zip(other, ours, strict=True)
    return spread([None if a is None or b is None else a / b for a, b in pairs])


def _wait_until_idle() -> None:
    """Wait until no thread of this process runs, for at most `IDLE_TIMEOUT` seconds."""
    end = time.perf_counter() + IDLE_TIMEOUT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(IDLE_WINDOW)
        if time.process_time() - before < 0.2 * IDLE_WINDOW:
            return


class Clock:
    """Measures time on the CPU."""

    def block(self, call: Call, calls: int) -> float:
        """Return seconds per call over a block of calls."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        """Wait until the previous turn has finished all its work."""
        _wait_until_idle()

    def recorded(self, call: Call) -> Call | None:
        """Return a call that repeats the work of this one on the device alone, or None."""
        return None


class CudaClock(Clock):
    """Measures time on a GPU by events in its stream, from before the first call to after the last.

    If the GPU finishes a call before Python has queued the next one, the time is Python's. `recorded` tells them apart.
    """

    def block(self, call: Call, calls: int) -> float:
        """Return seconds per call over a block of calls."""
        new_event: Callable[..., Any] = torch.cuda.Event  # untyped in torch
        start, end = new_event(enable_timing=True), new_event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def wait(self) -> None:
        """Wait until the previous turn has finished all its work."""
        torch.cuda.synchronize()

    def recorded(self, call: Call) -> Call | None:
        """Return the replay of a CUDA graph of the call; None if it cannot be captured, as one that waits."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            torch.cuda.synchronize()
        except Exception:  # another library may raise anything
            return None
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own
        return graph.replay


def clock_for(device: str) -> Clock:
    """Return the clock of a device type."""
    return CudaClock() if device == "cuda" else Clock()


def estimate(call: Call, clock: Clock) -> float:
    """Return approximately how many seconds one call takes."""
    seconds = clock.block(call, 1)
    calls = 1
    while seconds * calls < 0.02:
        calls *= 4
        seconds = clock.block(call, calls)
    return seconds


def take_turns(calls: Mapping[str, Call], seconds: float, rounds: int, device: str = "cpu") -> Turns:
    """Time candidates in turns.

    Args:
        calls: the call of each candidate; the first, with which the others are compared, runs in every round.
        seconds: approximate time of the whole measurement.
        rounds: number of rounds; a candidate too slow for its turns skips some, but has `MIN_ROUNDS`.
        device: "cpu" or "cuda".
    """
    clock = clock_for(device)
    names = list(calls)
    replays = {name: replay for name in names if (replay := clock.recorded(calls[name])) is not None}
    turn = seconds / (rounds * (len(names) + len(replays)))
    once, count, interval = {}, {}, {}
    for name in names:
        clock.wait()
        once[name] = estimate(calls[name], clock)
        count[name] = max(1, round(turn / once[name]))
        interval[name] = max(1, min(math.ceil(once[name] / turn), (rounds - 1) // (MIN_ROUNDS - 1)))
    interval[names[0]] = 1

    measured: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    on_device: dict[str, list[float | None]] = {name: [None] * rounds for name in replays}
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            # A new order in each round, so that no candidate always follows the same one.
            shuffle(names)
            for name in names:
                if i % interval[name] == 0:
                    clock.wait()
                    if once[name] < LONG_CALL:
                        clock.block(calls[name], math.ceil(count[name] / 4))
                    measured[name][i] = clock.block(calls[name], count[name])
                    if name in replays:
                        on_device[name][i] = clock.block(replays[name], count[name])
    finally:
        gc.enable()
    return Turns({**measured}, count, {**on_device})
