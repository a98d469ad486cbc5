"""The candidates of every kind of case agree with the reference; nothing is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_ext
from bench import comparison, limits, peers, report
from bench.cases import attention, cpu, cuda_builders, linear, models, published, quantized, recurrence, transforms
from bench.cells import CELLS, GRU, LSTM, RNN
from bench.comparison import LIMIT, Case, Settings

PHASES = ("inference", "training")


class Small(nn.Module):
    """Like a model of a package: some parameters before batch normalization, whose gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True, bidirectional=True)
        self.head, self.norm = nn.Linear(10, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.head(self.rnn(x)[0]).transpose(1, 2))
        return y


def small_model() -> published.Model:
    return published.Model(Small(), lambda module, x: module(x), [torch.randn(4, 6, 3)])


CPU_CASES = [
    *(
        case
        for cell in CELLS
        for case in (
            recurrence.sequence(cell, "inference", 3, 5, 2, 4),
            recurrence.sequence(cell, "training", 3, 5, 2, 4, layers=2),
            recurrence.packed(cell, "inference", 3, 8, 2, 4),
            recurrence.packed(cell, "training", 3, 8, 2, 4),
            recurrence.single_step(cell, 4),
        )
    ),
    recurrence.odd_sizes(GRU, "training", 3, 4, 1, 5),
    recurrence.multilayer(LSTM, 1, 5, 4, {}),
    recurrence.input_free(LSTM, 3, 5, 4, target=0.85),
    recurrence.input_free(RNN, 1, 5, 4, target=0.8),
    recurrence.scaling(GRU, 2, 3, 4),
    recurrence.resets(GRU, "inference", 3, 6, 4, share=0.3),
    recurrence.resets(LSTM, "training", 3, 6, 4, share=0.3),
    recurrence.bfloat16(LSTM, "inference", 1, 3, 4, 4),
    recurrence.bfloat16(GRU, "training", 2, 3, 4, 4),
    quantized.quantized(LSTM, 2, 3, 5, 32, {"torch": 2.0}),
    quantized.quantized(GRU, 1, 3, 5, 32, {"float32": 3.0}),
    *(linear.linear(phase, 3, 5, 4) for phase in PHASES),
    *(attention.pooling(phase, 2, 5, 4) for phase in PHASES),
    attention.prefix("inference", 2, 5, 4),
    attention.prefix("training", 2, 70, 4),
    *(attention.additive(phase, 2, 3, 5, 4) for phase in PHASES),
    attention.streaming("pooling", "forward", 2, 70, 4),
    attention.streaming("pooling", "backward", 2, 70, 4),
    attention.streaming("prefix", "forward", 2, 70, 4),
    attention.streaming("prefix", "backward", 2, 70, 4, dtype=torch.bfloat16),
    models.llm_training(2, 3, 5, 4, 6),
    models.llm_generation(1, 4, 5, 4, 6),
    models.llm_generation(1, 4, 5, 4, 6, torch.bfloat16),
    models.seq2seq_training(3, 7, 5, 4, 6),
    models.seq2seq_greedy(5, 2, 4, 5, 4, 6),
    *published.published("small", small_model),
    transforms.per_sample_gradients(3, 5, 6, 4, 4),
    *([transforms.private_step(3, 5, 6, 4, 4)] if find_spec("opacus") is not None else []),
    *(transforms.forward_mode(cell, 2, 3, 4, target=0.4) for cell in CELLS),
    *(transforms.double_backward(cell, 2, 3, 4, target=2) for cell in CELLS),
]
FP32, BF16 = torch.float32, torch.bfloat16
# On the CPU, which has the same layers.
CUDA_CASES = [
    cuda_builders.sequence(RNN, "inference", FP32, 3, 5, 2, 4, layers=2, bidirectional=True, device="cpu"),
    cuda_builders.sequence(LSTM, "training", BF16, 3, 5, 2, 4, layers=2, bidirectional=True, device="cpu"),
    cuda_builders.sequence(GRU, "training", FP32, 3, 5, 2, 4, all_peers=True, tf32=True, device="cpu"),
    cuda_builders.lengths(GRU, "inference", FP32, 5, 8, 2, 4, target=5, device="cpu"),
    cuda_builders.lengths(LSTM, "training", FP32, 5, 8, 2, 4, target=5, device="cpu"),
    *(
        cuda_builders.pool_op(causal, phase, FP32, 2, 9, 4, device="cpu")
        for causal in (False, True)
        for phase in PHASES
    ),
    *(cuda_builders.pool_layer(causal, "training", FP32, 2, 9, 4, device="cpu") for causal in (False, True)),
    cuda_builders.additive("training", FP32, 2, 3, 5, 4, device="cpu"),
]


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("case", [*CPU_CASES, *CUDA_CASES], ids=lambda case: case.name)
def test_candidates_agree_with_the_reference(case: Case, settings: Settings) -> None:
    # Without torch.compile, which takes half a minute for all.
    words = [word for word in peers.CPU_LIBRARIES if word != "compile"]
    absent = [*peers.not_installed("cpu"), *([] if limits.unavailable() is None else [LIMIT])]
    result = comparison.run(case, dataclasses.replace(settings, libraries=words, absent=absent))
    for entry in (result["ours"], *result["others"]):
        assert entry["status"] in ("measured", "absent"), entry
    # A target belongs to a candidate.
    assert case.targets.keys() <= {entry["name"] for entry in result["others"]}


@pytest.mark.usefixtures("untimed")
def test_converted_models_are_compared(settings: Settings) -> None:
    """The results in inference, and in training the gradients as well, decide whether a model is timed."""

    def scale_weights(model: Any) -> None:
        model.rnn.weight_hh_l0_reverse.data.mul_(1.01)
        assert isinstance(model.rnn, llm_ext.GRU)

    def scale_gradients(model: Any) -> None:
        model.rnn.weight_hh_l0_reverse.register_hook(lambda gradient: 1.01 * gradient)

    def statuses(change: Callable[[Any], None]) -> list[tuple[str, str]]:
        cases = published.published("small", small_model, use_resets=change)
        results = [comparison.run(case, settings) for case in cases]
        return [(result["ours"]["status"], result["others"][0]["status"]) for result in results]

    assert statuses(scale_weights) == [("wrong", "skipped"), ("wrong", "skipped")]
    assert statuses(scale_gradients) == [("measured", "measured"), ("wrong", "skipped")]


def test_a_missing_package_is_named(settings: Settings) -> None:
    def build() -> published.Model:
        raise ImportError("No module named 'absent'")

    for case in published.published("absent", build):
        entry = comparison.run(case, settings)
        assert (entry["ours"]["status"], entry["others"]) == ("absent", [])
        assert "absent: No module named 'absent'" in report.table(entry)


def test_work_counts_every_matrix_product() -> None:
    # For each row U h and W x, with G gates, two operations a weight.
    for cell, gates in ((RNN, 1), (GRU, 3), (LSTM, 4)):
        assert recurrence.input_free(cell, 8, 128, 512, None).work == 2 * 8 * 128 * gates * 512 * (512 + 1) / 1e9
    two_layers = recurrence.sequence(LSTM, "training", 2, 3, 5, 7, layers=2)
    assert two_layers.work == pytest.approx(3 * 2 * 6 * 4 * 7 * (5 + 7 + 7 + 7) / 1e9)
    bidirectional = cuda_builders.sequence(RNN, "inference", FP32, 2, 3, 5, 7, layers=2, bidirectional=True)
    assert bidirectional.work == pytest.approx(2 * 6 * 2 * 7 * (5 + 7 + 14 + 7) / 1e9)


def test_means_cover_the_shapes_of_whole_sequences(settings: Settings) -> None:
    names = [case.name for case in cpu.CASES]
    found = {
        tuple(mean.cases): comparison.geometric_mean(mean, names, [], settings)["cases_expected"]
        for mean in cpu.MEANS
        if mean.target is not None
    }
    inference = [f"recurrence/{prefix}inference/*" for prefix in ("", "gru-", "lstm-")]
    training = [f"recurrence/{prefix}training/*" for prefix in ("", "gru-", "lstm-")]
    expected: dict[tuple[str, ...], int] = {tuple(inference): 21}
    expected.update(((name,), 7) for name in inference)
    expected.update(((name,), 8) for name in training)
    assert found == expected
