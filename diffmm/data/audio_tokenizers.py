"""Waveforms to codes: companded samples, and units of log-mel frames."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffmm.data.codes import check_codes, digest
from diffmm.data.log_mel import LogMelSettings
from diffmm.data.waveforms import as_waveform, check_sample_rate, resample


@dataclass(frozen=True, kw_only=True)
class MuLawTokenizer:
    """One code per sample, companded.

    ``f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu)`` for x in [-1, 1], and
    ``code = round((f(x) + 1) mu / 2)``: the error is proportional to the amplitude,
    so that the signal-to-noise ratio hardly depends on loudness (about 38 dB at
    mu = 255).

    Attributes:
      mu: codes lie in [0, mu].
      sample_rate: of the waveforms, Hz.

    References:
      ITU-T Recommendation G.711, "Pulse code modulation of voice frequencies";
      van den Oord et al., "WaveNet: A generative model for raw audio",
      arXiv 1609.03499, section 2.2.

    >>> tokenizer = MuLawTokenizer(sample_rate=8000)
    >>> tokenizer.encode(np.array([-1.0, 1.0])).tolist()
    [0, 255]
    """

    mu: int = 255
    sample_rate: int

    def __post_init__(self) -> None:
        """Checks the settings."""
        if int(self.mu) != self.mu or self.mu < 1:
            raise ValueError(f"mu must be an integer >= 1, got {self.mu}")
        check_sample_rate(self.sample_rate)

    @property
    def name(self) -> str:
        """Short name, for messages."""
        return "mu_law"

    @property
    def vocabulary_size(self) -> int:
        """Codes 0 to mu."""
        return self.mu + 1

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the codes."""
        return digest("diffmm.MuLawTokenizer/1", self.mu, self.sample_rate)

    def encode(self, item: Any, sample_rate: int | None = None) -> np.ndarray:
        """Waveform to codes.

        Args:
          item: ``[T]`` in [-1, 1], or int16.
          sample_rate: of ``item``, Hz; resampled if it differs from the tokenizer's.
            None means the tokenizer's own.

        Returns:
          int32, one code per sample at the tokenizer's rate.

        Raises:
          ValueError: not a mono waveform, NaN, or outside [-1, 1].
        """
        waveform = as_waveform(item, self.name)
        peak = float(np.abs(waveform).max())
        if peak > 1:
            raise ValueError(
                f"{self.name}: the waveform must lie in [-1, 1], its peak is {peak:g}"
            )
        if sample_rate is not None:
            waveform = resample(waveform, sample_rate, self.sample_rate)
            # The filter may overshoot full scale by a little.
            waveform = np.clip(waveform, -1, 1)
        magnitude = np.log1p(self.mu * np.abs(waveform)) / np.log1p(self.mu)
        companded = np.sign(waveform) * magnitude
        return np.rint((companded + 1) * (self.mu / 2)).astype(np.int32)

    def decode(self, codes: Any) -> np.ndarray:
        """Codes to a waveform, float32 ``[n]`` in [-1, 1]."""
        array = check_codes(codes, self.vocabulary_size, self.name)
        companded = array.astype(np.float32) * (2 / self.mu) - 1
        magnitude = np.expm1(np.abs(companded) * np.log1p(self.mu)) / self.mu
        return (np.sign(companded) * magnitude).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogMelUnitTokenizer:
    """One code per frame: the nearest of a set of log-mel centroids.

    ``code_k = argmin_u |log_mel_k - centroid_u|^2``. The centroids come from k-means
    on training clips (`fit`) or from a file (`load`).

    Attributes:
      centroids: float32 ``[num_units, num_mels]``, dB.
      settings: how frames are made.

    References:
      Lakhotia et al., "On generative spoken language modeling from raw audio",
      arXiv 2102.01192: k-means units of log-mel features among others.
    """

    centroids: np.ndarray
    settings: LogMelSettings = field(default_factory=LogMelSettings)

    def __post_init__(self) -> None:
        """Checks the centroids and makes them read-only."""
        centroids = np.array(self.centroids, dtype=np.float32)
        bands = self.settings.num_mels
        if centroids.ndim != 2 or not len(centroids) or centroids.shape[1] != bands:
            raise ValueError(
                f"centroids must have shape [num_units, {bands}], got {centroids.shape}"
            )
        if not np.isfinite(centroids).all():
            raise ValueError("centroids contain NaN or infinity")
        centroids.setflags(write=False)
        object.__setattr__(self, "centroids", centroids)

    @property
    def name(self) -> str:
        """Short name, for messages."""
        return "log_mel_units"

    @property
    def vocabulary_size(self) -> int:
        """Number of units."""
        return len(self.centroids)

    @property
    def num_codes(self) -> int:
        """Codes per clip."""
        return self.settings.num_frames

    @property
    def sample_rate(self) -> int:
        """Rate of decoded waveforms, Hz."""
        return self.settings.sample_rate

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the codes."""
        settings = sorted(asdict(self.settings).items())
        return digest("diffmm.LogMelUnitTokenizer/1", settings, self.centroids)

    @classmethod
    def fit(
        cls,
        waveforms: Iterable[Any],
        *,
        sample_rate: int | None = None,
        num_units: int = 256,
        settings: LogMelSettings | None = None,
        seed: int = 0,
        num_iterations: int = 50,
    ) -> LogMelUnitTokenizer:
        """Clusters the frames of training clips with k-means.

        Args:
          waveforms: clips ``[T]``; every frame is held in memory.
          sample_rate: of the clips, Hz; None means that of the settings.
          num_units: number of clusters.
          settings: how frames are made; None for the defaults.
          seed: of the initial centroids.
          num_iterations: at most this many Lloyd steps.

        Returns:
          The tokenizer; its units are sorted from quiet to loud.

        Raises:
          ValueError: fewer distinct frames than units, or an unusable clip.
          ImportError: scikit-learn or librosa is missing.
        """
        if int(num_units) != num_units or num_units < 1:
            raise ValueError(f"num_units must be an integer >= 1, got {num_units}")
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ImportError(
                'fit needs scikit-learn: pip install "diffmm[examples]"'
            ) from error
        settings = settings or LogMelSettings()
        clips = [settings.log_mel(waveform, sample_rate) for waveform in waveforms]
        if not clips:
            raise ValueError("waveforms is empty")
        frames = np.concatenate(clips)
        distinct = len(np.unique(frames, axis=0))
        if distinct < num_units:
            raise ValueError(
                f"num_units={num_units} needs as many distinct frames; the "
                f"{len(clips)} clips have {distinct}"
            )
        means = KMeans(
            num_units, n_init=1, max_iter=num_iterations, random_state=seed
        ).fit(frames)
        centroids = means.cluster_centers_.astype(np.float32)
        order = np.argsort(centroids.mean(axis=1), kind="stable")
        return cls(centroids=centroids[order], settings=settings)

    def encode(self, item: Any, sample_rate: int | None = None) -> np.ndarray:
        """Waveform to codes.

        Args:
          item: ``[T]``, floating point or int16.
          sample_rate: of ``item``, Hz; resampled if it differs from the tokenizer's.
            None means the tokenizer's own.

        Returns:
          int32 ``[num_frames]``.

        Raises:
          ValueError: not mono, empty, NaN, or silent.
        """
        frames = self.settings.log_mel(item, sample_rate)
        # |f - c|^2 up to |f|^2, which does not change the arg-min.
        distance = (self.centroids**2).sum(axis=1) - 2 * frames @ self.centroids.T
        return distance.argmin(axis=1).astype(np.int32)

    def features(self, codes: Any) -> np.ndarray:
        """De-quantised log-mel frames, for judges.

        Args:
          codes: integers ``[num_frames]``.

        Returns:
          float32 ``[num_frames, num_mels]``, dB.
        """
        array = check_codes(codes, self.vocabulary_size, self.name, self.num_codes)
        return self.centroids[array]

    def decode(self, codes: Any) -> np.ndarray:
        """Codes to a waveform by the Griffin-Lim iteration.

        Args:
          codes: integers ``[num_frames]``.

        Returns:
          float32 ``[num_frames * hop_length]``, peak amplitude 0.9 (0 if every unit
          is silence).
        """
        return self.settings.waveform(self.features(codes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes centroids and settings as npz.

        Args:
          path: of the file; the name is kept as it is.
        """
        settings = json.dumps(asdict(self.settings))
        with Path(path).open("wb") as file:
            np.savez(file, centroids=self.centroids, settings=np.array(settings))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LogMelUnitTokenizer:
        """Reads what `save` wrote.

        Raises:
          ValueError: no such file, or not a saved tokenizer.
        """
        try:
            with np.load(path) as kept:
                settings = LogMelSettings(**json.loads(str(kept["settings"])))
                return cls(centroids=kept["centroids"], settings=settings)
        except FileNotFoundError:
            raise ValueError(f"path: {str(path)!r} does not exist") from None
        except (
            *(OSError, EOFError, KeyError, TypeError, ValueError),
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"path: {str(path)!r} is not a saved LogMelUnitTokenizer ({error})"
            ) from None
