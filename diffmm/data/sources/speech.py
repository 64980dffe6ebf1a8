"""Single spoken words by a speech synthesiser: no download, voices apart by split.

The synthesiser is espeak-ng, from the wheel `espeakng_loader`. Every voice speaks
every word in several accents, rates and pitches; the voices of the validation and
test splits do not occur in training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from diffmm.data.codes import digest
from diffmm.data.sources.example import Example, MemorySource, check_split
from diffmm.data.waveforms import check_sample_rate, resample

SPEECH_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
)
SPEECH_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SpeechSettings:
    """What is spoken, by whom, and how.

    The defaults give 1,600 / 320 / 400 clips. Voices were chosen to be intelligible,
    so that no held-out voice is a near copy of a training voice, and so that every
    synthesis gives the same samples: espeak-ng's breathy variants (f2, f3, f5,
    victor) do not repeat themselves from one process to the next.

    Attributes:
      words: the vocabulary.
      train_voices: espeak-ng voice variants of the training split.
      validation_voices: variants of the validation split.
      test_voices: variants of the test split.
      accents: espeak-ng languages; taken in turn.
      rates: words per minute, 80 to 450; taken in turn.
      pitches: 0 to 99; taken in turn.
      styles_per_voice: (accent, rate, pitch) triples in which each voice speaks
        each word.
      sample_rate: of the clips, Hz.
    """

    words: tuple[str, ...] = SPEECH_WORDS
    train_voices: tuple[str, ...] = (
        *("m1", "m2", "m3", "m4", "m5", "f1", "shelby", "ed", "Annie", "Andy"),
        *("Reed", "Denis", "Michael", "rob", "f4", "belinda", "klatt4", "steph"),
        *("david", "Gene"),
    )
    validation_voices: tuple[str, ...] = ("m7", "travis", "Mario", "boris")
    test_voices: tuple[str, ...] = ("linda", "m8", "paul", "announcer", "grandma")
    accents: tuple[str, ...] = (
        *("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc", "en-029"),
    )
    rates: tuple[int, ...] = (150, 165, 180)
    pitches: tuple[int, ...] = (40, 50, 60, 35)
    styles_per_voice: int = 4
    sample_rate: int = 8_000

    def __post_init__(self) -> None:
        """Checks ranges, and that no voice is in two splits."""
        for field in ("words", "train_voices", "accents", "rates", "pitches"):
            if not getattr(self, field):
                raise ValueError(f"{field} must not be empty")
        if not all(word.strip() for word in self.words):
            raise ValueError(f"words must not contain blank text, got {self.words}")
        for field, low, high in (("rates", 80, 450), ("pitches", 0, 99)):
            values = getattr(self, field)
            if not all(low <= value <= high for value in values):
                raise ValueError(f"{field} must lie in [{low}, {high}], got {values}")
        if self.styles_per_voice < 1:
            raise ValueError(
                f"styles_per_voice must be >= 1, got {self.styles_per_voice}"
            )
        check_sample_rate(self.sample_rate)
        voices = (*self.train_voices, *self.validation_voices, *self.test_voices)
        twice = sorted({voice for voice in voices if voices.count(voice) > 1})
        if twice:
            raise ValueError(
                f"a voice may occur once over all splits, got {twice} twice"
            )

    def voices(self, split: str) -> tuple[str, ...]:
        """The voices of a split."""
        check_split(split, SPEECH_SPLITS)
        return tuple(getattr(self, f"{split}_voices"))

    def utterances(self) -> Iterator[tuple[str, str, str, str, int, int]]:
        """Every (split, voice, word, accent, rate, pitch), in order."""
        for split in SPEECH_SPLITS:
            for number, voice in enumerate(self.voices(split)):
                for style in range(self.styles_per_voice):
                    turn = number + style
                    accent = self.accents[turn % len(self.accents)]
                    rate = self.rates[turn % len(self.rates)]
                    pitch = self.pitches[turn % len(self.pitches)]
                    for word in self.words:
                        yield split, voice, word, accent, rate, pitch


def cache_directory() -> Path:
    """``$DIFFMM_CACHE``, else ``$XDG_CACHE_HOME/diffmm``, else ``~/.cache/diffmm``."""
    if own := os.environ.get("DIFFMM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diffmm"


def speech_source(
    split: str = "train",
    *,
    settings: SpeechSettings | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> MemorySource:
    """Spoken words; the clips of all splits are made once and kept on disk.

    Args:
      split: ``"train"``, ``"validation"`` or ``"test"``.
      settings: what is spoken; None for the defaults.
      cache_dir: where the clips are kept; None for `cache_directory()`.

    Returns:
      Examples with ``texts=(word,)``, ``label=word``, ``group=voice`` and ``audio``
      of peak amplitude 0.9 at ``settings.sample_rate``.

    Raises:
      ValueError: unknown split, voice or accent.
      ImportError: the synthesiser is missing.
    """
    settings = settings or SpeechSettings()
    check_split(split, SPEECH_SPLITS)
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "speech_source needs the espeak-ng synthesiser: "
            'pip install "diffmm[examples]"'
        ) from error
    version = metadata.version("espeakng-loader")
    name = digest("diffmm.speech/1", version, sorted(asdict(settings).items()))
    directory = Path(cache_dir) if cache_dir is not None else cache_directory()
    path = directory / f"speech-{name[:16]}.npz"
    utterances = list(settings.utterances())
    clips = _load(path, len(utterances))
    if clips is None:
        data_path = Path(espeakng_loader.get_data_path())
        _check_voices(utterances, data_path)
        clips = _synthesise(
            utterances,
            settings.sample_rate,
            espeakng_loader.get_library_path(),
            str(data_path),
        )
        _save(path, clips)
    return MemorySource(
        f"speech/{split}",
        [
            Example(
                texts=(word,),
                audio=clip.astype(np.float32) / 32768,
                sample_rate=settings.sample_rate,
                label=word,
                group=voice,
            )
            for (where, voice, word, *_), clip in zip(utterances, clips, strict=True)
            if where == split
        ],
    )


def _check_voices(utterances: list[tuple], data_path: Path) -> None:
    # espeak-ng falls back to the plain accent in silence when a variant is unknown.
    known = {file.name for file in (data_path / "voices" / "!v").iterdir()}
    unknown = sorted({voice for _, voice, *_ in utterances} - known)
    if unknown:
        raise ValueError(
            f"voices: espeak-ng has no variant {unknown}; it has {sorted(known)}"
        )


def _synthesise(
    utterances: list[tuple], sample_rate: int, library: str, data_path: str
) -> list[np.ndarray]:
    request = {
        "library": library,
        "data": data_path,
        "utterances": [
            (word, f"{accent}+{voice}", rate, pitch)
            for _, voice, word, accent, rate, pitch in utterances
        ],
    }
    worker = Path(__file__).with_name("_espeak.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "clips.npz"
        # -P keeps this folder, whose modules are named after libraries, off the path.
        done = subprocess.run(
            [sys.executable, "-P", str(worker), str(output)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            message = done.stderr.strip() or f"exit status {done.returncode}"
            if "has no voice" in message:
                raise ValueError(f"accents: {message}")
            raise RuntimeError(f"espeak-ng worker failed: {message}")
        with np.load(output) as made:
            native_rate = int(made["sample_rate"])
            raw = np.split(made["samples"], np.cumsum(made["lengths"])[:-1])
    clips = []
    for clip in raw:
        wave = resample(clip.astype(np.float32) / 32768, native_rate, sample_rate)
        wave *= 0.9 / max(float(np.abs(wave).max()), 1e-9)
        clips.append(np.rint(wave * 32767).astype(np.int16))
    return clips


def _save(path: Path, clips: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.asarray([len(clip) for clip in clips], np.int64)
    # Written aside and renamed, so that a killed run leaves no half-written file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, samples=np.concatenate(clips), lengths=lengths)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path, count: int) -> list[np.ndarray] | None:
    """The clips of a cache file, or None if it is absent or damaged."""
    try:
        with np.load(path) as kept:
            samples, lengths = kept["samples"], kept["lengths"]
    except (
        *(OSError, EOFError, KeyError, TypeError, ValueError),
        zipfile.BadZipFile,
    ):
        return None
    whole = samples.dtype == np.int16 and samples.ndim == 1
    if not whole or lengths.shape != (count,) or lengths.sum() != samples.size:
        return None
    return np.split(samples, np.cumsum(lengths)[:-1])
