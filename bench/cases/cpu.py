"""The cases and geometric means of `python -m bench` on the CPU, with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from bench.cases.attention import additive, pooling, prefix, streaming
from bench.cases.linear import linear
from bench.cases.models import llm_generation, llm_training, seq2seq_greedy, seq2seq_training
from bench.cases.published import published_cases
from bench.cases.quantized import quantized
from bench.cases.recurrence import (
    bfloat16,
    input_free,
    kind_name,
    multilayer,
    odd_sizes,
    packed,
    resets,
    scaling,
    sequence,
    single_step,
)
from bench.cases.transforms import double_backward, forward_mode, per_sample_gradients, private_step
from bench.cells import CELLS, GRU, LSTM, RNN, Cell
from bench.comparison import Case, Mean

__all__ = ["CASES", "MEANS"]

# B, T, I, H of the recurrent layers that the geometric means cover.
_SHAPES = (
    (1, 128, 256, 512),
    (8, 128, 256, 512),
    (32, 128, 256, 512),
    (64, 128, 512, 512),
    (32, 128, 1024, 1024),
    (1, 512, 64, 64),
    (32, 512, 64, 64),
)
# Targets against torch.nn: mean of inference, each case of training, mean of training.
_TARGETS = {"RNN": (4.0, 1.6, 3.5), "GRU": (4.0, 1.6, 3.5), "LSTM": (1.6, 1.05, 1.5)}
# Higher targets of single cases.
_CASE_TARGETS: Mapping[tuple[Any, ...], float] = {
    ("RNN", "inference", 1, 128, 256, 512): 3,
    ("RNN", "inference", 32, 128, 256, 512): 1.7,
    ("RNN", "inference", 1, 512, 64, 64): 10,
    ("RNN", "training", 1, 512, 64, 64): 8,
    ("RNN", "step", 64): 3,
}
_ALL_PEERS = ("torch.nn.*", "ONNX Runtime", "OpenVINO", "JAX lax.scan")


def _recurrent_cases(cell: Cell) -> Iterator[Case]:
    name = f"torch.nn.{cell.name}"
    _, training_target, _ = _TARGETS[cell.name]
    for shape in _SHAPES:
        others = dict.fromkeys(_ALL_PEERS[1:], 1.0)
        targets = {name: _CASE_TARGETS.get((cell.name, "inference", *shape), 1.0), **others}
        yield sequence(cell, "inference", *shape, targets=targets)
    for shape in _SHAPES:
        target = _CASE_TARGETS.get((cell.name, "training", *shape), training_target)
        yield sequence(cell, "training", *shape, targets={name: target})
    yield sequence(cell, "training", 32, 128, 256, 512, layers=2, targets={name: training_target})
    for H in (64, 128):
        yield multilayer(cell, 1, 256, H, targets={name: 1.0})
    for phase in ("inference", "training"):
        yield packed(cell, phase, 32, 128, 256, 512)
    for phase in ("inference", "training"):
        for B, H in ((1, 512), (8, 512), (32, 512), (32, 1024)):
            yield bfloat16(cell, phase, B, 128, H, H, target=1.6 if B >= 8 else None)
    for B, H in ((8, 512), (32, 512), (64, 512), (32, 1024)):
        yield input_free(cell, B, 128, H, target=0.85)
    if cell is RNN:
        yield input_free(cell, 1, 128, 512, target=0.8)
    yield odd_sizes(cell, "inference", 3, 128, 17, 17)
    yield odd_sizes(cell, "inference", 7, 128, 1, 34)
    yield odd_sizes(cell, "inference", 33, 128, 65, 65)
    yield odd_sizes(cell, "inference", 3, 128, 1, 130)
    yield odd_sizes(cell, "inference", 7, 128, 130, 1000)
    yield odd_sizes(cell, "training", 33, 128, 1, 65)
    yield odd_sizes(cell, "training", 7, 128, 34, 130)
    for H in (64, 256):
        yield single_step(cell, H, targets=(_CASE_TARGETS.get((cell.name, "step", H), 2), 2))


def _scaling_cases(cell: Cell) -> Iterator[Case]:
    """Three curves through one point; the curve of H includes sizes next to powers of two."""
    points = [(B, 128, 256) for B in (1, 2, 4, 8, 16, 32, 64, 128)]
    points += [(8, T, 256) for T in (1, 8, 32, 128, 512, 2048)]
    points += [(8, 128, H) for H in (17, 34, 64, 65, 128, 130, 256, 512, 1000, 1024)]
    for point in dict.fromkeys(points):
        yield scaling(cell, *point)


def _attention_cases() -> Iterator[Case]:
    yield pooling("inference", 32, 128, 512)
    yield pooling("inference", 8, 1024, 512)
    yield pooling("inference", 1, 8192, 512)
    yield pooling("training", 32, 128, 512, targets=(20, 3))
    yield pooling("training", 8, 1024, 512)
    yield pooling("training", 1, 8192, 512)
    yield prefix("inference", 1, 8192, 512)
    yield prefix("training", 32, 128, 512)
    yield prefix("training", 8, 1024, 512)
    yield prefix("training", 1, 8192, 512, targets=(10, 400))
    for case in (pooling, prefix):
        for T in (64, 256, 1024, 4096):  # the curves of time and memory against T
            yield case("training", 4, T, 512)
    for group in ("pooling", "prefix"):
        for pass_name, target in (("forward", 0.7), ("backward", 0.6)):
            yield streaming(group, pass_name, 8, 8192, 512, target)
            yield streaming(group, pass_name, 1, 65536, 512, target)
            yield streaming(group, pass_name, 8, 16384, 512, dtype=torch.bfloat16)
    yield additive("inference", 32, 1, 64, 512)
    yield additive("inference", 32, 32, 32, 512, targets=(5, 2))
    yield additive("inference", 16, 64, 64, 512, targets=(8, 2))
    yield additive("inference", 1280, 1, 66, 1024)
    yield additive("inference", 128, 10, 128, 1024)
    yield additive("training", 32, 1, 64, 512)
    yield additive("training", 32, 32, 32, 512, targets=(5, 2))
    yield additive("training", 16, 64, 64, 512, targets=(6, 2))


def _linear_cases() -> Iterator[Case]:
    for phase in ("inference", "training"):
        for N in (1, 8, 32, 33, 128, 1024):
            yield linear(phase, N, 512, 512)
    for phase in ("inference", "training"):
        for N in (1, 32, 1024):
            yield linear(phase, N, 256, 4096)
    yield linear("inference", 4096, 64, 64)
    yield linear("training", 4096, 64, 64)


def _transform_cases() -> Iterator[Case]:
    yield per_sample_gradients(64, 64, 65, 64, 256)
    if find_spec("opacus") is not None:  # the step of either side is one of Opacus
        yield private_step(64, 64, 65, 64, 256)
    for cell in CELLS:
        for B, T, H in ((8, 32, 64), (64, 64, 256), (1, 128, 512)):
            yield forward_mode(cell, B, T, H, target=0.4)
        for B, T, H in ((8, 32, 64), (64, 64, 256), (1, 128, 512)):
            yield double_backward(cell, B, T, H, target=2.0)


def _quantized_cases() -> Iterator[Case]:
    """int8 weights; the targets are those of a machine with AVX512-VNNI and AVX512-BF16."""
    one = {"bfloat16": 1.5, "torch": 1.6, "float32": 3.0}
    batch = {"bfloat16": 1.4, "torch": 2.0, "float32": 2.6}
    for cell in (LSTM, GRU):
        yield quantized(cell, 1, 128, 256, 512, one)
        yield quantized(cell, 1, 64, 1024, 1024, one)
        yield quantized(cell, 8, 128, 256, 512, batch)
        yield quantized(cell, 32, 64, 256, 512, batch)
        yield quantized(cell, 1, 512, 64, 64, {"bfloat16": 1.0, "torch": 20.0})
        for H in (256, 512):
            yield quantized(cell, 1, 1, H, H, {"float32": 1.0})


CASES: tuple[Case, ...] = (
    *(case for cell in CELLS for case in _recurrent_cases(cell)),
    single_step(RNN, 512),
    *(resets(LSTM, "training", B, 128, 256) for B in (8, 128)),
    *_attention_cases(),
    *_linear_cases(),
    *_transform_cases(),
    *_quantized_cases(),
    llm_training(32, 64, 65, 128, 512),
    llm_generation(1, 128, 65, 128, 512),
    llm_generation(1, 128, 65, 128, 2048),
    llm_generation(1, 128, 65, 128, 512, torch.bfloat16),
    llm_generation(1, 128, 65, 128, 2048, torch.bfloat16),
    seq2seq_training(64, 15, 4096, 256, 512),
    seq2seq_greedy(1000, 32, 15, 4096, 256, 512),
    *published_cases(),
    *(case for cell in CELLS for case in _scaling_cases(cell)),
)


def _means() -> Iterator[Mean]:
    def patterns(phase: str, *cells: Cell) -> tuple[str, ...]:
        return tuple(f"recurrence/{kind_name(cell, phase)}/*" for cell in cells)

    yield Mean(patterns("inference", *CELLS), _ALL_PEERS, target=1.3)
    for cell in CELLS:
        yield Mean(patterns("inference", cell), _ALL_PEERS)
    for i, phase in ((0, "inference"), (2, "training")):
        for cell in CELLS:
            yield Mean(patterns(phase, cell), (f"torch.nn.{cell.name}",), target=_TARGETS[cell.name][i])


MEANS: tuple[Mean, ...] = tuple(_means())
