"""Modules that are not converted, and what is said about them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close
from torch import Tensor, nn

import llm_ext

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:.*quantization.*:DeprecationWarning")


class OwnForward(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, input, hx)


class OwnPermutation(nn.GRU):
    def permute_hidden(self, hx: Tensor, permutation: Tensor | None) -> Tensor:
        return hx


class Closed(nn.RNNCell):
    def __init_subclass__(cls) -> None:
        raise TypeError("it is closed")


class OwnRecurrence(nn.RNNBase):
    def forward(self, input: Tensor) -> Tensor:
        return input


def replaced_forward() -> nn.Module:
    layer: Any = nn.GRU(3, 5)
    layer.forward = layer.forward  # as libraries do that move weights before a call
    return layer  # type: ignore[no-any-return]


class Stateful(nn.LSTM):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self._state = None


class OwnWeights(nn.GRU):
    def _weights(self) -> list[torch.Tensor]:
        return [tensor for tensor in self.parameters() if tensor.dim() == 2]


def prepared() -> nn.Module:
    layer = nn.LSTM(3, 5)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


def traced() -> nn.Module:
    trace: Any = torch.jit.trace
    return trace(nn.GRUCell(3, 5), (torch.randn(2, 3),))  # type: ignore[no-any-return]


def quantized() -> nn.Module:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    return quantize(nn.Sequential(nn.LSTM(3, 5)), {nn.LSTM})[0]  # type: ignore[no-any-return]


LEFT: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: torch.jit.script(nn.LSTM(3, 5)), "it is compiled by torch.jit"),
    (traced, "it is compiled by torch.jit"),
    (quantized, "it is quantized"),
    (prepared, "it is prepared for quantization"),
    (lambda: nn.LazyLinear(5), "its parameters are not initialized; call it once before"),
    (replaced_forward, "its forward has been replaced"),
    (lambda: OwnForward(3, 5), "forward of OwnForward does not call super().forward"),
    (lambda: OwnPermutation(3, 5), "OwnPermutation overrides permute_hidden, which forward of torch.nn.GRU calls"),
    (lambda: Stateful(3, 5), "its attribute _state hides that of llm_ext.LSTM"),
    (lambda: OwnWeights(3, 5), "_weights of OwnWeights hides that of llm_ext.GRU"),
    (lambda: Closed(3, 5), "no class can derive from it and from llm_ext: it is closed"),
    (lambda: OwnRecurrence("GRU", 3, 5), "it derives from none of the layers and cells of torch.nn"),
]


@pytest.mark.parametrize(("build", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_reasons(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    model = nn.ModuleDict({"first": nn.GRU(3, 5), "last": module})
    original = type(module)
    assert llm_ext.convertible(model, linear=True) == [("first", nn.GRU, None), ("last", original, reason)]
    words = f"convert: these modules are left as they are: last ({original.__name__}): {reason}"
    with pytest.warns(UserWarning, match=re.escape(words)):
        assert llm_ext.convert(model, linear=True) is model
    assert type(module) is original
    assert type(model["first"]) is llm_ext.GRU


@pytest.mark.parametrize("model", [nn.Linear(3, 5), nn.Sequential(nn.Conv1d(3, 5, 2), nn.ReLU())])
def test_a_model_without_recurrent_layers(model: nn.Module) -> None:
    types = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match=f"convert: {type(model).__name__} has no recurrent layer; nothing is changed"):
        assert llm_ext.convert(model) is model
    assert [type(module) for module in model.modules()] == types
    assert llm_ext.convertible(model) == []


@pytest.mark.parametrize("function", [llm_ext.convert, llm_ext.convertible, llm_ext.revert, llm_ext.to_torch])
def test_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__}: model must be a torch.nn.Module, got type$"):
        function(nn.LSTM)


class Own(llm_ext.LSTM):
    pass


@pytest.mark.parametrize("function", [llm_ext.revert, llm_ext.to_torch])
def test_what_torch_nn_lacks(function: Any) -> None:
    """Nothing is changed if one of the layers cannot be."""
    for layer, words in (
        (llm_ext.RNN(3, 5, nonlinearity="sigmoid"), "1 has nonlinearity='sigmoid', which torch.nn.RNN does not have"),
        (llm_ext.RNNCell(3, 5, nonlinearity="sigmoid"), "1 has nonlinearity='sigmoid', which torch.nn.RNNCell does"),
        (Own(3, 5), "1 is a Own, a subclass of a layer of llm_ext, and not of torch.nn"),
    ):
        model = nn.Sequential(llm_ext.GRU(3, 3), layer)
        with pytest.raises(ValueError, match=f"^{function.__name__}: {words}"):
            function(model)
        assert type(model[0]) is llm_ext.GRU
    with pytest.raises(ValueError, match="revert: the model has nonlinearity"):
        llm_ext.revert(llm_ext.RNN(3, 5, nonlinearity="sigmoid"))


def test_models_of_llm_ext_keep_their_layers() -> None:
    model = nn.ModuleDict({"lm": llm_ext.LLM(7, 4, 5, 3, 1, 0.0), "rnn": llm_ext.GRU(3, 5)})
    types = [type(module) for module in model["lm"].modules()]
    llm_ext.revert(model)
    assert [type(module) for module in model["lm"].modules()] == types
    assert type(model["rnn"]) is nn.GRU


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_models() -> None:
    """DistributedDataParallel is converted inside; a sharded layer is left, with a word about the order."""
    x, model = torch.randn(4, 2, 3), nn.GRU(3, 5)
    parallel = nn.parallel.DistributedDataParallel(model)
    expected = parallel(x)
    gradients = torch.autograd.grad(expected[0].sum(), list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llm_ext.convert(parallel) is parallel
    assert isinstance(model, llm_ext.GRU)
    actual = parallel(x)
    torch.autograd.backward(actual[0].sum())
    assert_all_close("gru", actual, expected)
    assert_all_close("gru_backward", [parameter.grad for parameter in model.parameters()], gradients)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    sharded: Any = fully_shard(nn.GRU(3, 5), mesh=mesh)
    (entry,) = llm_ext.convertible(sharded)
    assert entry.reason == "its parameters are of DTensor; convert before sharding or quantizing"
    first: Any = fully_shard(llm_ext.convert(nn.GRU(3, 5)), mesh=mesh)
    assert isinstance(first, llm_ext.GRU)
    assert first(x)[0].shape == (4, 2, 5)
