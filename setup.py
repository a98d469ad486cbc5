"""Builds the one compiled module, `llm_ext._C`; everything else about the package is in pyproject.toml.

The CUDA half is built where there are a torch with CUDA and nvcc, whether or not there is a GPU. The environment may
say: LLM_EXT_CUDA=0 without it, 1 with it or not at all; TORCH_CUDA_ARCH_LIST for which GPUs; LLM_EXT_CXXFLAGS more
flags for the C++ compiler.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import setup

# setuptools wants paths relative to this file, whatever the working directory.
ROOT = Path(__file__).resolve().parent
# Of each generation an image that runs on all of it; PTX for those to come. TORCH_CUDA_ARCH_LIST asks for others.
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]


def sources(*patterns: str) -> list[str]:
    """Return the files under csrc that patterns match."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


def nvcc_says(*arguments: str) -> str:
    """Return what nvcc prints; nothing if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None and not home:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return ""
    run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def why_no_cuda() -> str | None:
    """Return why the CUDA half cannot be built; None: it can be."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    release = re.search(r"release (\d+)\.", nvcc_says("--version"))
    if release is None:
        return f"nvcc is missing (torch {torch.__version__} wants that of CUDA {torch.version.cuda})"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1]}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def with_cuda() -> bool:
    """Return whether to build the CUDA half."""
    wanted = os.environ.get("LLM_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"llm_ext: LLM_EXT_CUDA must be 0 or 1, got {wanted}")
    if wanted == "0":
        return False
    why = why_no_cuda()
    if why is not None and wanted == "1":
        sys.exit(f"llm_ext: LLM_EXT_CUDA=1 asks for the CUDA half, which cannot be built: {why}")
    if why is not None and (torch.version.cuda is not None or nvcc_says("--version")):
        # Somebody who has one of the two may expect it.
        print(f"llm_ext: building for the CPU only: {why}", file=sys.stderr)
    return why is None


if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("llm_ext: Python.h is missing, which its C++ module needs; on Debian and Ubuntu: apt install python3-dev")

CUDA = with_cuda()
# nvcc may be a script in another folder than the rest of its toolkit, for which torch looks beside it.
if CUDA and (top := re.search(r"^#\$ TOP=(.+)$", nvcc_says("--dryrun", "-x", "cu", os.devnull), re.MULTILINE)):
    os.environ.setdefault("CUDA_HOME", str(Path(top[1]).resolve()))

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  (reads CUDA_HOME)

FLAGS = [
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    # Both keep IEEE results; they only say that nobody reads errno or the floating-point flags, which lets
    # the compiler turn selects into masks. -march and -ffast-math stay out: levels.cpp chooses at run time.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    *os.environ.get("LLM_EXT_CXXFLAGS", "").split(),
]
OPTIONS = {
    "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
    "define_macros": [("LLM_EXT_TORCH_VERSION", f'"{torch.__version__}"')],
    "extra_link_args": ["-fopenmp"],
}
if CUDA:
    nvcc_flags = ["-O3", "-std=c++17"]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        nvcc_flags += [f"-gencode={architecture}" for architecture in ARCHITECTURES]
    OPTIONS["define_macros"].append(("LLM_EXT_CUDA_VERSION", f'"{torch.version.cuda}"'))
    extension = CUDAExtension(
        "llm_ext._C",
        sources("**/*.cpp", "cuda/**/*.cu"),
        extra_compile_args={"cxx": FLAGS, "nvcc": nvcc_flags},
        **OPTIONS,
    )
else:
    of_cpu = [path for path in sources("**/*.cpp") if not path.endswith("_cuda.cpp") and "csrc/cuda/" not in path]
    extension = CppExtension("llm_ext._C", of_cpu, extra_compile_args=FLAGS, **OPTIONS)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
