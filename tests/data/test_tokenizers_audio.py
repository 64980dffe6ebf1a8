import builtins

import numpy as np
import pytest

from diffmm.data.audio_tokenizers import LogMelUnitTokenizer, MuLawTokenizer
from diffmm.data.log_mel import LogMelSettings
from diffmm.data.waveforms import as_waveform, resample
from diffmm.typing import Tokenizer

RATE = 8_000


def tone(frequency, seconds=0.4, rate=RATE, amplitude=0.5):
    t = np.arange(int(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * t)).astype(np.float32)


@pytest.fixture(scope="module")
def clips():
    """Tones that glide or stand still, with noise: 12 clips."""
    rng = np.random.default_rng(0)
    out = []
    for start in (200, 500, 1100, 2500):
        for slope in (0, 300, 1500):
            t = np.arange(int(0.5 * RATE)) / RATE
            wave = 0.4 * np.sin(2 * np.pi * (start + slope * t) * t)
            out.append((wave + 0.003 * rng.normal(size=t.size)).astype(np.float32))
    return out


@pytest.fixture(scope="module")
def units(clips):
    return LogMelUnitTokenizer.fit(clips, num_units=32)


# Mu-law


def test_mu_law_signal_to_noise_ratio_hardly_depends_on_loudness():
    tokenizer = MuLawTokenizer(sample_rate=RATE)
    assert isinstance(tokenizer, Tokenizer)
    for amplitude in (1.0, 0.3, 0.1):
        wave = tone(440, amplitude=amplitude)
        error = tokenizer.decode(tokenizer.encode(wave)) - wave
        snr = 10 * np.log10((wave**2).mean() / (error**2).mean())
        # Step at amplitude x is 2 ln(256)/255 (x + 1/255), noise step^2 / 12: 38.2 dB
        # at full scale, less where the linear part of the curve begins to count.
        assert 36 < snr < 40, (amplitude, snr)


def test_mu_law_codes_are_a_fixed_point():
    tokenizer = MuLawTokenizer(sample_rate=RATE)
    codes = np.arange(256)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(codes)), codes)
    assert tokenizer.decode([0, 255]).tolist() == [-1.0, 1.0]


def test_mu_law_small_mu_and_int16():
    tokenizer = MuLawTokenizer(mu=3, sample_rate=RATE)
    assert tokenizer.vocabulary_size == 4
    assert set(tokenizer.encode(tone(100)).tolist()) <= {0, 1, 2, 3}
    low = np.array([-32768, 32767], np.int16)
    assert tokenizer.encode(low).tolist() == [0, 3]


def test_mu_law_resamples():
    tokenizer = MuLawTokenizer(sample_rate=RATE)
    wave = tone(440, rate=22_050, amplitude=1.0)
    codes = tokenizer.encode(wave, sample_rate=22_050)
    back = tokenizer.decode(codes)
    expected = tone(440, amplitude=1.0)
    assert abs(len(back) - len(expected)) <= 1
    # Away from the ends, where the filter meets zeros.
    middle = slice(200, len(expected) - 200)
    assert np.abs(back[middle] - expected[middle]).max() < 0.03


@pytest.mark.parametrize(
    ("wave", "match"),
    [
        (np.array([0.0, 1.5]), "peak is 1.5"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.zeros(0), "empty"),
        (np.zeros((2, 3)), "mono"),
        (np.zeros(3, np.uint8), "uint8"),
    ],
)
def test_mu_law_bad_waveforms(wave, match):
    with pytest.raises(ValueError, match=match):
        MuLawTokenizer(sample_rate=RATE).encode(wave)


def test_mu_law_bad_settings():
    with pytest.raises(ValueError, match="mu must"):
        MuLawTokenizer(mu=0, sample_rate=RATE)
    with pytest.raises(ValueError, match="sample_rate"):
        MuLawTokenizer(sample_rate=0)
    assert (
        MuLawTokenizer(sample_rate=8000).fingerprint
        != MuLawTokenizer(sample_rate=8001).fingerprint
    )


# Log-mel frames


def test_frames_find_the_tone():
    settings = LogMelSettings(trim=None)
    edges = []
    for frequency in (150, 600, 1500, 3000):
        frames = settings.log_mel(tone(frequency, seconds=0.64))
        assert frames.shape == (32, 20)
        assert frames.max() == 0
        assert frames.min() >= -60
        loudest = frames[2:-2].argmax(axis=1)
        assert len(set(loudest.tolist())) == 1
        edges.append(int(loudest[0]))
    assert edges == sorted(set(edges))


def test_frames_are_in_their_place():
    # A click in the middle of frame k is loudest in frame k.
    settings = LogMelSettings(trim=None)
    for k in (0, 7, 31):
        wave = np.zeros(settings.num_samples, np.float32)
        wave[k * settings.hop_length + settings.hop_length // 2] = 1
        assert settings.log_mel(wave).mean(axis=1).argmax() == k


def test_frames_do_not_depend_on_level_or_silence(clips):
    settings = LogMelSettings()
    wave = clips[4]
    frames = settings.log_mel(wave)
    np.testing.assert_allclose(settings.log_mel(wave * 0.01), frames, atol=1e-3)
    block = settings.hop_length // 2
    padded = np.pad(wave, (10 * block, 3000))
    np.testing.assert_allclose(settings.log_mel(padded), frames, atol=1e-3)
    as_int = np.rint(wave * 32767).astype(np.int16)
    assert np.abs(settings.log_mel(as_int) - frames).mean() < 0.1


def test_frames_resample():
    settings = LogMelSettings(trim=None)
    frames = settings.log_mel(tone(600, rate=22_050, seconds=0.5), sample_rate=22_050)
    expected = settings.log_mel(tone(600, seconds=0.5))
    loud = expected > -30
    np.testing.assert_allclose(frames[loud], expected[loud], atol=1.0)


def test_long_clips_are_cut_at_the_end():
    settings = LogMelSettings(num_frames=8)
    wave = np.concatenate([tone(400, 0.2), tone(2000, 0.4)])
    frames = settings.log_mel(wave)
    assert frames.shape == (8, 20)
    np.testing.assert_allclose(frames[:6], settings.log_mel(tone(400, 0.2))[:6], atol=3)
    assert settings.trimmed(wave).size > settings.num_samples


@pytest.mark.parametrize(
    ("wave", "match"),
    [
        (np.zeros(4000), "silent"),
        (np.full(4000, 1e-6), "silent"),
        (np.full(4000, np.nan), "NaN"),
        (np.zeros(0), "empty"),
        (np.zeros((2, 4000)), "mono"),
        ("sound.wav", "mono"),
    ],
)
def test_bad_waveforms(units, wave, match):
    with pytest.raises(ValueError, match=match):
        units.encode(wave)


@pytest.mark.parametrize(
    "bad",
    [
        {"sample_rate": 0},
        {"hop_length": 0},
        {"hop_length": 500},
        {"num_frames": 2.5},
        {"max_frequency": 5000.0},
        {"min_frequency": 3900.0},
        {"dynamic_range": 0.0},
        {"trim": -1.0},
    ],
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        LogMelSettings(**bad)


def test_too_many_bands():
    with pytest.raises(ValueError, match="num_mels=300"):
        LogMelSettings(num_mels=300).log_mel(tone(300))


def test_griffin_lim_gives_the_frames_back(clips):
    settings = LogMelSettings()
    errors = []
    for wave in clips[::4]:
        frames = settings.log_mel(wave)
        back = settings.waveform(frames)
        assert back.shape == (settings.num_samples,)
        assert back.dtype == np.float32
        assert np.abs(back).max() == pytest.approx(0.9, abs=1e-5)
        np.testing.assert_array_equal(back, settings.waveform(frames))
        again = LogMelSettings(trim=None).log_mel(back)
        loud = frames > -20
        errors.append(np.abs(again - frames)[loud].mean())
    # Measured 1 to 3 dB: the bands are wider than the tones.
    assert max(errors) < 6, errors


# Units


def test_units_round_trip(units, clips):
    assert isinstance(units, Tokenizer)
    assert units.vocabulary_size == 32
    errors, spread = [], []
    for wave in clips:
        codes = units.encode(wave)
        assert codes.shape == (32,)
        assert codes.dtype == np.int32
        frames = units.settings.log_mel(wave)
        features = units.features(codes)
        errors.append(((features - frames) ** 2).mean())
        spread.append(frames.var())
        # The code of a frame is that of its nearest centroid.
        distance = ((frames[:, None] - units.centroids[None]) ** 2).sum(axis=-1)
        np.testing.assert_array_equal(distance.argmin(axis=1), codes)
    assert np.mean(errors) < 0.1 * np.mean(spread)
    own_rate = units.encode(clips[0], sample_rate=RATE)
    np.testing.assert_array_equal(own_rate, units.encode(clips[0]))


def test_units_decode_keeps_the_tone(units, clips):
    for wave in (clips[0], clips[9]):  # standing tones of 200 and 2,500 Hz
        back = units.decode(units.encode(wave))
        assert back.shape == (5120,)
        peak = [
            np.abs(np.fft.rfft(w[:4000])).argmax() * RATE / 4000 for w in (wave, back)
        ]
        assert abs(peak[1] - peak[0]) < 150


def test_all_silence_decodes_to_silence(clips):
    centroids = np.full((2, 20), -60.0)
    centroids[1] = 0
    tokenizer = LogMelUnitTokenizer(centroids=centroids)
    assert np.abs(tokenizer.decode(np.zeros(32, int))).max() == 0
    assert np.isfinite(tokenizer.decode(np.ones(32, int))).all()


def test_units_save_and_load(units, clips, tmp_path):
    path = tmp_path / "units.bin"
    units.save(path)
    loaded = LogMelUnitTokenizer.load(path)
    assert loaded.fingerprint == units.fingerprint
    assert loaded.settings == units.settings
    np.testing.assert_array_equal(loaded.encode(clips[3]), units.encode(clips[3]))


def test_fit_is_deterministic_and_seeded(units, clips):
    again = LogMelUnitTokenizer.fit(clips, num_units=32)
    assert again.fingerprint == units.fingerprint
    other = LogMelUnitTokenizer.fit(clips, num_units=32, seed=1)
    assert other.fingerprint != units.fingerprint
    louder = LogMelUnitTokenizer(
        centroids=units.centroids, settings=LogMelSettings(dynamic_range=50.0)
    )
    assert louder.fingerprint != units.fingerprint


def test_fit_bad_input(clips):
    with pytest.raises(ValueError, match="num_units=5000"):
        LogMelUnitTokenizer.fit(clips[:1], num_units=5000)
    with pytest.raises(ValueError, match="num_units"):
        LogMelUnitTokenizer.fit(clips, num_units=0)
    with pytest.raises(ValueError, match="empty"):
        LogMelUnitTokenizer.fit([])
    with pytest.raises(ValueError, match="silent"):
        LogMelUnitTokenizer.fit([*clips, np.zeros(3000)])


def test_bad_centroids_and_codes(units):
    with pytest.raises(ValueError, match=r"\[num_units, 20\]"):
        LogMelUnitTokenizer(centroids=np.zeros((4, 19)))
    with pytest.raises(ValueError, match="NaN"):
        LogMelUnitTokenizer(centroids=np.full((4, 20), np.nan))
    with pytest.raises(ValueError, match="exactly 32"):
        units.decode([0] * 31)
    with pytest.raises(ValueError, match="outside"):
        units.features([32] * 32)
    assert not units.centroids.flags.writeable


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_load_bad_file(content, tmp_path):
    path = tmp_path / "units.npz"
    with pytest.raises(ValueError, match="does not exist"):
        LogMelUnitTokenizer.load(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a saved"):
        LogMelUnitTokenizer.load(path)
    with path.open("wb") as file:
        np.savez(file, other=np.zeros(3))
    with pytest.raises(ValueError, match="not a saved"):
        LogMelUnitTokenizer.load(path)


def test_missing_librosa_names_the_extra(monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "librosa":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"diffmm\[audio\]"):
        LogMelSettings().log_mel(tone(300))


# Waveforms


def test_resample_keeps_a_tone():
    wave = tone(500, rate=22_050)
    out = resample(wave, 22_050, 16_000)
    assert out.dtype == np.float32
    assert len(out) == int(np.ceil(len(wave) * 16_000 / 22_050))
    expected = tone(500, rate=16_000)
    n = min(len(out), len(expected)) - 200
    assert np.abs(out[200:n] - expected[200:n]).max() < 5e-3
    assert resample(wave, 22_050, 22_050) is wave
    with pytest.raises(ValueError, match="target_rate"):
        resample(wave, 22_050, 0)
    with pytest.raises(ValueError, match="sample_rate"):
        resample(wave, -1, 8_000)


def test_resample_removes_what_would_alias():
    out = resample(tone(6_000, rate=22_050), 22_050, RATE)
    assert np.abs(out[200:-200]).max() < 5e-3


def test_as_waveform_scales_integers():
    np.testing.assert_allclose(as_waveform(np.array([-(2**31), 0], np.int32)), [-1, 0])
    np.testing.assert_allclose(as_waveform(np.array([16384], np.int16)), [0.5])
