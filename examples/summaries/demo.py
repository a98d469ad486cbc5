"""Train a summarizer on the documentation of installed Python code, and measure it on files that were held out."""

from __future__ import annotations

import multiprocessing
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llm_ext.cli import CommandError
from llm_ext.cli.data import PairFiles
from llm_ext.cli.inference import Translator, draw, explain_translation, rouge
from llm_ext.cli.training import SummaryConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _demo import COMMAND, length, parser, run_demo, start_run, train_or_exit
from summaries.docstrings import PACKAGES, Pair, files_of, pairs_of

# Fraction of the files.
HELD_OUT = 0.05
# Words of the baseline, about as many as a summary has.
FIRST_WORDS = 10
SEARCH: Any = {"beam": 4, "no_repeat_ngram_size": 3}

# Small, because few thousand steps on short sources teach more than few hundred of a larger model.
MODEL: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden": 128,
    "embedding": 128,
    "dropout": 0.1,
    "batch": 32,
    "lr": 4e-3,
    "longest_source": 50,
    "validate_every": 1000,
}


def read(files: list[Path]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on, and those of other files whose summaries are not among the former."""
    training: dict[Pair, None] = {}
    held_out: dict[Pair, None] = {}
    # Not forks of this process, whose threads may hold a lock at that moment.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("forkserver")) as pool:
        for path, pairs in zip(files, pool.map(pairs_of, files, chunksize=32), strict=True):
            name = "/".join(path.parts[-3:])
            chosen = held_out if zlib.crc32(name.encode()) < HELD_OUT * 2**32 else training
            chosen.update(dict.fromkeys(pairs))
    known = {target for _, target in training}
    return list(training), [pair for pair in held_out if pair[1] not in known]


def main() -> None:
    """Train, measure ROUGE, and draw the attention."""
    arguments = parser(__doc__, 2.0, "runs/summaries")
    arguments.add_argument(
        "--packages",
        nargs="*",
        default=PACKAGES,
        help=f"packages whose documentation to read besides that of Python (default: {' '.join(PACKAGES)})",
    )
    options = arguments.parse_args()
    started = time.perf_counter()
    config = SummaryConfig(minutes=options.minutes, device="cpu", **MODEL)
    run = start_run(options.out)
    files = [run.path / "training.tsv", run.path / "held-out.tsv"]
    for path, pairs in zip(files, read(files_of(options.packages)), strict=True):
        if not pairs:
            raise CommandError(f"{path.name}: no documentation found in the installed Python code")
        path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")

    print("Training a recurrent network with attention and copying to summarize the documentation of the Python code")
    print(f"that is installed here, {length(options.minutes)}.\n")
    train_or_exit(config, files[:1], run, val=files[1:])

    # The last checkpoint. The best one was selected on the held-out pairs, which would bias the result.
    summarizer = Translator.load(run, "last", torch.device("cpu"))
    sources, summaries = map(list, zip(*((source, target) for _, source, target in PairFiles(files[1])), strict=True))
    lines = [("held-out.tsv", source) for source in sources]
    found = [row[0] for row in summarizer.translate_lines(lines, 32, print, SEARCH)]
    first = [" ".join(source.split()[:FIRST_WORDS]) for source in sources]
    print(f"\nROUGE on {len(sources):,} held-out definitions, in percent:")
    for name, written in ((f"the first {FIRST_WORDS} words", first), ("this summarizer", found)):
        scores = rouge(written, summaries).items()
        print(f"  {name:18}", "  ".join(f"{score} {value:4.1f}" for score, value in scores))

    print("\nFive of them:\n")
    chosen = range(0, len(sources), -(-len(sources) // 5))
    for i in chosen:
        print(f"  documentation  {sources[i][:300]}")
        print(f"  summarized     {found[i]}")
        print(f"  reference      {summaries[i]}\n")

    pictures = [run.path / f"attention.{suffix}" for suffix in ("png", "html")]
    attention = explain_translation(summarizer, sources[chosen[0]], None, print, SEARCH)
    for path in pictures:
        draw(attention, path)
    print(f"The attention of the first of them: {' and '.join(map(str, pictures))}")
    print(f"\nThe model is in {run.path}; the demo took {time.perf_counter() - started:.0f} seconds. Summarize more:")
    print(f"  cut -f1 {files[1]} | {COMMAND} summarize {run.path} --checkpoint last --beam 4")


if __name__ == "__main__":
    run_demo(main)
