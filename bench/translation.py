"""The translator: a step of its training, and greedy search, against the same model on torch.nn and eager attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext
from bench.contest import Case, Contest, Contestant, tensors
from bench.plain import plain_linears
from bench.timing import Call


class TorchLayer(nn.Module):
    """A recurrent layer of torch.nn, with the weights of ours and its argument `lengths`."""

    def __init__(self, ours: Any, kind: type[nn.Module], pack: bool) -> None:
        super().__init__()
        options = {"num_layers": ours.num_layers, "bidirectional": ours.bidirectional}
        dtype = next(ours.parameters()).dtype
        self.layer: Any = kind(ours.input_size, ours.hidden_size, dtype=dtype, **options)
        self.layer.load_state_dict(ours.state_dict())
        # Where nobody looks at what is beyond a length, torch is quicker without packing.
        self.pack = pack

    def forward(self, x: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """Run over x [T, B, I]."""
        if lengths is None or not self.pack:
            return self.layer(x, hx)
        y, last = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(y, total_length=len(x))[0], last


class TorchAttention(nn.Module):
    """`llm_ext.AdditiveAttention` as its formula stands, with the tensor of Tq × Tk × A formed.

    Args:
        ours: whose parameters it has.
        ahead: whether keys are projected once for all steps, or anew in each.
    """

    def __init__(self, ours: llm_ext.AdditiveAttention, ahead: bool) -> None:
        super().__init__()
        self.ahead = ahead
        self.q_proj_weight, self.k_proj_weight = ours.q_proj_weight, ours.k_proj_weight
        self.v, self.bias = ours.v, ours.bias

    def project_keys(self, keys: Tensor) -> Tensor:
        """Return W_k keys + b, or the keys as they are."""
        return F.linear(keys, self.k_proj_weight, self.bias) if self.ahead else keys

    def forward(
        self,
        query: Tensor,
        keys: None,
        values: Tensor,
        *,
        key_lengths: Tensor | None,
        projected_keys: Tensor,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to values by what `project_keys` returned for their keys."""
        if not self.ahead:
            projected_keys = F.linear(projected_keys, self.k_proj_weight, self.bias)
        q = F.linear(query, self.q_proj_weight)
        scores = torch.tanh(q[:, :, None] + projected_keys[:, None]) @ self.v
        if key_lengths is not None:
            beyond = torch.arange(values.shape[1]) >= key_lengths[:, None, None]
            scores = scores.masked_fill(beyond, -math.inf)
        alpha = torch.softmax(scores, -1)
        return torch.bmm(alpha, values), alpha if need_weights else None


def plain_translator(model: llm_ext.Seq2Seq, ahead: bool = True) -> llm_ext.Seq2Seq:
    """Return a copy with the same weights, on torch.nn's layers and eager attention; `ahead` as of that."""
    kind = getattr(nn, str(model.config()["cell"]).upper())
    model = copy.deepcopy(model)
    parts: Any = model  # of other classes than its own
    parts.encoder = TorchLayer(model.encoder, kind, pack=True)
    parts.decoder = TorchLayer(model.decoder, kind, pack=False)
    parts.attention = TorchAttention(model.attention, ahead)
    plain_linears(model)
    return model


def training(B: int, S: int, V: int, E: int, H: int) -> Case:
    """A step of the usual training loop, lengths of S ± 5 and S ± 2: forward, cross entropy, backward, Adam."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours = llm_ext.Seq2Seq(V, V, E, H, share_embedding=True, tie_head=True, dtype=dtype)
        with torch.no_grad():
            # At first attention hardly depends on the query, whose gradient is then a difference of equal numbers, and
            # wrong by 2e-4 in torch's float32 as well as in ours. Nobody trains there for long.
            for parameter in ours.attention.parameters():
                parameter.mul_(5)
        other = plain_translator(ours)
        # Batches are formed by length, above all of the targets.
        source_lengths, target_lengths = torch.randint(S - 5, S + 6, (B,)), torch.randint(S - 2, S + 3, (B,))
        source, target = (torch.randint(V, (B, int(n.max()))) for n in (source_lengths, target_lengths))
        keep = torch.arange(target.shape[1]) < target_lengths[:, None]
        expected = torch.randint(V, (int(target_lengths.sum()),))

        def trainer(model: llm_ext.Seq2Seq) -> Callable[[], Call]:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

            def call() -> list[Tensor]:
                optimizer.zero_grad()
                scores = model(source, target, source_lengths, target_lengths, keep)
                loss = F.cross_entropy(scores, expected)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                # The names of the two differ by that of the wrapped layer.
                return [loss, *(gradients[name] for name in sorted(gradients, key=lambda n: n.replace("layer.", "")))]

            return lambda: call

        truth = tensors(trainer(copy.deepcopy(other).double())()())
        return Contest(
            truth,
            Contestant("llm_ext.Seq2Seq", "llm_ext", trainer(ours)),
            [Contestant("Seq2Seq on torch.nn", "torch", trainer(other))],
        )

    name = f"translate/training/B{B}-T{S}-V{V}-E{E}-H{H}"
    return Case(name, build, True, B * S / 1e3, "k token", {"Seq2Seq on torch.nn": 2.5})


def greedy(sentences: int, B: int, T: int, V: int, E: int, H: int) -> Case:
    """Sentences of 5 to 25 tokens, by length and B at a time, to T tokens; each must be as good as the best."""

    def build(dtype: torch.dtype, threads: int) -> Contest:
        ours = llm_ext.Seq2Seq(V, V, E, H, share_embedding=True, dtype=dtype).eval()
        end = V - 1
        with torch.no_grad():
            ours.head.bias[end] = -1e4  # so that the work is the same whatever is found
        other = plain_translator(ours)
        exact = copy.deepcopy(other).double()
        lengths = torch.randint(5, 26, (sentences,)).sort().values.split(B)
        batches = [(torch.randint(V, (len(n), int(n.max()))), n) for n in lengths]

        def searcher(model: llm_ext.Seq2Seq) -> Callable[[], Call]:
            def call() -> list[Tensor]:
                tables = model.tables()
                return [torch.stack(list(model.stream(source, end, n, T, tables)), 1) for source, n in batches]

            return lambda: call

        def regret(found: Any) -> list[Tensor]:
            """How much worse than the best a token is, which the last bits may decide."""
            rows = []
            for (source, n), ids in zip(batches, found, strict=True):
                begun = torch.cat((ids.new_full((len(ids), 1), end), ids[:, :-1]), 1)
                with torch.no_grad():
                    scores = exact(source, begun, n)[..., :end]
                best, worst = scores.amax(-1), scores.amin(-1)
                rows.append((best - scores.gather(-1, ids[..., None])[..., 0]) / (best - worst))
            return [torch.cat(rows)]

        return Contest(
            [torch.zeros(sentences, T, dtype=torch.float64)],
            Contestant("llm_ext.Seq2Seq", "llm_ext", searcher(ours), regret),
            [
                Contestant("Seq2Seq on torch.nn", "torch", searcher(other), regret),
                Contestant("the same, keys at each step", "torch", searcher(plain_translator(ours, False)), regret),
            ],
        )

    name = f"translate/greedy/N{sentences}-B{B}-T{T}-V{V}-E{E}-H{H}"
    return Case(name, build, False, sentences / 1e3, "k sentence", {"Seq2Seq on torch.nn": 3.0})


CASES = (
    training(64, 15, 4096, 256, 512),
    greedy(1000, 32, 15, 4096, 256, 512),
)
