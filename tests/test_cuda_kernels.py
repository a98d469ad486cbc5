"""The CUDA kernels of the recurrence in the emulator, against the reference: every route, cell and type, both passes.

Each case runs with several seeds, so in several orders of its threads, and must give the same bits in all of them.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cases import HALF_DTYPES, assert_close
from cuda_emulator.program import DTYPES, ROOT, build, run, tensor
from torch import Tensor

from llm_ext import reference

CELLS = ("tanh", "relu", "sigmoid", "gru", "lstm")
GATES = {"gru": 3, "lstm": 4}
KEPT = {"gru": 4, "lstm": 5}
ROUTES = ("generic", "block", "cluster", "grid")
# The blocks of dz that belong to the input, in the order of the weights, and those that belong to the state.
INPUT_BLOCKS = {"gru": (1, 2, 0), "lstm": (0, 1, 2, 3)}
STATE_BLOCKS = {"gru": (1, 2, 3), "lstm": (0, 1, 2, 3)}
# What lies there for both directions, one behind the other.
BOTH = ("h0", "c0", "grad_h_n", "grad_c_n")
SEEDS = 3


@dataclass(frozen=True)
class Case:
    route: str
    cell: str
    dtype: torch.dtype
    T: int = 4
    B: int = 5
    H: int = 33
    P: int | None = None
    directions: int = 1
    reverse: bool = False
    rows: str = "full"  # or "lengths", "packed"
    bare: bool = False  # no biases, no initial states, and nothing comes back but the gradient of y
    tf32: bool = False
    sm: int = 90
    sm_count: int = 132
    shared_bytes: int = 227 * 1024
    # Of a plan that the rule need not choose: blocks a team, warps that share a sum, rows a tile, tiles a block.
    plan: tuple[int, int, int, int] | None = None
    streamed: int = 0  # column tiles of weights that a warp reads from the workspace

    def __str__(self) -> str:
        sizes = f"T{self.T}-B{self.B}-H{self.H}" + (f"-P{self.P}" if self.P else "")
        options = [name for name in ("reverse", "bare", "tf32") if getattr(self, name)]
        options += ["both"] * (self.directions == 2) + [self.rows] * (self.rows != "full") + ["sm80"] * (self.sm == 80)
        options += ["plan" + "_".join(map(str, self.plan))] if self.plan else []
        options += [f"streamed{self.streamed}"] if self.streamed else []
        return "-".join([self.route, self.cell, str(self.dtype).removeprefix("torch."), sizes, *options])


def kernel_sources() -> list[Path]:
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").iterdir()) if path.suffix in (".cu", ".cpp")]
    return [path for path in sources if not re.search("attention|parts|prefix", path.name)]


def recurrence_sources() -> list[Path]:
    """The kernels, and what runs them as a request asks."""
    return [*kernel_sources(), ROOT / "tests/cuda_emulator/recurrence.cpp"]


@pytest.fixture(scope="session")
def program() -> Path:
    return build("recurrence", recurrence_sources())


def lengths_of(case: Case) -> list[int]:
    """Steps of each row: none, one and all of them, and what lies between; packed ones never rise and are not 0."""
    if case.rows == "full":
        return [case.T] * case.B
    some = [case.T, 0, 1, max(case.T - 1, 0), case.T // 2]
    lengths = [some[b % len(some)] for b in range(case.B)]
    if case.rows == "lengths":
        return lengths
    return sorted((max(length, 1) for length in lengths), reverse=True)


def places(case: Case, lengths: list[int], reverse: bool) -> list[list[int]]:
    """For each row of the batch, its rows of the sequence in order of its own time."""
    first = [t * case.B for t in range(case.T)]
    if case.rows == "packed":
        sizes = [sum(length > t for length in lengths) for t in range(case.T)]
        first = [sum(sizes[:t]) for t in range(case.T)]
    orders = [[first[t] + b for t in range(length)] for b, length in enumerate(lengths)]
    return [order[::-1] for order in orders] if reverse else orders


def rows_of(case: Case, lengths: list[int]) -> dict[str, Tensor]:
    """How the request says which rows there are."""
    if case.rows == "packed":
        sizes = [sum(length > t for length in lengths) for t in range(case.T)]
        return {"row_offsets": torch.tensor([sum(sizes[:t]) for t in range(case.T + 1)])}
    if case.rows == "lengths":
        # Out of range they are cut.
        return {"lengths": torch.tensor([n + 3 if n == case.T else n - 2 if n == 0 else n for n in lengths])}
    return {}


def inputs_of(case: Case, lengths: list[int]) -> dict[str, Tensor]:
    """The tensors of a call by the names of the request. What must not be read holds NaN."""
    generator = torch.Generator().manual_seed(0)
    G, H, P, D = GATES.get(case.cell, 1), case.H, case.P or case.H, case.directions
    N = sum(lengths) if case.rows == "packed" else case.T * case.B

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(case.dtype)

    tensors = {"grad_y": uniform(N, D * P)}
    for d in range(D):
        tensors[f"gates_x{d}"] = uniform(N, G * H, scale=1.5)
        tensors[f"w_hh{d}"] = uniform(G * H, P, scale=(1.5 if case.cell != "relu" else 0.9) * P**-0.5)
        if case.P is not None:
            tensors[f"w_hr{d}"] = uniform(P, H, scale=1.5 * H**-0.5)
        if not case.bare:
            tensors[f"b_hh{d}"] = uniform(G * H, scale=0.5)
    if not case.bare:
        tensors |= {"h0": uniform(D, case.B, P), "grad_h_n": uniform(D, case.B, P)}
        if case.cell == "lstm":
            tensors |= {"c0": uniform(D, case.B, H), "grad_c_n": uniform(D, case.B, H)}
    if case.rows == "lengths":
        inside = {place for order in places(case, lengths, False) for place in order}
        beyond = [place for place in range(N) if place not in inside]
        for name, values in tensors.items():
            if name.startswith(("gates_x", "grad_y")):
                values[beyond] = float("nan")
    return tensors


@functools.cache
def expected_of(case: Case) -> list[dict[str, Tensor]]:
    """What the reference has to say in float64 of each direction, gradients included."""
    lengths = lengths_of(case)
    tensors = {name: value.double() for name, value in inputs_of(case, lengths).items()}
    G, H, P = GATES.get(case.cell, 1), case.H, case.P or case.H
    results = []
    for d in range(case.directions):
        of_d = {name[:-1]: value for name, value in tensors.items() if name.endswith(str(d)) and name not in BOTH}
        of_d |= {name: tensors[name][d] for name in BOTH if name in tensors}
        # The product of the input is the input: what reaches x is the gradient of the pre-activations.
        shape = (-1, G * H) if case.rows == "packed" else (case.T, case.B, G * H)
        grad_y = tensors["grad_y"].view(*shape[:-1], case.directions, P)[..., d, :].nan_to_num()
        x = of_d["gates_x"].reshape(shape).nan_to_num().requires_grad_()
        w_hh = of_d["w_hh"].requires_grad_()
        b_hh = of_d.get("b_hh", torch.zeros(G * H, dtype=torch.float64)).requires_grad_()
        h0 = of_d.get("h0", torch.zeros(case.B, P, dtype=torch.float64)).requires_grad_()
        wanted = {"gates_x": x, "w_hh": w_hh, "b_hh": b_hh, "h0": h0}
        options: dict[str, object] = {"reverse": case.reverse != bool(d)}
        if case.rows == "packed":
            options["batch_sizes"] = torch.tensor([sum(n > t for n in lengths) for t in range(case.T)])
        elif case.rows == "lengths":
            options["lengths"] = torch.tensor(lengths)
        eye = torch.eye(G * H, dtype=torch.float64)
        if case.cell == "lstm":
            c0 = of_d.get("c0", torch.zeros(case.B, H, dtype=torch.float64)).requires_grad_()
            wanted["c0"] = c0
            w_hr = None
            if case.P is not None:
                w_hr = wanted["w_hr"] = of_d["w_hr"].requires_grad_()
            y, (h_n, c_n) = reference.lstm(x, (h0, c0), eye, w_hh, None, b_hh, w_hr, **options)  # type: ignore[arg-type]
            outputs = {"y": y, "h_n": h_n, "c_n": c_n}
        elif case.cell == "gru":
            y, h_n = reference.gru(x, h0, eye, w_hh, None, b_hh, **options)  # type: ignore[arg-type]
            outputs = {"y": y, "h_n": h_n}
        else:
            y, h_n = reference.rnn(x, h0, eye, w_hh, None, b_hh, nonlinearity=case.cell, **options)  # type: ignore[arg-type]
            outputs = {"y": y, "h_n": h_n}
        loss = (y * grad_y).sum()
        for name in ("h_n", "c_n"):
            if f"grad_{name}" in of_d:
                loss = loss + (outputs[name] * of_d[f"grad_{name}"]).sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        results.append(
            {name: value.detach() for name, value in outputs.items()}
            | {f"d{name}": value for name, value in zip(wanted, gradients, strict=True)}
        )
    return results


def check(program: Path, case: Case) -> None:
    """Run the case in the emulator and compare all that comes back."""
    lengths = lengths_of(case)
    G, H, P, D = GATES.get(case.cell, 1), case.H, case.P or case.H, case.directions
    blocks, kept_blocks = (4 if G > 1 else 1), KEPT.get(case.cell, 0) + (case.P is not None)
    tensors = inputs_of(case, lengths)
    plan = (
        {} if case.plan is None else dict(zip(("parts", "k_parts", "tile_rows", "row_tiles"), case.plan, strict=True))
    )
    N = tensors["grad_y"].shape[0]
    answer = run(
        program,
        tensors
        | rows_of(case, lengths)
        | plan
        | {
            "cell": CELLS.index(case.cell),
            "type": DTYPES[case.dtype],
            "route": ROUTES.index(case.route),
            "steps": case.T,
            "batch": case.B,
            "hidden": H,
            "output": P,
            "directions": D,
            "reverse": int(case.reverse),
            "initial_gradients": int(not case.bare),
            "allow_tf32": int(case.tf32),
            "streamed": case.streamed,
            "sm": case.sm,
            "sm_count": case.sm_count,
            "shared_bytes": case.shared_bytes,
            "seed": sum(map(ord, str(case))),
            "seeds": SEEDS,
        },
    )
    for name in ("route", "backward_route"):
        assert int.from_bytes(answer[name], "little") == ROUTES.index(case.route), f"{case} ran by another {name}"

    op = case.cell if G > 1 else "rnn"
    rounded = case.route != "generic" and case.dtype in HALF_DTYPES
    tolerance = f"{op}_tf32" if case.tf32 else f"{op}_rounded" if rounded else op
    y = tensor(answer["y"], case.dtype, N, D, P)
    for d, expected in enumerate(expected_of(replace(case, route="", tf32=False, sm=0, plan=None, streamed=0))):
        order = places(case, lengths, case.reverse != bool(d))
        inside = [place for row in order for place in row]
        beyond = sorted(set(range(N)) - set(inside))
        expected_y = expected["y"].reshape(N, P)
        assert_close(tolerance, y[:, d], expected_y, "y")
        assert not y[beyond, d].any(), "y is 0 beyond a row's length"
        assert_close(tolerance, tensor(answer["h_n"], case.dtype, D, case.B, P)[d], expected["h_n"], "h_n")
        if case.cell == "lstm":
            assert_close(tolerance, tensor(answer["c_n"], case.dtype, D, case.B, H)[d], expected["c_n"], "c_n")

        dz = tensor(answer[f"dz_{d}"], case.dtype, N, blocks, H)
        assert not dz[beyond].any(), "dz is 0 beyond a row's length"
        dx = dz[:, INPUT_BLOCKS.get(case.cell, (0,))].reshape(N, G * H)
        assert_close(f"{tolerance}_backward", dx, expected["dgates_x"].reshape(N, G * H), "dz of the input")
        # What the caller makes of the rest, in float64: gradients of the weights and biases of the state.
        dz_state = dz[:, STATE_BLOCKS.get(case.cell, (0,))].reshape(N, G * H).double()
        h0 = tensors["h0"][d].double() if "h0" in tensors else torch.zeros(case.B, P, dtype=torch.float64)
        before = torch.zeros(N, P, dtype=torch.float64)
        for b, row in enumerate(order):
            for place, earlier in zip(row, [None, *row], strict=False):
                before[place] = h0[b] if earlier is None else y[earlier, d].double()
        derived = {"dw_hh": dz_state.T @ before, "db_hh": dz_state.sum(0)}
        if case.P is not None:
            dh = tensor(answer[f"dh_{d}"], case.dtype, N, P)
            assert not dh[beyond].any(), "dh is 0 beyond a row's length"
            m = tensor(answer["kept"], case.dtype, D, N, kept_blocks, H)[d, :, -1].double()
            derived["dw_hr"] = dh[inside].double().T @ m[inside]
        for name, value in derived.items():
            assert_close(f"{tolerance}_backward", value.to(case.dtype), expected[name], name)
        if not case.bare:
            dh0 = tensor(answer["dh0"], case.dtype, D, case.B, P)[d]
            assert_close(f"{tolerance}_backward", dh0, expected["dh0"], "dh0")
            if case.cell == "lstm":
                dc0 = tensor(answer["dc0"], case.dtype, D, case.B, H)[d]
                assert_close(f"{tolerance}_backward", dc0, expected["dc0"], "dc0")


def generic_cases() -> list[Case]:
    cases = [Case("generic", cell, dtype, rows="lengths") for cell in CELLS for dtype in DTYPES]
    for i, cell in enumerate(("tanh", "gru", "lstm")):
        dtype = list(DTYPES)[i]
        cases += [
            Case("generic", cell, dtype, H=17, directions=2),
            Case("generic", cell, dtype, T=3, B=1, H=65, reverse=True),
            Case("generic", cell, dtype, B=9, H=3, rows="packed", directions=2, reverse=True),
            Case("generic", cell, dtype, T=1, B=1, H=1, bare=True),
            Case("generic", cell, dtype, T=7, B=3, H=8, bare=True, sm=80),
        ]
    for rows in ("full", "lengths", "packed"):
        cases.append(Case("generic", "lstm", torch.float64, H=17, P=5, rows=rows, directions=2))
    cases += [Case("generic", "lstm", dtype, H=9, P=8, rows="lengths", reverse=True) for dtype in DTYPES]
    return cases


@pytest.mark.parametrize("case", generic_cases(), ids=str)
def test_generic(program: Path, case: Case) -> None:
    check(program, case)


# Types of the routes that hold U on the chip; float32 as such and as TF32.
TILE_TYPES = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False))


def tile_cases() -> list[Case]:
    cases = []
    for route, parts in (("block", 1), ("cluster", 2), ("grid", 2)):
        for cell in ("tanh", "gru", "lstm"):
            for dtype, tf32 in TILE_TYPES:
                # Units that do not fill their tiles, rows neither, several tiles a block, blocks a batch; both ways.
                some = Case(route, cell, dtype, tf32=tf32, H=34, rows="lengths", directions=2)
                cases.append(replace(some, plan=(parts, 2, 2, 2)))
                # More tiles of weights than registers hold.
                cases.append(replace(some, T=3, H=98, directions=1, reverse=True, plan=(parts, 1, 8, 1)))
            dtype, tf32 = TILE_TYPES[len(cases) % len(TILE_TYPES)]
            cases += [
                Case(route, cell, dtype, tf32=tf32, B=9, H=34, rows="packed", directions=2, plan=(parts, 1, 4, 2)),
                Case(route, cell, dtype, tf32=tf32, T=5, B=3, H=64, bare=True, plan=(parts, 1, 8, 1)),
                Case(route, cell, dtype, tf32=tf32, T=1, B=1, H=2 * parts * 16, plan=(parts, 1, 2, 1)),
            ]
        for cell in ("relu", "sigmoid"):
            cases.append(Case(route, cell, torch.bfloat16, H=34, rows="lengths", plan=(parts, 1, 8, 1)))
        # Long enough for flags and mailboxes to go round.
        cases.append(Case(route, "sigmoid", torch.float32, T=40, B=3, H=34, plan=(parts, 1, 2, 1)))
    return cases


@pytest.mark.parametrize("case", tile_cases(), ids=str)
def test_tiles(program: Path, case: Case) -> None:
    check(program, case)


def chosen_cases() -> list[Case]:
    """Plans that the rule makes for small devices: of few multiprocessors, of little shared memory."""
    cases = []
    for route in ("block", "cluster", "grid"):
        for i, (dtype, tf32) in enumerate(TILE_TYPES):
            cell = ("gru", "lstm", "tanh", "gru")[i]
            some = Case(route, cell, dtype, tf32=tf32, T=3, B=21, H=80)
            cases.append(replace(some, rows="lengths", sm_count=6))
            cases.append(replace(some, B=6, rows="packed", directions=2, sm_count=8, shared_bytes=100_000))
        if route != "cluster":
            cases.append(Case(route, "lstm", torch.float16, B=4, H=50, sm=80, sm_count=6, shared_bytes=163 * 1024))
    # Weights that find no room on the chip, all but those in registers and some of them.
    for i, (dtype, tf32) in enumerate(TILE_TYPES):
        some = Case("grid", ("lstm", "gru")[i % 2], dtype, tf32=tf32, T=3, B=3, H=146, rows="lengths")
        cases.append(replace(some, plan=(2, 1, 8, 1), streamed=3))
        cases.append(replace(some, sm_count=3, shared_bytes=60_000 if dtype in HALF_DTYPES else 90_000))
    # As many blocks as a cluster can have, and a number of blocks that divides nothing.
    cases.append(Case("cluster", "gru", torch.bfloat16, T=3, B=3, H=250, plan=(16, 1, 8, 1)))
    cases.append(Case("grid", "gru", torch.bfloat16, T=3, B=3, H=150, plan=(5, 4, 8, 1)))
    # A sum that eight warps share, and more tiles than shares.
    cases.append(Case("cluster", "tanh", torch.bfloat16, T=3, B=9, H=130, plan=(8, 8, 2, 3)))
    cases.append(Case("block", "tanh", torch.float32, T=3, B=9, H=30, plan=(1, 4, 2, 5)))
    return cases


@pytest.mark.parametrize("case", chosen_cases(), ids=str)
def test_chosen_plans(program: Path, case: Case) -> None:
    check(program, case)


def random_cases(count: int) -> list[Case]:
    """Any sizes, options and plans that fit together; the same in every run."""
    draw = random.Random(0)
    cases: list[Case] = []
    while len(cases) < count:
        route, cell = draw.choice(ROUTES), draw.choice(("tanh", "sigmoid", "gru", "lstm"))
        some = Case(
            route,
            cell,
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
            projects = cell == "lstm" and some.H > 1 and draw.random() < 0.5
            cases.append(replace(some, P=draw.randint(1, some.H - 1) if projects else None))
        elif some.dtype != torch.float64:
            some = replace(some, H=2 * some.H, tf32=some.dtype == torch.float32 and draw.random() < 0.5)
            groups, warps = -(-some.H // 16), 8 if some.dtype == torch.float32 else 16
            parts = 1 if route == "block" else draw.choice((2, 4, 8)) if route == "cluster" else draw.randint(2, 7)
            shares = [k for k in (1, 2, 4, 8) if k * -(-groups // parts) <= warps]
            if parts <= groups:
                plan = (parts, draw.choice(shares), draw.choice((2, 4, 8)), draw.randint(1, 3))
                cases.append(replace(some, plan=plan, streamed=draw.randint(0, 2) if route == "grid" else 0))
    return cases


@pytest.mark.parametrize("case", random_cases(40), ids=str)
def test_random_cases(program: Path, case: Case) -> None:
    check(program, case)


@pytest.fixture(scope="session")
def plans_program() -> Path:
    return build("plans", [*kernel_sources(), ROOT / "tests/cuda_emulator/plans.cpp"])


@pytest.mark.parametrize(
    ("sm", "sm_count", "shared_bytes"), [(75, 40, 64), (80, 108, 163), (90, 132, 227), (90, 7, 40)]
)
def test_plans_fit_their_device(plans_program: Path, sm: int, sm_count: int, shared_bytes: int) -> None:
    """Whatever is to be run: a plan covers all units and rows, and the device can launch it."""
    sizes = [(T, B, H) for T in (1, 100) for B in (1, 7, 64, 1000) for H in (1, 2, 34, 65, 256, 512, 1000, 2560)]
    problems = [
        (CELLS.index(cell), backward, type_, T, B, H, H // 2 if projected else H, directions, tf32, route)
        for cell in ("tanh", "gru", "lstm")
        for backward in (0, 1)
        for type_, tf32 in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0))
        for T, B, H in sizes
        for projected in ((False, True) if cell == "lstm" and H == 34 else (False,))
        for directions in (1, 2)
        for route in (-1, *range(len(ROUTES)))
    ]
    request = {"sm": sm, "sm_count": sm_count, "shared_bytes": shared_bytes * 1024, "problems": torch.tensor(problems)}
    answer = run(plans_program, request)
    for i, problem in enumerate(problems):
        _, _, type_, _, B, H, P, directions, allow_tf32, wanted = problem
        plan = tensor(answer[str(i)], torch.int64, 10).tolist()
        route, tf32, parts, groups, k_parts, tile_rows, row_tiles, row_groups, shared, workspace = plan
        what = f"{problem} by {plan}"
        assert wanted in (-1, route) or route == 0, what
        if type_ == DTYPES[torch.float64] or H % 2 or H != P or sm < 80:
            assert route == 0, what
        if route == 0:
            assert workspace > 0, what
            continue
        assert tf32 == (allow_tf32 and type_ == 0), what
        assert parts * groups * 16 >= H, what
        assert row_groups * row_tiles * tile_rows >= B, what
        assert 1 <= tile_rows <= 8, what
        assert shared <= shared_bytes * 1024, what
        assert groups * k_parts * 32 <= (256 if type_ == 0 else 512), what
        assert k_parts & (k_parts - 1) == 0, what
        if ROUTES[route] == "block":
            assert parts == 1, what
        elif ROUTES[route] == "cluster":
            assert sm >= 90, what
            assert parts in (2, 4, 8, 16), what
        else:  # all blocks run at the same time
            assert parts * row_groups * directions <= sm_count, what
            assert workspace > 0, what


@pytest.fixture(scope="session")
def rows_program() -> Path:
    return build("rows", [ROOT / "csrc/cuda/rnn/shift_rows.cu", ROOT / "tests/cuda_emulator/rows.cpp"])


@pytest.mark.parametrize("rows", ["full", "lengths", "packed"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_rows_are_copied(rows_program: Path, rows: str, shift: int) -> None:
    """Each row is that of the step before, the same or after, or of `first`; by words of 2, 4, 8 and 16 bytes."""
    for seed, (width, gap, with_first) in enumerate([(1, 0, True), (2, 2, False), (12, 0, True), (40, 8, True)]):
        case = Case("", "tanh", torch.int16, T=4, B=5, H=width, rows=rows)
        lengths = lengths_of(case)
        N = sum(lengths) if rows == "packed" else case.T * case.B
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(1, 1000, (N, width + gap), generator=generator, dtype=torch.int16)
        first = torch.randint(1, 1000, (case.B, width), generator=generator, dtype=torch.int16)
        expected = torch.zeros(N, width, dtype=torch.int16)
        for b, row in enumerate(places(case, lengths, False)):
            for t, place in enumerate(row):
                if 0 <= t + shift < len(row):
                    expected[place] = source[row[t + shift], :width]
                elif with_first:
                    expected[place] = first[b]
        request: dict[str, Tensor | int | None] = {
            "seed": seed,
            "steps": case.T,
            "batch": case.B,
            "shift": shift,
            "rows": N,
            "row_bytes": 2 * width,
            "from": source.flatten()[: N * (width + gap) - gap],  # nothing behind the last row
            "from_stride": 2 * (width + gap),
            "first": first if with_first else None,
        }
        found = tensor(run(rows_program, request | rows_of(case, lengths))["to"], torch.int16, N, width)
        assert torch.equal(found, expected), f"width {width}"
