"""The cases and geometric means of `python -m bench --device cuda`, with their targets."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.cases.cuda_builders import additive, lengths, pool_layer, pool_op, sequence
from bench.cases.recurrence import kind_name
from bench.cells import CELLS, GRU, LSTM, RNN
from bench.comparison import Case, Mean

__all__ = ["CASES", "MEANS"]

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_PHASES = ("inference", "training")
# Input features of the cases of the recurrence alone; cuDNN needs 8 for its fast paths.
_ALONE_INPUT = 8
_SMALL_H, _SMALL_B = (64, 128, 256), (1, 16, 64)


def _recurrent_cases(phase: str) -> Iterator[Case]:
    peers = phase == "inference"
    lstm_target = 2 if phase == "inference" else 1.5
    for dtype in (_FP32, _BF16):
        yield sequence(RNN, phase, dtype, 32, 128, 256, 512, layers=2, target=2, all_peers=peers)
    yield sequence(LSTM, phase, _BF16, 16, 1024, 768, 768, target=lstm_target, all_peers=peers)
    yield sequence(LSTM, phase, _FP16, 16, 1024, 768, 768, target=1.0, all_peers=peers)
    yield sequence(GRU, phase, _BF16, 32, 512, 512, 512, target=2, all_peers=peers)
    yield sequence(
        LSTM, phase, _BF16, 64, 256, 512, 512, layers=2, bidirectional=True, target=lstm_target, all_peers=peers
    )
    yield sequence(LSTM, phase, _BF16, 16, 1024, _ALONE_INPUT, 768, words=("alone",))
    yield sequence(LSTM, phase, _FP16, 16, 1024, _ALONE_INPUT, 768, words=("alone",))
    yield sequence(GRU, phase, _BF16, 32, 512, _ALONE_INPUT, 512, words=("alone",))
    # Exact float32, which has no matrix units, and TF32.
    for tf32 in (False, True):
        yield sequence(LSTM, phase, _FP32, 16, 256, 768, 768, tf32=tf32, all_peers=peers and not tf32)
    # Sizes that fill neither vectors nor tiles.
    for B, H in ((7, 17), (33, 65), (3, 130), (7, 1000)):
        yield sequence(GRU, phase, _BF16, B, 128, H, H, words=("odd",))
    for cell in CELLS:
        yield lengths(cell, phase, _BF16, 32, 512, 512, 512, target=5)


def _attention_cases(phase: str) -> Iterator[Case]:
    for causal in (False, True):
        yield pool_op(causal, phase, _BF16, 8, 4096, 1024, target=0.8 if phase == "inference" else None)
        yield pool_op(causal, phase, _FP32, 8, 4096, 1024)
        # One row, many rows, and some.
        for B, T, D in ((1, 16384, 1024), (512, 128, 512), (32, 1024, 512)):
            yield pool_op(causal, phase, _BF16, B, T, D)
        for B, T, D in ((8, 1024, 512), (32, 128, 512)):
            yield pool_layer(causal, phase, _BF16, B, T, D, compiled=phase == "inference" and B == 8)
    target = 3 if phase == "training" else None
    yield additive(phase, _BF16, 128, 50, 50, 1024, target=target, compiled=True)
    yield additive(phase, _FP32, 128, 50, 50, 1024)
    for B, Tq, Tk, A in ((1280, 1, 66, 1024), (128, 10, 128, 1024), (32, 32, 32, 512), (16, 64, 64, 512)):
        yield additive(phase, _BF16, B, Tq, Tk, A)


CASES: tuple[Case, ...] = (
    *(case for phase in _PHASES for case in _recurrent_cases(phase)),
    *(case for phase in _PHASES for case in _attention_cases(phase)),
    *(
        sequence(cell, phase, dtype, B, 512, H, H, target=1.0, words=("small",))
        for dtype in (_BF16, _FP32)
        for phase in _PHASES
        for cell in CELLS
        for H in _SMALL_H
        for B in _SMALL_B
    ),
)


def _means() -> Iterator[Mean]:
    for phase in _PHASES:
        patterns = {cell.name: f"cuda/{kind_name(cell, 'small', '*', phase)}/*" for cell in CELLS}
        yield Mean(tuple(patterns.values()), tuple(f"torch.nn.{name}" for name in patterns), target=1.5)
        for name, pattern in patterns.items():
            yield Mean((pattern,), (f"torch.nn.{name}",))


MEANS: tuple[Mean, ...] = tuple(_means())
