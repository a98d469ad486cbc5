"""Programs of the CUDA emulator: built with the system's g++, run with named tensors in and out."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import nvcc, ptx

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
BUILD = ROOT / "build" / "cuda_emulator"
# The emulator's device.cuh is found before that of csrc. A GPU rounds a * b + c once only where the source says fma.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fmax-errors=5", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
ASAN = ["-fsanitize=address", "-fno-omit-frame-pointer"]
# Every access of a kernel is a call, which the linker redirects to races.cpp.
KERNEL = [*ASAN, "--param=asan-instrumentation-with-call-threshold=0"]
WRAPPED = [f"__asan_{access}{size}" for access in ("load", "store") for size in (1, 2, 4, 8, 16, "N")]
WRAP = [f"-Wl,--wrap={name}" for name in (*WRAPPED, "memcpy", "memset")]
RUNTIME = [EMULATOR / f"{name}.cpp" for name in ("scheduler", "races", "device", "memory")]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=4:redzone=1024:max_redzone=2048"
    ":allocator_may_return_null=0:abort_on_error=0:color=never"
}
Request = Mapping[str, Tensor | int | None]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# With pytest's option --ptx, the kernels are nvcc's PTX for this virtual architecture, in place of g++'s code.
architecture: str | None = None


class KernelError(Exception):
    """A fault of a kernel that the emulator or AddressSanitizer found."""


@functools.cache
def _compiler() -> tuple[str | None, str]:
    """The g++ to build with; None and the reason if there is none."""
    found = shutil.which("g++")
    if found is None:
        return None, "the CUDA emulator needs g++"
    if os.uname().machine != "x86_64":
        return None, "the CUDA emulator switches fibers in the assembly of x86-64"
    with tempfile.TemporaryDirectory() as folder:
        command = [found, *ASAN, "-x", "c++", "-", "-o", str(Path(folder, "program"))]
        if subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode != 0:
            return None, "the CUDA emulator needs a g++ with AddressSanitizer"
    return found, ""


def compiler() -> str:
    """The g++ to build with; skips the test if there is none."""
    found, reason = _compiler()
    if found is None:
        pytest.skip(reason)
    return found


@functools.cache
def _launcher() -> list[str]:
    """The command that turns off address randomization: some versions of AddressSanitizer fail with it."""
    setarch = shutil.which("setarch")
    works = setarch and subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode == 0
    return [str(setarch), "-R"] if works else []


@contextmanager
def exclusive() -> Iterator[None]:
    """One process builds at a time, with all cores; another that needs the same then finds it built."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    """Run the compiler, or ccache in front of it, which knows the objects of other folders."""
    cached = shutil.which("ccache")
    if cached:
        command = [cached, *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def _object(source: Path, flags: list[str], headers: bytes, folder: Path) -> Path:
    """The object of `source`, compiled unless it exists for the same flags, text and headers."""
    key = hashlib.sha256(headers + source.read_bytes() + repr((str(source), flags)).encode()).hexdigest()[:20]
    name = f"{source.parent.name}-{source.name}"  # several folders have a plan.cpp
    target = folder / f"{name}-{key}.o"
    if not target.exists():
        for stale in folder.glob(f"{name}-" + "?" * 20 + ".o"):
            stale.unlink()
        partial = target.with_suffix(f".{os.getpid()}.partial")
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        _run([compiler(), *flags, *language, "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def _headers(*folders: Path) -> bytes:
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh")]
    return b"".join(path.read_bytes() for path in paths)


def _write(path: Path, text: str) -> Path:
    """The file, written only if it differs."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def _host_folder() -> Path:
    """Csrc with kernels that are only declared."""
    folder = BUILD / "ptx" / "csrc"
    for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")):
        _write(folder / path.relative_to(ROOT / "csrc"), ptx.without_kernels(path.read_text()))
    return folder


# Changes the PTX of a kernel, given its name.
Change = Callable[[str, str], str]


def build_ptx(
    name: str,
    sources: Iterable[Path],
    virtual: str,
    *,
    only: Container[str] | None = None,
    wanted: str = "",
    change: Change | None = None,
) -> Path:
    """The program whose kernels are the PTX of the `.cu` files.

    If `only` is given, the other files have g++'s code. Kernels of the PTX whose names do not match `wanted` cannot
    run.
    """
    if nvcc.find() is None:
        pytest.skip("PTX needs nvcc")
    common = _headers(ROOT / "csrc" / "cuda", ROOT / "csrc" / "params", EMULATOR)
    code = int(virtual.removeprefix("compute_"))
    defined = [] if code == 90 else [f"-DLLM_EXT_CODE={code}"]
    with exclusive():
        folder = _host_folder()
        sources = sorted(sources)
        kernels = [s for s in sources if s.suffix == ".cu" and (only is None or s.name in only)]
        jobs = [(s, [*FLAGS, *defined, *KERNEL], common, BUILD) for s in sources if s not in kernels]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            files = list(pool.map(lambda source: nvcc.ptx_of(source, virtual), kernels))
        for source, compiled in zip(kernels, files, strict=True):
            text = compiled.read_text()
            local = f"in_{source.stem}"
            host = folder / source.relative_to(ROOT / "csrc")
            flags = [f"-I{EMULATOR}", f"-I{folder}", *FLAGS, *defined, f"-DLLM_EXT_LOCAL={local}", "-w", *KERNEL]
            jobs.append((host, flags, common, BUILD))
            missing = ""
            for i, kernel in enumerate(ptx.kernels_of(text)):
                if re.search(wanted, kernel.name) is None:
                    missing += ptx.absent(kernel, local, i)
                    continue
                changed = kernel
                if change is not None:
                    changed = replace(kernel, body=change(kernel.name, kernel.body))
                translated = ptx.translate(changed, local, f"{source.stem}.ptx")
                own = "" if changed.body == kernel.body else f"-{name}"
                file = _write(compiled.parent / f"{source.stem}-{i}{own}.cpp", translated)
                # Not optimized where it runs one case.
                jobs.append((file, [*FLAGS, "-w", *([] if own == "" else ["-O0"]), *KERNEL], common, BUILD))
            if missing:
                file = _write(compiled.parent / f"{source.stem}-absent-{name}.cpp", ptx.HEAD + missing)
                jobs.append((file, [*FLAGS, "-w"], common, BUILD))
        return _link(f"{name}-{virtual}", [*jobs, *_runtime_jobs(common)])


def _runtime_jobs(common: bytes) -> list[tuple[Path, list[str], bytes, Path]]:
    return [(source, [*FLAGS, "-O3"], common, BUILD) for source in RUNTIME]


def _link(name: str, jobs: list[tuple[Path, list[str], bytes, Path]]) -> Path:
    """The program of these sources with their flags; the caller holds the lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    program = BUILD / f"{name}-{key}"
    if not program.exists():
        for stale in BUILD.glob(f"{name}-" + "?" * 20):
            stale.unlink()
        partial = program.with_suffix(f".{os.getpid()}.partial")
        _run([compiler(), *ASAN, *WRAP, *map(str, objects), "-o", str(partial)])
        partial.rename(program)
    return program


def build(name: str, sources: Iterable[Path], changed: Path | None = None) -> Path:
    """The program `name` of `sources` and the emulator, built at most once for the same text.

    Sources in the folder `changed` find headers there first.
    """
    if architecture is not None and changed is None:
        return build_ptx(name, sources, architecture)
    common = _headers(ROOT / "csrc" / "cuda", ROOT / "csrc" / "params", EMULATOR)
    jobs = []
    # The largest first, so that all cores finish together.
    for source in sorted(sources, key=lambda path: -path.stat().st_size):
        if changed is not None and source.is_relative_to(changed):
            # Not optimized, because such a program runs one case.
            flags = [f"-I{changed}", *FLAGS, "-O0", *KERNEL]
            jobs.append((source, flags, common + _headers(changed), changed))
        else:
            jobs.append((source, [*FLAGS, *KERNEL], common, BUILD))
    with exclusive():
        return _link(name, [*jobs, *_runtime_jobs(common)])


def build_without_call(sources: Iterable[Path], file: str, call: str, only: Container[str] | None = None) -> Path:
    """The program of these sources with the last call of this name removed from `file` of csrc/cuda.

    If `file` is a header, the sources that include it are changed, too; of these those named in `only`, if given.
    """
    cuda = ROOT / "csrc" / "cuda"
    name = f"without-{call}-{file.replace('/', '-')}"
    folder = BUILD / name
    text = (cuda / file).read_text()
    last = list(re.finditer(rf"\b{call}\([^;]*\);", text))[-1]

    def change(source: Path, text: str) -> Path:
        changed = folder / "cuda" / source.relative_to(cuda)
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(text)
        return changed

    change(cuda / file, text[: last.start()] + ";" + text[last.end() :])
    changed_sources = []
    for source in sources:
        if source == cuda / file:
            changed_sources.append(folder / "cuda" / file)
        elif (only is None or source.name in only) and f'"cuda/{file}"' in source.read_text():
            changed_sources.append(change(source, source.read_text()))
        else:
            changed_sources.append(source)
    return build(name, changed_sources, changed=folder)


def _with_lines(report: str) -> str:
    """The report with addresses as source lines, inlined frames from the innermost to the outermost."""

    def lines(address: re.Match[str]) -> str:
        command = ["addr2line", "--basenames", "--inlines", "--exe", address[1], address[2]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.findall(r"^\w\S*:\d+", done.stdout, re.MULTILINE)
        return " < ".join(found) if found else address[0]

    # addr2line comes with the linker.
    return re.sub(r"\((/[^()\s]+)\+(0x[0-9a-f]+)\)", lines, report) if shutil.which("addr2line") else report


def _bytes(value: Tensor | int) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", value)


def run(program: Path, request: Request, timeout: float = 120) -> dict[str, bytes]:
    """The answer of the program: bytes by name. Raises KernelError for a fault.

    Request and answer are files of records: length of the name, name, length of the data, data. Lengths have 64 bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request"), Path(folder, "answer")
        with asked.open("wb") as file:
            for name, value in request.items():
                if value is not None:
                    data = _bytes(value)
                    file.write(struct.pack("<q", len(name)) + name.encode() + struct.pack("<q", len(data)) + data)
        done = subprocess.run(
            [*_launcher(), str(program), str(asked), str(answered)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=os.environ | ENVIRONMENT,
        )
        if done.returncode != 0:
            raise KernelError(f"{program.name} ended with {done.returncode}\n{_with_lines(done.stderr)}")
        data, answer = answered.read_bytes(), {}
    offset = 0
    while offset < len(data):
        (length,) = struct.unpack_from("<q", data, offset)
        name = data[offset + 8 : offset + 8 + length].decode()
        offset += 8 + length
        (length,) = struct.unpack_from("<q", data, offset)
        answer[name] = data[offset + 8 : offset + 8 + length]
        offset += 8 + length
    return answer


def tensor(data: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
