"""Fused recurrent layers and attention pooling for PyTorch."""

from llm_ext.attention import AttentionPool
from llm_ext.layers import RNN
from llm_ext.model import LLM, LLMState

__version__ = "0.1.0"

__all__ = ["LLM", "RNN", "AttentionPool", "LLMState"]
