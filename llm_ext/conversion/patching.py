"""Conversion of layers while other code builds them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import nn

from llm_ext.conversion.classes import CONVERTED, assign_converted, is_converted, reason_against

__all__ = ["patched"]


class _Options(NamedTuple):
    linear: bool
    strict_types: bool


_requested: ContextVar[_Options | None] = ContextVar("requested", default=None)

# The methods after which a module is complete: the constructor, and what pickle and copy call.
_METHODS = ("__init__", "__setstate__")
_lock = threading.Lock()
_contexts = 0  # contexts that are open, in all threads
_undo: list[Callable[[], None]] = []


@contextmanager
def patched(*, linear: bool = False, strict_types: bool = True) -> Iterator[None]:
    """Make the layers and cells that are built inside a ``with`` block those of llm_ext.

    For code that builds its layers itself: ``torch.nn.LSTM(...)`` and the like give what :func:`convert` makes of them,
    under whatever name the class was imported, and also if it is a subclass. The same holds for modules that are
    unpickled or copied inside. Only the thread that enters the block is affected. Layers that are not convertible are
    built as always.

    Args:
        linear: As in :func:`convert`.
        strict_types: As in :func:`convert`, but the default is True, because other code may check for the classes of
            torch.nn.

    Example:
        >>> with llm_ext.patched():
        ...     layer = torch.nn.LSTM(10, 20)
        >>> isinstance(layer, llm_ext.LSTM)
        True
    """
    _open()
    token = _requested.set(_Options(linear, strict_types))
    try:
        yield
    finally:
        _requested.reset(token)
        _close()


def _open() -> None:
    """Replace the methods of torch.nn, unless another context has."""
    global _contexts
    with _lock:
        if _contexts == 0:
            _undo.extend(_replace(cls, name) for cls in CONVERTED for name in _METHODS)
        _contexts += 1


def _close() -> None:
    """Put the methods of torch.nn back, if this was the last context."""
    global _contexts
    with _lock:
        _contexts -= 1
        if _contexts == 0:
            while _undo:
                _undo.pop()()


def _replace(cls: type[nn.Module], name: str) -> Callable[[], None]:
    """Make a method of `cls` convert the module that it has completed; return the function that undoes it."""
    own, original = vars(cls).get(name), getattr(cls, name)

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        options = _requested.get()
        if options is None or is_converted(self) or (cls is nn.Linear and not options.linear):
            return
        if reason_against(self) is None:
            assign_converted(self, options.strict_types)

    def undo() -> None:
        if vars(cls).get(name) is not method:
            return  # others have replaced it since; outside of a context `method` does nothing of its own
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)

    setattr(cls, name, method)
    return undo
