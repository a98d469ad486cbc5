"""The models: training steps, generation and greedy search, against the same models on torch.nn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llm_ext
from bench import limits
from bench.cases.building import READ_WEIGHTS, dtype_name, limit, size_name
from bench.comparison import OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call
from bench.torch_models import torch_llm, torch_seq2seq

__all__ = ["llm_generation", "llm_training", "seq2seq_greedy", "seq2seq_training"]

_LLM_NAMES = "llm_ext.LLM", "LLM on torch.nn.RNN"
_SEQ2SEQ_NAMES = "llm_ext.Seq2Seq", "Seq2Seq on torch.nn"


def _training_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> list[Tensor]:
    """Take a step; return the loss and the gradients, in the order of the parameters' names."""
    optimizer.zero_grad()
    loss = loss_of()
    torch.autograd.backward(loss)
    optimizer.step()
    # `TorchLayer` adds a component to the names of its parameters.
    names = {name.replace("layer.", ""): parameter for name, parameter in model.named_parameters()}
    return [loss, *(gradient for name in sorted(names) if (gradient := names[name].grad) is not None)]


def llm_training(B: int, T: int, V: int, E: int, H: int) -> Case:
    """A step of the usual training loop: forward, cross entropy, backward, Adam."""

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours = llm_ext.LLM(V, E, H, V, 1, 0.0, dtype=dtype)
        other = torch_llm(ours)
        x, target = torch.randint(V, (2, B, T))

        def trainer(model: llm_ext.LLM) -> Callable[[], Call]:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

            def loss() -> Tensor:
                return F.cross_entropy(model(x)[0].flatten(0, 1), target.flatten())

            return lambda: lambda: _training_step(model, optimizer, loss)

        return Comparison(
            tensors(trainer(copy.deepcopy(other).double())()()),
            Candidate(_LLM_NAMES[0], OURS, trainer(ours)),
            [Candidate(_LLM_NAMES[1], "torch", trainer(other))],
        )

    return Case(f"model/training/{size_name(B=B, T=T, V=V, E=E, H=H)}", build, True, B * T / 1e3, "k token")


def _regret(scores: Tensor, ids: Tensor) -> Tensor:
    """By how much less than the best token each chosen one scores, relative to the range of the scores."""
    best, worst = scores.amax(-1), scores.amin(-1)
    return (best - scores.gather(-1, ids[..., None])[..., 0]) / (best - worst)


def llm_generation(B: int, tokens: int, V: int, E: int, H: int, dtype: torch.dtype | None = None) -> Case:
    """Greedy generation from a prompt of one token, checked token by token.

    In 16 bits two tokens may score too nearly the same to be told apart; there each token must score as high as the
    best one within the tolerance. The limit is reading the weights once per token, without those of the embedding, of
    which a token needs one row.
    """
    # In 16 bits the model on torch.nn would round the state of the attention at each token and diverge.
    attention = "hidden" if dtype is None else "none"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours = llm_ext.LLM(V, E, H, V, 1, 0.0, attention=attention, dtype=dtype).eval()
        other = torch_llm(ours)
        prompt = torch.randint(V, (B, 1))
        exact = copy.deepcopy(other).double()

        def regret(ids: Any) -> list[Tensor]:
            with torch.no_grad():
                scores, _ = exact(ids[:, :-1])
            return [_regret(scores, ids[:, 1:])]

        def generator(model: llm_ext.LLM) -> Callable[[], Call]:
            return lambda: lambda: model.generate(prompt, tokens, temperature=0)

        outputs: Callable[[Any], list[Tensor]]
        if dtype.itemsize == 2:
            outputs, expected = regret, [torch.zeros(B, tokens, dtype=torch.float64)]
        else:
            outputs, expected = tensors, tensors(generator(exact)()())
        layers = [layer for layer in (ours.rnn, ours.pool, ours.head) if layer is not None]
        floats = sum(parameter.nbytes for layer in layers for parameter in layer.parameters()) // 4
        return Comparison(
            expected,
            Candidate(_LLM_NAMES[0], OURS, generator(ours), outputs),
            [
                Candidate(_LLM_NAMES[1], "torch", generator(other), outputs),
                limit(READ_WEIGHTS, lambda: limits.read(floats, tokens, threads)),
            ],
        )

    kind = "generation" if dtype is None else f"{dtype_name(dtype)}-generation"
    name = f"model/{kind}/{size_name(B=B, T=tokens, V=V, E=E, H=H)}"
    return Case(name, build, False, B * tokens / 1e3, "k token", dtype=dtype)


def seq2seq_training(B: int, S: int, V: int, E: int, H: int) -> Case:
    """A step of the usual training loop, lengths S ± 5 and S ± 2: forward, cross entropy, backward, Adam."""

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours = llm_ext.Seq2Seq(V, V, E, H, share_embedding=True, tie_head=True, dtype=dtype)
        with torch.no_grad():
            # With initial weights the attention hardly depends on the query, whose gradient is then a difference of
            # nearly equal numbers with an error of 2e-4 in float32, in torch as well. Training leaves that state soon.
            for parameter in ours.attention.parameters():
                parameter.mul_(5)
        other = torch_seq2seq(ours)
        # Batches are formed by length, first of all by that of the targets.
        source_lengths, target_lengths = torch.randint(S - 5, S + 6, (B,)), torch.randint(S - 2, S + 3, (B,))
        source, target = (torch.randint(V, (B, int(n.max()))) for n in (source_lengths, target_lengths))
        keep = torch.arange(target.shape[1]) < target_lengths[:, None]
        expected_ids = torch.randint(V, (int(target_lengths.sum()),))

        def trainer(model: llm_ext.Seq2Seq) -> Callable[[], Call]:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

            def loss() -> Tensor:
                return F.cross_entropy(model(source, target, source_lengths, target_lengths, keep), expected_ids)

            return lambda: lambda: _training_step(model, optimizer, loss)

        return Comparison(
            tensors(trainer(copy.deepcopy(other).double())()()),
            Candidate(_SEQ2SEQ_NAMES[0], OURS, trainer(ours)),
            [Candidate(_SEQ2SEQ_NAMES[1], "torch", trainer(other))],
        )

    name = f"translate/training/{size_name(B=B, T=S, V=V, E=E, H=H)}"
    return Case(name, build, True, B * S / 1e3, "k token", {_SEQ2SEQ_NAMES[1]: 2.5})


def seq2seq_greedy(N: int, B: int, T: int, V: int, E: int, H: int) -> Case:
    """Greedy search of T tokens for N sources of 5 to 25 tokens, B at a time, sorted by length.

    Each token must score as high as the best one within the tolerance, because the last bits may decide.
    """

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours = llm_ext.Seq2Seq(V, V, E, H, share_embedding=True, dtype=dtype).eval()
        end = V - 1
        with torch.no_grad():
            ours.head.bias[end] = -1e4  # no target ends early, so that the work does not depend on the result
        other = torch_seq2seq(ours)
        exact = copy.deepcopy(other).double()
        lengths = torch.split(torch.randint(5, 26, (N,)).sort().values, B)
        batches = [(torch.randint(V, (len(n), int(n.max()))), n) for n in lengths]

        def searcher(model: llm_ext.Seq2Seq) -> Callable[[], Call]:
            def search() -> list[Tensor]:
                projections = model.input_projections()
                return [
                    torch.stack(list(model.stream(source, end, n, T, input_projections=projections)), 1)
                    for source, n in batches
                ]

            return lambda: search

        def regret(found: Any) -> list[Tensor]:
            rows = []
            for (source, n), ids in zip(batches, found, strict=True):
                target = torch.cat((ids.new_full((len(ids), 1), end), ids[:, :-1]), 1)
                with torch.no_grad():
                    rows.append(_regret(exact(source, target, n)[..., :end], ids))
            return [torch.cat(rows)]

        unprojected = torch_seq2seq(ours, project_once=False)
        return Comparison(
            [torch.zeros(N, T, dtype=torch.float64)],
            Candidate(_SEQ2SEQ_NAMES[0], OURS, searcher(ours), regret),
            [
                Candidate(_SEQ2SEQ_NAMES[1], "torch", searcher(other), regret),
                Candidate(f"{_SEQ2SEQ_NAMES[1]}, keys projected at each step", "torch", searcher(unprojected), regret),
            ],
        )

    name = f"translate/greedy/{size_name(N=N, B=B, T=T, V=V, E=E, H=H)}"
    return Case(name, build, False, N / 1e3, "k sentence", {_SEQ2SEQ_NAMES[1]: 3.0})
