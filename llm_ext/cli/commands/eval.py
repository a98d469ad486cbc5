"""`llm-ext eval`: the loss of a text; loss, BLEU and ROUGE of pairs."""

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
from llm_ext.cli.data.files import check_files, copy_pipes
from llm_ext.cli.data.pairs import PairFiles, encode_pairs
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Score, evaluate_pairs, evaluate_text
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.inference.translator import Translator, bleu, rouge
from llm_ext.cli.training.pipeline import CACHE

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure the loss on text files, or loss, BLEU and ROUGE on pairs",
        description="Measure the loss of a language model on text, loss and BLEU of a translator on pairs, and of a "
        "summarizer ROUGE as well.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="text, or one file of tab-separated pairs")
    add_pair_files(parser)
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"lines read together (default: {BATCH})")
    add_search(parser)
    add_cache(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the loss, and how well a model writes the targets of pairs; return the exit code."""
    two_files = options.source is not None or options.target is not None
    files = pair_files(options, options.files) if two_files else options.files
    if not files:
        options.fail("FILE is missing: give text to measure on")
    check_search(options)
    check_files(files)
    run_directory = Run(options.dir)
    task = run_directory.checkpoint(options.checkpoint).task
    if task in ("translate", "summarize"):
        files = copy_pipes(pair_files(options, options.files), _cache(options))
        return _evaluate_translator(options, run_directory, PairFiles(*files), task == "summarize")
    if two_files:
        raise CommandError(f"{options.dir}: holds a language model: give it text, not --source and --target")
    return _evaluate_language_model(options, run_directory, files)


def _evaluate_language_model(options: argparse.Namespace, run_directory: Run, files: list[Path]) -> int:
    model, tokenizer = run_directory.load_language_model(options.checkpoint)
    device = find_device(options.device)
    corpus = encode_text(copy_pipes(files, _cache(options)), tokenizer, _cache(options))
    if len(corpus) < 2:
        raise CommandError(f"the text must have at least 2 tokens, got {len(corpus)}")
    _print_score(evaluate_text(StatefulLLM(model.to(device)), corpus, 0, len(corpus), tokenizer, device))
    return 0


def _evaluate_translator(options: argparse.Namespace, run_directory: Run, files: PairFiles, summaries: bool) -> int:
    translator = Translator.load(run_directory, options.checkpoint, find_device(options.device))
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


def _cache(options: argparse.Namespace) -> Path:
    cache: Path = options.cache or options.dir / CACHE
    return cache


def _print_score(score: Score) -> None:
    print(f"loss        {score.loss:.4f} nats per token, over {score.tokens:,} tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    print(f"bits        {score.bits(score.tokens):.4f} per token")
    print(f"            {score.bits(score.characters):.4f} per character")
    print(f"            {score.bits(score.bytes):.4f} per byte")
