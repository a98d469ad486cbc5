"""What a run says: lines for people, JSON for machines, a plot."""

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
from bench import peers, timing


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, Any]:
    """Return who is compared: python, llm_ext and how it was built, and every peer (None: not installed)."""
    return {
        "python": platform.python_version(),
        "llm_ext": llm_ext.__version__,
        "build_info": llm_ext.build_info(),
        "peers": peers.versions(),
    }


def limits(threads: int) -> dict[str, float]:
    """Measure what the machine can do at best now: copying memory, and torch's float32 matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 2048, 2048)
    turns = timing.take_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 1.0, 7)
    torch.set_num_threads(before)
    best = {name: min(filter(None, seconds)) for name, seconds in turns.seconds.items()}
    return {
        "copy_gb_per_s": 2 * source.nbytes / best["copy"] / 1e9,
        "product_gflop_per_s": 2 * 2048**3 / best["product"] / 1e9,
    }


def header(run: dict[str, Any]) -> str:
    """Return the lines above the cases."""
    here, settings, found = run["machine"], run["settings"], run["versions"]
    build = ", ".join(f"{key} {value}" for key, value in found["build_info"].items())
    others = [f"{name} {version or '(not installed)'}" for name, version in found["peers"].items()]
    copy, product = run["limits"]["copy_gb_per_s"], run["limits"]["product_gflop_per_s"]
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']:.0f} GB, {here['system']}, load {here['load']:.1f}",
        f"Copy {copy:.0f} GB/s (read and write), matrix product {product:.0f} GFLOP/s, at best",
        f"llm_ext {found['llm_ext']} ({build}), Python {found['python']}",
        f"Peers: {', '.join(others)}",
    ]
    if absent := [word for word in settings["libraries"] if word in settings["absent"]]:
        lines.append(f"Left out, not installed (pip install --no-build-isolation '.[bench]'): {', '.join(absent)}")
    lines += [
        f"{settings['threads']} threads, {settings['dtype']}. Times: median of the turns [quartiles].",
        "Ratio: the same of the ratios within each round. On a shared machine times drift and ratios hold.",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds with a unit that suits."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def verdict(peer: dict[str, Any]) -> str:
    """Return what there is to say about a ratio: the bar, and whether we lose."""
    words = []
    if peer["ratio"] < 1:
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
        if "ratio" in entry:
            ratio = f"{entry['ratio']:.3g} × [{entry['ratio_q1']:.3g} – {entry['ratio_q3']:.3g}]"
            line = f"{line:<80} {ratio:<26} {verdict(entry)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def summary(cases: Sequence[dict[str, Any]]) -> str:
    """Return the last lines: bars met and missed, cases lost, results that were wrong."""
    every = [(case, peer) for case in cases for peer in case["peers"]]
    timed = [(case, peer) for case, peer in every if "ratio" in peer]
    barred = [(case, peer) for case, peer in every if peer["bar"] is not None]
    met = [pair for pair in barred if pair[1].get("met")]
    lines = [f"Bars met: {len(met)} of {len(barred)}."]
    for case, peer in barred:
        if not peer.get("met"):
            got = f"{peer['ratio']:.3g}" if "ratio" in peer else peer["status"]
            lines.append(f"  missed: {case['case']} against {peer['name']}: {got}, bar {peer['bar']:g}")
    lost = [(case, peer) for case, peer in timed if peer["ratio"] < 1]
    lines.append(f"Lost: {len(lost)} of {len(timed)} comparisons.")
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
        "machine": machine(),
        "versions": versions(),
        "limits": limits(settings["threads"]),
        "settings": settings,
        "cases": [],
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


# Dark enough to be told apart on white, also by those who do not see red and green apart.
COLOURS = {
    "torch": "#c44e00",
    "compile": "#8a5a00",
    "onnxruntime": "#0067a8",
    "openvino": "#6a3d9a",
    "jax": "#00785a",
}


def write_plot(run: dict[str, Any], path: Path) -> None:
    """Draw the ratio of every comparison on a logarithmic axis, with quartiles and bars, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text; ids that do not change from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 8})
    from matplotlib import pyplot

    rows: list[tuple[str, dict[str, Any] | None]] = []
    for case in run["cases"]:
        timed = [peer for peer in case["peers"] if "ratio" in peer]
        if timed:
            rows += [(case["case"], None), *((peer["name"], peer) for peer in timed)]
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.17 * max(len(rows), 1)), layout="constrained")
    for y, (_, peer) in enumerate(rows):
        if peer is None:
            continue
        colour = COLOURS[peer["library"]]
        axes.plot([1, peer["ratio"]], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([peer["ratio_q1"], peer["ratio_q3"]], [y, y], color="black", linewidth=1)
        if peer["bar"] is not None:
            axes.plot([peer["bar"]], [y], marker="|", markersize=9, markeredgewidth=2, color="black")
        axes.annotate(
            f"{peer['ratio']:.3g}",
            (max(peer["ratio"], peer["ratio_q3"], peer["bar"] or 0, 1), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    for tick, (_, peer) in zip(axes.get_yticklabels(), rows, strict=True):
        if peer is None:
            tick.set_fontweight("bold")
        else:
            tick.set_color(COLOURS[peer["library"]])
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("time of the peer / time of llm_ext (black line: quartiles; black mark: the bar of the project)")
    settings = run["settings"]
    title = f"{run['machine']['cpu']}, {settings['threads']} threads, {settings['dtype']}"
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
