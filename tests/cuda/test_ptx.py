"""nvcc's PTX in the emulator: what it computes, what it needs of a device, and that faults in it are found.

With `--ptx compute_90` the other tests of the kernels run on the PTX as well (`make cuda-check`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import ptx
from support.cuda_rnn import Case, check, program_sources
from support.emulator import EMULATOR, ROOT, KernelError, Request, build_ptx, run

KERNELS = ROOT / "csrc" / "cuda"
GRU = replace(Case("cluster", "GRU", torch.bfloat16), H=34, directions=2, rows="lengths", plan=(2, 2, 2, 2))
GRID = replace(GRU, route="grid")
FLOAT = Case("block", "GRU", torch.float32, T=3, B=5, H=34, plan=(1, 1, 8, 1))


def attention_sources() -> list[Path]:
    patterns = ("pooling/*.cu", "pooling/*.cpp", "attention/*.cu", "attention/*.cpp", "reduce_partial_sums.cu")
    return [*sorted(path for name in patterns for path in KERNELS.glob(name)), EMULATOR / "attention.cpp"]


def test_short() -> None:
    """One kernel of each pass, for clusters and grids."""
    program = build_ptx("rnn-short", program_sources(), "compute_90", only=("tiles_bf16.cu",), wanted="3Gru")
    for case in (GRU, GRID):
        check(program, case)


# ---- PTX for an older generation on a device with clusters


@pytest.fixture(scope="module")
def older() -> Path:
    return build_ptx("rnn-older", program_sources(), "compute_89", only=("tiles_bf16.cu",), wanted="3Gru")


def test_older_ptx_has_no_clusters(older: Path) -> None:
    """The plan is another one, with right results; a plan of clusters traps instead of computing nonsense."""
    check(older, Case("block", "GRU", torch.bfloat16, T=3, B=21, H=80, rows="lengths"))
    check(older, replace(GRID))
    with pytest.raises(KernelError, match="a trap"):
        check(older, GRU)


def test_older_ptx_without_traps_is_found() -> None:
    """Empty functions of clusters, as before they trapped, end normally with wrong numbers."""
    program = build_ptx(
        "rnn-silent",
        program_sources(),
        "compute_89",
        only=("tiles_bf16.cu",),
        wanted="3Gru",
        change=lambda name, body: re.sub(r"^\s*(@\S+\s+)?trap;", "", body, flags=re.MULTILINE),
    )
    with pytest.raises((KernelError, AssertionError), match=r"race|off by|NaN"):
        check(program, GRU)


# ---- planted faults


@dataclass(frozen=True)
class Fault:
    """A change of the PTX of one kernel, and what finds it."""

    name: str
    file: str
    kernel: str
    find: str  # a regular expression; `which` of its matches is replaced
    put: str
    case: Case | str  # of the recurrence, or the op of an attention request
    report: str  # of the emulator or of the comparison
    which: int | None = 0  # None: all


TILES = ("rnn/tiles_bf16.cu", "tile_forward.*BFloat16.*3Gru")
WRONG = r"off by|NaN|depends on the order"
FAULTS = [
    Fault(
        "mma_rows",
        *TILES,
        r"\}, \{(%r\d+),(%r\d+),(%r\d+),",
        r"}, {\2,\1,\3,",
        GRU,
        WRONG,
    ),
    Fault("mma_columns", *TILES, r"\{(%r\d+),(%r\d+)\}, \{%f", r"{\2,\1}, {%f", GRU, WRONG, None),
    Fault("mma_type", *TILES, r"bf16\.bf16\.f32 ", "f16.f16.f32 ", GRU, WRONG),
    Fault(
        "no_wait_for_bytes",
        *TILES,
        r"mbarrier\.try_wait[^,]*(p\b|%p\d+), [^;]*;",
        r"setp.eq.u32 \1, 0, 0;",
        GRU,
        "race: ",
    ),
    Fault(
        "wait_in_block_scope",
        *TILES,
        r"try_wait\.parity\.acquire\.cluster",
        "try_wait.parity.acquire.cta",
        GRU,
        "race: ",
    ),
    Fault("wait_for_other_phase", *TILES, r"(try_wait\S* \S+ \[\S+\], )%r\d+;", r"\g<1>1;", GRU, "race: |deadlock"),
    Fault("too_many_bytes", *TILES, r"(expect_tx\S* _, \[%r\d+\], )%r\d+;", r"\g<1>4096;", GRU, "deadlock"),
    Fault(
        "too_few_bytes",
        *TILES,
        r"(expect_tx\S* _, \[%r\d+\], )%r\d+;",
        r"\g<1>16;",
        GRU,
        "race: |deadlock|before its expected",
    ),
    Fault("no_fence_of_mbarriers", *TILES, r"fence\.mbarrier_init\.release\.cluster;", "", GRU, "not published"),
    Fault(
        "cluster_arrives_relaxed",
        *TILES,
        r"cluster\.arrive\.release",
        "cluster.arrive.relaxed",
        GRU,
        "race: |may not have started",
    ),
    Fault(
        "no_wait_for_cluster",
        *TILES,
        r"barrier\.cluster\.wait\.acquire\.aligned;",
        "",
        GRU,
        "may not have started|between cluster_arrive|no mbarrier",
    ),
    Fault(
        "wrong_rank",
        *TILES,
        r"(mapa\.shared::cluster\.u32 %r\d+, %r\d+, )%r\d+;",
        r"\g<1>0;",
        GRU,
        "not in the same other block|race: |deadlock|not in shared",
    ),
    Fault("no_barrier", *TILES, r"bar\.sync 0;|bar\.sync\s+0;", "", GRU, "race: ", -1),
    Fault("flag_relaxed", *TILES, r"ld\.acquire\.gpu", "ld.relaxed.gpu", GRID, "race: "),
    Fault("flag_raised_relaxed", *TILES, r"st\.release\.gpu", "st.relaxed.gpu", GRID, "race: "),
    Fault("flag_raised_in_block_scope", *TILES, r"st\.release\.gpu", "st.release.cta", GRID, "race: "),
    Fault("no_wait_for_copy", *TILES, r"cp\.async\.wait_all;", "", GRID, "use-after-poison|had landed"),
    Fault(
        "copy_elsewhere",
        *TILES,
        r"(cp\.async\.cg\.shared\.global \[%r\d+)\]",
        r"\1+16]",
        GRID,
        f"another copy|race: |overflow|{WRONG}",
    ),
    Fault(
        "wrong_lane",
        "rnn/tiles_fp32.cu",
        "tile_forward.*FloatArithmetic.*3Gru",
        r"(shfl\.sync\.bfly\.b32\s+\S+, %r\d+, )%r\d+,",
        r"\g<1>3,",
        FLOAT,
        WRONG,
        None,
    ),
    Fault(
        "wrong_sign",
        "rnn/generic.cu",
        "generic_forward.*3GruEf",
        "0fBFB8AA3B",
        "0f3FB8AA3B",
        Case("generic", "GRU", torch.float32),
        WRONG,
    ),
    Fault(
        "scan_no_barrier",
        "pooling/prefix_pool.cu",
        "prefix_scan.*BFloat16",
        r"bar\.sync\s+0;",
        "",
        "prefix",
        "race: ",
        1,  # before the effects of the other warps are read
    ),
    Fault(
        "scan_lane",
        "pooling/prefix_pool_backward.cu",
        "prefix_gradient_scan.*BFloat16",
        r"(shfl\.sync\.idx\.b32\s+\S+, %r\d+, )%r\d+,",
        r"\g<1>0,",
        "prefix",
        WRONG,
        None,
    ),
    Fault(
        "rows_no_wait_for_copy",
        "pooling/prefix_pool_backward_rows.cu",
        "prefix_row_gradients.*BFloat16.*Li1E",
        r"cp\.async\.wait_all;",
        "",
        "rows",
        "use-after-poison|had landed",
    ),
    Fault(
        "pool_lanes",
        "pooling/chunk_summaries.cu",
        "pool_chunks.*BFloat16.*Li1E",
        r"(shfl\.sync\.bfly\.b32\s+\S+, %r\d+, )%r\d+,",
        r"\g<1>1,",
        "pool",
        WRONG,
        None,
    ),
    Fault(
        "scores_no_barrier",
        "attention/additive_attention.cu",
        "additive_scores.*BFloat16",
        r"bar\.sync\s+0;",
        "",
        "additive",
        "race: ",
        -1,
    ),
]


def attention_request(op: str) -> Request:
    """A small call of an op."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    if op == "additive":
        B, Tq, Tk, A, D = 2, 5, 7, 40, 9
        sizes = {"batch": B, "queries": Tq, "keys": Tk, "attn_dim": A, "value_dim": D}
        tensors = {"query": normal(B, Tq, A), "key": normal(B, Tk, A), "v": normal(A), "values": normal(B, Tk, D)}
        tensors |= {"grad_context": normal(B, Tq, D)}
        return sizes | tensors | {"op": 2, "type": 2, "seed": 1}
    prefix = op != "pool"
    B, T, D = (2, 96, 64) if prefix else (3, 21, 64)
    tensors = {"e": normal(B, T, D), "u": normal(D), "grad_c": normal(B, T, D) if prefix else normal(B, D)}
    plan = {"packs": 1, "group_threads": 8, "chunk": 8, "slot": 8 * (op == "rows")}
    sizes = {"batch": B, "steps": T, "dim": D}
    return sizes | tensors | plan | {"op": int(prefix), "type": 2, "seed": 1}


def change_of(fault: Fault) -> Callable[[str, str], str]:
    """The change of the kernels that the fault names; there must be one."""

    def change(name: str, body: str) -> str:
        if re.search(fault.kernel, name) is None:
            return body
        matches = list(re.finditer(fault.find, body))
        assert matches, f"{name} has no {fault.find}"
        if fault.which is None:
            return re.sub(fault.find, fault.put, body)
        match = matches[fault.which]
        return body[: match.start()] + match.expand(fault.put) + body[match.end() :]

    return change


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_found(fault: Fault) -> None:
    of_rnn = isinstance(fault.case, Case)
    sources = program_sources() if of_rnn else attention_sources()
    wanted = "3Gru" if of_rnn else "BFloat16"
    build = partial(build_ptx, only=(Path(fault.file).name,), wanted=wanted)
    name = "rnn" if of_rnn else "attention"
    changed = build(f"{name}-{fault.name}", sources, "compute_90", change=change_of(fault))
    if isinstance(fault.case, Case):
        with pytest.raises((KernelError, AssertionError)) as found:
            check(changed, fault.case)
        assert re.search(fault.report, str(found.value)), str(found.value)
        return
    request = attention_request(fault.case)
    right = run(build(f"{name}-{Path(fault.file).stem}", sources, "compute_90"), request)
    if fault.report == WRONG:
        assert run(changed, request) != right
    else:
        with pytest.raises(KernelError) as stopped:
            run(changed, request)
        assert re.search(fault.report, str(stopped.value)), str(stopped.value)


def test_unknown_instructions_are_errors() -> None:
    kernel = ptx.Kernel("k", 32, 8, 1, "\tvote.sync.any.pred %p1, %p2, -1;\n")
    with pytest.raises(ptx.UnknownPtxError, match="vote"):
        ptx.translate(kernel, "here", "some.ptx")
