"""Check the wheel: `make wheel-test`, or `python tests/wheel/check.py WHEEL PYTHON... [-- OPTION OF PYTEST...]`.

First the file: its name, its size, and what its libraries ask of the system and of torch; this needs nm and readelf.
For a wheel with CUDA, also the GPUs that it has code for; this needs cuobjdump.
Then, for each interpreter, which has torch, hypothesis, numpy and pytest: the wheel is installed, without a compiler in
the path, and the tests below run in a folder that has nothing but them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_BYTES = {"cpu": 5 * 2**20, "cuda": 40 * 2**20}
# Machine code for each generation of GPUs, and PTX for later ones.
GPU_CODE = {"sm_80", "sm_90", "sm_100", "sm_120", "compute_90"}
# The versions of manylinux_2_28, those of AlmaLinux 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}
# Symbols that may be undefined without a version: torch's stable C interface and the OpenMP runtime that torch has
# loaded; in a module also Python and our library.
LIBRARY_IMPORTS = re.compile(r"(aoti_)?torch_[a-z_]|GOMP_|omp_")
MODULE_IMPORTS = re.compile(r"_?Py[A-Z_]|_ZN7llm_ext")
NEEDED = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|(c10|torch)(_cpu|_cuda)?|cudart|llm_ext)\.so[.\d]*|ld-linux.*")
TESTS = (
    "test_library.py",
    "cpu/test_isa.py",
    "cpu/test_packed_weight_cache.py",
    "ops/test_registration.py",
    "ops/test_linear.py",
    "nn/test_recurrent.py",
    "nn/test_cells.py",
)


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults_of(library: Path) -> Iterator[str]:
    """Yield the symbols and libraries that a library or module asks for and a system or a torch may lack."""
    allowed = MODULE_IMPORTS if library.name.startswith("_C.") else LIBRARY_IMPORTS
    for line in run("nm", "-D", "--undefined-only", library).splitlines():
        kind, symbol = line.split()
        name, _, version = symbol.partition("@")
        if version and not version.startswith("libcudart."):
            family, _, number = version.partition("_")
            if family not in NEWEST or tuple(map(int, number.split("."))) > NEWEST[family]:
                yield f"{library.name} asks for {symbol}"
        elif not version and kind != "w" and not allowed.match(name):
            yield f"{library.name} asks for {symbol}"
    for name in re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library)):
        if not NEEDED.fullmatch(name):
            yield f"{library.name} is linked to {name}"


def gpu_code_of(library: Path) -> set[str]:
    """The targets of machine code (sm_*) and of PTX (compute_*) in a library."""
    files = metadata.files("nvidia-cuda-cuobjdump") or []
    (cuobjdump,) = (str(file.locate()) for file in files if file.name == "cuobjdump")
    code = set(re.findall(r"\bsm_\w+(?=\.cubin)", run(cuobjdump, "--list-elf", library)))
    ptx = re.findall(r"\bsm_(\w+)(?=\.ptx)", run(cuobjdump, "--list-ptx", library))
    return code.union(f"compute_{target}" for target in ptx)


def faults_of_file(wheel: Path) -> Iterator[str]:
    """Yield the faults of the wheel as a file."""
    name = re.fullmatch(r"llm_ext-[\d.]+(\+cu\d+)?-py3-none-manylinux_2_28_x86_64\.whl", wheel.name)
    if not name:
        yield f"{wheel.name} is not for every Python on manylinux_2_28"
    kind = "cuda" if name and name[1] else "cpu"
    if wheel.stat().st_size > MAX_BYTES[kind]:
        yield f"the wheel has {wheel.stat().st_size} bytes, more than {MAX_BYTES[kind]}"
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so*"))
        names = {library.name for library in libraries}
        others = {name for name in names if not re.fullmatch(r"libllm_ext\.so|_C\.cpython-.*\.so", name)}
        if "libllm_ext.so" not in names or others:
            yield f"the wheel has these libraries: {', '.join(sorted(names))}"
        for library in libraries:
            yield from faults_of(library)
            if kind == "cuda" and library.name == "libllm_ext.so" and (missing := GPU_CODE - gpu_code_of(library)):
                yield f"{library.name} has no code for {', '.join(sorted(missing))}"


def test(wheel: Path, python: Path, *options: str) -> bool:
    """Install the wheel for an interpreter, run the tests, print a row of the table, and return whether all passed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        site, work = folder / "site", folder / "work"
        shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (work / "pytest.ini").write_text("[pytest]\npythonpath = tests\naddopts = -q --import-mode=importlib\n")
        (folder / "bin").mkdir()
        environment = os.environ | {"PATH": str(folder / "bin"), "PYTHONPATH": str(site)}
        begin = time.monotonic()
        install: list[str | Path] = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
        install += ["--target", site]
        subprocess.run(install, check=True, env=environment)
        installed = time.monotonic() - begin
        code = (
            "import platform, torch, llm_ext; from llm_ext import _C; from pathlib import Path;"
            "print(torch.__version__, platform.python_version(), Path(_C.__file__).name, llm_ext.__file__, sep='\\n')"
        )
        facts = subprocess.check_output([python, "-c", code], env=environment, cwd=work, text=True)
        torch, version, module, package = facts.splitlines()
        assert Path(package).is_relative_to(site), f"the tests would use {package}"
        command: list[str | Path] = [python, "-m", "pytest", "-p", "no:cacheprovider"]
        command += [f"tests/{name}" for name in TESTS] + [*options]
        done = subprocess.run(command, check=False, env=environment, cwd=work, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", "".join(done.stdout.splitlines()[-1:]))
        print(f"| {torch} | {version} | `{module}` | {', '.join(counts)} | {installed:.1f} s |", flush=True)
        return done.returncode == 0


def main(*arguments: str) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    wheel, *pythons = (Path(argument).absolute() for argument in arguments[:split])
    faults = list(faults_of_file(wheel))
    modules = re.findall(r"llm_ext/_C\.(cpython-\w+)", "\n".join(zipfile.ZipFile(wheel).namelist()))
    size = wheel.stat().st_size / 2**20
    print(f"{wheel.name}: {size:.2f} MiB, modules for {', '.join(sorted(modules)) or 'no Python'}")
    print("\n".join(faults), file=sys.stderr)
    if pythons:
        print("| torch | Python | module | tests | installed in |\n|---|---|---|---|---|")
    passed = [test(wheel, python, *arguments[split + 1 :]) for python in pythons]
    return 0 if not faults and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
