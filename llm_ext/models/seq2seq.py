"""From sequence to sequence: encoder, attention and decoder put together; greedy and beam search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llm_ext import ops
from llm_ext.attention import AdditiveAttention
from llm_ext.layers import GRU, LSTM, RNN, AffineEmbedding, Linear
from llm_ext.model import CELLS, INTEGERS, recurrence, start_recurrence


class Memory(NamedTuple):
    """What the encoder has read, for the decoder to attend to.

    keys: in the attention space, [B, S, A].
    values: what is attended to, [B, S, E].
    lengths: of the sources, [B], or None if all have S tokens.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None


class Seq2SeqState(NamedTuple):
    """What the decoder remembers of the target so far, of N rows.

    hidden: of each layer, [L, N, H]; `cell`: likewise, or None unless the cells are LSTMs.
    fed: what the last token was predicted from, [N, E], or None without input feeding.
    """

    hidden: Tensor
    cell: Tensor | None
    fed: Tensor | None

    def repeat(self, times: int) -> Seq2SeqState:
        """Return a state in which each row stands so many times, one beside the other."""
        hidden, cell, fed = self
        return Seq2SeqState(
            hidden.repeat_interleave(times, 1),
            None if cell is None else cell.repeat_interleave(times, 1),
            None if fed is None else fed.repeat_interleave(times, 0),
        )

    def reorder_(self, rows: Tensor) -> None:
        """Put the row rows[n] in the place of row n, [N] int64."""
        self.hidden.copy_(self.hidden.index_select(1, rows))
        if self.cell is not None:
            self.cell.copy_(self.cell.index_select(1, rows))
        if self.fed is not None:
            self.fed.copy_(self.fed.index_select(0, rows))


class Tables(NamedTuple):
    """What the first layers make of each token before they look at their state, for searches with the same weights.

    source: of each direction of the encoder, [V, G H], G gates; None where they would not help.
    target: of the decoder, [V, G H], or None.
    """

    source: list[Tensor] | None
    target: Tensor | None


class Hypothesis(NamedTuple):
    """A target that a search has found.

    ids: [T] int64, without the id that ends it.
    score: log-probability over length to the power of the length penalty.
    """

    ids: Tensor
    score: float


class Seq2Seq(nn.Module):
    """Recurrent encoder and decoder with additive attention: reads a sequence, writes another.

    The encoder reads in both directions. At each step of the decoder its state h attends to what the encoder read,
    and `tanh(W h + b + c)` is what the next token is predicted from; the context c is a mean of what was read, which
    has been projected to that size once. Attention comes after the recurrence, so that under teacher forcing the
    decoder's recurrence is one call; with input feeding that vector enters the next step, and the decoder goes step by
    step.

    Args:
        source_vocab_size: how many ids there are in a source.
        target_vocab_size: V, how many ids there are in a target.
        embedding_dim: E, size of a token's embedding, and of what a token is predicted from.
        hidden_dim: H, size of the decoder's state, and of the encoder's in each direction.
        n_layers: recurrent layers of each.
        dropout: probability, of embeddings, between the recurrent layers and before the prediction, in training only;
            the same units are dropped at all positions of a row (arXiv 1512.05287).
        cell: of the recurrent layers: "rnn" (Elman), "gru" or "lstm".
        nonlinearity: of Elman layers, "tanh", "relu" or "sigmoid"; the others have their own.
        attn_dim: A, size of the attention space; by default H.
        input_feeding: whether the decoder's input is the embedding and, beside it, what that token was predicted from.
        share_embedding: one embedding for source and target, whose vocabulary must then be one.
        tie_head: the weights of the head are those of the target's embedding.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a size, probability or name out of range.

    Source: Bahdanau et al., arXiv 1409.0473; attention after the recurrence and input feeding: Luong et al.,
    arXiv 1508.04025; the tied head: Press and Wolf, arXiv 1608.05859.
    """

    def __init__(
        self,
        source_vocab_size: int,
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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attn_dim is None:
            attn_dim = hidden_dim
        for name, size in (
            ("source_vocab_size", source_vocab_size),
            ("target_vocab_size", target_vocab_size),
            ("embedding_dim", embedding_dim),
            ("hidden_dim", hidden_dim),
            ("n_layers", n_layers),
            ("attn_dim", attn_dim),
        ):
            if size < 1:
                raise ValueError(f"Seq2Seq: {name} must be at least 1, got {size}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"Seq2Seq: dropout must be a probability from 0 to 1, got {dropout}")
        if cell not in CELLS:
            raise ValueError(f"Seq2Seq: cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if share_embedding and source_vocab_size != target_vocab_size:
            got = f"{source_vocab_size} and {target_vocab_size}"
            raise ValueError(f"Seq2Seq: share_embedding needs one vocabulary, got sizes {got}")
        self._config: dict[str, int | float | str] = {
            "source_vocab_size": source_vocab_size,
            "target_vocab_size": target_vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_dim": hidden_dim,
            "n_layers": n_layers,
            "dropout": dropout,
            "cell": cell,
            "nonlinearity": nonlinearity,
            "attn_dim": attn_dim,
            "input_feeding": input_feeding,
            "share_embedding": share_embedding,
            "tie_head": tie_head,
        }
        self.source_vocab_size = source_vocab_size
        self.target_vocab_size = target_vocab_size
        self.input_feeding = input_feeding
        self.tie_head = tie_head
        where: dict[str, object] = {"device": device, "dtype": dtype}
        E, H = embedding_dim, hidden_dim
        self.source_embedding = AffineEmbedding(source_vocab_size, E, **where)  # type: ignore[arg-type]
        self.target_embedding = (
            self.source_embedding if share_embedding else AffineEmbedding(target_vocab_size, E, **where)  # type: ignore[arg-type]
        )
        layers, between = recurrence(cell, nonlinearity), dropout if n_layers > 1 else 0.0
        self.encoder = layers(E, H, n_layers, dropout=between, bidirectional=True, **where)
        self.bridge = Linear(2 * H, H, **where)  # type: ignore[arg-type]
        self.cell_bridge = Linear(2 * H, H, **where) if cell == "lstm" else None  # type: ignore[arg-type]
        self.decoder = layers(E + E * input_feeding, H, n_layers, dropout=between, **where)
        self.attention = AdditiveAttention(H, 2 * H, attn_dim, **where)  # type: ignore[arg-type]
        self.value = Linear(2 * H, E, bias=False, **where)
        self.readout = Linear(H, E, **where)  # type: ignore[arg-type]
        self.head = Linear(E, target_vocab_size, **where)  # type: ignore[arg-type]
        if tie_head:
            self.head.weight = self.target_embedding.weight
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that a recurrent network trains: U orthogonal, which keeps h in size, biases zero."""
        for layer in (self.source_embedding, self.target_embedding, self.attention):
            layer.reset_parameters()
        for recurrent in (self.encoder, self.decoder):
            recurrent.reset_parameters()
            start_recurrence(recurrent)
        self.value.reset_parameters()
        for linear in (self.bridge, self.cell_bridge, self.readout, self.head):
            if linear is not None:
                linear.reset_parameters()
                nn.init.zeros_(linear.bias)
        if self.tie_head:
            # As rows of a head, those of N(0, 1) would make scores as large as the root of E.
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(self.head.in_features))

    def config(self) -> dict[str, int | float | str]:
        """Return the constructor's arguments, all of JSON types: `Seq2Seq(**config)` is the same model again."""
        return dict(self._config)

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
            source: token ids, [B, S] int64.
            target: token ids, [B, T] int64, the first of each row what every target begins with.
            source_lengths: tokens of each source, [B] int64; None: all have S.
            target_lengths: likewise of the targets; the scores beyond them mean nothing.
            keep: the positions to score, [B, T] bool; None for all. Those that nobody reads cost no arithmetic.

        Returns:
            Scores [B, T, V], or with `keep` those of its positions only, [N, V], row after row.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: ids that are not of an integer dtype.
            IndexError: a token id outside its vocabulary.
        """
        _check_ids("source", source, "B, S")
        _check_ids("target", target, "B, T")
        if target.shape[0] != source.shape[0]:
            raise ValueError(f"Seq2Seq: target must have the {source.shape[0]} rows of source, got {target.shape[0]}")
        memory, state = self.encode(source, source_lengths)
        x = self.target_embedding(target)  # [B, T, E]
        B = len(x)
        x = _dropped(x, self._mask(B, x))
        if self.input_feeding:
            mask = self._mask(B, x, self.readout.in_features)
            steps = []
            for t in range(x.shape[1]):
                vectors, state, _ = self._step(x[:, t : t + 1], state, memory, mask)
                steps.append(vectors)
            vectors = torch.cat(steps, 1) if steps else x
            return self._scores(vectors if keep is None else vectors[keep])
        h, _ = self._decode(x.transpose(0, 1), state, target_lengths)
        h = h.transpose(0, 1)  # [B, T, H]
        context, _ = self._attend(h, memory)
        h = _dropped(h, self._mask(B, h))
        if keep is not None:
            h, context = h[keep], context[keep]
        return self._scores(self._read_out(h, context))

    @torch.no_grad()
    def tables(self) -> Tables:
        """Multiply all embeddings by the first layers' W at once, for many calls with the same weights.

        A search that is given the tables looks up in them what it would compute for each token anew: about a fifth of
        its arithmetic. Making them takes as long as that of a token for each entry of the vocabularies, and they hold
        (2 V + V') G H numbers. They are for the CPU, in float32 and float64, of the target without input feeding;
        otherwise, and where layers have been replaced or are hooked, there are none.
        """

        def of(embedding: AffineEmbedding, layers: RNN | GRU | LSTM, directions: int) -> list[Tensor] | None:
            ours = _untouched(embedding, AffineEmbedding) and _untouched(layers, RNN, GRU, LSTM)
            if not ours or not ops.own_products(embedding.weight):
                return None
            rows = embedding.fold()
            return [ops.linear(rows, w_ih, b_ih) for w_ih, _, b_ih, _ in layers.all_weights[:directions]]

        target = None if self.input_feeding else of(self.target_embedding, self.decoder, 1)
        return Tables(of(self.source_embedding, self.encoder, 2), None if target is None else target[0])

    def encode(
        self, source: Tensor, lengths: Tensor | None = None, tables: Tables | None = None
    ) -> tuple[Memory, Seq2SeqState]:
        """Read sources [B, S] int64 of `lengths` [B] int64; return what to attend to, and the decoder's first state.

        Args:
            source: token ids, [B, S] int64.
            lengths: tokens of each source, [B] int64; None: all have S.
            tables: those of `tables()`, with the weights as they are and without a derivative; None: none.

        Raises:
            ValueError, TypeError, IndexError: as `forward`.
            RuntimeError: tables, while gradients are recorded or in training mode.
        """
        _check_ids("source", source, "B, S")
        if tables is not None and (self.training or torch.is_grad_enabled()):
            raise RuntimeError("Seq2Seq: tables are for inference: call eval(), and torch.no_grad()")
        by = None if tables is None else tables.source
        # Where no row ends early there is nothing to pack or mask. A GPU's lengths would have to be waited for.
        if lengths is not None and lengths.is_cpu:
            if bool((lengths == source.shape[1]).all()):
                lengths = None
            elif bool((lengths > 0).all()):  # what is empty cannot be packed
                return self._encode_packed(source, lengths, by)

        def dropped(features: Tensor) -> Tensor:
            mask = self._mask(len(source), features)
            return features if mask is None else features * mask

        if by is not None and lengths is None:
            read, last = self._look_up(source.t(), by)
        else:
            read, last = self.encoder(dropped(self.source_embedding(source.t())), lengths=lengths)  # [S, B, 2 H]
        keys, values = self.attention.project_keys(read), self.value(dropped(read))
        # Dense, because every step of a search looks at them.
        keys, values = (each.transpose(0, 1).contiguous() for each in (keys, values))
        return Memory(keys, values, lengths), self._first_state(last, keys)

    def _encode_packed(
        self, source: Tensor, lengths: Tensor, tables: list[Tensor] | None
    ) -> tuple[Memory, Seq2SeqState]:
        """The same of sources of unequal lengths from 1 on: from the ids on there is nothing but what has been read."""
        B, S = source.shape
        rows, batch_sizes, steps, rows_of = ops.packing(lengths, S)
        places = rows_of * S + steps

        def dropped(features: Tensor) -> Tensor:
            mask = self._mask(B, features)
            return features if mask is None else features * mask.index_select(0, rows_of)

        ids = source.flatten().index_select(0, places)
        if tables is not None:
            read, last = self._look_up(ids, tables, batch_sizes)
        else:
            packed, last = self.encoder(PackedSequence(dropped(self.source_embedding(ids)), batch_sizes))
            read = packed.data  # [N, 2 H]
        keys = self.attention.project_keys(read.unsqueeze(0)).squeeze(0)
        keys, values = (
            each.new_zeros(B * S, each.shape[-1]).index_copy(0, places, each).unflatten(0, (B, S))
            for each in (keys, self.value(dropped(read)))
        )
        return Memory(keys, values, lengths), self._first_state(last, keys, rows.argsort())

    def _look_up(
        self, ids: Tensor, tables: list[Tensor], batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """What the encoder returns for ids [S, B], or packed ones [N]."""
        weights = [weight for row in self.encoder.all_weights for weight in row]
        options: Any = {"bidirectional": True, "batch_sizes": batch_sizes, "tables": tables}
        y, h_n, c_n = ops.stack(self.encoder.cell, ids, None, None, weights, **options)
        return y, (h_n, c_n) if self.cell_bridge is not None else h_n

    def _first_state(
        self, last: Tensor | tuple[Tensor, Tensor], like: Tensor, rows: Tensor | None = None
    ) -> Seq2SeqState:
        """What the decoder starts from, by the encoder's last state, of which row rows[n] is that of source n."""
        h, c = last if isinstance(last, tuple) else (last, None)
        if rows is not None:
            h, c = h.index_select(1, rows), None if c is None else c.index_select(1, rows)
        hidden = torch.tanh(self.bridge(_directions_together(h)))
        cell = None if c is None or self.cell_bridge is None else self.cell_bridge(_directions_together(c))
        fed = like.new_zeros(h.shape[1], self.readout.out_features) if self.input_feeding else None
        return Seq2SeqState(hidden, cell, fed)

    def step(
        self,
        ids: Tensor,
        state: Seq2SeqState,
        memory: Memory,
        need_weights: bool = False,
        tables: Tables | None = None,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """Read one more token of K targets of each source, and score what follows.

        Args:
            ids: [B, K] int64.
            state: of the B · K targets, row by row of `ids`.
            memory: of the B sources.
            need_weights: whether the attention's weights are wanted.
            tables: as `encode`.

        Returns:
            Scores [B, K, V], the new state, and the weights [B, K, S] or None.
        """
        vectors, state, weights = self._next(ids, state, memory, need_weights, tables)
        return self._scores(vectors), state, weights

    def _next(
        self,
        ids: Tensor,
        state: Seq2SeqState,
        memory: Memory,
        need_weights: bool = False,
        tables: Tables | None = None,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """One step from ids [B, K] to what is predicted from, [B, K, E]: in one call of an op where that serves."""
        serves = (  # it has no derivative, dropout, weights or hooks
            not need_weights
            and not self.training
            and not torch.is_grad_enabled()
            and ops.own_products(state.hidden)
            and _untouched(self.decoder, RNN, GRU, LSTM)
            and _untouched(self.attention, AdditiveAttention)
            and _untouched(self.readout, Linear)
        )
        if not serves:
            return self._step(self.target_embedding(ids), state, memory, need_weights=need_weights)
        table = None if tables is None else tables.target
        x = ids.reshape(1, -1)
        if table is None:
            x = self.target_embedding(x)
            if state.fed is not None:
                x = torch.cat((x, state.fed.unsqueeze(0)), -1)
        vectors, hidden, cell = ops.attention_step(
            self.decoder.cell,
            x,
            state.hidden,
            state.cell,
            [weight for row in self.decoder.all_weights for weight in row],
            self.attention.q_proj_weight,
            memory.keys,
            self.attention.v,
            memory.values,
            self.readout.weight,
            self.readout.bias,
            table=table,
            key_lengths=memory.lengths,
        )
        fed = None if state.fed is None else vectors
        new = Seq2SeqState(hidden, None if state.cell is None else cell, fed)
        return vectors.view(*ids.shape, vectors.shape[-1]), new, None

    def _step(
        self,
        x: Tensor,
        state: Seq2SeqState,
        memory: Memory,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Seq2SeqState, Tensor | None]:
        """The same from embeddings [B, K, E], layer by layer; `mask` is that of dropout."""
        B, K = x.shape[:2]
        x = x.flatten(0, 1).unsqueeze(0)
        if state.fed is not None:
            x = torch.cat((x, state.fed.unsqueeze(0)), -1)
        h, state = self._decode(x, state)
        h = h.view(B, K, h.shape[-1])
        context, weights = self._attend(h, memory, need_weights)
        vectors = self._read_out(_dropped(h, mask), context)
        fed = None if state.fed is None else vectors.flatten(0, 1)
        return vectors, state._replace(fed=fed), weights

    def _decode(self, x: Tensor, state: Seq2SeqState, lengths: Tensor | None = None) -> tuple[Tensor, Seq2SeqState]:
        """The decoder's recurrence over x [T, N, *]."""
        hidden, cell, fed = state
        h, last = self.decoder(x, hidden if cell is None else (hidden, cell), lengths=lengths)
        hidden, cell = last if isinstance(last, tuple) else (last, None)
        return h, Seq2SeqState(hidden, cell, fed)

    def _attend(self, h: Tensor, memory: Memory, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """What states h [B, K, H] attend to, [B, K, E], and the weights."""
        found: tuple[Tensor, Tensor | None] = self.attention(
            h,
            None,
            memory.values,
            key_lengths=memory.lengths,
            projected_keys=memory.keys,
            need_weights=need_weights,
        )
        return found

    def _read_out(self, h: Tensor, context: Tensor) -> Tensor:
        """What a token is predicted from, [..., E]."""
        return torch.tanh(self.readout(h) + context)

    def _scores(self, vectors: Tensor) -> Tensor:
        return cast(Tensor, self.head(vectors))

    def _best(self, vectors: Tensor, check: bool) -> Tensor:
        """The ids [B] of the largest scores by vectors [B, 1, E]; if asked to, raise where a score is NaN."""
        vectors = vectors.squeeze(1)
        if _untouched(self.head, Linear):
            weight, bias = self.head.weight, self.head.bias
            ids = ops.linear_argmax(vectors, weight, bias)
            if check:  # NaN would be the largest
                _check_scores((vectors * weight[ids]).sum(-1) + bias[ids])
            return ids
        scores = self._scores(vectors)
        if check:
            _check_scores(scores)
        return scores.argmax(-1)

    def _mask(self, rows: int, like: Tensor, size: int | None = None) -> Tensor | None:
        """What dropout multiplies features by, [rows, size]: drawn once a row, since anew at each position is slow."""
        if not self.training or self.dropout.p == 0:
            return None
        return cast(Tensor, self.dropout(like.new_ones(rows, size or like.shape[-1])))

    def stream(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None = None,
        max_length: int | None = None,
        tables: Tables | None = None,
    ) -> Iterator[Tensor]:
        """Yield the ids [B] of greedy search one by one: of each row the best next token, and `end` ever after its end.

        Call `eval()` first, so that dropout is off.

        Args:
            source: token ids, [B, S] int64.
            end: the id that every target begins and ends with.
            source_lengths: tokens of each source, [B] int64; None: all have S.
            max_length: ids of a row at most; by default 10 more than twice those of its source.
            tables: as `encode`.

        Raises:
            ValueError: a shape or number that does not fit.
            RuntimeError: the scores are NaN.
        """
        self._check_search(end, max_length)
        return self._stream(source, end, source_lengths, max_length, tables)

    @torch.inference_mode()
    def _stream(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None,
        max_length: int | None,
        tables: Tables | None,
    ) -> Iterator[Tensor]:
        limits = _limits(source, source_lengths, max_length)
        memory, state = self.encode(source, source_lengths, tables)
        ids = source.new_full((len(source),), end)
        ended = limits <= 0
        for n in range(1, int(limits.max()) + 1 if len(limits) else 0):
            if ended.all():
                return
            vectors, state, _ = self._next(ids.unsqueeze(1), state, memory, tables=tables)
            ids = self._best(vectors, check=n == 1).masked_fill(ended, end)
            yield ids
            ended = ended | (ids == end) | (limits <= n)

    @torch.inference_mode()
    def search(
        self,
        source: Tensor,
        end: int,
        source_lengths: Tensor | None = None,
        *,
        beam: int = 5,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        max_length: int | None = None,
        tables: Tables | None = None,
    ) -> list[list[Hypothesis]]:
        """Find likely targets by beam search.

        The beam of a source ends when it has found as many hypotheses as it is wide, and none of those still open would
        be better than the worst of them if it ended now. Each source is searched as if it were alone. Call `eval()`
        first, so that dropout is off.

        Args:
            source: token ids, [B, S] int64.
            end: the id that every target begins and ends with.
            source_lengths: tokens of each source, [B] int64; None: all have S.
            beam: K, how many targets of each source are followed at a time; 1 is greedy search.
            num_return_sequences: how many of the best to return, at most `beam`.
            length_penalty: the score of a target is its log-probability over length to this power, its end included.
            max_length: ids of a target at most, where it is cut off; by default 10 more than twice those of its source.
            tables: as `encode`.

        Returns:
            For each source its hypotheses, best first; fewer than asked for where there are no more.

        Raises:
            ValueError: a shape or number that does not fit.
            RuntimeError: the scores are NaN.

        Source: the normalisation by length is that of Wu et al., arXiv 1609.08144, without its constants.
        """
        self._check_search(end, max_length)
        if beam < 1:
            raise ValueError(f"Seq2Seq: beam must be at least 1, got {beam}")
        if not 1 <= num_return_sequences <= beam:
            got = f"from 1 to beam = {beam}, got {num_return_sequences}"
            raise ValueError(f"Seq2Seq: num_return_sequences must be {got}")
        if not 0 <= length_penalty < math.inf:
            raise ValueError(f"Seq2Seq: length_penalty must be at least 0 and finite, got {length_penalty}")
        limits = _limits(source, source_lengths, max_length)
        memory, state = self.encode(source, source_lengths, tables)
        state = state.repeat(beam)
        found = _Beam(len(source), beam, end, limits, length_penalty, source.device)
        while not found.done:
            scores, state, _ = self.step(found.ids, state, memory, tables=tables)
            if found.length == 0:
                _check_scores(scores)
            state.reorder_(found.advance(scores))
        return found.best(num_return_sequences)

    def _check_search(self, end: int, max_length: int | None) -> None:
        if not 0 <= end < self.target_vocab_size:
            raise ValueError(f"Seq2Seq: end must be an id from 0 to {self.target_vocab_size - 1}, got {end}")
        if max_length is not None and max_length < 0:
            raise ValueError(f"Seq2Seq: max_length must be at least 0, got {max_length}")


class _Beam:
    """The targets that a beam search follows, K for each of B sources, and the best that have ended."""

    def __init__(self, B: int, K: int, end: int, limits: Tensor, length_penalty: float, device: torch.device) -> None:
        self.end, self.limits, self.length_penalty = end, limits, length_penalty
        self.length = 0
        longest = int(limits.max()) if B else 0
        # All K begin alike: the first alone is followed at first.
        self.totals = torch.full((B, K), -math.inf, device=device)
        self.totals[:, 0] = 0
        self.paths = torch.full((B, K, longest), end, device=device)
        self.ended_scores = torch.full((B, K), -math.inf, device=device)
        self.ended_paths = self.paths.clone()
        self.closed = limits <= 0

    @property
    def done(self) -> bool:
        return bool(self.closed.all())

    @property
    def ids(self) -> Tensor:
        """The last ids, [B, K]."""
        if self.length == 0:
            return torch.full(self.totals.shape, self.end, device=self.totals.device)
        return self.paths[:, :, self.length - 1]

    def advance(self, scores: Tensor) -> Tensor:
        """Take one more token each by scores [B, K, V]; return the rows [B · K] whose state goes on."""
        B, K, V = scores.shape
        if self.totals.dtype != scores.dtype:
            self.totals = self.totals.to(torch.promote_types(self.totals.dtype, scores.dtype))
        totals = self.totals.unsqueeze(-1) + F.log_softmax(scores, -1, dtype=self.totals.dtype)
        # At most K of the best 2 K end, one for each target that is followed: the others are enough to go on with.
        best, places = totals.flatten(1).topk(min(2 * K, K * V))
        origins, tokens = places // V, places % V
        self.length += 1
        paths = self.paths.gather(1, origins.unsqueeze(-1).expand(-1, -1, self.paths.shape[-1]))
        paths[:, :, self.length - 1] = tokens

        ends = tokens == self.end
        per_length = self.length**self.length_penalty
        # What has no time left ends as it is.
        cut = (self.limits <= self.length).unsqueeze(-1)
        ending = (ends | cut)[:, :K] & ~self.closed.unsqueeze(-1)
        candidates = (best[:, :K] / per_length).masked_fill(~ending, -math.inf)
        self.ended_scores, kept = torch.cat((self.ended_scores.to(best.dtype), candidates), 1).topk(K)
        everything = torch.cat((self.ended_paths, paths[:, :K]), 1)
        self.ended_paths = everything.gather(1, kept.unsqueeze(-1).expand(-1, -1, everything.shape[-1]))

        # The first K that do not end, in their order.
        order = (ends.to(torch.int64) * 2 * K + torch.arange(ends.shape[1], device=ends.device)).argsort(-1)[:, :K]
        self.totals = best.gather(1, order).masked_fill(ends.gather(1, order), -math.inf)
        self.paths = paths.gather(1, order.unsqueeze(-1).expand(-1, -1, paths.shape[-1]))
        overtaken = self.ended_scores[:, -1] >= self.totals[:, 0] / per_length
        self.closed = self.closed | cut.squeeze(-1) | (overtaken & (self.ended_scores[:, -1] > -math.inf))
        first = torch.arange(B, device=places.device).unsqueeze(-1) * K
        return (first + origins.gather(1, order)).flatten()

    def best(self, count: int) -> list[list[Hypothesis]]:
        """The best hypotheses of each source."""
        found = []
        for scores, paths in zip(self.ended_scores.tolist(), self.ended_paths.cpu(), strict=True):
            row = []
            for score, path in zip(scores[:count], paths, strict=False):
                if score > -math.inf:
                    row.append(Hypothesis(path[: int((path != self.end).sum())], score))
            found.append(row)
        return found


def _untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is still of one of these types, and nobody listens to its calls."""
    return type(module) in types and not module._forward_hooks and not module._forward_pre_hooks


def _directions_together(state: Tensor) -> Tensor:
    """States [2 L, B, H] of both directions side by side, [L, B, 2 H]."""
    return torch.cat((state[0::2], state[1::2]), -1)


def _dropped(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features [B, T, *] times a mask [B, *]."""
    return features if mask is None else features * mask.unsqueeze(1)


def _limits(source: Tensor, lengths: Tensor | None, max_length: int | None) -> Tensor:
    """How many ids the target of each source may have, [B]."""
    if max_length is not None:
        return torch.full((len(source),), max_length, device=source.device)
    if lengths is None:
        lengths = torch.full((len(source),), source.shape[1], device=source.device)
    return 2 * lengths + 10


def _check_ids(name: str, ids: Tensor, shape: str) -> None:
    if ids.dim() != 2:
        raise ValueError(f"Seq2Seq: {name} must be [{shape}], got {list(ids.shape)}")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"Seq2Seq: {name} must be int64, got {ids.dtype}".replace("torch.", ""))


def _check_scores(scores: Tensor) -> None:
    # Whatever is NaN in the weights shows in the first scores.
    if scores.isnan().any():
        raise RuntimeError("Seq2Seq: the scores of the first token are not a number")
