"""Recurrent classifier of sequences of token ids or of feature vectors."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from llm_ext.models.argument_checks import check_cell, check_dropout, check_lengths, check_sequence
from llm_ext.models.initialization import init_recurrent_
from llm_ext.models.recurrent_layers import call_recurrent, fill_padding, recurrent_layer
from llm_ext.nn import AffineEmbedding, AttentionPool, Linear
from llm_ext.nn.arguments import as_flag, as_size
from llm_ext.nn.scripting import refuse_script

__all__ = ["ClassifierOutput", "SequenceClassifier"]

POOLINGS = ("attention", "last", "none")


class ClassifierOutput(NamedTuple):
    """Scores of a `SequenceClassifier` and the attention behind them.

    Attributes:
        scores: ``[B, C]``.
        weights: Softmax weights of the attention, ``[B, S]``; 0 beyond the lengths.
    """

    scores: Tensor
    weights: Tensor


class SequenceClassifier(nn.Module):
    """Recurrent classifier: recurrent layers, pooling over the steps, and an affine head.

    For a sequence x of token ids or of feature vectors::

        h_s    = RNN(W_e[x_s] + b_e)                 of features: RNN(x_s)
        c      = Σ_s α_s h_s                         with pooling="last": the last state of each direction
        scores = W c + b                             with pooling="none": W h_s + b for each step

    α are the softmax weights of `AttentionPool`. With ``pooling="none"`` there are scores for every step, as
    `torch.nn.functional.ctc_loss` takes them.

    Args:
        num_classes: C, number of classes.
        hidden_dim: H, size of the hidden states in each direction.
        n_layers: Number of recurrent layers. Default: 1.
        dropout: Probability of dropping a feature of the embeddings, between recurrent layers and before the head, in
            training mode. Except between recurrent layers, a row drops the same features at all steps
            (arXiv 1512.05287). Feature vectors are not dropped. Default: 0.
        vocab_size: V, number of token ids; None for feature vectors.
        embedding_dim: E, size of the embeddings of token ids. Default: H.
        feature_dim: F, size of the feature vectors; None for token ids.
        cell: Recurrent cell: "rnn" (Elman), "gru" or "lstm". Default: "gru".
        nonlinearity: Nonlinearity of the cell "rnn": "tanh", "relu" or "sigmoid". Default: "tanh".
        bidirectional: Read the sequence in both directions. Default: True.
        pooling: "attention", "last" or "none". Default: "attention".
        attn_dim: A, size of the attention space. Default: H.
        score: "linear" or "tanh", see `AttentionPool`. Default: "tanh".
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: A size, probability or name is out of range, or not exactly one of `vocab_size` and `feature_dim`
            is given.

    Shape:
        - Input: ids ``[B, S]``, int64 or int32, or features ``[B, S, F]`` of the dtype of the parameters.
        - Output: scores ``[B, C]``; with ``pooling="none"`` ``[B, S, C]``.

    Attributes:
        embedding: The `AffineEmbedding`; None for feature vectors.
        encoder: The `RNN`, `GRU` or `LSTM`.
        pool: The `AttentionPool`; None without attention.
        head: The `Linear` map to the scores.

    Example:
        >>> model = llm_ext.SequenceClassifier(10, hidden_dim=32, feature_dim=40)
        >>> spectrogram, lengths = torch.randn(4, 50, 40), torch.tensor([50, 31, 44, 7])
        >>> model(spectrogram, lengths).shape
        torch.Size([4, 10])
        >>> model.attend(spectrogram, lengths).weights.shape
        torch.Size([4, 50])
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int,
        n_layers: int = 1,
        dropout: float = 0.0,
        *,
        vocab_size: int | None = None,
        embedding_dim: int | None = None,
        feature_dim: int | None = None,
        cell: str = "gru",
        nonlinearity: str = "tanh",
        bidirectional: bool = True,
        pooling: str = "attention",
        attn_dim: int | None = None,
        score: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SequenceClassifier"
        num_classes, hidden_dim = as_size(name, "num_classes", num_classes), as_size(name, "hidden_dim", hidden_dim)
        n_layers, bidirectional = as_size(name, "n_layers", n_layers), as_flag(name, "bidirectional", bidirectional)
        check_dropout(name, dropout)
        check_cell(name, cell)
        if pooling not in POOLINGS:
            raise ValueError(f"{name}: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if (vocab_size is None) == (feature_dim is None):
            got = f"got {vocab_size} and {feature_dim}"
            raise ValueError(f"{name}: exactly one of vocab_size and feature_dim must be given, {got}")
        embedding_dim = hidden_dim if embedding_dim is None else as_size(name, "embedding_dim", embedding_dim)
        attn_dim = hidden_dim if attn_dim is None else as_size(name, "attn_dim", attn_dim)
        self._config: dict[str, int | float | str | None] = {
            "num_classes": num_classes,
            "hidden_dim": hidden_dim,
            "n_layers": n_layers,
            "dropout": float(dropout),
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "feature_dim": feature_dim,
            "cell": cell,
            "nonlinearity": nonlinearity,
            "bidirectional": bidirectional,
            "pooling": pooling,
            "attn_dim": attn_dim,
            "score": score,
        }
        self.vocab_size, self.feature_dim, self.pooling = vocab_size, feature_dim, pooling
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding: AffineEmbedding | None = None
        if feature_dim is None:
            assert vocab_size is not None
            self.embedding = AffineEmbedding(as_size(name, "vocab_size", vocab_size), embedding_dim, **factory)
        input_dim = embedding_dim if feature_dim is None else as_size(name, "feature_dim", feature_dim)
        self.encoder = recurrent_layer(cell, nonlinearity)(
            input_dim,
            hidden_dim,
            n_layers,
            dropout=dropout if n_layers > 1 else 0.0,
            bidirectional=bidirectional,
            **factory,
        )
        encoded_dim = hidden_dim * (1 + bidirectional)
        self.pool = AttentionPool(encoded_dim, attn_dim, score, **factory) if pooling == "attention" else None
        self.head = Linear(encoded_dim, num_classes, **factory)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every layer, with orthogonal U and zero biases; the forget gates of an LSTM get a bias of 1."""
        for module in (self.embedding, self.encoder, self.pool, self.head):
            if module is not None:
                module.reset_parameters()
        init_recurrent_(self.encoder)
        nn.init.zeros_(self.head.bias)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def config(self) -> dict[str, int | float | str | None]:
        """Return the constructor's arguments without `device` and `dtype`, as JSON types."""
        return dict(self._config)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Score the classes.

        Args:
            x: Token ids ``[B, S]`` int64 or int32, or features ``[B, S, F]``.
            lengths: Steps of each row, ``[B]`` int64. None: all have S.

        Returns:
            Scores ``[B, C]``, or ``[B, S, C]`` with ``pooling="none"``, undefined beyond the lengths. A row of length
            0 has the scores of a vector of zeros.

        Raises:
            ValueError: A shape does not fit.
            TypeError: A dtype does not fit.
            IndexError: A token id is not from 0 to V - 1. Ids beyond the lengths may have any value.
        """
        read, last = self._encode(x, lengths)
        if self.pool is not None:
            return self._scores(cast(Tensor, self.pool(read, lengths=lengths)))
        return self._scores(read if self.pooling == "none" else last)

    def attend(self, x: Tensor, lengths: Tensor | None = None) -> ClassifierOutput:
        """Score the classes and return the weights of the attention pooling as well.

        Args:
            x: As in `forward`.
            lengths: As in `forward`.

        Raises:
            RuntimeError: The pooling is not "attention".
            ValueError, TypeError, IndexError: As `forward`.
        """
        if self.pool is None:
            raise RuntimeError(f"SequenceClassifier: pooling={self.pooling!r} has no attention weights")
        read, _ = self._encode(x, lengths)
        pooled, weights = self.pool(read, lengths=lengths, need_weights=True)
        return ClassifierOutput(self._scores(pooled), weights)

    def _encode(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output of the encoder ``[B, S, D H]`` and the last state of its last layer ``[B, D H]``."""
        name = "SequenceClassifier"
        check_sequence(name, "x", x, self.feature_dim, self.head)
        check_lengths(name, "lengths", lengths, x, "S")
        x = fill_padding(x, lengths)
        if self.embedding is not None:
            x = self._drop(self.embedding(x))
        read, last = call_recurrent(self.encoder, x.transpose(0, 1), None, lengths)
        hidden = last[0][-(1 + self.encoder.bidirectional) :]  # of the last layer, [D, B, H]
        return read.transpose(0, 1), hidden.transpose(0, 1).flatten(1)

    def _scores(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.head(self._drop(features)))

    def _drop(self, features: Tensor) -> Tensor:
        """Drop features ``[B, H]`` or ``[B, S, H]`` of each row, the same at all steps."""
        if not self.training or self.dropout.p == 0:
            return features
        mask = features.new_ones(len(features), *[1] * (features.dim() - 2), features.shape[-1])
        return features * cast(Tensor, self.dropout(mask))
