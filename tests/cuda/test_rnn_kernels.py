"""The CUDA kernels of the recurrence in the emulator, against the reference: every route, mode and type, both passes.

Each case runs with several seeds, hence in several orders of its threads, and must give the same bits in all of them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cuda_rnn import (
    MODES,
    ROUTES,
    Case,
    check,
    kernel_sources,
    lengths_of,
    program_sources,
    rows_in_time,
    rows_of,
)
from support.emulator import DTYPES, EMULATOR, ROOT, Request, build, run, tensor
from support.tolerances import HALF_DTYPES


@pytest.fixture(scope="session")
def program() -> Path:
    return build("rnn", program_sources())


def generic_cases() -> list[Case]:
    types = list(DTYPES)
    cases = [Case("generic", mode, types[(i + j) % 4], rows="lengths") for i, mode in enumerate(MODES) for j in (0, 1)]
    for i, mode in enumerate(("RNN_TANH", "GRU", "LSTM")):
        dtype = list(DTYPES)[i]
        cases += [
            Case("generic", mode, dtype, H=17, directions=2),
            Case("generic", mode, dtype, T=3, B=1, H=65, reverse=True),
            Case("generic", mode, dtype, B=9, H=3, rows="packed", directions=2, reverse=True),
            Case("generic", mode, dtype, T=1, B=1, H=1, bare=True),
            Case("generic", mode, dtype, T=7, B=3, H=8, bare=True, sm=80),
        ]
    for rows in ("full", "lengths", "packed"):
        cases.append(Case("generic", "LSTM", torch.float64, H=17, P=5, rows=rows, directions=2))
    cases += [Case("generic", "LSTM", dtype, H=9, P=8, rows="lengths", reverse=True) for dtype in DTYPES]
    return cases


@pytest.mark.parametrize("case", generic_cases(), ids=str)
def test_generic(program: Path, case: Case) -> None:
    check(program, case)


# Types of the routes that hold U on the chip; float32 is multiplied as float32 and as TF32.
TILE_TYPES = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False))


def tile_cases() -> list[Case]:
    cases = []
    for offset, (route, group_blocks) in enumerate((("block", 1), ("cluster", 2), ("grid", 2))):
        for i, mode in enumerate(("RNN_TANH", "GRU", "LSTM")):
            for j, (dtype, tf32) in enumerate(TILE_TYPES):
                case = Case(route, mode, dtype, tf32=tf32)
                if (offset + i + j) % 2:
                    # Partly filled tiles of units and rows, several tiles per block, two directions.
                    cases.append(replace(case, H=34, rows="lengths", directions=2, plan=(group_blocks, 2, 2, 2)))
                else:
                    # More weight tiles than registers hold.
                    cases.append(replace(case, T=3, H=98, reverse=True, plan=(group_blocks, 1, 8, 1)))
            dtype, tf32 = TILE_TYPES[(offset + i) % len(TILE_TYPES)]
            case = Case(route, mode, dtype, tf32=tf32)
            cases += [
                replace(case, B=9, H=34, rows="packed", directions=2, plan=(group_blocks, 1, 4, 2)),
                replace(case, T=5, B=3, H=64, bare=True, plan=(group_blocks, 1, 8, 1)),
                replace(case, T=1, B=1, H=2 * group_blocks * 16, plan=(group_blocks, 1, 2, 1)),
            ]
        for mode in ("RNN_RELU", "RNN_SIGMOID"):
            cases.append(Case(route, mode, torch.bfloat16, H=34, rows="lengths", plan=(group_blocks, 1, 8, 1)))
        # Enough steps for several phases of flags and mbarriers.
        cases.append(Case(route, "RNN_SIGMOID", torch.float32, T=40, B=3, H=34, plan=(group_blocks, 1, 2, 1)))
    return cases


@pytest.mark.parametrize("case", tile_cases(), ids=str)
def test_tiles(program: Path, case: Case) -> None:
    check(program, case)


def chosen_cases() -> list[Case]:
    """Plans that make_plan() chooses for devices with few multiprocessors or little shared memory."""
    cases = []
    for route in ("block", "cluster", "grid"):
        for i, (dtype, tf32) in enumerate(TILE_TYPES):
            mode = ("GRU", "LSTM", "RNN_TANH", "GRU")[i]
            some = Case(route, mode, dtype, tf32=tf32, T=3, B=21, H=80)
            cases.append(replace(some, rows="lengths", sm_count=6))
            cases.append(replace(some, B=6, rows="packed", directions=2, sm_count=8, shared_bytes=100_000))
        if route != "cluster":
            cases.append(Case(route, "LSTM", torch.float16, B=4, H=50, sm=80, sm_count=6, shared_bytes=163 * 1024))
    # Weights that do not fit on the chip: all but those in registers, and some of them.
    for i, (dtype, tf32) in enumerate(TILE_TYPES):
        some = Case("grid", ("LSTM", "GRU")[i % 2], dtype, tf32=tf32, T=3, B=3, H=146, rows="lengths")
        cases.append(replace(some, plan=(2, 1, 8, 1), streamed=3))
        cases.append(replace(some, sm_count=3, shared_bytes=60_000 if dtype in HALF_DTYPES else 90_000))
    # The largest cluster, and a number of blocks that is no power of two.
    cases.append(Case("cluster", "GRU", torch.bfloat16, T=3, B=3, H=250, plan=(16, 1, 8, 1)))
    cases.append(Case("grid", "GRU", torch.bfloat16, T=3, B=3, H=150, plan=(5, 4, 8, 1)))
    # A sum shared by eight warps, and more tiles than slices.
    cases.append(Case("cluster", "RNN_TANH", torch.bfloat16, T=3, B=9, H=130, plan=(8, 8, 2, 3)))
    cases.append(Case("block", "RNN_TANH", torch.float32, T=3, B=9, H=30, plan=(1, 4, 2, 5)))
    return cases


@pytest.mark.parametrize("case", chosen_cases(), ids=str)
def test_chosen_plans(program: Path, case: Case) -> None:
    check(program, case)


def random_cases(count: int) -> list[Case]:
    """Random sizes, options and plans that fit together, the same in every run."""
    draw = random.Random(0)
    cases: list[Case] = []
    while len(cases) < count:
        route, mode = draw.choice(ROUTES), draw.choice(("RNN_TANH", "RNN_SIGMOID", "GRU", "LSTM"))
        some = Case(
            route,
            mode,
            draw.choice(list(DTYPES)),
            T=draw.randint(1, 6),
            B=draw.randint(1, 14),
            H=draw.randint(1, 50),
            directions=draw.randint(1, 2),
            reverse=draw.random() < 0.5,
            rows=draw.choice(("full", "lengths", "packed")),
            bare=draw.random() < 0.3,
        )
        if route == "generic":
            projects = mode == "LSTM" and some.H > 1 and draw.random() < 0.5
            cases.append(replace(some, P=draw.randint(1, some.H - 1) if projects else None))
        elif some.dtype != torch.float64:
            some = replace(some, H=2 * some.H, tf32=some.dtype == torch.float32 and draw.random() < 0.5)
            unit_groups, warps = -(-some.H // 16), 8 if some.dtype == torch.float32 else 16
            blocks = 1 if route == "block" else draw.choice((2, 4, 8)) if route == "cluster" else draw.randint(2, 7)
            splits = [k for k in (1, 2, 4, 8) if k * -(-unit_groups // blocks) <= warps]
            if blocks <= unit_groups:
                plan = (blocks, draw.choice(splits), draw.choice((2, 4, 8)), draw.randint(1, 3))
                cases.append(replace(some, plan=plan, streamed=draw.randint(0, 2) if route == "grid" else 0))
    return cases


@pytest.mark.parametrize("case", random_cases(32), ids=str)
def test_random_cases(program: Path, case: Case) -> None:
    check(program, case)


@pytest.fixture(scope="session")
def plans_program() -> Path:
    return build("plans", [*kernel_sources(), EMULATOR / "plans.cpp"])


@pytest.mark.parametrize(
    ("sm", "sm_count", "shared_bytes", "code"),
    [(75, 40, 64, 80), (80, 108, 163, 80), (90, 132, 227, 90), (90, 132, 227, 80), (90, 7, 40, 90)],
)
def test_plans_fit_their_device(plans_program: Path, sm: int, sm_count: int, shared_bytes: int, code: int) -> None:
    """Every plan covers all units and rows, and the device can launch it with kernels compiled for `code`."""
    sizes = [(T, B, H) for T in (1, 100) for B in (1, 7, 64, 1000) for H in (1, 2, 34, 65, 256, 512, 1000, 2560)]
    problems = [
        (MODES.index(mode), backward, type_, T, B, H, H // 2 if projected else H, directions, tf32, route)
        for mode in ("RNN_TANH", "GRU", "LSTM")
        for backward in (0, 1)
        for type_, tf32 in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0))
        for T, B, H in sizes
        for projected in ((False, True) if mode == "LSTM" and H == 34 else (False,))
        for directions in (1, 2)
        for route in (-1, *range(len(ROUTES)))
    ]
    request: Request = {
        "sm": sm,
        "sm_count": sm_count,
        "shared_bytes": shared_bytes * 1024,
        "code": code,
        "problems": torch.tensor(problems),
    }
    answer = run(plans_program, request)
    for i, problem in enumerate(problems):
        _, _, type_, _, B, H, P, directions, allow_tf32, wanted = problem
        plan = tensor(answer[str(i)], torch.int64, 10).tolist()
        route, tf32, group_blocks, unit_groups, k_splits, tile_rows, row_tiles, block_groups, shared, workspace = plan
        what = f"{problem} by {plan}"
        assert wanted in (-1, route) or route == 0, what
        if type_ == DTYPES[torch.float64] or H % 2 or H != P or sm < 80:
            assert route == 0, what
        if route == 0:
            assert workspace > 0, what
            continue
        assert tf32 == (allow_tf32 and type_ == 0), what
        assert group_blocks * unit_groups * 16 >= H, what
        assert block_groups * row_tiles * tile_rows >= B, what
        assert 1 <= tile_rows <= 8, what
        assert shared <= shared_bytes * 1024, what
        assert unit_groups * k_splits * 32 <= (256 if type_ == 0 else 512), what
        assert k_splits & (k_splits - 1) == 0, what
        if ROUTES[route] == "block":
            assert group_blocks == 1, what
        elif ROUTES[route] == "cluster":
            assert min(sm, code) >= 90, what
            assert group_blocks in (2, 4, 8, 16), what
        else:  # all blocks are resident
            assert group_blocks * block_groups * directions <= sm_count, what
            assert workspace > 0, what


# The route with the least time where the exchange or the steps decide, on an H200: mode, backward, B, H, directions,
# route.
ROUTE_OF = [
    # 30 KB arrive in each block of a cluster per step, and fewer clusters than needed run at once.
    ("LSTM", 1, 64, 512, 2, "grid"),
    ("LSTM", 0, 64, 512, 2, "cluster"),
    # One block has room for U, and waits for nobody.
    ("GRU", 0, 64, 128, 1, "block"),
    ("GRU", 1, 64, 128, 1, "block"),
    ("GRU", 0, 32, 512, 1, "cluster"),
    # 16 warps of a block take turns with their steps, those of a cluster do not.
    ("RNN_TANH", 0, 16, 256, 1, "cluster"),
]


def test_plans_count_the_exchange(plans_program: Path) -> None:
    problems = [
        (MODES.index(mode), backward, 2, 256, B, H, H, directions, 0, -1)
        for mode, backward, B, H, directions, _ in ROUTE_OF
    ]
    request: Request = {"sm": 90, "sm_count": 132, "shared_bytes": 227 * 1024, "problems": torch.tensor(problems)}
    answer = run(plans_program, request)
    routes = [ROUTES[int(tensor(answer[str(i)], torch.int64, 10)[0])] for i in range(len(problems))]
    assert routes == [route for *_, route in ROUTE_OF]


@pytest.fixture(scope="session")
def shift_rows_program() -> Path:
    return build("shift_rows", [ROOT / "csrc/cuda/rnn/shift_rows.cu", EMULATOR / "shift_rows.cpp"])


@pytest.mark.parametrize("rows", ["full", "lengths", "packed"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_shift_rows(shift_rows_program: Path, rows: str, shift: int) -> None:
    """Rows of the step before, the same step, the step after, and of `first`; in words of 2, 4, 8 and 16 bytes."""
    for seed, (width, gap, with_first) in enumerate([(1, 0, True), (2, 2, False), (12, 0, True), (40, 8, True)]):
        case = Case("", "RNN_TANH", torch.int16, T=4, B=5, H=width, rows=rows)
        lengths = lengths_of(case)
        N = sum(lengths) if rows == "packed" else case.T * case.B
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(1, 1000, (N, width + gap), generator=generator, dtype=torch.int16)
        first = torch.randint(1, 1000, (case.B, width), generator=generator, dtype=torch.int16)
        expected = torch.zeros(N, width, dtype=torch.int16)
        for b, row in enumerate(rows_in_time(case, lengths, False)):
            for t, n in enumerate(row):
                if 0 <= t + shift < len(row):
                    expected[n] = source[row[t + shift], :width]
                elif with_first:
                    expected[n] = first[b]
        request: Request = {
            "seed": seed,
            "steps": case.T,
            "batch": case.B,
            "shift": shift,
            "rows": N,
            "row_bytes": 2 * width,
            "from": source.flatten()[: N * (width + gap) - gap],  # no gap after the last row
            "from_stride": 2 * (width + gap),
            "first": first if with_first else None,
        }
        found = tensor(run(shift_rows_program, {**request, **rows_of(case, lengths)})["to"], torch.int16, N, width)
        assert torch.equal(found, expected), f"width {width}"
