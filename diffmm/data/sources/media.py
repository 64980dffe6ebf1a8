"""Reading one picture or one recording from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from diffmm.data.sources.example import BadFileError
from diffmm.data.waveforms import as_waveform, check_audible, resample

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
AUDIO_SUFFIXES = frozenset((".flac", ".mp3", ".ogg", ".wav"))


def read_audio(path: Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """A recording as mono.

    Args:
      path: WAV, FLAC, OGG or MP3.
      sample_rate: resample to this, Hz; None keeps the file's.

    Returns:
      float32 ``[T]`` and its sample rate.

    Raises:
      BadFileError: missing, unreadable, empty, silent or NaN.
      ImportError: soundfile is missing.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            'reading audio needs soundfile: pip install "diffmm[audio]"'
        ) from error
    if not path.is_file():
        raise BadFileError(str(path), "no such file")
    try:
        channels, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
        waveform = as_waveform(channels.mean(axis=1), "audio")
        check_audible(waveform, "audio")
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise BadFileError(str(path), str(error)) from None
    if sample_rate is None:
        return waveform, int(rate)
    return resample(waveform, int(rate), sample_rate), sample_rate


def read_image(
    path: Path, size: tuple[int, int] | None = None, greyscale: bool = False
) -> np.ndarray:
    """A picture as 8-bit RGB or grey; transparency becomes white.

    Args:
      path: a file that Pillow reads.
      size: (height, width): scaled until it covers this, then cropped around the
        centre; None keeps the file's.
      greyscale: one channel instead of three.

    Returns:
      uint8 ``[H, W, 3]``, or ``[H, W]`` if greyscale.

    Raises:
      BadFileError: missing, unreadable, or with more than 8 bits per channel.
      ImportError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            'reading images needs Pillow: pip install "diffmm[examples]"'
        ) from error
    if not path.is_file():
        raise BadFileError(str(path), "no such file")
    try:
        with warnings.catch_warnings():
            # A picture large enough for this warning is no training picture.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {opened.mode} has more than 8 bits")
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture).convert("RGB")
        if greyscale:
            picture = picture.convert("L")
        if size is not None:
            picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    except (
        *(OSError, ValueError, SyntaxError, EOFError),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise BadFileError(str(path), f"unreadable image ({error})") from None
    return np.asarray(picture)
