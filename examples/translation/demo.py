"""Train a translator from English to French on 5,000 short pairs, and see what it does with sentences it never saw."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_ext.text.checkpoint import Run
from llm_ext.text.config import TranslateConfig
from llm_ext.text.errors import TextError
from llm_ext.text.explain import draw, of_translation
from llm_ext.text.pairs import PairFiles
from llm_ext.text.train import train
from llm_ext.text.translation import Translator, bleu

PAIRS = Path(__file__).with_name("eng-fra.tsv")
HELD_OUT = 0.1  # of the English sentences

# Of what was tried in a minute and a half on two cores; docs/text.md has the others.
MODEL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden": 256,
    "dropout": 0.3,
    "batch": 32,
    "lr": 3e-3,
    "validate_every": 1000,
}

Translations = dict[str, list[str]]


def split(path: Path, out: Path) -> list[Path]:
    """Write the pairs to train on and those held out; all pairs of an English sentence are on one side."""
    sides: list[list[str]] = [[], []]
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            sides[zlib.crc32(line.split("\t")[0].encode()) < HELD_OUT * 2**32].append(line)
    files = [out / "training.tsv", out / "held-out.tsv"]
    for file_path, lines in zip(files, sides, strict=True):
        file_path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return files


def translations(path: Path) -> Translations:
    """Return the French sentences of each English one."""
    found: Translations = {}
    for _, english, french in PairFiles(path):
        found.setdefault(english, []).append(french)
    return found


def nearest(known: Translations, sentences: list[str]) -> list[str]:
    """Translate by looking up: the French of that English sentence in the training that is most like each.

    Alike are sentences that share runs of one to four letters, rare ones above all (tf-idf, cosine).
    """

    def grams(sentence: str) -> Counter[str]:
        padded = f" {sentence.lower()} "
        return Counter(padded[i : i + n] for n in range(1, 5) for i in range(len(padded) - n + 1))

    documents = [grams(sentence) for sentence in known]
    spread = Counter(gram for document in documents for gram in document)
    columns = {gram: (i, np.log(len(known) / count)) for i, (gram, count) in enumerate(spread.items())}

    def matrix(counted: list[Counter[str]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = np.zeros((len(counted), len(columns)), dtype=np.float32)
        for row, document in zip(rows, counted, strict=True):
            for gram, count in document.items():
                if gram in columns:
                    at, rarity = columns[gram]
                    row[at] = count * rarity
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    alike = matrix([grams(sentence) for sentence in sentences]) @ matrix(documents).T
    answers = list(known.values())
    return [answers[i][0] for i in alike.argmax(1).tolist()]


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="to train (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/translation"), help="run directory, made anew")
    options = parser.parse_args()
    started = time.perf_counter()
    config = TranslateConfig(minutes=options.minutes, accelerator="cpu", **MODEL)
    if Run(options.out).exists():
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = split(PAIRS, options.out)

    print("Training a recurrent network with attention to translate English into French,")
    print(f"for {options.minutes:g} minutes on {torch.get_num_threads()} threads.\n")
    outcome = train(config, [training], options.out, val=[held_out])
    if outcome.signal:
        return 128 + outcome.signal

    # The last, and not the best on the sentences held out: nothing was chosen by looking at them.
    translator = Translator.load(Run(options.out), "last", torch.device("cpu"))
    known, wanted = translations(training), translations(held_out)
    sentences = list(wanted)
    lines = [("held-out.tsv", sentence) for sentence in sentences]
    found = [row[0] for row in translator.lines(lines, 32, print, beam=5)]
    most = max(map(len, wanted.values()))
    references = [[each[n] if n < len(each) else None for each in wanted.values()] for n in range(most)]
    value, signature = bleu(found, references)
    base, _ = bleu(nearest(known, sentences), references)
    print(f"\nBLEU on {len(sentences)} sentences that it has not trained on, each with all its French sentences:")
    print(f"  this translator                {value:5.1f}")
    print(f"  the nearest training sentence  {base:5.1f}   (its French is looked up)")
    print(f"  ({signature})")

    print("\nFive of them, the longest first:\n")
    chosen = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))[: 5 * 8 : 8]
    for i in chosen:
        print(f"  English     {sentences[i]}")
        print(f"  translated  {found[i]}")
        print(f"  reference   {' | '.join(wanted[sentences[i]][:3])}\n")

    pictures = [options.out / f"attention.{ending}" for ending in ("png", "html")]
    picture = of_translation(translator, sentences[chosen[0]], None, print, beam=5)
    for path in pictures:
        draw(picture, path)
    print(f"What it attended to for the first of them: {' and '.join(map(str, pictures))}")
    print(
        f"\nThe model is in {options.out}; all this took {time.perf_counter() - started:.0f} seconds. Translate more:"
    )
    print(f"  echo 'I am here.' | llm-ext translate {options.out} --checkpoint last --beam 5")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TextError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
