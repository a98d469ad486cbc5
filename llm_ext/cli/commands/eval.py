"""`llm-ext eval`: the loss of a text; loss, BLEU and ROUGE of pairs; accuracy or error rates of samples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import (
    add_cache,
    add_features,
    add_model,
    add_pair_files,
    add_search,
    add_traceback,
    add_weights,
    check_search,
    pair_files,
    round_weights,
    sample_path,
    search_options,
)
from llm_ext.cli.data.corpus import encode_text
from llm_ext.cli.data.features import encode_samples
from llm_ext.cli.data.files import check_files, copy_pipes
from llm_ext.cli.data.pairs import PairFiles, encode_pairs
from llm_ext.cli.data.samples import read_samples
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.classifier import Classifier, evaluate_labels
from llm_ext.cli.inference.confusion import draw_confusion
from llm_ext.cli.inference.evaluation import Score, evaluate_pairs, evaluate_text
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.inference.transcriber import (
    Transcriber,
    encode_texts,
    error_rates,
    evaluate_transcripts,
    fits_ctc,
)
from llm_ext.cli.inference.translator import Translator, bleu, rouge
from llm_ext.cli.streams import warn
from llm_ext.cli.training.pipeline import CACHE

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure a model on text, pairs or samples",
        description="Measure a model: the loss of a language model on text; loss and BLEU of a translator, and also "
        "ROUGE of a summarizer, on pairs; loss and accuracy of a classifier, or loss and error rates of a transcriber, "
        "on samples.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="text; one file of tab-separated pairs; or, for samples, a manifest",
    )
    add_pair_files(parser)
    add_features(parser)
    parser.add_argument(
        "--confusion",
        type=Path,
        metavar="FILE",
        help="classifier: picture of the confusion matrix, .svg or .png (default: confusion.svg in the run directory)",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help=f"lines or samples read together (default: {BATCH})"
    )
    add_search(parser)
    add_cache(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the loss, and how well a model writes the targets of pairs or knows samples; return the exit code."""
    two_files = options.source is not None or options.target is not None
    files = pair_files(options, options.files) if two_files else options.files
    if not files and options.features is None:
        options.fail("FILE is missing: give text, pairs or samples to measure on")
    check_search(options)
    run_directory = Run(options.dir)
    task = run_directory.checkpoint(options.checkpoint).task
    if task in ("classify", "transcribe"):
        return _evaluate_samples(options, run_directory, task)
    if options.features is not None:
        raise CommandError(f"{options.dir}: reads text: give FILE, not --features")
    check_files(files)
    if task in ("translate", "summarize"):
        files = copy_pipes(pair_files(options, options.files), _cache(options))
        return _evaluate_translator(options, run_directory, PairFiles(*files), task == "summarize")
    if two_files:
        raise CommandError(f"{options.dir}: holds a language model: give it text, not --source and --target")
    return _evaluate_language_model(options, run_directory, files)


def _evaluate_language_model(options: argparse.Namespace, run_directory: Run, files: list[Path]) -> int:
    model, tokenizer = run_directory.load_language_model(options.checkpoint)
    round_weights(options, model)
    device = find_device(options.device)
    corpus = encode_text(copy_pipes(files, _cache(options)), tokenizer, _cache(options))
    if len(corpus) < 2:
        raise CommandError(f"the text must have at least 2 tokens, got {len(corpus)}")
    _print_score(evaluate_text(StatefulLLM(model.to(device)), corpus, 0, len(corpus), tokenizer, device))
    return 0


def _evaluate_translator(options: argparse.Namespace, run_directory: Run, files: PairFiles, summaries: bool) -> int:
    translator = Translator.load(run_directory, options.checkpoint, find_device(options.device))
    round_weights(options, translator.model)
    source, target = translator.source, translator.target
    pairs = encode_pairs(files, source, target, _cache(options), sys.maxsize, warn, translator.longest_source)
    score = evaluate_pairs(
        translator.model, pairs, np.arange(len(pairs)), (source.end, target.end), target.tokenizer, translator.device
    )
    lines = ((f"{files.source}: line {number}", line) for number, line, reference in files if line and reference)
    rows = translator.translate_lines(lines, options.batch, warn, search_options(options))
    references = [reference for _, line, reference in files if line and reference]
    found = [row[0] for row in rows]
    value, signature = bleu(found, [references])
    _print_score(score)
    print(f"BLEU        {value:.2f} over {len(references):,} lines ({signature})")
    if summaries:
        for name, value in rouge(found, references).items():
            print(f"{name}     {value:.2f}")
    return 0


def _evaluate_samples(options: argparse.Namespace, run_directory: Run, task: str) -> int:
    paths = sample_path(options, options.files)
    if not paths:
        options.fail("FILE is missing: give samples to measure on")
    picture: Path = options.confusion or options.dir / "confusion.svg"
    if picture.suffix not in (".svg", ".png"):
        options.fail(f"--confusion must end in .svg or .png, got {picture.name!r}")
    device = find_device(options.device)
    if task == "classify":
        classifier = Classifier.load(run_directory, options.checkpoint, device)
        round_weights(options, classifier.model)
        _evaluate_classifier(options, classifier, paths[0], picture)
    else:
        transcriber = Transcriber.load(run_directory, options.checkpoint, device)
        round_weights(options, transcriber.model)
        _evaluate_transcriber(options, transcriber, paths[0])
    return 0


def _evaluate_classifier(options: argparse.Namespace, classifier: Classifier, path: Path, picture: Path) -> None:
    reader, labels = classifier.reader, classifier.labels
    samples = read_samples(path, reader.front_end.kind, "label")
    classes = np.array(labels.encode(samples), dtype=np.int64)
    encoded = encode_samples(samples, reader, _cache(options))
    score, table = evaluate_labels(
        classifier.model, encoded, reader, np.arange(len(samples)), classes, labels.size, classifier.device
    )
    draw_confusion(table, labels.names, picture)
    print(f"loss        {score.loss:.4f} nats per sample, over {score.tokens:,} samples")
    print(f"accuracy    {100 * (score.accuracy or 0):.2f} % ({score.correct:,} of {score.tokens:,})")
    print(f"confusion   saved in {picture}")


def _evaluate_transcriber(options: argparse.Namespace, transcriber: Transcriber, path: Path) -> None:
    reader, tokenizer = transcriber.reader, transcriber.tokenizer
    samples = read_samples(path, reader.front_end.kind, "text")
    ids = encode_texts(samples, tokenizer)
    encoded = encode_samples(samples, reader, _cache(options))
    fit = [n for n in range(len(samples)) if not transcriber.ctc or fits_ctc(int(encoded.lengths[n]), ids[n])]
    if fit:
        score = evaluate_transcripts(
            transcriber.model,
            transcriber.ctc,
            encoded,
            reader,
            np.array(fit),
            ids,
            tokenizer,
            transcriber.device,
        )
        print(f"loss        {score.loss:.4f} nats per token, over {score.tokens:,} tokens")
    if len(fit) < len(samples):
        warn(f"{path}: the loss leaves out {len(samples) - len(fit):,} samples with fewer steps than their text needs")
    texts = list(transcriber.transcribe(samples, options.batch, search_options(options)))
    characters, words = error_rates([str(sample.target) for sample in samples], texts)
    print(f"CER         {100 * characters:.2f} % of the characters")
    print(f"WER         {100 * words:.2f} % of the words, over {len(samples):,} samples")


def _cache(options: argparse.Namespace) -> Path:
    cache: Path = options.cache or options.dir / CACHE
    return cache


def _print_score(score: Score) -> None:
    print(f"loss        {score.loss:.4f} nats per token, over {score.tokens:,} tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    print(f"bits        {score.bits(score.tokens):.4f} per token")
    print(f"            {score.bits(score.characters):.4f} per character")
    print(f"            {score.bits(score.bytes):.4f} per byte")
