"""Train a translator from English to French on 5,000 short pairs, and measure it on sentences that were held out."""

from __future__ import annotations

import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_ext.cli.data import PairFiles
from llm_ext.cli.inference import Translator, bleu, draw, explain_translation
from llm_ext.cli.training import TranslationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _demo import COMMAND, length, parser, run_demo, start_run, train_or_exit

PAIRS = Path(__file__).with_name("eng-fra.tsv")
# Fraction of the English sentences.
HELD_OUT = 0.1

# The best BLEU after 1.3 minutes on two cores; docs/lab/translation.md has other settings.
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
    """Write training pairs and held-out pairs; all pairs of an English sentence are in the same file."""
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
    """Return the French of the most similar English sentence of the training for each sentence.

    Similarity is the cosine of tf-idf vectors of character n-grams, n = 1 to 4.
    """

    def grams(sentence: str) -> Counter[str]:
        padded = f" {sentence.lower()} "
        return Counter(padded[i : i + n] for n in range(1, 5) for i in range(len(padded) - n + 1))

    documents = [grams(sentence) for sentence in known]
    frequencies = Counter(gram for document in documents for gram in document)
    columns = {gram: (i, np.log(len(known) / count)) for i, (gram, count) in enumerate(frequencies.items())}

    def matrix(documents: list[Counter[str]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = np.zeros((len(documents), len(columns)), dtype=np.float32)
        for row, document in zip(rows, documents, strict=True):
            for gram, count in document.items():
                if gram in columns:
                    column, idf = columns[gram]
                    row[column] = count * idf
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return rows

    similarity = matrix([grams(sentence) for sentence in sentences]) @ matrix(documents).T
    answers = list(known.values())
    return [answers[i][0] for i in similarity.argmax(1).tolist()]


def main() -> None:
    """Train, measure BLEU, and draw the attention."""
    options = parser(__doc__, 2.0, "runs/translation").parse_args()
    started = time.perf_counter()
    config = TranslationConfig(minutes=options.minutes, device="cpu", **MODEL)
    run = start_run(options.out)
    training, held_out = split(PAIRS, run.path)

    print("Training a recurrent network with attention to translate English into French,")
    print(f"{length(options.minutes)}.\n")
    train_or_exit(config, [training], run, val=[held_out])

    # The last checkpoint. The best one was selected on the held-out sentences, which would bias the result.
    translator = Translator.load(run, "last", torch.device("cpu"))
    known, wanted = translations(training), translations(held_out)
    sentences = list(wanted)
    lines = [("held-out.tsv", sentence) for sentence in sentences]
    found = [row[0] for row in translator.translate_lines(lines, 32, print, {"beam": 5})]
    most = max(map(len, wanted.values()))
    references = [[each[n] if n < len(each) else None for each in wanted.values()] for n in range(most)]
    value, signature = bleu(found, references)
    base, _ = bleu(nearest(known, sentences), references)
    print(f"\nBLEU on {len(sentences)} held-out sentences, each with all its French sentences as references:")
    print(f"  this translator                {value:5.1f}")
    print(f"  the nearest training sentence  {base:5.1f}   (its French is looked up)")
    print(f"  ({signature})")

    print("\nFive of them, the longest first:\n")
    chosen = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))[: 5 * 8 : 8]
    for i in chosen:
        print(f"  English     {sentences[i]}")
        print(f"  translated  {found[i]}")
        print(f"  reference   {' | '.join(wanted[sentences[i]][:3])}\n")

    pictures = [run.path / f"attention.{suffix}" for suffix in ("png", "html")]
    attention = explain_translation(translator, sentences[chosen[0]], None, print, {"beam": 5})
    for path in pictures:
        draw(attention, path)
    print(f"The attention of the first of them: {' and '.join(map(str, pictures))}")
    print(f"\nThe model is in {run.path}; the demo took {time.perf_counter() - started:.0f} seconds. Translate more:")
    print(f"  echo 'I am here.' | {COMMAND} translate {run.path} --checkpoint last --beam 5")


if __name__ == "__main__":
    run_demo(main)
