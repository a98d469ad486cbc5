"""A run as text: header, a table for each case, summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.comparison import LIMIT, is_peer

__all__ = ["header", "mean_line", "summary", "table", "verdict"]


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def _cpu_lines(limits: dict[str, Any]) -> list[str]:
    lines = [
        f"Copy {limits['copy_gb_per_s']:.0f} GB/s (read and write), "
        f"matrix product {limits['product_gflop_per_s']:.0f} GFLOP/s, best of several"
    ]
    if limits["unavailable"] is None:
        read, peak = limits["read_gb_per_s"], limits["fma_gflop_per_s"]
        lines.append(f"Read {read:.0f} GB/s, FMA peak {peak:.0f} GFLOP/s, best of several")
    else:
        lines.append(f"FMA peak and read speed not measured: {limits['unavailable']}")
    return lines


def _gpu_lines(gpu: dict[str, Any], limits: dict[str, Any], cudnn: int) -> list[str]:
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in limits["product_tflop_per_s"].items())
    return [
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, {gpu['memory_gb']:.0f} GB, cuDNN {cudnn}",
        f"Copy {limits['copy_gb_per_s']:.0f} GB/s (read and write), products {products} TFLOP/s, best of several",
    ]


def header(run: dict[str, Any]) -> str:
    """Return the lines above the cases."""
    machine, settings, versions = run["machine"], run["settings"], run["versions"]
    build = ", ".join(f"{key} {value}" for key, value in versions["build_info"].items())
    peers = [f"{name} {version or '(not installed)'}" for name, version in versions["peers"].items()]
    lines = [
        f"{machine['cpu']}, {_count(machine['cores'], 'core')}, {machine['memory_gb']:.0f} GB, {machine['system']}, "
        f"load {machine['load']:.1f}"
    ]
    if "gpu" in machine:
        lines += _gpu_lines(machine["gpu"], run["limits"], versions["cudnn"])
    else:
        lines += _cpu_lines(run["limits"])
    lines += [
        f"llm_ext {versions['llm_ext']} ({build}), Python {versions['python']}",
        f"Peers: {', '.join(peers)}",
    ]
    if models := versions.get("models"):
        lines.append(f"Models: {', '.join(f'{name} {version}' for name, version in models.items())}")
    if absent := [word for word in settings["libraries"] if word in settings["absent"]]:
        lines.append(f"Skipped, not installed (pip install 'llm_ext[bench]'): {', '.join(absent)}")
    if settings["device"] == "cuda":
        lines.append("Times: median [quartiles] over the turns, by events in the stream; each case has its own dtype.")
        lines.append("On the device: the same calls in a CUDA graph, if they differ by more than 10 %.")
    else:
        threads, dtype = _count(settings["threads"], "thread"), settings["dtype"]
        lines.append(f"{threads}, {dtype}. Times: median [quartiles] over the turns.")
    lines.append(
        "Speed-ups: median [quartiles] of the ratios within each round; on a shared machine they vary less than times."
    )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """Format seconds with a suitable unit."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _ratio(value: float, target: float | None = None) -> str:
    """Format a ratio with three digits, or with more if it would look like 1 or like the target, and is below."""
    below = [bound for bound in (1, target) if bound is not None and value < bound]
    texts = [f"{value:.{digits}g}" for digits in (3, 4, 5)]
    return next((text for text in texts if all(float(text) < bound for bound in below)), texts[-1]) + "x"


def _is_slower(entry: dict[str, Any]) -> bool:
    """Whether llm_ext is slower than this peer."""
    return is_peer(entry) and "ratio" in entry and entry["ratio"] < 1


def verdict(entry: dict[str, Any]) -> str:
    """Return what to note about a measured candidate: fraction of a limit, whether llm_ext is slower, its target."""
    words = []
    if entry["library"] == LIMIT:
        words.append(f"{entry['ratio']:.0%} of the limit")
    if _is_slower(entry):
        words.append("llm_ext is slower")
    if entry["target"] is not None:
        words.append(f"target {entry['target']:g}x {'met' if entry['met'] else 'missed'}")
    return ", ".join(words)


def _on_device(entry: dict[str, Any]) -> str:
    """Time and ratio on the device alone, if Python and launches have a part in those of the calls."""
    seconds = entry.get("device_s")
    if seconds is None or abs(seconds - entry["median_s"]) <= 0.1 * seconds:
        return ""
    ratio = f", {entry['device_ratio']:.3g}x" if "device_ratio" in entry else ""
    return f"on the device {_duration(seconds).strip()}{ratio}"


def table(case: dict[str, Any]) -> str:
    """Return the lines of one case."""
    lines = [f"{case['case']}  ({_count(case['threads'], 'thread')}, {case['dtype']})"]
    entries = (case["ours"], *case["others"])
    width = max(24, *(len(entry["name"]) for entry in entries))
    for entry in entries:
        name = f"  {entry['name']:<{width}}"
        if entry["status"] != "measured":
            lines.append(f"{name} {entry['status']}: {entry['reason']}")
            continue
        if "median_s" not in entry:
            continue
        quartiles = f"[{_duration(entry['q1_s']).strip()} – {_duration(entry['q3_s']).strip()}]"
        rate = f"{entry['rate']:.4g} {case['unit']}/s"
        line = f"{name} {_duration(entry['median_s']):>10} {quartiles:<22} {rate:>14}"
        if "peak_bytes" in entry:
            line = f"{line:<{width + 40}} {entry['peak_bytes'] / 1e6:>8.1f} MB"
        if "ratio" in entry:
            ratio = f"{_ratio(entry['ratio'], entry['target'])} [{entry['ratio_q1']:.3g} – {entry['ratio_q3']:.3g}]"
            line = f"{line:<{width + 56}} {ratio:<26} {verdict(entry)}"
        if words := _on_device(entry):
            line = f"{line.rstrip()}  {words}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def mean_line(mean: dict[str, Any]) -> str:
    """Return the line of a geometric mean."""
    against = ", ".join(mean["against"])
    if len(mean["against"]) > 1:
        against = f"the fastest of {against}"
    number = f"{mean['cases_measured']} of {mean['cases_expected']} cases"
    line = f"{_ratio(mean['ratio'], mean['target'])} over {against}: {', '.join(mean['cases'])} ({number})"
    if mean["target"] is None:
        return line
    judgement = "not judged, cases are missing" if mean["met"] is None else "met" if mean["met"] else "missed"
    return f"{line}, target {mean['target']:g}x {judgement}"


def summary(cases: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]] = ()) -> str:
    """Return the last lines: means, targets, the cases where llm_ext is slower, candidates that were not timed."""
    lines = []
    if known := [mean for mean in means if mean["ratio"] is not None]:
        lines += ["Geometric means of the speed-up:", *(f"  {mean_line(mean)}" for mean in known)]
    entries = [(case, entry) for case in cases for entry in case["others"]]
    with_target = [(case, entry) for case, entry in entries if entry["target"] is not None]
    judged = [mean for mean in means if mean["met"] is not None]
    met = [entry for entry in (*judged, *(entry for _, entry in with_target)) if entry.get("met")]
    lines.append(f"Targets met: {len(met)} of {len(with_target) + len(judged)}.")
    for case, entry in with_target:
        if not entry.get("met"):
            got = _ratio(entry["ratio"], entry["target"]) if "ratio" in entry else entry["status"]
            lines.append(f"  missed: {case['case']}, {entry['name']}: {got}, target {entry['target']:g}x")
    lines += [f"  missed: mean {mean_line(mean)}" for mean in judged if not mean["met"]]
    compared = [entry for _, entry in entries if is_peer(entry) and "ratio" in entry]
    slower = [(case, entry) for case, entry in entries if _is_slower(entry)]
    lines.append(f"llm_ext is slower in {len(slower)} of {len(compared)} comparisons with other libraries.")
    lines += [f"  {case['case']}, {entry['name']}: {_ratio(entry['ratio'])}" for case, entry in slower]
    for case in cases:
        for entry in (case["ours"], *case["others"]):
            if entry["status"] in ("wrong", "failed"):
                lines.append(f"Not timed: {case['case']}, {entry['name']}, {entry['status']}: {entry['reason']}")
    return "\n".join(lines)
