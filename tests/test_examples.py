"""The examples run, and the demos compare with the same model and with sentences that were held out."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import llm_ext
from llm_ext import LLM

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(path: str) -> ModuleType:
    """Import a script."""
    name = f"example_{path.removesuffix('.py').replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are too small for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _path_is_restored() -> Iterator[None]:
    """The demos add the directory of _demo.py to sys.path."""
    before = [*sys.path]
    sys.path.insert(0, str(EXAMPLES / "shakespeare"))
    yield
    sys.path[:] = before


def test_swap_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    load("swap_a_layer.py").main()
    assert capsys.readouterr().out.startswith("scores [16, 40, 10], largest difference ")


def test_resets_of_sb3_contrib() -> None:
    """The policy's LSTM is called once, and reads what it read in a loop over the steps."""
    use_resets = load("reinforcement_learning/sb3_contrib_resets.py").use_resets
    policy: Any = torch.nn.Module()
    policy.lstm = torch.nn.LSTM(3, 5)
    rows, steps = 4, 7
    x, starts = torch.randn(rows * steps, 3), torch.rand(rows * steps) < 0.3
    state = torch.randn(1, rows, 5), torch.randn(1, rows, 5)
    expected, last = [], state
    for features, begins in zip(x.view(rows, steps, 3).unbind(1), starts.view(rows, steps).unbind(1), strict=True):
        keep = (~begins)[:, None].float()
        y, last = policy.lstm(features[None], (keep * last[0], keep * last[1]))
        expected.append(y[0])

    use_resets(policy)
    y, found = policy._process_sequence(x, state, starts.float(), policy.lstm)
    assert type(policy.lstm) is llm_ext.LSTM
    torch.testing.assert_close(y.view(rows, steps, 5), torch.stack(expected, 1))
    torch.testing.assert_close(found, last)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("recorded", ["nothing", "zeros", "states"])
def test_resets_of_torchrl(cell: str, recorded: str) -> None:
    """The module gives the results, states and gradients that TorchRL computes episode by episode."""
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    names = ["h", "c"] if cell == "LSTM" else ["h"]
    module = getattr(modules, f"{cell}Module")(
        input_size=3, hidden_size=5, num_layers=2, in_keys=["x", *names], out_keys=["y", *(("next", n) for n in names)]
    )
    begins = torch.rand(4, 9, 1) < 0.3
    batch = tensordict.TensorDict({"x": torch.randn(4, 9, 3), "is_init": begins}, [4, 9])
    if recorded != "nothing":
        for name in names:
            batch[name] = torch.randn(4, 9, 2, 5)
            if recorded == "zeros":
                batch[name][:, 1:][begins[:, 1:, 0]] = 0

    def run() -> list[torch.Tensor]:
        module.zero_grad()
        with modules.set_recurrent_mode(True):
            result = module(batch.clone())
        results = [result["y"], *(result["next", name] for name in names)]
        torch.autograd.backward([y.square().sum() for y in results])
        return [*(y.detach() for y in results), *(parameter.grad for parameter in module.parameters())]

    expected = run()
    load("reinforcement_learning/torchrl_resets.py").use_resets(module)
    assert type(module).__name__ == f"{cell}ModuleWithResets"
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-4)


def test_attention_pooling(capsys: pytest.CaptureFixture[str]) -> None:
    load("attention_pooling.py").main()
    words = capsys.readouterr().out.split()
    assert float(words[1].rstrip(",")) > 0.95
    assert float(words[words.index("%") - 1]) > 95


def test_train_and_sample(capsys: pytest.CaptureFixture[str]) -> None:
    load("train_and_sample.py").main(steps=100)
    first, *sampled = capsys.readouterr().out.splitlines()
    assert first.startswith("step 100: ")
    assert float(first.split()[2]) < 2.9
    assert sampled[0].startswith("ROMEO:")


@pytest.mark.parametrize("demo", ["shakespeare", "translation", "summaries", "spoken_digits"])
def test_the_demos_run(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(f"{demo}/demo.py")
    options = ["--seconds", "0.1"] if demo == "shakespeare" else []
    monkeypatch.setattr(sys, "argv", ["demo.py", "--minutes", "0.01", "--out", str(tmp_path / "run"), *options])
    monkeypatch.setitem(module.MODEL, "hidden", 32)
    if demo == "summaries":
        standard = Path(sysconfig.get_paths()["stdlib"])
        monkeypatch.setattr(module, "files_of", lambda _: [*standard.glob("[a-d]*.py")])
        monkeypatch.setattr(module, "HELD_OUT", 0.3)  # of a few files, whose paths differ from machine to machine
    module.main()
    said = capsys.readouterr().out
    assert f"The model is in {tmp_path / 'run'}" in said
    if demo == "translation":
        assert (tmp_path / "run/attention.html").stat().st_size > 1000
        assert "BLEU on 270 held-out sentences" in said
    elif demo == "summaries":
        assert "the first 10 words ROUGE-1 " in said
        training, held_out = (
            (tmp_path / "run" / f"{name}.tsv").read_text().splitlines() for name in ("training", "held-out")
        )
        assert len(training) > len(held_out) > 5
        assert not {line.split("\t")[1] for line in training} & {line.split("\t")[1] for line in held_out}
    elif demo == "spoken_digits":
        assert "Accuracy on 50 recordings that were not trained on" in said
        assert (tmp_path / "run/attention.png").stat().st_size > 10_000
    else:
        assert "validation loss, nats per token" in said


@pytest.mark.parametrize(
    ("attention", "score", "layers"),
    [("hidden", "linear", 1), ("embedding", "tanh", 2), ("none", "linear", 1)],
)
def test_the_peer_is_the_same_model(attention: str, score: str, layers: int) -> None:
    ours = LLM(11, 6, 17, 11, layers, 0.3, attention=attention, score=score).eval()
    theirs: LLM = load("shakespeare/peer.py").torch_peer(ours)
    assert isinstance(theirs.rnn, torch.nn.RNN)
    x, y = torch.randint(11, (3, 40)), torch.randint(11, (3 * 40,))
    results = []
    for model in (ours, theirs):
        first, state = model(x[:, :13])
        second, state = model(x[:, 13:], state)
        outputs = torch.cat((first, second), 1)
        torch.autograd.backward(torch.nn.functional.cross_entropy(outputs.flatten(0, 1), y))
        results.append((outputs, state))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4)
    prompt = torch.tensor([1, 2, 3])
    torch.testing.assert_close(ours.generate(prompt, 20, 0.0), theirs.generate(prompt, 20, 0.0))


def test_every_pair_has_its_attribution() -> None:
    lines = (EXAMPLES / "translation/eng-fra.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5000
    for line in lines:
        english, french, attribution = line.split("\t")
        assert english
        assert french
        assert attribution.startswith("CC-BY 2.0 (France) Attribution: tatoeba.org #")


def test_held_out_sentences_are_not_in_the_training(tmp_path: Path) -> None:
    demo = load("translation/demo.py")
    files = demo.split(demo.PAIRS, tmp_path)
    training, held_out = map(demo.translations, files)
    assert not training.keys() & held_out.keys()
    assert sum(map(len, (*training.values(), *held_out.values()))) == 5000
    assert 0.05 < len(held_out) / len(training) < 0.15
    pairs = demo.PAIRS.read_text(encoding="utf-8").splitlines()
    assert sorted("".join(path.read_text(encoding="utf-8") for path in files).splitlines()) == sorted(pairs)


def test_the_nearest_sentence() -> None:
    known = {"I am here.": ["Je suis là."], "Go away!": ["Va-t'en !", "Pars !"], "Tom slept.": ["Tom dormait."]}
    sentences = ["I am there.", "Go away!", "Tom sleeps."]
    assert load("translation/demo.py").nearest(known, sentences) == ["Je suis là.", "Va-t'en !", "Tom dormait."]
