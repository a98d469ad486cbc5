"""The public API: names, signatures, and docstrings with examples."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch

import llm_ext
from llm_ext import models, nn, ops, reference

LAYERS = {
    "RNN",
    "GRU",
    "LSTM",
    "RNNCell",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "AttentionPool",
    "AdditiveAttention",
}
FUNCTIONS = {
    "rnn",
    "gru",
    "lstm",
    "multilayer_rnn",
    "linear",
    "linear_argmax",
    "attention_pool",
    "prefix_pool",
    "additive_attention",
    "attention_step",
}
MODELS = {
    "LLM",
    "LLMState",
    "Seq2Seq",
    "Seq2SeqState",
    "EncoderOutput",
    "BeamHypothesis",
    "SequenceClassifier",
    "ClassifierOutput",
}
CONVERSION = {"Convertible", "convert", "convertible", "patched", "revert", "to_torch"}
QUANTIZATION = {"Quantized", "quantize_", "dequantize_", "fake_quantize_"}
QUANTIZED = {
    f"Quantized{name}" for name in (*sorted(LAYERS - {"AttentionPool", "AdditiveAttention"}), "AffineEmbedding")
}
MEMORY = {"packed_weight_cache_bytes", "clear_packed_weight_cache", "cpu_cache_bytes", "empty_cpu_cache"}
PUBLIC = {
    "llm_ext": LAYERS
    | MODELS
    | CONVERSION
    | QUANTIZATION
    | MEMORY
    | {"ArgumentError", "BuildInfo", "build_info", "ops", "reference", "nn", "models"},
    "llm_ext.nn": LAYERS | QUANTIZED | {"AffineEmbedding"},
    "llm_ext.models": MODELS | {"InputProjections", "sample"},
    "llm_ext.ops": FUNCTIONS,
    "llm_ext.reference": FUNCTIONS,
}
every_module = pytest.mark.parametrize("name", PUBLIC)


def documented() -> list[tuple[str, object]]:
    """Public classes and functions, and the public methods that llm_ext itself defines."""
    found: dict[str, object] = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                continue
            found[f"{module_name}.{name}"] = value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if not method.startswith("_") and inspect.isfunction(function) and method != "extra_repr":
                        found[f"{module_name}.{name}.{method}"] = function
    return list(found.items())


@every_module
def test_names(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    assert all(hasattr(module, public) for public in module.__all__)


@every_module
def test_nothing_is_public_by_accident(name: str) -> None:
    """A name outside __all__ begins with an underscore, or is a submodule."""
    module = importlib.import_module(name)
    submodules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    accidental = {
        attribute
        for attribute in vars(module)
        if not attribute.startswith("_") and attribute not in module.__all__ and attribute not in submodules
    }
    assert accidental <= {"annotations"}


def public_modules() -> list[str]:
    return [
        info.name
        for package in (ops, reference, nn, models, llm_ext.conversion)
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not info.name.split(".")[-1].startswith("_")
    ]


@pytest.mark.parametrize("name", public_modules())
def test_modules_say_what_is_public(name: str) -> None:
    """A module that holds a public function or class lists it in __all__."""
    module = importlib.import_module(name)
    package = importlib.import_module(name.rpartition(".")[0])
    exported = {
        public
        for public in package.__all__
        if getattr(getattr(package, public), "__module__", None) == name and hasattr(module, public)
    }
    assert not exported or exported <= set(getattr(module, "__all__", [])), f"{name}.__all__ lacks {exported}"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_reference_has_the_signatures_of_ops(name: str) -> None:
    def parameters(module: ModuleType) -> list[tuple[str, object, object]]:
        signature = inspect.signature(getattr(module, name))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(ops) == parameters(reference)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "Linear"])
def test_layers_take_the_arguments_of_torch_nn(name: str) -> None:
    """Same names, order and defaults; torch's layers take most of them through **kwargs."""
    ours = inspect.signature(getattr(llm_ext, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    named = [p for p in theirs.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in named:
        if parameter.name != "mode":
            assert ours[parameter.name].default == parameter.default
    for attribute in getattr(torch.nn, name).__constants__:
        if attribute in inspect.signature(getattr(torch.nn, name).__init__).parameters:
            assert attribute in ours


@pytest.mark.parametrize(("name", "value"), documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_docstrings(name: str, value: object) -> None:
    """Every public name has one; layers, models and ops have an example."""
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    if inspect.isclass(value) and issubclass(value, torch.nn.Module):
        assert value.__doc__, f"{name} inherits its docstring"
        assert "Example" in text, f"{name} has no example"
        assert ">>>" in text, f"{name} has no example that runs"
    if name.startswith("llm_ext.ops."):
        assert ">>>" in text, f"{name} has no example"


def test_version_and_build_info() -> None:
    assert llm_ext.__version__
    info = llm_ext.build_info()
    assert set(info) == {"compiler", "torch", "cuda", "openmp", "isa"}
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]


def test_argument_error_is_what_torch_raises() -> None:
    """Handlers for torch.nn's errors catch it."""
    assert issubclass(llm_ext.ArgumentError, ValueError)
    assert issubclass(llm_ext.ArgumentError, RuntimeError)
