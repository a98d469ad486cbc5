"""Models that train in one process, or in two that divide them, and their distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import llm_ext

dcp: Any = torch.distributed.checkpoint

V = 11
# float64, so that one process and two agree almost exactly after some steps of Adam.
LARGE: dict[str, Any] = {"dtype": torch.float64}


class Tagger(nn.Module):
    """A model of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 6, **LARGE)
        self.rnn = nn.GRU(6, 5, 2, bidirectional=True, batch_first=True, **LARGE)
        self.head = nn.Linear(10, V, **LARGE)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.rnn(self.embedding(ids))[0])
        return scores


class Decoder(nn.Module):
    """A loop over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 6, **LARGE)
        self.cell = llm_ext.LSTMCell(6, 5, **LARGE)
        self.head = nn.Linear(5, V, **LARGE)

    def forward(self, ids: Tensor) -> Tensor:
        rows, state, outputs = self.embedding(ids).unbind(1), None, []
        for row in rows:
            state = self.cell(row, state)
            outputs.append(state[0])
        scores: Tensor = self.head(torch.stack(outputs, 1))
        return scores


MODELS: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: llm_ext.convert(Tagger(), linear=True),
    "torch": Tagger,
    "cell": Decoder,
    "lm": lambda: llm_ext.LLM(V, 6, 5, V, 2, 0.0, cell="lstm", **LARGE),
    "seq2seq": lambda: llm_ext.Seq2Seq(V, V, 6, 5, cell="gru", input_feeding=True, share_embedding=True, **LARGE),
}


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def shard_layers(model: nn.Module) -> nn.Module:
    """Divide the recurrent layers and cells of a model one by one, and the rest of it together."""
    for layer in list(model.modules()):
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            fully_shard(layer)
    return shard(model)


# How two processes share each model.
WRAPPERS: list[tuple[str, Callable[[nn.Module], nn.Module]]] = [
    ("converted", DistributedDataParallel),
    ("torch", lambda model: llm_ext.convert(DistributedDataParallel(model), linear=True)),
    ("seq2seq", DistributedDataParallel),
    ("converted", shard_layers),
    ("cell", shard_layers),
    ("lm", shard),
    ("seq2seq", shard_layers),
]


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int) -> None:
    """Train on some rows of the same batches in every process."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids, expected = torch.randint(V, (2, 8, 7), generator=generator)
        scores = model(ids[rows], expected[rows]) if name == "seq2seq" else model(ids[rows])
        scores = scores[0] if isinstance(scores, tuple) else scores
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(scores.flatten(0, 1), expected[rows].flatten()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def inside(model: nn.Module) -> nn.Module:
    """The model inside DDP, in which torch's functions of distributed checkpoints do not find shared modules."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    weights, moments = get_state_dict(inside(model), optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    weights, moments = get_state_dict(inside(model), optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(inside(model), optimizer, model_state_dict=weights, optim_state_dict=moments)


def continue_in_two_processes(rank: int, folder: Path) -> None:
    """Load the checkpoint of each case, train, and save another one; a process of two."""
    distributed: Any = torch.distributed
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(folder / "store"), 2), rank=rank, world_size=2
    )
    for number, (name, wrap) in enumerate(WRAPPERS):
        model = wrap(build(name, 2))
        optimizer = optimizer_of(model)
        load(model, optimizer, folder / f"{number}")
        train(name, model, optimizer, slice(4 * rank, 4 * rank + 4), 2)
        save(model, optimizer, folder / f"{number}.two")
