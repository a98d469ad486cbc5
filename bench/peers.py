"""The libraries llm_ext is compared with. Each is imported only when it takes part."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cells import Cell
from bench.timing import Call

__all__ = [
    "CPU_LIBRARIES",
    "CUDA_LIBRARIES",
    "aot_inductor_call",
    "flashrnn_call",
    "haste_layer",
    "jax_pool",
    "jax_scan",
    "libraries",
    "model_versions",
    "not_installed",
    "onnx_model",
    "onnxruntime_call",
    "opacus_gradients",
    "openvino_call",
    "private_step",
    "quantized_onnx_model",
    "set_environment",
    "versions",
]

# By word of --peers, the modules it needs.
CPU_LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "compile": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "jax": ("jax", "jaxlib"),
    "opacus": ("opacus",),
}
# Packages whose models are cases: the extra `models`, without what these need.
MODEL_PACKAGES = (
    "asteroid",
    "demucs",
    "gluonts",
    "openunmix",
    "python-doctr",
    "pytorch-forecasting",
    "sb3-contrib",
    "speechbrain",
    "stanza",
    "torch-geometric",
    "torchaudio",
    "torchrl",
    "transformers",
)
CUDA_LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "compile": ("torch",),
    "haste": ("haste_pytorch",),
    "flashrnn": ("flashrnn",),
}


def libraries(device: str) -> dict[str, tuple[str, ...]]:
    """Return the words of --peers for a device, and the modules each needs."""
    return CUDA_LIBRARIES if device == "cuda" else CPU_LIBRARIES


def not_installed(device: str) -> list[str]:
    """Return the words of --peers whose modules are not installed."""
    return [word for word, names in libraries(device).items() if not all(map(importlib.util.find_spec, names))]


def versions(device: str) -> dict[str, str | None]:
    """Return the version of each module that a library needs, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in sorted({name for modules in libraries(device).values() for name in modules}):
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return found


def model_versions() -> dict[str, str]:
    """Return the version of each package whose models are cases, if it is installed."""
    found = {}
    for name in MODEL_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def set_environment(threads: int) -> None:
    """Set the environment variables that the libraries read when they are imported."""
    # XLA takes the size of its CPU thread pool from NPROC alone; it holds for the whole process.
    os.environ["NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


def onnx_model(cell: Cell, layer: Any, T: int, B: int, lengths: Sequence[int] | None = None) -> bytes:
    """Return an ONNX model of a torch layer of one layer with bias.

    Its inputs are x [T, B, I] and the initial state, [1, B, H] each; its outputs y [T, B, H] and the final state.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def gates(parameter: Tensor) -> Tensor:
        blocks = parameter.detach().chunk(cell.gates)
        return torch.cat([blocks[index] for index in cell.onnx_gates])

    w_ih, w_hh, b_ih, b_hh = map(gates, layer.parameters())
    weights = {"W": w_ih, "R": w_hh, "B": torch.cat((b_ih, b_hh))}
    constants = [numpy_helper.from_array(value[None].numpy(), name) for name, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1]), "direction"))
    if lengths is not None:
        constants.append(numpy_helper.from_array(np.array(lengths, dtype=np.int32), "lengths"))
    element = TensorProto.DOUBLE if w_ih.dtype == torch.float64 else TensorProto.FLOAT
    I, H = layer.input_size, layer.hidden_size  # noqa: E741
    first, last = [f"{letter}0" for letter in cell.state], [f"{letter}_n" for letter in cell.state]
    graph = helper.make_graph(
        [
            helper.make_node(
                cell.name,
                ["x", "W", "R", "B", "" if lengths is None else "lengths", *first],
                ["y_per_direction", *last],
                hidden_size=H,
                **cell.onnx_options,
            ),
            helper.make_node("Squeeze", ["y_per_direction", "direction"], ["y"]),
        ],
        cell.name,
        [
            helper.make_tensor_value_info("x", element, [T, B, I]),
            *(helper.make_tensor_value_info(name, element, [1, B, H]) for name in first),
        ],
        [
            helper.make_tensor_value_info("y", element, [T, B, H]),
            *(helper.make_tensor_value_info(name, element, [1, B, H]) for name in last),
        ],
        constants,
    )
    # Versions that all recent releases read.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def quantized_onnx_model(model: bytes) -> bytes:
    """Return an ONNX model with the weights of its LSTM in int8, by ONNX Runtime's dynamic quantization.

    Weights have 7 bits: with 8, its sums saturate on machines without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="llm_ext-bench-") as folder:
        path = Path(folder, "model.onnx")
        options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(onnx.load_from_string(model), path, ["LSTM"], **options)
        return path.read_bytes()


def onnxruntime_call(model: bytes, feed: Sequence[Tensor], threads: int) -> Call:
    """Return a call that runs an ONNX model on ONNX Runtime with the inputs `feed`, in order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    named = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), feed, strict=True)}
    return lambda: session.run(None, named)


def openvino_call(model: bytes, feed: Sequence[Tensor], threads: int) -> Call:
    """Return a call that runs an ONNX model on OpenVINO with the inputs `feed`, in order."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model, b""),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # By default OpenVINO computes in bfloat16 where the machine supports it.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    numbered = {i: value.numpy() for i, value in enumerate(feed)}
    outputs = compiled.outputs

    def call() -> list[Any]:
        result = request.infer(numbered, share_inputs=True, share_outputs=True)
        return [result[output] for output in outputs]

    return call


def aot_inductor_call(layer: Any, x: Tensor, hx: tuple[Tensor, ...]) -> Call:
    """Return a call of a torch layer that torch.export and AOTInductor have compiled with frozen weights."""
    inductor: Any = importlib.import_module("torch._inductor")
    with tempfile.TemporaryDirectory(prefix="llm_ext-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's layers assign attributes when they are exported
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(layer, (x.clone(), tuple(map(torch.clone, hx))))
            path = inductor.aoti_compile_and_package(
                exported, package_path=f"{folder}/layer.pt2", inductor_configs={"freezing": True}
            )
            compiled = inductor.aoti_load_package(path)
    return lambda: compiled(x, hx)


def _jax(dtype: torch.dtype) -> Any:
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", dtype == torch.float64)
    return jax


def jax_scan(cell: Cell, layer: Any, x: Tensor, g: Tensor | None) -> Call:
    """Return a jitted `lax.scan` with the weights of a torch layer with bias; given g, the gradient of y, training."""
    jax = _jax(x.dtype)
    weights = [jax.numpy.asarray(parameter.detach().numpy()) for parameter in layer.parameters()]
    start = tuple(jax.numpy.zeros((x.shape[1], layer.hidden_size), weights[0].dtype) for _ in cell.state)

    def forward(x: Any, *weights: Any) -> tuple[Any, ...]:
        last = []
        for i in range(0, len(weights), 4):
            w_ih, w_hh, b_ih, b_hh = weights[i : i + 4]
            bias, gates = cell.jax(jax, b_ih, b_hh)

            def step(state: Any, wx: Any, w_hh: Any = w_hh, gates: Any = gates) -> tuple[Any, Any]:
                state = gates(wx, state[0] @ w_hh.T, *state)
                return state, state[0]

            state, x = jax.lax.scan(step, start, x @ w_ih.T + bias)
            last.append(state)
        return x, *(jax.numpy.stack(layers) for layers in zip(*last, strict=True))

    return _jax_call(jax, forward, x, weights, g)


def jax_pool(causal: bool, e: Tensor, weight: Tensor, v: Tensor, g: Tensor | None) -> Call:
    """Return jitted pooling with u = Wᵀ v or, if causal, prefix pooling by cumulative sums; given g, training."""
    jax = _jax(e.dtype)
    jnp = jax.numpy

    def folded(e: Any, weight: Any, v: Any) -> tuple[Any]:
        return (jnp.einsum("bt,btd->bd", jax.nn.softmax(e @ (v @ weight), 1), e),)

    def cumsum(e: Any, weight: Any, v: Any) -> tuple[Any]:
        s = e @ (v @ weight)
        p = jnp.exp(s - s.max(1, keepdims=True))[..., None]
        return ((p * e).cumsum(1) / p.cumsum(1),)

    weights = [jnp.asarray(parameter.detach().numpy()) for parameter in (weight, v)]
    return _jax_call(jax, cumsum if causal else folded, e, weights, g)


def _jax_call(
    jax: Any, forward: Callable[..., tuple[Any, ...]], x: Tensor, weights: list[Any], g: Tensor | None
) -> Call:
    """Compile forward(x, *weights); given g, its first result and the gradients of all its arguments."""
    inputs = [jax.numpy.asarray(x.detach().numpy()), *weights]
    if g is None:
        run = jax.jit(forward)
    else:
        upstream = jax.numpy.asarray(g.numpy())

        def train(*inputs: Any) -> tuple[Any, ...]:
            y, pull = jax.vjp(lambda *inputs: forward(*inputs)[0], *inputs)
            return y, *pull(upstream)

        run = jax.jit(train)
    return lambda: jax.block_until_ready(run(*inputs))


SampleLoss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def _with_dplstm(model: Any) -> tuple[Any, list[Any]]:
    """Return a model of the parts embedding, lstm and head with Opacus's LSTM instead, and its parameters."""
    opacus = importlib.import_module("opacus")
    layer = model.lstm
    dp = opacus.layers.DPLSTM(layer.input_size, layer.hidden_size, batch_first=True)
    dp.load_state_dict(layer.state_dict())
    embedding, head = copy.deepcopy(model.embedding), copy.deepcopy(model.head)
    weights = [embedding.weight, dp.l0.ih.weight, dp.l0.hh.weight, dp.l0.ih.bias, dp.l0.hh.bias, *head.parameters()]
    return type(model)(embedding, dp.to(next(layer.parameters()).dtype), head), weights


def opacus_gradients(model: Any, ids: Tensor, target: Tensor, loss: SampleLoss) -> Call:
    """Return Opacus's call for the gradients of each sample of a model with the parts embedding, lstm and head."""
    opacus = importlib.import_module("opacus")
    other, weights = _with_dplstm(model)
    wrapped = opacus.GradSampleModule(other, loss_reduction="sum")

    def call() -> list[Tensor]:
        wrapped.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(wrapped, ids, target))
        return [weight.grad_sample for weight in weights]

    return call


def private_step(model: Any, ids: Tensor, target: Tensor, loss: SampleLoss, max_norm: float, dplstm: bool) -> Call:
    """Return Opacus's step of private training, with its own LSTM or with the layers of llm_ext as they are.

    It returns the sum of the clipped gradients. The noise, which costs both the same, and the learning rate are 0.
    """
    opacus = importlib.import_module("opacus")
    importlib.import_module("llm_ext.privacy")
    own = copy.deepcopy(model)
    other, weights = _with_dplstm(model) if dplstm else (own, list(own.parameters()))
    wrapped = opacus.GradSampleModule(other, loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(weights, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=max_norm,
        expected_batch_size=len(ids),
        loss_reduction="sum",
    )

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(wrapped, ids, target))
        optimizer.step()
        return [weight.grad for weight in weights]

    return call


def haste_layer(cell: Cell, layer: Any) -> Any:
    """Return Haste's layer in float32 with the weights of a torch layer of one layer and direction."""
    haste = importlib.import_module("haste_pytorch")
    other = getattr(haste, cell.name)(layer.input_size, layer.hidden_size).cuda()
    other.from_native_weights(*layer.parameters())
    return other


def flashrnn_call(cell: Cell, layer: Any, x: Tensor) -> Call:
    """Return FlashRNN's inference call for a torch LSTM of one layer and direction; W x + b is computed beforehand."""
    flashrnn = importlib.import_module("flashrnn").flashrnn
    B, H = x.shape[1], layer.hidden_size
    w_ih, w_hh, b_ih, b_hh = (parameter.detach() for parameter in layer.parameters())
    wx = torch.nn.functional.linear(x, w_ih).transpose(0, 1).reshape(B, len(x), cell.gates, 1, H).contiguous()
    r = w_hh.view(cell.gates, H, H).transpose(1, 2).reshape(cell.gates, 1, H, H).contiguous()
    b = (b_ih + b_hh).view(cell.gates, 1, H)
    name = str(x.dtype).removeprefix("torch.")

    def call() -> Tensor:
        states, _ = flashrnn(wx, r, b, function=cell.name.lower(), backend="cuda_fused", dtype=name)
        y: Tensor = states[0].reshape(B, len(x), H).transpose(0, 1)
        return y

    return call
