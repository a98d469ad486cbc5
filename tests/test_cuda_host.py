"""The ops of csrc/torch/*_cuda.cpp, compiled for the CPU: of the recurrence the generic kernels run in the emulator.

What is not tried here is what a GPU's torch alone can do: streams, devices, memory that is pinned.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
import recurrences
import test_additive_attention as additive
import test_lengths as lengths
import test_ops as pools
import test_stack as stack
import torch
from cases import DTYPES, HALF_DTYPES, assert_close
from cuda_emulator.program import BUILD, compiler
from recurrences import CELLS, GRU, KINDS, LSTM, RNN, Cell, cell_functions, cell_inputs, compare
from test_ops import opcheck_arguments

from llm_ext import ops, reference

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EMULATOR = HERE / "cuda_emulator"
NAME = "llm_ext_emulated"
WITH_TORCH = [ROOT / f"csrc/torch/{name}.cpp" for name in ("attention_cuda", "recurrence_cuda", "schema")]
WITHOUT = [
    *(
        ROOT / f"csrc/cuda/{name}.cu"
        for name in ("additive_attention", "attention_pool", "parts", "prefix_rounds", "rows")
    ),
    ROOT / "csrc/cuda/rnn/recurrence_generic.cu",
    *(ROOT / f"csrc/cuda/{name}.cpp" for name in ("attention_plan", "plan")),
    ROOT / "csrc/torch/threads/usable_cores.cpp",
    ROOT / "csrc/torch/alloc/cpu_caching_allocator.cpp",
    HERE / "cuda_host/backend.cpp",
    HERE / "cuda_host/no_sanitizer.cpp",
    *(EMULATOR / f"{name}.cpp" for name in ("scheduler", "races", "device")),
]


def built() -> Path:
    """The ops as a library of their own, built at most once for the same text and torch."""
    torch_root = Path(torch.__file__).parent
    flags = ["-O1", "-g1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    flags += [f"-Dllm_ext={NAME}", '-DLLM_EXT_CUDA_VERSION="0"', f"-I{HERE / 'cuda_host'}", f"-I{EMULATOR}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{torch_root / 'include'}"]
    folders = [ROOT / "csrc" / "cuda", ROOT / "csrc" / "torch", EMULATOR, HERE / "cuda_host"]
    texts = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"
    ]
    read = b"".join(path.read_bytes() for path in [*texts, ROOT / "csrc/params.h", ROOT / "csrc/cpu/kernels.h"])
    key = hashlib.sha256(read + repr((flags, torch.__version__)).encode()).hexdigest()[:20]
    library = BUILD / f"{NAME}-{key}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = BUILD / f"{NAME}-{source.name}-{os.getpid()}.o"
        standard = "-std=c++20" if source in WITH_TORCH else "-std=c++17"
        run([compiler(), standard, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, [*WITH_TORCH, *WITHOUT]))
    partial = library.with_suffix(f".{os.getpid()}.partial")
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    run([compiler(), "-shared", "-fopenmp", *objects, "-o", str(partial), *libraries, "-Wl,--no-undefined"])
    for name in objects:
        Path(name).unlink()
    for stale in BUILD.glob(f"{NAME}-*.so"):
        stale.unlink()
    partial.rename(library)
    return library


@pytest.fixture(scope="module")
def emulated() -> types.ModuleType:
    """llm_ext/ops.py over these ops, taking the CPU for a GPU."""
    torch.ops.load_library(str(built()))
    text = Path(ops.__file__).read_text()
    for old, new in (
        ("torch.ops.llm_ext", f"torch.ops.{NAME}"),
        ('"llm_ext::', f'"{NAME}::'),
        ('Library("llm_ext"', f'Library("{NAME}"'),
        ("x.is_cuda", "x.is_cpu"),
    ):
        assert old in text
        text = text.replace(old, new)
    module = sys.modules[NAME] = types.ModuleType(NAME)  # torch.compile looks for it there
    exec(compile(text, NAME, "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def _ops(emulated: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (additive, recurrences, lengths, pools, stack):
        monkeypatch.setattr(module, "ops", emulated)
    monkeypatch.setattr(cases, "TOLERANCE_ON", {"cpu": cases.TOLERANCE_ON["cuda"]})


# T, B, I, H; even H is planned for other kernels, which the device then has no room for.
SIZES = [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1), (2, 3, 5, 7), (5, 9, 6, 17), (4, 3, 0, 5), (3, 2, 4, 16)]
both = pytest.mark.parametrize("reverse", [False, True])
every_cell = pytest.mark.parametrize("cell", CELLS, ids=str)
every_kind = pytest.mark.parametrize("cell", KINDS, ids=str)


def smooth(cell: Cell, dtype: torch.dtype) -> bool:
    """Whether gradients can be compared: that of relu jumps where rounding turns a sign."""
    return cell.nonlinearity != "relu" or dtype in DTYPES


@every_cell
@both
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_recurrence(dtype: torch.dtype, reverse: bool, cell: Cell) -> None:
    for T, B, I, H in SIZES:  # noqa: E741
        for given in (False, True):
            if not (cell.projected and H == 1):
                inputs = cell_inputs(cell, (T, B, I), B, H, dtype, state=given, bias=given)
                compare(cell.op, *cell_functions(cell, reverse=reverse), inputs, gradients=smooth(cell, dtype))


@every_kind
@both
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_packed(dtype: torch.dtype, reverse: bool, cell: Cell) -> None:
    for sizes in ([1], [3, 3, 2, 1], [9, 5, 5, 2, 1, 1]):
        inputs = cell_inputs(cell, (sum(sizes), 6), sizes[0], 17, dtype)
        compare(cell.op, *cell_functions(cell, batch_sizes=torch.tensor(sizes), reverse=reverse), inputs)


@every_cell
@both
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
def test_lengths(dtype: torch.dtype, state: bool, reverse: bool, cell: Cell) -> None:
    lengths.test_lengths(dtype, state, reverse, cell, "cpu")


@pytest.mark.parametrize("cell", ["tanh", "relu", "sigmoid", "gru", "lstm"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("rows", ["whole", "packed", "lengths"])
@pytest.mark.parametrize(("bias", "state"), [(True, True), (False, True), (True, False)])
def test_both_directions(cell: str, projected: bool, rows: str, bias: bool, state: bool) -> None:
    lengths.test_both_directions(cell, projected, rows, bias, state, "cpu")


@pytest.mark.parametrize("cell", stack.GATES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stack(bidirectional: bool, cell: str) -> None:
    for T, B, I, H, layers, state in ((4, 3, 5, 7, 3, True), (4, 3, 5, 7, 2, False), (0, 2, 3, 4, 2, True)):  # noqa: E741
        positional, options = stack.arguments(cell, T, B, I, H, layers, bidirectional=bidirectional, state=state)
        expected = reference.stack(*stack.in_doubles(positional), **options)
        for a, b in zip(stack.ops.stack(*positional, **options), expected, strict=True):
            assert_close(stack.OPS.get(cell, "rnn"), a, b)


@every_kind
def test_only_wanted_gradients(cell: Cell) -> None:
    inputs = cell_inputs(cell, (3, 2, 4), 2, 5, torch.float64)
    function, _ = cell_functions(cell)
    whole = torch.autograd.grad(function(**inputs)[0].sum(), list(inputs.values()))
    for (name, wanted), expected in zip(inputs.items(), whole, strict=True):
        alone = {n: t if n == name else t.detach() for n, t in inputs.items()}
        assert torch.equal(torch.autograd.grad(function(**alone)[0].sum(), wanted)[0], expected)


@every_kind
def test_tensors_as_they_lie(cell: Cell) -> None:
    """Not contiguous, aligned to one number only, states of one layer of torch.nn: the same numbers."""
    tight = cell_inputs(cell, (5, 4, 6), 4, 9, torch.float32)
    function, _ = cell_functions(cell)
    expected = function(**tight)

    def odd(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    for change in (cases.spread, odd):
        for a, b in zip(function(**{n: change(t.detach()) for n, t in tight.items()}), expected, strict=True):
            assert_close(cell.op, a, b)
    of_layer = tight | {n: tight[n].detach()[None] for n in ("h0", "c0") if n in tight}
    y, *last = function(**of_layer)
    assert torch.equal(y, expected[0])
    for a, b in zip(last, expected[1:], strict=True):
        assert torch.equal(a, b[None])


@pytest.mark.parametrize(("name", "gates", "blocks"), [("gru", 3, 4), ("lstm", 4, 5)])
def test_an_evaluation_keeps_nothing(name: str, gates: int, blocks: int, emulated: types.ModuleType) -> None:
    states = [None] * (2 if name == "lstm" else 1)
    others = [None] * (3 if name == "lstm" else 2)  # biases, and a projection
    weights = torch.randn(gates * 5, 4), torch.randn(gates * 5, 5)
    for keep in (False, True):
        op = getattr(emulated, f"_{name}_forward")
        kept = op(torch.randn(3, 2, 4), *states, *weights, *others, None, None, False, False, keep)[-1]
        assert kept.shape == (6 if keep else 0, blocks * 5)


def other_ops() -> list[tuple[str, tuple[object, ...]]]:
    return [*opcheck_arguments(), *additive.opcheck_arguments()]


@pytest.mark.parametrize("cell", [RNN, GRU, LSTM], ids=str)
def test_opcheck(cell: Cell, emulated: types.ModuleType) -> None:
    """Schema, autograd and fake kernel agree with what these ops do, those of both directions too."""
    name = "tanh" if cell is RNN else cell.op
    for given in (True, False):
        both = [cell_inputs(cell, (3, 2, 4), 2, 5, torch.float64, state=given, bias=given) for _ in range(2)]
        x, names = both[0]["x"], [n for n in ("w_ih", "w_hh", "b_ih", "b_hh") if n in both[0]]
        weights = [part[n] for part in both for n in names]
        states = [torch.stack([part[n].detach() for part in both]) for n in ("h0", "c0") if n in both[0]]
        h0, c0 = (*(t.requires_grad_() for t in states), None, None)[:2]
        arguments = (name, x, h0, c0, weights, given, None, torch.tensor([3, 3]), False, cell.op != "rnn")
        torch.library.opcheck(emulated._bidirectional_forward, arguments)
        y, h_n, c_n, kept = (t.detach() for t in emulated._bidirectional_forward(*arguments))
        plain = [None if t is None else t.detach() for t in (x, h0, c0)]
        grads = y, h_n, c_n if cell is LSTM else None
        for needs in ([True] * 4, [False] * 4):
            backward = (*grads, name, *plain, [w.detach() for w in weights], given, y, kept, *arguments[6:9], *needs)
            torch.library.opcheck(emulated._bidirectional_backward, backward)


@pytest.mark.parametrize(("op", "arguments"), other_ops(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck_of_others(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops, NAME), op).default, arguments)


# Of those that test_ops.py has for the CPU: nothing, one, odd, whole packs, and several chunks of time.
POOL_SIZES = [
    (0, 4, 5),
    (2, 0, 5),
    (3, 4, 0),
    (1, 1, 1),
    (3, 5, 7),
    (2, 9, 64),
    (4, 17, 136),
    (1, 130, 33),
    (1, 140, 40),
]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(("B", "T", "D"), POOL_SIZES)
def test_pool(B: int, T: int, D: int, dtype: torch.dtype, prefix: bool) -> None:
    pools.test_pool(B, T, D, dtype, prefix, "cpu")


@pytest.mark.parametrize("prefix", [False, True])
def test_pool_as_it_lies(prefix: bool) -> None:
    pools.test_pool_time_major(torch.float32, prefix, "cpu")
    pools.test_pool_time_major(torch.bfloat16, prefix, "cpu")
    pools.test_pool_of_what_is_not_contiguous(torch.float32, prefix)
    pools.test_padding_holds_anything(prefix, "cpu")


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("folded", [False, True])
def test_pool_is_no_less_exact_than_torch_in_16_bits(folded: bool, dtype: torch.dtype, prefix: bool) -> None:
    pools.test_pool_is_no_less_exact_than_torch_in_16_bits(20, 70, 24, folded, dtype, prefix)


def test_pool_of_nothing_and_of_any_scores() -> None:
    pools.test_nothing_takes_part("cpu")
    for rise in (50.0, 70.0, 500.0):
        pools.test_scores_of_any_size(rise, "cpu")


@pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES)
@pytest.mark.parametrize(("B", "Tq", "Tk", "A", "Dv"), additive.SIZES)
def test_additive_attention(B: int, Tq: int, Tk: int, A: int, Dv: int, dtype: torch.dtype) -> None:
    for kind in additive.SELECTIONS:
        additive.test_is_the_reference(B, Tq, Tk, A, Dv, dtype, kind, "cpu")


def test_additive_attention_of_odd_numbers() -> None:
    """Padding and NaN, queries and keys that cancel, in memory with holes, and only some gradients."""
    additive.test_not_contiguous("cpu")
    additive.test_only_wanted_gradients("cpu")
    additive.test_nothing_takes_part("cpu")
    for value in (float("nan"), float("inf"), -float("inf")):
        additive.test_nan_and_infinity_come_through(value, "cpu")
        additive.test_padding_holds_anything(abs(value), "cpu")
    for dtype in DTYPES:
        additive.test_queries_and_keys_nearly_cancel(dtype, 30.0, "cpu")


def test_refusals(emulated: types.ModuleType) -> None:
    inputs = cell_inputs(GRU, (3, 2, 4), 2, 5, torch.float32)
    function = cell_functions(GRU)[0]
    with pytest.raises(ValueError, match=r"gru: w_hh must be \[3 H, H\] = \[15, 5\]"):
        function(**(inputs | {"w_hh": torch.zeros(15, 4)}))
    with pytest.raises(TypeError, match="gru: x must be float32"):
        function(**(inputs | {"x": torch.zeros(3, 2, 4).half()}))
    with pytest.raises(ValueError, match="bidirectional: weights must be 4 tensors for each direction"):
        emulated.bidirectional("gru", inputs["x"], None, None, [inputs["w_ih"]] * 3)
    # Of the kernels' own: what checks.py has nothing against.
    with pytest.raises(ValueError, match="gru: batch_sizes must be positive and never rise"):
        cell_functions(GRU, batch_sizes=torch.tensor([1, 2]))[0](**(inputs | {"x": torch.zeros(3, 4)}))
    with pytest.raises(RuntimeError, match=r"T, B and H must be below 2\^31 on cuda, got 2147483648"):
        emulated.rnn(torch.zeros(1, 2**31, 0), None, torch.zeros(1, 0), torch.zeros(1, 1))


@every_kind
def test_compiles_whole(cell: Cell) -> None:
    """One node, lengths or not; the flag for TF32 is read while compiling."""
    for rows in (None, torch.tensor([4, 0, 2])):
        inputs = cell_inputs(cell, (4, 3, 2), 3, 5, torch.float32)
        function, _ = cell_functions(cell, lengths=rows)
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = [[*f(**inputs)] for f in (function, compiled)]
        results = [[*t, *torch.autograd.grad(t[0].square().sum(), list(inputs.values()))] for t in results]
        for a, b in zip(*results, strict=True):
            assert_close(f"{cell.op}_backward", a, b)
