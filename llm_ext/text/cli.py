"""The command `llm-ext`: train, eval, generate, translate, explain.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ext.text.errors import TextError

if TYPE_CHECKING:
    from llm_ext.text.evaluate import Score

EXTRA = ("lightning_fabric", "matplotlib", "numpy", "sacrebleu", "safetensors", "tokenizers", "tqdm")


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
        options, more = parser.parse_known_args(arguments)
        if more and getattr(options, "files", None) == [] and not any(word.startswith("-") for word in more):
            # Before Python 3.12 argparse lets files that may be missing come only where DIR does, before any option.
            options.files, more = [Path(word) for word in more], []
        if more:
            options.fail(f"unrecognized arguments: {' '.join(more)}")
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
    from llm_ext.text.config import CONFIGS

    parser = argparse.ArgumentParser(
        prog="llm-ext", description="Recurrent language models and translators, from text to text."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a model on text files", description="Train a model.")
    train.set_defaults(run=_train, fail=train.error)
    train.add_argument(
        "--task",
        choices=CONFIGS,
        help="what to learn: lm predicts the next token of a text, translate writes the target of a source "
        "(default: lm)",
    )
    train.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="text to train on; for translate, tab-separated pairs"
    )
    train.add_argument("--source", type=Path, metavar="FILE", help="for translate: the sources, a line each")
    train.add_argument("--target", type=Path, metavar="FILE", help="the targets, a line for each of --source")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory, made if need be")
    train.add_argument("--resume", action="store_true", help="continue the run in DIR, on its own files and settings")
    train.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE", help="the same for validation")
    train.add_argument("--val-source", type=Path, metavar="FILE", help="as --source")
    train.add_argument("--val-target", type=Path, metavar="FILE", help="as --target")
    groups = {}
    for name, of in _settings().items():
        meta = next(iter(of.values())).metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = train.add_argument_group(meta["group"])
        kind: dict[str, Any]
        if meta["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = None if meta["choices"] else {int: "N", float: "X", str: "NAME"}[meta["type"]]
            kind = {"type": meta["type"], "choices": meta["choices"], "metavar": metavar}
        groups[meta["group"]].add_argument(
            f"--{name.replace('_', '-')}",
            # Not the default itself: --resume must tell what was asked for from what was not.
            default=argparse.SUPPRESS,
            help=meta["help"].replace("%", "%%") + _defaults(of),
            **kind,
        )

    evaluate = commands.add_parser(
        "eval", help="measure the loss on text files, or BLEU on pairs", description="Measure the loss, or BLEU."
    )
    evaluate.set_defaults(run=_evaluate, fail=evaluate.error)
    evaluate.add_argument("dir", type=Path, metavar="DIR", help="run directory")
    evaluate.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="text; for a translator, tab-separated pairs"
    )
    evaluate.add_argument("--source", type=Path, metavar="FILE", help="for a translator: the sources, a line each")
    evaluate.add_argument("--target", type=Path, metavar="FILE", help="the targets, a line for each of --source")

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

    translate = commands.add_parser(
        "translate",
        help="translate lines",
        description="Translate lines to lines, of files or of the standard input. Where every line waits for its own "
        "(at a terminal, or --batch 1) it is printed as it is found, unless there is a beam.",
    )
    translate.set_defaults(run=_translate, fail=translate.error)
    translate.add_argument("dir", type=Path, metavar="DIR", help="run directory")
    translate.add_argument("files", nargs="*", type=Path, metavar="FILE", help="lines (default: standard input)")
    translate.add_argument(
        "--num-return-sequences", type=int, default=1, metavar="N", help="lines to write for each, best first"
    )

    explain = commands.add_parser(
        "explain",
        help="draw what a model attends to",
        description="Draw what a model attends to: a translator in its source, for each word it writes; a language "
        "model in the text before each word.",
    )
    explain.set_defaults(run=_explain, fail=explain.error)
    explain.add_argument("dir", type=Path, metavar="DIR", help="run directory")
    explain.add_argument("--text", required=True, metavar="TEXT", help="what to read")
    explain.add_argument("--target", metavar="TEXT", help="a translation to explain, in place of the model's own")
    explain.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .html or .png")

    for command, default in ((translate, "32; 1 at a terminal"), (evaluate, "32")):
        command.add_argument(
            "--batch", type=int, metavar="N", help=f"lines translated side by side (default: {default})"
        )
    for command in (translate, evaluate, explain):
        command.add_argument(
            "--beam", type=int, default=1, metavar="N", help="translations followed at a time (default: 1, greedy)"
        )
        command.add_argument(
            "--length-penalty", type=float, default=1.0, metavar="X",
            help="with a beam: 0 prefers short ones, more than 1 long ones (default: 1)",
        )  # fmt: skip
        command.add_argument(
            "--max-length", type=int, metavar="N", help="tokens of a translation (default: 10 + twice its source)"
        )
    for command in (evaluate, generate, translate, explain):
        command.add_argument(
            "--checkpoint", choices=("best", "last"), default="best", help="which to use (default: best)"
        )
        command.add_argument("--device", default="auto", help="as torch names it: cpu, cuda (default: auto)")
    for command in (train, evaluate):
        command.add_argument("--cache", type=Path, metavar="DIR", help="for the encoded text (default: in DIR)")
    for command in (train, evaluate, generate, translate, explain):
        command.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    return parser


def _settings() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    """The settings of all tasks by name, each with its fields by task."""
    from llm_ext.text.config import CONFIGS

    settings: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for task, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            settings.setdefault(field.name, {})[task] = field
    return settings


def _defaults(of: dict[str, dataclasses.Field[Any]]) -> str:
    """What the help says of the defaults of a setting, and of the task it belongs to."""
    values = {task: field.default for task, field in of.items() if field.default not in (None, "")}
    words = [str(value) for value in dict.fromkeys(values.values())]
    if len(words) > 1:
        words = [f"{value} for {task}" for task, value in values.items()]
    only = "" if len(of) > 1 else f"; --task {next(iter(of))} only"
    return f" (default: {', '.join(words)}{only})" if words else ""


def _parts(options: argparse.Namespace, prefix: str, files: list[Path]) -> list[Path]:
    """The files of pairs: one, tab-separated, or two."""
    source, target = (getattr(options, f"{prefix}{side}".replace("-", "_")) for side in ("source", "target"))
    if (source is None) != (target is None):
        options.fail(f"--{prefix}source and --{prefix}target belong together")
    if source is None:
        if len(files) > 1:
            options.fail(f"pairs come in one tab-separated file or in --{prefix}source and --{prefix}target")
        return files
    if files:
        options.fail(f"give either a tab-separated file or --{prefix}source and --{prefix}target")
    return [source, target]


def _train(options: argparse.Namespace) -> int:
    from llm_ext.text.config import CONFIGS
    from llm_ext.text.train import resume, train

    settings = _settings()
    given = {name: value for name, value in vars(options).items() if name in settings}
    sides = ("source", "target", "val_source", "val_target")
    of_pairs = [f"--{side.replace('_', '-')}" for side in sides if getattr(options, side) is not None]
    config = CONFIGS[options.task or "lm"]
    if options.resume:
        fixed = [f"--{name.replace('_', '-')}" for name in given if not _resumable(settings[name])]
        fixed += ["--task"] * (options.task is not None) + ["FILE"] * bool(options.files)
        fixed += ["--val"] * bool(options.val) + of_pairs
        if fixed:
            options.fail(f"--resume continues with the settings of the run: leave out {', '.join(fixed)}")
    else:
        others = [f"--{name.replace('_', '-')}" for name in given if config.task not in settings[name]]
        others += of_pairs if config.task == "lm" else []
        if others:
            options.fail(f"not for --task {config.task}: {', '.join(others)}")
        if config.task == "translate":
            options.files, options.val = _parts(options, "", options.files), _parts(options, "val-", options.val)
        if not options.files:
            options.fail("FILE is missing: give text to train on")
    try:
        # What a resumed run may change is of all tasks.
        checked = config(**given)
    except ValueError as error:
        options.fail(f"--{error}")

    if options.resume:
        outcome = resume(options.out, given, cache=options.cache)
    else:
        outcome = train(checked, options.files, options.out, val=options.val, cache=options.cache)
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


def _resumable(of: dict[str, dataclasses.Field[Any]]) -> bool:
    return all(field.metadata["resume"] for field in of.values())


def _evaluate(options: argparse.Namespace) -> int:
    from llm_ext.text.carry import Carrier
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.corpus import check_files, encode
    from llm_ext.text.device import find_device
    from llm_ext.text.evaluate import evaluate
    from llm_ext.text.train import CACHE

    files = _parts(options, "", options.files) if options.source or options.target else options.files
    if not files:
        options.fail("FILE is missing: give text to measure on")
    _check_search(options)
    check_files(files)
    if Run(options.dir).checkpoint(options.checkpoint).task == "translate":
        return _evaluate_pairs(options)
    if options.source is not None:
        raise TextError(f"{options.dir}: holds a language model: give it text, not --source and --target")
    model, tokens = Run(options.dir).load(options.checkpoint)
    device = find_device(options.device)
    corpus = encode(options.files, tokens, options.cache or options.dir / CACHE)
    if len(corpus) < 2:
        raise TextError(f"the text must have at least 2 tokens, got {len(corpus)}")
    score = evaluate(Carrier(model.to(device)), corpus, 0, len(corpus), tokens, device)
    _print_score(score)
    return 0


def _print_score(score: Score) -> None:
    print(f"loss        {score.loss:.4f} nats a token, over {score.tokens:,} tokens")
    print(f"perplexity  {score.perplexity:.3f}")
    print(f"bits        {score.bits(score.tokens):.4f} a token")
    print(f"            {score.bits(score.characters):.4f} a character")
    print(f"            {score.bits(score.bytes):.4f} a byte")


def _evaluate_pairs(options: argparse.Namespace) -> int:
    import numpy as np

    from llm_ext.text import pairs as pairing
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.device import find_device
    from llm_ext.text.pairs import PairFiles
    from llm_ext.text.train import CACHE
    from llm_ext.text.translation import Translator, bleu, evaluate_pairs

    files = PairFiles(*_parts(options, "", options.files))
    translator = Translator.load(Run(options.dir), options.checkpoint, find_device(options.device))
    source, target = translator.source, translator.target
    pairs = pairing.encode(files, source, target, options.cache or options.dir / CACHE, sys.maxsize, _warn)
    every = np.arange(len(pairs))
    score = evaluate_pairs(translator.model, pairs, every, (source.end, target.end), target.tokens, translator.device)
    lines = ((f"{files.source}: line {number}", line) for number, line, reference in files if line and reference)
    found = translator.lines(lines, options.batch or 32, _warn, **_search(options))
    references = [reference for _, line, reference in files if line and reference]
    value, signature = bleu([row[0] for row in found], [references])
    _print_score(score)
    print(f"BLEU        {value:.2f} over {len(references):,} lines ({signature})")
    return 0


def _check_search(options: argparse.Namespace) -> None:
    """Refuse what no search can do."""
    for name, fits, expected in (
        ("beam", options.beam >= 1, "at least 1"),
        ("length-penalty", 0 <= options.length_penalty < float("inf"), "at least 0"),
        ("max-length", options.max_length is None or options.max_length >= 1, "at least 1"),
        ("batch", getattr(options, "batch", None) is None or options.batch >= 1, "at least 1"),
        (
            "num-return-sequences",
            1 <= getattr(options, "num_return_sequences", 1) <= options.beam,
            f"from 1 to --beam, which is {options.beam}",
        ),
    ):
        if not fits:
            options.fail(f"--{name} must be {expected}, got {getattr(options, name.replace('-', '_'))!r}")


def _search(options: argparse.Namespace) -> dict[str, Any]:
    names = ("beam", "length_penalty", "max_length", "num_return_sequences")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _warn(message: str) -> None:
    print(f"llm-ext: {message}", file=sys.stderr, flush=True)


def _translate(options: argparse.Namespace) -> int:
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.corpus import check_files
    from llm_ext.text.device import find_device
    from llm_ext.text.pairs import decode_line, read_lines
    from llm_ext.text.translation import Translator

    _check_search(options)
    check_files(options.files)
    translator = Translator.load(Run(options.dir), options.checkpoint, find_device(options.device))
    lines: Iterator[tuple[str, str]]
    if options.files:
        lines = ((f"{path}: line {number}", line) for path in options.files for number, line in read_lines(path))
    else:
        # Not the text of sys.stdin: it is UTF-8 here whatever the locale says.
        raw = enumerate(iter(sys.stdin.buffer.readline, b""), 1)
        lines = ((f"line {number}", decode_line(line, f"line {number}")) for number, line in raw)
    batch = options.batch or (1 if not options.files and sys.stdin.isatty() else 32)
    if batch == 1 and options.beam == 1:
        for where, line in lines:
            ids = translator.encode(line.strip(), where, _warn) if line.strip() else []
            for piece in translator.stream(ids, options.max_length) if ids else ():
                print(piece, end="", flush=True)
            print(flush=True)
        return 0
    for row in translator.lines(lines, batch, _warn, **_search(options)):
        print("\n".join(row), flush=True)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from llm_ext.text.checkpoint import Run
    from llm_ext.text.device import find_device
    from llm_ext.text.explain import draw, of_language_model, of_translation
    from llm_ext.text.translation import Translator

    _check_search(options)
    if options.out.suffix not in (".html", ".png"):
        options.fail(f"--out must end in .html or .png, got {options.out.name!r}")
    run, device = Run(options.dir), find_device(options.device)
    if run.checkpoint(options.checkpoint).task == "lm":
        if options.target is not None:
            raise TextError(f"{run.path}: holds a language model, which has no --target")
        model, tokens = run.load(options.checkpoint)
        picture = of_language_model(model.to(device), tokens, options.text)
    else:
        translator = Translator.load(run, options.checkpoint, device)
        picture = of_translation(translator, options.text, options.target, _warn, **_search(options))
    draw(picture, options.out)
    print(f"{picture.summary}\nsaved in {options.out}")
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
