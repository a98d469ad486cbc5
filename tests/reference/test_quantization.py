"""The rounding of weights and factors: known cases, bounds, and numbers that have no scale."""

from __future__ import annotations

import pytest
import torch

from llm_ext.reference.quantization import STATE_LIMIT, quantize_rows, quantize_weight, quantized_linear

INF, NAN = float("inf"), float("nan")


def test_a_weight_is_rounded_by_row() -> None:
    w = torch.tensor([[1.27, -0.63, 0.01], [0.0, 0.0, 0.0], [-254.0, 127.0, 3.0]], dtype=torch.float64)
    values, scale = quantize_weight(w)
    assert values.tolist() == [[127, -63, 1], [0, 0, 0], [-127, 64, 2]]  # halves go to the even integer
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_half_a_unit(dtype: torch.dtype) -> None:
    w = torch.randn(50, 37, dtype=dtype) * torch.logspace(-30, 30, 50, dtype=dtype)[:, None]
    weight = quantize_weight(w)
    assert ((weight.dequantize() - w).abs() <= weight.scale[:, None] * (0.5 + 1e-4)).all()
    x = torch.randn(50, 1024, dtype=dtype) * torch.logspace(-20, 30, 50, dtype=dtype)[:, None]
    values, scale = quantize_rows(x)
    assert ((values * scale - x).abs() <= scale * (0.5 + 1e-2)).all()
    assert values.abs().amax() == 2**31 // (127 * 1024) > 16000
    values, scale = quantize_rows(x, STATE_LIMIT)
    assert ((values * scale - x).abs() <= scale * (0.5 + 1e-4)).all()
    assert values.abs().amax() == 63


@pytest.mark.parametrize("K", [1, 2, 64, 515, 516, 1024, 70000])
def test_sums_fit_into_int32(K: int) -> None:
    values, _ = quantize_rows(torch.ones(1, K, dtype=torch.float64))
    assert values.abs().max() <= 32767
    assert K * 127 * int(values.max()) < 2**31
    assert K * 127 * (int(values.max()) + 1) > 2**31 or values.max() == 32767


def test_numbers_without_a_scale() -> None:
    w = torch.tensor([[NAN, 1.0], [INF, 1.0], [1e-42, 1e-42], [0.0, 0.0]])
    values, scale = quantize_weight(w)
    assert values.tolist() == [[0, 0]] * 4
    assert scale.isnan().tolist() == [True, True, False, False]
    assert scale[2:].tolist() == [0.0, 0.0]
    x = torch.tensor([[1.0, NAN], [-INF, 1.0], [1e-31, -1e-31], [0.0, 0.0], [1.0, 2.0]])
    y = quantized_linear(x, quantize_weight(torch.tensor([[1.0, 1.0], [0.5, -1.0]])), torch.ones(2))
    assert y.isnan().all(1).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(y[2:], torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, -0.5]]), atol=2e-2, rtol=0)
