"""The command line: `python -m bench` lists the cases, `python -m bench PATTERN...` runs them.

`python -m bench --device cuda` runs the cases of a GPU, all of them if no pattern is given.
`python -m bench --from FILE.json` prints an earlier run again and draws its pictures.
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
from typing import Any

import torch

import llm_ext
from bench import comparison, limits, peers, plots, recording, report
from bench.comparison import Case, Mean

_USAGE = "Run: `python -m bench PATTERN...`; a pattern is all, a group or part of a name. See --help for options."
# Groups that a pattern selects besides its own; "step" alone selects the group of that name.
_GROUPS = {"recurrence": ("recurrence", "step"), "attention": ("pooling", "prefix", "additive")}
_DEFAULT_JSON = Path("-")  # --json without a file
# Options that draw a picture, and the functions that do.
_PICTURES = {
    "speedup": (plots.draw_speedup, "draw the mean speed-up of each cell"),
    "overview": (plots.draw_overview, "draw all ratios, a row for each kind of case"),
    "curves": (plots.draw_scaling, f"draw time against B, H and T (cases of the group {plots.SCALING_GROUP})"),
    "lengths": (plots.draw_lengths, "draw time and memory against T (pooling and prefix pooling)"),
}


def select_cases(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Return the cases that any of the patterns selects, in the order of `cases`.

    Raises:
        ValueError: a pattern selects nothing.
    """
    names: set[str] = set()
    known = {case.group for case in cases}
    for pattern in patterns:
        groups = known.intersection(known if pattern == "all" else _GROUPS.get(pattern, (pattern,)))
        found = [
            case.name
            for case in cases
            if (case.group in groups if groups else fnmatch.fnmatchcase(case.name, f"*{pattern}*"))
        ]
        if not found:
            raise ValueError(f"no case matches {pattern!r}; `python -m bench` lists them")
        names.update(found)
    return [case for case in cases if case.name in names]


def listing(cases: Sequence[Case], means: Sequence[Mean] = ()) -> str:
    """Return the names of all cases by group with their targets, and the geometric means that have a target."""
    lines = []
    width = max((len(case.name) for case in cases), default=0)
    for group in dict.fromkeys(case.group for case in cases):
        lines.append(group)
        for case in cases:
            if case.group == group:
                targets = ", ".join(f"{target:g}x {name}" for name, target in case.targets.items())
                lines.append(f"  {case.name:<{width}} {f'target {targets}' if targets else ''}".rstrip())
    if with_target := [mean for mean in means if mean.target is not None]:
        lines.append("geometric means, in each case over the fastest of the candidates named")
        for mean in with_target:
            lines.append(f"  {', '.join(mean.cases)}: target {mean.target:g}x {', '.join(mean.against)}")
    return "\n".join((*lines, _USAGE))


def _default_json(device: str) -> Path:
    """The file of --json without a name: in bench/results, named after the machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else recording.machine()["cpu"]
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{device}-{words}.json"


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures llm_ext against other libraries. Without a pattern, lists the cases.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="all, a group, or part of a name (* and ? match)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure; cuda without a pattern runs all")
    add("--list", action="store_true", help="only list the cases")
    threads = min(2, len(os.sched_getaffinity(0)))
    add("--threads", type=_positive(int), default=threads, help="threads of every candidate")
    add("--seconds", type=_positive(float), help="approximate time per case; 8 if not given, 0.25 on cuda")
    add("--rounds", type=_positive(int), default=11, help="maximum number of turns per candidate")
    add("--dtype", choices=("float32", "float64"), default="float32", help="dtype of all tensors")
    add("--peers", metavar="A,B", help="libraries to compare with; all if not given")
    add("--json", type=Path, nargs="?", const=_DEFAULT_JSON, metavar="FILE", help="write all results")
    add("--from", type=Path, dest="source", metavar="FILE", help="print and draw an earlier run instead of measuring")
    for name, (_, text) in _PICTURES.items():
        add(f"--{name}", type=Path, metavar="FILE", help=f"{text}; .svg or .png")
    return parser


def _draw(run: dict[str, Any], pictures: dict[str, Path]) -> None:
    for name, path in pictures.items():
        _PICTURES[name][0](run, path)


def _measure(run: dict[str, Any], cases: Sequence[Case], settings: comparison.Settings, json: Path | None) -> int:
    """Run the cases, print them and add them to the record and to its file; return the exit status."""
    status = 0
    try:
        for case in cases:
            result = recording.rounded(comparison.run(case, settings))
            run["cases"].append(result)
            if json is not None:  # after each case: the run may be ended from outside
                recording.write_json(run, json)
            print(f"\n{report.table(result)}", flush=True)
            if result["ours"]["status"] not in ("measured", "absent"):
                status = 1
    except KeyboardInterrupt:
        print("\nInterrupted. The summary covers the cases that are complete.", file=sys.stderr)
        status = 130
    return status


def main(
    arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None, means: Sequence[Mean] = ()
) -> int:
    """Run the command line; `cases` and `means` replace those of bench/cases.

    Returns:
        0; 1 if a result of llm_ext was wrong or failed; 130 after Ctrl-C. A missed target is no error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    known = peers.libraries(options.device)
    libraries = [*known] if options.peers is None else [word for word in options.peers.split(",") if word]
    if unknown := sorted({*libraries} - {*known}):
        parser.error(f"--peers must be some of {','.join(known)}, got {','.join(unknown)}")
    pictures: dict[str, Path] = {name: path for name in _PICTURES if (path := getattr(options, name)) is not None}
    if pictures and importlib.util.find_spec("matplotlib") is None:
        parser.error("pictures need matplotlib (pip install 'llm_ext[bench]')")
    if options.json == _DEFAULT_JSON:
        options.json = _default_json(options.device)
    for path in (options.json, *pictures.values()):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    if options.source is not None:
        try:
            run = recording.read_json(options.source)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print("\n\n".join((report.header(run), *map(report.table, run["cases"]))))
        print(f"\n{report.summary(run['cases'], run['means'])}")
        _draw(run, pictures)
        return 0
    if on_cuda and not options.list and (not torch.cuda.is_available() or llm_ext.build_info()["cuda"] is None):
        parser.error("--device cuda needs a GPU and llm_ext built with CUDA (llm_ext.build_info())")
    peers.set_environment(options.threads)
    if cases is None:
        # After `set_environment`, because libraries read the environment when they are imported.
        if on_cuda:
            from bench.cases.cuda import CASES, MEANS
        else:
            from bench.cases.cpu import CASES, MEANS

        cases, means = CASES, MEANS
    if options.list or not (options.patterns or on_cuda):
        print(listing(cases, means))
        return 0
    try:
        selected = select_cases(cases, options.patterns or ["all"])
    except ValueError as error:
        parser.error(str(error))
    if "curves" in pictures and not any(case.group == plots.SCALING_GROUP for case in selected):
        parser.error(f"--curves draws cases of the group {plots.SCALING_GROUP}, but none is selected")

    absent = peers.not_installed(options.device)
    if not on_cuda and limits.unavailable() is not None:
        absent.append(comparison.LIMIT)
    settings = comparison.Settings(
        threads=options.threads,
        dtype=getattr(torch, options.dtype),
        seconds=options.seconds or (0.25 if on_cuda else 8.0),
        rounds=options.rounds,
        libraries=libraries,
        absent=absent,
        device=options.device,
    )
    run = recording.start(vars(settings) | {"dtype": options.dtype})
    print(report.header(run))
    status = _measure(run, selected, settings, options.json)
    names = [case.name for case in cases]
    found = [comparison.geometric_mean(mean, names, run["cases"], settings) for mean in means]
    run["means"] = recording.rounded(found)
    print(f"\n{report.summary(run['cases'], run['means'])}")
    if options.json is not None:
        recording.write_json(run, options.json)
    _draw(run, pictures)
    return status


if __name__ == "__main__":
    sys.exit(main())
