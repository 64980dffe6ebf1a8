import builtins
import os

import numpy as np
import pytest

from diffmm.data.log_mel import LogMelSettings
from diffmm.data.sources import (
    SPEECH_WORDS,
    SpeechSettings,
    cache_directory,
    speech_source,
)

pytest.importorskip("espeakng_loader")

TINY = SpeechSettings(
    words=("yes", "no"),
    train_voices=("m1", "f1"),
    validation_voices=("m3",),
    test_voices=("f4",),
    styles_per_voice=2,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("speech")


@pytest.fixture(scope="module")
def train(cache):
    return speech_source("train", settings=TINY, cache_dir=cache)


def test_default_vocabulary_and_sizes():
    settings = SpeechSettings()
    assert len(SPEECH_WORDS) == len(set(SPEECH_WORDS)) == 20
    splits = [split for split, *_ in settings.utterances()]
    counts = {split: splits.count(split) for split in set(splits)}
    assert counts == {"train": 1600, "validation": 320, "test": 400}
    # Within a split no utterance is made twice.
    assert len(set(settings.utterances())) == len(splits)


def test_clips(train):
    assert len(train) == 2 * 2 * 2
    for example in train:
        assert example.texts == (example.label,)
        assert example.sample_rate == 8_000
        assert example.audio.dtype == np.float32
        assert np.abs(example.audio).max() == pytest.approx(0.9, abs=1e-3)
        seconds = LogMelSettings().trimmed(example.audio).size / 8_000
        assert 0.15 < seconds < 0.8
    assert {e.group for e in train} == {"m1", "f1"}
    assert len({e.audio.tobytes() for e in train}) == len(train)


def test_voices_of_splits_are_apart(train, cache):
    groups = [{e.group for e in train}]
    for split in ("validation", "test"):
        source = speech_source(split, settings=TINY, cache_dir=cache)
        assert len(source) == 4
        groups.append({e.group for e in source})
    assert groups == [{"m1", "f1"}, {"m3"}, {"f4"}]
    assert len(list(cache.iterdir())) == 1  # one file holds all splits


def test_words_differ_more_than_repeats(train):
    # Log-mel distance between two styles of a word and voice is below that to the
    # other word: the audio is speech, not noise.
    settings = LogMelSettings()
    frames = {
        (e.group, e.label, i % 4 // 2): settings.log_mel(e.audio)
        for i, e in enumerate(train)
    }
    for voice in ("m1", "f1"):
        same = np.abs(frames[voice, "yes", 0] - frames[voice, "yes", 1]).mean()
        other = np.abs(frames[voice, "yes", 0] - frames[voice, "no", 0]).mean()
        assert same < other


def test_a_fresh_synthesis_gives_the_same_samples(train, tmp_path):
    again = speech_source("train", settings=TINY, cache_dir=tmp_path)
    for a, b in zip(train, again, strict=True):
        np.testing.assert_array_equal(a.audio, b.audio)


def test_cache_is_used_and_rebuilt_when_damaged(train, cache):
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    speech_source("train", settings=TINY, cache_dir=cache)
    assert path.stat().st_mtime_ns == stamp
    other_file = path.with_suffix(".tmp")
    with other_file.open("wb") as file:
        np.savez(file, samples=np.zeros(3, np.int16), lengths=np.array([3]))
    lying = other_file.read_bytes()
    other_file.unlink()
    for damaged in (whole[: len(whole) // 2], b"", b"junk", lying):
        path.write_bytes(damaged)
        source = speech_source("train", settings=TINY, cache_dir=cache)
        np.testing.assert_array_equal(source[0].audio, train[0].audio)
        assert path.read_bytes() == whole
    assert [p.name for p in cache.iterdir()] == [path.name]  # nothing partial is left


def test_settings_name_the_cache_file(train, cache, tmp_path):
    faster = SpeechSettings(
        words=("yes",),
        train_voices=("m1",),
        validation_voices=(),
        test_voices=(),
        rates=(180,),
        styles_per_voice=1,
        sample_rate=16_000,
    )
    source = speech_source("train", settings=faster, cache_dir=tmp_path)
    assert len(source) == 1
    assert source[0].sample_rate == 16_000
    assert len(speech_source("test", settings=faster, cache_dir=tmp_path)) == 0
    names = {p.name for p in tmp_path.iterdir()} | {p.name for p in cache.iterdir()}
    assert len(names) == 2


def test_unknown_voice_and_accent(tmp_path):
    # espeak-ng itself says nothing about an unknown variant.
    for change, match in (
        ({"train_voices": ("nobody",)}, "no variant .*nobody"),
        ({"accents": ("xx-none",)}, "accents: .*xx-none"),
    ):
        kept = {"words": ("yes",), "validation_voices": (), "test_voices": ()}
        with pytest.raises(ValueError, match=match):
            speech_source(settings=SpeechSettings(**kept, **change), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        {"words": ()},
        {"words": ("yes", " ")},
        {"rates": (20,)},
        {"pitches": (120,)},
        {"styles_per_voice": 0},
        {"sample_rate": 0},
    ],
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        SpeechSettings(**bad)


def test_a_voice_in_two_splits():
    with pytest.raises(ValueError, match=r"\['m1'\] twice"):
        SpeechSettings(train_voices=("m1", "m2"), test_voices=("m1",))


def test_bad_split(cache):
    with pytest.raises(ValueError, match="split must be one of"):
        speech_source("dev", settings=TINY, cache_dir=cache)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFMM_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("DIFFMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "diffmm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if os.name == "posix":
        assert cache_directory() == tmp_path / "home" / ".cache" / "diffmm"


def test_missing_synthesiser_names_the_extra(monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"diffmm\[examples\]"):
        speech_source()
