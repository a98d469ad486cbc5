"""`llm-ext explain`: a picture of the attention of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import add_model, add_search, add_traceback, check_search, search_options
from llm_ext.cli.data.samples import read_samples
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.classifier import Classifier
from llm_ext.cli.inference.explanation import explain_language_model, explain_translation
from llm_ext.cli.inference.picture import draw
from llm_ext.cli.inference.sample_explanation import draw_sample, explain_classification, explain_transcription
from llm_ext.cli.inference.transcriber import Transcriber
from llm_ext.cli.inference.translator import Translator
from llm_ext.cli.streams import warn

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "explain",
        help="draw the attention of a model",
        description="Draw attention weights: of a translator, between each word it writes and the words of the source; "
        "of a language model, between each word and the words before it. Of a classifier or transcriber, draw a file "
        "with the weights of its steps and the influence of its features.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", metavar="TEXT", help="text to read")
    given.add_argument("--file", type=Path, metavar="FILE", help="classifier or transcriber: file to read")
    parser.add_argument(
        "--target", metavar="TEXT", help="translator: translation to explain (default: that of the model)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="picture to write: .html or .png for --text, .png or .svg for --file",
    )
    add_search(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Write the picture and print its summary; return the exit code."""
    check_search(options)
    suffixes = (".html", ".png") if options.file is None else (".png", ".svg")
    if options.out.suffix not in suffixes:
        options.fail(f"--out must end in {' or '.join(suffixes)}, got {options.out.name!r}")
    run_directory, device = Run(options.dir), find_device(options.device)
    task = run_directory.checkpoint(options.checkpoint).task
    reads_files = task in ("classify", "transcribe")
    if reads_files != (options.file is not None):
        raise CommandError(
            f"{run_directory.path}: reads {'files: give --file' if reads_files else 'text: give --text'}"
        )
    if reads_files:
        return _explain_file(options, run_directory, task, device)
    if task == "lm":
        if options.target is not None:
            raise CommandError(f"{run_directory.path}: holds a language model, which has no --target")
        model, tokenizer = run_directory.load_language_model(options.checkpoint)
        attention = explain_language_model(model.to(device), tokenizer, options.text, options.out.suffix)
    else:
        translator = Translator.load(run_directory, options.checkpoint, device)
        attention = explain_translation(
            translator, options.text, options.target, warn, search_options(options), options.out.suffix
        )
    draw(attention, options.out)
    print(f"{attention.summary}\nsaved in {options.out}")
    return 0


def _explain_file(options: argparse.Namespace, run_directory: Run, task: str, device: torch.device) -> int:
    if task == "classify":
        classifier = Classifier.load(run_directory, options.checkpoint, device)
        (sample, *_) = read_samples(options.file, classifier.reader.front_end.kind, "label", need_target=False)
        explanation = explain_classification(classifier, sample)
    else:
        transcriber = Transcriber.load(run_directory, options.checkpoint, device)
        (sample, *_) = read_samples(options.file, transcriber.reader.front_end.kind, "text", need_target=False)
        explanation = explain_transcription(transcriber, sample)
    draw_sample(explanation, options.out)
    print(f"{explanation.summary}\nsaved in {options.out}")
    return 0
