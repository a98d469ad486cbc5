"""Builds the compiled half. Everything else about the package is in pyproject.toml.

`llm_ext/lib/libllm_ext.so` holds kernels and ops and knows no Python; `llm_ext._C` is a small pybind11 module that is
linked to it.

The CUDA half is built if torch has CUDA and nvcc is found; a GPU is not needed. Environment variables:

- LLM_EXT_CUDA: 0 builds for the CPU only; 1 fails if the CUDA half cannot be built.
- TORCH_CUDA_ARCH_LIST: the GPU architectures to compile for; those below 8.0 are left out.
- CUDA_HOME or CUDA_PATH: the CUDA toolkit with the nvcc to use.
- LLM_EXT_CXXFLAGS: additional flags for the C++ compiler.
- LLM_EXT_MANYLINUX: 1 builds binaries that run on glibc 2.28, whatever glibc they are built on (x86-64); with CUDA, the
  version has a suffix such as +cu13.
- LLM_EXT_PYTHONS: more interpreters for which to build the module; those without headers are left out.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
    from setuptools.command.bdist_wheel import bdist_wheel  # of setuptools 70.1
except ImportError as error:
    # An isolated build has pybind11 but not torch, because it would download one that the user may not have chosen.
    needs = "torch 'setuptools>=77' wheel ninja 'pybind11>=2.13'"
    sys.exit(
        f"llm_ext: the build does not find {error.name}; run pip install {needs}, "
        "and then pip install --no-build-isolation . in the same environment"
    )

# setuptools expects paths relative to this file, whatever the working directory is.
ROOT = Path(__file__).resolve().parent
# Machine code per generation, as far as nvcc has it, and PTX for later ones: for each group one PTX is compiled, and
# from it the code of its GPUs. Code for 8.0, 9.0, 10.0 and 12.0 runs on all of the generation but Jetson Orin, 8.7.
GENERATIONS = {80: ["sm_80", "sm_87"], 90: ["sm_90", "sm_100", "sm_120", "compute_90"]}
OLDEST = 8.0  # compute capability


def sources(*patterns: str) -> list[str]:
    """Return the files under csrc that match any of the patterns."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


def is_cuda(source: str) -> bool:
    """Return whether a source file belongs to the CUDA half."""
    return source.startswith("csrc/cuda/") or source.endswith("_cuda.cpp")


def run_nvcc(*arguments: str) -> str:
    """Return the output of nvcc, or an empty string if there is no nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None and not home:
        nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return ""
    run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def architectures() -> list[str]:
    """Return the architectures to compile for where TORCH_CUDA_ARCH_LIST is not set."""
    known = run_nvcc("--list-gpu-code").split()
    codes = {ptx: [code for code in codes if code in known or "compute" in code] for ptx, codes in GENERATIONS.items()}
    return [f"arch=compute_{ptx},code=[{','.join(of_ptx)}]" for ptx, of_ptx in codes.items()]


def leave_out_old_architectures() -> None:
    """Take what is below 8.0 out of TORCH_CUDA_ARCH_LIST, which containers set to the list of their torch."""
    wanted = re.split(r"[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    old = [
        name
        for name in wanted
        if (float(number[0]) < OLDEST if (number := re.match(r"\d+\.\d+", name)) else re.match("[KMPVT]", name))
    ]
    if not old:
        return
    if len(old) == len(wanted):
        sys.exit(f"llm_ext: TORCH_CUDA_ARCH_LIST is {';'.join(wanted)}, but the CUDA kernels need at least {OLDEST}")
    print(f"llm_ext: the CUDA kernels need {OLDEST}; left out: {' '.join(old)}", file=sys.stderr)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(name for name in wanted if name not in old)


def why_no_cuda() -> str | None:
    """Return why the CUDA half cannot be built, or None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    release = re.search(r"release (\d+)\.", run_nvcc("--version"))
    if release is None:
        return f"nvcc is missing (torch {torch.__version__} needs CUDA {torch.version.cuda})"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc has CUDA {release[1]}, but torch {torch.__version__} needs CUDA {torch.version.cuda}"
    return None


def is_set(name: str) -> bool | None:
    """Return whether an environment variable is 1 and not 0; None if it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"llm_ext: {name} must be 0 or 1, got {value}")
    return None if value == "" else value == "1"


def with_cuda() -> bool:
    """Return whether to build the CUDA half."""
    wanted = is_set("LLM_EXT_CUDA")
    if wanted is False:
        return False
    why = why_no_cuda()
    if why is not None and wanted:
        sys.exit(f"llm_ext: LLM_EXT_CUDA=1, but the CUDA half cannot be built: {why}")
    if why is not None and (torch.version.cuda is not None or run_nvcc("--version")):
        # With one of the two installed, the user may expect CUDA.
        print(f"llm_ext: building for the CPU only: {why}", file=sys.stderr)
    return why is None


if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("llm_ext: the C++ module needs Python.h; on Debian and Ubuntu: apt install python3-dev")

CUDA = with_cuda()
# nvcc may be a script outside its toolkit's folder. Torch looks for the toolkit beside it, so name the folder.
if CUDA and (top := re.search(r"^#\$ TOP=(.+)$", run_nvcc("--dryrun", "-x", "cu", os.devnull), re.MULTILINE)):
    os.environ.setdefault("CUDA_HOME", str(Path(top[1]).resolve()))

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  (reads CUDA_HOME)

FLAGS = [
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    # Both keep IEEE results: they only state that errno and the floating-point flags are not read, which lets the
    # compiler turn selects into masks. No -march and no -ffast-math: csrc/cpu/isa/dispatch.cpp chooses at run time.
    "-fno-math-errno",
    "-fno-trapping-math",
    # Exponents that are computed of any bits, and then not used, may wrap.
    "-fwrapv",
    "-Wall",
    "-Wextra",
    # Python's own flags have -g, which would cost a third of the time and nine tenths of the size.
    "-g0",
    *os.environ.get("LLM_EXT_CXXFLAGS", "").split(),
]
MANYLINUX = is_set("LLM_EXT_MANYLINUX")
COMMON_SOURCES = ["csrc/manylinux_2_28.cpp"] if MANYLINUX else []
LINK_FLAGS = [f"-Wl,--version-script={ROOT / 'csrc' / 'manylinux_2_28.map'}"] if MANYLINUX else []
LIBRARY = "llm_ext.lib.libllm_ext"
LIBRARY_OPTIONS = {
    "include_dirs": [str(ROOT / "csrc")],
    "define_macros": [("LLM_EXT_TORCH_VERSION", f'"{torch.__version__}"')],
    "extra_link_args": LINK_FLAGS,
    "py_limited_api": True,  # torch then leaves out its library for Python
}
LIBRARY_SOURCES = [s for s in sources("**/*.cpp", "**/*.cu") if s not in ("csrc/module.cpp", "csrc/manylinux_2_28.cpp")]
LIBRARY_SOURCES += COMMON_SOURCES
# Neither is linked to an OpenMP runtime. The library finds the one that torch has loaded, so there is never a second.
if CUDA:
    nvcc_flags = ["-O3", "-std=c++17"]
    leave_out_old_architectures()
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        nvcc_flags += [f"-gencode={architecture}" for architecture in architectures()]
    LIBRARY_OPTIONS["define_macros"].append(("LLM_EXT_CUDA_VERSION", f'"{torch.version.cuda}"'))
    flags = {"cxx": FLAGS, "nvcc": nvcc_flags}
    library = CUDAExtension(LIBRARY, LIBRARY_SOURCES, extra_compile_args=flags, **LIBRARY_OPTIONS)
else:
    cpu_sources = [source for source in LIBRARY_SOURCES if not is_cuda(source)]
    library = CppExtension(LIBRARY, cpu_sources, extra_compile_args=FLAGS, **LIBRARY_OPTIONS)

# The files of the extensions. Those of modules are named for a Python, the library is not.
FILES = {LIBRARY: "llm_ext/lib/libllm_ext.so"}


def module(include: str, suffix: str) -> Extension:
    """Return the pybind11 module for the Python with these headers and this suffix of file names."""
    name = "llm_ext._C" + re.sub(r"\W", "_", suffix)
    FILES[name] = f"llm_ext/_C{suffix}"
    return Extension(
        name,
        ["csrc/module.cpp", *COMMON_SOURCES],
        include_dirs=[include, str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        libraries=["llm_ext"],
        runtime_library_dirs=["$ORIGIN/lib"],
        language="c++",
    )


def modules() -> list[Extension]:
    """Return the modules for this Python and for those of LLM_EXT_PYTHONS."""
    query = "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'), sep='\\n')"
    found = {sysconfig.get_config_var("EXT_SUFFIX"): sysconfig.get_path("include")}
    for python in filter(shutil.which, os.environ.get("LLM_EXT_PYTHONS", "").split()):
        run = subprocess.run([python, "-c", query], capture_output=True, text=True, check=False)
        include, _, suffix = run.stdout.strip().partition("\n")
        if Path(include, "Python.h").exists():
            found.setdefault(suffix, include)
    return [module(include, suffix) for suffix, include in found.items()]


class Build(BuildExtension):
    """Builds the library and then the modules that are linked to it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects are kept, also those of an editable installation, and compiled again where a source or a flag changed.
        self.build_temp = str(ROOT / "build" / ("objects-cuda" if CUDA else "objects"))
        self.library_dirs.append(str(Path(self.build_lib, "llm_ext", "lib")))

    def get_ext_filename(self, ext_name: str) -> str:
        # setuptools asks for the path, and for the name alone.
        paths = {**FILES, **{name.rpartition(".")[2]: Path(file).name for name, file in FILES.items()}}
        return paths[ext_name]

    def copy_extensions_to_source(self) -> None:
        (ROOT / "llm_ext" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Names the wheel for every Python 3: one without a module for it uses llm_ext/_C.py."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# A wheel with the CUDA half has another version than one without.
tag = f"+cu{torch.version.cuda.split('.')[0]}" if CUDA and MANYLINUX else ""
setup(
    ext_modules=[library, *modules()],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    options={"egg_info": {"tag_build": tag}} if tag else {},
)
