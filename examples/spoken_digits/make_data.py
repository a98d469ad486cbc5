"""Make manifests of a folder of spoken digits, or recordings of several digits with their texts.

    python examples/spoken_digits/make_data.py manifests RECORDINGS OUT
    python examples/spoken_digits/make_data.py join RECORDINGS OUT --count 4000 --test-count 300

RECORDINGS has files of the Free Spoken Digit Dataset, `DIGIT_SPEAKER_INDEX.wav` or `.flac`; indices 0 to 4 are its test
split.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import soundfile

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Recordings of these indices are for the test.
TEST = 5
# Digits in a joined recording, and seconds of silence between them.
DIGITS, SILENCE = (3, 6), (0.0, 0.15)


def recordings(folder: Path) -> list[tuple[Path, str, str, int]]:
    """Return file, digit, speaker and index of each recording."""
    found = []
    for path in sorted(folder.glob("*_*_*.*")):
        digit, speaker, index = path.stem.split("_")
        found.append((path.resolve(), digit, speaker, int(index)))
    return found


def write_manifests(folder: Path, out: Path) -> None:
    """Write `train.tsv`, `test.tsv` and `all.tsv` with the columns file, label and speaker."""
    out.mkdir(parents=True, exist_ok=True)
    files = recordings(folder)
    for name, chosen in (
        ("train", [file for file in files if file[3] >= TEST]),
        ("test", [file for file in files if file[3] < TEST]),
        ("all", files),
    ):
        lines = [f"{path}\t{digit}\t{speaker}\n" for path, digit, speaker, _ in chosen]
        (out / f"{name}.tsv").write_text("file\tlabel\tspeaker\n" + "".join(lines), encoding="utf-8")


def join(folder: Path, out: Path, counts: dict[str, int], seed: int) -> None:
    """Write recordings of three to six digits of one speaker, and `train.tsv` and `test.tsv` with their words."""
    draw = random.Random(seed)
    files = recordings(folder)
    speakers = sorted({speaker for _, _, speaker, _ in files})
    for part, count in counts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(count):
            speaker = draw.choice(speakers)
            mine = [file for file in files if file[2] == speaker and (file[3] < TEST) == (part == "test")]
            chosen = [draw.choice(mine) for _ in range(draw.randint(*DIGITS))]
            pieces = []
            for path, *_ in chosen:
                signal, rate = soundfile.read(path, dtype="int16")
                pieces += [signal, np.zeros(int(draw.uniform(*SILENCE) * rate), dtype=np.int16)]
            soundfile.write(out / part / f"{number}.wav", np.concatenate(pieces), rate)
            words = " ".join(WORDS[int(digit)] for _, digit, _, _ in chosen)
            lines.append(f"{part}/{number}.wav\t{words}\t{speaker}\n")
        (out / f"{part}.tsv").write_text("file\ttext\tspeaker\n" + "".join(lines), encoding="utf-8")


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("manifests", "join"))
    parser.add_argument("recordings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4000, help="joined recordings for training (default: 4000)")
    parser.add_argument("--test-count", type=int, default=300, help="joined recordings for the test (default: 300)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.what == "manifests":
        write_manifests(options.recordings, options.out)
    else:
        join(options.recordings, options.out, {"train": options.count, "test": options.test_count}, options.seed)


if __name__ == "__main__":
    main()
