"""`llm-ext eval`: the loss of a text, or loss and BLEU of pairs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import (
    add_cache,
    add_model,
    add_pair_files,
    add_search,
    add_traceback,
    check_search,
    pair_files,
    search_options,
    warn,
)
from llm_ext.cli.data.corpus import encode_text
from llm_ext.cli.data.files import check_files
from llm_ext.cli.data.pairs import PairFiles, encode_pairs
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Score, evaluate_pairs, evaluate_text
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.inference.translator import Translator, bleu
from llm_ext.cli.training.pipeline import CACHE

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure the loss on text files, or loss and BLEU on pairs",
        description="Measure the loss of a language model on text, or loss and BLEU of a translator on pairs.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="text; for a translator, one file of tab-separated pairs"
    )
    add_pair_files(parser)
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help=f"lines translated together (default: {BATCH})"
    )
    add_search(parser)
    add_cache(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the loss, and the BLEU of a translator; return the exit code."""
    two_files = options.source is not None or options.target is not None
    files = pair_files(options, options.files) if two_files else options.files
    if not files:
        options.fail("FILE is missing: give text to measure on")
    check_search(options)
    check_files(files)
    run_directory = Run(options.dir)
    if run_directory.checkpoint(options.checkpoint).task == "translate":
        return _evaluate_translator(options, run_directory, PairFiles(*pair_files(options, options.files)))
    if two_files:
        raise CommandError(f"{options.dir}: holds a language model: give it text, not --source and --target")
    return _evaluate_language_model(options, run_directory, files)


def _evaluate_language_model(options: argparse.Namespace, run_directory: Run, files: list[Path]) -> int:
    model, tokenizer = run_directory.load_language_model(options.checkpoint)
    device = find_device(options.device)
    corpus = encode_text(files, tokenizer, _cache(options))
    if len(corpus) < 2:
        raise CommandError(f"the text must have at least 2 tokens, got {len(corpus)}")
    _print_score(evaluate_text(StatefulLLM(model.to(device)), corpus, 0, len(corpus), tokenizer, device))
    return 0


def _evaluate_translator(options: argparse.Namespace, run_directory: Run, files: PairFiles) -> int:
    translator = Translator.load(run_directory, options.checkpoint, find_device(options.device))
    source, target = translator.source, translator.target
    pairs = encode_pairs(files, source, target, _cache(options), sys.maxsize, warn)
    score = evaluate_pairs(
        translator.model, pairs, np.arange(len(pairs)), (source.end, target.end), target.tokenizer, translator.device
    )
    lines = ((f"{files.source}: line {number}", line) for number, line, reference in files if line and reference)
    rows = translator.translate_lines(lines, options.batch, warn, search_options(options))
    references = [reference for _, line, reference in files if line and reference]
    value, signature = bleu([row[0] for row in rows], [references])
    _print_score(score)
    print(f"BLEU        {value:.2f} over {len(references):,} lines ({signature})")
    return 0


def _cache(options: argparse.Namespace) -> Path:
    cache: Path = options.cache or options.dir / CACHE
    return cache


def _print_score(score: Score) -> None:
    print(f"loss        {score.loss:.4f} nats per token, over {score.tokens:,} tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    print(f"bits        {score.bits(score.tokens):.4f} per token")
    print(f"            {score.bits(score.characters):.4f} per character")
    print(f"            {score.bits(score.bytes):.4f} per byte")
