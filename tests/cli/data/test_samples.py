"""Samples: listing them, splitting them by group, and their features."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_ext.cli import CommandError
from llm_ext.cli.data import FeatureReader, FrontEnd, Sample, encode_samples, group_fold, hold_out, read_samples
from llm_ext.cli.data.augmentation import augment_features, augmentations_of, drop_words, mix_samples

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")
Image = pytest.importorskip("PIL.Image")
av = pytest.importorskip("av")


def write_tone(path: Path, hertz: float, rate: int = 8000, channels: int = 1, seconds: float = 0.3) -> Path:
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, np.stack([tone] * channels, 1), rate)
    return path


def test_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.npy").touch()
    manifest = tmp_path / "all.tsv"
    manifest.write_text("label\tfile\tspeaker\nx\ta.npy\tann\n\ny\ta.npy\tbob\n")
    samples = read_samples(manifest, "array", "label")
    assert [(each.data, each.target, each.columns) for each in samples] == [
        (tmp_path / "a.npy", "x", {"speaker": "ann"}),
        (tmp_path / "a.npy", "y", {"speaker": "bob"}),
    ]
    manifest.write_text("text\tlabel\ngood film\tyes\n")
    (sample,) = read_samples(manifest, "text", "label")
    assert (sample.data, sample.target) == ("good film", "yes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.npy\tx\n", "line 1: expected the names of the columns, file and label, got 'a.npy', 'x'"),
        ("file\tlabel\na.npy\n", "line 2: expected 2 columns, got 1"),
        ("file\tlabel\nb.npy\tx\n", "line 2: .*b.npy: no such file"),
        ("file\tlabel\na.npy\t\n", "a.npy: expected a label, got none"),
        ("file\ttext\na.npy\thello\n", "a.npy: expected a label, got none"),
        ("file\tlabel\n", "expected at least one sample, got none"),
    ],
)
def test_a_wrong_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.npy").touch()
    (tmp_path / "all.tsv").write_text(content)
    with pytest.raises(CommandError, match=message):
        read_samples(tmp_path / "all.tsv", "array", "label")


def test_arrays_and_directories(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    np.savez(tmp_path / "a.npz", x=x, lengths=[4, 2], label=["u", "v"], speaker=[1, 2])
    np.savez(tmp_path / "b.npz", x=x.reshape(-1, 3)[:6], lengths=[4, 2], label=["u", "v"], speaker=[1, 2])
    for name, rows in (("a.npz", [x[0], x[1, :2]]), ("b.npz", [x[0], x[1, :2]])):
        samples = read_samples(tmp_path / name, "array", "label")
        assert [each.target for each in samples] == ["u", "v"]
        assert samples[1].columns == {"speaker": "2"}
        for sample, expected in zip(samples, rows, strict=True):
            np.testing.assert_array_equal(np.asarray(sample.data), expected)
    (tmp_path / "files/cat").mkdir(parents=True)
    (tmp_path / "files/cat/1.png").touch()
    (tmp_path / "files/cat/1.txt").write_text("a cat\n")
    assert [each.target for each in read_samples(tmp_path / "files", "image", "text")] == ["a cat"]
    (tmp_path / "files/cat/1.txt").unlink()
    (tmp_path / "files/cat/.1.png").touch()
    assert [each.target for each in read_samples(tmp_path / "files", "image", "label")] == ["cat"]
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CommandError, match=r"c.npz: expected arrays of numpy, got something else"):
        read_samples(tmp_path / "c.npz", "array", "label")
    np.savez(tmp_path / "d.npz", x=x, label=["u"])
    with pytest.raises(CommandError, match=r"d.npz: label must have a value for each of 2 samples, got \[1\]"):
        read_samples(tmp_path / "d.npz", "array", "label")


def test_groups_are_never_divided() -> None:
    groups = list("aaaabbbccdee")
    held_out: list[int] = []
    for index in range(3):
        training, validation = group_fold(groups, index, 3)
        assert sorted([*training, *validation]) == list(range(len(groups)))
        assert not {groups[i] for i in training} & {groups[i] for i in validation}
        assert len(validation) == 4
        held_out += validation.tolist()
    assert sorted(held_out) == list(range(len(groups)))
    with pytest.raises(CommandError, match="--folds 6: the samples have only 5 groups"):
        group_fold(groups, 0, 6)


def test_hold_out() -> None:
    samples = [Sample(f"{n}", "", "x", {"speaker": "abcde"[n % 5]}, f"{n}") for n in range(100)]
    training, validation = hold_out(samples, "speaker", ["b", "d"], 0.1)
    assert {n % 5 for n in validation.tolist()} == {1, 3}
    assert len(training) == 60
    _, validation = hold_out(samples, None, [], 0.2)
    assert 10 <= len(validation) <= 30
    _, validation = hold_out(samples, "speaker", [], 0.5)
    assert len(validation) % 20 == 0
    with pytest.raises(CommandError, match="no sample has the speaker 'f'; there are a, b, c, d, e"):
        hold_out(samples, "speaker", ["f"], 0.1)
    with pytest.raises(CommandError, match="0: expected a column room; its further columns: speaker"):
        hold_out(samples, "room", [], 0.1)


@pytest.mark.parametrize("kind", ["manifest", "directory", "arrays"])
def test_hold_out_does_not_depend_on_the_place_of_the_data(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was started with a relative path is resumed with the absolute one, and must hold out the same."""
    path = tmp_path / {"manifest": "data.tsv", "directory": "data", "arrays": "data.npz"}[kind]
    names = [f"{n % 2}/{n}.npy" for n in range(40)]
    folder = path if kind == "directory" else tmp_path
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if kind == "manifest":
        path.write_text("file\tlabel\n" + "".join(f"{name}\t{name[0]}\n" for name in names))
    elif kind == "arrays":
        np.savez(path, x=np.zeros((40, 2, 3)), label=np.arange(40) % 2)
    monkeypatch.chdir(tmp_path)
    splits = [hold_out(read_samples(given, "array", "label"), None, [], 0.4)[1] for given in (path, Path(path.name))]
    assert 4 <= len(splits[0]) <= 36
    assert splits[0].tolist() == splits[1].tolist()


def test_log_mel(tmp_path: Path) -> None:
    """A tone is in the band of its frequency; another rate or a second channel hardly changes the result."""
    front_end = FrontEnd("audio", mels=20).fitted(Sample("", write_tone(tmp_path / "a.wav", 1000), None))
    assert front_end.rate == 8000

    def read(*arguments: Any) -> np.ndarray[Any, Any]:
        return front_end.read(Sample("", write_tone(tmp_path / "b.wav", *arguments), None))

    rows = read(1000)
    assert rows.shape == (31, 20)
    # The bands are evenly spaced on the scale 2595 log10(1 + f / 700), on which librosa's is linear up to 1 kHz.
    peaks = [int(read(hertz)[15].argmax()) for hertz in (300, 700, 1000, 2000, 3500)]
    assert peaks == sorted(set(peaks))
    for other in (read(1000, 44100), read(1000, 8000, 2)):
        assert len(other) in (30, 31)
        np.testing.assert_allclose(other[5:25, peaks[2]], rows[5:25, peaks[2]], atol=0.1)


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("audio", "a.wav", b"no sound", "a.wav: cannot be read as sound"),
        ("audio", "a.wav", b"", "a.wav: cannot be read as sound"),
        ("image", "a.png", b"\x89PNG\r\n\x1a\n damaged", "a.png: cannot be read as an image"),
        ("video", "a.mp4", b"no video", "a.mp4: cannot be read as a video"),
        ("array", "a.npy", b"no array", "a.npy: expected an array of numpy, got something else"),
    ],
)
def test_damaged_files(tmp_path: Path, kind: str, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandError, match=message):
        FrontEnd(kind, 8000, size=(8, 8)).read(Sample(name, tmp_path / name, None))


def test_unusable_features(tmp_path: Path) -> None:
    write_tone(tmp_path / "empty.wav", 100, seconds=0)
    with pytest.raises(CommandError, match=r"empty.wav: expected sound, got a recording of length 0"):
        FrontEnd("audio", 8000).read(Sample("", tmp_path / "empty.wav", None))
    bad = np.ones((5, 2))
    bad[3, 1] = np.nan
    with pytest.raises(CommandError, match="x: features must be finite, got nan in row 4"):
        FrontEnd("array").read(Sample("x", bad, None))
    with pytest.raises(CommandError, match=r"x: expected numbers \[S, F\] with S > 0, got float64 \[0, 2\]"):
        FrontEnd("array").read(Sample("x", bad[:0], None))
    samples = [Sample("x", np.ones((5, 2)), None), Sample("y", np.ones((5, 3)), None)]
    with pytest.raises(CommandError, match="y: has 3 features, but x has 2"):
        encode_samples(samples, FeatureReader(FrontEnd("array")), tmp_path)
    assert not list(tmp_path.glob("*.float32"))


def test_images_and_videos(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sample = Sample("", tmp_path / "a.png", None)

    def read(**options: Any) -> np.ndarray[Any, Any]:
        return FrontEnd("image", **options).fitted(sample).read(sample)

    expected = (pixels / 255).astype(np.float32)
    np.testing.assert_allclose(read(colour=True), expected.reshape(6, 12))
    patches = [expected[row : row + 2, column : column + 2].reshape(-1) for row in (0, 2, 4) for column in (0, 2)]
    np.testing.assert_allclose(read(colour=True, patch=2), np.stack(patches))
    assert read().shape == (6, 4)
    assert read(size=(8, 10)).shape == (8, 10)
    assert read(stack=4).shape == (2, 16)
    with pytest.raises(CommandError, match="patches of 4 do not divide images of 6 x 4"):
        read(patch=4)

    grey = np.repeat(np.linspace(0, 250, 5, dtype=np.uint8), 16 * 16).reshape(5, 16, 16)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in grey:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())
    video = Sample("", tmp_path / "a.mp4", None)
    rows = FrontEnd("video").fitted(video).read(video)
    assert rows.shape == (5, 256)
    np.testing.assert_allclose(rows.mean(1), grey.mean((1, 2)) / 255, atol=0.03)


def test_a_feature_that_hardly_varies_is_not_magnified(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3)) * (1, 0, 1e-4)
    encoded = encode_samples([Sample("x", rows, None)], FeatureReader(FrontEnd("array")), tmp_path)
    _, std = encoded.normalization(np.array([0]))
    np.testing.assert_allclose(std, rows[:, 0].std() * np.array([1, 0.01, 0.01]), rtol=1e-5)


def test_encoded_samples_and_normalization(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(3, 2, (n, 4)).astype(np.float32) for n in (5, 1, 9)]
    samples = [Sample(str(n), rows, None) for n, rows in enumerate(arrays)]
    front_end = FrontEnd("array")
    encoded = encode_samples(samples, FeatureReader(front_end), tmp_path)
    assert encoded.lengths.tolist() == [5, 1, 9]
    mean, std = encoded.normalization(np.array([0, 2]))
    chosen = np.concatenate((arrays[0], arrays[2]))
    np.testing.assert_allclose(mean, chosen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, chosen.std(0), rtol=1e-5)
    reader = FeatureReader(front_end, mean, std)
    reader.save(tmp_path / "features.json")
    x, lengths = FeatureReader.load(tmp_path / "features.json", None).pad([encoded.rows(n) for n in range(3)])
    assert lengths.tolist() == [5, 1, 9]
    np.testing.assert_allclose(x[0, :5], (arrays[0] - chosen.mean(0)) / chosen.std(0), atol=1e-5)
    assert not x[1, 1:].any()
    with pytest.raises(CommandError, match="z: has 3 features, but the training had 4"):
        reader.read(Sample("z", np.ones((2, 3)), None))


def test_each_feature_is_centered() -> None:
    rows = np.random.default_rng(0).normal((1, 2, 3), 1, (50, 3))
    found = FrontEnd("array", center=True).read(Sample("x", rows, None))
    np.testing.assert_allclose(found, rows - rows.mean(0), atol=1e-6)


def test_a_changed_file_is_encoded_again(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for number in (1, 2):
        np.save(path, np.full((2, 3), number))
        os.utime(path, (number, number))
        encoded = encode_samples([Sample("x", path, None)], FeatureReader(FrontEnd("array")), tmp_path)
        assert (encoded.rows(0) == number).all()


def test_augmentation() -> None:
    x = torch.randn(6, 20, 12)
    lengths = torch.tensor([20, 3, 20, 1, 7, 20])
    beyond = torch.arange(20) >= lengths[:, None]
    x[beyond] = 0
    layout = (1, 12, 1)
    mean, std = torch.randn(12), 0.5 + torch.rand(12)
    for name in augmentations_of("audio") - {"mix"}:
        torch.manual_seed(1)
        changed, new_lengths = augment_features(x, lengths, frozenset({name}), layout, (mean, std))
        torch.manual_seed(1)
        again, _ = augment_features(x, lengths, frozenset({name}), layout, (mean, std))
        assert torch.equal(changed, again), name
        assert changed.shape[1] == int(new_lengths.max()), name
        assert not changed[torch.arange(changed.shape[1]) >= new_lengths[:, None]].any(), name
        assert name == "warp" or torch.equal(new_lengths, lengths), name
        assert not torch.equal(changed, x), name
    masked, _ = augment_features(x, lengths, frozenset({"mask"}), layout)
    assert ((masked == x) | (masked == 0)).all()
    # A linear ramp stays one: interpolation moves it, up to the edges.
    ramp = torch.arange(12.0).expand(6, 20, 12).clone()
    moved, _ = augment_features(ramp, torch.full((6,), 20), frozenset({"shift"}), layout)
    step = moved[:, 0, 2:10] - moved[:, 0, 1:9]
    torch.testing.assert_close(step, torch.ones(6, 8))
    assert (moved[:, 0, 5] - 5).abs().max() <= 0.08 * 12


def test_augmentation_of_power() -> None:
    """Noise adds to the power; a channel has one gain for all steps, different for each sample."""
    mean, std = torch.randn(24), 0.5 + torch.rand(24)
    power = 10 * torch.rand(50, 7, 24) - 20  # a log-mel spectrogram, stacked by two
    normalized, lengths = (power - mean) / std, torch.full((50,), 7)
    names = [frozenset({name}) for name in ("background", "channel")]
    noisy, colored = (augment_features(normalized, lengths, name, (2, 12, 1), (mean, std))[0] for name in names)
    added = (noisy * std + mean).exp() - power.exp()
    assert (added > -1e-5 * power.exp()).all()
    loudest = 10 * math.log10(float(added.mean((1, 2)).max() / power.exp().mean()))
    quietest = 10 * math.log10(float(added.mean((1, 2)).min() / power.exp().mean()))
    assert -25 < loudest < 0
    assert -70 < quietest < -35
    gain = (colored * std + mean - power).reshape(50, 14, 12)
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain), atol=1e-5, rtol=0)
    assert 0.3 < float(gain.std(0).mean()) < 2
    assert gain.diff(dim=2).abs().max() < 3


def test_samples_are_mixed() -> None:
    """Samples and targets are mixed by the same weights: a sample of c in all features has the target c."""
    values = torch.rand(9, 1)
    lengths = torch.arange(1, 10)
    x = values[:, :, None].expand(9, 9, 4).masked_fill(torch.arange(9)[:, None] >= lengths[:, None, None], 0)
    mixed, new_lengths, targets = mix_samples(x, lengths, values)
    assert (new_lengths >= lengths).all()
    assert not torch.equal(targets, values)
    torch.testing.assert_close(mixed[:, 0], targets.expand(9, 4))  # all samples have a first step
    assert not mixed[torch.arange(9) >= new_lengths[:, None]].any()


def test_words_are_dropped() -> None:
    ids, lengths = torch.arange(1, 41).repeat(50, 1), torch.tensor([40, 1] * 25)
    rows, new_lengths = drop_words(ids, lengths)
    assert (new_lengths[1::2] == 1).all()
    assert 30 < float(new_lengths[::2].float().mean()) < 39
    for row, length in zip(rows, new_lengths.tolist(), strict=True):
        assert (row[1:length] > row[: length - 1]).all()
