"""Images and videos as sequences of vectors: rows or patches of an image, frames of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_ext.cli.errors import CommandError

__all__ = ["image_size", "image_vectors", "read_image", "video_frames", "video_size"]

Pixels = npt.NDArray[np.float32]


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image.

    Raises:
        CommandError: The file cannot be read.
    """
    height, width, _ = read_image(path, None, False).shape
    return height, width


def read_image(path: Path, size: tuple[int, int] | None, colour: bool) -> Pixels:
    """Read an image.

    Args:
        path: A file that Pillow reads.
        size: Height and width to resize to; None to keep its size.
        colour: Red, green and blue; otherwise brightness.

    Returns:
        Pixels ``[H, W, C]``, 0 to 1.

    Raises:
        CommandError: The file cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if colour else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CommandError(f"{path}: cannot be read as an image: {error}") from None
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1])
    pixels: Pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return pixels if colour else pixels[:, :, None]


def image_vectors(pixels: Pixels, patch: int) -> Pixels:
    """Return the rows of pixels ``[H, W, C]`` from top to bottom, ``[H, W C]``; or its square patches.

    Args:
        pixels: The image.
        patch: Height and width of a patch, which must divide those of the image; patches are in the order of reading,
            ``[H W / patch², patch² C]``. 0: rows.
    """
    H, W, C = pixels.shape
    if not patch:
        return pixels.reshape(H, W * C)
    grid: Pixels = pixels.reshape(H // patch, patch, W // patch, patch, C).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, patch * patch * C)


def video_size(path: Path) -> tuple[int, int]:
    """Return height and width of a video.

    Raises:
        CommandError: The file cannot be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (av.FFmpegError, IndexError, UnicodeEncodeError) as error:
        raise CommandError(f"{path}: cannot be read as a video: {error}") from None


def video_frames(path: Path, size: tuple[int, int], colour: bool) -> Pixels:
    """Return the frames of a video, each as one vector.

    Args:
        path: A file that FFmpeg reads.
        size: Height and width to resize to.
        colour: Red, green and blue; otherwise brightness.

    Returns:
        ``[S, H W C]``, 0 to 1.

    Raises:
        CommandError: The file cannot be read or has no frames.
    """
    import av

    frames = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                scaled = frame.reformat(width=size[1], height=size[0], format="rgb24" if colour else "gray")
                frames.append(scaled.to_ndarray().reshape(-1))
    except (av.FFmpegError, IndexError, UnicodeEncodeError) as error:
        raise CommandError(f"{path}: cannot be read as a video: {error}") from None
    if not frames:
        raise CommandError(f"{path}: expected a video, got no frames")
    pixels: Pixels = np.stack(frames).astype(np.float32) / np.float32(255)
    return pixels
