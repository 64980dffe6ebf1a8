import numpy as np
import pytest

from diffmm.data.codes import digest
from diffmm.data.image_tokenizers import (
    CallableImageTokenizer,
    GreyLevelTokenizer,
    as_unit_image,
)
from diffmm.typing import Tokenizer


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grey_error_is_half_a_step(levels):
    tokenizer = GreyLevelTokenizer(height=5, width=7, levels=levels)
    assert isinstance(tokenizer, Tokenizer)
    image = np.random.default_rng(0).random((5, 7))
    codes = tokenizer.encode(image)
    assert codes.shape == (35,)
    assert codes.dtype == np.int32
    assert codes.max() < tokenizer.vocabulary_size
    back = tokenizer.decode(codes)
    assert back.shape == (5, 7)
    # Half a step, and float32 rounding.
    assert np.abs(back - image).max() <= 0.5 / (levels - 1) + 1e-6
    np.testing.assert_array_equal(tokenizer.encode(back), codes)


def test_grey_raster_order_and_dtypes():
    tokenizer = GreyLevelTokenizer(height=2, width=3, levels=256)
    image = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    expected = [0, 40, 80, 120, 160, 200]
    np.testing.assert_array_equal(tokenizer.encode(image), expected)
    np.testing.assert_array_equal(tokenizer.encode(image[..., None]), expected)
    np.testing.assert_array_equal(tokenizer.encode(image / 255.0), expected)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros((3, 2)), r"shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((2, 3, 3)), "shape"),
        (np.full((2, 3), np.nan), "NaN"),
        (np.full((2, 3), np.inf), "NaN or infinity"),
        (np.full((2, 3), 1.5), r"\[0, 1\], got \[1.5, 1.5\]"),
        (np.full((2, 3), -0.1), r"\[0, 1\]"),
        (np.zeros((2, 3), np.int64), "int64"),
        ("picture", "shape"),
    ],
)
def test_grey_bad_images(image, match):
    with pytest.raises(ValueError, match=match):
        GreyLevelTokenizer(height=2, width=3).encode(image)


@pytest.mark.parametrize("codes", [[0] * 5, [0] * 5 + [17], [0] * 5 + [-1], [[0] * 6]])
def test_grey_bad_codes(codes):
    with pytest.raises(ValueError, match="grey2x3"):
        GreyLevelTokenizer(height=2, width=3).decode(codes)


@pytest.mark.parametrize("bad", [{"levels": 1}, {"height": 0}, {"width": 2.5}])
def test_grey_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        GreyLevelTokenizer(**{"height": 2, "width": 3, **bad})


def test_grey_fingerprint_follows_settings():
    settings = [(2, 3, 17), (3, 2, 17), (2, 3, 16)]
    prints = {
        GreyLevelTokenizer(height=h, width=w, levels=n).fingerprint
        for h, w, n in settings
    }
    assert len(prints) == 3


def _mean_coder(**changes):
    """2 x 2 patches of a 4 x 4 image coded by their mean in 10 steps."""

    def encode(image):
        assert image.dtype == np.float32
        patches = image.reshape(2, 2, 2, 2, 1).mean(axis=(1, 3, 4))
        return np.rint(patches * 9).astype(np.int64)

    def decode(codes):
        return np.kron(codes / 9 * 1.0001, np.ones((2, 2)))[..., None]

    settings = {
        "name": "mean",
        "encode_fn": encode,
        "decode_fn": decode,
        "image_shape": (4, 4, 1),
        "grid": (2, 2),
        "vocabulary_size": 10,
        "fingerprint": digest("mean"),
    }
    return CallableImageTokenizer(**{**settings, **changes})


def test_callable_round_trip():
    tokenizer = _mean_coder()
    assert isinstance(tokenizer, Tokenizer)
    image = np.kron(np.array([[0, 1], [2, 9]]) / 9, np.ones((2, 2)))
    codes = tokenizer.encode(image)
    np.testing.assert_array_equal(codes, [0, 1, 2, 9])
    back = tokenizer.decode(codes)
    assert back.shape == (4, 4, 1)
    assert back.max() <= 1  # clipped
    np.testing.assert_allclose(back[..., 0], image, atol=2e-4)
    as_bytes = np.rint(image * 255).astype(np.uint8)
    np.testing.assert_array_equal(tokenizer.encode(as_bytes), codes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image: np.zeros((3, 2), int),
        lambda image: np.zeros((2, 2)),
        lambda image: np.full((2, 2), 10),
    ],
)
def test_callable_checks_what_encode_returns(wrong):
    with pytest.raises(ValueError, match="mean: "):
        _mean_coder(encode_fn=wrong).encode(np.zeros((4, 4)))


@pytest.mark.parametrize(
    "wrong", [lambda codes: np.zeros((4, 4)), lambda codes: np.full((4, 4, 1), np.nan)]
)
def test_callable_checks_what_decode_returns(wrong):
    with pytest.raises(ValueError, match="decode_fn"):
        _mean_coder(decode_fn=wrong).decode([0, 0, 0, 0])


@pytest.mark.parametrize(
    "bad",
    [
        {"grid": (2, 0)},
        {"image_shape": (4, 4)},
        {"vocabulary_size": 0},
        {"fingerprint": ""},
    ],
)
def test_callable_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        _mean_coder(**bad)


def test_callable_bad_image():
    with pytest.raises(ValueError, match="shape"):
        _mean_coder().encode(np.zeros((4, 5)))
    with pytest.raises(ValueError, match="NaN"):
        _mean_coder().encode(np.full((4, 4, 1), np.nan))


def test_unit_image_of_bytes():
    np.testing.assert_array_equal(as_unit_image(np.array([0, 255], np.uint8)), [0, 1])
