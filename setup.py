"""Builds the one compiled module, `llm_ext._C`; everything else about the package is in pyproject.toml."""

import os
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# setuptools wants paths relative to this file, whatever the working directory.
ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))

if not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.exit("llm_ext: Python.h is missing, which its C++ module needs; on Debian and Ubuntu: apt install python3-dev")

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
]

extension = CppExtension(
    name="llm_ext._C",
    sources=SOURCES,
    include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
    define_macros=[("LLM_EXT_TORCH_VERSION", f'"{torch.__version__}"')],
    extra_compile_args=FLAGS + os.environ.get("LLM_EXT_CXXFLAGS", "").split(),
    extra_link_args=["-fopenmp"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
