"""Write scikit-learn's handwritten digits as images, and clips in which they move.

    python examples/handwritten_digits/make_data.py images OUT
    python examples/handwritten_digits/make_data.py clips OUT --count 1500

Every fifth digit is for the test. A clip shows a digit that crosses a frame of 24 x 24 pixels in one of four
directions; its label is the direction.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

# Rows and columns per frame.
DIRECTIONS = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
SIZE, FRAMES = 24, 12


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,797 images of 8 x 8 pixels, 0 to 255, and their digits."""
    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target


def part_of(number: int) -> str:
    """Return the part that a digit belongs to."""
    return "test" if number % 5 == 0 else "train"


def write_images(out: Path) -> None:
    """Write a PNG for each digit, and `train.tsv` and `test.tsv` with the columns file and label."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for number, (image, digit) in enumerate(zip(*digits(), strict=True)):
        part = part_of(number)
        (out / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(out / part / f"{number}.png")
        lines[part].append(f"{part}/{number}.png\t{digit}\n")
    _write_manifests(out, lines)


def write_clips(out: Path, count: int, seed: int) -> None:
    """Write a video for each clip, and `train.tsv` and `test.tsv` with the columns file and label."""
    generator = np.random.default_rng(seed)
    images, _ = digits()
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for number in range(count):
        digit, name = int(generator.integers(len(images))), str(generator.choice([*DIRECTIONS]))
        part, step = part_of(digit), np.array(DIRECTIONS[name])
        # The digit stays inside: it starts at a side, or anywhere in the direction in which it does not move.
        most = SIZE - images.shape[1]
        start = generator.integers(most + 1, size=2)
        start = np.where(step > 0, generator.integers(3, size=2), start)
        start = np.where(step < 0, most - generator.integers(3, size=2), start)
        frames = np.zeros((FRAMES, SIZE, SIZE), dtype=np.uint8)
        for time, frame in enumerate(frames):
            row, column = (start + step * time).clip(0, most)
            frame[row : row + 8, column : column + 8] = images[digit]
        (out / part).mkdir(parents=True, exist_ok=True)
        _write_video(out / part / f"{number}.mp4", frames)
        lines[part].append(f"{part}/{number}.mp4\t{name}\n")
    _write_manifests(out, lines)


def _write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


def _write_manifests(out: Path, lines: dict[str, list[str]]) -> None:
    for part, rows in lines.items():
        (out / f"{part}.tsv").write_text("file\tlabel\n" + "".join(rows), encoding="utf-8")


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("images", "clips"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1500, help="clips (default: 1500)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.what == "images":
        write_images(options.out)
    else:
        write_clips(options.out, options.count, options.seed)


if __name__ == "__main__":
    main()
