"""Transforms of torch on recurrent layers: per-sample gradients, forward mode, double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, func, nn

import llm_ext
from bench import peers
from bench.cases.building import double, given_targets, size_name
from bench.cases.recurrence import gflop, kind_name, make_layers
from bench.cells import Cell
from bench.comparison import OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call
from llm_ext import reference

__all__ = ["double_backward", "forward_mode", "per_sample_gradients", "private_step"]

FORWARD_PASS = "a forward pass"


class _CharacterModel(nn.Module):
    """Embedding, LSTM and affine head, of any library."""

    def __init__(self, embedding: nn.Module, lstm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.lstm = lstm
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        """Return scores [B, T, V] of ids [B, T]."""
        scores: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return scores


def _loss(model: Callable[[Tensor], Tensor], ids: Tensor, target: Tensor) -> Tensor:
    """Return the sum over the samples of the mean cross entropy of each."""
    scores = model(ids)
    return F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum") / ids.shape[1]


def _character_models(V: int, E: int, H: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return models of llm_ext, of torch, and of torch in float64, with the same weights."""
    plain: dict[str, Any] = {"dtype": dtype}
    other = _CharacterModel(
        nn.Embedding(V, E, **plain), nn.LSTM(E, H, batch_first=True, **plain), nn.Linear(H, V, **plain)
    )
    ours = _CharacterModel(
        nn.Embedding(V, E, **plain), llm_ext.LSTM(E, H, batch_first=True, **plain), llm_ext.Linear(H, V, **plain)
    )
    ours.load_state_dict(other.state_dict())
    exact = _CharacterModel(nn.Embedding(V, E), nn.LSTM(E, H, batch_first=True), nn.Linear(H, V)).double()
    exact.load_state_dict(other.state_dict())
    return ours, other, exact


def _gradients_by_loop(model: nn.Module, ids: Tensor, target: Tensor) -> list[Tensor]:
    """Return the gradients of each sample, [B, ...] for each parameter."""
    parameters, rows = list(model.parameters()), zip(ids.split(1), target.split(1), strict=True)  # type: ignore[no-untyped-call]
    samples = [torch.autograd.grad(_loss(model, *row), parameters) for row in rows]
    return [torch.stack(gradients) for gradients in zip(*samples, strict=True)]


def per_sample_gradients(B: int, T: int, V: int, E: int, H: int) -> Case:
    """The gradients of every sample of a batch, as differentially private training needs them.

    `vmap(grad)` against Opacus, whose layers run step by step, and against a loop over the samples.
    """
    ours_loop, torch_loop = "llm_ext.LSTM, a loop over samples", "torch.nn.LSTM, a loop over samples"
    opacus = "Opacus DPLSTM"

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other, exact = _character_models(V, E, H, dtype)
        ids, target = torch.randint(V, (2, B, T))

        def mapped() -> Call:
            parameters = {name: p.detach() for name, p in ours.named_parameters()}

            def loss(parameters: dict[str, Tensor], ids: Tensor, target: Tensor) -> Tensor:
                return _loss(lambda x: func.functional_call(ours, parameters, (x,)), ids[None], target[None])

            gradients = func.vmap(func.grad(loss), (None, 0, 0))
            return lambda: tuple(gradients(parameters, ids, target).values())

        def loop(model: nn.Module) -> Callable[[], Call]:
            return lambda: lambda: _gradients_by_loop(model, ids, target)

        return Comparison(
            _gradients_by_loop(exact, ids, target),
            Candidate("llm_ext.LSTM, vmap(grad)", OURS, mapped),
            [
                Candidate(opacus, "opacus", lambda: peers.opacus_gradients(other, ids, target, _loss)),
                Candidate(ours_loop, OURS, loop(ours)),
                Candidate(torch_loop, "torch", loop(other)),
            ],
        )

    name = f"transforms/per-sample/{size_name(B=B, T=T, V=V, E=E, H=H)}"
    return Case(name, build, True, B * T / 1e3, "k token", {opacus: 3.0, torch_loop: 10.0, ours_loop: 10.0})


def private_step(B: int, T: int, V: int, E: int, H: int) -> Case:
    """A step of private training by Opacus: the gradients of every sample, clipped and summed."""
    opacus, max_norm = "Opacus DPLSTM", 0.1

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other, exact = _character_models(V, E, H, dtype)
        ids, target = torch.randint(V, (2, B, T))
        samples = _gradients_by_loop(exact, ids, target)
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in samples]).norm(dim=0)
        factor = (max_norm / (norms + 1e-6)).clamp(max=1)
        call = peers.private_step
        return Comparison(
            [torch.tensordot(factor, gradient, 1) for gradient in samples],
            Candidate("llm_ext.LSTM", OURS, lambda: call(ours, ids, target, _loss, max_norm, dplstm=False)),
            [Candidate(opacus, "opacus", lambda: call(other, ids, target, _loss, max_norm, dplstm=True))],
        )

    name = f"transforms/private-training/{size_name(B=B, T=T, V=V, E=E, H=H)}"
    return Case(name, build, True, B * T / 1e3, "k token", {opacus: 3.0})


def _reference(layer: Any, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return y of a layer of one layer by the reference."""
    return reference.multilayer_rnn(layer.mode, x, None, [list(weights)])[0]


def _without_onednn(prepare: Callable[[], Call]) -> Callable[[], Call]:
    """Return `prepare` with calls that do not use oneDNN, whose LSTM has neither forward mode nor a double backward."""

    def prepared() -> Call:
        call = prepare()

        def run() -> Any:
            with torch.backends.mkldnn.flags(enabled=False):
                return call()

        return run

    return prepared


def forward_mode(cell: Cell, B: int, T: int, H: int, target: float | None = None) -> Case:
    """The result and its tangent for a tangent of the input, without autograd.

    `target` applies to a forward pass, which does half of the work at best. torch's LSTM has forward mode only without
    oneDNN.
    """

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = (layer.requires_grad_(False) for layer in make_layers(cell, H, H, dtype=dtype))
        x, dx = torch.randn(2, T, B, H, dtype=dtype)
        weights = [double(parameter) for parameter in other.parameters()]
        expected = func.jvp(lambda x: _reference(other, x, weights), (x.double(),), (dx.double(),))

        def tangent(layer: Any) -> Callable[[], Call]:
            return lambda: lambda: func.jvp(lambda x: layer(x)[0], (x,), (dx,))

        return Comparison(
            tensors(expected),
            Candidate(f"llm_ext.{cell.name}, jvp", OURS, tangent(ours)),
            [
                Candidate(FORWARD_PASS, OURS, lambda: lambda: ours(x)[0], reference=tensors(expected)[:1]),
                Candidate(f"torch.nn.{cell.name}, jvp", "torch", _without_onednn(tangent(other))),
            ],
        )

    name = f"transforms/{kind_name(cell, 'jvp')}/{size_name(B=B, T=T, H=H)}"
    return Case(name, build, True, gflop(cell, T * B, H, H) * 2, "GFLOP", given_targets({FORWARD_PASS: target}))


def double_backward(cell: Cell, B: int, T: int, H: int, target: float | None = None) -> Case:
    """The gradient of x with `create_graph`, and the gradients of a function of it, as in a gradient penalty."""

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ours, other = make_layers(cell, H, H, dtype=dtype)
        x = torch.randn(T, B, H, dtype=dtype, requires_grad=True)
        g, v = torch.randn(2, T, B, H, dtype=dtype)

        def differentiate(y: Tensor, leaves: Sequence[Tensor], g: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            (dx,) = torch.autograd.grad(y, leaves[0], g, create_graph=True)
            return dx, *torch.autograd.grad(dx, leaves, v)

        def twice(layer: Any) -> Callable[[], Call]:
            return lambda: lambda: differentiate(layer(x)[0], [x, *layer.parameters()], g, v)

        leaves = [double(tensor) for tensor in (x, *other.parameters())]
        expected = differentiate(_reference(other, leaves[0], leaves[1:]), leaves, g.double(), v.double())
        return Comparison(
            tensors(expected),
            Candidate(f"llm_ext.{cell.name}", OURS, twice(ours)),
            [Candidate(f"torch.nn.{cell.name}", "torch", _without_onednn(twice(other)))],
        )

    name = f"transforms/{kind_name(cell, 'double-backward')}/{size_name(B=B, T=T, H=H)}"
    targets = given_targets({f"torch.nn.{cell.name}": target})
    return Case(name, build, True, gflop(cell, T * B, H, H) * 7, "GFLOP", targets)
