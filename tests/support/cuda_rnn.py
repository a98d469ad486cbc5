"""Cases of the CUDA recurrence kernels in the emulator, and their comparison with the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llm_ext import reference
from support.comparison import assert_close
from support.emulator import DTYPES, EMULATOR, ROOT, run, tensor
from support.tolerances import HALF_DTYPES

MODES = ("RNN_TANH", "RNN_RELU", "RNN_SIGMOID", "GRU", "LSTM")
GATES = {"GRU": 3, "LSTM": 4}
SAVED = {"GRU": 4, "LSTM": 5}  # blocks of saved activations
ROUTES = ("generic", "block", "cluster", "grid")
# The blocks of dz that belong to the input, in the order of the weights, and those that belong to the state.
INPUT_BLOCKS = {"GRU": (1, 2, 0), "LSTM": (0, 1, 2, 3)}
STATE_BLOCKS = {"GRU": (1, 2, 3), "LSTM": (0, 1, 2, 3)}
# Tensors that hold both directions.
BOTH = ("h0", "c0", "grad_h_n", "grad_c_n")
SEEDS = 3


@dataclass(frozen=True)
class Case:
    route: str
    mode: str
    dtype: torch.dtype
    T: int = 4
    B: int = 5
    H: int = 33
    P: int | None = None
    directions: int = 1
    reverse: bool = False
    rows: str = "full"  # or "lengths", "packed"
    bare: bool = False  # no biases, no initial states, no gradients but that of y
    tf32: bool = False
    sm: int = 90
    sm_count: int = 132
    shared_bytes: int = 227 * 1024
    # A given plan: blocks per block group, warps that share a sum, rows per tile, tiles per block.
    plan: tuple[int, int, int, int] | None = None
    streamed: int = 0  # column tiles of weights that a warp reads from the workspace

    def __str__(self) -> str:
        sizes = f"T{self.T}-B{self.B}-H{self.H}" + (f"-P{self.P}" if self.P else "")
        options = [name for name in ("reverse", "bare", "tf32") if getattr(self, name)]
        options += ["both"] * (self.directions == 2) + [self.rows] * (self.rows != "full") + ["sm80"] * (self.sm == 80)
        options += ["plan" + "_".join(map(str, self.plan))] if self.plan else []
        options += [f"streamed{self.streamed}"] if self.streamed else []
        return "-".join([self.route, self.mode, str(self.dtype).removeprefix("torch."), sizes, *options])


def kernel_sources() -> list[Path]:
    cuda = ROOT / "csrc" / "cuda"
    sources = [*(cuda / "rnn").iterdir(), cuda / "device_facts.cu"]
    return sorted(path for path in sources if path.suffix in (".cu", ".cpp"))


def program_sources() -> list[Path]:
    """The kernels and the program that runs them."""
    return [*kernel_sources(), EMULATOR / "rnn.cpp"]


def lengths_of(case: Case) -> list[int]:
    """Steps of each row, from 0 to T; packed rows have at least one step and are sorted."""
    if case.rows == "full":
        return [case.T] * case.B
    some = [case.T, 0, 1, max(case.T - 1, 0), case.T // 2]
    lengths = [some[b % len(some)] for b in range(case.B)]
    if case.rows == "lengths":
        return lengths
    return sorted((max(length, 1) for length in lengths), reverse=True)


def rows_in_time(case: Case, lengths: list[int], reverse: bool) -> list[list[int]]:
    """For each batch row, its rows of the sequence in order of its own time."""
    first = [t * case.B for t in range(case.T)]
    if case.rows == "packed":
        sizes = [sum(length > t for length in lengths) for t in range(case.T)]
        first = [sum(sizes[:t]) for t in range(case.T)]
    orders = [[first[t] + b for t in range(length)] for b, length in enumerate(lengths)]
    return [order[::-1] for order in orders] if reverse else orders


def rows_of(case: Case, lengths: list[int]) -> dict[str, Tensor]:
    """The lengths or row offsets of a request."""
    if case.rows == "packed":
        sizes = [sum(length > t for length in lengths) for t in range(case.T)]
        return {"row_offsets": torch.tensor([sum(sizes[:t]) for t in range(case.T + 1)])}
    if case.rows == "lengths":
        # Lengths out of range are clamped.
        return {"lengths": torch.tensor([n + 3 if n == case.T else n - 2 if n == 0 else n for n in lengths])}
    return {}


def inputs_of(case: Case, lengths: list[int]) -> dict[str, Tensor]:
    """The tensors of a request by name. Values that must not be read are NaN."""
    generator = torch.Generator().manual_seed(0)
    G, H, P, D = GATES.get(case.mode, 1), case.H, case.P or case.H, case.directions
    N = sum(lengths) if case.rows == "packed" else case.T * case.B

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(case.dtype)

    tensors = {"grad_y": uniform(N, D * P)}
    for d in range(D):
        tensors[f"gates_x{d}"] = uniform(N, G * H, scale=1.5)
        tensors[f"w_hh{d}"] = uniform(G * H, P, scale=(1.5 if case.mode != "RNN_RELU" else 0.9) * P**-0.5)
        if case.P is not None:
            tensors[f"w_hr{d}"] = uniform(P, H, scale=1.5 * H**-0.5)
        if not case.bare:
            tensors[f"b_hh{d}"] = uniform(G * H, scale=0.5)
    if not case.bare:
        tensors |= {"h0": uniform(D, case.B, P), "grad_h_n": uniform(D, case.B, P)}
        if case.mode == "LSTM":
            tensors |= {"c0": uniform(D, case.B, H), "grad_c_n": uniform(D, case.B, H)}
    if case.rows == "lengths":
        inside = {n for order in rows_in_time(case, lengths, False) for n in order}
        beyond = [n for n in range(N) if n not in inside]
        for name, values in tensors.items():
            if name.startswith(("gates_x", "grad_y")):
                values[beyond] = float("nan")
    return tensors


@functools.cache
def expected_of(case: Case) -> list[dict[str, Tensor]]:
    """Results and gradients of the float64 reference, per direction."""
    lengths = lengths_of(case)
    tensors = {name: value.double() for name, value in inputs_of(case, lengths).items()}
    G, H, P = GATES.get(case.mode, 1), case.H, case.P or case.H
    results = []
    for d in range(case.directions):
        of_d = {name[:-1]: value for name, value in tensors.items() if name.endswith(str(d)) and name not in BOTH}
        of_d |= {name: tensors[name][d] for name in BOTH if name in tensors}
        # W_ih is the identity: the gradient of x is that of the pre-activations.
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
        if case.mode == "LSTM":
            c0 = of_d.get("c0", torch.zeros(case.B, H, dtype=torch.float64)).requires_grad_()
            wanted["c0"] = c0
            w_hr = None
            if case.P is not None:
                w_hr = wanted["w_hr"] = of_d["w_hr"].requires_grad_()
            y, (h_n, c_n) = reference.lstm(x, (h0, c0), eye, w_hh, None, b_hh, w_hr, **options)  # type: ignore[arg-type]
            outputs = {"y": y, "h_n": h_n, "c_n": c_n}
        elif case.mode == "GRU":
            y, h_n = reference.gru(x, h0, eye, w_hh, None, b_hh, **options)  # type: ignore[arg-type]
            outputs = {"y": y, "h_n": h_n}
        else:
            nonlinearity = case.mode.removeprefix("RNN_").lower()
            y, h_n = reference.rnn(x, h0, eye, w_hh, None, b_hh, nonlinearity=nonlinearity, **options)  # type: ignore[arg-type]
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
    """Run a case in the emulator and compare all results and gradients with the reference."""
    lengths = lengths_of(case)
    G, H, P, D = GATES.get(case.mode, 1), case.H, case.P or case.H, case.directions
    blocks, saved_blocks = (4 if G > 1 else 1), SAVED.get(case.mode, 0) + (case.P is not None)
    tensors = inputs_of(case, lengths)
    names = ("group_blocks", "k_splits", "tile_rows", "row_tiles")
    plan = {} if case.plan is None else dict(zip(names, case.plan, strict=True))
    N = tensors["grad_y"].shape[0]
    answer = run(
        program,
        tensors
        | rows_of(case, lengths)
        | plan
        | {
            "mode": MODES.index(case.mode),
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

    op = case.mode.lower() if G > 1 else "rnn"
    rounded = case.route != "generic" and case.dtype in HALF_DTYPES
    tolerance = f"{op}_tf32" if case.tf32 else f"{op}_rounded" if rounded else op
    y = tensor(answer["y"], case.dtype, N, D, P)
    for d, expected in enumerate(expected_of(replace(case, route="", tf32=False, sm=0, plan=None, streamed=0))):
        order = rows_in_time(case, lengths, case.reverse != bool(d))
        inside = [n for row in order for n in row]
        beyond = sorted(set(range(N)) - set(inside))
        expected_y = expected["y"].reshape(N, P)
        assert_close(tolerance, y[:, d], expected_y, "y")
        assert not y[beyond, d].any(), "y is 0 beyond a row's length"
        assert_close(tolerance, tensor(answer["h_n"], case.dtype, D, case.B, P)[d], expected["h_n"], "h_n")
        if case.mode == "LSTM":
            assert_close(tolerance, tensor(answer["c_n"], case.dtype, D, case.B, H)[d], expected["c_n"], "c_n")

        dz = tensor(answer[f"dz_{d}"], case.dtype, N, blocks, H)
        assert not dz[beyond].any(), "dz is 0 beyond a row's length"
        dx = dz[:, INPUT_BLOCKS.get(case.mode, (0,))].reshape(N, G * H)
        assert_close(f"{tolerance}_backward", dx, expected["dgates_x"].reshape(N, G * H), "dz of the input")
        # The caller's products, in float64: gradients of the state's weights and biases.
        dz_state = dz[:, STATE_BLOCKS.get(case.mode, (0,))].reshape(N, G * H).double()
        h0 = tensors["h0"][d].double() if "h0" in tensors else torch.zeros(case.B, P, dtype=torch.float64)
        before = torch.zeros(N, P, dtype=torch.float64)
        for b, row in enumerate(order):
            for n, earlier in zip(row, [None, *row], strict=False):
                before[n] = h0[b] if earlier is None else y[earlier, d].double()
        derived = {"dw_hh": dz_state.T @ before, "db_hh": dz_state.sum(0)}
        if case.P is not None:
            dh = tensor(answer[f"dh_{d}"], case.dtype, N, P)
            assert not dh[beyond].any(), "dh is 0 beyond a row's length"
            m = tensor(answer["saved"], case.dtype, D, N, saved_blocks, H)[d, :, -1].double()
            derived["dw_hr"] = dh[inside].double().T @ m[inside]
        for name, value in derived.items():
            assert_close(f"{tolerance}_backward", value.to(case.dtype), expected[name], name)
        if not case.bare:
            dh0 = tensor(answer["dh0"], case.dtype, D, case.B, P)[d]
            assert_close(f"{tolerance}_backward", dh0, expected["dh0"], "dh0")
            if case.mode == "LSTM":
                dc0 = tensor(answer["dc0"], case.dtype, D, case.B, H)[d]
                assert_close(f"{tolerance}_backward", dc0, expected["dc0"], "dc0")
