"""`llm-ext predict`: the label or the text of samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import (
    add_model,
    add_search,
    add_traceback,
    add_weights,
    check_search,
    round_weights,
    search_options,
)
from llm_ext.cli.data.samples import Sample, read_samples
from llm_ext.cli.device import find_device
from llm_ext.cli.inference.classifier import Classifier
from llm_ext.cli.inference.transcriber import Transcriber

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "predict",
        help="label or transcribe files",
        description="Print a line for each sample: its name, and after a tab the text that a transcriber writes, or "
        "the label that a classifier chooses, with its probability after another tab.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="files of the kind of the training, manifests (.tsv), .npz files or directories",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help=f"samples read together (default: {BATCH})"
    )
    add_weights(parser)
    add_search(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print a line for each sample; return the exit code."""
    check_search(options)
    if not options.files:
        options.fail("FILE is missing: give files to predict")
    run_directory, device = Run(options.dir), find_device(options.device)
    task = run_directory.checkpoint(options.checkpoint).task
    if task == "transcribe":
        transcriber = Transcriber.load(run_directory, options.checkpoint, device)
        round_weights(options, transcriber.model)
        samples = _samples(options, transcriber.reader.front_end.kind, "text")
        texts = transcriber.transcribe(samples, options.batch, search_options(options))
        for sample, text in zip(samples, texts, strict=True):
            print(f"{sample.name}\t{text}", flush=True)
        return 0
    classifier = Classifier.load(run_directory, options.checkpoint, device)
    round_weights(options, classifier.model)
    samples = _samples(options, classifier.reader.front_end.kind, "label")
    for sample, probabilities in zip(samples, classifier.predict(samples, options.batch), strict=True):
        best = int(probabilities.argmax())
        print(f"{sample.name}\t{classifier.labels.names[best]}\t{probabilities[best]:.4f}", flush=True)
    return 0


def _samples(options: argparse.Namespace, kind: str, target: str) -> list[Sample]:
    return [sample for path in options.files for sample in read_samples(path, kind, target, need_target=False)]
