"""A run as a dictionary: machine, versions, limits, settings and cases. Written and read as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

import llm_ext
from bench import limits, peers

__all__ = ["FORMAT", "machine", "read_json", "rounded", "start", "versions", "write_json"]

FORMAT = 2  # of the JSON file, see bench/results/README.md


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the hardware and its load."""
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
    """Return the versions of Python, llm_ext, its build and every peer (None: not installed)."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "llm_ext": llm_ext.__version__,
        "build_info": dict(llm_ext.build_info()),
        "peers": peers.versions(device),
    }
    if device == "cpu":
        found["models"] = peers.model_versions()
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn  # untyped in torch
        found["cudnn"] = cudnn.version()
    return found


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run without cases; measures the limits of the machine."""
    record = {
        "format": FORMAT,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(settings["device"]),
        "versions": versions(settings["device"]),
        "limits": limits.measure_cuda() if settings["device"] == "cuda" else limits.measure(settings["threads"]),
        "settings": settings,
        "cases": [],
        "means": [],
    }
    return cast(dict[str, Any], rounded(record))


def rounded(value: Any) -> Any:
    """Round floats to six significant digits, as in files: `--from` then prints what the run has printed."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _case_lines(case: dict[str, Any]) -> Iterator[str]:
    """A line for the case and one for each candidate, so that a diff shows which candidates changed."""
    head = {key: value for key, value in case.items() if key not in ("ours", "others")}
    yield f'  {_dumps(head)[:-1]}, "ours":'
    yield f'   {_dumps(case["ours"])}, "others": ['
    yield from _joined(f"   {_dumps(entry)}" for entry in case["others"])
    yield "  ]}"


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Add a comma to all lines but the last."""
    previous: str | None = None
    for line in lines:
        if previous is not None:
            yield f"{previous},"
        previous = line
    if previous is not None:
        yield previous


def write_json(run: dict[str, Any], path: Path) -> None:
    """Write a record with numbers to six digits, one candidate a line."""
    run = rounded(run)
    lines = ["{"]
    lines += [f' "{key}": {_dumps(value)},' for key, value in run.items() if key not in ("cases", "means")]
    lines.append(' "cases": [')
    lines += _joined("\n".join(_case_lines(case)) for case in run["cases"])
    lines += [" ],", ' "means": [', *_joined(f"  {_dumps(mean)}" for mean in run["means"]), " ]", "}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: the file is not a record of this format.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{path}: not a benchmark record of format {FORMAT}")
    return run
