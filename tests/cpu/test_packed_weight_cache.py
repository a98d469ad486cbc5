"""The packed weight cache: found by content, so never stale, however weights change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layers import LAYERS
from torch import Tensor

import llm_ext
from llm_ext import ops, reference

H = 20


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    llm_ext.clear_packed_weight_cache()
    yield
    llm_ext.clear_packed_weight_cache()


def evaluate(layer: Any, x: Tensor, calls: int = 3) -> Tensor:
    """The output of several calls: the second inserts the packed weights, the third finds them."""
    with torch.no_grad():
        outputs: list[Tensor] = [layer(x)[0] for _ in range(calls)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return outputs[0]


def assert_same_as_torch(layer: Any, x: Tensor) -> None:
    torch_layer = getattr(torch.nn, type(layer).__name__)(x.shape[-1], layer.hidden_size)
    torch_layer.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(evaluate(layer, x), torch_layer(x)[0], atol=1e-5, rtol=0)


def through_numpy(layer: Any) -> None:
    weight: np.ndarray[Any, Any] = layer.weight_hh_l0.detach().numpy()
    weight[3, 5] += 1


def through_data(layer: Any) -> None:
    layer.weight_ih_l0.data[0, 0] += 1


def swap_rows(layer: Any) -> None:
    """The sum of all weights stays the same."""
    weight = layer.weight_hh_l0.data
    weight.copy_(weight[torch.tensor([1, 0, *range(2, len(weight))])])


def load_state_dict(layer: Any) -> None:
    layer.load_state_dict({name: tensor + 0.1 for name, tensor in layer.state_dict().items()})


def optimizer_step(layer: Any) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(30, 2, 7))[0].sum().backward()
    optimizer.step()


def replace_parameter(layer: Any) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(0.2 * torch.randn_like(layer.weight_hh_l0))


def in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight_hh_l0.mul_(0.5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "change",
    [through_numpy, through_data, swap_rows, load_state_dict, optimizer_step, replace_parameter, in_inference_mode],
    ids=lambda function: function.__name__,
)
def test_changes_are_noticed(name: str, change: Callable[[Any], None]) -> None:
    layer, x = getattr(llm_ext, name)(7, H), torch.randn(30, 2, 7)
    before = evaluate(layer, x)
    assert llm_ext.packed_weight_cache_bytes() > 0
    change(layer)
    assert_same_as_torch(layer, x)
    assert not torch.equal(evaluate(layer, x), before)


@pytest.mark.parametrize("name", LAYERS)
def test_functional_calls(name: str) -> None:
    """Other tensors in place of the parameters, the old ones again, and memory that is reused."""
    layer, x = getattr(llm_ext, name)(7, H), torch.randn(30, 2, 7)
    own = evaluate(layer, x)
    for _ in range(4):
        others = {key: 0.2 * torch.randn_like(parameter) for key, parameter in layer.named_parameters()}
        torch_layer = getattr(torch.nn, name)(7, H)
        for _ in range(3):
            actual, expected = (torch.func.functional_call(m, others, (x,))[0] for m in (layer, torch_layer))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        del others
        assert torch.equal(evaluate(layer, x), own)


def test_every_part_of_every_weight() -> None:
    """A number at the edges of the 64 KiB that are hashed at a time, and in the last, incomplete line of a weight."""
    layer: Any = llm_ext.LSTM(301, 70, proj_size=51)
    x = torch.randn(20, 2, 301)
    before = evaluate(layer, x)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0, layer.weight_hr_l0):
        numbers = weight.data.view(-1)
        for index in {*range(0, len(numbers), 1 << 14), *range((1 << 14) - 1, len(numbers), 1 << 14), len(numbers) - 1}:
            numbers[index] += 1
            after = evaluate(layer, x)
            assert not torch.equal(after, before)
            before = after


@given(index=st.integers(0, 1 << 30), bit=st.integers(0, 31))
def test_one_bit(index: int, bit: int) -> None:
    """Any changed bit of W or U changes the result."""
    w_ih, w_hh = torch.rand(H, 7) + 1, torch.rand(H, H) + 1
    # Row by row the columns of W, then those of U; more rows than the unpacked path takes.
    x, h0 = torch.eye(70, 7)[None], torch.zeros(70, H)
    h0[7 : 7 + H] = torch.eye(H)
    for _ in range(3):
        ops.rnn(x, h0, w_ih, w_hh, nonlinearity="relu")
    assert llm_ext.packed_weight_cache_bytes() > 0
    changed = (w_ih, w_hh)[index % 2].view(torch.int32).view(-1)
    changed[index // 2 % len(changed)] ^= (1 << bit) if bit < 31 else -(1 << 31)
    y = ops.rnn(x, h0, w_ih, w_hh, nonlinearity="relu")[0][0]
    if w_ih.isfinite().all() and w_hh.isfinite().all():
        assert torch.equal(y[: 7 + H], torch.cat((w_ih, w_hh), 1).T.relu())
    else:  # infinity times 0 is NaN in every row
        assert not y.isfinite().all()


def test_key_is_more_than_the_bytes() -> None:
    """The same bytes are weights of another cell, of other sizes, and of another dtype."""
    x, w_ih, w_hh = torch.randn(40, 2, 12), torch.randn(12, 12), torch.randn(12, 12)
    u_hh, numbers = torch.randn(12, 4), torch.randn(96) / 4
    # Finite in both types of 16 bits.
    bits = (torch.randint(0x3000, 0x3C00, (2, 12, 12)) - 0x8000 * torch.randint(2, (2, 12, 12))).to(torch.int16)
    for _ in range(3):
        for dtype in (torch.float16, torch.bfloat16):
            a, b = bits.view(dtype)
            y, _ = ops.rnn(x.to(dtype), None, a, b)
            expected, _ = reference.rnn(x.to(dtype).double(), None, a.double(), b.double())
            torch.testing.assert_close(y.double(), expected, atol=0.2, rtol=0)
        for I, H, P in ((4, 6, 2), (6, 4, 3)):  # noqa: E741
            w, u, v = numbers.view(4 * H, I), numbers[: 4 * H * P].view(4 * H, P), numbers[: P * H].view(P, H)
            values = torch.randn(40, 2, I)
            y, _ = ops.lstm(values, None, w, u, w_hr=v)
            expected, _ = reference.lstm(values.double(), None, w.double(), u.double(), w_hr=v.double())
            torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=0)
        for name, gates in (("gru", 3), ("lstm", 4)):
            size = 12 // gates
            y, _ = getattr(ops, name)(x, None, w_ih, u_hh[:, :size].contiguous())
            expected, _ = getattr(reference, name)(x.double(), None, w_ih.double(), u_hh[:, :size].double())
            torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=0)
        for wide in (w_ih.view(6, 24), w_ih.view(24, 6)):
            size = len(wide)
            u = w_hh.view(-1)[: size * size].view(size, size) if size < 12 else torch.zeros(size, size)
            values = torch.randn(40, 1, wide.shape[1])
            y, _ = ops.rnn(values, None, wide, u)
            expected, _ = reference.rnn(values.double(), None, wide.double(), u.double())
            torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_training_inserts_nothing(name: str) -> None:
    layer = getattr(llm_ext, name)(7, H)
    for _ in range(4):
        optimizer_step(layer)
    assert llm_ext.packed_weight_cache_bytes() == 0


def test_limit_and_clear() -> None:
    x = torch.randn(40, 1, 8)
    weights = [torch.randn(1500, 8) for _ in range(2)]
    for i in range(40):
        w_hh = torch.full((1500, 1500), 1e-3 * i)
        for w_ih in weights:
            for _ in range(2):
                ops.rnn(x[:17], None, w_ih, w_hh)
    # The packed form of one is 9 MB.
    assert 200 << 20 < llm_ext.packed_weight_cache_bytes() <= 256 << 20
    llm_ext.clear_packed_weight_cache()
    assert llm_ext.packed_weight_cache_bytes() == 0


def test_limit_of_entries() -> None:
    """The cache has 64 entries and drops the least recently used one; weights of a single call take none."""

    def use(size: int, number: float, calls: int) -> int:
        weights = torch.full((size, 8), number), torch.full((size, size), number)
        for _ in range(calls):
            ops.rnn(x, None, *weights)
        return llm_ext.packed_weight_cache_bytes()

    x = torch.randn(40, 1, 8)
    large = use(100, 0.5, 2)
    small = use(20, 0.5, 2) - large
    for i in range(70):
        assert use(20, 1e-3 * i, 1) == large + small
    for i in range(70, 132):
        use(20, 1e-3 * i, 2)
    assert use(100, 0.5, 1) == large + 63 * small
    for i in range(132, 160):
        assert use(20, 1e-3 * i, 2) == large + 63 * small


def test_threads() -> None:
    """Several threads share layers, whose packed weights any of them inserts or evicts."""
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
