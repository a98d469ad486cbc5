"""What a run says: lines for people, JSON for machines."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import llm_ext
from bench import limits, peers
from bench.contest import LIMIT, OURS


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the times depend on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "memory_gb": round(gpu.total_memory / 1e9, 1),
            "multiprocessors": gpu.multi_processor_count,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
    return found


def versions(device: str = "cpu") -> dict[str, Any]:
    """Return who is compared: python, llm_ext and how it was built, and every peer (None: not installed)."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "llm_ext": llm_ext.__version__,
        "build_info": llm_ext.build_info(),
        "peers": peers.versions(device),
    }
    if device == "cuda":
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def _cpu_lines(at_best: dict[str, Any]) -> list[str]:
    return [
        f"Copy {at_best['copy_gb_per_s']:.0f} GB/s (read and write), "
        f"matrix product {at_best['product_gflop_per_s']:.0f} GFLOP/s, at best",
        f"Read {at_best['read_gb_per_s']:.0f} GB/s, FMA peak {at_best['fma_gflop_per_s']:.0f} GFLOP/s, at best"
        if at_best["absent"] is None
        else f"No FMA peak and no reads: {at_best['absent']}",
    ]


def _gpu_lines(gpu: dict[str, Any], at_best: dict[str, Any], cudnn: int) -> list[str]:
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in at_best["product_tflop_per_s"].items())
    return [
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, {gpu['memory_gb']:.0f} GB, cuDNN {cudnn}",
        f"Copy {at_best['copy_gb_per_s']:.0f} GB/s (read and write), matrix products {products} TFLOP/s, at best",
    ]


def header(run: dict[str, Any]) -> str:
    """Return the lines above the cases."""
    here, settings, found = run["machine"], run["settings"], run["versions"]
    build = ", ".join(f"{key} {value}" for key, value in found["build_info"].items())
    others = [f"{name} {version or '(not installed)'}" for name, version in found["peers"].items()]
    at_best = run["limits"]
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']:.0f} GB, {here['system']}, load {here['load']:.1f}",
        *(_gpu_lines(here["gpu"], at_best, found["cudnn"]) if "gpu" in here else _cpu_lines(at_best)),
        f"llm_ext {found['llm_ext']} ({build}), Python {found['python']}",
        f"Peers: {', '.join(others)}",
    ]
    if absent := [word for word in settings["libraries"] if word in settings["absent"]]:
        lines.append(f"Left out, not installed (pip install --no-build-isolation '.[bench]'): {', '.join(absent)}")
    where = f"{settings['threads']} threads, {settings['dtype']}"
    if settings["device"] == "cuda":
        where = "Events in the stream of the GPU; dtypes are those of the cases"
    lines += [
        f"{where}. Times: median of the turns [quartiles].",
        "Ratio: the same of the ratios within each round. On a shared machine times drift and ratios hold.",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds with a unit that suits."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def loses(peer: dict[str, Any]) -> bool:
    """Return whether a rival was quicker."""
    return peer.get("ratio", 1) < 1 and peer["library"] not in (OURS, LIMIT)


def verdict(peer: dict[str, Any]) -> str:
    """Return what there is to say about a ratio: how near a limit it is, whether we lose, the bar."""
    words = []
    if peer["library"] == LIMIT:
        words.append(f"{peer['ratio']:.0%} of the limit")
    if loses(peer):
        words.append("LOSES")
    if peer["bar"] is not None:
        words.append(f"bar {peer['bar']:g} {'met' if peer['met'] else 'MISSED'}")
    return ", ".join(words)


def table(case: dict[str, Any]) -> str:
    """Return the lines of one case."""
    threads = "1 thread" if case["threads"] == 1 else f"{case['threads']} threads"
    lines = [f"{case['case']}  ({threads}, {case['dtype']})"]
    for entry in (case["ours"], *case["peers"]):
        name = f"  {entry['name']:<24}"
        if entry["status"] != "measured":
            lines.append(f"{name} {entry['status']}: {entry['reason']}")
            continue
        if "median_s" not in entry:
            continue
        quartiles = f"[{duration(entry['q1_s']).strip()} – {duration(entry['q3_s']).strip()}]"
        rate = f"{entry['rate']:.4g} {case['unit']}/s"
        line = f"{name} {duration(entry['median_s']):>10} {quartiles:<22} {rate:>14}"
        if "peak_bytes" in entry:
            line = f"{line:<64} {entry['peak_bytes'] / 1e6:>8.1f} MB"
        if "ratio" in entry:
            ratio = f"{entry['ratio']:.3g} × [{entry['ratio_q1']:.3g} – {entry['ratio_q3']:.3g}]"
            line = f"{line:<80} {ratio:<26} {verdict(entry)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def mean_line(mean: dict[str, Any]) -> str:
    """Return the line of a geometric mean."""
    against = f"{'the closest of ' if len(mean['against']) > 1 else ''}{', '.join(mean['against'])}"
    number = f"{mean['cases']} of {mean['cases_expected']} cases"
    line = f"{mean['ratio']:.3g} × against {against} over {', '.join(mean['of'])} ({number})"
    if mean["bar"] is None:
        return line
    judgement = "not judged on a part" if mean["met"] is None else "met" if mean["met"] else "MISSED"
    return f"{line}: bar {mean['bar']:g} {judgement}"


def summary(cases: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]] = ()) -> str:
    """Return the last lines: means, bars met and missed, cases lost, results that were wrong."""
    lines = []
    if known := [mean for mean in means if mean["ratio"] is not None]:
        lines += ["Geometric means:", *(f"  {mean_line(mean)}" for mean in known)]
    every = [(case, peer) for case in cases for peer in case["peers"]]
    barred = [(case, peer) for case, peer in every if peer["bar"] is not None]
    judged = [mean for mean in means if mean["met"] is not None]
    met = [entry for entry in (*judged, *(peer for _, peer in barred)) if entry.get("met")]
    lines.append(f"Bars met: {len(met)} of {len(barred) + len(judged)}.")
    for case, peer in barred:
        if not peer.get("met"):
            got = f"{peer['ratio']:.3g}" if "ratio" in peer else peer["status"]
            lines.append(f"  missed: {case['case']} against {peer['name']}: {got}, bar {peer['bar']:g}")
    lines += [f"  missed: the mean {mean_line(mean)}" for mean in judged if not mean["met"]]
    rivals = [peer for _, peer in every if "ratio" in peer and peer["library"] not in (OURS, LIMIT)]
    lost = [(case, peer) for case, peer in every if loses(peer)]
    lines.append(f"Lost: {len(lost)} of {len(rivals)} comparisons.")
    lines += [f"  {case['case']} to {peer['name']}: {peer['ratio']:.3g} ×" for case, peer in lost]
    for case in cases:
        for entry in (case["ours"], *case["peers"]):
            if entry["status"] in ("wrong", "failed"):
                lines.append(f"Not timed: {case['case']}, {entry['name']}, {entry['status']}: {entry['reason']}")
    return "\n".join(lines)


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run that has not measured anything yet."""
    return {
        "format": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(settings["device"]),
        "versions": versions(settings["device"]),
        "limits": limits.measure_cuda() if settings["device"] == "cuda" else limits.measure(settings["threads"]),
        "settings": settings,
        "cases": [],
        "means": [],
    }


def write_json(run: dict[str, Any], path: Path) -> None:
    """Write a report, numbers to six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(rounded(run), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")
