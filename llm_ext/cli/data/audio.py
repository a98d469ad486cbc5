"""Log-mel spectrograms of sound files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_ext.cli.errors import CommandError

__all__ = ["log_mel", "sample_rate"]

# Seconds of a window and between windows.
WINDOW, HOP = 0.025, 0.010
# Added to the power before the logarithm: 60 dB below a full-scale tone, so that silence is not minus infinity.
FLOOR = 1e-6


def sample_rate(path: Path) -> int:
    """Return the samples per second of a sound file.

    Raises:
        CommandError: The file cannot be read.
    """
    import soundfile

    try:
        return int(soundfile.info(os.fsencode(path)).samplerate)
    except (soundfile.LibsndfileError, OSError) as error:
        raise _unreadable(path, error) from None


def log_mel(path: Path, rate: int, mels: int) -> npt.NDArray[np.float32]:
    """Return the logarithm of the power in bands of the mel scale, one row every 10 ms.

    Args:
        path: A sound file that libsndfile reads: wav, flac, ogg, mp3. Its channels are averaged, and it is resampled.
        rate: Samples per second to resample to.
        mels: F, number of bands.

    Returns:
        ``[S, F]``.

    Raises:
        CommandError: The file cannot be read or holds no sound.
    """
    import librosa
    import soundfile

    try:
        signal, actual = soundfile.read(os.fsencode(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise _unreadable(path, error) from None
    if not len(signal):
        raise CommandError(f"{path}: expected sound, got a recording of length 0")
    mono = signal.mean(1)
    if actual != rate:
        mono = librosa.resample(mono, orig_sr=actual, target_sr=rate)
    window = round(WINDOW * rate)
    power = librosa.feature.melspectrogram(
        y=mono,
        sr=rate,
        n_fft=1 << (window - 1).bit_length(),
        win_length=window,
        hop_length=round(HOP * rate),
        n_mels=mels,
        pad_mode="constant",
    )
    spectrogram: npt.NDArray[np.float32] = np.log(power.T + FLOOR, dtype=np.float32)
    return spectrogram


def _unreadable(path: Path, error: Any) -> CommandError:
    return CommandError(f"{path}: cannot be read as sound: {error}")
