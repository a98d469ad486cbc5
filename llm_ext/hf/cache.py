"""The state of a recurrent model as the cache that transformers passes from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import Tensor
from transformers import Cache

from llm_ext.models import LLMState, Seq2SeqState

__all__ = ["RecurrentCache", "map_rows", "state_of"]

State = LLMState | Seq2SeqState
Kind = TypeVar("Kind", LLMState, Seq2SeqState)


def map_rows(state: State, change: Callable[[Tensor, int], Tensor]) -> State:
    """Return a state with ``change(tensor, d)`` in place of each tensor, whose rows are in dimension d."""
    hidden, cell = change(state.hidden, 1), None if state.cell is None else change(state.cell, 1)
    if isinstance(state, Seq2SeqState):
        return Seq2SeqState(hidden, cell, None if state.fed is None else change(state.fed, 0))
    attention = None if state.attention is None else (change(state.attention[0], 0), change(state.attention[1], 0))
    return LLMState(hidden, attention, cell)


class RecurrentCache(Cache):
    """State of a recurrent model for `transformers`: a fixed size, however long the text is.

    Args:
        state: State after a text, such as that of `LLM.condition`; None at its start.
        length: Number of tokens that transformers has passed to the model.

    Attributes:
        state: The state after `length` tokens, an `LLMState` or a `Seq2SeqState`; None at the start of a text.

    Example:
        >>> model = llm_ext.hf.LLMForCausalLM(llm_ext.hf.LLMConfig(vocab_size=50, embedding_dim=8, hidden_dim=16))
        >>> cache = llm_ext.hf.RecurrentCache()
        >>> scores = model(torch.randint(50, (2, 7)), cache=cache).logits
        >>> cache.get_seq_length(), cache.state.hidden.shape
        (7, torch.Size([1, 2, 16]))
    """

    def __init__(self, state: State | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.length = state, length

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.hidden)

    def __repr__(self) -> str:
        return f"RecurrentCache(length={self.length})"

    def advance(self, state: State, tokens: int) -> RecurrentCache:
        """Replace the state by that after `tokens` more tokens, and return the cache."""
        self.state, self.length = state, self.length + tokens
        return self

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that the model has read."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Return to the start of a text."""
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row n by the row ``beam_idx[n]`` for every n."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.state is not None:
            self.state = map_rows(self.state, lambda tensor, d: tensor.index_select(d, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in succession."""
        if self.state is not None:
            self.state = map_rows(self.state, lambda tensor, d: tensor.repeat_interleave(repeats, d))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise: a recurrence cannot forget its last tokens.

        Raises:
            ValueError: Always.
        """
        raise ValueError("RecurrentCache: a recurrent state cannot go back to an earlier token")

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` is possible: no."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Whether the length is unknown, as in linear attention: no."""
        return [False]


def state_of(cache: Any, kind: type[Kind]) -> Kind | None:
    """Return the state of a cache, or None at the start of a text.

    Raises:
        TypeError: The cache is not a `RecurrentCache`, or not that of a model with states of this kind.
    """
    if cache is None:
        return None
    if not isinstance(cache, RecurrentCache):
        raise TypeError(f"cache must be a RecurrentCache, got {type(cache).__name__}")
    if cache.state is not None and not isinstance(cache.state, kind):
        raise TypeError(f"cache must hold the state of this model, {kind.__name__}, got {type(cache.state).__name__}")
    return cache.state
