"""Checks and conversions of waveforms, for audio tokenizers and sources."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Peak amplitude under which a clip counts as silent: a quarter of the 16-bit step
# times ten, so that dither and converter noise are silence and quiet speech is not.
SILENCE_PEAK = 1e-4


def as_waveform(waveform: Any, name: str = "waveform") -> np.ndarray:
    """A mono waveform as float32, full scale 1.

    Args:
      waveform: ``[T]``, floating point, or integers of 16 or 32 bits (scaled by
        their full scale).
      name: what to call it in messages.

    Returns:
      float32 ``[T]``.

    Raises:
      ValueError: not one-dimensional, empty, of another type, NaN or infinite.
    """
    array = np.asarray(waveform)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: a waveform must have shape [T] (mono), got {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"{name}: the waveform is empty")
    if array.dtype in (np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name}: a waveform must be floating point, int16 or int32, "
            f"got dtype {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: the waveform contains NaN or infinity")
    return array.astype(np.float32)


def check_audible(waveform: np.ndarray, name: str = "waveform") -> None:
    """Raises ValueError if the peak amplitude is under `SILENCE_PEAK`."""
    peak = float(np.abs(waveform).max())
    if peak < SILENCE_PEAK:
        raise ValueError(
            f"{name}: the waveform is silent (peak {peak:g}, at least "
            f"{SILENCE_PEAK:g} needed)"
        )


def check_sample_rate(value: Any, name: str = "sample_rate") -> int:
    """The sample rate as a positive int, in samples per second."""
    if isinstance(value, bool) or int(value) != value or value <= 0:
        raise ValueError(f"{name} must be a positive integer (in Hz), got {value}")
    return int(value)


def resample(waveform: np.ndarray, sample_rate: int, target_rate: int) -> np.ndarray:
    """Band-limited resampling by a polyphase Kaiser filter.

    Args:
      waveform: float32 ``[T]`` at ``sample_rate``.
      sample_rate: Hz.
      target_rate: Hz.

    Returns:
      float32 ``[ceil(T * target_rate / sample_rate)]``.
    """
    sample_rate = check_sample_rate(sample_rate)
    target_rate = check_sample_rate(target_rate, "target_rate")
    if sample_rate == target_rate:
        return waveform
    from scipy.signal import resample_poly

    divisor = math.gcd(sample_rate, target_rate)
    up, down = target_rate // divisor, sample_rate // divisor
    return resample_poly(waveform, up, down).astype(np.float32)
