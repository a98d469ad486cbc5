from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from support import emulator
from support.memory import fill_uninitialized_memory
from support.throwing import throws

# The same examples in every run: a failure is reproducible for everyone.
settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True, max_examples=60)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--ptx compute_90` runs the tests of the CUDA kernels on what nvcc compiled (tests/support/ptx.py).

    `--throwing` selects by whether a test expects an exception: `make gpu` runs those apart.
    """
    parser.addoption("--ptx", metavar="ARCHITECTURE", help="run nvcc's PTX of the CUDA kernels in the emulator")
    parser.addoption("--throwing", choices=("only", "none"), help="run only tests that expect exceptions, or no such")


def pytest_configure(config: pytest.Config) -> None:
    """Divide the cores between the workers of pytest-xdist; tests of threads choose their number themselves."""
    emulator.architecture = config.getoption("--ptx")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Apply `--throwing`."""
    wanted = config.getoption("--throwing")
    if wanted is not None:
        kinds: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            kinds[throws(item)].append(item)
        items[:] = kinds[wanted == "only"]
        config.hook.pytest_deselected(items=kinds[wanted != "only"])


@pytest.fixture(scope="session", autouse=True)
def _uninitialized_memory_is_nan() -> None:
    """Results must not depend on uninitialized memory, in any test."""
    fill_uninitialized_memory()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
