"""The peer that the demo compares with is the same model: same outputs, same losses, same state."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from llm_ext import LLM

from .conftest import ROOT


@pytest.fixture
def peer() -> ModuleType:
    path = ROOT / "examples/shakespeare/peer.py"
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("attention", "score", "layers"),
    [("hidden", "linear", 1), ("embedding", "tanh", 2), ("none", "linear", 1)],
)
def test_the_peer_is_the_same_model(peer: ModuleType, attention: str, score: str, layers: int) -> None:
    ours = LLM(11, 6, 17, 11, layers, 0.3, attention=attention, score=score).eval()
    theirs = peer.torch_peer(ours)
    assert isinstance(theirs.rnn, torch.nn.RNN)
    x = torch.randint(11, (3, 40))
    y = torch.randint(11, (3 * 40,))
    for model in (ours, theirs):
        first, state = model(x[:, :13])
        second, state = model(x[:, 13:], state)
        model.outputs = torch.cat((first, second), 1)
        model.state = state
        torch.nn.functional.cross_entropy(model.outputs.flatten(0, 1), y).backward()
    torch.testing.assert_close(ours.outputs, theirs.outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.state, theirs.state, atol=1e-5, rtol=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)
    prompt = torch.tensor([1, 2, 3])
    torch.testing.assert_close(ours.generate(prompt, 20, 0.0), theirs.generate(prompt, 20, 0.0))
