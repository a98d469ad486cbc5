"""`llm-ext generate`: sample text from a language model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import (
    add_model,
    add_traceback,
    add_weights,
    check,
    check_ranges,
    round_weights,
)
from llm_ext.cli.device import find_device
from llm_ext.cli.inference.generation import generate
from llm_ext.models.sampling import MOST_TEMPERATURE

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text with a language model. The text is printed as it is sampled.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue (default: a line break, or the first character of a vocabulary without it)",
    )
    parser.add_argument("--length", type=int, default=400, metavar="N", help="tokens to sample (default: 400)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="divides the scores; 0 always takes the most likely token (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="sample among the N most likely tokens (default: all tokens)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="sample among the most likely tokens whose probabilities sum to X (default: all tokens)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="random seed, for the same text each time (default: a new text each time)"
    )
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the prompt and its continuation; return the exit code."""
    check_ranges(
        options,
        ("length", 0, 1 << 40),
        ("temperature", 0, MOST_TEMPERATURE),
        ("top-k", 1, 1 << 40),
        ("seed", 0, (1 << 63) - 1),
    )
    check(
        options,
        (
            ("top-p", options.top_p is None or 0 < options.top_p <= 1, "above 0 and at most 1"),
            ("prompt", options.prompt != "", "at least one character"),
        ),
    )
    model, tokenizer = Run(options.dir).load_language_model(options.checkpoint)
    round_weights(options, model)
    prompt = tokenizer.first_text() if options.prompt is None else options.prompt
    pieces = generate(
        model.to(find_device(options.device)),
        tokenizer,
        prompt,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
