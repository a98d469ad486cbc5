"""Weights that are remembered in packed form: never stale, whoever changes them in whatever way."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import llm_ext
from llm_ext import ops, reference

H = 20
KINDS = ["RNN", "GRU", "LSTM"]


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    llm_ext.forget_weights()
    yield
    llm_ext.forget_weights()


def evaluate(layer: torch.nn.Module, x: Tensor, calls: int = 3) -> Tensor:
    """The output of several calls: from the second on weights are remembered, from the third on they are used."""
    with torch.no_grad():
        outputs = [layer(x)[0] for _ in range(calls)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return outputs[0]


def same_as_torch(layer: torch.nn.Module, x: Tensor) -> None:
    truth = getattr(torch.nn, type(layer).__name__)(x.shape[-1], layer.hidden_size)  # type: ignore[attr-defined]
    truth.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(evaluate(layer, x), truth(x)[0], atol=1e-5, rtol=0)


def through_numpy(layer: torch.nn.Module) -> None:
    weight: np.ndarray = layer.weight_hh_l0.detach().numpy()  # type: ignore[type-arg, operator, union-attr]
    weight[3, 5] += 1


def through_data(layer: torch.nn.Module) -> None:
    layer.weight_ih_l0.data[0, 0] += 1  # type: ignore[operator, index, union-attr]


def through_data_pointer(layer: torch.nn.Module) -> None:
    """Two rows change places: the sum of all weights stays what it was."""
    weight = layer.weight_hh_l0.data  # type: ignore[union-attr]
    weight.copy_(weight[torch.tensor([1, 0, *range(2, len(weight))])])  # type: ignore[operator, arg-type, index]


def load(layer: torch.nn.Module) -> None:
    layer.load_state_dict({name: tensor + 0.1 for name, tensor in layer.state_dict().items()})


def optimize(layer: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(30, 2, 7))[0].sum().backward()
    optimizer.step()


def replace(layer: torch.nn.Module) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(0.2 * torch.randn_like(layer.weight_hh_l0))  # type: ignore[arg-type]


def in_inference_mode(layer: torch.nn.Module) -> None:
    with torch.inference_mode():
        layer.weight_hh_l0.mul_(0.5)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [through_numpy, through_data, through_data_pointer, load, optimize, replace, in_inference_mode],
    ids=lambda f: f.__name__,
)
def test_changes_are_noticed(kind: str, change: Callable[[torch.nn.Module], None]) -> None:
    layer, x = getattr(llm_ext, kind)(7, H), torch.randn(30, 2, 7)
    before = evaluate(layer, x)
    assert llm_ext.remembered_bytes() > 0
    change(layer)
    same_as_torch(layer, x)
    assert not torch.equal(evaluate(layer, x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls(kind: str) -> None:
    """Other tensors in the places of the parameters, the old ones back, and memory that is used again."""
    layer, x = getattr(llm_ext, kind)(7, H), torch.randn(30, 2, 7)
    own = evaluate(layer, x)
    for _ in range(4):
        others = {name: 0.2 * torch.randn_like(parameter) for name, parameter in layer.named_parameters()}
        truth = getattr(torch.nn, kind)(7, H)
        for _ in range(3):
            actual, expected = (torch.func.functional_call(m, others, (x,))[0] for m in (layer, truth))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        del others
        assert torch.equal(evaluate(layer, x), own)


@given(place=st.integers(0, 1 << 30), bit=st.integers(0, 31))
def test_one_bit(place: int, bit: int) -> None:
    """Whichever bit of W or U changes, it is in the result."""
    w_ih, w_hh = torch.rand(H, 7) + 1, torch.rand(H, H) + 1
    # Row by row the columns of W, then those of U, each by itself; more rows than go without packing.
    x, h0 = torch.eye(70, 7)[None], torch.zeros(70, H)
    h0[7 : 7 + H] = torch.eye(H)
    for _ in range(3):
        ops.rnn(x, h0, w_ih, w_hh, nonlinearity="relu")
    assert llm_ext.remembered_bytes() > 0
    changed = (w_ih, w_hh)[place % 2].view(torch.int32).view(-1)
    changed[place // 2 % len(changed)] ^= (1 << bit) if bit < 31 else -(1 << 31)
    y = ops.rnn(x, h0, w_ih, w_hh, nonlinearity="relu")[0][0]
    if w_ih.isfinite().all() and w_hh.isfinite().all():
        assert torch.equal(y[: 7 + H], torch.cat((w_ih, w_hh), 1).T.relu())
    else:  # spreads to whatever it is multiplied with
        assert not y.isfinite().all()


def test_what_else_the_form_depends_on() -> None:
    """The same bytes as weights of another cell, of other sizes and of another dtype."""
    x, w_ih, w_hh = torch.randn(40, 2, 12), torch.randn(12, 12), torch.randn(12, 12)
    u_hh = torch.randn(12, 4)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = (w.view(dtype)[:, :12].contiguous().nan_to_num(0, 0, 0).clamp(-1, 1) for w in (w_ih, w_hh))
            y, _ = ops.rnn(x.to(dtype), None, a, b)
            truth, _ = reference.rnn(x.double(), None, a.double(), b.double())
            torch.testing.assert_close(y.double(), truth, atol=0.2 if dtype is not torch.float32 else 1e-5, rtol=0)
        for name in ("gru", "lstm"):
            size = 12 // {"gru": 3, "lstm": 4}[name]
            y, _ = getattr(ops, name)(x, None, w_ih, u_hh[:, :size].contiguous())
            truth, _ = getattr(reference, name)(x.double(), None, w_ih.double(), u_hh[:, :size].double())
            torch.testing.assert_close(y, truth.float(), atol=1e-5, rtol=0)
        for wide in (w_ih.view(6, 24), w_ih.view(24, 6)):
            size = len(wide)
            u = w_hh.view(-1)[: size * size].view(size, size) if size < 12 else torch.zeros(size, size)
            values = torch.randn(40, 1, wide.shape[1])
            y, _ = ops.rnn(values, None, wide, u)
            truth, _ = reference.rnn(values.double(), None, wide.double(), u.double())
            torch.testing.assert_close(y, truth.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_remembers_nothing(kind: str) -> None:
    layer = getattr(llm_ext, kind)(7, H)
    for _ in range(4):
        optimize(layer)
    assert llm_ext.remembered_bytes() == 0


def test_memory_is_bounded_and_can_be_freed() -> None:
    x = torch.randn(40, 1, 8)
    weights = [torch.randn(1500, 8) for _ in range(2)]
    for i in range(40):
        w_hh = torch.full((1500, 1500), 1e-3 * i)
        for w_ih in weights:
            for _ in range(2):
                ops.rnn(x[:17], None, w_ih, w_hh)
    # The packed form of one is 9 MB.
    assert 200 << 20 < llm_ext.remembered_bytes() <= 256 << 20
    llm_ext.forget_weights()
    assert llm_ext.remembered_bytes() == 0


def test_threads() -> None:
    """Several threads share layers, each call with weights that some other may have remembered or pushed out."""
    layers = [llm_ext.GRU(7, H) for _ in range(6)]
    x = torch.randn(30, 2, 7)
    with torch.no_grad():
        expected = [layer(x)[0] for layer in layers]
    wrong: list[int] = []

    def run(first: int) -> None:
        for i in range(first, first + 300):
            with torch.no_grad():
                if not torch.equal(layers[i % 6](x)[0], expected[i % 6]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
