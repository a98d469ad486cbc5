"""Comparisons: the candidates of a case are checked against the reference, and only the correct ones are timed."""

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

__all__ = [
    "LIMIT",
    "OURS",
    "Candidate",
    "Case",
    "Comparison",
    "Entry",
    "Mean",
    "Settings",
    "geometric_mean",
    "is_peer",
    "relative_error",
    "run",
    "targets_apply",
    "tensors",
]

# Largest difference to the float64 reference, relative to its largest value. float32 leaves room for gradients that
# sum 8192 terms, but rejects a computation in bfloat16 or TF32 (errors from 1e-3). bfloat16 has 8 significant bits.
TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TF32_TOLERANCE = 2e-2  # TF32 rounds factors to 11 significant bits
# The targets are set for these settings, or for this GPU.
TARGET_THREADS, TARGET_DTYPE = 2, torch.float32
TARGET_GPU = "H200"
# `library` of candidates that take part whatever --peers selects and that are not peers: llm_ext used in another way,
# and limits of the machine.
OURS, LIMIT = "llm_ext", "limit"

Entry = dict[str, Any]  # an object of the JSON file, see bench/results/README.md


def tensors(result: Any) -> list[Tensor]:
    """Return the result of a call as a flat list of tensors; whatever numpy converts counts as one tensor."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in tensors(item)]
    import numpy as np

    return [torch.from_numpy(np.array(result))]


@dataclass(frozen=True)
class Candidate:
    """An implementation under test.

    name: as printed.
    library: the word of `--peers` that selects it, or `OURS` or `LIMIT`.
    build: prepares everything and returns the call to time.
    outputs: converts the result of a call to tensors in the order of the reference.
    reference: the expected result, if it differs from the comparison's.
    tolerance: the largest error relative to the reference, if it differs from that of the dtype.
    """

    name: str
    library: str
    build: Callable[[], timing.Call]
    outputs: Callable[[Any], list[Tensor]] = tensors
    reference: Sequence[Tensor] | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The float64 reference of a case and the candidates: `ours`, and the others, each compared with `ours`."""

    reference: Sequence[Tensor]
    ours: Candidate
    others: Sequence[Candidate]


@dataclass(frozen=True)
class Case:
    """One measurement.

    name: "group/kind/sizes".
    build: makes the comparison, given dtype and number of threads.
    training: whether gradients are computed; otherwise everything runs in inference mode.
    work: the work of one call, in `unit`; memory traffic (GB) is that of float32.
    targets: the ratio to reach, by name of a candidate.
    threads: overrides the number of threads of the settings.
    dtype: overrides the dtype of the settings.
    tf32: whether float32 products on CUDA may round their factors to TF32, for all candidates.
    memory: whether to measure peak memory as well, where the system allows it.
    """

    name: str
    build: Callable[[torch.dtype, int], Comparison]
    training: bool
    work: float
    unit: str
    targets: Mapping[str, float] = field(default_factory=dict)
    threads: int | None = None
    dtype: torch.dtype | None = None
    tf32: bool = False
    memory: bool = False

    @property
    def group(self) -> str:
        """The name up to the first slash."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Mean:
    """A geometric mean of the ratios of several cases.

    cases: patterns of case names.
    against: patterns of candidate names; each case contributes its lowest ratio to any of them.
    target: the mean to reach, or None.
    """

    cases: Sequence[str]
    against: Sequence[str]
    target: float | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    threads: of every candidate.
    dtype: of all tensors.
    seconds: approximate time per case.
    rounds: maximum number of turns per candidate.
    libraries: the words of `--peers` that take part.
    absent: libraries that are not available.
    device: "cpu" or "cuda".
    """

    threads: int
    dtype: torch.dtype
    seconds: float
    rounds: int
    libraries: Sequence[str]
    absent: Sequence[str] = ()
    device: str = "cpu"


def targets_apply(settings: Settings) -> bool:
    """Return whether the targets are set for these settings or, on CUDA, for this GPU."""
    if settings.device == "cuda":
        return TARGET_GPU in torch.cuda.get_device_name()
    return settings.dtype == TARGET_DTYPE and settings.threads == TARGET_THREADS


def is_peer(entry: Entry) -> bool:
    """Return whether the entry of a candidate belongs to another library, as opposed to llm_ext or a limit."""
    return entry["library"] not in (OURS, LIMIT)


def relative_error(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest value of each tensor; infinite if the sizes differ."""
    if [output.numel() for output in outputs] != [expected.numel() for expected in reference]:
        return math.inf
    largest = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        if expected.numel() == 0:
            continue
        scale = expected.abs().max().item()
        difference = (output.reshape(expected.shape).double() - expected).abs().max().item()
        relative = difference / scale if scale > 0 else difference
        largest = max(largest, math.inf if math.isnan(relative) else relative)
    return largest


def _check(
    candidate: Candidate, reference: Sequence[Tensor], tolerance: float
) -> tuple[timing.Call | None, dict[str, Any]]:
    """Build a candidate and check its result; return the call, or None if it must not be timed, and its entry."""
    entry: Entry = {"name": candidate.name, "library": candidate.library}
    try:
        call = candidate.build()
        expected = reference if candidate.reference is None else candidate.reference
        error = relative_error(candidate.outputs(call()), expected)
    except Exception as failure:  # another library may raise anything; the remaining candidates still run
        lines = str(failure).strip().splitlines() or [""]
        return None, entry | {"status": "failed", "reason": f"{type(failure).__name__}: {lines[0][:200]}"}
    tolerance = candidate.tolerance or tolerance
    entry["error"] = error if math.isfinite(error) else None
    if not error <= tolerance:
        reason = f"relative error {error:.2g}, tolerance {tolerance:.0e}"
        return None, entry | {"status": "wrong", "reason": reason}
    return call, entry | {"status": "measured"}


def _times(seconds: timing.Seconds, calls: int, work: float) -> Entry:
    median, q1, q3 = timing.spread(seconds)
    return {
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "rate": work / median,
        "rounds": sum(value is not None for value in seconds),
        "calls_per_round": calls,
    }


def _device_times(device: Mapping[str, timing.Seconds], name: str, ours: str) -> Entry:
    """The entries of a candidate that was timed on the device alone; none if it was not."""
    if name not in device:
        return {}
    entry: Entry = {"device_s": timing.spread(device[name]).median}
    if name != ours and ours in device:
        entry["device_ratio"] = timing.ratio(device[name], device[ours]).median
    return entry


def run(case: Case, settings: Settings) -> Entry:
    """Measure a case and return its entry of the JSON file."""
    threads = case.threads or settings.threads
    dtype = case.dtype or settings.dtype
    tolerance = TF32_TOLERANCE if case.tf32 else TOLERANCES[dtype]
    work = case.work * dtype.itemsize / 4 if case.unit == "GB" else case.work
    with_targets = targets_apply(settings)
    torch.compiler.reset()
    torch.manual_seed(0)
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    if settings.device == "cuda":
        # torch's own default is TF32 for cuDNN's layers and exact float32 for products.
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
        for backend in backends:
            backend.fp32_precision = "tf32" if case.tf32 else "ieee"
    entry_of_case: Entry = {
        "case": case.name,
        "group": case.group,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "unit": case.unit,
        "work": work,
    }
    try:
        try:
            comparison = case.build(dtype, threads)
        except ImportError as error:  # a model of a package that is not installed
            ours = {"name": OURS, "library": OURS, "status": "absent", "reason": str(error).splitlines()[0]}
            return entry_of_case | {"ours": ours, "others": []}
        calls: dict[str, timing.Call] = {}
        with nullcontext() if case.training else torch.inference_mode():
            own_call, ours = _check(comparison.ours, comparison.reference, tolerance)
            if own_call is not None:
                calls[comparison.ours.name] = own_call
            others = []
            for candidate in comparison.others:
                if candidate.library not in (OURS, LIMIT, *settings.libraries):
                    continue
                entry: Entry = {"name": candidate.name, "library": candidate.library}
                if candidate.library in settings.absent:
                    entry |= {"status": "absent", "reason": "not available"}
                elif own_call is None:
                    entry |= {"status": "skipped", "reason": "llm_ext was not measured"}
                else:
                    call, entry = _check(candidate, comparison.reference, tolerance)
                    if call is not None:
                        calls[candidate.name] = call
                others.append(entry | {"target": case.targets.get(candidate.name) if with_targets else None})
            if own_call is not None:
                turns = timing.take_turns(calls, settings.seconds, settings.rounds, settings.device)
                if case.memory and settings.device == "cpu" and memory.unavailable() is None:
                    for entry in (ours, *others):
                        if entry["name"] in calls:
                            entry["peak_bytes"] = memory.peak(calls[entry["name"]])[0]
    finally:
        torch.set_num_threads(previous_threads)

    if own_call is not None:
        own_seconds = turns.seconds[comparison.ours.name]
        ours |= _times(own_seconds, turns.calls[comparison.ours.name], work)
        ours |= _device_times(turns.device, comparison.ours.name, comparison.ours.name)
        for entry in others:
            if entry["status"] == "measured":
                seconds = turns.seconds[entry["name"]]
                median, q1, q3 = timing.ratio(seconds, own_seconds)
                entry |= _times(seconds, turns.calls[entry["name"]], work)
                entry |= _device_times(turns.device, entry["name"], comparison.ours.name)
                entry |= {"ratio": median, "ratio_q1": q1, "ratio_q3": q3}
                entry["met"] = None if entry["target"] is None else median >= entry["target"]
    return entry_of_case | {"ours": ours, "others": others}


def _lowest_ratio(case: Entry, against: Sequence[str]) -> float | None:
    """The lowest ratio to a candidate of these names; None if a pattern has no candidate that took part."""
    ratios: list[float] = []
    for pattern in against:
        entries = [entry for entry in case["others"] if fnmatch.fnmatchcase(entry["name"], pattern)]
        if all(entry["status"] in ("absent", "skipped") for entry in entries):
            return None
        ratios += [entry["ratio"] for entry in entries if "ratio" in entry]
    return min(ratios, default=None)


def geometric_mean(mean: Mean, names: Sequence[str], cases: Sequence[Entry], settings: Settings) -> Entry:
    """Compute a mean over the cases of a run and return its entry of the JSON file.

    Args:
        mean: what to compute.
        names: of all cases that exist; if some of the mean's cases were not measured, its target is not judged.
        cases: entries of the measured cases.
        settings: of the run.
    """
    expected = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in mean.cases)]
    lowest = [_lowest_ratio(case, mean.against) for case in cases if case["case"] in expected]
    ratios = [ratio for ratio in lowest if ratio is not None]
    ratio = statistics.geometric_mean(ratios) if ratios else None
    target = mean.target if targets_apply(settings) else None
    met = None
    if ratio is not None and target is not None and len(ratios) == len(expected):
        met = ratio >= target
    return {
        "cases": list(mean.cases),
        "against": list(mean.against),
        "cases_measured": len(ratios),
        "cases_expected": len(expected),
        "ratio": ratio,
        "target": target,
        "met": met,
    }
