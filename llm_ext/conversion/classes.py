"""Which class of llm_ext replaces a class of torch.nn, which modules it cannot replace, and the way back.

The instances of both have the same state, so a module is converted by the assignment of a class to it. Its parameters,
hooks and attributes, and every reference to it, stay as they are.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from llm_ext import _C
from llm_ext.conversion import strict
from llm_ext.nn import GRU, LSTM, RNN, GRUCell, Linear, LSTMCell, RNNCell

__all__ = ["CONVERTED", "assign_converted", "assign_original", "has_original", "is_converted", "reason_against"]

# The classes of torch.nn that are converted, and what they become.
CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
    nn.Linear: Linear,
}
# Those that are also subclasses of the classes of torch.nn.
_STRICT = CONVERTED | {nn.RNN: strict.RNN, nn.GRU: strict.GRU, nn.LSTM: strict.LSTM}
_ORIGINAL = {ours: theirs for table in (CONVERTED, _STRICT) for theirs, ours in table.items()}

# Methods that `forward` calls in torch.nn, but not in llm_ext.
_CALLED_BY_FORWARD = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


class _ConvertedSubclass:
    """Mixin of the classes that replace a user's subclass of a class of torch.nn; pickle finds them by the latter."""

    _original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # the user's class defines its own way
        _, (_, *arguments), *state = reduced
        return (_new, (self._original, *arguments), *state)


def _new(original: Any, *arguments: Any) -> Any:
    converted: Any = _converted_subclass(original)
    return converted.__new__(converted, *arguments)


@functools.cache
def _converted_subclass(original: Any) -> type[nn.Module]:
    """Return a subclass of `original` in which a class of llm_ext comes before that of torch.nn.

    Calls of ``super().forward`` find the class of llm_ext, and the module is still an instance of `original`.
    """
    bases = (original, _ConvertedSubclass, _STRICT[_torch_base(original)])
    names = {"_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return types.new_class(original.__name__, bases, exec_body=lambda namespace: namespace.update(names))


def _torch_base(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of torch.nn that `cls` is or derives from; raise StopIteration if there is none."""
    return next(base for base in cls.__mro__ if base in CONVERTED)


def is_converted(module: nn.Module) -> bool:
    """Return whether a module computes with llm_ext: it has been converted, or has been built so."""
    return isinstance(module, tuple(CONVERTED.values()))


def has_original(module: nn.Module) -> bool:
    """Return whether a module can become one of torch.nn: a subclass of a class of llm_ext by others cannot."""
    return _original_type(parametrize.type_before_parametrizations(module)) is not None


def _original_type(cls: type[nn.Module]) -> type[nn.Module] | None:
    return _ORIGINAL.get(cls, vars(cls).get("_original"))


def assign_converted(module: nn.Module, strict_types: bool) -> None:
    """Make a module one of llm_ext, if `reason_against` has no reason against it."""

    def converted(cls: Any) -> type[nn.Module]:
        return (_STRICT if strict_types else CONVERTED).get(cls) or _converted_subclass(cls)

    _assign(module, converted)


def assign_original(module: nn.Module) -> None:
    """Make a module of llm_ext the one of torch.nn that has the same parameters, if `has_original`."""
    _assign(module, lambda cls: _original_type(cls) or cls)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # as after each change of the parameters' memory


def _assign(module: nn.Module, replacement: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Replace the class of a module; of a parametrized module, the class before that."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        base = replacement(cls.__bases__[0])
        module.__class__ = type(f"Parametrized{base.__name__}", (base,), names)
    else:
        module.__class__ = replacement(cls)


def reason_against(module: nn.Module) -> str | None:
    """Return why a recurrent or linear module is not converted, or None if it can be."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if not isinstance(module, tuple(CONVERTED)):
        quantized = cls.__module__.startswith("torch.ao.")
        return "it is quantized" if quantized else "it derives from none of the layers and cells of torch.nn"
    if isinstance(module, LazyModuleMixin):
        return "its parameters are not initialized; call it once before"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    if "forward" in vars(module):
        return "its forward has been replaced"
    base: Any = _torch_base(cls)
    theirs = f"hides that of llm_ext.{CONVERTED[base].__name__}"
    hidden = _own_names(base) & vars(module).keys()
    if hidden:
        return f"its attribute {min(hidden)} {theirs}"
    for each in cls.__mro__:
        if issubclass(base, each):
            continue
        hidden = _own_names(base) & vars(each).keys()
        if hidden:
            return f"{min(hidden)} of {each.__name__} {theirs}"
        overridden = [name for name in _CALLED_BY_FORWARD if name in vars(each)]
        if overridden:
            return f"{each.__name__} overrides {overridden[0]}, which forward of torch.nn.{base.__name__} calls"
        if "forward" in vars(each) and not _calls_super(inspect.unwrap(vars(each)["forward"])):
            return f"forward of {each.__name__} does not call super().forward"
    subclass: Any = parametrize.type_before_parametrizations(module)
    if subclass not in CONVERTED:
        try:
            _converted_subclass(subclass)
        except TypeError as error:
            return f"no class can derive from it and from llm_ext: {error}"
    for tensor in module.parameters(recurse=False):
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"its parameters are of {type(tensor).__name__}; convert before sharding or quantizing"
        device = tensor.device.type
        if device not in ("cpu", "meta") and (device != "cuda" or _C.build_info()["cuda"] is None):
            return f"llm_ext was built without kernels for {device}"
    return None


@functools.cache
def _own_names(base: Any) -> frozenset[str]:
    """Return the attributes that a class of llm_ext has and that of torch.nn has not, but those of Generic."""
    own = {*dir(CONVERTED[base])}.difference(dir(base), dir(Generic))
    return frozenset(name for name in own if not name.startswith("__"))


def _calls_super(function: Any) -> bool:
    """Return whether the code of a function names ``super().forward``."""

    def names(code: types.CodeType) -> set[str]:
        inner = (names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
        return set(code.co_names).union(*inner)

    code = getattr(function, "__code__", None)
    return isinstance(code, types.CodeType) and {"super", "forward"} <= names(code)
