"""Fused recurrent layers, attention pooling and additive attention for PyTorch."""

from __future__ import annotations

from importlib.metadata import version
from typing import TypedDict, cast

import torch  # noqa: F401  (its libraries must be loaded before the module that calls them)

from llm_ext._C import build_info as _build_info
from llm_ext._C import cached_bytes as _cached_bytes
from llm_ext._C import empty_cache as _empty_cache
from llm_ext._C import forget_weights as _forget_weights
from llm_ext._C import remembered_bytes as _remembered_bytes
from llm_ext.attention import AdditiveAttention, AttentionPool
from llm_ext.layers import GRU, LSTM, RNN, GRUCell, Linear, LSTMCell, RNNCell
from llm_ext.model import LLM, LLMState
from llm_ext.seq2seq import Hypothesis, Memory, Seq2Seq, Seq2SeqState

__version__ = version("llm_ext")

__all__ = [
    "GRU",
    "LLM",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionPool",
    "GRUCell",
    "Hypothesis",
    "LLMState",
    "LSTMCell",
    "Linear",
    "Memory",
    "RNNCell",
    "Seq2Seq",
    "Seq2SeqState",
    "build_info",
    "cached_bytes",
    "empty_cache",
    "forget_weights",
    "remembered_bytes",
]


class BuildInfo(TypedDict):
    """What the compiled module was built with, and what it uses here."""

    compiler: str
    torch: str
    cuda: str | None
    openmp: bool
    simd: str


def build_info() -> BuildInfo:
    """Say what the compiled module was built with: compiler, torch, CUDA (None: without), OpenMP, SIMD level in use.

    Raises:
        RuntimeError: LLM_EXT_SIMD names a level that does not exist or that this machine lacks.
    """
    return cast(BuildInfo, _build_info())


def remembered_bytes() -> int:
    """Bytes of weights that are remembered in the form the kernels want them, at most 256 MiB.

    Weights that were packed twice without a change are remembered, so that evaluation packs them no more. They are
    known by their contents: a change of any kind is noticed in the next call.
    """
    return _remembered_bytes()


def forget_weights() -> None:
    """Free the memory of `remembered_bytes`."""
    _forget_weights()


def cached_bytes() -> int:
    """Bytes of memory on the CPU that large results have left and that wait for the next ones, at most 512 MiB.

    Results of 4 MB and more have their memory from here, because fresh memory is slow at its first use.
    """
    return _cached_bytes()


def empty_cache() -> None:
    """Give the memory of `cached_bytes` back to the system."""
    _empty_cache()
