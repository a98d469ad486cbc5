"""The emulator finds faults of kernels: planted ones, and real kernels from which a call is removed."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from support.cuda_rnn import Case, check, program_sources
from support.emulator import EMULATOR, KernelError, Request, build, build_without_call, run, tensor

BLOCKS, THREADS = 4, 64
NUMBERS = torch.arange(BLOCKS * THREADS, dtype=torch.float32)

# The report of each planted fault.
FAULTS = {
    "missing_block_barrier": r"race: (read|write) at faults.cu:\d+ and (read|write) at faults.cu:\d+ by block \d",
    "missing_barrier_before_write": r"race: ",
    "write_beyond_global": r"heap-buffer-overflow[\s\S]*WRITE of size 4[\s\S]*faults.cu:\d+",
    "read_beyond_global": r"heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*faults.cu:\d+",
    "write_beyond_shared": r"heap-buffer-overflow[\s\S]*WRITE of size 4[\s\S]*faults.cu:\d+",
    "misaligned": r"an access of 16 bytes at faults.cu:\d+ is not aligned",
    "deadlock_at_barrier": r"deadlock\n[\s\S]* threads 5 ended"
    r"[\s\S]* threads 0-4, 6-63 wait: block_barrier at faults.cu:\d+",
    "deadlock_of_flags": r"deadlock\n[\s\S]*threads 0 wait: await_flag at faults.cu:\d+",
    "deadlock_of_cluster": r"deadlock\n[\s\S]*threads 0-63 wait: cluster_wait at faults.cu:\d+",
    "flag_before_data": r"race: ",
    "flag_without_barrier": r"race: ",
    "race_of_blocks": r"race: write at faults.cu:\d+ and write at faults.cu:\d+ by block \d thread 0",
    "dsmem_store_before_start": r"no mbarrier was initialized there|may not have started when its shared memory",
    "dsmem_store_where_others_read": r"race: (write at device.cuh:\d+ < faults.cu:\d+.* and read at|read at) "
    r"faults.cu:\d+",
    "dsmem_store_to_one_buffer": r"race: ",
    "bytes_of_two_phases": r"race: |expected bytes were set twice in one phase|deadlock\n",
    "read_before_bytes_arrive": r"race: |a block ended before its expected bytes had arrived",
    "deadlock_of_mbarrier": r"deadlock\n[\s\S]* threads 0-63 wait: wait_mbarrier at faults.cu:\d+",
    "read_before_copy_lands": r"use-after-poison[\s\S]*faults.cu:\d+",
    "copy_nobody_waits_for": r"a thread ended before its asynchronous copies had landed",
    "lanes_apart": r"the lanes of a warp went apart",
}


@pytest.fixture(scope="session")
def program() -> Path:
    return build("faults", [EMULATOR / "faults.cu"])


@functools.cache
def number_of(program: Path, name: str) -> int:
    return run(program, {})["names"].decode().split().index(name)


def launch(program: Path, name: str, *, faulty: bool, seed: int, races: bool = True) -> torch.Tensor:
    request: Request = {
        "test": number_of(program, name),
        "faulty": int(faulty),
        "seed": seed,
        "races": int(races),
        "in": NUMBERS,
    }
    return tensor(run(program, request)["out"], torch.float32, BLOCKS, THREADS)


def test_every_planted_fault_is_tested(program: Path) -> None:
    assert set(run(program, {})["names"].decode().split()) == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(program: Path, name: str) -> None:
    """Found in every order of the threads, with its line; the kernel without the fault passes."""
    for seed in range(4):
        launch(program, name, faulty=False, seed=seed)
        with pytest.raises(KernelError) as found:
            launch(program, name, faulty=True, seed=seed)
        assert re.search(FAULTS[name], str(found.value)), str(found.value)


def test_a_missing_barrier_gives_wrong_results_in_some_order(program: Path) -> None:
    """With the race detector off, the order of the threads shows the fault."""
    expected = NUMBERS.view(BLOCKS, THREADS).roll(-1, 1)
    wrong = 0
    for seed in range(8):
        assert torch.equal(launch(program, "missing_block_barrier", faulty=False, seed=seed), expected)
        wrong += not torch.equal(
            launch(program, "missing_block_barrier", faulty=True, seed=seed, races=False), expected
        )
    assert wrong == 8


def test_same_seed_same_order(program: Path) -> None:
    """A fault is reproducible."""

    def of(seed: int) -> torch.Tensor:
        found = launch(program, "missing_block_barrier", faulty=True, seed=seed, races=False)
        return found.nan_to_num(-1)

    assert torch.equal(of(1), of(1))
    assert not torch.equal(of(1), of(2))


def test_products_of_fragments(program: Path) -> None:
    """The fragments of csrc/cuda/device.cuh give the product of weights and states."""
    generator = torch.Generator().manual_seed(0)
    weights, states = (torch.randn(shape, generator=generator) for shape in ((16, 16), (8, 16)))
    sums = torch.randn(3, 16, 8, generator=generator)

    def lanes(tile: torch.Tensor, *numbers: tuple[int, int]) -> torch.Tensor:
        """For each lane 4 r + q, the elements (r + row, 4 q + column)."""
        r, q = torch.arange(32) // 4, torch.arange(32) % 4
        return torch.stack([tile[r + row, 4 * q + column] for row, column in numbers], 1)

    def own_elements(tile: torch.Tensor) -> torch.Tensor:
        r, q = torch.arange(32) // 4, torch.arange(32) % 4
        return torch.stack([tile[r, 2 * q], tile[r, 2 * q + 1], tile[r + 8, 2 * q], tile[r + 8, 2 * q + 1]], 1)

    def tf32(tile: torch.Tensor) -> torch.Tensor:
        return (tile.view(torch.int32) & ~0x1FFF).view(torch.float32)

    halves = [(row, column) for first in (0, 2) for row in (0, 8) for column in (first, first + 1)]
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        request: Request = {
            "test": -2,
            "a": lanes(weights.to(dtype), *halves),
            "b": lanes(states.to(dtype), *((0, k) for k in range(4))),
            "tf32": torch.cat(
                [
                    lanes(weights, (0, 0), (8, 0), (0, 1), (8, 1)),
                    lanes(weights, (0, 2), (8, 2), (0, 3), (8, 3)),
                    lanes(states, (0, 0), (0, 1), (0, 2), (0, 3)),
                ]
            ),
            "sums": torch.cat([own_elements(tile) for tile in sums]),
        }
        found = tensor(run(program, request)["sums"], torch.float32, 3, 32, 4)
        exact = weights.to(dtype).float() @ states.to(dtype).float().T
        torch.testing.assert_close(found[number], own_elements(sums[number] + exact), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found[2], own_elements(sums[2] + tf32(weights) @ tf32(states).T), rtol=1e-5, atol=1e-5
        )


# A call that is removed from a real kernel, a case that must find the fault, and the report.
LINES = [
    ("rnn/generic.cu", "block_barrier", Case("generic", "LSTM", torch.bfloat16, H=17, P=5), r"race: "),
    ("rnn/tiles.cuh", "block_barrier", Case("block", "GRU", torch.bfloat16, H=34, plan=(1, 2, 2, 2)), r"race: "),
    ("rnn/tiles.cuh", "wait_mbarrier", Case("cluster", "GRU", torch.bfloat16, H=34, plan=(2, 2, 2, 2)), r"race: "),
    ("rnn/tiles.cuh", "await_flag", Case("grid", "GRU", torch.bfloat16, H=34, plan=(2, 2, 2, 2)), r"race: "),
    ("rnn/tiles.cuh", "raise_flag", Case("grid", "GRU", torch.bfloat16, H=34, plan=(2, 2, 2, 2)), r"deadlock\n"),
    (
        "rnn/tiles.cuh",
        "copy_async_wait",
        Case("grid", "GRU", torch.bfloat16, H=34, plan=(2, 2, 2, 2)),
        r"use-after-poison",
    ),
]


@pytest.mark.parametrize(("file", "call", "case", "report"), LINES, ids=[f"{line[0]}-{line[1]}" for line in LINES])
def test_a_kernel_without_a_call(file: str, call: str, case: Case, report: str) -> None:
    """The last call of this name in the file is removed."""
    program = build_without_call(program_sources(), file, call, only=("generic.cu", "tiles_bf16.cu"))
    with pytest.raises(KernelError) as found:
        check(program, case)
    assert re.search(report, str(found.value)), str(found.value)
