"""Recurrent encoder and decoder with additive attention; greedy and beam search with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llm_ext import ops
from llm_ext.models.argument_checks import (
    check_cell,
    check_dropout,
    check_ids,
    check_keep,
    check_lengths,
    check_sequence,
    check_state,
)
from llm_ext.models.beam_search import MOST_LENGTH_PENALTY, BeamHypothesis, BeamSearch, length_limits
from llm_ext.models.bypass import keeps_samples_apart, may_bypass
from llm_ext.models.copying import first_positions, pointer_generator
from llm_ext.models.initialization import init_recurrent_
from llm_ext.models.recurrent_layers import (
    RecurrentLayer,
    State,
    call_recurrent,
    fill_padding,
    join_state,
    recurrent_layer,
    split_state,
)
from llm_ext.nn import GRU, LSTM, RNN, AdditiveAttention, AffineEmbedding, Linear
from llm_ext.nn.arguments import as_flag, as_size
from llm_ext.nn.scripting import refuse_script
from llm_ext.ops.argument_checks import has_values
from llm_ext.ops.linear import use_native_gemm
from llm_ext.ops.packing import Packing, pack_lengths

__all__ = ["EncoderOutput", "InputProjections", "Seq2Seq", "Seq2SeqState"]


class EncoderOutput(NamedTuple):
    """Output of the encoder, projected to the keys and values that the decoder attends to.

    Attributes:
        keys: Projected keys, ``[B, S, A]``.
        values: Projected values, ``[B, S, E]``.
        lengths: Tokens of each source, ``[B]`` int64, or None if all have S.
        ids: Token ids to copy, ``[B, S]`` int64; None without copying.
        first: For each of `ids` the first position with the same id, ``[B, S]`` int64; None without copying.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None
    ids: Tensor | None = None
    first: Tensor | None = None


class Seq2SeqState(NamedTuple):
    """State of the decoder after a prefix of N targets.

    Attributes:
        hidden: Hidden state of each layer, ``[L, N, H]``.
        cell: Cell state of each layer, ``[L, N, H]``; None unless the cell is "lstm".
        fed: Readout of the last step, ``[N, E]``, for input feeding; None without.
    """

    hidden: Tensor
    cell: Tensor | None
    fed: Tensor | None

    def repeat(self, times: int) -> Seq2SeqState:
        """Return the state with each row repeated `times` times in succession."""
        hidden, cell, fed = self
        return Seq2SeqState(
            hidden.repeat_interleave(times, 1),
            None if cell is None else cell.repeat_interleave(times, 1),
            None if fed is None else fed.repeat_interleave(times, 0),
        )

    def reorder_(self, rows: Tensor) -> None:
        """Replace row n by the row ``rows[n]`` for every n, in place; `rows` is ``[N]`` int64."""
        self.hidden.copy_(self.hidden.index_select(1, rows))
        if self.cell is not None:
            self.cell.copy_(self.cell.index_select(1, rows))
        if self.fed is not None:
            self.fed.copy_(self.fed.index_select(0, rows))


class InputProjections(NamedTuple):
    """Input projections ``W_ih x + b_ih`` of every token, for the first layers of encoder and decoder.

    Attributes:
        source: For each direction of the encoder, ``[V_s, G H]`` with G gates; None where they do not apply.
        target: For the decoder, ``[V, G H]``; None where they do not apply.
    """

    source: list[Tensor] | None
    target: Tensor | None


class Seq2Seq(nn.Module):
    """Recurrent encoder and decoder with additive attention, for translation and other sequence-to-sequence tasks.

    The encoder reads the source x in both directions. At step t the decoder reads the target token y_{t-1} and attends
    to the encoder's output k; the readout z_t predicts y_t::

        k    = RNN(W_s[x] + b_s)                                in both directions
        h_t  = RNN(W_t[y_{t-1}] + b_t, h_{t-1})                 with input feeding: [W_t[y_{t-1}] + b_t ; z_{t-1}]
        α_ts = softmax_s(v · tanh(W_q h_t + W_k k_s + b))
        z_t  = tanh(W_r h_t + b_r + Σ_s α_ts W_v k_s)
        scores of y_t = W_o z_t + b_o

    The first state of the decoder is ``tanh(W_b [h→ ; h←] + b_b)`` of the encoder's last states, layer by layer. An
    LSTM's cell state is an affine map of its own, without tanh.

    Attention follows the recurrence, so that with a given target (teacher forcing) the decoder runs in one call. With
    input feeding it runs step by step.

    With copying (a pointer-generator) a token is either generated, with the probability p_t, or copied from the source,
    by the weights of the attention; the keys of the attention then include the embeddings of a token and of the one
    before it, so that a name is copied token by token::

        k'_s   = [k_s ; W_s[x_s] + b_s ; W_s[x_{s-1}] + b_s]    in place of k_s in W_k k_s
        p_t    = σ(w · z_t + b)
        P(y_t) = p_t softmax(W_o z_t + b_o)[y_t] + (1 - p_t) Σ_s α_ts [x_s = y_t]

    Args:
        source_vocab_size: V_s, number of token ids of sources; None for sources of feature vectors.
        target_vocab_size: V, number of token ids of targets.
        embedding_dim: E, size of the embeddings and of the readout.
        hidden_dim: H, size of the hidden states of the decoder, and of the encoder in each direction.
        n_layers: Number of recurrent layers of encoder and decoder each. Default: 1.
        dropout: Probability of dropping a feature of the embeddings, between recurrent layers, of the values and of the
            decoder's output, in training mode. Except between recurrent layers, a row drops the same features at all
            positions (arXiv 1512.05287). Default: 0.
        cell: Recurrent cell: "rnn" (Elman), "gru" or "lstm". Default: "gru".
        nonlinearity: Nonlinearity of the cell "rnn": "tanh", "relu" or "sigmoid". Default: "tanh".
        attn_dim: A, size of the attention space. Default: H.
        input_feeding: Append the readout of the last step to the decoder's input. Default: False.
        share_embedding: Use one embedding for sources and targets, which must have one vocabulary. Default: False.
        tie_head: Use the weight of the target embedding as the weight of the head. Default: False.
        copy: Copy tokens of the source. Sources and targets must have one vocabulary. Default: False.
        source_feature_dim: F, size of the feature vectors of sources, which the encoder reads in place of embeddings;
            None for sources of token ids. Default: None.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: A size, probability or name is out of range, or not exactly one of `source_vocab_size` and
            `source_feature_dim` is given.

    Shape:
        - Input: source ids ``[B, S]`` and target ids ``[B, T]``, int64 or int32; or source features ``[B, S, F]`` of
          the dtype of the parameters.
        - Output: scores ``[B, T, V]``, whose softmax is the probability of each token.

    Attributes:
        source_embedding: The `AffineEmbedding` of sources; None for sources of feature vectors.
        target_embedding: The `AffineEmbedding` of targets; the same one if shared.
        encoder: The bidirectional `RNN`, `GRU` or `LSTM`.
        bridge: The `Linear` map from the encoder's last hidden states to the decoder's first.
        cell_bridge: Likewise for the cell states of an LSTM; otherwise None.
        decoder: The `RNN`, `GRU` or `LSTM`.
        attention: The `AdditiveAttention`.
        value: The `Linear` map W_v.
        readout: The `Linear` map W_r, b_r.
        head: The `Linear` map W_o, b_o.
        gate: The `Linear` map w, b of p_t with copying; otherwise None.

    Source: Bahdanau et al., arXiv 1409.0473; attention after the recurrence and input feeding: Luong et al.,
    arXiv 1508.04025; the tied head: Press and Wolf, arXiv 1608.05859; copying: See et al., arXiv 1704.04368.

    Example:
        >>> model = llm_ext.Seq2Seq(100, 120, embedding_dim=16, hidden_dim=32)
        >>> source, lengths = torch.randint(100, (3, 9)), torch.tensor([9, 4, 7])
        >>> target = torch.randint(120, (3, 6))  # every target begins with the id that ends it, here 0
        >>> target[:, 0] = 0
        >>> scores = model(source, target[:, :-1], lengths)
        >>> scores.shape
        torch.Size([3, 5, 120])
        >>> torch.nn.functional.cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten()).backward()
        >>> hypotheses = model.eval().search(source, end=0, source_lengths=lengths, beam=4)
        >>> len(hypotheses), hypotheses[0][0].ids.dim()
        (3, 1)
    """

    def __init__(
        self,
        source_vocab_size: int | None,
        target_vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        n_layers: int = 1,
        dropout: float = 0.0,
        *,
        cell: str = "gru",
        nonlinearity: str = "tanh",
        attn_dim: int | None = None,
        input_feeding: bool = False,
        share_embedding: bool = False,
        tie_head: bool = False,
        copy: bool = False,
        source_feature_dim: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (source_vocab_size is None) == (source_feature_dim is None):
            got = f"got {source_vocab_size} and {source_feature_dim}"
            raise ValueError(f"Seq2Seq: exactly one of source_vocab_size and source_feature_dim must be given, {got}")
        if source_vocab_size is not None:
            source_vocab_size = as_size("Seq2Seq", "source_vocab_size", source_vocab_size)
        if source_feature_dim is not None:
            source_feature_dim = as_size("Seq2Seq", "source_feature_dim", source_feature_dim)
        target_vocab_size = as_size("Seq2Seq", "target_vocab_size", target_vocab_size)
        embedding_dim = as_size("Seq2Seq", "embedding_dim", embedding_dim)
        hidden_dim, n_layers = as_size("Seq2Seq", "hidden_dim", hidden_dim), as_size("Seq2Seq", "n_layers", n_layers)
        attn_dim = hidden_dim if attn_dim is None else as_size("Seq2Seq", "attn_dim", attn_dim)
        input_feeding = as_flag("Seq2Seq", "input_feeding", input_feeding)
        share_embedding = as_flag("Seq2Seq", "share_embedding", share_embedding)
        tie_head = as_flag("Seq2Seq", "tie_head", tie_head)
        copy = as_flag("Seq2Seq", "copy", copy)
        check_dropout("Seq2Seq", dropout)
        check_cell("Seq2Seq", cell)
        if copy and source_vocab_size is None:
            raise ValueError("Seq2Seq: copy needs sources of token ids, got source_feature_dim")
        for name, flag in (("share_embedding", share_embedding), ("copy", copy)):
            if flag and source_vocab_size != target_vocab_size:
                got = f"{source_vocab_size} and {target_vocab_size}"
                raise ValueError(f"Seq2Seq: {name} needs one vocabulary, got sizes {got}")
        self._config: dict[str, int | float | str | None] = {
            "source_vocab_size": source_vocab_size,
            "target_vocab_size": target_vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "n_layers": n_layers,
            "dropout": float(dropout),
            "cell": cell,
            "nonlinearity": nonlinearity,
            "attn_dim": attn_dim,
            "input_feeding": input_feeding,
            "share_embedding": share_embedding,
            "tie_head": tie_head,
            "copy": copy,
            "source_feature_dim": source_feature_dim,
        }
        self.source_vocab_size, self.source_feature_dim = source_vocab_size, source_feature_dim
        self.target_vocab_size = target_vocab_size
        self.input_feeding = input_feeding
        self.tie_head = tie_head
        self.copy = copy
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        E, H = embedding_dim, hidden_dim
        self.source_embedding = None if source_vocab_size is None else AffineEmbedding(source_vocab_size, E, **factory)
        self.target_embedding = (
            self.source_embedding
            if share_embedding and self.source_embedding is not None
            else AffineEmbedding(target_vocab_size, E, **factory)
        )
        layers, between = recurrent_layer(cell, nonlinearity), dropout if n_layers > 1 else 0.0
        self.encoder = layers(source_feature_dim or E, H, n_layers, dropout=between, bidirectional=True, **factory)
        self.bridge = Linear(2 * H, H, **factory)
        self.cell_bridge = Linear(2 * H, H, **factory) if cell == "lstm" else None
        self.decoder = layers(E + E * input_feeding, H, n_layers, dropout=between, **factory)
        self.attention = AdditiveAttention(H, 2 * H + 2 * E * copy, attn_dim, **factory)
        self.value = Linear(2 * H, E, bias=False, **factory)
        self.readout = Linear(H, E, **factory)
        self.head = Linear(E, target_vocab_size, **factory)
        self.gate = Linear(E, 1, **factory) if copy else None
        if tie_head:
            self.head.weight = self.target_embedding.weight
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every layer, with orthogonal U and zero biases; the forget gates of an LSTM get a bias of 1."""
        for layer in (self.source_embedding, self.target_embedding, self.attention):
            if layer is not None:
                layer.reset_parameters()
        for recurrent in (self.encoder, self.decoder):
            recurrent.reset_parameters()
            init_recurrent_(recurrent)
        self.value.reset_parameters()
        for linear in (self.bridge, self.cell_bridge, self.readout, self.head, self.gate):
            if linear is not None:
                linear.reset_parameters()
                nn.init.zeros_(linear.bias)
        if self.tie_head:
            # With weights from N(0, 1), as an embedding has them, scores would be of the order of the root of E.
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(self.head.in_features))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def config(self) -> dict[str, int | float | str | None]:
        """Return the constructor's arguments without `device` and `dtype`, as JSON types, for ``Seq2Seq(**config)``."""
        return dict(self._config)

    # ---- training

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Score the tokens that follow each prefix of a given target (teacher forcing).

        Args:
            source: Token ids ``[B, S]`` int64 or int32, or features ``[B, S, F]``.
            target: Token ids, ``[B, T]`` int64 or int32; each row begins with the id that begins every target.
            source_lengths: Tokens of each source, ``[B]`` int64. None: all have S.
            target_lengths: Tokens of each target, ``[B]`` int64; the scores beyond them are undefined. None: all have
                T.
            keep: Positions to score, ``[B, T]`` bool. The others skip attention, readout and head. None: all positions.

        Returns:
            Scores ``[B, T, V]``; with `keep` those of its positions only, ``[N, V]``, row after row.

        Raises:
            ValueError: A shape does not fit.
            TypeError: The ids are not int64 or int32, the lengths not int64, or `keep` not bool.
            IndexError: A token id is not in its vocabulary. Ids beyond the lengths may have any value.
        """
        self._check_source(source)
        check_ids("Seq2Seq", "target", target, "B, T")
        if target.shape[0] != source.shape[0]:
            raise ValueError(f"Seq2Seq: target must have the {source.shape[0]} rows of source, got {target.shape[0]}")
        check_lengths("Seq2Seq", "source_lengths", source_lengths, source, "S")
        check_lengths("Seq2Seq", "target_lengths", target_lengths, target, "T")
        check_keep("Seq2Seq", keep, target)
        if keep is not None and keeps_samples_apart(self):
            return self.forward(source, target, source_lengths, target_lengths)[keep]
        encoder_output, state = self._encode(source, source_lengths, None)
        x = self.target_embedding(fill_padding(target, target_lengths))  # [B, T, E]
        B = x.shape[0]  # len would be a constant in a graph
        x = _apply_mask(x, self._dropout_mask(B, x))
        if self.input_feeding:
            mask = self._dropout_mask(B, x, self.readout.in_features)
            readouts, attended = [x[:, :0]], []
            for t in range(x.shape[1]):
                readout, state, weights = self._layerwise_step(x[:, t : t + 1], state, encoder_output, mask, self.copy)
                readouts.append(readout)
                attended += [] if weights is None else [weights]
            readout = torch.cat(readouts, 1)
            weights = torch.cat(attended, 1) if attended else None
            return self._scores(readout if keep is None else readout[keep], weights, encoder_output, keep)
        h, _ = call_recurrent(
            self.decoder, x.transpose(0, 1), join_state(state.hidden, state.cell), lengths=target_lengths
        )
        h = h.transpose(0, 1)  # [B, T, H]
        context, weights = self._attend(h, encoder_output, self.copy)
        h = _apply_mask(h, self._dropout_mask(B, h))
        if keep is not None:
            h, context = h[keep], context[keep]
        return self._scores(self._read_out(h, context), weights, encoder_output, keep)

    def _dropout_mask(self, rows: int, like: Tensor, size: int | None = None) -> Tensor | None:
        """Return dropout factors ``[rows, size]``, one draw for all positions of a row; None without dropout."""
        if not self.training or self.dropout.p == 0:
            return None
        return cast(Tensor, self.dropout(like.new_ones(rows, size or like.shape[-1])))

    def _check_source(self, source: Tensor) -> None:
        check_sequence("Seq2Seq", "source", source, self.source_feature_dim, self.bridge)

    # ---- encoder

    def encode(
        self, source: Tensor, lengths: Tensor | None = None, input_projections: InputProjections | None = None
    ) -> tuple[EncoderOutput, Seq2SeqState]:
        """Read sources.

        Args:
            source: Token ids ``[B, S]`` int64 or int32, or features ``[B, S, F]``.
            lengths: Tokens of each source, ``[B]`` int64. None: all have S.
            input_projections: The result of `input_projections`, for inference with unchanged weights, or None.

        Returns:
            The output of the encoder, and the first state of the decoder.

        Raises:
            ValueError, TypeError, IndexError: As `forward`.
            RuntimeError: `input_projections` are given in training mode or with gradients enabled.
        """
        self._check_source(source)
        check_lengths("Seq2Seq", "lengths", lengths, source, "S")
        return self._encode(source, lengths, input_projections)

    def _encode(
        self, source: Tensor, lengths: Tensor | None, input_projections: InputProjections | None
    ) -> tuple[EncoderOutput, Seq2SeqState]:
        """Read sources whose arguments have been checked."""
        if input_projections is not None and (self.training or torch.is_grad_enabled()):
            raise RuntimeError("Seq2Seq: input_projections are for inference: call eval(), and torch.no_grad()")
        projections = None if input_projections is None else input_projections.source
        S = source.shape[1]
        packing = None
        # Looking at the lengths on a GPU would wait for it; there the kernels read them.
        if lengths is not None and has_values(lengths):
            if bool((lengths == S).all()):
                lengths = None
            elif bool((lengths > 0).all()) and not keeps_samples_apart(self):  # an empty row cannot be packed
                packing = pack_lengths(lengths, S)
        if packing is None or self.copy:
            source = fill_padding(source, lengths)
        if packing is None:
            keys, values, last = self._encode_padded(source, lengths, projections)
        else:
            keys, values, last = self._encode_packed(source, packing, projections)
        ids = source.to(torch.int64) if self.copy else None
        first = None if ids is None else first_positions(ids)
        return EncoderOutput(keys, values, lengths, ids, first), self._first_state(last, keys)

    def _encode_padded(
        self, source: Tensor, lengths: Tensor | None, projections: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, State]:
        """Return keys ``[B, S, A]``, values ``[B, S, E]`` and the last state of the encoder."""

        def drop(features: Tensor) -> Tensor:
            mask = self._dropout_mask(source.shape[0], features)
            return features if mask is None else features * mask

        if projections is not None and lengths is not None:
            projections = None
        embedded = self._embed(source, projections)
        embedded = None if embedded is None else embedded.transpose(0, 1)
        if projections is not None:
            read, last = self._encode_projected(source.t(), projections)
        else:
            x = source.transpose(0, 1) if embedded is None else drop(embedded)
            read, last = call_recurrent(self.encoder, x, None, lengths)
        key = read
        if self.copy:
            assert embedded is not None
            before = nn.functional.pad(embedded, (0, 0, 0, 0, 1, 0))[:-1]
            key = torch.cat((read, embedded, before), -1)
        # Contiguous rows of a source, because every step of the decoder reads them.
        keys = self.attention.project_keys(key.transpose(0, 1)).contiguous()
        return keys, self.value(drop(read).transpose(0, 1)).contiguous(), last

    def _encode_packed(
        self, source: Tensor, packing: Packing, projections: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, State]:
        """Return the same for sources of unequal lengths, packed from the ids to the projected output."""
        B, S = source.shape[:2]

        def drop(features: Tensor) -> Tensor:
            mask = self._dropout_mask(B, features)
            return features if mask is None else features * mask.index_select(0, packing.batch_rows)

        index = packing.batch_rows * S + packing.steps
        x = source.flatten(0, 1).index_select(0, index)  # ids [N], or features [N, F]
        embedded = self._embed(x, projections)
        if projections is not None:
            read, last = self._encode_projected(x, projections, packing.batch_sizes)
        else:
            x = x if embedded is None else drop(embedded)
            packed, last = call_recurrent(self.encoder, PackedSequence(x, packing.batch_sizes), None)
            read = packed.data  # [N, 2 H]
        key = read
        if self.copy:
            assert embedded is not None
            first = int(packing.batch_sizes[0])
            rows = torch.arange(first, len(x), device="cpu") - packing.batch_sizes[packing.steps[first:] - 1]
            before = torch.cat((embedded.new_zeros(first, embedded.shape[1]), embedded.index_select(0, rows)))
            key = torch.cat((read, embedded, before), -1)
        keys = self.attention.project_keys(key.unsqueeze(0)).squeeze(0)
        keys, values = (
            rows.new_zeros(B * S, rows.shape[-1]).index_copy(0, index, rows).unflatten(0, (B, S))
            for rows in (keys, self.value(drop(read)))
        )
        order = packing.rows.argsort()
        return keys, values, tuple(tensor.index_select(1, order) for tensor in last)

    def _embed(self, source: Tensor, projections: list[Tensor] | None) -> Tensor | None:
        """Return the embeddings of sources; None if nothing reads them, and for sources of feature vectors."""
        if self.source_embedding is None or (projections is not None and not self.copy):
            return None
        return cast(Tensor, self.source_embedding(source))

    def _encode_projected(
        self, ids: Tensor, projections: list[Tensor], batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the output and the last state of the encoder for ids ``[S, B]``, or packed ones ``[N]``."""
        return ops.multilayer_rnn(
            self.encoder.mode,
            ids.to(torch.int64),
            None,
            self.encoder.all_weights,
            bidirectional=True,
            batch_sizes=batch_sizes,
            input_projections=projections,
        )

    def _first_state(self, last: State, like: Tensor) -> Seq2SeqState:
        """Return the first state of the decoder from the last state of the encoder."""
        h, c = split_state(last)
        hidden = torch.tanh(_map_states(self.bridge, _concatenate_directions(h)))
        cell = None
        if c is not None and self.cell_bridge is not None:
            cell = _map_states(self.cell_bridge, _concatenate_directions(c))
        fed = like.new_zeros(h.shape[1], self.readout.out_features) if self.input_feeding else None
        return Seq2SeqState(hidden, cell, fed)

    @torch.no_grad()
    def input_projections(self) -> InputProjections:
        """Compute the input projections of all tokens, for several searches with unchanged weights.

        A search that is given them looks up rows in place of products, about a fifth of its arithmetic. Computing them
        costs as much as those products for every token of both vocabularies, and they hold (2 V_s + V) G H numbers.

        They apply on the CPU, in float32 and float64, to layers that have neither been replaced nor hooked; those of
        the target only without input feeding. Otherwise they are None.
        """

        def project(embedding: AffineEmbedding | None, layer: RecurrentLayer, directions: int) -> list[Tensor] | None:
            if embedding is None:
                return None
            bypassed = may_bypass(embedding, AffineEmbedding) and may_bypass(layer, RNN, GRU, LSTM)
            if not bypassed or not use_native_gemm(embedding.weight):
                return None
            rows = embedding.fold()
            return [ops.linear(rows, w_ih, b_ih) for w_ih, _, b_ih, _ in layer.all_weights[:directions]]

        target = None if self.input_feeding else project(self.target_embedding, self.decoder, 1)
        return InputProjections(project(self.source_embedding, self.encoder, 2), None if target is None else target[0])

    # ---- decoder

    def step(
        self,
        ids: Tensor,
        state: Seq2SeqState,
        encoder_output: EncoderOutput,
        need_weights: bool = False,
        input_projections: InputProjections | None = None,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """Read one more token of K targets of each source, and score the tokens that follow.

        Args:
            ids: Token ids, ``[B, K]`` int64 or int32.
            state: State of the B K targets, in the order of the rows of `ids`.
            encoder_output: Result of `encode` for the B sources.
            need_weights: Return the attention weights as well.
            input_projections: As in `encode`.

        Returns:
            Scores ``[B, K, V]``, the new state, and the attention weights ``[B, K, S]`` or None.
        """
        check_ids("Seq2Seq", "ids", ids, "B, K")
        if not isinstance(state, Seq2SeqState):
            raise TypeError(f"Seq2Seq: state must be a Seq2SeqState, got {type(state).__name__}")
        if not isinstance(encoder_output, EncoderOutput):
            raise TypeError(f"Seq2Seq: encoder_output must be an EncoderOutput, got {type(encoder_output).__name__}")
        try:
            readout, after, weights = self._step(
                ids, state, encoder_output, need_weights or self.copy, input_projections
            )
        except (RuntimeError, TypeError, AttributeError):
            B = len(encoder_output.values)
            if len(ids) != B:
                raise ValueError(f"Seq2Seq: ids must be [B, K] = [{B}, *], got {list(ids.shape)}") from None
            check_state("Seq2Seq", self.decoder, state.hidden, state.cell, ids.numel())
            raise
        return self._scores(readout, weights, encoder_output), after, weights if need_weights else None

    def _step(
        self,
        ids: Tensor,
        state: Seq2SeqState,
        encoder_output: EncoderOutput,
        need_weights: bool = False,
        input_projections: InputProjections | None = None,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """Take one step from ids ``[B, K]`` to the readout ``[B, K, E]``, in one op where it computes the same."""
        fusible = (  # the op has no derivative, dropout or weights
            not need_weights
            and not self.training
            and not torch.is_grad_enabled()
            and use_native_gemm(state.hidden)
            and may_bypass(self.decoder, RNN, GRU, LSTM)
            and may_bypass(self.attention, AdditiveAttention)
            and may_bypass(self.readout, Linear)
        )
        if not fusible:
            return self._layerwise_step(self.target_embedding(ids), state, encoder_output, need_weights=need_weights)
        projections = None if input_projections is None else input_projections.target
        readout, state = self._fused_step(ids, state, encoder_output, projections)
        return readout, state, None

    def _fused_step(
        self, ids: Tensor, state: Seq2SeqState, encoder_output: EncoderOutput, projections: Tensor | None
    ) -> tuple[Tensor, Seq2SeqState]:
        x = ids.reshape(1, -1)
        if projections is not None:
            x = x.to(torch.int64)
        else:
            x = self.target_embedding(x)
            if state.fed is not None:
                x = torch.cat((x, state.fed.unsqueeze(0)), -1)
        readout, recurrent = ops.attention_step(
            self.decoder.mode,
            x,
            join_state(state.hidden, state.cell),
            self.decoder.all_weights,
            self.attention.q_proj_weight,
            encoder_output.keys,
            self.attention.v,
            encoder_output.values,
            self.readout.weight,
            self.readout.bias,
            input_projections=projections,
            key_lengths=encoder_output.lengths,
        )
        fed = None if state.fed is None else readout
        return readout.view(*ids.shape, readout.shape[-1]), Seq2SeqState(*split_state(recurrent), fed)

    def _layerwise_step(
        self,
        x: Tensor,
        state: Seq2SeqState,
        encoder_output: EncoderOutput,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """Take one step from embeddings ``[B, K, E]``; `mask` holds the factors of dropout of the decoder's output."""
        B, K = x.shape[:2]
        x = x.flatten(0, 1).unsqueeze(0)
        if state.fed is not None:
            x = torch.cat((x, state.fed.unsqueeze(0)), -1)
        h, recurrent = call_recurrent(self.decoder, x, join_state(state.hidden, state.cell))
        h = h.view(B, K, h.shape[-1])
        context, weights = self._attend(h, encoder_output, need_weights)
        readout = self._read_out(_apply_mask(h, mask), context)
        fed = None if state.fed is None else readout.flatten(0, 1)
        return readout, Seq2SeqState(*split_state(recurrent), fed), weights

    def _attend(
        self, h: Tensor, encoder_output: EncoderOutput, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context ``[B, K, E]`` of decoder states ``[B, K, H]``, and the attention weights or None."""
        result: tuple[Tensor, Tensor | None] = self.attention(
            h,
            None,
            encoder_output.values,
            key_lengths=encoder_output.lengths,
            projected_keys=encoder_output.keys,
            need_weights=need_weights,
        )
        return result

    def _read_out(self, h: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.readout(h) + context)

    def _scores(
        self, readout: Tensor, weights: Tensor | None, encoder_output: EncoderOutput, keep: Tensor | None = None
    ) -> Tensor:
        """Return the scores of a readout ``[B, K, E]``, or with `keep` ``[N, E]``; `weights` are ``[B, K, S]``."""
        scores = cast(Tensor, self.head(readout))
        if self.gate is None:
            return scores
        assert weights is not None
        assert encoder_output.ids is not None
        assert encoder_output.first is not None
        ids, first = (each.unsqueeze(1).expand_as(weights) for each in (encoder_output.ids, encoder_output.first))
        if keep is not None:
            weights, ids, first = weights[keep], ids[keep], first[keep]
        return pointer_generator(scores, self.gate(readout).squeeze(-1), weights, ids, first)

    # ---- searches

    def stream(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None = None,
        max_length: int | None = None,
        input_projections: InputProjections | None = None,
    ) -> Iterator[Tensor]:
        """Yield the ids ``[B]`` of greedy search one by one: the best next token of each row, and `end` after its end.

        Call `eval()` first to disable dropout.

        Args:
            source: Token ids ``[B, S]`` int64 or int32, or features ``[B, S, F]``.
            end: The id that begins and ends every target.
            source_lengths: Tokens of each source, ``[B]`` int64. None: all have S.
            max_length: Largest number of ids of a row. None: 10 more than twice those of its source.
            input_projections: As in `encode`.

        Raises:
            ValueError: A shape or number does not fit.
            RuntimeError: The scores are NaN.
        """
        self._check_search(source, end, source_lengths, max_length)
        # Inference tensors could not take part in training later, so the ids are copied outside of inference mode.
        stream = self._stream(source, end, source_lengths, max_length, input_projections)
        return (ids.clone() for ids in stream)

    @torch.inference_mode()
    def _stream(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None,
        max_length: int | None,
        input_projections: InputProjections | None,
    ) -> Iterator[Tensor]:
        limits = length_limits(source, source_lengths, max_length)
        encoder_output, state = self._encode(source, source_lengths, input_projections)
        ids = torch.full((len(source),), end, device=source.device)
        ended = limits <= 0
        for n in range(1, int(limits.max()) + 1 if len(limits) else 0):
            if ended.all():
                return
            readout, state, weights = self._step(ids.unsqueeze(1), state, encoder_output, self.copy, input_projections)
            ids = self._best_ids(readout, weights, encoder_output, check=n == 1).masked_fill(ended, end)
            yield ids
            ended = ended | (ids == end) | (limits <= n)

    def _best_ids(self, readout: Tensor, weights: Tensor | None, encoder_output: EncoderOutput, check: bool) -> Tensor:
        """Return the ids ``[B]`` of the largest scores of a readout ``[B, 1, E]``; with `check`, raise for NaN."""
        if may_bypass(self.head, Linear) and not self.copy:
            readout = readout.squeeze(1)
            weight, bias = self.head.weight, self.head.bias
            ids = ops.linear_argmax(readout, weight, bias)
            if check:  # a NaN would be the maximum
                _check_scores((readout * weight[ids]).sum(-1) + bias[ids])
            return ids
        scores = self._scores(readout, weights, encoder_output).squeeze(1)
        if check:
            _check_scores(scores)
        return scores.argmax(-1)

    def search(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None = None,
        *,
        beam: int = 5,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        max_length: int | None = None,
        input_projections: InputProjections | None = None,
    ) -> list[list[BeamHypothesis]]:
        """Find likely targets by beam search.

        The search of a source ends when it has as many finished targets as the beam is wide, and no open target would
        score higher than the worst of them if it ended now. The result for a source does not depend on the others in
        the batch. Call `eval()` first to disable dropout.

        Args:
            source: Token ids ``[B, S]`` int64 or int32, or features ``[B, S, F]``.
            end: The id that begins and ends every target.
            source_lengths: Tokens of each source, ``[B]`` int64. None: all have S.
            beam: K, number of open targets of each source; 1 is greedy search.
            num_return_sequences: Number of targets to return for each source, at most `beam`.
            length_penalty: The score of a target is its log-probability divided by its length, including the end id,
                to this power.
            no_repeat_ngram_size: Never write the same n-gram of this many tokens twice in a target. 0: no limit.
            max_length: Largest number of ids of a target, which is cut off there. None: 10 more than twice those of its
                source.
            input_projections: As in `encode`.

        Returns:
            For each source its hypotheses, best first; fewer than requested where there are no more.

        Raises:
            ValueError: A shape or number does not fit.
            RuntimeError: The scores are NaN.

        Source: the normalization by length is that of Wu et al., arXiv 1609.08144, without its constants; blocked
        n-grams: Paulus et al., arXiv 1705.04304.
        """
        self._check_search(source, end, source_lengths, max_length)
        if beam < 1:
            raise ValueError(f"Seq2Seq: beam must be at least 1, got {beam}")
        if not 1 <= num_return_sequences <= beam:
            got = f"from 1 to beam = {beam}, got {num_return_sequences}"
            raise ValueError(f"Seq2Seq: num_return_sequences must be {got}")
        if not 0 <= length_penalty <= MOST_LENGTH_PENALTY:
            expected = f"at least 0 and at most {MOST_LENGTH_PENALTY}"
            raise ValueError(f"Seq2Seq: length_penalty must be {expected}, got {length_penalty}")
        if no_repeat_ngram_size < 0:
            raise ValueError(f"Seq2Seq: no_repeat_ngram_size must be at least 0, got {no_repeat_ngram_size}")
        limits = length_limits(source, source_lengths, max_length)
        beams = BeamSearch(len(source), beam, end, limits, length_penalty, no_repeat_ngram_size, source.device)
        self._search(beams, source, source_lengths, input_projections)
        return beams.best(num_return_sequences)

    @torch.inference_mode()
    def _search(
        self,
        beams: BeamSearch,
        source: Tensor,
        source_lengths: Tensor | None,
        input_projections: InputProjections | None,
    ) -> None:
        """Extend the targets of `beams` until the search has ended."""
        encoder_output, state = self._encode(source, source_lengths, input_projections)
        state = state.repeat(beams.ids.shape[1])
        while not beams.done:
            scores, state, _ = self.step(beams.ids, state, encoder_output, input_projections=input_projections)
            if beams.length == 0:
                _check_scores(scores)
            state.reorder_(beams.advance(scores))

    def _check_search(self, source: Tensor, end: int, source_lengths: Tensor | None, max_length: int | None) -> None:
        self._check_source(source)
        check_lengths("Seq2Seq", "source_lengths", source_lengths, source, "S")
        if not 0 <= end < self.target_vocab_size:
            raise ValueError(f"Seq2Seq: end must be an id from 0 to {self.target_vocab_size - 1}, got {end}")
        if max_length is not None and not 0 <= max_length < 1 << 63:
            raise ValueError(f"Seq2Seq: max_length must be at least 0 and below 2**63, got {max_length}")


def _concatenate_directions(state: Tensor) -> Tensor:
    """Return states ``[2 L, B, H]`` of two directions as ``[L, B, 2 H]``."""
    return torch.cat((state[0::2], state[1::2]), -1)


def _map_states(layer: nn.Module, states: Tensor) -> Tensor:
    """Apply a layer, which reads the batch first, to states ``[L, B, *]``."""
    return cast(Tensor, layer(states.transpose(0, 1))).transpose(0, 1).contiguous()


def _apply_mask(features: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply features ``[B, T, *]`` by a mask ``[B, *]`` at every position."""
    return features if mask is None else features * mask.unsqueeze(1)


def _check_scores(scores: Tensor) -> None:
    # A NaN in the weights shows in the first scores.
    if scores.isnan().any():
        raise RuntimeError("Seq2Seq: the scores of the first token are not a number")
