"""What the tests share: the table of tolerances, odd sizes, inputs, and gradients by name."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import llm_ext

DTYPES = (torch.float32, torch.float64)
# The recurrence is computed in float32 where these are stored.
HALF_DTYPES = (torch.bfloat16, torch.float16)
NONLINEARITIES = ("tanh", "relu", "sigmoid")
# Nothing, one, odd, and one above the width of a vector of 16 or 32 numbers.
SIZES = (0, 1, 3, 17, 33)

# Greatest error against the float64 reference, in units of max(1, largest expected number): a sum of many
# terms is as exact as its largest terms, however small the sum. Never raised inside a test.
TOLERANCE = {
    # Up to 1024 steps, each rounding a dot product of I + H terms; the cell contracts and forgets old errors.
    ("rnn", torch.float32): 5e-5,
    # The same errors, through weights that sum over T·B rows.
    ("rnn_backward", torch.float32): 1e-4,
    # The same; the state that an LSTM adds up is forgotten as well.
    ("gru", torch.float32): 5e-5,
    ("gru_backward", torch.float32): 1e-4,
    ("lstm", torch.float32): 5e-5,
    ("lstm_backward", torch.float32): 1e-4,
    # What is returned is rounded, to 8 or 11 bits; states stay float32 from step to step, but where pairs of bfloat16
    # are multiplied the product reads them rounded.
    **{(cell, torch.bfloat16): 8e-3 for cell in ("rnn", "gru", "lstm")},
    **{(cell, torch.float16): 5e-4 for cell in ("rnn", "gru", "lstm")},
    # The gradients read states and gates that were rounded, and are rounded themselves. A derivative such as 1 - h²
    # has the error of h, which a chain of steps multiplies.
    **{(f"{cell}_backward", torch.bfloat16): 2.4e-2 for cell in ("rnn", "gru", "lstm")},
    **{(f"{cell}_backward", torch.float16): 3e-3 for cell in ("rnn", "gru", "lstm")},
    # The same where the product reads states and dz rounded, as matrix fragments do.
    **{(f"{cell}_rounded", torch.bfloat16): 8e-3 for cell in ("rnn", "gru", "lstm")},
    **{(f"{cell}_rounded", torch.float16): 1e-3 for cell in ("rnn", "gru", "lstm")},
    **{(f"{cell}_rounded_backward", torch.bfloat16): 2.4e-2 for cell in ("rnn", "gru", "lstm")},
    **{(f"{cell}_rounded_backward", torch.float16): 3e-3 for cell in ("rnn", "gru", "lstm")},
    # Operands of the product rounded to 11 bits, as in float16, but nothing that is stored.
    **{(f"{cell}_tf32", torch.float32): 1e-3 for cell in ("rnn", "gru", "lstm")},
    **{(f"{cell}_tf32_backward", torch.float32): 3e-3 for cell in ("rnn", "gru", "lstm")},
    # One softmax and one weighted mean: no error grows with T.
    ("attention_pool", torch.float32): 1e-5,
    ("attention_pool_backward", torch.float32): 5e-5,
    # L and c pass through T steps that each round once.
    ("prefix_pool", torch.float32): 5e-5,
    ("prefix_pool_backward", torch.float32): 1e-4,
    # What is returned is rounded, to 8 or 11 bits; sums and the state are not.
    **{(op, torch.bfloat16): 4e-3 for op in ("attention_pool", "prefix_pool")},
    **{(op, torch.float16): 5e-4 for op in ("attention_pool", "prefix_pool")},
    # The gradients are rounded, and before that read c, which was rounded, in dot products of up to 1000 terms.
    **{(f"{op}_backward", torch.bfloat16): 3e-2 for op in ("attention_pool", "prefix_pool")},
    **{(f"{op}_backward", torch.float16): 6e-3 for op in ("attention_pool", "prefix_pool")},
    # A sum over A, one softmax and one weighted mean.
    ("additive_attention", torch.float32): 1e-5,
    ("additive_attention_backward", torch.float32): 5e-5,
    # Computed in float32; what is returned is rounded, to 8 or 11 bits, and so are the gradients that come in.
    ("additive_attention", torch.bfloat16): 4e-3,
    ("additive_attention_backward", torch.bfloat16): 1.6e-2,
    ("additive_attention", torch.float16): 5e-4,
    ("additive_attention_backward", torch.float16): 2e-3,
    # A dot product, and sums over rows.
    ("linear", torch.float32): 2e-5,
    ("linear_backward", torch.float32): 5e-5,
    # A stack of the above.
    ("model", torch.float32): 1e-4,
    # float64 differs from the reference in the order of sums only.
    ("rnn", torch.float64): 1e-12,
    ("rnn_backward", torch.float64): 1e-11,
    ("gru", torch.float64): 1e-12,
    ("gru_backward", torch.float64): 1e-11,
    ("lstm", torch.float64): 1e-12,
    ("lstm_backward", torch.float64): 1e-11,
    ("attention_pool", torch.float64): 1e-13,
    ("attention_pool_backward", torch.float64): 1e-12,
    ("prefix_pool", torch.float64): 1e-12,
    ("prefix_pool_backward", torch.float64): 1e-11,
    ("additive_attention", torch.float64): 1e-13,
    ("additive_attention_backward", torch.float64): 1e-12,
    ("linear", torch.float64): 1e-13,
    ("linear_backward", torch.float64): 1e-12,
    ("model", torch.float64): 1e-11,
}
# Where the kernels of a device round more. In 16 bits those of CUDA read pre-activations, and multiply states and dz,
# that were rounded, as matrix units want them; in float16 an LSTM that forgets little adds up the errors of many steps.
TOLERANCE_ON = {
    "cuda": {
        **{(cell, torch.bfloat16): 2e-2 for cell in ("rnn", "gru", "lstm")},
        **{(cell, torch.float16): 2.5e-3 for cell in ("rnn", "gru", "lstm")},
        **{(f"{cell}_backward", torch.float16): 1e-2 for cell in ("rnn", "gru", "lstm")},
    }
}


def assert_close(
    op: str, actual: Tensor, expected: Tensor, what: str = "result", dtype: torch.dtype | None = None
) -> None:
    """Shapes agree and errors stay within the table's row for `op` and `dtype`, by default that of `actual`."""
    assert actual.shape == expected.shape, f"{op}: {what} is {list(actual.shape)}, not {list(expected.shape)}"
    if actual.numel() == 0:
        return
    a, b = actual.detach().double(), expected.detach().double()
    infinite = b.isinf()
    assert torch.equal(a[infinite], b[infinite]), f"{op}: {what} differs where {b[infinite]} is expected"
    a, b = a[~infinite], b[~infinite]
    assert a.isfinite().all(), f"{op}: {what} holds NaN or infinity"
    if a.numel() == 0:
        return
    error = (a - b).abs().max().item()
    row = op, dtype or actual.dtype
    tolerance = TOLERANCE_ON.get(actual.device.type, {}).get(row, TOLERANCE[row])
    allowed = tolerance * max(1.0, b.abs().max().item())
    assert error <= allowed, f"{op}: {what} is off by {error:.3g}, allowed {allowed:.3g}"


def supported_levels() -> list[str]:
    """The instruction levels up to the one in use."""
    levels = ["baseline", "avx2", "avx512", "avx512_bf16"]
    return levels[: levels.index(llm_ext.build_info()["simd"]) + 1]


def at_lower_levels(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for each level below the one in use; the level is chosen once in a process."""
    test = pytest.mark.parametrize("level", supported_levels()[:-1])(test)
    return pytest.mark.skipif("LLM_EXT_SIMD" in os.environ, reason="this is the run of one level")(test)


def run_tests_at(level: str, path: str, chosen: str) -> None:
    """Run the tests of a file whose names `chosen` selects, at a level."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", path, "-k", f"({chosen}) and not levels"],
        env=os.environ | {"LLM_EXT_SIMD": level},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def spread(tensor: Tensor) -> Tensor:
    """The same values in memory with holes (filled with NaN) and swapped strides: nothing is contiguous."""
    roomy = tensor.new_full([2 * size + 1 for size in reversed(tensor.shape)], float("nan"))
    view = roomy[tuple(slice(1, 2 * size + 1, 2) for size in reversed(tensor.shape))].permute(
        *reversed(range(tensor.dim()))
    )
    return view.copy_(tensor)


def batch_sizes_of(lengths: list[int]) -> Tensor:
    """How many of the sequences are longer than t, for each t."""
    return torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))], dtype=torch.int64)


def pack(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """The first batch_sizes[t] rows of each step of x [T, B, ...], one step after the other."""
    return torch.cat([step[:size] for step, size in zip(x, batch_sizes.tolist(), strict=True)])


def flatten(results: object) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flatten(part)]  # type: ignore[attr-defined]


def outputs_and_gradients(
    function: Callable[..., object],
    arguments: Mapping[str, Tensor | None],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name, of function(**arguments), under the same random weights in every call.

    With `dtype`, floating arguments are converted first. A gradient that does not exist counts as zero.
    """

    def prepare(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        # detach, not clone: the strides of the argument are part of the case.
        tensor = tensor.detach()
        return (tensor if dtype is None else tensor.to(dtype)).requires_grad_()

    prepared = {name: prepare(tensor) for name, tensor in arguments.items()}
    outputs = flatten(function(**prepared))
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        # The log-sum-exp of nothing is -inf, and has no part in a loss.
        loss = loss + (output * weights).masked_fill(output.isinf(), 0).sum()
    wanted = {name: t for name, t in prepared.items() if t is not None and t.requires_grad}
    if not loss.requires_grad:  # results of nothing need not depend on anything
        return outputs, {name: torch.zeros_like(t) for name, t in wanted.items()}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return outputs, dict(zip(wanted, gradients, strict=True))


def assert_same(
    op: str,
    function: Callable[..., object],
    truth: Callable[..., object],
    arguments: Mapping[str, Tensor | None],
) -> None:
    """Outputs and gradients of `function` agree with those of `truth` computed in float64."""
    outputs, gradients = outputs_and_gradients(function, arguments)
    true_outputs, true_gradients = outputs_and_gradients(truth, arguments, torch.float64)
    assert len(outputs) == len(true_outputs)
    for i, (output, true_output) in enumerate(zip(outputs, true_outputs, strict=True)):
        assert_close(op, output, true_output, f"output {i}")
    for name, gradient in gradients.items():
        assert_close(f"{op}_backward", gradient, true_gradients[name], f"gradient of {name}")
