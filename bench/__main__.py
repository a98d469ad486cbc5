"""The command line: `python -m bench` lists the cases, `python -m bench PATTERN…` runs them.

`python -m bench --device cuda` runs those of a GPU, all of them if no pattern is given.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import llm_ext
from bench import contest, limits, peers, plot, report
from bench.contest import Case, Mean

HELP = "Run: `python -m bench PATTERN…`, each of them all, a group or part of a name; --help shows the options."
# One step belongs to the recurrence, each kind of attention to attention; its own name selects it alone.
PARTS = {"recurrence": ("recurrence", "step"), "attention": ("pooling", "prefix", "additive")}


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Return the cases that patterns select, in the order of `cases`.

    Raises:
        ValueError: a pattern selects nothing.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = [
            case.name
            for case in cases
            if pattern == "all"
            or case.group in PARTS.get(pattern, (pattern,))
            or fnmatch.fnmatchcase(case.name, f"*{pattern}*")
        ]
        if not found:
            raise ValueError(f"no case matches {pattern!r}; `python -m bench` lists them")
        names.update(found)
    return [case for case in cases if case.name in names]


def listing(cases: Sequence[Case], means: Sequence[Mean] = ()) -> str:
    """Return the names of all cases, by group, with their bars, and the means that have a bar."""
    lines = []
    for group in dict.fromkeys(case.group for case in cases):
        lines.append(group)
        for case in cases:
            if case.group == group:
                bars = ", ".join(f"{bar:g} × {name}" for name, bar in case.bars.items())
                lines.append(f"  {case.name:<50} {f'bar {bars}' if bars else ''}".rstrip())
    if barred := [mean for mean in means if mean.bar is not None]:
        lines.append("geometric means, in each case against whoever came closest of several")
        for mean in barred:
            lines.append(f"  {', '.join(mean.of)}: bar {mean.bar:g} × {', '.join(mean.against)}")
    return "\n".join((*lines, HELP))


# --json without a file.
DEFAULT = Path("-")


def default_file(device: str) -> Path:
    """Return where a run without a name is written: bench/results, named after the machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else report.machine()["cpu"]
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{device}-{words}.json"


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures llm_ext against its peers; without a pattern it lists the cases.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="all, a group, or part of a name (* and ? match)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure; on cuda, without a pattern all")
    add("--list", action="store_true", help="only list the cases")
    threads = min(2, len(os.sched_getaffinity(0)))
    add("--threads", type=_positive(int), default=threads, help="of every contestant")
    add("--seconds", type=_positive(float), help="about how long to measure a case; by default 8, on cuda 0.25")
    add("--rounds", type=_positive(int), default=11, help="turns of each contestant at most")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of all numbers")
    add("--peers", metavar="A,B", help="libraries to compare with; by default all")
    add("--json", type=Path, nargs="?", const=DEFAULT, metavar="FILE", help="write everything measured")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the ratios")
    add("--curves", type=Path, metavar="FILE.svg", help=f"draw time against B, H and T; of the cases of {plot.CURVES}")
    add(
        "--lengths", type=Path, metavar="FILE.svg", help="draw time and memory against T; of pooling and prefix pooling"
    )
    return result


def main(
    arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None, means: Sequence[Mean] = ()
) -> int:
    """Run the command line; `cases` and `means` instead of those of bench/cases.py.

    Returns:
        0, or 1 if a result of ours was wrong or failed, or 130 after Ctrl-C. A missed bar is no error.
    """
    command = parser()
    options = command.parse_args(arguments)
    on_cuda = options.device == "cuda"
    known = peers.of_device(options.device)
    libraries = [*known] if options.peers is None else [word for word in options.peers.split(",") if word]
    if unknown := sorted({*libraries} - {*known}):
        command.error(f"--peers must be some of {','.join(known)}, got {','.join(unknown)}")
    if on_cuda and not options.list and (not torch.cuda.is_available() or llm_ext.build_info()["cuda"] is None):
        command.error("--device cuda needs a GPU, and llm_ext built with CUDA (llm_ext.build_info())")
    if options.json == DEFAULT:
        options.json = default_file(options.device)
    drawings = [path for path in (options.plot, options.curves, options.lengths) if path is not None]
    for path in (options.json, *drawings):
        if path is not None and not path.absolute().parent.is_dir():
            command.error(f"{path}: its folder does not exist")
    if drawings and importlib.util.find_spec("matplotlib") is None:
        command.error("--plot, --curves and --lengths need matplotlib (pip install --no-build-isolation '.[bench]')")
    peers.prepare(options.threads)
    if cases is None:
        # Only now: what a library reads from the environment has been set.
        if on_cuda:
            from bench.cuda import CASES, MEANS
        else:
            from bench.cases import CASES, MEANS

        cases, means = CASES, MEANS
    if options.list or not (options.patterns or on_cuda):
        print(listing(cases, means))
        return 0
    try:
        selected = chosen(cases, options.patterns or ["all"])
    except ValueError as error:
        command.error(str(error))
    if options.curves is not None and not any(case.group == plot.CURVES for case in selected):
        command.error(f"--curves draws cases of the group {plot.CURVES}; none is chosen")

    settings = contest.Settings(
        threads=options.threads,
        dtype=getattr(torch, options.dtype),
        seconds=options.seconds or (0.25 if on_cuda else 8.0),
        rounds=options.rounds,
        libraries=libraries,
        absent=[*peers.absent(options.device), *([] if on_cuda or limits.absent() is None else [contest.LIMIT])],
        device=options.device,
    )
    run = report.start(vars(settings) | {"dtype": options.dtype})
    print(report.header(run))
    code = 0
    try:
        for case in selected:
            result = contest.run(case, settings)
            run["cases"].append(result)
            print(f"\n{report.table(result)}", flush=True)
            if result["ours"]["status"] != "measured":
                code = 1
    except KeyboardInterrupt:
        print("\nInterrupted: what follows holds the cases that were finished.", file=sys.stderr)
        code = 130
    names = [case.name for case in cases]
    run["means"] = [contest.mean(mean, names, run["cases"], settings) for mean in means]
    print(f"\n{report.summary(run['cases'], run['means'])}")
    if options.json is not None:
        report.write_json(run, options.json)
    if options.plot is not None:
        plot.ratios(run, options.plot)
    if options.curves is not None:
        plot.growth(run, options.curves)
    if options.lengths is not None:
        plot.lengths(run, options.lengths)
    return code


if __name__ == "__main__":
    sys.exit(main())
