"""What the demos compare with: a peer that is the same model, and sentences that were not trained on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm_ext import LLM

from .conftest import ROOT


def load(example: str, name: str) -> ModuleType:
    """A script of an example, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / example / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peer() -> ModuleType:
    return load("shakespeare", "peer")


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


@pytest.fixture(scope="module")
def translation() -> ModuleType:
    return load("translation", "demo")


def test_every_pair_has_its_attribution(translation: ModuleType) -> None:
    lines = translation.PAIRS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5000
    for line in lines:
        english, french, attribution = line.split("\t")
        assert english
        assert french
        assert attribution.startswith("CC-BY 2.0 (France) Attribution: tatoeba.org #")


def test_what_is_held_out_is_not_trained_on(translation: ModuleType, tmp_path: Path) -> None:
    files = translation.split(translation.PAIRS, tmp_path)
    training, held_out = map(translation.translations, files)
    assert not training.keys() & held_out.keys()
    assert sum(map(len, (*training.values(), *held_out.values()))) == 5000
    assert 0.05 < len(held_out) / len(training) < 0.15
    pairs = translation.PAIRS.read_text(encoding="utf-8").splitlines()
    assert sorted("".join(path.read_text(encoding="utf-8") for path in files).splitlines()) == sorted(pairs)


def test_the_nearest_sentence(translation: ModuleType) -> None:
    known = {"I am here.": ["Je suis là."], "Go away!": ["Va-t'en !", "Pars !"], "Tom slept.": ["Tom dormait."]}
    sentences = ["I am there.", "Go away!", "Tom sleeps."]
    assert translation.nearest(known, sentences) == ["Je suis là.", "Va-t'en !", "Tom dormait."]
