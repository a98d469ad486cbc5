"""make sanitize: csrc under the sanitizers of the compiler.

- caches: what calls share (allocator, weight cache, barrier), used by several threads under ThreadSanitizer. Short.
- kernels: every kernel of every ISA level that this machine has, on arrays of exact size, under AddressSanitizer with
  UndefinedBehaviorSanitizer, and under ThreadSanitizer.
- ops: the op tests with the whole library under AddressSanitizer and UndefinedBehaviorSanitizer, at every level.

Without arguments all three run; --short runs the first, and the kernels of one level under AddressSanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-w", f"-I{HERE / 'stub'}", f"-I{ROOT / 'csrc'}"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-fsanitize=thread"]
CACHES = [
    HERE / "caches.cpp",
    ROOT / "csrc" / "torch" / "alloc" / "cpu_caching_allocator.cpp",
    ROOT / "csrc" / "torch" / "weight_cache" / "packed_weight_cache.cpp",
    ROOT / "csrc" / "torch" / "threads" / "usable_cores.cpp",
]
ISA = ROOT / "csrc" / "cpu" / "isa"
ROUNDS = 400
SHORT_ROUNDS = 40
OP_TESTS = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("pooling", "attention", "linear", "recurrence")]


def run(command: Sequence[str | Path], **environment: str) -> int:
    return subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | environment, check=False).returncode


def build(name: str, sources: Sequence[Path], sanitizers: Sequence[str]) -> Path:
    """Compile a program, each of its sources at the same time as the others."""
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = [BUILD / f"{name}-{source.stem}.o" for source in sources]
    compile_one = [COMPILER, *FLAGS, *sanitizers, "-c"]
    jobs = max(1, len(os.sched_getaffinity(0)))
    pending = list(zip(sources, objects, strict=True))
    running: list[subprocess.Popen[bytes]] = []
    while pending or running:
        while pending and len(running) < jobs:
            source, target = pending.pop()
            running.append(subprocess.Popen([*compile_one, str(source), "-o", str(target)]))
        if running.pop(0).wait() != 0:
            sys.exit(f"sanitize: {name} does not compile")
    program = BUILD / name
    if run([COMPILER, *sanitizers, *objects, "-o", program, "-pthread"]) != 0:
        sys.exit(f"sanitize: {name} cannot be linked")
    return program


def levels() -> list[str]:
    """The ISA levels of this machine."""
    words = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    needs: dict[str, set[str]] = {
        "baseline": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
    }
    return [level for level, features in needs.items() if features <= words]


def kernels_of(level: str, name: str, sanitizers: Sequence[str]) -> Path:
    """The program that runs the kernels of one level."""
    if level == "avx512_bf16":  # a level of other kernels and one entry of its own
        return build(f"kernels-{name}-{level}", [HERE / "kernels.cpp", *sorted(ISA.glob("*.cpp"))], sanitizers)
    sources = [HERE / "kernels.cpp", ISA / f"{level}.cpp"]
    return build(f"kernels-{name}-{level}", sources, [*sanitizers, f"-DLLM_EXT_LEVEL={level}_kernels"])


def check_ops(level: str) -> int:
    """The op tests with a library of its own, beside the package's Python files."""
    target = BUILD / "ops"
    environment = {
        "LLM_EXT_CXXFLAGS": " ".join(["-O1", "-g1", "-fno-omit-frame-pointer", *ADDRESS]),
        "LLM_EXT_CUDA": "0",
    }
    built = run([sys.executable, "setup.py", "-q", "build", "--build-base", target], **environment)
    if built != 0:
        return built
    (library,) = (target / folder for folder in os.listdir(target) if folder.startswith("lib"))
    asan = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True).strip()
    return run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *OP_TESTS],
        PYTHONPATH=str(library),
        LD_PRELOAD=asan,
        ASAN_OPTIONS="detect_leaks=0",
        LLM_EXT_ISA=level,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    failed = []

    def report(name: str, status: int, since: float) -> None:
        print(f"sanitize: {name}: {'ok' if status == 0 else 'FAILED'}, {time.time() - since:.0f} s", flush=True)
        if status != 0:
            failed.append(name)

    since = time.time()
    report("caches, thread", run([build("caches-thread", CACHES, THREAD)]), since)
    for name, sanitizers in (("address", ADDRESS), *([] if short else [("thread", THREAD)])):
        for level in levels()[:1] if short else levels():
            since = time.time()
            program = kernels_of(level, name, sanitizers)
            status = run([program, str(SHORT_ROUNDS if short else ROUNDS)], LLM_EXT_ISA=level)
            report(f"kernels, {name}, {level}", status, since)
    if not short:
        for level in levels():
            since = time.time()
            report(f"ops, address, {level}", check_ops(level), since)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
