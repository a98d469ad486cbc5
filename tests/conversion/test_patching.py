"""Layers that code of others builds inside `patched`."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import GRUCell as ImportedBefore

import llm_ext
from llm_ext.conversion import strict

CLASSES = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.Linear)


def methods() -> list[dict[str, Any]]:
    """The methods that each class of torch.nn has of its own."""
    return [{name: value for name, value in vars(cls).items() if inspect.isfunction(value)} for cls in CLASSES]


BEFORE = methods()  # when the tests are collected, before any of them runs


class Labelled(nn.LSTM):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.label = super().extra_repr()


class Permuting(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


@pytest.fixture(autouse=True)
def _everything_is_put_back() -> Any:
    yield
    assert methods() == BEFORE
    assert type(nn.LSTM(3, 5)) is nn.LSTM


@pytest.mark.parametrize("strict_types", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_layers_inside_are_converted(linear: bool, strict_types: bool) -> None:
    for cls in (*CLASSES, ImportedBefore):
        torch.manual_seed(5)
        outside = cls(3, 5)
        torch.manual_seed(5)
        with llm_ext.patched(linear=linear, strict_types=strict_types):
            inside = cls(3, 5)
        converts = linear or cls is not nn.Linear
        assert isinstance(inside, getattr(llm_ext, cls.__name__)) is converts
        if strict_types:
            assert isinstance(inside, cls)
        for a, b in zip(outside.parameters(), inside.parameters(), strict=True):
            assert torch.equal(a, b)
        assert type(copy.deepcopy(inside)) is type(inside)


def test_subclasses() -> None:
    with llm_ext.patched():
        labelled, permuting = Labelled(3, 5, 2), Permuting(3, 5)
        own = llm_ext.LSTM(3, 5), llm_ext.GRUCell(3, 5), llm_ext.Linear(3, 5)
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            nn.LSTM(3, 0)
        copied = copy.deepcopy(own)
    assert isinstance(labelled, llm_ext.LSTM)
    assert isinstance(labelled, Labelled)
    assert labelled.label == "3, 5, num_layers=2"
    assert type(permuting) is Permuting
    assert [type(each) for each in own] == [type(each) for each in copied]
    assert type(own[0]) is llm_ext.LSTM


def test_nested_contexts_and_exceptions() -> None:
    built: list[nn.Module] = []

    @llm_ext.patched()
    def build_strictly() -> None:
        built.append(nn.GRU(3, 5))
        raise ZeroDivisionError

    @llm_ext.patched(strict_types=False)
    def build() -> None:
        built.append(nn.GRU(3, 5))
        with pytest.raises(ZeroDivisionError):
            build_strictly()
        built.append(nn.GRU(3, 5))
        raise KeyError

    with pytest.raises(KeyError):
        build()
    assert [isinstance(layer, llm_ext.GRU) for layer in built] == [True] * 3
    assert [isinstance(layer, nn.GRU) for layer in built] == [False, True, False]


def test_other_threads_are_not_affected() -> None:
    """Two threads whose contexts overlap, and one without a context."""
    found: dict[str, list[type]] = {"first": [], "second": [], "none": []}
    barrier = threading.Barrier(3, timeout=20)

    def build(name: str) -> None:
        found[name].append(type(nn.LSTM(3, 5)))
        barrier.wait()

    def first() -> None:
        with llm_ext.patched():
            build("first")
            build("first")
        build("first")
        build("first")

    def second() -> None:
        build("second")
        with llm_ext.patched():
            build("second")
            build("second")
        build("second")

    def none() -> None:
        for _ in range(4):
            build("none")

    threads = [threading.Thread(target=target) for target in (first, second, none)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours, theirs = strict.LSTM, nn.LSTM
    assert found == {
        "first": [ours, ours, theirs, theirs],
        "second": [theirs, ours, ours, theirs],
        "none": [theirs] * 4,
    }


def test_patches_of_others_survive() -> None:
    """A method that others replace inside stays theirs."""
    original = nn.GRU.__init__
    with llm_ext.patched():
        wrapped = nn.GRU.__init__

        def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
            wrapped(self, *args, **kwargs)

        nn.GRU.__init__ = theirs  # type: ignore[method-assign]
    try:
        assert nn.GRU.__init__ is theirs
        assert type(nn.GRU(3, 5)) is nn.GRU
    finally:
        nn.GRU.__init__ = original  # type: ignore[method-assign]
