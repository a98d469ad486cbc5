"""Train a classifier of spoken digits on 200 recordings, and show where it listened."""

from __future__ import annotations

import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_ext.cli.data import Sample, encode_samples, read_samples
from llm_ext.cli.inference import Classifier, draw_confusion, draw_sample, evaluate_labels, explain_classification
from llm_ext.cli.training import ClassificationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _demo import COMMAND, length, parser, run_demo, start_run, train_or_exit

RECORDINGS = Path(__file__).with_name("recordings.zip")
# Recordings of index 0 are for the test, as in the data set.
TEST = 1

MODEL: dict[str, Any] = {
    "hidden": 64,
    "dropout": 0.3,
    "batch": 20,
    "lr": 4e-3,
    "validate_every": 100,
    "augment": "mask,noise,shift,warp",
}


def unpack(out: Path) -> list[Path]:
    """Unpack the recordings, and write manifests of those for training and of those for the test."""
    with zipfile.ZipFile(RECORDINGS) as archive:
        archive.extractall(out / "recordings")
    lines: list[list[str]] = [[], []]
    for path in sorted((out / "recordings").glob("*.flac")):
        digit, speaker, index = path.stem.split("_")
        lines[int(index) < TEST].append(f"recordings/{path.name}\t{digit}\t{speaker}\n")
    manifests = [out / "training.tsv", out / "test.tsv"]
    for manifest, rows in zip(manifests, lines, strict=True):
        manifest.write_text("file\tlabel\tspeaker\n" + "".join(rows), encoding="utf-8")
    return manifests


def nearest(reader: Any, known: list[Sample], samples: list[Sample]) -> list[str | None]:
    """Return the label of the most similar recording of the training: the distance of spectrograms of equal length."""

    def fixed(sample: Sample) -> np.ndarray[Any, Any]:
        x, _ = reader.pad([reader.read(sample)])
        return torch.nn.functional.interpolate(x.mT, 32, mode="linear").flatten().numpy()

    rows = np.stack([fixed(sample) for sample in known])
    found = (np.square(rows - fixed(sample)).sum(1).argmin() for sample in samples)
    return [known[int(index)].target for index in found]


def main() -> None:
    """Train, measure the accuracy, and draw where the model listened."""
    options = parser(__doc__, 1.0, "runs/spoken_digits").parse_args()
    started = time.perf_counter()
    config = ClassificationConfig(minutes=options.minutes, device="cpu", **MODEL)
    run = start_run(options.out)
    training, test = unpack(run.path)

    print("Training a recurrent network with attention pooling to tell spoken digits apart,")
    print(f"{length(options.minutes)}.\n")
    train_or_exit(config, [training], run, val=[test])

    # The last checkpoint. The best one was selected on the test recordings, which would bias the result.
    classifier = Classifier.load(run, "last", torch.device("cpu"))
    reader, labels = classifier.reader, classifier.labels
    samples = read_samples(test, "audio", "label")
    classes = np.array(labels.encode(samples), dtype=np.int64)
    encoded = encode_samples(samples, reader, run.path / "cache")
    indices = np.arange(len(samples))
    score, table = evaluate_labels(classifier.model, encoded, reader, indices, classes, labels.size, classifier.device)
    base = nearest(reader, read_samples(training, "audio", "label"), samples)
    base_accuracy = np.mean([label == sample.target for label, sample in zip(base, samples, strict=True)])
    print(f"\nAccuracy on {len(samples)} recordings that were not trained on:")
    print(f"  this classifier                 {100 * (score.accuracy or 0):5.1f} %")
    print(f"  the nearest training recording  {100 * base_accuracy:5.1f} %")

    confusion, picture = run.path / "confusion.png", run.path / "attention.png"
    draw_confusion(table, labels.names, confusion)
    example = samples[len(samples) // 2]
    draw_sample(explain_classification(classifier, example), picture)
    print(f"\nThe confusion matrix: {confusion}")
    print(f"Where it listened in {Path(example.name).name}: {picture}")
    print(f"\nThe model is in {run.path}; the demo took {time.perf_counter() - started:.0f} seconds. Try a recording:")
    print(f"  {COMMAND} predict {run.path} --checkpoint last {example.name}")


if __name__ == "__main__":
    run_demo(main)
