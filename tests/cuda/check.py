"""Compile every CUDA kernel for every target and report its resources: `make cuda-check`.

Fails if a hot kernel spills registers or has an array in local memory: both would access global memory at every step.
Needs nvcc, no GPU and no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support import nvcc

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
# The defaults of setup.py, whose PTX for later devices is that from which the code of 9.0 is made.
TARGETS = ("sm_80", "sm_90")
# Made from the same PTX as the last target, if nvcc knows them. Not in the table, but a spill there is a fault, too.
LATER_TARGETS = ("sm_100", "sm_120")
# Kernels that run where no other fits, or once per call: they may spill.
COLD = re.compile(r"generic|reset|clear|zero")


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    target: str
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes of local memory per thread, spills included
    spills: int  # bytes stored and loaded

    @property
    def hot(self) -> bool:
        return not COLD.search(self.name)

    @property
    def faulty(self) -> bool:
        return self.hot and (self.stack > 0 or self.spills > 0)


def parse(source: str, report: str) -> list[Kernel]:
    """The kernels in a report of `ptxas -v`."""
    kernels = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        head = re.match(r"'(\S+)' for '(\S+)'", entry)
        used = re.search(r"Used (\d+) registers", entry)
        # The first properties are those of the kernel; functions that were not inlined have their own.
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        if head is None or used is None or not frames:
            raise ValueError(f"the report of ptxas has an unknown format:\n{entry}")
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", entry)
        kernels.append(
            Kernel(
                source,
                head[1],
                head[2],
                int(used[1]),
                int(shared[1]) if shared else 0,
                sum(int(stack) for stack, _, _ in frames),
                sum(int(stores) + int(loads) for _, stores, loads in frames),
            )
        )
    return kernels


def compile_one(source: Path, virtual: str, targets: tuple[str, ...]) -> list[Kernel]:
    """Compile the device's half, in which nvcc reads the host's half, too: one PTX for these targets."""
    name = str(source.relative_to(ROOT))
    architecture = f"-gencode=arch={virtual},code=[{','.join(targets)}]"
    command = [str(nvcc.find()), "-fatbin", architecture, "-Xptxas=-v", str(nvcc.ptx_of(source, virtual))]
    done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} does not compile for {' and '.join(targets)}:\n{done.stdout}{done.stderr}")
    return parse(name, done.stdout + done.stderr)


def jobs_of(source: Path, later: tuple[str, ...] = ()) -> list[tuple[Path, str, tuple[str, ...]]]:
    """The arguments of compile_one for all targets. Two thirds of the time is for the PTX, so it is shared.

    The kernels of clusters, which are short of registers, are compiled for `later` targets as well.
    """
    groups: list[tuple[str, ...]] = [TARGETS]
    if nvcc.depends_on_target(source):
        groups = [TARGETS[:1], TARGETS[1:] + later]
    return [(source, group[0].replace("sm_", "compute_"), group) for group in groups]


def demangle(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels with demangled names, if c++filt exists."""
    tool = shutil.which("c++filt")
    if tool is None or not kernels:
        return kernels
    said = subprocess.run(
        [tool], input="\n".join(kernel.name for kernel in kernels), capture_output=True, text=True, check=True
    )
    names = [readable(line) for line in said.stdout.splitlines()]
    return [Kernel(k.source, name, *list(vars(k).values())[2:]) for k, name in zip(kernels, names, strict=True)]


def readable(name: str) -> str:
    """A demangled name without arguments, namespaces and casts of enumerators."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b\w+::", "", name)
    name = re.sub(r"\((?:unsigned )?\w+\)(?=-?\d)", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def table(kernels: list[Kernel]) -> str:
    """One line per kernel: registers, and bytes of static shared memory, local memory and spills, per target."""
    by_name: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault((kernel.source, kernel.name), {})[kernel.target] = kernel
    width = max(len(name) for _, name in by_name)
    lines = [" " * width + "".join(f"  {target:>26}" for target in TARGETS)]
    lines.append(
        f"{'kernel':{width}}" + "  {:>5} {:>6} {:>6} {:>6}".format("regs", "shared", "local", "spill") * len(TARGETS)
    )
    source = None
    for (file, name), row in sorted(by_name.items()):
        if file != source:
            source = file
            lines.append(file)
        cells = [row.get(target) for target in TARGETS]
        lines.append(
            f"{name:{width}}"
            + "".join(f"  {k.registers:5} {k.shared:6} {k.stack:6} {k.spills:6}" if k else " " * 28 for k in cells)
        )
    return "\n".join(lines)


def main() -> int:
    compiler = nvcc.find()
    if compiler is None:
        print("cuda-check: no nvcc found, the kernels were not compiled")
        return 0
    sources = sorted((CSRC / "cuda").rglob("*.cu"))
    said = subprocess.run(
        [str(compiler), "--list-gpu-code"], capture_output=True, text=True, check=False
    ).stdout.split()
    later = tuple(target for target in LATER_TARGETS if target in said)
    jobs = [job for source in sources for job in jobs_of(source, later)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            reports = list(pool.map(lambda job: compile_one(*job), jobs))
        except RuntimeError as error:
            print(f"cuda-check: {error}")
            return 1
    kernels = demangle([kernel for report in reports for kernel in report])
    if not kernels:
        print("cuda-check: no kernel found")
        return 1
    print(table(kernels))
    print("shared: static; plans (csrc/cuda/rnn/plan.h) request more at launch")
    faulty = [kernel for kernel in kernels if kernel.faulty]
    for kernel in faulty:
        print(f"cuda-check: {kernel.name} on {kernel.target} spills or uses local memory")
    targets = " and ".join(TARGETS + later)
    print(f"cuda-check: {len(sources)} files, {len(kernels)} kernels on {targets}, {len(faulty)} faulty")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
