"""Initial weights from another run, and frozen parts."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import assert_same_runs, language_config, last_weights, translation_config

from llm_ext.cli import CommandError
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import Config, resume, train

SignalAt = Callable[..., None]
InitialWeights = Callable[..., dict[str, torch.Tensor]]

pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture
def initial_weights(tmp_path: Path, signal_at: SignalAt) -> InitialWeights:
    """A function that returns the weights with which a training starts."""

    def start(name: str, config: Config, file: Path, **options: Any) -> dict[str, torch.Tensor]:
        signal_at(0, signal.SIGTERM, before="_introduce")
        assert train(config, [file], tmp_path / name, **options).signal == signal.SIGTERM
        return last_weights(tmp_path / name)

    return start


def characters(run: Path) -> str:
    contents: str = json.loads((run / "vocabulary.json").read_text())["characters"]
    return contents


@pytest.mark.parametrize("part", ["all", "encoder", "embedding"])
def test_weights_are_matched_by_token(
    translator: Path, tmp_path: Path, initial_weights: InitialWeights, part: str
) -> None:
    """The new vocabulary has other characters, with other ids."""
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{a} zone\tUN {a}\n" for a in ("one", "two", "six") * 9))
    sizes = {"hidden": 32, "embedding": 16}
    new = initial_weights("new", translation_config(**sizes), pairs, val=[pairs])
    config = translation_config(**sizes, init_from=str(translator), init=part)
    got = initial_weights("run", config, pairs, val=[pairs])
    given = last_weights(translator)
    ours, theirs = characters(tmp_path / "run"), characters(translator)
    assert ours != theirs
    for row, character in enumerate(ours + "\n"):  # the last row is the end of a line
        other = (theirs + "\n").find(character)
        expected = given["source_embedding.weight"][other] if other >= 0 else new["source_embedding.weight"][row]
        assert torch.equal(got["source_embedding.weight"][row], expected)
    for name in ("encoder.weight_hh_l0_reverse", "decoder.weight_ih_l0", "attention.v"):
        taken = part == "all" or (part == "encoder" and name.startswith("encoder"))
        assert torch.equal(got[name], (given if taken else new)[name])
    row, other = ours.index("x"), theirs.index("x")
    expected = given["head.bias"][other] if part == "all" else new["head.bias"][row]
    assert torch.equal(got["head.bias"][row], expected)


def test_a_language_model_initializes_a_translator(
    translator: Path, language_model: Path, initial_weights: InitialWeights
) -> None:
    pairs = translator.parent / "pairs.tsv"
    config = translation_config(hidden=16, embedding=8, cell="rnn", init="encoder", init_from=str(language_model))
    got, given = initial_weights("run", config, pairs, val=[pairs]), last_weights(language_model)
    assert torch.equal(got["encoder.weight_hh_l0"], given["rnn.weight_hh_l0"])
    assert not torch.equal(got["encoder.weight_hh_l0_reverse"], given["rnn.weight_hh_l0"])


def test_a_translator_initializes_a_language_model(
    translator: Path, language_model: Path, tmp_path: Path, initial_weights: InitialWeights
) -> None:
    text = language_model.parent / "text.txt"
    config = language_config(hidden=32, embedding=16, cell="gru", init="encoder", init_from=str(translator))
    got, given = initial_weights("run", config, text), last_weights(translator)
    assert torch.equal(got["rnn.weight_hh_l0"], given["encoder.weight_hh_l0"])
    row, other = characters(tmp_path / "run").index("x"), characters(translator).index("x")
    assert torch.equal(got["embedding.weight"][row], given["source_embedding.weight"][other])


def test_runs_that_do_not_fit(translator: Path, language_model: Path, tmp_path: Path) -> None:
    pairs, text = translator.parent / "pairs.tsv", language_model.parent / "text.txt"
    with pytest.raises(CommandError, match="holds a translator, but this run trains a language model; --init encoder"):
        train(language_config(init_from=str(translator)), [text], tmp_path / "a")
    message = r"encoder.weight_ih_l0 is \[96, 16\] there, but encoder.weight_ih_l0 is \[48, 16\] here"
    with pytest.raises(CommandError, match=message):
        train(translation_config(embedding=16, init_from=str(translator)), [pairs], tmp_path / "b", val=[pairs])
    config = translation_config(embedding=16, hidden=32, layers=2, init_from=str(translator), init="encoder")
    with pytest.raises(CommandError, match=r"encoder.weight_ih_l1 is missing there"):
        train(config, [pairs], tmp_path / "c", val=[pairs])
    with pytest.raises(CommandError, match="no such run directory"):
        train(language_config(init_from=str(tmp_path / "nowhere")), [text], tmp_path / "d")


def test_a_training_continues_from_the_loss_of_the_other_run(
    translator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = translator.parent / "pairs.tsv"
    config = translation_config(hidden=32, embedding=16, steps=10, lr=1e-6, dropout=0.0, init_from=str(translator))
    outcome = train(config, [pairs], tmp_path / "run", val=[pairs])
    other = Run(translator).checkpoint("best").config["training"]["progress"]["best_loss"]
    assert outcome.progress.best_loss == pytest.approx(other, abs=1e-3)
    assert f"tensors from {translator}, which has 14 of the 14 tokens" in capfd.readouterr().out


def test_frozen_parts_do_not_change(
    pairs: Path, tmp_path: Path, signal_at: SignalAt, initial_weights: InitialWeights
) -> None:
    config = translation_config(freeze="encoder,embedding", tie_head=False, steps=20)
    start = initial_weights("start", config, pairs)
    out = tmp_path / "run"
    signal_at(7)
    train(config, [pairs], out)
    resume(out, {})
    for name, parameter in last_weights(out).items():
        frozen = name.startswith(("encoder.", "source_embedding.", "target_embedding."))
        assert torch.equal(parameter, start[name]) == frozen, name
    train(config, [pairs], tmp_path / "whole")
    assert_same_runs(out, tmp_path / "whole")


def test_what_cannot_be_frozen(pairs: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="this model has no decoder; it has embedding, encoder, attention, head"):
        train(language_config(freeze="decoder"), [text], tmp_path / "a")
    with pytest.raises(CommandError, match="leaves nothing to train"):
        train(translation_config(freeze="embedding,encoder,attention,decoder,head"), [pairs], tmp_path / "b")
