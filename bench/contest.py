"""One case: contestants are built, checked against the truth, and only those that pass are timed."""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import memory, timing

# Largest difference over largest value of the truth, which is float64. float32 leaves room for gradients that
# are sums of 8192 terms; a computation in bf16 or TF32 (errors from 1e-3) does not pass. bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TF32_TOLERANCE = 2e-2  # factors of 11 bits
# The bars of the project are stated for this setting.
BAR_THREADS, BAR_DTYPE = 2, torch.float32
BAR_GPU = "H200"
# Who takes part whatever `--peers` says, and is no rival: llm_ext put to use in another way, limits of the machine.
OURS, LIMIT = "llm_ext", "limit"


def tensors(result: Any) -> list[Tensor]:
    """Return what a call returned as a flat list of tensors; anything that numpy reads counts as one."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors(part)]
    import numpy as np

    return [torch.from_numpy(np.array(result))]


@dataclass(frozen=True)
class Contestant:
    """Somebody who can do a case.

    name: as printed.
    library: the word of `--peers` that selects it, or `OURS` or `LIMIT`.
    build: prepares everything and returns the call to be timed.
    outputs: what a call returned, as tensors in the order of the truth.
    truth: the right result, if it is not that of the others.
    """

    name: str
    library: str
    build: Callable[[], timing.Call]
    outputs: Callable[[Any], list[Tensor]] = tensors
    truth: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Contest:
    """A case made ready: the right result, in float64, and who takes part, all compared with `ours`."""

    truth: Sequence[Tensor]
    ours: Contestant
    peers: Sequence[Contestant]


@dataclass(frozen=True)
class Case:
    """What is measured.

    name: "group/kind/sizes".
    build: makes the contest, given dtype and number of threads.
    training: with gradients; otherwise everything runs in inference mode.
    work: how much one call does, in `unit`; memory (GB) for float32.
    bars: by name of a peer, the ratio that the project has set itself.
    threads: if not those of the settings.
    dtype: if not that of the settings.
    tf32: whether products of float32 on CUDA may round their factors, those of all contestants.
    memory: whether to measure the peak of memory as well, where that can be done.
    """

    name: str
    build: Callable[[torch.dtype, int], Contest]
    training: bool
    work: float
    unit: str
    bars: Mapping[str, float] = field(default_factory=dict)
    threads: int | None = None
    dtype: torch.dtype | None = None
    tf32: bool = False
    memory: bool = False

    @property
    def group(self) -> str:
        """The part of the name before the first slash."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Mean:
    """A geometric mean over the ratios of several cases.

    of: patterns of the names of the cases.
    against: patterns of the names of peers; in each case the one that came closest to llm_ext counts.
    bar: the mean that the project has set itself, or None.
    """

    of: Sequence[str]
    against: Sequence[str]
    bar: float | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure; `libraries` are the words of `--peers` that take part, `absent` those not installed.

    `device` is "cpu" or "cuda".
    """

    threads: int
    dtype: torch.dtype
    seconds: float
    rounds: int
    libraries: Sequence[str]
    absent: Sequence[str] = ()
    device: str = "cpu"


def barred(settings: Settings) -> bool:
    """Return whether these are the settings, or this the GPU, that the bars of the project are stated for."""
    if settings.device == "cuda":
        return BAR_GPU in torch.cuda.get_device_name()
    return settings.dtype == BAR_DTYPE and settings.threads == BAR_THREADS


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest value of each; infinite if sizes differ."""
    if len(got) != len(truth) or any(g.numel() != t.numel() for g, t in zip(got, truth, strict=True)):
        return math.inf
    worst = 0.0
    for g, t in zip(got, truth, strict=True):
        if t.numel() == 0:
            continue
        scale = t.abs().max().item()
        difference = (g.reshape(t.shape).double() - t).abs().max().item()
        relative = difference / scale if scale > 0 else difference
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


Entry = dict[str, Any]  # of the report


def _enter(contestant: Contestant, truth: Sequence[Tensor], tolerance: float) -> tuple[timing.Call | None, Entry]:
    """Build and check a contestant; the call, or None if it may not be timed, and its entry."""
    entry: Entry = {"name": contestant.name, "library": contestant.library}
    try:
        call = contestant.build()
        wrong_by = error(contestant.outputs(call()), truth if contestant.truth is None else contestant.truth)
    except Exception as failure:  # whatever a foreign library raises, the others still want their turn
        lines = str(failure).strip().splitlines() or [""]
        return None, entry | {"status": "failed", "reason": f"{type(failure).__name__}: {lines[0][:200]}"}
    entry["error"] = wrong_by if math.isfinite(wrong_by) else None
    if not wrong_by <= tolerance:
        reason = f"result is off by {wrong_by:.2g}, allowed {tolerance:.0e}"
        return None, entry | {"status": "wrong", "reason": reason}
    return call, entry | {"status": "measured"}


def _times(seconds: timing.Seconds, calls: int, work: float) -> Entry:
    median, q1, q3 = timing.spread(seconds)
    return {
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "rate": work / median,
        "rounds_s": seconds,
        "calls_per_round": calls,
    }


def run(case: Case, settings: Settings) -> Entry:
    """Hold a contest and return its entry of the report (see bench/results/README.md)."""
    threads = case.threads or settings.threads
    dtype = case.dtype or settings.dtype
    tolerance = TF32_TOLERANCE if case.tf32 else TOLERANCE[dtype]
    work = case.work * dtype.itemsize / 4 if case.unit == "GB" else case.work
    torch.compiler.reset()
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if settings.device == "cuda":
        # torch's own default is TF32 for the layers of cuDNN, and not for products.
        for of in (torch.backends.cuda.matmul, torch.backends.cudnn.rnn):
            of.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        contest = case.build(dtype, threads)
        calls: dict[str, timing.Call] = {}
        with nullcontext() if case.training else torch.inference_mode():
            call, ours = _enter(contest.ours, contest.truth, tolerance)
            peers = []
            for contestant in contest.peers:
                if contestant.library not in (OURS, LIMIT, *settings.libraries):
                    continue
                peer = None
                entry: Entry = {"name": contestant.name, "library": contestant.library}
                if contestant.library in settings.absent:
                    entry |= {"status": "absent", "reason": "not installed"}
                elif call is None:
                    entry |= {"status": "skipped", "reason": "nothing to compare with"}
                else:
                    peer, entry = _enter(contestant, contest.truth, tolerance)
                if peer is not None:
                    calls[contestant.name] = peer
                peers.append(entry | {"bar": case.bars.get(contestant.name) if barred(settings) else None})
            if call is not None:
                calls = {contest.ours.name: call, **calls}
                turns = timing.take_turns(calls, settings.seconds, settings.rounds, settings.device)
                if case.memory and settings.device == "cpu" and memory.absent() is None:
                    for entry in (ours, *peers):
                        if entry["name"] in calls:
                            entry["peak_bytes"] = memory.peak(calls[entry["name"]])[0]
    finally:
        torch.set_num_threads(before)

    if call is not None:
        own = turns.seconds[contest.ours.name]
        ours |= _times(own, turns.calls[contest.ours.name], work)
        for entry in peers:
            if entry["status"] == "measured":
                seconds = turns.seconds[entry["name"]]
                median, q1, q3 = timing.ratio(seconds, own)
                entry |= _times(seconds, turns.calls[entry["name"]], work)
                entry |= {"ratio": median, "ratio_q1": q1, "ratio_q3": q3}
                entry["met"] = None if entry["bar"] is None else median >= entry["bar"]
    return {
        "case": case.name,
        "group": case.group,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "unit": case.unit,
        "work": work,
        "ours": ours,
        "peers": peers,
    }


def _closest(case: Entry, against: Sequence[str]) -> float | None:
    """The lowest ratio to any of those peers; None if some of them took no part in the case."""
    found: list[float] = []
    for pattern in against:
        entries = [peer for peer in case["peers"] if fnmatch.fnmatchcase(peer["name"], pattern)]
        if all(peer["status"] in ("absent", "skipped") for peer in entries):
            return None
        found += [peer["ratio"] for peer in entries if "ratio" in peer]
    return min(found, default=None)


def mean(wanted: Mean, names: Sequence[str], cases: Sequence[Entry], settings: Settings) -> Entry:
    """Take a mean over the cases of a run.

    Args:
        wanted: which mean.
        names: of all cases there are; over less than those it means, a mean is shown and its bar is not judged.
        cases: entries of the report.
        settings: of the run.
    """
    expected = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted.of)]
    ratios = [_closest(case, wanted.against) for case in cases if case["case"] in expected]
    known = [ratio for ratio in ratios if ratio is not None]
    ratio = statistics.geometric_mean(known) if known else None
    bar = wanted.bar if barred(settings) else None
    met = None
    if ratio is not None and bar is not None and len(known) == len(expected):
        met = ratio >= bar
    return {
        "of": list(wanted.of),
        "against": list(wanted.against),
        "cases": len(known),
        "cases_expected": len(expected),
        "ratio": ratio,
        "bar": bar,
        "met": met,
    }
