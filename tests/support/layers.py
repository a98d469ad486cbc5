"""Layers and cells of llm_ext beside those of torch.nn with the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import llm_ext
from llm_ext import reference
from support.comparison import assert_close, flatten
from support.inputs import noncontiguous

LAYERS = ("RNN", "GRU", "LSTM")
CELLS = ("RNNCell", "GRUCell", "LSTMCell")
# An option that only this class has.
OWN_OPTIONS: dict[str, dict[str, Any]] = {"RNN": {"nonlinearity": "sigmoid"}, "GRU": {}, "LSTM": {"proj_size": 2}}

State = Any  # a tensor, or of an LSTM a pair


def op_of(name: str) -> str:
    """The op of a layer or cell class."""
    return name.removesuffix("Cell").lower()


def layer_pair(name: str, options: dict[str, Any], device: str = "cpu") -> tuple[Any, Any]:
    """The llm_ext layer or cell, and that of torch.nn in float64 with the same weights.

    `options` are those of the constructors; "projected" chooses a proj_size for an LSTM, "nonlinearity" is for an RNN.
    """
    options = dict(options)
    if options.pop("projected", False) and name == "LSTM":
        options["proj_size"] = options["hidden_size"] // 2
    if not name.startswith("RNN"):
        options.pop("nonlinearity", None)
    with torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_layers.*")
        layer = getattr(llm_ext, name)(**options)
        torch_layer = getattr(nn, name)(**(options | {"dtype": torch.float64}))
    torch_layer.load_state_dict(layer.state_dict())
    return layer, torch_layer


def random_state(layer: Any, *sizes: int) -> State:
    """A random state [*sizes, H] of a layer or cell, for an LSTM a pair."""
    parameter = next(layer.parameters())
    features = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    h, c = (torch.randn(*sizes, size, dtype=parameter.dtype, device=parameter.device) for size in features)
    return (h, c) if isinstance(layer, (llm_ext.LSTM, llm_ext.LSTMCell)) else h


def rows_of(layer: Any) -> int:
    """Layers times directions."""
    return int(layer.num_layers) * (2 if layer.bidirectional else 1)


def noncontiguous_state(hx: State) -> State:
    return tuple(map(noncontiguous, hx)) if isinstance(hx, tuple) else None if hx is None else noncontiguous(hx)


def by_reference(name: str, x: Tensor, hx: State, weights: dict[str, Tensor], **options: Any) -> Any:
    """The reference of one direction of one layer, or of a cell, with the weights under their names there."""
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh", "weight_hr": "w_hr"}
    tensors = {names[key.removesuffix("_l0")]: tensor for key, tensor in weights.items()}
    return getattr(reference, op_of(name))(x, hx, **tensors, **options)


def run_layer(layer: Any, x: Any, hx: State, dtype: torch.dtype, **options: Any) -> tuple[Any, list[Tensor], Any]:
    """The output of a layer, its tensors, and the gradients of input, hx and parameters by name."""
    data = x.data if isinstance(x, PackedSequence) else x
    leaves = {"input": data.detach().to(dtype).requires_grad_()}
    for i, tensor in enumerate(flatten(hx)):
        leaves[f"hx[{i}]"] = tensor.detach().to(dtype).requires_grad_()
    given = x._replace(data=leaves["input"]) if isinstance(x, PackedSequence) else leaves["input"]
    first = [leaf for name, leaf in leaves.items() if name != "input"]
    states = [] if hx is None else [tuple(first) if isinstance(hx, tuple) else first[0]]
    output = layer(given, *states, **options)
    tensors = flatten((output[0].data, output[1]) if isinstance(x, PackedSequence) else output)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu") for t in tensors]
    seeds = [w.to(t.device, t.dtype) for w, t in zip(drawn, tensors, strict=True)]
    leaves |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(tensors, list(leaves.values()), seeds)
    return output, tensors, dict(zip(leaves, gradients, strict=True))


def compare_layers(name: str, layer: Any, torch_layer: Any, x: Any, hx: State) -> None:
    """Outputs, and gradients of input, hx and every parameter, agree; x may be a PackedSequence."""
    output, tensors, gradients = run_layer(layer, x, hx, next(layer.parameters()).dtype)
    torch_output, torch_tensors, torch_gradients = run_layer(torch_layer, x, hx, torch.float64)
    assert type(output) is type(torch_output)
    if isinstance(x, PackedSequence):
        assert type(output[0]) is type(torch_output[0])
        for field, torch_field in zip(output[0][1:], torch_output[0][1:], strict=True):
            assert (field is None) == (torch_field is None)
            assert field is None or torch.equal(field, torch_field)
    for i, (tensor, torch_tensor) in enumerate(zip(tensors, torch_tensors, strict=True)):
        assert_close(op_of(name), tensor, torch_tensor, f"output {i}")
    assert list(gradients) == list(torch_gradients)
    for parameter, gradient in gradients.items():
        assert_close(f"{op_of(name)}_backward", gradient, torch_gradients[parameter], f"gradient of {parameter}")
