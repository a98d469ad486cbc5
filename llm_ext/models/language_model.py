"""The language model: layers put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from llm_ext.attention import AttentionPool
from llm_ext.layers import GRU, LSTM, RNN, AffineEmbedding, Linear

CELLS = ("rnn", "gru", "lstm")
INTEGERS = (torch.int64, torch.int32)

Embedding = Callable[..., Tensor]
Recurrence = RNN | GRU | LSTM
Pool = Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]]


class LLMState(NamedTuple):
    """What the model remembers of the text so far.

    hidden: last hidden state of each layer, [L, B, H].
    attention: (L [B], c [B, D]) of the causal pool, float32 where the model has 16 bits; or None without attention.
    cell: last cell state of each layer, [L, B, H], or None unless the cells are LSTMs.
    """

    hidden: Tensor
    attention: tuple[Tensor, Tensor] | None
    cell: Tensor | None = None

    def detach(self) -> LLMState:
        """Return the same state, cut off from the graph that computed it (truncated backpropagation)."""
        attention = None if self.attention is None else (self.attention[0].detach(), self.attention[1].detach())
        return LLMState(self.hidden.detach(), attention, None if self.cell is None else self.cell.detach())


class LLM(nn.Module):
    """Recurrent language model: embedding, recurrent layers, causal attention, head `y = V [h ; c] + c₀`.

    Args:
        vocab_size: V, how many token ids there are.
        embedding_dim: E, size of a token's embedding.
        hidden_dim: H, size of the hidden state.
        output_dim: size of the output; V for next-token scores.
        n_layers: recurrent layers.
        dropout: probability, between the recurrent layers and before the head, in training only; before the head the
            same units are dropped at all positions of a row (arXiv 1512.05287).
        cell: of the recurrent layers: "rnn" (Elman), "gru" or "lstm".
        nonlinearity: of Elman layers, "tanh", "relu" or "sigmoid"; the others have their own.
        attention: pool over the "hidden" states, over the "embedding"s, or not at all ("none").
        attn_dim: A, size of the attention space; by default the size of what is pooled, at most 128.
        score: "linear" or "tanh", see `AttentionPool`.
        device: of the parameters.
        dtype: of the parameters, float32, float64, bfloat16 or float16.

    Raises:
        ValueError: a size, probability or name out of range.
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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("vocab_size", vocab_size),
            ("embedding_dim", embedding_dim),
            ("hidden_dim", hidden_dim),
            ("output_dim", output_dim),
            ("n_layers", n_layers),
        ):
            if size < 1:
                raise ValueError(f"LLM: {name} must be at least 1, got {size}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"LLM: dropout must be a probability from 0 to 1, got {dropout}")
        if cell not in CELLS:
            raise ValueError(f"LLM: cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if attention not in ("hidden", "embedding", "none"):
            raise ValueError(f"LLM: attention must be one of hidden, embedding, none, got {attention!r}")
        pooled_dim = {"hidden": hidden_dim, "embedding": embedding_dim, "none": 0}[attention]
        if attn_dim is None:
            attn_dim = min(pooled_dim, 128)
        self._config: dict[str, int | float | str] = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "output_dim": output_dim,
            "n_layers": n_layers,
            "dropout": dropout,
            "cell": cell,
            "nonlinearity": nonlinearity,
            "attention": attention,
            "attn_dim": attn_dim,
            "score": score,
        }
        self.vocab_size = vocab_size
        self.attention = attention
        self.embedding = AffineEmbedding(vocab_size, embedding_dim, device=device, dtype=dtype)
        between = dropout if n_layers > 1 else 0.0
        self.rnn = recurrence(cell, nonlinearity)(
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
        """Initialise so that a recurrent network trains: U orthogonal, which keeps h in size, biases zero.

        In a gated cell the block of each gate is orthogonal, and the forget gates of an LSTM have a bias of 1.
        """
        for module in (self.embedding, self.rnn, self.pool, self.head):
            if module is not None:
                module.reset_parameters()
        start_recurrence(self.rnn)
        nn.init.zeros_(self.head.bias)

    def config(self) -> dict[str, int | float | str]:
        """Return the constructor's arguments, all of JSON types: `LLM(**config)` is the same model again."""
        return dict(self._config)

    def forward(self, x: Tensor, state: LLMState | None = None) -> tuple[Tensor, LLMState]:
        """Score the tokens that follow each prefix of x.

        Args:
            x: token ids, [B, T] int64.
            state: returned by the call on the text before x; None at its start.

        Returns:
            Output [B, T, output_dim] and the state after x; a text fed in pieces gives what the whole gives.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: x is not of an integer dtype.
            IndexError: a token id outside 0 .. V - 1.
        """
        if x.dim() != 2:
            raise ValueError(f"LLM: x must be [B, T], got {list(x.shape)}")
        if x.dtype not in INTEGERS:
            raise TypeError(f"LLM: x must be int64, got {x.dtype}".replace("torch.", ""))
        features, state = self._features(x.t(), state, self.embedding, self.pool)
        return self._scores(features), state

    def _scores(self, features: Tensor) -> Tensor:
        """Scores [B, T, output_dim] from features [B, T, *]."""
        if self.training:
            # Drawing each unit anew at each position is slow on a CPU: a tenth of a training step.
            features = self.dropout(features.mT).mT
        return cast(Tensor, self.head(features))

    def _features(
        self,
        ids: Tensor,
        state: LLMState | None,
        embedding: Embedding,
        pool: Pool | None,
    ) -> tuple[Tensor, LLMState]:
        """What the head reads, [B, T, H + D], and the state after ids [T, B]."""
        hidden, attention, cell = (None, None, None) if state is None else state
        embedded = embedding(ids)  # [T, B, E]
        h, last = self.rnn(embedded, hidden if cell is None else (hidden, cell))
        hidden, cell = last if isinstance(last, tuple) else (last, None)
        h = h.transpose(0, 1)
        if pool is None:
            return h, LLMState(hidden, None, cell)
        c, attention = pool(h if self.attention == "hidden" else embedded.transpose(0, 1), state=attention)
        return torch.cat((h, c), -1), LLMState(hidden, attention, cell)

    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt by sampling; arguments and errors are those of `stream`.

        Returns:
            The prompt and the new ids, [P + max_new_tokens] or [B, P + max_new_tokens].
        """
        new = list(self.stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, generator))
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
    ) -> Iterator[Tensor]:
        """Yield sampled ids [B] one by one, each for the cost of one step, however long the text before it.

        Call `eval()` first, so that dropout is off. The weights must stay as they are until the last token: what can be
        computed from them alone is computed once.

        Args:
            prompt_ids: [P] or [B, P] int64, at least one token.
            max_new_tokens: how many ids to sample.
            temperature: divides the scores; 0 takes the best token always.
            top_k: sample among the k best tokens only.
            top_p: sample among the fewest best tokens whose probabilities reach p.
            generator: source of randomness; None for torch's own.

        Raises:
            ValueError: an empty prompt, or a number out of range.
            TypeError: prompt_ids is not of an integer dtype.
            RuntimeError: the scores are NaN, which is looked for at the first and the last token.
        """
        if prompt_ids.dim() not in (1, 2) or prompt_ids.shape[-1] == 0:
            raise ValueError(f"generate: prompt_ids must be [P] or [B, P], P > 0, got {list(prompt_ids.shape)}")
        if prompt_ids.dtype not in INTEGERS:
            raise TypeError(f"generate: prompt_ids must be int64, got {prompt_ids.dtype}".replace("torch.", ""))
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"generate: temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")
        return self._stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, generator)

    @torch.inference_mode()
    def _stream(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        ids = prompt_ids.t() if prompt_ids.dim() == 2 else prompt_ids[:, None]  # [T, B]
        state: LLMState | None = None
        embedding: Embedding = self.embedding
        pool: Pool | None = self.pool
        for n in range(max_new_tokens):
            features, state = self._features(ids, state, embedding, pool)
            if n == 0:
                # Not before the layers have run once: a hook of theirs may make the weights.
                features = features[:, -1:]
                embedding, pool = self._folded(max_new_tokens)
            scores = self._scores(features).select(1, 0)
            # NaN stays in the state, so that the first and the last token show it.
            if n in (0, max_new_tokens - 1) and scores.isnan().any():
                raise RuntimeError(f"generate: the scores of token {n + 1} of {max_new_tokens} are not a number")
            sampled = sample(scores, temperature, top_k, top_p, generator)
            yield sampled
            ids = sampled.unsqueeze(0)

    def _folded(self, steps: int) -> tuple[Embedding, Pool | None]:
        """Embedding and pool for so many steps: what can be computed from their weights alone is computed once.

        A layer whose forward is not known here, because it is of another class, stays as it is.
        """
        embedding: Embedding = self.embedding
        pool: Pool | None = self.pool
        # A table of all ids is worth making for as many steps.
        if _runs(self.embedding, AffineEmbedding) and steps >= self.vocab_size:
            embedding = partial(embedding, table=self.embedding.fold())
        if self.pool is not None and _runs(self.pool, AttentionPool):
            pool = partial(self.pool, u=self.pool.fold())
        return embedding, pool


def recurrence(cell: str, nonlinearity: str) -> Callable[..., Recurrence]:
    """Return the layer of a cell, one of `CELLS`; the nonlinearity is that of Elman's."""
    kinds: dict[str, Callable[..., Recurrence]]
    kinds = {"rnn": partial(RNN, nonlinearity=nonlinearity), "gru": GRU, "lstm": LSTM}
    return kinds[cell]


def start_recurrence(layer: Recurrence) -> None:
    """Initialise a layer so that it trains: U orthogonal, gate by gate, which keeps h in size, biases zero."""
    for name, parameter in layer.named_parameters():
        gates = torch.split(parameter.detach(), layer.hidden_size)
        if name.startswith("weight_hh"):
            for gate in gates:
                # LAPACK knows no numbers of 16 bits.
                exact = torch.float32 if gate.dtype.itemsize == 2 else gate.dtype
                gate.copy_(nn.init.orthogonal_(torch.empty_like(gate, dtype=exact)))
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih") and isinstance(layer, LSTM):
                # The order is i, f, g, o. With 0 the forget gate halves c at each step: neither what was read
                # nor its gradient would last (Gers et al., 2000).
                nn.init.ones_(gates[1])


def _runs(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer's forward is that of its kind, and not one that somebody else has put there."""
    return getattr(layer.forward, "__func__", None) is kind.forward


def sample(
    scores: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id [B] from each row of next-token scores [B, V]; the options are those of `LLM.stream`."""
    if temperature == 0:
        return scores.argmax(-1)
    if scores.dtype.itemsize == 2:
        scores = scores.float()  # so few bits leave many equal once noise is added
    ids = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k)
    elif top_p is not None and top_p < 1:
        scores, ids = scores.sort(-1, descending=True)
    if top_p is not None and top_p < 1:
        probabilities = torch.softmax(scores / temperature, -1)  # best first
        # A token stays if those better than it do not reach p yet: the best one always does.
        scores = scores.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -math.inf)
    # With q from Exp(1) for each token, softmax(s)_i / q_i is the largest with probability softmax(s)_i: this is how
    # torch.multinomial draws, too. The logarithm of it needs no softmax.
    noise = torch.empty_like(scores).exponential_(generator=generator).log_()
    drawn = torch.sub(scores, noise, alpha=temperature).argmax(-1)
    return drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
