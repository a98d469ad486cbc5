"""Conversion in place: the same modules with the same parameters and results, and the way back."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pytest
import torch
from support.comparison import assert_all_close, assert_same_bits, flatten
from support.layers import CELLS, LAYERS, compare_layers, op_of, random_state, rows_of
from support.pairwise import parametrize_pairwise
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm
from torch.nn.utils.rnn import pack_sequence

import llm_ext

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.torch.jit")
FLAGS = (False, True)
every_class = pytest.mark.parametrize("name", LAYERS + CELLS)


def input_of(layer: Any, packed: bool = False) -> Any:
    """A batch of three, for a layer four steps long at most."""
    dtype = next(layer.parameters()).dtype
    if isinstance(layer, nn.RNNCellBase):
        return torch.randn(3, layer.input_size, dtype=dtype)
    sequences = [torch.randn(n, layer.input_size, dtype=dtype) for n in (2, 4, 3)]
    return pack_sequence(sequences, enforce_sorted=False) if packed else torch.randn(3, 4, layer.input_size).to(dtype)


def contents(module: nn.Module) -> dict[str, Any]:
    """The contents of a module, down to the identity of each object."""
    return {name: id(value) for table in (vars(module), module._parameters) for name, value in table.items()}


@parametrize_pairwise(
    name=(*LAYERS, *CELLS),
    num_layers=(1, 3),
    bidirectional=FLAGS,
    proj_size=(0, 2),
    bias=FLAGS,
    batch_first=FLAGS,
    packed=FLAGS,
    dtype=(torch.float32, torch.float64, torch.float16),
    strict_types=FLAGS,
    relu=FLAGS,
)
def test_layers_compute_the_same(
    name: str,
    num_layers: int,
    bidirectional: bool,
    proj_size: int,
    bias: bool,
    batch_first: bool,
    packed: bool,
    dtype: torch.dtype,
    strict_types: bool,
    relu: bool,
) -> None:
    options: dict[str, Any] = {"bias": bias}
    if name in LAYERS:
        options |= {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    if name == "LSTM":
        options["proj_size"] = proj_size
    if name.startswith("RNN"):
        options["nonlinearity"] = "relu" if relu else "tanh"
    layer = getattr(nn, name)(5, 7, **options, dtype=dtype)
    original, before = copy.deepcopy(layer).double(), contents(layer)
    assert llm_ext.convertible(layer) == [("", getattr(nn, name), None)]
    assert llm_ext.convert(layer, strict_types=strict_types) is layer
    assert contents(layer) == before
    assert isinstance(layer, getattr(llm_ext, name))
    assert isinstance(layer, getattr(nn, name)) is (strict_types or name in CELLS)
    assert repr(layer) == repr(original)
    assert llm_ext.convertible(layer) == []

    x = input_of(layer, packed)
    hx = random_state(
        layer, *(() if name in CELLS else (rows_of(layer),)), 3 if packed or batch_first or name in CELLS else 4
    )
    for state in (None, hx):
        compare_layers(name, layer, original, x, state)

    assert llm_ext.revert(layer) is layer
    assert contents(layer) == before
    assert type(layer) is getattr(nn, name)
    if dtype != torch.float16:
        assert_same_bits(flatten(layer(x)[-1]), flatten(original.to(dtype)(x)[-1]))


class Tagger(nn.Module):
    """A model with a layer that two parents share, a tied weight and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.again = nn.Sequential(self.rnn)
        self.cell = nn.LSTMCell(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.cell.weight_hh = self.cell.weight_ih

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.again(self.rnn(self.embedding(ids))[0])
        h = c = torch.zeros_like(y[:, 0])
        for step in y.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(y + h[:, None])  # type: ignore[no-any-return]


def test_training_goes_on() -> None:
    """Optimizer, averaged weights, tied weights and a shared layer, over a conversion there and back."""
    ids = torch.randint(11, (4, 5))
    runs: list[list[Tensor]] = []
    for converting in FLAGS:
        torch.manual_seed(3)
        model = Tagger().double()
        optimizer, average = torch.optim.Adam(model.parameters(), 0.1), torch.optim.swa_utils.AveragedModel(model)
        changes = {2: lambda m: llm_ext.convert(m, linear=True), 4: llm_ext.revert}
        for step in range(6):
            if converting and step in changes:
                keys = list(model.state_dict())
                assert changes[step](model) is model
                changes[step](average)
                assert list(model.state_dict()) == keys
                assert model.again[0] is model.rnn
                assert isinstance(model.rnn, llm_ext.GRU) is (step == 2)
                assert isinstance(model.head, llm_ext.Linear) is (step == 2)
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()))
            optimizer.step()
            average.update_parameters(model)
        runs.append([*model.parameters(), *average.parameters(), average(ids)])
    assert_all_close("gru_backward", runs[1], runs[0])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def decorate(layer: Any, weight: str) -> list[str]:
    """Give a layer everything that users add to one; return the list to which its hooks write."""
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda module, _, __: calls.append(module.remark))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_buffer("steps", torch.tensor(3))
    layer.remark = "forward"
    layer.register_parameter("extra", nn.Parameter(torch.ones(2)))
    prune.random_unstructured(layer, weight, 0.5)  # type: ignore[no-untyped-call]
    return calls


@pytest.mark.parametrize("by", ["parametrize", "weight_norm", "prune"])
@pytest.mark.parametrize("strict_types", FLAGS)
@every_class
def test_what_users_add_to_a_layer(name: str, strict_types: bool, by: str) -> None:
    layer = getattr(nn, name)(5, 7, dtype=torch.float64).eval()
    suffix = "" if name in CELLS else "_l0"
    if by == "parametrize":
        parametrize.register_parametrization(layer, "weight_ih" + suffix, Doubled())
        parametrize.register_parametrization(layer, "bias_ih" + suffix, Doubled())
    elif by == "weight_norm":
        weight_norm(layer, "weight_ih" + suffix)
    calls = decorate(layer, "weight_hh" + suffix)
    x = input_of(layer).requires_grad_()

    def run() -> list[Tensor]:
        calls.clear()
        results = flatten(layer(x))
        leaves = [x, *(p for p in layer.parameters() if p is not layer.extra)]
        return [*results, *torch.autograd.grad([results[0].square().sum()], leaves)]

    expected, called, keys = run(), list(calls), list(layer.state_dict())
    assert called == ["pre", "forward", "backward"]
    changes: list[Any] = [functools.partial(llm_ext.convert, strict_types=strict_types), llm_ext.revert] * 2
    for change in changes:
        assert change(layer) is layer
        assert_all_close(op_of(name), run(), expected)
        assert calls == called
        assert list(layer.state_dict()) == keys
        assert not layer.training
        assert (layer.steps.item(), layer.remark) == (3, "forward")
        assert parametrize.is_parametrized(layer) is (by == "parametrize")

    llm_ext.convert(layer)
    if by == "parametrize":
        for weight in ("weight_ih", "bias_ih"):
            parametrize.remove_parametrizations(layer, weight + suffix)
    elif by == "weight_norm":
        nn.utils.remove_weight_norm(layer, "weight_ih" + suffix)
    assert type(layer) is getattr(llm_ext, name)
    assert_all_close(op_of(name), flatten(layer(x)), expected[: len(flatten(layer(x)))])


class Named(nn.LSTM):
    """A subclass that only adds."""

    def __init__(self, *args: Any, label: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, label={self.label}"


class Scaled(nn.GRU):
    def forward(self, input: Any, hx: Any = None, scale: float = 2.0) -> Any:
        y, h = super().forward(scale * input, hx)
        return y, self.describe(h)

    def describe(self, h: Tensor) -> Tensor:
        return h + len(super().extra_repr())


class Handling(ABC, nn.RNNBase):
    """As in packages that write `forward` once for all layers."""

    @abstractmethod
    def label(self) -> str: ...

    def forward(self, input: Any, hx: Any = None) -> Any:
        y, last = super().forward(input, hx)
        return (y, last, self.label())


class HandlingRNN(Handling, nn.RNN):
    def label(self) -> str:
        return "handled"


class ScaledCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(-input, hx)


Label = TypeVar("Label")


class Labeled(nn.LSTM, Generic[Label]):
    """Generic has private attributes that the classes of llm_ext have, too."""


SUBCLASSES: list[Any] = [Named, Scaled, HandlingRNN, ScaledCell, Labeled]
every_subclass = pytest.mark.parametrize("cls", SUBCLASSES)


def tensors_of(results: Any) -> list[Tensor]:
    return flatten(results[:2])


@every_subclass
def test_subclasses_stay_what_they_are(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cls(5, 7, **({"label": "first"} if cls is Named else {}), dtype=torch.float64)
    if cls is Named:
        parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    x = input_of(layer)
    expected, text, original = layer(x), repr(layer), type(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm_ext.convert(layer)
    for module, function in ((llm_ext.nn.recurrent, "run"), (llm_ext.nn.cells, "run_step")):
        monkeypatch.setattr(module, function, fail)
    with pytest.raises(ZeroDivisionError):
        layer(x)
    monkeypatch.undo()
    assert isinstance(layer, cls)
    assert repr(layer) == text
    assert_all_close("lstm", tensors_of(layer(x)), tensors_of(expected))
    assert layer(x)[2:] == expected[2:]
    llm_ext.revert(layer)
    assert_same_bits(tensors_of(layer(x)), tensors_of(expected))
    assert type(layer) is original or parametrize.is_parametrized(layer)
    assert isinstance(parametrize.type_before_parametrizations(layer), type)
    assert parametrize.type_before_parametrizations(layer) is cls


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("strict_types", FLAGS)
@pytest.mark.parametrize("cls", [*(getattr(nn, name) for name in LAYERS + CELLS), nn.Linear, *SUBCLASSES])
def test_copies(cls: Any, strict_types: bool) -> None:
    """Copies are complete and independent, and of the same class."""
    layer = llm_ext.convert(cls(5, 7), linear=True, strict_types=strict_types)
    x = torch.randn(3, 5)
    expected, fresh = layer(x), cls(5, 7)
    fresh.load_state_dict(layer.state_dict())
    assert_all_close("lstm", tensors_of(fresh(x)), tensors_of(expected))
    saved = io.BytesIO()
    torch.save(nn.Sequential(layer), saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        *(pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        torch.load(saved, weights_only=False)[0],
    ]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for other in copies:
        assert type(other) is type(layer)
        assert_same_bits(tensors_of(other(x)), tensors_of(expected))
        assert type(llm_ext.revert(other)) is cls


@pytest.mark.parametrize("cls", [nn.LSTM, nn.RNN, nn.GRUCell, Named])
def test_old_pickles(cls: Any) -> None:
    """Whole modules of torch.nn load as those of llm_ext, also those of versions without projections."""
    layer = cls(5, 7)
    x = torch.randn(3, 5)
    expected = tensors_of(layer(x))
    vars(layer).pop("proj_size", None)
    pickled = pickle.dumps(layer)
    with llm_ext.patched():
        loaded = pickle.loads(pickled)
    assert isinstance(loaded, (llm_ext.LSTM, llm_ext.RNN, llm_ext.GRUCell))
    assert isinstance(loaded, cls if cls is Named else object)
    assert_all_close("lstm", tensors_of(loaded(x)), expected)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return getattr(llm_ext, name) if module == "torch.nn.modules.rnn" else super().find_class(module, name)

    if cls is not Named:
        loaded = Unpickler(io.BytesIO(pickled)).load()
        assert type(loaded) is getattr(llm_ext, cls.__name__)
        assert_all_close("lstm", tensors_of(loaded(x)), expected)


def test_filter_and_linear() -> None:
    model = Tagger()
    assert [entry.fqn for entry in llm_ext.convertible(model, linear=True)] == ["rnn", "cell", "head"]
    names: list[str] = []

    def only_cells(module: nn.Module, fqn: str) -> bool:
        names.append(fqn)
        return isinstance(module, nn.RNNCellBase)

    assert [(e.fqn, e.reason) for e in llm_ext.convertible(model, filter=only_cells)] == [
        ("rnn", "the filter excludes it"),
        ("cell", None),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm_ext.convert(model, filter=only_cells)
        assert type(model.rnn) is nn.GRU
        assert type(model.cell) is llm_ext.LSTMCell
        llm_ext.convert(model)
        llm_ext.convert(model)
    assert names == ["rnn", "cell"] * 2
    assert isinstance(model.rnn, llm_ext.GRU)
    assert type(model.head) is nn.Linear


def test_meta_parameters() -> None:
    with torch.device("meta"):
        layer = llm_ext.convert(nn.LSTM(5, 7))
    assert isinstance(layer, llm_ext.LSTM)
    original = nn.LSTM(5, 7)
    layer.to_empty(device="cpu").load_state_dict(original.state_dict())
    x = torch.randn(4, 2, 5)
    assert_all_close("lstm", layer(x), original(x))


@pytest.mark.parametrize("strict_types", FLAGS)
def test_compiled_in_one_graph(strict_types: bool) -> None:
    """A model that was compiled before its conversion is compiled again."""
    config: Any = torch._dynamo.config
    torch.compiler.reset()
    model = nn.Sequential(nn.GRU(5, 7))
    x = torch.randn(4, 3, 5)
    expected = model(x)
    compiled: Any = torch.compile(model, backend="aot_eager")
    compiled(x)
    llm_ext.convert(compiled, strict_types=strict_types)
    assert isinstance(model[0], llm_ext.GRU)
    assert_all_close("gru", compiled(x), expected)
    torch.compiler.reset()
    with config.patch(allow_rnn=strict_types):
        whole: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_all_close("gru", whole(x), expected)
