"""ONNX by both exporters: ONNX Runtime gives the results of eager mode, at other sizes than those of the export."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, flatten
from support.layers import CELLS, LAYERS, rows_of
from support.pairwise import pairwise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import llm_ext

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

KINDS = (*(("RNN", {"nonlinearity": each}) for each in ("tanh", "relu", "sigmoid")), ("GRU", {}), ("LSTM", {}))
FLAGS = (False, True)
CASES = pairwise(
    kind=KINDS, num_layers=(1, 2), bidirectional=FLAGS, padded=FLAGS, state=FLAGS, bias=FLAGS, batch_first=FLAGS
)
SOME_CASES = [(kind, 1, True, True, True, True, True) for kind in KINDS[2:]]
SIZES = 3, 5  # I and H


class Recurrences(nn.Module):
    """A layer for each case, cells, and a layer without a batch."""

    def __init__(self, cases: Sequence[Any], cells: Sequence[str]) -> None:
        super().__init__()
        self.cases = cases
        self.layers: Any = nn.ModuleList(
            getattr(llm_ext, name)(*SIZES, layers, bidirectional=both, bias=bias, batch_first=first, **options)
            for (name, options), layers, both, _, _, bias, first in cases
        )
        self.cells = nn.ModuleList(getattr(llm_ext, name)(*SIZES) for name in cells)

    def forward(self, x: Tensor, lengths: Tensor, h0: Tensor, c0: Tensor) -> list[Any]:
        results: list[Any] = []
        for layer, (_, _, _, padded, state, _, first) in zip(self.layers, self.cases, strict=True):
            h, c = h0[: rows_of(layer)], c0[: rows_of(layer)]
            hx = None if not state else (h, c) if isinstance(layer, llm_ext.LSTM) else h
            given = {"lengths": lengths} if padded else {}
            results.append(layer(x.transpose(0, 1) if first else x, hx, **given))
        results.extend(cell(x[0]) for cell in self.cells)
        results.append(self.layers[0](x[:, 0]))
        return results


def inputs_of_recurrences(T: int, B: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(B) * T // (B - 1)  # 0 and T are among them
    return torch.randn(T, B, SIZES[0]), lengths, *torch.randn(2, 4, B, SIZES[1])


class Others(nn.Module):
    """A model, one that was converted, and what is not a recurrence."""

    def __init__(self, with_attention: bool) -> None:
        super().__init__()
        self.language = llm_ext.LLM(11, 4, 5, 11, 1, 0.0, cell="lstm")
        self.converted = llm_ext.convert(nn.LSTM(4, 5, batch_first=True), strict_types=True)
        self.translator = llm_ext.Seq2Seq(11, 13, 4, 6) if with_attention else None
        self.pool = llm_ext.AttentionPool(4, 5, "tanh") if with_attention else None

    def forward(self, ids: Tensor, lengths: Tensor) -> list[Any]:
        embedded = self.language.embedding(ids)
        results: list[Any] = [self.language(ids), self.converted(embedded, lengths=lengths)]
        if self.translator is not None and self.pool is not None:
            results += [self.translator(ids, ids, lengths), self.pool(embedded, lengths, need_weights=True)]
        return results


def inputs_of_others(B: int, T: int) -> tuple[Tensor, ...]:
    return torch.randint(11, (B, T)), 1 + torch.arange(B) * (T - 1) // (B - 1)


def export(model: nn.Module, inputs: tuple[Tensor, ...], sizes: list[dict[int, str]], dynamo: bool) -> Any:
    names = [f"input_{i}" for i in range(len(inputs))]
    if dynamo:
        shapes = tuple(dict.fromkeys(size, torch.export.Dim.DYNAMIC) for size in sizes)
        program = torch.onnx.export(model, inputs, input_names=names, dynamic_shapes=shapes, verbose=False)
        assert program is not None
        return program.model_proto
    file = io.BytesIO()
    axes = dict(zip(names, sizes, strict=True))
    torch.onnx.export(model, inputs, file, input_names=names, dynamic_axes=axes, dynamo=False)  # type: ignore[arg-type]
    return onnx.load_from_string(file.getvalue())


def run(exported: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(exported.SerializeToString(), options)
    values = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, values)]


@pytest.mark.parametrize("dynamo", [False, True])
def test_recurrences(dynamo: bool) -> None:
    """The slower exporter, which shares all but the last step, gets one layer of each class."""
    model = Recurrences(SOME_CASES if dynamo else CASES, () if dynamo else CELLS).eval()
    sizes = [{0: "T", 1: "B"}, {0: "B"}, {1: "B"}, {1: "B"}]
    exported = export(model, inputs_of_recurrences(6, 3), sizes, dynamo)
    inputs = inputs_of_recurrences(9, 4)
    with torch.no_grad():
        expected = model(*inputs)
    actual = iter(run(exported, inputs))
    names = [str(case) for case in model.cases] + [type(cell).__name__ for cell in model.cells] + ["without a batch"]
    for what, results in zip(names, expected, strict=True):
        assert_all_close("lstm", [next(actual) for _ in flatten(results)], results, what)
    assert next(actual, None) is None

    operators = Counter(node.op_type for node in exported.graph.node)
    one_each = Counter(type(layer).__name__ for layer in model.layers for _ in range(layer.num_layers))
    one_each.update([type(cell).__name__.removesuffix("Cell") for cell in model.cells])
    one_each[type(model.layers[0]).__name__] += model.layers[0].num_layers  # without a batch
    assert {name: operators[name] for name in LAYERS} == one_each


@pytest.mark.parametrize("dynamo", [False, True])
def test_models_and_attention(dynamo: bool) -> None:
    model = Others(with_attention=not dynamo).eval()
    exported = export(model, inputs_of_others(3, 6), [{0: "B", 1: "T"}, {0: "B"}], dynamo)
    inputs = inputs_of_others(4, 9)
    with torch.no_grad():
        expected = model(*inputs)
    assert_all_close("lstm", run(exported, inputs), expected)


def test_copy_of_torch_nn() -> None:
    """The exporter that traces also takes what `to_torch` returns."""
    model = nn.Sequential(llm_ext.LSTM(*SIZES, bidirectional=True)).eval()
    exported = export(llm_ext.to_torch(model), (torch.randn(6, 3, SIZES[0]),), [{0: "T", 1: "B"}], dynamo=False)
    x = torch.randn(9, 4, SIZES[0])
    assert_all_close("lstm", run(exported, (x,)), model(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = llm_ext.LSTM(*SIZES)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(pack_padded_sequence(x, torch.tensor([6, 2])))[1]


@pytest.mark.parametrize(
    ("options", "given", "what"),
    [
        ({}, {"reset": torch.zeros(6, 2, dtype=torch.bool)}, "reset; start a call for each episode"),
        ({}, {"return_all_states": True}, "return_all_states"),
        ({"proj_size": 2}, {}, "proj_size; export a layer without projection"),
    ],
)
def test_what_onnx_lacks_is_refused(options: dict[str, Any], given: dict[str, Any], what: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = llm_ext.LSTM(*SIZES, **options)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x, **given)

    with pytest.raises(NotImplementedError, match=f"a recurrence of ONNX takes no {what}"):
        export(Model().eval(), (torch.randn(6, 2, SIZES[0]),), [{}], dynamo=False)


def test_packed_rows_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="ONNX takes no PackedSequence; pass the padded batch and lengths"):
        export(Packed().eval(), (torch.randn(6, 2, SIZES[0]),), [{}], dynamo=False)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("layer", [llm_ext.GRU(*SIZES), llm_ext.GRUCell(*SIZES), llm_ext.Linear(*SIZES)], ids=str)
def test_packed_weights_are_refused(layer: nn.Module, dynamo: bool) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    llm_ext.quantize_(model)
    x = torch.randn(2, SIZES[0]) if isinstance(layer, llm_ext.GRUCell) else torch.randn(6, 2, SIZES[0])
    with pytest.raises(Exception, match=r"ONNX has no operator for packed weights; call llm_ext\.dequantize_ first"):
        export(model, (x,), [{}], dynamo=dynamo)
