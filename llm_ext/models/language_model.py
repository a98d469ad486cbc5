"""Recurrent language model with causal attention, and generation of text with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from llm_ext.models.argument_checks import (
    check_cell,
    check_dropout,
    check_id_dtype,
    check_ids,
    check_lengths,
    check_sequence,
    check_state,
)
from llm_ext.models.bypass import keeps_samples_apart, may_bypass
from llm_ext.models.initialization import init_recurrent_
from llm_ext.models.recurrent_layers import call_recurrent, fill_padding, join_state, recurrent_layer, split_state
from llm_ext.models.sampling import check_sampling, sample
from llm_ext.nn import AffineEmbedding, AttentionPool, Linear
from llm_ext.nn.arguments import as_size
from llm_ext.nn.scripting import refuse_script

__all__ = ["LLM", "LLMState"]

Embedding = Callable[..., Tensor]
Pool = Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]


class LLMState(NamedTuple):
    """State of an `LLM` after a prefix of a text.

    Attributes:
        hidden: Hidden state of each layer, ``[L, B, H]``.
        attention: State ``(L [B, 2], c [B, D])`` of the causal pool, in float32 for a model in 16 bits; None without
            attention.
        cell: Cell state of each layer, ``[L, B, H]``; None unless the cell is "lstm".
    """

    hidden: Tensor
    attention: tuple[Tensor, Tensor] | None
    cell: Tensor | None = None

    def detach(self) -> LLMState:
        """Return the state detached from its graph, for truncated backpropagation through time."""
        attention = None if self.attention is None else (self.attention[0].detach(), self.attention[1].detach())
        return LLMState(self.hidden.detach(), attention, None if self.cell is None else self.cell.detach())


def _check_is_state(op: str, state: object) -> None:
    """Raise unless a state is an LLMState or None."""
    if state is not None and not isinstance(state, LLMState):
        raise TypeError(f"{op}: state must be an LLMState, got {type(state).__name__}")


class LLM(nn.Module):
    """Recurrent language model: an embedding, recurrent layers, causal attention and an affine head.

    For token ids x, position t has the embedding e_t, the output h_t of the last recurrent layer, and the scores y_t::

        e_t = W_e[x_t] + b_e
        h_t = RNN(e_t, h_{t-1})
        c_t = Σ_{i ≤ t} α_ti h_i            with attention="embedding": Σ_{i ≤ t} α_ti e_i
        y_t = W [h_t ; c_t] + b             with attention="none":      W h_t + b

    α are the causal softmax weights of `AttentionPool`. The state has a fixed size: to continue a text takes one step
    per token, however long the text is.

    With `feature_dim` the model can describe something else than text: `condition` reads feature vectors f, such as
    those of an image or of speech, as it reads tokens, with ``W_f f + b_f`` as their embeddings, and returns the state
    from which the text begins.

    Args:
        vocab_size: V, number of token ids.
        embedding_dim: E, size of the embeddings.
        hidden_dim: H, size of the hidden states.
        output_dim: O, size of the output; V for next-token scores.
        n_layers: Number of recurrent layers.
        dropout: Probability of dropping a feature between recurrent layers and before the head, in training mode.
            Before the head, a row drops the same features at all positions (arXiv 1512.05287).
        cell: Recurrent cell: "rnn" (Elman), "gru" or "lstm". Default: "rnn".
        nonlinearity: Nonlinearity of the cell "rnn": "tanh", "relu" or "sigmoid". Default: "tanh".
        attention: Vectors to pool: "hidden" states, "embedding"s, or "none" for no attention. Default: "hidden".
        attn_dim: A, size of the attention space. Default: the size of the pooled vectors, at most 128.
        score: "linear" or "tanh", see `AttentionPool`. Default: "linear".
        feature_dim: F, size of the feature vectors that `condition` reads; None for a model of text alone. Default:
            None.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: A size, probability or name is out of range.

    Shape:
        - Input: ids ``[B, T]``, int64 or int32, and the state after the text before them or None.
        - Output: scores ``[B, T, O]``, and the state after the ids.

    Attributes:
        embedding: The `AffineEmbedding`.
        projection: The `Linear` map of feature vectors to embeddings; None without `feature_dim`.
        rnn: The `RNN`, `GRU` or `LSTM`.
        pool: The causal `AttentionPool`, or None.
        dropout: Dropout before the head.
        head: The `Linear` map to the output.

    Example:
        >>> model = llm_ext.LLM(100, embedding_dim=16, hidden_dim=32, output_dim=100, n_layers=2, dropout=0.1)
        >>> ids = torch.randint(100, (4, 25))
        >>> scores, state = model(ids[:, :-1])
        >>> scores.shape
        torch.Size([4, 24, 100])
        >>> torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten()).backward()
        >>> model.eval().generate(ids[:, :5], max_new_tokens=20, top_p=0.9).shape
        torch.Size([4, 25])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        output_dim: int,
        n_layers: int,
        dropout: float,
        *,
        cell: str = "rnn",
        nonlinearity: str = "tanh",
        attention: str = "hidden",
        attn_dim: int | None = None,
        score: str = "linear",
        feature_dim: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        vocab_size, output_dim = as_size("LLM", "vocab_size", vocab_size), as_size("LLM", "output_dim", output_dim)
        embedding_dim = as_size("LLM", "embedding_dim", embedding_dim)
        hidden_dim, n_layers = as_size("LLM", "hidden_dim", hidden_dim), as_size("LLM", "n_layers", n_layers)
        check_dropout("LLM", dropout)
        check_cell("LLM", cell)
        if attention not in ("hidden", "embedding", "none"):
            raise ValueError(f"LLM: attention must be one of hidden, embedding, none, got {attention!r}")
        pooled_dim = {"hidden": hidden_dim, "embedding": embedding_dim, "none": 0}[attention]
        least = 0 if attention == "none" else 1
        attn_dim = min(pooled_dim, 128) if attn_dim is None else as_size("LLM", "attn_dim", attn_dim, least)
        feature_dim = None if feature_dim is None else as_size("LLM", "feature_dim", feature_dim)
        self._config: dict[str, int | float | str | None] = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "output_dim": output_dim,
            "n_layers": n_layers,
            "dropout": float(dropout),
            "cell": cell,
            "nonlinearity": nonlinearity,
            "attention": attention,
            "attn_dim": attn_dim,
            "score": score,
            "feature_dim": feature_dim,
        }
        self.vocab_size = vocab_size
        self.attention = attention
        self.embedding = AffineEmbedding(vocab_size, embedding_dim, device=device, dtype=dtype)
        self.projection = (
            None if feature_dim is None else Linear(feature_dim, embedding_dim, device=device, dtype=dtype)
        )
        between = dropout if n_layers > 1 else 0.0
        self.rnn = recurrent_layer(cell, nonlinearity)(
            embedding_dim, hidden_dim, n_layers, dropout=between, device=device, dtype=dtype
        )
        self.pool = (
            None
            if attention == "none"
            else AttentionPool(pooled_dim, attn_dim, score, causal=True, device=device, dtype=dtype)
        )
        self.dropout = nn.Dropout1d(dropout)
        self.head = Linear(hidden_dim + pooled_dim, output_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every layer, with orthogonal U and zero biases; the forget gates of an LSTM get a bias of 1."""
        for module in (self.embedding, self.projection, self.rnn, self.pool, self.head):
            if module is not None:
                module.reset_parameters()
        init_recurrent_(self.rnn)
        nn.init.zeros_(self.head.bias)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def config(self) -> dict[str, int | float | str | None]:
        """Return the constructor's arguments without `device` and `dtype`, as JSON types, for ``LLM(**config)``."""
        return dict(self._config)

    def forward(self, x: Tensor, state: LLMState | None = None) -> tuple[Tensor, LLMState]:
        """Score the tokens that follow each prefix of x.

        Args:
            x: Token ids, ``[B, T]`` int64 or int32.
            state: State after the text before x, from an earlier call; None at the start of a text.

        Returns:
            Scores ``[B, T, O]``, and the state after x. A text fed in pieces gets the scores of the whole text.

        Raises:
            ValueError: A shape does not fit.
            TypeError: x is not int64 or int32, or the state is that of another model.
            IndexError: A token id is outside 0 .. V - 1.
        """
        check_ids("LLM", "x", x, "B, T")
        _check_is_state("LLM", state)
        try:
            apart = keeps_samples_apart(self)  # looking up ids in time order is faster
            embedded = self.embedding(x).transpose(0, 1) if apart else self.embedding(x.t())
            features, after = self._read(embedded, state, self.pool)
        except (RuntimeError, TypeError, AttributeError):
            if state is not None:
                check_state("LLM", self.rnn, state.hidden, state.cell, x.shape[0])
            raise
        return self._scores(features), after

    def condition(self, features: Tensor, lengths: Tensor | None = None) -> LLMState:
        """Read feature vectors, and return the state from which `forward` and `generate` continue with text.

        Args:
            features: One vector ``[B, F]`` or a sequence ``[B, S, F]`` for each text.
            lengths: Vectors of each sequence, ``[B]`` int64. None: all have S.

        Raises:
            RuntimeError: The model has no `feature_dim`.
            ValueError: A shape does not fit.
            TypeError: A dtype does not fit.

        Example:
            >>> model = llm_ext.LLM(100, 16, 32, 100, 1, 0.0, feature_dim=40)
            >>> state = model.condition(torch.randn(4, 50, 40), torch.tensor([50, 31, 44, 7]))
            >>> captions = torch.randint(100, (4, 12))
            >>> scores, _ = model(captions[:, :-1], state)
            >>> scores.shape
            torch.Size([4, 11, 100])
        """
        if self.projection is None:
            raise RuntimeError("LLM: condition needs a model with feature_dim")
        sequence = features.unsqueeze(1) if features.dim() == 2 else features
        check_sequence("LLM", "features", sequence, self.projection.in_features, self.projection)
        check_lengths("LLM", "lengths", lengths, sequence, "S")
        projected = self.projection(fill_padding(sequence, lengths))
        return self._read(projected.transpose(0, 1), None, self.pool, lengths)[1]

    def _scores(self, features: Tensor) -> Tensor:
        """Return scores ``[B, T, O]`` of features ``[B, T, *]``."""
        if self.training:
            # Dropout1d drops a feature of a row at all positions. Drawing at each position anew takes a tenth of a
            # training step on a CPU.
            features = self.dropout(features.mT).mT
        return cast(Tensor, self.head(features))

    def _features(
        self,
        ids: Tensor,
        state: LLMState | None,
        embedding: Embedding,
        pool: Pool | None,
    ) -> tuple[Tensor, LLMState]:
        """Return the input of the head, ``[B, T, H + D]``, and the state after ids ``[T, B]``."""
        return self._read(embedding(ids), state, pool)

    def _read(
        self, embedded: Tensor, state: LLMState | None, pool: Pool | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LLMState]:
        """Return the same for embeddings ``[T, B, E]``."""
        before = None if state is None else join_state(state.hidden, state.cell)
        h, after = call_recurrent(self.rnn, embedded, before, lengths)
        hidden, cell = split_state(after)
        h = h.transpose(0, 1)
        if pool is None:
            return h, LLMState(hidden, None, cell)
        e = h if self.attention == "hidden" else embedded.transpose(0, 1)
        padded = {} if lengths is None else {"lengths": lengths}
        c, attention = pool(e, state=None if state is None else state.attention, **padded)
        return torch.cat((h, c), -1), LLMState(hidden, attention, cell)

    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        state: LLMState | None = None,
    ) -> Tensor:
        """Continue a prompt by sampling.

        The arguments and errors are those of `stream`.

        Returns:
            The prompt followed by the new ids, ``[P + max_new_tokens]`` or ``[B, P + max_new_tokens]``.
        """
        new = list(self.stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, generator, state))
        if not new:
            return prompt_ids.clone()
        tail = torch.stack(new, 1).to(prompt_ids.dtype)  # [B, max_new_tokens]
        return torch.cat((prompt_ids, tail if prompt_ids.dim() == 2 else tail[0]), -1)

    def stream(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        state: LLMState | None = None,
    ) -> Iterator[Tensor]:
        """Yield sampled ids ``[B]`` one by one, each at the cost of one step, however long the text is.

        Call `eval()` first to disable dropout. Do not change the weights before the last token: values that depend on
        them alone are computed once.

        Args:
            prompt_ids: Token ids, ``[P]`` or ``[B, P]`` int64 or int32, at least one per row.
            max_new_tokens: Number of ids to sample.
            temperature: Divides the scores; 0 chooses the id of the largest score.
            top_k: Sample among the k largest scores only.
            top_p: Sample among the fewest largest scores whose probabilities sum to at least p.
            generator: Source of randomness; None for torch's default generator.
            state: State before the prompt, of `forward` or `condition`; None at the start of a text.

        Raises:
            ValueError: The prompt is empty, a number is out of range, or a shape of the state does not fit.
            TypeError: prompt_ids is not int64 or int32, or the state is that of another model.
            RuntimeError: The scores are NaN. Only the first and the last token are checked.
        """
        op = "LLM.stream"
        if prompt_ids.dim() not in (1, 2) or prompt_ids.shape[-1] == 0:
            raise ValueError(f"{op}: prompt_ids must be [P] or [B, P], P > 0, got {list(prompt_ids.shape)}")
        check_id_dtype(op, "prompt_ids", prompt_ids)
        if max_new_tokens < 0:
            raise ValueError(f"{op}: max_new_tokens must be at least 0, got {max_new_tokens}")
        check_sampling(op, temperature, top_k, top_p)
        _check_is_state(op, state)
        if state is not None:
            B = 1 if prompt_ids.dim() == 1 else prompt_ids.shape[0]
            check_state(op, self.rnn, state.hidden, state.cell, B)
        # Inference tensors could not take part in training later, so the ids are copied outside of inference mode.
        stream = self._stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, generator, state)
        return (ids.clone() for ids in stream)

    @torch.inference_mode()
    def _stream(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
        state: LLMState | None,
    ) -> Iterator[Tensor]:
        ids = prompt_ids.t() if prompt_ids.dim() == 2 else prompt_ids[:, None]  # [T, B]
        embedding: Embedding = self.embedding
        pool: Pool | None = self.pool
        for n in range(max_new_tokens):
            features, state = self._features(ids, state, embedding, pool)
            if n == 0:
                features = features[:, -1:]
                embedding, pool = self._folded_layers(max_new_tokens)
            scores = self._scores(features).select(1, 0)
            # NaN stays in the state: if it appears at any token, the last one has it.
            if n in (0, max_new_tokens - 1) and scores.isnan().any():
                raise RuntimeError(f"LLM.stream: the scores of token {n + 1} of {max_new_tokens} are not a number")
            sampled = sample(scores, temperature, top_k, top_p, generator)
            yield sampled
            ids = sampled.unsqueeze(0)

    def _folded_layers(self, steps: int) -> tuple[Embedding, Pool | None]:
        """Return the embedding and the pool for `steps` steps, with the products of their weights computed once."""
        embedding: Embedding = self.embedding
        pool: Pool | None = self.pool
        # Folding the embedding costs as much as looking up V ids.
        if may_bypass(self.embedding, AffineEmbedding) and steps >= self.vocab_size:
            embedding = partial(embedding, table=self.embedding.fold())
        if self.pool is not None and may_bypass(self.pool, AttentionPool):
            pool = partial(self.pool, u=self.pool.fold())
        return embedding, pool
