"""Options that several commands share, and checks of their values."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

import llm_ext
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.translator import SearchOptions
from llm_ext.models.beam_search import MOST_LENGTH_PENALTY

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = [
    "add_cache",
    "add_checkpoint",
    "add_features",
    "add_model",
    "add_pair_files",
    "add_search",
    "add_traceback",
    "add_weights",
    "check",
    "check_ranges",
    "check_search",
    "pair_files",
    "round_weights",
    "sample_path",
    "search_options",
]

SIDES = ("source", "target")
# Tokens of the longest written line, and lines or samples read together.
LONGEST, LARGEST_BATCH = 10**6, 1 << 20


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the run directory and --checkpoint."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="run directory of a trained model")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint to use (default: best)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the run directory, --checkpoint and --device."""
    add_checkpoint(parser)
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="device to compute on: cpu or cuda; auto is the CPU, because GPUs are untested (default: auto)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --weights."""
    parser.add_argument(
        "--weights",
        choices=("int8", "bfloat16"),
        help="round the weights to 8 or 16 bits, for a CPU; int8 is the faster (default: as they were trained)",
    )


def round_weights(options: argparse.Namespace, model: nn.Module) -> None:
    """Round the weights of a model if --weights is given.

    Raises:
        CommandError: The model is not in float32 on the CPU.
    """
    if options.weights is None:
        return
    if find_device(options.device).type != "cpu":
        raise CommandError(f"--weights {options.weights} needs --device cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left has a reason
        entries = llm_ext.quantize_(model, options.weights)
    if all(entry.reason for entry in entries):
        raise CommandError(f"{options.dir}: --weights rounds float32, but the model has been trained in another dtype")


def add_pair_files(parser: argparse.ArgumentParser, prefix: str = "", purpose: str = "") -> None:
    """Add --source and --target, which replace a tab-separated file."""
    parser.add_argument(
        f"--{prefix}source", type=Path, metavar="FILE", help=f"pairs: file of sources{purpose}, one per line"
    )
    parser.add_argument(
        f"--{prefix}target", type=Path, metavar="FILE", help=f"pairs: file of targets{purpose}, one per line"
    )


def add_features(parser: argparse.ArgumentParser) -> None:
    """Add --features, another way to give the samples."""
    parser.add_argument(
        "--features",
        type=Path,
        metavar="PATH",
        help="samples: an .npz file, a directory or a manifest (.tsv), in place of FILE",
    )


def sample_path(options: argparse.Namespace, files: list[Path]) -> list[Path]:
    """Return the one path of samples: --features, or the only one of `files`; none if neither is given."""
    given = [path for path in (options.features, *files) if path is not None]
    if len(given) > 1:
        options.fail("give samples in one manifest (.tsv), one .npz file or one directory")
    return given


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add --cache."""
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="directory for encoded text (default: cache in the run directory)"
    )


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search for a target."""
    parser.add_argument("--beam", type=int, default=1, metavar="N", help="beam width; 1 is greedy search (default: 1)")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="beam search: scores are divided by length to this power; more than 1 favours long ones (default: 1)",
    )
    parser.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=0,
        metavar="N",
        help="never write the same N tokens in a row twice in a line; 0 allows it (default: 0)",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of a written line (default: 10 + twice its source)"
    )


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """Add the hidden --traceback, which `main` looks for."""
    parser.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)


def check(options: argparse.Namespace, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Fail with a usage error if an option is out of range.

    Args:
        options: The parsed command line.
        rules: Name of the option, whether its value is valid, and what is expected.
    """
    for name, valid, expected in rules:
        if not valid:
            options.fail(f"--{name} must be {expected}, got {getattr(options, name.replace('-', '_'))!r}")


def check_ranges(options: argparse.Namespace, *ranges: tuple[str, float, float]) -> None:
    """Fail with a usage error if the value of an option is given and not from the first to the second number."""
    for name, least, most in ranges:
        value = getattr(options, name.replace("-", "_"), None)
        if value is not None:
            check(options, [(name, least <= value <= most, f"at least {_number(least)} and at most {_number(most)}")])


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def check_search(options: argparse.Namespace) -> None:
    """Check the options of `add_search`, and --batch and --num-return-sequences where a command has them."""
    check_ranges(
        options,
        ("beam", 1, 4096),
        ("length-penalty", 0, MOST_LENGTH_PENALTY),
        ("no-repeat-ngram-size", 0, LONGEST),
        ("max-length", 1, LONGEST),
        ("batch", 1, LARGEST_BATCH),
    )
    sequences = getattr(options, "num_return_sequences", 1)
    check(
        options,
        [("num-return-sequences", 1 <= sequences <= options.beam, f"from 1 to --beam, which is {options.beam}")],
    )


def search_options(options: argparse.Namespace) -> SearchOptions:
    """Return the options of the search for `Translator`."""
    return SearchOptions(
        beam=options.beam,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        max_length=options.max_length,
        num_return_sequences=getattr(options, "num_return_sequences", 1),
    )


def pair_files(options: argparse.Namespace, files: list[Path], prefix: str = "") -> list[Path]:
    """Return the files of pairs: one tab-separated file, or a file of sources and one of targets."""
    source, target = (getattr(options, f"{prefix}{side}".replace("-", "_")) for side in SIDES)
    names = f"--{prefix}source and --{prefix}target"
    if (source is None) != (target is None):
        options.fail(f"{names} must be given together")
    if source is None:
        if len(files) > 1:
            options.fail(f"give pairs in one tab-separated file, or in {names}")
        return files
    if files:
        options.fail(f"give either a tab-separated file, or {names}")
    return [source, target]
