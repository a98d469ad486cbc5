"""The command `llm-ext`: train, eval, generate.

Exit codes: 0 done; 1 a failure, with a message; 2 a wrong command line; 128 + the number of the signal (130
for Ctrl-C, 143 for SIGTERM) when a training was stopped, after it has saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_ext.text.errors import TextError

EXTRA = ("lightning_fabric", "matplotlib", "numpy", "safetensors", "tokenizers", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the name of the program; by default those of this process.

    Returns:
        The exit code; a wrong command line exits at once with 2.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text is UTF-8 here whatever the locale says, and a strange token must not end a stream of them.
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        return int(options.run(options))
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has seen enough. Python would complain on closing stdout: give it another.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        return _fail(f"{error.name} is not installed: pip install --no-build-isolation '.[text]'")
    except TextError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except Exception as error:
        if "--traceback" in (sys.argv if arguments is None else arguments):
            raise
        return _fail(f"{type(error).__name__}: {error} (--traceback shows where)")


def _fail(message: str, code: int = 1) -> int:
    print(f"llm-ext: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    # Imported here, so that main can tell which package is missing.
    from llm_ext.text.config import TrainConfig

    parser = argparse.ArgumentParser(prog="llm-ext", description="Recurrent language models, from text to text.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a model on text files", description="Train a model.")
    train.set_defaults(run=_train, fail=train.error)
    train.add_argument("files", nargs="*", type=Path, metavar="FILE", help="text to train on")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory, made if need be")
    train.add_argument("--resume", action="store_true", help="continue the run in DIR, on its own files and settings")
    train.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE", help="text for validation")
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        meta = field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = train.add_argument_group(meta["group"])
        default = "" if field.default is None else f" (default: {field.default})"
        groups[meta["group"]].add_argument(
            f"--{field.name.replace('_', '-')}",
            type=meta["type"],
            choices=meta["choices"],
            # Not the default itself: --resume must tell what was asked for from what was not.
            default=argparse.SUPPRESS,
            metavar=None if meta["choices"] else {int: "N", float: "X", str: "NAME"}[meta["type"]],
            help=meta["help"].replace("%", "%%") + default,
        )

    evaluate = commands.add_parser("eval", help="measure the loss on text files", description="Measure the loss.")
    evaluate.set_defaults(run=_evaluate, fail=evaluate.error)
    evaluate.add_argument("dir", type=Path, metavar="DIR", help="run directory")
    evaluate.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text")

    generate = commands.add_parser(
        "generate", help="continue a text", description="Continue a text, printing it as it is sampled."
    )
    generate.set_defaults(run=_generate, fail=generate.error)
    generate.add_argument("dir", type=Path, metavar="DIR", help="run directory")
    generate.add_argument("--prompt", default="\n", metavar="TEXT", help="text to continue (default: a new line)")
    generate.add_argument("--length", type=int, default=400, metavar="N", help="tokens to sample (default: 400)")
    generate.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="divides the scores; 0: always the best token",
    )
    generate.add_argument("--top-k", type=int, metavar="N", help="sample among the N best tokens")
    generate.add_argument(
        "--top-p", type=float, metavar="X", help="sample among the best tokens that make up this probability"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="sample the same text each time")

    for command in (evaluate, generate):
        command.add_argument(
            "--checkpoint", choices=("best", "last"), default="best", help="which to use (default: best)"
        )
        command.add_argument("--device", default="auto", help="as torch names it: cpu, cuda (default: auto)")
    for command in (train, evaluate):
        command.add_argument("--cache", type=Path, metavar="DIR", help="for the encoded text (default: in DIR)")
    for command in (train, evaluate, generate):
        command.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    return parser


def _train(options: argparse.Namespace) -> int:
    from llm_ext.text.config import TrainConfig
    from llm_ext.text.train import resume, train

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    if options.resume:
        fixed = [f"--{name.replace('_', '-')}" for name in given if not fields[name].metadata["resume"]]
        fixed += ["FILE"] * bool(options.files) + ["--val"] * bool(options.val)
        if fixed:
            options.fail(f"--resume continues with the settings of the run: leave out {', '.join(fixed)}")
    elif not options.files:
        options.fail("FILE is missing: give text to train on")
    try:
        config = TrainConfig(**given)
    except ValueError as error:
        options.fail(f"--{error}")

    if options.resume:
        outcome = resume(options.out, given, cache=options.cache)
    else:
        outcome = train(config, options.files, options.out, val=options.val, cache=options.cache)
    progress = outcome.progress
    if outcome.first:
        if outcome.signal:
            print(
                f"stopped by {signal.Signals(outcome.signal).name} at step {progress.step}; saved; "
                f"continue with: llm-ext train --resume --out {options.out}"
            )
        else:
            print(
                f"done: step {progress.step}; best validation loss {progress.best_loss:.4f} nats a token "
                f"at step {progress.best_step}; saved in {options.out}"
            )
    return 128 + outcome.signal if outcome.signal else 0


def _evaluate(options: argparse.Namespace) -> int:
    from llm_ext.text.carry import Carrier
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.corpus import check_files, encode
    from llm_ext.text.device import find_device
    from llm_ext.text.evaluate import evaluate
    from llm_ext.text.train import CACHE

    check_files(options.files)
    model, tokens = Run(options.dir).load(options.checkpoint)
    device = find_device(options.device)
    corpus = encode(options.files, tokens, options.cache or options.dir / CACHE)
    if len(corpus) < 2:
        raise TextError(f"the text must have at least 2 tokens, got {len(corpus)}")
    score = evaluate(Carrier(model.to(device)), corpus, 0, len(corpus), tokens, device)
    print(f"loss        {score.loss:.4f} nats a token, over {score.tokens:,} tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    print(f"bits        {score.bits(score.tokens):.4f} a token")
    print(f"            {score.bits(score.characters):.4f} a character")
    print(f"            {score.bits(score.bytes):.4f} a byte")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.device import find_device
    from llm_ext.text.generate import generate

    for name, fits, expected in (
        ("length", options.length >= 0, "at least 0"),
        ("temperature", 0 <= options.temperature < float("inf"), "at least 0"),
        ("top-k", options.top_k is None or options.top_k >= 1, "at least 1"),
        ("top-p", options.top_p is None or 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("prompt", options.prompt != "", "at least one character"),
    ):
        if not fits:
            options.fail(f"--{name} must be {expected}, got {getattr(options, name.replace('-', '_'))!r}")
    model, tokens = Run(options.dir).load(options.checkpoint)
    text = generate(
        model.to(find_device(options.device)),
        tokens,
        options.prompt,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
