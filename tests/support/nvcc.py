"""nvcc's PTX of the CUDA kernels, compiled once for all who read it. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "cuda_emulator" / "ptx"
OLDEST = "compute_80"


@functools.cache
def find() -> Path | None:
    """The compiler; None if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
    return None if found is None else Path(found)


@functools.cache
def text_of(file: str) -> str:
    """A file of csrc with the kernel headers that it includes, device.cuh left out."""
    text = (CSRC / file).read_text()
    return text + "".join(map(text_of, re.findall(r'#include "(cuda/(?!device\.cuh)[^"]+\.cuh)"', text)))


def depends_on_target(source: Path) -> bool:
    """Whether the PTX of a source depends on the target: whether it uses a function of device.cuh that asks for it."""
    device = (CSRC / "cuda" / "device.cuh").read_text()
    asking = re.findall(r"^LLM_EXT_DEVICE \w+ (\w+)\([^{;]*\{\n#if __CUDA_ARCH__", device, re.MULTILINE)
    known = len(asking) == device.count("__CUDA_ARCH__")
    return not known or re.search(rf"\b({'|'.join(asking)})\(", text_of(str(source.relative_to(CSRC)))) is not None


@functools.cache
def _headers() -> bytes:
    folders = [CSRC / "cuda", CSRC / "params"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh")]
    return b"".join(path.read_bytes() for path in paths)


def ptx_of(source: Path, virtual: str) -> Path:
    """The PTX of a source of csrc/cuda, compiled unless it exists for the same text.

    For the virtual architecture `virtual`, or for the oldest, if the PTX is the same for all.
    """
    if not depends_on_target(source):
        virtual = OLDEST
    key = hashlib.sha256(_headers() + source.read_bytes() + virtual.encode()).hexdigest()[:20]
    target = FOLDER / virtual / f"{source.stem}-{key}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{source.stem}-" + "?" * 20 + ".ptx"):
            stale.unlink()
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [str(find()), "-std=c++17", "-O3", f"-I{CSRC}", f"-arch={virtual}", "-ptx", str(source)]
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            name = source.relative_to(ROOT)
            raise RuntimeError(f"{name} does not compile for {virtual}:\n{done.stdout}{done.stderr}")
        partial.rename(target)
    return target
