"""Classifiers and transcribers from the command line, end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_ext.cli import main
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data import FeatureReader, encode_samples, read_samples
from llm_ext.cli.training import read_log

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")
pytest.importorskip("jiwer")
pytestmark = pytest.mark.usefixtures("no_plot")

TONES = {"low": 400, "middle": 900, "high": 2000}
SMALL = ["--hidden", "16", "--layers", "1", "--batch", "8", "--validate-every", "20", "--dropout", "0", "--lr", "0.02"]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 60 recordings of two tones: the label is the first, the text has a letter for each."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    lines = ["file\tlabel\ttext\tspeaker"]
    for number in range(60):
        names = [str(name) for name in generator.choice([*TONES], 2)]
        rate = 8000 if number % 2 else 16000
        pieces = []
        for name in names:
            time = np.arange(int(generator.uniform(0.1, 0.2) * rate)) / rate
            pieces += [0.3 * np.sin(2 * np.pi * TONES[name] * time), np.zeros(rate // 20)]
        signal = np.concatenate(pieces) + generator.normal(0, 0.01, sum(map(len, pieces)))
        soundfile.write(folder / f"{number}.wav", np.stack([signal] * (1 + number % 3 // 2), 1), rate)
        text = " ".join(names)
        lines.append(f"{number}.wav\t{names[0]}\t{text}\t{'ann' if number < 45 else 'bob'}")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    return folder


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_classify(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, manifest = tmp_path / "run", recordings / "all.tsv"
    options = ["--val-column", "speaker", "--val-values", "bob", "--rate", 8000, "--mels", 20, *SMALL]
    assert run("train", manifest, "--task", "classify", "--out", out, "--steps", 60, "--augment", "mask", *options) == 0
    said = capsys.readouterr().out
    assert "3 labels, 20 features per step, 45 samples for training, 15 for validation" in said
    assert "nats per sample, accuracy" in said
    best = [each for each in read_log(out / "log.jsonl") if each["event"] == "validation"][-1]
    assert best["accuracy"] == 1
    # Features are normalized by the samples of the training alone.
    reader = FeatureReader.load(out / "features.json", None)
    encoded = encode_samples(read_samples(manifest, "audio", "label"), FeatureReader(reader.front_end), out / "cache")
    for found, expected in zip((reader.mean, reader.std), encoded.normalization(np.arange(45)), strict=True):
        assert found is not None
        np.testing.assert_allclose(found, expected)

    assert run("eval", out, manifest, "--confusion", tmp_path / "confusion.png") == 0
    assert "accuracy    100.00 % (60 of 60)" in capsys.readouterr().out
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert run("predict", out, recordings / "0.wav", manifest) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    labels = [line.split("\t")[1] for line in manifest.read_text().splitlines()[1:]]
    assert [line[1] for line in lines] == [labels[0], *labels]
    assert lines[0][0] == str(recordings / "0.wav")
    assert run("explain", out, "--file", recordings / "0.wav", "--out", tmp_path / "where.png") == 0
    assert capsys.readouterr().out.startswith(labels[0])
    assert (tmp_path / "where.png").stat().st_size > 10_000


@pytest.mark.parametrize("decoder", ["ctc", "attention"])
def test_transcribe(decoder: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, manifest = tmp_path / "run", recordings / "all.tsv"
    options = ["--decoder", decoder, "--tokens", "bpe", "--vocab-size", 300, "--embedding", 16, "--mels", 20, *SMALL]
    command = ["train", manifest, "--val", manifest, "--task", "transcribe", "--rate", 8000, "--out", out, *options]
    assert run(*command, "--steps", 140, "--hidden", 24) == 0
    capsys.readouterr()
    assert run("eval", out, manifest, "--beam", 2) == 0
    said = capsys.readouterr().out
    assert "nats per token" in said
    assert float(said.split("WER")[1].split()[0]) < 10
    assert run("predict", out, recordings / "7.wav") == 0
    name, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert name.endswith("7.wav")
    assert set(text.split()) <= set(TONES)
    assert run("explain", out, "--file", recordings / "7.wav", "--out", tmp_path / "where.svg") == 0
    assert capsys.readouterr().out.startswith(text)


def test_texts_and_transfer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{'good' if n % 2 else 'bad'} film number {n % 7}\t{'yes' if n % 2 else 'no'}" for n in range(60)]
    manifest = tmp_path / "films.tsv"
    manifest.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    options = ["--task", "classify", "--kind", "text", "--embedding", 8, *SMALL]
    assert run("train", manifest, *options, "--out", tmp_path / "a", "--steps", 40, "--augment", "words") == 0
    assert run("eval", tmp_path / "a", manifest) == 0
    assert "accuracy    100.00 %" in capsys.readouterr().out
    # Further labels; the rows of the old ones are taken over.
    manifest.write_text("text\tlabel\n" + "unknown film\tmaybe\n" * 9 + "\n".join(lines) + "\n")
    more = ["--out", tmp_path / "b", "--steps", 1, "--init-from", tmp_path / "a", "--freeze", "embedding,encoder"]
    assert run("train", manifest, *options, *more) == 0
    assert "initialized" in capsys.readouterr().out
    a, b = (dict(Run(tmp_path / name).checkpoint("best").model().named_parameters()) for name in "ab")
    assert torch.equal(a["encoder.weight_hh_l0"], b["encoder.weight_hh_l0"])
    assert json.loads((tmp_path / "b/labels.json").read_text())["labels"] == ["maybe", "no", "yes"]
    torch.testing.assert_close(b["head.weight"][1:], a["head.weight"], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("damaged", [], "5.wav: cannot be read as sound"),
        ("image", ["--kind", "image"], "1.wav: cannot be read as an image"),
        ("one label", [], "there must be at least two labels to tell apart, got only 'low'"),
        ("", ["--val-column", "speaker", "--val-values", "eve"], "no sample has the speaker 'eve'; there are ann, bob"),
        ("", ["--val-column", "speaker", "--val-values", "ann,bob"], "at least one sample to train on, got none"),
        ("", ["--val-fraction", "0"], "at least one sample for validation, got none"),
        ("new label", ["--val-column", "speaker", "--val-values", "bob"], "the label 'new' is not among those known"),
        ("", ["--batch", "500"], "give more samples, or a smaller --batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(
    change: str,
    options: list[str],
    message: str,
    recordings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = (recordings / "all.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    (tmp_path / "recordings").symlink_to(recordings)  # names on which the split depends, the same in every run
    for row in rows:
        row[0] = f"recordings/{row[0]}"
        row[1] = "low" if change == "one label" else row[1]
    if change == "damaged":
        rows[5][0] = "5.wav"
        (tmp_path / "5.wav").write_bytes((recordings / "5.wav").read_bytes()[:20])
    if change == "new label":
        rows[-1][1] = "new"
    manifest = tmp_path / "all.tsv"
    manifest.write_text("\n".join([lines[0], *map("\t".join, rows)]) + "\n")
    out = tmp_path / "run"
    code = run("train", manifest, "--task", "classify", "--rate", 8000, "--out", out, "--steps", 1, *SMALL, *options)
    assert code == 1
    assert message in capsys.readouterr().err
    assert not Run(out).exists()


def test_a_missing_package(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert run("train", recordings / "all.tsv", "--task", "classify", "--out", tmp_path / "run") == 1
    expected = "llm-ext: soundfile is not installed: pip install 'llm_ext[cli,data]'\n"
    assert capsys.readouterr().err == expected


def test_wrong_command_lines(arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["train", arrays, "--task", "classify", "--augment", "blur"], "augment must name some of mask"),
        (["train", arrays, "--task", "classify", "--val-values", "a"], "val-values needs --val-column"),
        (["train", arrays, "--task", "classify", "--kind", "image", "--augment", "channel"], "must not name channel"),
        (["train", arrays, "--task", "transcribe", "--kind", "text"], "kind must not be text"),
        (["train", arrays, "--task", "transcribe", "--augment", "mix"], "augment must not name mix"),
        (["train", arrays, "--task", "classify", "--image-size", "8"], "image-size must be HxW"),
        (["train", arrays, "--features", arrays, "--task", "classify"], "give samples in one manifest"),
        (["train", "--features", arrays], "not for --task lm: --features"),
        (["train", "--task", "classify"], "FILE is missing: give samples to train on"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, "--out", tmp_path / "run")
        assert message in capsys.readouterr().err


def test_features_of_an_archive(arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--task", "classify", "--kind", "array", "--out", out, "--steps", 60, *SMALL]
    assert run("train", "--features", arrays, "--val-column", "speaker", *options, "--val-fraction", "0.3") == 0
    capsys.readouterr()
    assert run("eval", out, "--features", arrays) == 0
    said = capsys.readouterr().out
    assert float(said.split("accuracy")[1].split()[0]) > 95
    assert run("predict", out, arrays) == 0
    assert len(capsys.readouterr().out.splitlines()) == 120
    with np.load(arrays) as file:
        np.savez(tmp_path / "wide.npz", x=np.ones((1, 5, 9)), label=file["label"][:1])
    assert run("predict", out, tmp_path / "wide.npz") == 1
    assert "wide.npz: row 1: has 9 features, but the training had 4" in capsys.readouterr().err
    assert run("generate", out, "--prompt", "a") == 1
    assert "holds a classifier, not a language model; use it with llm-ext predict" in capsys.readouterr().err
    assert run("explain", out, "--text", "a", "--out", tmp_path / "a.png") == 1
    assert "reads files: give --file" in capsys.readouterr().err
    assert run("explain", out, "--file", arrays, "--out", tmp_path / "a.png") == 0
