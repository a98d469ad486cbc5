"""Several layers in one call: `ops.stack` against the reference, and against one op for each layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import HALF_DTYPES, TOLERANCE, assert_close, at_lower_levels, run_tests_at
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext
from llm_ext import ops, reference

DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)
GATES = {"tanh": 1, "relu": 1, "sigmoid": 1, "gru": 3, "lstm": 4}
OPS = {"gru": "gru", "lstm": "lstm"}


def arguments(
    cell: str,
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    layers: int,
    *,
    bidirectional: bool = False,
    bias: bool = True,
    state: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[object, ...], dict[str, bool]]:
    generator = torch.Generator().manual_seed(T + 10 * H + layers)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, dtype=torch.float64) * scale).to(dtype)

    directions, G = 1 + bidirectional, GATES[cell]
    weights = []
    for row in range(layers * directions):
        features = I if row < directions else directions * H
        weights += [draw(G * H, features, scale=features**-0.5), draw(G * H, H, scale=H**-0.5)]
        if bias:
            weights += [draw(G * H), draw(G * H)]
    h0 = draw(layers * directions, B, H) if state else None
    c0 = draw(layers * directions, B, H) if state and cell == "lstm" else None
    return (cell, draw(T, B, I), h0, c0, weights), {"bias": bias, "bidirectional": bidirectional}


def in_doubles(positional: tuple[object, ...]) -> list[object]:
    def double(value: object) -> object:
        if isinstance(value, list):
            return [double(v) for v in value]
        return value.double() if isinstance(value, Tensor) else value

    return [double(value) for value in positional]


# Steps too small to be shared (a thread each: whole pieces of a wavefront, and a rest), larger steps, nothing.
SIZES = [
    (100, 1, 5, 33, 2),
    (64, 2, 17, 20, 3),
    (130, 1, 3, 64, 5),
    (33, 3, 4, 7, 2),
    (20, 40, 9, 33, 2),
    (9, 2, 5, 300, 2),
    (1, 1, 8, 16, 2),
    (0, 2, 3, 4, 2),
    (5, 0, 3, 4, 2),
]


@pytest.mark.parametrize(("T", "B", "I", "H", "layers"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
def test_stack(T: int, B: int, I: int, H: int, layers: int, dtype: torch.dtype, cell: str) -> None:  # noqa: E741
    for bidirectional, bias, state in itertools.product((False, True), (False, True), (False, True)):
        positional, options = arguments(
            cell, T, B, I, H, layers, bidirectional=bidirectional, bias=bias, state=state, dtype=dtype
        )
        actual = ops.stack(*positional, **options)
        if dtype in HALF_DTYPES:
            # Between layers numbers are rounded, and relu passes on what that did: the same layers, one by one.
            expected = one_by_one(*positional, **options)
        else:
            expected = reference.stack(*in_doubles(positional), **options)
        for name, a, b in zip(("y", "h_n", "c_n"), actual, expected, strict=True):
            assert_close(OPS.get(cell, "rnn"), a, b, name)


def one_by_one(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by one op for each layer and direction."""
    each, h_n, c_n = 2 + 2 * bias, [], []
    while len(h_n) * each < len(weights):
        outputs = []
        for reverse in (False, True)[: 1 + bidirectional]:
            row = len(h_n)
            of_row = weights[row * each : (row + 1) * each]
            h = None if h0 is None else h0[row]
            if cell == "lstm":
                y, (h, c) = ops.lstm(x, None if h is None else (h, c0[row]), *of_row, reverse=reverse)
                c_n.append(c)
            elif cell == "gru":
                y, h = ops.gru(x, h, *of_row, reverse=reverse)
            else:
                y, h = ops.rnn(x, h, *of_row, nonlinearity=cell, reverse=reverse)
            outputs.append(y)
            h_n.append(h)
        x = torch.cat(outputs, -1)
    states = torch.stack(h_n)
    return x, states, torch.stack(c_n) if c_n else states[:0]


def as_tables(positional: tuple[object, ...], options: dict[str, bool], V: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids for x, what they stand for, and what the first layer makes of all of that."""
    _, x, _, _, weights = positional
    assert isinstance(x, Tensor)
    rows, ids = torch.randn(V, x.shape[2]).to(x.dtype), torch.randint(V, x.shape[:2])
    each = 2 + 2 * options["bias"]
    first = [weights[d * each : (d + 1) * each] for d in range(1 + options["bidirectional"])]
    return ids, rows[ids], [F.linear(rows, w[0], w[2] if options["bias"] else None) for w in first]


@pytest.mark.parametrize(("T", "B", "I", "H", "layers"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
def test_tables(T: int, B: int, I: int, H: int, layers: int, dtype: torch.dtype, cell: str) -> None:  # noqa: E741
    for bidirectional, bias in itertools.product((False, True), repeat=2):
        positional, options = arguments(cell, T, B, I, H, layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
        ids, x, tables = as_tables(positional, options, 9)
        if dtype in HALF_DTYPES:  # tables are rounded, and between layers numbers are: one layer, by these tables
            if cell == "relu":  # whose state grows, and its error with it
                ids = ids[:8]
            rows = 1 + bidirectional
            h0, c0 = (None if state is None else state[:rows] for state in positional[2:4])
            positional = (cell, x, h0, c0, positional[4][: rows * (2 + 2 * bias)])
            exact = in_doubles((*positional, tables))
            expected = ops.stack(cell, ids, *exact[2:5], **options, tables=exact[5])
        else:
            expected = ops.stack(cell, x, *positional[2:], **options)
        actual = ops.stack(cell, ids, *positional[2:], **options, tables=tables)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            assert_close(OPS.get(cell, "rnn"), a, b.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("lengths", [[9, 9, 4, 1], [1], [130, 70], [40] * 20 + [39] * 15 + [3]])
def test_packed_rows(lengths: list[int], cell: str, dtype: torch.dtype) -> None:
    """And with tables: as one op for each direction, layer by layer."""
    T, B = lengths[0], len(lengths)
    for bidirectional, bias, state in itertools.product((False, True), repeat=3):
        positional, options = arguments(
            cell, T, B, 5, 33, 2, bidirectional=bidirectional, bias=bias, state=state, dtype=dtype
        )
        how = ops.packing(torch.tensor(lengths), T)
        ids, x, tables = as_tables(positional, options, 9)
        zeros = torch.zeros(2 + 2 * bidirectional, B, 33, dtype=dtype)
        _, _, h0, c0, weights = positional
        actual = ops.stack(cell, x[how.steps, how.rows_of], *positional[2:], **options, batch_sizes=how.batch_sizes)
        data, h_n, c_n = x[how.steps, how.rows_of], [], []
        each = 2 + 2 * bias
        while len(h_n) * each < len(weights):
            outputs = []
            for reverse in (False, True)[: 1 + bidirectional]:
                row = len(h_n)
                of_row = weights[row * each : (row + 1) * each]
                h = (zeros if h0 is None else h0)[row]
                sizes = {"batch_sizes": how.batch_sizes, "reverse": reverse}
                if cell == "lstm":
                    y, (h, c) = ops.lstm(data, (h, (zeros if c0 is None else c0)[row]), *of_row, **sizes)
                    c_n.append(c)
                elif cell == "gru":
                    y, h = ops.gru(data, h, *of_row, **sizes)
                else:
                    y, h = ops.rnn(data, h, *of_row, nonlinearity=cell, **sizes)
                outputs.append(y)
                h_n.append(h)
            data = torch.cat(outputs, -1)
        states = torch.stack(h_n)
        for a, b in zip(actual, (data, states, torch.stack(c_n) if c_n else states[:0]), strict=True):
            assert_close(OPS.get(cell, "rnn"), a, b.double())
        if dtype in HALF_DTYPES:
            continue
        looked_up = ops.stack(
            cell, ids[how.steps, how.rows_of], *positional[2:], **options, tables=tables, batch_sizes=how.batch_sizes
        )
        for a, b in zip(looked_up, actual, strict=True):
            assert_close(OPS.get(cell, "rnn"), a, b.double())


def test_packed_rows_of_no_steps() -> None:
    _, _, h0, _, weights = arguments("gru", 1, 3, 5, 4, 1)[0]
    none = torch.zeros(0, dtype=torch.int64)
    y, h_n, _ = ops.stack("gru", torch.zeros(0, 5), h0, None, weights, batch_sizes=none)
    assert y.shape == (0, 4)
    assert torch.equal(h_n, h0)
    with pytest.raises(ValueError, match="h0 must be given with batch_sizes of no steps, got None"):
        ops.stack("gru", torch.zeros(0, 5), None, None, weights, batch_sizes=none)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_any_number_of_threads(threads: int, bidirectional: bool) -> None:
    before = torch.get_num_threads()
    try:
        for cell, layers in (("tanh", 1), ("gru", 2), ("lstm", 7)):
            positional, options = arguments(cell, 90, 1, 6, 40, layers, bidirectional=bidirectional)
            torch.set_num_threads(threads)
            results = [ops.stack(*positional, **options) for _ in range(3)]
            for again in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
            expected = reference.stack(*in_doubles(positional), **options)
            for a, b in zip(results[0], expected, strict=True):
                assert_close(OPS.get(cell, "rnn"), a, b)
    finally:
        torch.set_num_threads(before)


def test_weights_that_change_are_noticed() -> None:
    positional, options = arguments("gru", 90, 1, 6, 40, 2)
    for _ in range(3):  # from the second call on, weights are remembered
        ops.stack(*positional, **options)
    positional[4][5][3, 4] += 1  # w_hh of the second layer
    expected = reference.stack(*in_doubles(positional), **options)
    for a, b in zip(ops.stack(*positional, **options), expected, strict=True):
        assert_close("gru", a, b)


@pytest.mark.parametrize("cell", GATES)
def test_opcheck(cell: str) -> None:
    positional, options = arguments(cell, 70, 1, 3, 5, 2, bidirectional=cell == "gru")
    op = torch.ops.llm_ext.stack_forward.default
    torch.library.opcheck(op, (*positional, *options.values(), [], None, False))
    ids, x, tables = as_tables(positional, options, 9)
    torch.library.opcheck(op, (cell, ids, *positional[2:], *options.values(), tables, None, False))
    sizes = torch.ones(70, dtype=torch.int64)
    torch.library.opcheck(op, (cell, x.flatten(0, 1), *positional[2:], *options.values(), [], sizes, False))


def test_no_derivative() -> None:
    positional, options = arguments("tanh", 3, 1, 2, 4, 2)
    positional[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative; it is for inference"):
        ops.stack(*positional, **options)[0].sum().backward()


IDS = torch.full((3, 2), 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cell": "elman"}, ValueError, "cell must be one of"),
        ({"x": torch.zeros(3, 2)}, ValueError, r"x must be \[T, B, I\]"),
        ({"x": torch.zeros(3, 2, 5)}, ValueError, r"weights\[0\] must be \[3 H, I\] = \[\*, 5\], got \[12, 3\]"),
        ({"x": torch.zeros(3, 2, 3, dtype=torch.float64)}, TypeError, r"weights\[0\] must be float64, got float32"),
        ({"x": torch.zeros(3, 2, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"h0": torch.zeros(1, 2, 4)}, ValueError, r"h0 must be \[L, B, H\] = \[2, 2, 4\], got \[1, 2, 4\]"),
        ({"c0": torch.zeros(2, 2, 4)}, ValueError, "c0 belongs to an LSTM"),
        ({"weights": []}, ValueError, "weights must be 4 tensors for each layer, got 0"),
        ({"bidirectional": True, "weights": 1}, ValueError, "for each layer and direction, got 4 tensors"),
        ({"bias": False}, ValueError, r"weights\[2\] must be \[3 H, I\]"),
        ({"weights": 2}, ValueError, r"weights\[5\] must be \[3 H, H\] = \[12, 4\], got \[12, 3\]"),
        ({"batch_sizes": torch.tensor([2, 2, 2])}, ValueError, r"x must be \[N, I\] = \[\*, \*\], got \[3, 2, 3\]"),
        (
            {"batch_sizes": torch.tensor([2, 3, 1]), "x": torch.zeros(6, 3)},
            ValueError,
            r"batch_sizes must be positive and never rise, got \[2, 3, 1\]",
        ),
        (
            {"batch_sizes": torch.tensor([2, 2]), "x": torch.zeros(6, 3)},
            ValueError,
            "batch_sizes must sum to the rows of x, 6, got 4",
        ),
        ({"tables": [torch.zeros(7, 12)]}, ValueError, r"x must be \[T, B\] = \[\*, \*\], got \[3, 2, 3\]"),
        ({"tables": [torch.zeros(7, 12)], "x": IDS * 1.0}, TypeError, "x must be int64, got float32"),
        ({"tables": [torch.zeros(7, 12)] * 2, "x": IDS}, ValueError, "tables must be 1, one for each direction, got 2"),
        ({"tables": [torch.zeros(7, 11)], "x": IDS}, ValueError, r"tables\[0\] must be \[V, 3 H\] = \[\*, 12\]"),
        ({"tables": [torch.zeros(7, 12).double()], "x": IDS}, TypeError, r"weights\[1\] must be float64"),
        ({"tables": [torch.zeros(2, 12)], "x": IDS}, IndexError, "ids must be from 0 to V - 1 = 1, got 2 to 2"),
    ],
)
def test_bad_arguments(changes: dict[str, object], error: type[Exception], message: str) -> None:
    positional, options = arguments("gru", 3, 2, 3, 4, 2)
    whole = dict(zip(("cell", "x", "h0", "c0", "weights"), positional, strict=True)) | options
    if changes.get("weights") == 1:
        changes = changes | {"weights": whole["weights"][:4]}
    if changes.get("weights") == 2:
        weights = list(whole["weights"])
        weights[5] = weights[5][:, :3]
        changes = changes | {"weights": weights}
    with pytest.raises(error, match=message):
        ops.stack(**whole | changes)


LAYERS = [llm_ext.RNN, llm_ext.GRU, llm_ext.LSTM]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_use_it_for_inference(layer: type, bidirectional: bool) -> None:
    """A recorded call goes layer by layer, another all at once: the same numbers."""
    module = layer(5, 33, 3, bidirectional=bidirectional, batch_first=True).double()
    x = torch.randn(2, 70, 5, dtype=torch.float64)
    recorded = module(x)
    with torch.no_grad():
        at_once = module(x)
    flat = [[r[0], *(r[1] if isinstance(r[1], tuple) else r[1:])] for r in (recorded, at_once)]
    assert flat[0][0].requires_grad
    assert not flat[1][0].requires_grad
    for a, b in zip(*flat, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE["rnn", torch.float64]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_use_it_for_packed_rows(layer: type, bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    stack = ops.stack
    monkeypatch.setattr(ops, "stack", lambda *a, **k: calls.append(k["batch_sizes"]) or stack(*a, **k))
    module = layer(5, 33, 2, bidirectional=bidirectional).double()
    x, lengths = torch.randn(7, 4, 5, dtype=torch.float64), torch.tensor([3, 7, 1, 4])
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for call in (lambda: module(x, lengths=lengths), lambda: module(rows)):
        calls.clear()
        recorded = call()
        assert calls == []
        with torch.no_grad():
            at_once = call()
        assert [sizes.tolist() for sizes in calls] == [[4, 3, 3, 2, 1, 1, 1]]
        flat = [[getattr(y, "data", y), *(h if isinstance(h, tuple) else (h,))] for y, h in (recorded, at_once)]
        for a, b in zip(*flat, strict=True):
            assert (a - b).abs().max() <= TOLERANCE["rnn", torch.float64]


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_between_layers_stays(layer: type) -> None:
    module = layer(5, 33, 2, dropout=0.5)
    x = torch.randn(70, 1, 5)
    with torch.no_grad():
        assert not torch.equal(module(x)[0], module(x)[0])
        assert torch.equal(module.eval()(x)[0], module(x)[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_and_compile(layer: type) -> None:
    module = layer(5, 16, 2).eval()
    x = torch.randn(7, 2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x)[0], module(x)[0])


@at_lower_levels
def test_lower_levels(level: str) -> None:
    """What only this file has of the kernels, tables and rows that join without a state."""
    run_tests_at(level, __file__, "tables or packed_rows")
