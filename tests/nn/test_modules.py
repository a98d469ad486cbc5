"""Layers and cells as modules: constructors, names, copies, replaced parameters, autocast, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy
import pytest
import torch
from support.comparison import assert_all_close, assert_close, assert_same_bits, flatten
from support.devices import every_device
from support.layers import by_reference, compare_layers, layer_pair, op_of, random_state
from support.tolerances import HALF_DTYPES
from torch import Tensor
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext

# All positional arguments after the sizes, none of them a default.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "RNN": (2, "relu", False, True, 0.25, True),
    "GRU": (2, False, True, 0.25, True),
    "LSTM": (2, False, True, 0.25, True, 3),
    "RNNCell": (False, "relu"),
    "GRUCell": (False,),
    "LSTMCell": (False,),
}
POSITIONAL = [(name, (3, 5, *given[:n])) for name, given in ARGUMENTS.items() for n in range(len(given) + 1)]
ATTRIBUTES = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout")
every_module = pytest.mark.parametrize("name", ARGUMENTS)


def is_cell(name: str) -> bool:
    return name.endswith("Cell")


@pytest.mark.parametrize(("name", "arguments"), POSITIONAL)
def test_constructor(name: str, arguments: tuple[Any, ...]) -> None:
    """Attributes, repr, names, order and initial values of the weights are those of torch.nn for the same seed."""
    layers = []
    for module in (llm_ext, torch.nn):
        torch.manual_seed(7)
        layers.append(getattr(module, name)(*arguments, dtype=torch.float64))
    layer, torch_layer = layers
    for attribute in (*ATTRIBUTES, "bidirectional", "proj_size", "training"):
        if hasattr(torch_layer, attribute):
            assert getattr(layer, attribute) == getattr(torch_layer, attribute)
    assert repr(layer) == repr(torch_layer)
    assert layer.extra_repr() == torch_layer.extra_repr()
    assert list(layer._parameters) == list(torch_layer._parameters)
    if not is_cell(name):
        assert layer.mode == torch_layer.mode
        assert_same_bits(layer.all_weights, torch_layer.all_weights)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in torch_layer.named_parameters()]
    assert_same_bits(list(layer.parameters()), list(torch_layer.parameters()))
    for each in layers:
        torch.manual_seed(8)
        each.reset_parameters()
    assert_same_bits(list(layer.parameters()), list(torch_layer.parameters()))


@every_module
def test_numbers_of_other_types(name: str) -> None:
    """Integers of numpy, and 0 and 1 as flags, are stored as plain values."""
    sizes: dict[str, Any] = {"input_size": numpy.int64(3), "hidden_size": numpy.int32(5)}
    flags: dict[str, Any] = {"bias": 1}
    if not is_cell(name):
        sizes["num_layers"] = numpy.int64(2)
        flags |= {"batch_first": 0, "bidirectional": numpy.bool_(True)}
    if name == "LSTM":
        sizes["proj_size"] = numpy.int16(2)
    layer = getattr(llm_ext, name)(**sizes, **flags)
    for attribute, value in sizes.items():
        assert type(getattr(layer, attribute)) is int
        assert getattr(layer, attribute) == value
    for attribute, value in flags.items():
        assert getattr(layer, attribute) is bool(value)
    plain = {key: value.item() for key, value in sizes.items()} | {key: bool(value) for key, value in flags.items()}
    assert repr(layer) == repr(getattr(llm_ext, name)(**plain))


@every_module
def test_device_and_dtype(name: str) -> None:
    layer = getattr(llm_ext, name)(3, 5, *ARGUMENTS[name], "meta", torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = getattr(llm_ext, name)(3, 5, device="cpu", dtype=torch.float32)
    assert flatten(layer(torch.zeros(1, 3)))[0].dtype == torch.float32


@every_module
def test_copies(name: str) -> None:
    """Copies are complete and independent."""
    layer = getattr(llm_ext, name)(3, 5, *ARGUMENTS[name]).eval()
    x = torch.randn(4, 3)
    expected = flatten(layer(x))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for other in copies:
        assert repr(other) == repr(layer)
        assert_same_bits(other(x), expected)


@every_module
def test_replaced_parameters(name: str) -> None:
    """However other tensors replace the parameters, the next call uses them."""
    layer = getattr(llm_ext, name)(3, 5)
    cell = is_cell(name)
    x = torch.randn(2, 3) if cell else torch.randn(4, 2, 3)

    def expected(weights: dict[str, Tensor]) -> Tensor:
        y, last = by_reference(name, x[None] if cell else x, None, weights)
        return flatten(last)[0] if cell else y

    before = flatten(layer(x))[0]
    assert flatten(layer.to(torch.float64)(x.double()))[0].dtype == torch.float64
    layer.to(torch.float32)
    assert torch.equal(flatten(layer(x))[0], before)

    doubled = {key: 2 * p.detach() for key, p in layer.named_parameters()}
    called = torch.func.functional_call(layer, doubled, (x,))
    assert_close(op_of(name), flatten(called)[0], expected(doubled))
    assert torch.equal(flatten(layer(x))[0], before)

    weight = "weight_hh" if cell else "weight_hh_l0"
    # The same name again, but now the last of the parameters.
    delattr(layer, weight)
    setattr(layer, weight, torch.nn.Parameter(doubled[weight]))
    weights = {key: getattr(layer, key) for key in doubled}
    assert_close(op_of(name), flatten(layer(x))[0], expected(weights))
    if not cell:
        layer.flatten_parameters()


@every_module
def test_contract_of_torch_base_classes(name: str) -> None:
    """Attributes and methods of torch's layers and cells that libraries use, also after the weights are replaced."""
    layers: list[Any] = [getattr(module, name)(3, 5, *ARGUMENTS[name]) for module in (llm_ext, torch.nn)]
    layer, torch_layer = layers
    torch_layer.load_state_dict(layer.state_dict())
    assert issubclass(type(layer), torch.nn.RNNCellBase if is_cell(name) else torch.nn.RNNBase)
    assert {attribute for attribute in dir(torch_layer) if not attribute.startswith("__")} <= set(dir(layer))
    assert vars(layer).keys() == vars(torch_layer).keys()
    if is_cell(name):
        return
    assert layer._all_weights == torch_layer._all_weights
    assert layer._flat_weights_names == torch_layer._flat_weights_names

    def replaced() -> None:
        for each in layers:
            each.weight_hh_l0 = torch.nn.Parameter(torch.ones_like(each.weight_hh_l0))

    for change in (lambda: None, replaced, lambda: [each.double() for each in layers]):
        change()
        weights = [weight for row in layer.all_weights for weight in row]
        assert all(a is b for a, b in zip(layer._flat_weights, weights, strict=True))
        assert_same_bits(layer._flat_weights, torch_layer._flat_weights)

    x = torch.randn(4, 2, 3, dtype=torch.float64)
    batch_sizes = torch.tensor([2, 1])
    hx = random_state(layer, 4, 4 if layer.batch_first else 2)
    for method, arguments in (
        ("check_input", (x, None)),
        ("check_input", (x.float(), None)),
        ("check_input", (x, batch_sizes)),
        ("check_forward_args", (x, hx, None)),
        ("check_forward_args", (x[..., :2], hx, None)),
        ("check_forward_args", (x[:3, :1], hx, None)),
        ("check_hidden_size", (flatten(hx)[0], (4, 2, 5))),
        ("get_expected_hidden_size", (x, None)),
        ("get_expected_hidden_size", (x[0], batch_sizes)),
        ("permute_hidden", (hx, None)),
        ("permute_hidden", (hx, torch.tensor([1, 0]))),
        *((("get_expected_cell_size", (x, None)),) if name == "LSTM" else ()),
    ):
        results = []
        for each in layers:
            try:
                results.append(getattr(each, method)(*arguments))
            except Exception as error:
                results.append((type(error), str(error)))
        ours, theirs = results
        if method == "permute_hidden":
            assert_same_bits(ours, theirs)
        else:
            assert ours == theirs, method


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("by", ["parametrize", "weight_norm"])
@pytest.mark.parametrize(
    ("name", "weight"),
    [*((name, weight) for name in ARGUMENTS for weight in ("weight_hh", "bias_ih")), ("LSTM", "weight_hr")],
)
def test_reparametrized_weights(name: str, weight: str, by: str) -> None:
    options = {"input_size": 3, "hidden_size": 5, "dtype": torch.float64, "projected": True}
    if is_cell(name):
        del options["projected"]
    else:
        weight += "_l0"
    layer, torch_layer = layer_pair(name, options)
    for each in (layer, torch_layer):
        if by == "parametrize":
            parametrize.register_parametrization(each, weight, Doubled())
        else:
            weight_norm(each, weight)
            with torch.no_grad():
                getattr(each, f"{weight}_g").mul_(3)
    compare_layers(name, layer, torch_layer, torch.randn(4, 3, dtype=torch.float64), None)


@every_device
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@every_module
def test_autocast(name: str, dtype: torch.dtype, with_hx: bool, device: str) -> None:
    """As torch's linear layers: computed and returned in autocast's dtype; gradients in that of the parameters."""
    layer = getattr(llm_ext, name)(3, 5, device=device)
    cell = is_cell(name)
    hx = random_state(layer, 2) if cell else random_state(layer, 1, 2)
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 2, 3, device=device).to(x_dtype)
        batches: list[Any] = [x[0]] if cell else [x, pack_padded_sequence(x, torch.tensor([4, 1]))]
        for batch in batches:
            with torch.autocast(device, dtype):
                output = layer(batch, hx if with_hx else None)
            tensors = flatten(output if cell else (output[0].data, output[1]))
            assert {tensor.dtype for tensor in tensors} == {dtype}
            torch.autograd.backward(torch.stack([tensor.float().sum() for tensor in tensors]).sum())
            assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
            half = copy.deepcopy(layer).to(dtype)
            first: Any = tuple(t.to(dtype) for t in hx) if isinstance(hx, tuple) else hx.to(dtype)
            expected = half(batch.to(dtype), first if with_hx else None)
            assert_same_bits(tensors, expected if cell else (expected[0].data, expected[1]))


@every_device
@every_module
def test_autocast_leaves_float64(name: str, device: str) -> None:
    layer = getattr(llm_ext, name)(3, 5, dtype=torch.float64, device=device)
    x = torch.randn(*((2, 3) if is_cell(name) else (4, 2, 3)), dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        results = flatten(layer(x))
        with pytest.raises(TypeError, match="must be float64, got float32"):
            layer(x.float(), **({} if is_cell(name) else {"lengths": torch.tensor([4, 1], device=device)}))
    assert {t.dtype for t in results} == {torch.float64}
    assert_same_bits(results, layer(x))


@every_device
@pytest.mark.parametrize("autocast", [False, True])
@every_module
def test_compiled(name: str, autocast: bool, device: str) -> None:
    """torch.compile breaks no graph, with a state and without; under autocast the bits are the same."""
    torch.compiler.reset()
    layer = getattr(llm_ext, name)(3, 5, device=device)
    cell = is_cell(name)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(*((2, 3) if cell else (4, 2, 3)), device=device)
    hx = random_state(layer, 2) if cell else random_state(layer, 1, 2)
    if autocast:
        with torch.autocast(device, torch.bfloat16):
            actual, expected = flatten(compiled(x)), flatten(layer(x))
        assert {t.dtype for t in actual} == {torch.bfloat16}
        assert_same_bits(actual, expected)
        return
    for first in (None, hx):
        actual, expected = flatten(compiled(x, first)), flatten(layer(x, first))
        assert_all_close(op_of(name), actual, expected)
        weights = list(layer.parameters())
        ours, theirs = (torch.autograd.grad(tensors[0].sum(), weights) for tensors in (actual, expected))
        assert_all_close(f"{op_of(name)}_backward", ours, theirs)


@pytest.mark.parametrize("kind", ["lengths", "reset", "packed reset", "double backward", "vmap", "loop of a cell"])
def test_default_device(kind: str) -> None:
    """A call works on its own device, whatever the default device is."""
    layer, cell = llm_ext.GRU(3, 5), llm_ext.GRUCell(3, 5)
    x, lengths, reset = torch.randn(6, 4, 3), torch.tensor([4, 6, 1, 5]), torch.rand(6, 4) < 0.4
    # Rows that no other test has, for which a tensor is cached.
    batches = torch.randn(3, 61, 3)
    packed, of_rows = (pack_padded_sequence(each, lengths, enforce_sorted=False) for each in (x, reset))

    def run() -> Any:
        if kind == "lengths":
            return layer(x, lengths=lengths)
        if kind == "reset":
            return layer(x, reset=reset, lengths=lengths)
        if kind == "packed reset":
            return layer(packed, reset=of_rows.data)[1]
        if kind == "vmap":
            return torch.func.vmap(lambda data: layer(packed._replace(data=data))[1])(torch.stack((packed.data,) * 2))
        h = batches.new_zeros(61, 5)
        for step in batches:
            h = cell(step, h)
        weights = list((cell if kind == "loop of a cell" else layer).parameters())
        result = h if kind == "loop of a cell" else layer(packed)[0].data
        double = kind == "double backward"
        gradients = torch.autograd.grad(result.square().sum(), weights, create_graph=double)
        if not double:
            return gradients
        return torch.autograd.grad(sum((g.square().sum() for g in gradients), x.new_zeros(())), weights)

    with torch.device("meta"):
        found = run()
    assert_same_bits(found, run())


@pytest.mark.parametrize("kind", ["lengths", "reset", "all states"])
def test_meta_device(kind: str) -> None:
    """Shapes, without values of lengths and resets."""
    layer = llm_ext.LSTM(3, 5, 2, device="meta")
    x, lengths = torch.zeros(6, 4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    reset = torch.zeros(6, 4, dtype=torch.bool, device="meta") if kind == "reset" else None
    found = flatten(layer(x, lengths=lengths, reset=reset, return_all_states=kind == "all states"))
    every = [(2, 6, 4, 5)] * 2 if kind == "all states" else []
    assert [tuple(tensor.shape) for tensor in found] == [(6, 4, 5), (2, 4, 5), (2, 4, 5), *every]
    assert all(tensor.is_meta for tensor in found)
    with pytest.raises(TypeError, match="AttentionPool: e must be float32, got float64"):
        llm_ext.AttentionPool(3, 5, device="meta")(x.double())
