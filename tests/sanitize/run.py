"""make sanitize: csrc under the sanitizers of the compiler.

- caches: what calls share (allocator, weight cache, barrier), used by several threads under ThreadSanitizer.
- isas: the kernels of int8 weights of every ISA of this machine, with and without VNNI, give the same bits; without a
  sanitizer.
- kernels: every kernel of every ISA level of this machine, on arrays of exact size, under AddressSanitizer with
  UndefinedBehaviorSanitizer, and under ThreadSanitizer. Those of VNNI run with avx512_bf16 alone.
- ops: tests/ops on a copy of the project whose library has AddressSanitizer and UndefinedBehaviorSanitizer, with the
  kernels of every ISA level of this machine.

Without arguments all of them run, which takes a core about 35 minutes; --short runs the first two, in half a minute.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
# -fwrapv is among Python's flags for extensions: exponents that are computed of any bits, and then not used, may wrap.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fwrapv", "-fno-omit-frame-pointer", "-w"]
FLAGS += [f"-I{HERE / 'stub'}", f"-I{ROOT / 'csrc'}"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-fsanitize=thread"]
CACHES = [
    HERE / "caches.cpp",
    ROOT / "csrc" / "torch" / "alloc" / "cpu_caching_allocator.cpp",
    ROOT / "csrc" / "torch" / "weight_cache" / "packed_weight_cache.cpp",
    ROOT / "csrc" / "torch" / "threads" / "usable_cores.cpp",
]
ISA = ROOT / "csrc" / "cpu" / "isa"
ROUNDS = 400  # of a program
PROJECT = BUILD / "project"  # the copy


def run(command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> int:
    return subprocess.run([*map(str, command)], cwd=cwd, env=os.environ | environment, check=False).returncode


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


def levels() -> tuple[str, ...]:
    """The ISA levels of this machine."""
    sys.path.insert(0, str(HERE.parent))
    from support.devices import supported_isas  # csrc/cpu/isa/dispatch.cpp decides

    return supported_isas()


def kernels_of(level: str, name: str, sanitizers: Sequence[str]) -> Path:
    """The program that runs the kernels of one level."""
    if level == "avx512_bf16":  # a level of other kernels and one entry of its own
        return build(f"kernels-{name}-{level}", [HERE / "kernels.cpp", *sorted(ISA.glob("*.cpp"))], sanitizers)
    sources = [HERE / "kernels.cpp", ISA / f"{level}.cpp", ISA / f"{level}_quantized.cpp"]
    tables = [f"-DLLM_EXT_LEVEL={level}_kernels", f"-DLLM_EXT_QUANTIZED={level}_quantized_kernels"]
    return build(f"kernels-{name}-{level}", sources, [*sanitizers, *tables])


def build_project() -> None:
    """Copy the project, and build its library with the sanitizers in the copy."""
    for name in ("csrc", "llm_ext", "tests"):
        shutil.rmtree(PROJECT / name, ignore_errors=True)
        shutil.copytree(ROOT / name, PROJECT / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, PROJECT / name)
    flags = " ".join(["-O1", "-g1", "-fno-omit-frame-pointer", *ADDRESS])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if run(command, PROJECT, LLM_EXT_CUDA="0", LLM_EXT_CXXFLAGS=flags) != 0:
        sys.exit("sanitize: the library does not compile")


def test_ops(level: str) -> int:
    """Run the tests of the ops in the copy."""
    # Python is not linked to the sanitizers, nor to the library whose exceptions they must see.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [subprocess.check_output([COMPILER, f"-print-file-name={n}"], text=True).strip() for n in names]
    # Reports are written to the file of the standard errors. Tests that limit the memory of the process are left out.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "not memory and not wrap"]
    return run(
        [sys.executable, "-m", "pytest", *options, "tests/ops"],
        PROJECT,
        LLM_EXT_ISA=level,
        LD_PRELOAD=" ".join(found),
        # Python and torch free what they like at exit.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2000",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(PROJECT),
    )


PARTS = ("caches", "isas", "kernels", "ops")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--short", dest="part", action="store_const", const=PARTS[:2])
    parts = parser.parse_args().part
    failed = []

    def report(name: str, status: int, since: float) -> None:
        print(f"sanitize: {name}: {'ok' if status == 0 else 'FAILED'}, {time.time() - since:.0f} s", flush=True)
        if status != 0:
            failed.append(name)

    if "caches" in parts:
        since = time.time()
        report("caches, thread", run([build("caches-thread", CACHES, THREAD), str(ROUNDS)]), since)
    if "isas" in parts:
        since = time.time()
        program = build("isas", [HERE / "isas.cpp", *sorted(ISA.glob("*_quantized.cpp"))], [])
        report("isas", run([program, str(ROUNDS)]), since)
    for name, sanitizers in (("address", ADDRESS), ("thread", THREAD)) if "kernels" in parts else ():
        for level in levels():
            since = time.time()
            status = run([kernels_of(level, name, sanitizers), str(ROUNDS)], LLM_EXT_ISA=level)
            report(f"kernels, {name}, {level}", status, since)
    if "ops" in parts:
        build_project()
        for level in levels():
            since = time.time()
            report(f"ops, address, {level}", test_ops(level), since)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
