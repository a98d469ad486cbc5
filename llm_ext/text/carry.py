"""A model that is fed a text in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from llm_ext.model import LLM, LLMState


class Carrier(nn.Module):
    """Carries the state of a model from one piece of the streams to the next, cut off from the gradient.

    The state stays in here because Fabric rounds what is handed to a module to the precision of the training.

    Args:
        model: which reads the streams.
    """

    def __init__(self, model: LLM) -> None:
        super().__init__()
        self.model = model
        self.state: LLMState | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [B, T, V] of what follows each of the next ids x [B, T] of B streams."""
        scores: Tensor
        scores, state = self.model(x, self.state)
        self.state = state.detach()
        return scores

    @contextlib.contextmanager
    def afresh(self) -> Iterator[None]:
        """Read other streams, from their beginning, and then go on with those of before."""
        state, self.state = self.state, None
        try:
            yield
        finally:
            self.state = state
