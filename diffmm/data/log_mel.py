"""Log-mel frames of a clip, and a clip from log-mel frames."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmm.data.waveforms import (
    as_waveform,
    check_audible,
    check_sample_rate,
    resample,
)


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise ImportError(
            'log-mel audio needs librosa: pip install "diffmm[audio]"'
        ) from error
    return librosa


@dataclass(frozen=True, kw_only=True)
class LogMelSettings:
    """How a clip becomes frames of log-mel energies.

    A clip is resampled, silence at both ends is trimmed, and the rest is cut or
    padded with silence at its end to ``num_frames * hop_length`` samples. Energies
    are in decibels below the loudest band of the clip, so codes do not depend on
    the recording level.

    Attributes:
      sample_rate: Hz.
      hop_length: samples per frame (160 at 8 kHz is 20 ms).
      window_length: samples of the Hann window.
      num_frames: frames, hence codes, per clip.
      num_mels: mel bands.
      min_frequency: lower edge of the lowest band, Hz.
      max_frequency: upper edge of the highest band, Hz.
      dynamic_range: energies are floored this many dB below the loudest band.
      trim: silence is what lies this many dB below the peak; None for no trimming.
    """

    sample_rate: int = 8_000
    hop_length: int = 160
    window_length: int = 320
    num_frames: int = 32
    num_mels: int = 20
    min_frequency: float = 80.0
    max_frequency: float = 3_800.0
    dynamic_range: float = 60.0
    trim: float | None = 40.0

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_sample_rate(self.sample_rate)
        for field in ("hop_length", "window_length", "num_frames", "num_mels"):
            value = getattr(self, field)
            if int(value) != value or value < 1:
                raise ValueError(f"{field} must be an integer >= 1, got {value}")
        if self.hop_length > self.window_length:
            raise ValueError(
                f"hop_length must be <= window_length ({self.window_length}), "
                f"got {self.hop_length}"
            )
        low, high, limit = self.min_frequency, self.max_frequency, self.sample_rate / 2
        if not 0 <= low < high <= limit:
            raise ValueError(
                "frequencies must satisfy 0 <= min_frequency < max_frequency <= "
                f"{limit:g}, got {low:g} and {high:g}"
            )
        if not self.dynamic_range > 0:
            raise ValueError(f"dynamic_range must be > 0, got {self.dynamic_range}")
        if self.trim is not None and not self.trim > 0:
            raise ValueError(f"trim must be > 0 dB or None, got {self.trim}")

    @property
    def num_samples(self) -> int:
        """Samples per clip, ``num_frames * hop_length``."""
        return self.num_frames * self.hop_length

    @property
    def fft_length(self) -> int:
        """Samples of the transform: a power of two, at least 1.5 windows."""
        return 1 << int(np.ceil(np.log2(1.5 * self.window_length)))

    def trimmed(self, waveform: Any, sample_rate: int | None = None) -> np.ndarray:
        """The clip at the rate of the settings without silence at its ends.

        Args:
          waveform: ``[T]``, floating point or int16.
          sample_rate: of the waveform, Hz; None means that of the settings.

        Returns:
          float32 ``[n]``, of any length: what exceeds `num_samples` will be cut.

        Raises:
          ValueError: not mono, empty, NaN, or silent.
        """
        clip = as_waveform(waveform)
        check_audible(clip)
        if sample_rate is not None:
            clip = resample(clip, sample_rate, self.sample_rate)
        if self.trim is None:
            return clip
        # Levels of half-hop blocks: fine enough to keep the onset of a word.
        block = max(self.hop_length // 2, 1)
        padded = np.pad(clip, (0, -len(clip) % block)).reshape(-1, block)
        level = np.sqrt((padded.astype(np.float64) ** 2).mean(axis=1))
        loud = np.flatnonzero(level > level.max() * 10 ** (-self.trim / 20))
        return clip[loud[0] * block : (loud[-1] + 1) * block]

    def log_mel(self, waveform: Any, sample_rate: int | None = None) -> np.ndarray:
        """Frames of a clip.

        Args:
          waveform: ``[T]``, floating point or int16.
          sample_rate: of the waveform, Hz; None means that of the settings.

        Returns:
          float32 ``[num_frames, num_mels]``, dB in ``[-dynamic_range, 0]``.

        Raises:
          ValueError: not mono, empty, NaN, or silent.
        """
        clip = self.trimmed(waveform, sample_rate)[: self.num_samples]
        check_audible(clip)
        # Frame k is centred on sample (k + 1/2) hop.
        left = (self.fft_length - self.hop_length) // 2
        right = self.fft_length - self.hop_length - left
        clip = np.pad(clip, (left, right + self.num_samples - len(clip)))
        spectrum = _librosa().stft(
            clip / np.abs(clip).max(),
            n_fft=self.fft_length,
            hop_length=self.hop_length,
            win_length=self.window_length,
            center=False,
        )
        energy = (np.abs(spectrum.T) ** 2) @ _mel_filters(self).T
        decibels = 10 * np.log10(np.maximum(energy, 1e-10 * energy.max()))
        decibels -= decibels.max()
        return np.maximum(decibels, -self.dynamic_range).astype(np.float32)

    def waveform(self, log_mel: np.ndarray, num_iterations: int = 60) -> np.ndarray:
        """A waveform with about these log-mel frames, by the Griffin-Lim iteration.

        Args:
          log_mel: float ``[num_frames, num_mels]``, dB.
          num_iterations: of the phase search.

        Returns:
          float32 ``[num_samples]``, peak amplitude 0.9; deterministic.

        References:
          Griffin, Lim, "Signal estimation from modified short-time Fourier
          transform", IEEE Trans. ASSP 32 (1984); Perraudin, Balazs, Søndergaard,
          "A fast Griffin-Lim algorithm", WASPAA 2013.
        """
        filters = _mel_filters(self)
        # What lies on the floor is silence, not noise 60 dB down.
        audible = log_mel > -self.dynamic_range + 1
        energy = np.where(audible, 10.0 ** (np.asarray(log_mel, float) / 10), 0.0)
        # Spread each band over its bins with the filters as interpolation weights:
        # smooth and non-negative, which a pseudo-inverse is not.
        weights = filters / filters.sum(axis=1, keepdims=True)
        level = energy / filters.sum(axis=1)
        share = weights / np.maximum(weights.sum(axis=0, keepdims=True), 1e-9)
        magnitude = np.sqrt(level @ share)
        wave = _librosa().griffinlim(
            magnitude.T.astype(np.float32),
            n_iter=num_iterations,
            hop_length=self.hop_length,
            win_length=self.window_length,
            n_fft=self.fft_length,
            random_state=0,
        )
        # Frames were centred half a hop later than the inverse transform assumes.
        half = self.hop_length // 2
        wave = np.pad(wave, (half, self.hop_length))[: self.num_samples]
        peak = float(np.abs(wave).max())
        return (wave * (0.9 / peak) if peak > 0 else wave).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _mel_filters(settings: LogMelSettings) -> np.ndarray:
    with warnings.catch_warnings():
        # Empty bands are an error below.
        warnings.filterwarnings("ignore", message="Empty filters", category=UserWarning)
        filters = _librosa().filters.mel(
            sr=settings.sample_rate,
            n_fft=settings.fft_length,
            n_mels=settings.num_mels,
            fmin=settings.min_frequency,
            fmax=settings.max_frequency,
        )
    if not (filters.sum(axis=1) > 0).all():
        raise ValueError(
            f"num_mels={settings.num_mels} is too many for window_length="
            f"{settings.window_length}: some bands hold no frequency bin"
        )
    return filters
