"""A language model that keeps its state between calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from llm_ext.models import LLM, LLMState

__all__ = ["StatefulLLM"]


class StatefulLLM(nn.Module):
    """Reads streams chunk by chunk: each call continues from the state of the previous one, detached from its graph.

    The module stores the state because Lightning Fabric casts the arguments of a module to the precision of the
    training.

    Args:
        model: The language model.

    Attributes:
        state: State after the last call; None before the first chunk.
    """

    def __init__(self, model: LLM) -> None:
        super().__init__()
        self.model = model
        self.state: LLMState | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [B, T, V] of the tokens that follow the next ids x [B, T] of B streams."""
        scores: Tensor
        scores, state = self.model(x, self.state)
        self.state = state.detach()
        return scores

    @contextlib.contextmanager
    def fresh_state(self) -> Iterator[None]:
        """Read other streams from their beginning; restore the current state on exit."""
        state, self.state = self.state, None
        try:
            yield
        finally:
            self.state = state
