"""Check the wheel: `make wheel-test`, or `python tests/wheel/check.py WHEEL PYTHON...`.

First the file: its name, its size, and what its libraries ask of the system and of torch; this needs nm and readelf.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_BYTES = 5 * 2**20
# The versions of manylinux_2_28, those of AlmaLinux 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}
# Symbols that may be undefined without a version: torch's stable C interface and the OpenMP runtime that torch has
# loaded; in a module also Python and our library.
LIBRARY_IMPORTS = re.compile(r"(aoti_)?torch_[a-z]|GOMP_|omp_")
MODULE_IMPORTS = re.compile(r"_?Py[A-Z_]|_ZN7llm_ext")
NEEDED = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|c10|torch|torch_cpu|llm_ext)\.so[.\d]*|ld-linux.*")
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
        if version:
            family, _, number = version.partition("_")
            if family not in NEWEST or tuple(map(int, number.split("."))) > NEWEST[family]:
                yield f"{library.name} asks for {symbol}"
        elif kind != "w" and not allowed.match(name):
            yield f"{library.name} asks for {symbol}"
    for name in re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library)):
        if not NEEDED.fullmatch(name):
            yield f"{library.name} is linked to {name}"


def faults_of_file(wheel: Path) -> Iterator[str]:
    """Yield the faults of the wheel as a file."""
    if not re.fullmatch(r"llm_ext-[\d.]+-py3-none-manylinux_2_28_x86_64\.whl", wheel.name):
        yield f"{wheel.name} is not for every Python on manylinux_2_28"
    if wheel.stat().st_size > MAX_BYTES:
        yield f"the wheel has {wheel.stat().st_size} bytes, more than {MAX_BYTES}"
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so*"))
        names = {library.name for library in libraries}
        others = {name for name in names if not re.fullmatch(r"libllm_ext\.so|_C\.cpython-.*\.so", name)}
        if "libllm_ext.so" not in names or others:
            yield f"the wheel has these libraries: {', '.join(sorted(names))}"
        for library in libraries:
            yield from faults_of(library)


def test(wheel: Path, python: Path) -> bool:
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
        command += [f"tests/{name}" for name in TESTS]
        done = subprocess.run(command, check=False, env=environment, cwd=work, capture_output=True, text=True)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
        print(f"| {torch} | {version} | `{module}` | {', '.join(counts)} | {installed:.1f} s |", flush=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
        return done.returncode == 0


def main(wheel: Path, *pythons: Path) -> int:
    faults = list(faults_of_file(wheel))
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB")
    print("\n".join(faults), file=sys.stderr)
    if pythons:
        print("| torch | Python | module | tests | installed in |\n|---|---|---|---|---|")
    passed = [test(wheel, python) for python in pythons]
    return 0 if not faults and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).absolute() for argument in sys.argv[1:])))
