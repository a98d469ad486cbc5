"""The CUDA kernels of attention in the emulator, against the reference: every op, type and plan, both passes.

Each case runs with several seeds, so in several orders of its threads, and must give the same bits in all of them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.comparison import assert_close
from support.emulator import DTYPES, EMULATOR, ROOT, KernelError, build, build_without_call, run, tensor
from support.pooling import log_sum_exp
from support.tolerances import HALF_DTYPES
from torch import Tensor

from llm_ext import reference

KERNELS = ROOT / "csrc" / "cuda"
SEEDS = 3
NAN = float("nan")


def sources() -> list[Path]:
    """The kernels and the program that runs them."""
    patterns = ("pooling/*.cu", "pooling/*.cpp", "attention/*.cu", "attention/*.cpp", "reduce_partial_sums.cu")
    return [*sorted(path for name in patterns for path in KERNELS.glob(name)), EMULATOR / "attention.cpp"]


@pytest.fixture(scope="session")
def program() -> Path:
    return build("attention", sources())


def computed(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of this type are computed."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


# ---- pooling


@dataclass(frozen=True)
class Pool:
    prefix: bool
    dtype: torch.dtype
    B: int = 3
    T: int = 21
    D: int = 24
    scored: bool = False  # scores are given, not u
    size: float = 0.0  # of the given scores
    rows: str = "both"  # "full", "lengths", "mask", "gap"
    state: bool = True
    outweighs: bool = False  # the state outweighs all positions, whose c has the gradient 1/D
    bare: bool = False  # no gradients but that of c; prefix form: no gradients but that of the last state
    time_major: bool = False
    # A given plan: packs per thread, threads per thread group, positions per chunk.
    plan: tuple[int, int, int] | None = None
    slot: int = 0  # prefix form backward, in one pass: positions in shared memory at once
    sm_count: int = 132
    shared_bytes: int = 227 * 1024

    def __str__(self) -> str:
        options = [name for name in ("scored", "state", "outweighs", "bare", "time_major") if getattr(self, name)]
        options += [f"size{self.size:g}"] * (self.size != 0)
        options += ["plan" + "_".join(map(str, self.plan))] if self.plan else [f"sm{self.sm_count}"]
        options += [f"slot{self.slot}"] * (self.slot > 0)
        sizes = f"B{self.B}-T{self.T}-D{self.D}"
        op = "prefix" if self.prefix else "pool"
        return "-".join([op, str(self.dtype).removeprefix("torch."), sizes, self.rows, *options])


def pool_inputs(case: Pool) -> dict[str, Tensor]:
    """The tensors of a request by name. Masked positions are NaN."""
    B, T, D = case.B, case.T, case.D
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    tensors = {"e": normal(B, T, D), "grad_c": normal(B, T, D) if case.prefix else normal(B, D)}
    if case.scored:
        tensors["scores"] = (normal(B, T, scale=3, dtype=torch.float64) + case.size).to(case.dtype)
    else:
        tensors["u"] = normal(D, scale=2 * max(D, 1) ** -0.5)
    wide = computed(case.dtype)
    if case.prefix:
        if case.state:
            m0 = normal(B, dtype=torch.float64) + case.size
            l0 = torch.stack((m0.to(wide), 1 + normal(B, dtype=wide).abs()), 1)
            tensors |= {"l0": l0, "c0": normal(B, D, dtype=wide)}
        tensors |= {"grad_l_n": normal(B, dtype=wide), "grad_c_n": normal(B, D, dtype=wide)}
        if case.outweighs:
            tensors["l0"][:, 0] += 20
            tensors["grad_c"].fill_(1 / D)
            del tensors["grad_l_n"], tensors["grad_c_n"]
        if case.bare:
            del tensors["grad_c"], tensors["grad_l_n"]
    elif not case.bare:
        tensors["grad_lse"] = normal(B, dtype=wide)
    attended = torch.ones(B, T, dtype=torch.bool)
    if case.rows in ("lengths", "both"):
        # Lengths out of range are clamped.
        lengths = torch.tensor([(T + 3, -2, T // 2, 1)[b % 4] for b in range(B)])
        tensors["lengths"] = lengths
        attended &= torch.arange(T) < lengths[:, None]
    if case.rows in ("mask", "both"):
        tensors["mask"] = torch.rand(B, T, generator=generator) < 0.6
        attended &= tensors["mask"]
    elif case.rows == "gap":
        # Chunks 31 and 32 of 8 positions.
        tensors["mask"] = (torch.arange(T) // 8 != 31) & (torch.arange(T) // 8 != 32).expand(B, T)
        attended &= tensors["mask"]
    tensors["e"][~attended] = NAN
    if case.scored:
        tensors["scores"][~attended] = NAN
    return tensors


@functools.cache
def pool_expected(case: Pool) -> dict[str, Tensor]:
    """Results and gradients of the float64 reference."""
    given = {n: t.double() if t.is_floating_point() else t for n, t in pool_inputs(case).items()}
    names = [n for n in ("e", "u", "scores", "l0", "c0") if n in given]
    wanted = {n: given[n].nan_to_num().requires_grad_() for n in names}
    e, u, scores = wanted["e"], wanted.get("u"), wanted.get("scores")
    options = {"scores": scores, "lengths": given.get("lengths"), "mask": given.get("mask")}
    if case.prefix:
        state = (wanted["l0"], wanted["c0"]) if case.state else None
        c, (l_n, c_n) = reference.prefix_pool(e, u, state=state, **options)
        results = {"c": c, "l_n": log_sum_exp(l_n), "c_n": c_n}
    else:
        c, lse = reference.attention_pool(e, u, **options)
        results = {"c": c, "lse": lse}
    loss = torch.zeros((), dtype=torch.float64)
    for name, result in results.items():
        if f"grad_{name}" in given:
            loss = loss + (result * given[f"grad_{name}"]).masked_fill(result.isinf(), 0).sum()
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
    else:
        gradients = tuple(torch.zeros_like(t) for t in wanted.values())
    return {n: t.detach() for n, t in results.items()} | {"d" + n: g for n, g in zip(wanted, gradients, strict=True)}


def check_pool(program: Path, case: Pool) -> None:
    """Run a case in the emulator and compare all results and gradients with the reference."""
    tensors = pool_inputs(case)
    request, plan = dict(tensors), dict[str, int]()
    if case.time_major:
        request |= {n: tensors[n].transpose(0, 1) for n in ("e", "grad_c") if n in tensors and tensors[n].dim() == 3}
    if case.plan is not None:
        plan |= zip(("packs", "group_threads", "chunk"), case.plan, strict=True)
    answer = run(
        program,
        request
        | plan
        | {
            "op": int(case.prefix),
            "type": DTYPES[case.dtype],
            "batch": case.B,
            "steps": case.T,
            "dim": case.D,
            "time_major": int(case.time_major),
            "slot": case.slot,
            "sm_count": case.sm_count,
            "shared_bytes": case.shared_bytes,
            "seed": sum(map(ord, str(case))),
            "seeds": SEEDS,
        },
    )
    op = "prefix_pool" if case.prefix else "attention_pool"
    wide = ("lse", "l_n", "c_n", "dl0", "dc0")
    for name, expected in pool_expected(
        replace(case, plan=None, slot=0, sm_count=0, shared_bytes=0, time_major=False)
    ).items():
        dtype, shape = computed(case.dtype) if name in wide else case.dtype, expected.shape
        if name == "l_n":
            answer[name] = log_sum_exp(tensor(answer[name], dtype, case.B, 2)).numpy().tobytes()
        elif name == "dl0":  # of the log-sum-exp
            expected, shape = expected[:, 0], expected.shape[:1]
        if case.time_major and len(shape) == 3:
            found = tensor(answer[name], dtype, shape[1], shape[0], shape[2]).transpose(0, 1)
        else:
            found = tensor(answer[name], dtype, *shape)
        assert_close(op if name in ("c", *wide[:3]) else f"{op}_backward", found, expected, name, case.dtype)


def pack(dtype: torch.dtype) -> int:
    """Numbers in 16 bytes."""
    return 16 // dtype.itemsize


def pool_cases() -> list[Pool]:
    cases = []
    for prefix in (False, True):
        for i, dtype in enumerate(DTYPES):
            some = Pool(prefix, dtype, D=3 * pack(dtype))
            # Thread groups below a warp, of one warp and of several; several packs per thread; several chunks per
            # row, one, and one that is longer than the row.
            cases += [
                replace(some, plan=(1, 4, 8)),
                replace(some, plan=(1, 64, 16), scored=i % 2 == 0, rows="lengths"),
                replace(some, plan=(2, 2, 4), state=False, rows="mask", time_major=True),
                replace(some, plan=(4, 1, 6), rows="full", bare=True),
                replace(some, plan=(1, 32, 24), scored=i % 2 == 1),
                replace(some, plan=(1, 128, 32), B=2, T=9, state=False),
            ]
            # More chunks than lanes, in a row and for each warp.
            cases.append(replace(some, plan=(1, 4, 8), B=2, T=300, rows=("gap", "full", "gap", "lengths")[i]))
            cases.append(replace(some, plan=(1, 4, 4), B=1, T=1300, rows=("full", "gap", "mask", "full")[i]))
            # One number at a time.
            cases += [
                replace(some, D=17, plan=(0, 256, 8)),
                replace(some, D=300, T=5, plan=(0, 256, 8), scored=i % 2 == 0, rows="full", state=False),
            ]
        # Plans of make_pool_plan(), down to empty tensors.
        for i, (B, T, D) in enumerate([(1, 1, 1), (2, 0, 3), (2, 3, 0), (1, 70, 40), (40, 5, 16), (2, 130, 8)]):
            for dtype in (torch.float32, list(DTYPES)[i % 4]):
                cases.append(Pool(prefix, dtype, B=B, T=T, D=D, sm_count=2, rows="full" if i % 2 else "both"))
    for i, dtype in enumerate(DTYPES):
        large = Pool(True, dtype, D=3 * pack(dtype), T=30, scored=True, size=1e4 if dtype == torch.float16 else 1e6)
        cases += [replace(large, prefix=prefix, plan=(1, 4, 8)) for prefix in (False, True)]
        # Backward in one pass: several segments, one, none, no gradient of c.
        rows = replace(large, scored=False, size=0)
        cases += [
            replace(rows, plan=(1, 4, 8), slot=4),
            replace(rows, plan=(1, 64, 8), slot=8, scored=i % 2 == 1, rows="lengths", time_major=True),
            replace(rows, plan=(2, 2, 8), slot=6, rows="mask", state=False),
            replace(rows, B=2, T=9, plan=(1, 128, 8), slot=12, rows="full", bare=True),
            replace(rows, T=0, plan=(1, 4, 8), slot=4),
            replace(large, plan=(1, 8, 8), slot=8),
        ]
        if dtype in HALF_DTYPES:  # The rounding of the states does not add up over segments.
            many = replace(rows, B=2, T=300, D=pack(dtype), plan=(1, 1, 8), slot=2)
            cases.append(replace(many, scored=True, rows="full", outweighs=True))
    # Plans of make_pool_plan() and make_prefix_gradient_plan(): several chunks of a warp each, and a row in one pass.
    cases += [
        Pool(True, torch.float32, B=1, T=330, D=256, sm_count=1),
        Pool(True, torch.bfloat16, B=9, T=40, D=256, sm_count=1, shared_bytes=60_000),
    ]
    return list(dict.fromkeys(cases))


@pytest.mark.parametrize("case", pool_cases(), ids=str)
def test_pool(program: Path, case: Pool) -> None:
    check_pool(program, case)


# ---- additive attention

ADDITIVE_GRADIENTS = ("dquery", "dkey", "dv", "dvalues")


@dataclass(frozen=True)
class Additive:
    dtype: torch.dtype
    B: int = 2
    Tq: int = 5
    Tk: int = 37
    A: int = 70
    Dv: int = 9
    rows: str = "both"  # "full", "lengths", "mask", "by_query"
    size: float = 1.0  # scale of queries and keys
    cancel: bool = False  # queries and keys are nearly opposite
    bare: bool = False  # only the weights have a gradient
    only: str = ""  # the only gradient that is wanted
    slab: int | None = None

    def __str__(self) -> str:
        options = [name for name in ("cancel", "bare") if getattr(self, name)] + [self.only] * (self.only != "")
        options += [f"size{self.size:g}"] * (self.size != 1) + [f"slab{self.slab}"] * (self.slab is not None)
        sizes = f"B{self.B}-Tq{self.Tq}-Tk{self.Tk}-A{self.A}-Dv{self.Dv}"
        return "-".join(["additive", str(self.dtype).removeprefix("torch."), sizes, self.rows, *options])


def additive_inputs(case: Additive) -> dict[str, Tensor]:
    """The tensors of a request by name. Keys and values that no query attends to are NaN."""
    B, Tq, Tk, A, Dv = case.B, case.Tq, case.Tk, case.A, case.Dv
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype)

    tensors = {"query": normal(B, Tq, A, scale=case.size), "key": normal(B, Tk, A, scale=case.size)}
    if case.cancel:
        tensors["key"] = (normal(B, Tk, A).double() - tensors["query"][:, :1].double()).to(case.dtype)
    tensors |= {"v": normal(A, scale=2 * max(A, 1) ** -0.5), "values": normal(B, Tk, Dv)}
    if not case.bare:
        tensors["grad_context"] = normal(B, Tq, Dv)
    if case.bare or Tk % 2:
        tensors["grad_weights"] = normal(B, Tq, Tk)
    attended = torch.ones(B, Tq, Tk, dtype=torch.bool)
    if case.rows in ("lengths", "both"):
        # Lengths out of range are clamped.
        tensors["key_lengths"] = torch.tensor([(Tk + 3, Tk // 2, -2)[b % 3] for b in range(B)])
        attended &= torch.arange(Tk) < tensors["key_lengths"][:, None, None]
    if case.rows in ("mask", "both"):
        tensors["mask"] = torch.rand(B, Tk, generator=generator) < 0.6
        attended &= tensors["mask"][:, None]
    elif case.rows == "by_query":
        tensors["mask"] = torch.rand(B, Tq, Tk, generator=generator) < 0.4
        tensors["mask"][:, -1:] = False
        attended &= tensors["mask"]
    unseen = ~attended.any(1)
    tensors["key"][unseen] = NAN
    tensors["values"][unseen] = NAN
    return tensors


@functools.cache
def additive_expected(case: Additive) -> dict[str, Tensor]:
    """Results and gradients of the float64 reference."""
    given = {n: t.double() if t.is_floating_point() else t for n, t in additive_inputs(case).items()}
    wanted = {n: given[n].nan_to_num().requires_grad_() for n in ("query", "key", "v", "values")}
    context, weights = reference.additive_attention(
        *wanted.values(), key_lengths=given.get("key_lengths"), mask=given.get("mask"), need_weights=True
    )
    assert weights is not None
    results = {"context": context, "weights": weights}
    loss = torch.zeros((), dtype=torch.float64)
    for name, result in results.items():
        if f"grad_{name}" in given:
            loss = loss + (result * given[f"grad_{name}"]).sum()
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
    return {n: t.detach() for n, t in results.items()} | {"d" + n: g for n, g in zip(wanted, gradients, strict=True)}


def check_additive(program: Path, case: Additive) -> None:
    """Run a case in the emulator and compare all results and gradients with the reference."""
    answer = run(
        program,
        additive_inputs(case)
        | {
            "op": 2,
            "type": DTYPES[case.dtype],
            "batch": case.B,
            "queries": case.Tq,
            "keys": case.Tk,
            "attn_dim": case.A,
            "value_dim": case.Dv,
            "by_query": int(case.rows == "by_query"),
            "slab": case.slab,
            "seed": sum(map(ord, str(case))),
            "seeds": SEEDS,
        }
        | {f"need_{name}": int(case.only in ("", name)) for name in ADDITIVE_GRADIENTS},
    )
    op = "additive_attention"
    for name, expected in additive_expected(replace(case, slab=None, only="")).items():
        if case.only and name in ADDITIVE_GRADIENTS and name != case.only:
            assert name not in answer
            continue
        found = tensor(answer[name], case.dtype, *expected.shape)
        assert_close(f"{op}_backward" if name.startswith("d") else op, found, expected, name)


def additive_cases() -> list[Additive]:
    cases = []
    for i, dtype in enumerate(DTYPES):
        some = Additive(dtype)
        # One query, few and many; A of one chunk and more, of whole packs and not; masks of each kind; several slabs.
        cases += [
            replace(some, rows=("both", "lengths", "mask", "full")[i]),
            replace(some, Tq=1, Tk=66, A=(64, 130, 66, 200)[i], rows=("mask", "full", "both", "lengths")[i]),
            replace(some, B=1, Tq=33, Tk=17, A=20, Dv=70, rows="by_query", slab=32),
            replace(some, B=1, Tq=50, Tk=30, A=66, Dv=5, rows=("by_query", "full", "both", "lengths")[i]),
            replace(some, B=2, Tq=52, Tk=27, A=4, Dv=5, rows="both", slab=32),
            replace(some, Tq=40, Tk=1, A=3, rows="full", bare=True),
            # Large numbers, some of which cancel; with exponentials that would overflow.
            replace(some, Tq=3, Tk=9, A=8, size=20.0, cancel=True),
            replace(some, Tq=3, Tk=9, A=8, size=300.0, cancel=True, rows="full"),
        ]
        # One query: A and Dv of whole packs and not, of one step of a warp and several; one tile of keys and several.
        one = replace(some, Tq=1, Dv=(520, 33, 256, 1)[i])
        cases += [
            replace(one, Tk=66, A=(130, 66, 200, 64)[i], rows="by_query"),
            replace(one, B=1, Tk=(9, 300, 34, 300)[i], A=1100, rows="full"),
            replace(one, B=3, Tk=300, A=(130, 8, 264, 66)[i], Dv=64, rows=("both", "by_query", "lengths", "mask")[i]),
            replace(one, B=9, Tk=1, A=66, rows="lengths", bare=True),
            replace(one, Tk=10, A=8, size=20.0, cancel=True, only=ADDITIVE_GRADIENTS[i]),
            replace(one, Tk=9, A=8, size=300.0, cancel=True, rows="full", only=ADDITIVE_GRADIENTS[i - 1]),
            replace(one, Tk=5, A=(40, 3, 0, 64)[i], Dv=(0, 5, 16, 8)[i], rows="full", only=ADDITIVE_GRADIENTS[i - 2]),
        ]
    for sizes in ((0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 3, 4, 0, 2), (2, 3, 4, 5, 0), (1, 1, 1, 1, 1)):
        cases.append(Additive(torch.float32, *sizes, rows="full"))
    for sizes in ((0, 1, 4, 5, 2), (2, 1, 0, 5, 2), (2, 1, 4, 0, 2), (2, 1, 4, 5, 0)):
        cases.append(Additive(torch.bfloat16, *sizes, rows="full"))
    return cases


@pytest.mark.parametrize("case", additive_cases(), ids=str)
def test_additive(program: Path, case: Additive) -> None:
    check_additive(program, case)


def test_plans_fit(program: Path) -> None:
    """Every plan covers all positions and columns, and the device has room for it."""
    pools = [
        (B, T, D, size, *device)
        for B in (0, 1, 7, 64, 512, 1000)
        for T in (0, 1, 100, 4096, 100_000)
        for D in (0, 1, 8, 40, 512, 768, 1024, 4096, 9000)
        for size in (2, 4, 8)
        for device in ((132, 227 << 10), (108, 163 << 10), (7, 48 << 10))
    ]
    slabs = [(Tq, Tk, A) for Tq in (0, 1, 31, 50, 3000) for Tk in (0, 1, 50, 5000) for A in (0, 1, 64, 1024)]
    answer = run(program, {"pools": torch.tensor(pools), "slabs": torch.tensor(slabs)})
    kinds = {name: set[int]() for name in ("pool", "pool_gradient", "gradient")}
    for (i, problem), name in itertools.product(enumerate(pools), kinds):
        B, T, D, size, multiprocessors, room = problem
        packs, group_threads, chunk, chunks, slot, shared = tensor(answer[f"{name}{i}"], torch.int64, 6).tolist()
        what = f"{name} {problem} by {(packs, group_threads, chunk, chunks, slot, shared)}"
        kinds[name].add((1 + (slot > 0)) * packs)
        assert group_threads in (1, 2, 4, 8, 16, 32, 64, 128, 256), what
        assert packs == 0 or (D * size % 16 == 0 and packs * group_threads * 16 >= D * size), what
        assert chunks >= 1, what
        # Chunks run at the same time, with registers for two blocks of one pack a thread; two chunks gain nothing.
        resident = (2 if packs == 1 else 1) * multiprocessors * (256 // group_threads)
        assert chunks == 1 or B * chunks <= resident, what
        assert chunks == 1 or resident // max(B, 1) > 2, what
        assert chunk * chunks >= T, what
        # More packs than the row requires are for thread groups of a warp or more, in enough blocks.
        required = 256 * (packs // 2) * 16 < D * size
        assert packs <= (4 if name == "pool" else 2) or required, what
        if packs > 1 and not required:
            assert group_threads >= 32, what
            assert 8 * (B * chunks * group_threads // 256) >= 7 * multiprocessors, what
        if slot > 0:
            assert name == "gradient", what
            assert chunks == 1, what
            assert packs in (1, 2), what
            assert shared <= room, what
            assert 2 * (shared + 1024) <= room + 1024 or packs > 1, what
    assert kinds == {"pool": {0, 1, 2, 4}, "pool_gradient": {0, 1, 2, 4}, "gradient": {0, 1, 2, 4}}
    for i, (Tq, Tk, A) in enumerate(slabs):
        slab = int.from_bytes(answer[f"slab{i}"], "little")
        assert slab == Tq or slab % 32 == 0, slabs[i]
        assert slab * Tk <= max(32 * Tk, (Tq + Tk) * max(A, 1)), slabs[i]


# A call that is removed from a real kernel, and a case that must find the fault.
PREFIX = Pool(True, torch.float32, D=12, T=30, plan=(1, 64, 2))
LINES = [
    ("pooling/scan_chunks.cuh", "block_barrier", PREFIX),
    ("pooling/prefix_pool_backward_rows.cu", "block_barrier", replace(PREFIX, slot=2)),
    ("attention/scores.cuh", "block_barrier", Additive(torch.float32)),
    ("attention/one_query.cuh", "block_barrier", Additive(torch.float32, Tq=1)),
]


@pytest.mark.parametrize(("file", "call", "case"), LINES, ids=[line[0] for line in LINES])
def test_a_kernel_without_a_line(file: str, call: str, case: Pool | Additive) -> None:
    """The last call of this name in the file is removed."""
    program = build_without_call(sources(), file, call)
    run_case = partial(check_pool, program, case) if isinstance(case, Pool) else partial(check_additive, program, case)
    with pytest.raises(KernelError, match="race: "):
        run_case()
