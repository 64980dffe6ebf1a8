"""Finite scalar quantisation: the grid, the numbering, the gradient, the codec."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmm.data.image_tokenizers import CallableImageTokenizer
from diffmm.models import (
    FSQAutoencoder,
    FSQConfig,
    codes_to_indices,
    indices_to_codes,
    numpy_codec,
    quantize,
    reconstruction_loss,
)
from diffmm.models.fsq import bound

LEVELS = [(2,), (3,), (2, 2, 2), (8, 5, 5, 5), (7, 6, 4, 3), (1000, 999)]
CONFIG = FSQConfig(
    levels=(4, 5, 3),
    image_size=(4, 6),
    channels=3,
    patch_size=2,
    width=16,
    num_layers=1,
    head_dim=8,
)
IMAGES = np.random.default_rng(0).random((5, 4, 6, 3)).astype(np.float32)


def build(config=CONFIG):
    """Parameters drawn by NumPy: nothing to compile."""
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: FSQAutoencoder(config, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(1)

    def draw(leaf):
        if leaf.ndim == 1:
            return jnp.ones(leaf.shape)
        values = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])
        return jnp.asarray(values, jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(draw, shapes))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def codec(model):
    return numpy_codec(model, batch_size=4)


def digits_of(codes, levels):
    half = np.asarray(levels) // 2
    return np.asarray(codes) * half + half


@pytest.mark.parametrize("levels", LEVELS)
def test_quantised_values_are_the_points_of_the_grid(levels):
    z = 3 * jax.random.normal(jax.random.key(0), (4096, len(levels)))
    z = z.at[:2].set(jnp.array([[-1e4], [1e4]]))  # saturates tanh
    digits = digits_of(quantize(z, levels), levels)
    # Codes are exact quotients of integers, up to one rounding of float32.
    np.testing.assert_allclose(digits, np.round(digits), atol=1e-4)
    assert (np.round(digits) >= 0).all()
    assert (np.round(digits) < np.asarray(levels)).all()
    np.testing.assert_array_equal(np.round(digits[0]), 0)
    np.testing.assert_array_equal(np.round(digits[1]), np.asarray(levels) - 1)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_level_of_every_dimension_is_reached(levels):
    z = np.linspace(-12, 12, 200_001, dtype=np.float32)
    for level in levels:
        digits = np.round(digits_of(quantize(z[:, None], (level,)), (level,)))[:, 0]
        # Monotone, but for the last bits of XLA's tanh at the border of two levels.
        assert (digits >= np.maximum.accumulate(digits) - 1).all()
        np.testing.assert_array_equal(np.unique(digits), np.arange(level))


@pytest.mark.parametrize("levels", LEVELS[:-1])
def test_numbering_is_a_bijection_of_all_indices(levels):
    indices = np.arange(math.prod(levels))
    codes = indices_to_codes(indices, levels)
    assert codes.shape == (len(indices), len(levels))
    assert len(np.unique(np.asarray(codes), axis=0)) == len(indices)
    assert np.abs(codes).max() <= 1
    back = codes_to_indices(codes, levels)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, indices)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_numbering_inverts_for_any_levels(data):
    levels = data.draw(st.tuples(*[st.integers(2, 100)] * 4))
    size = math.prod(levels)
    drawn = data.draw(st.lists(st.integers(0, size - 1), min_size=4, max_size=4))
    indices = np.array([[0, size - 1], drawn[:2], drawn[2:]])
    codes = indices_to_codes(indices, levels)
    np.testing.assert_array_equal(codes_to_indices(codes, levels), indices)


def test_first_dimension_is_the_fastest():
    codes = indices_to_codes(np.array([0, 1, 8, 8 * 5, 999]), (8, 5, 5, 5))
    expected = [
        [-1, -1, -1, -1],
        [-0.75, -1, -1, -1],
        [-1, -0.5, -1, -1],
        [-1, -1, -0.5, -1],
        [0.75, 1, 1, 1],
    ]
    np.testing.assert_array_equal(codes, np.array(expected, np.float32))


@pytest.mark.parametrize("levels", LEVELS[:-1])
def test_points_of_the_grid_quantise_to_themselves(levels):
    """A point is recovered from its bounded value."""
    codes = np.asarray(indices_to_codes(np.arange(math.prod(levels)), levels))
    sizes = np.asarray(levels)
    half_range = (sizes - 1) * (1 - 1e-3) / 2
    offset = np.where(sizes % 2, 0, 0.5)
    inside = np.clip((codes * (sizes // 2) + offset) / half_range, -0.9999, 0.9999)
    z = np.arctanh(inside) - np.tan(offset / half_range)
    np.testing.assert_allclose(quantize(z, levels), codes, atol=1e-6)


@pytest.mark.parametrize("levels", [(2, 3), (8, 5, 5, 5)])
def test_gradient_is_that_of_the_bound(levels):
    z = 2 * jax.random.normal(jax.random.key(1), (64, len(levels)))
    weight = jax.random.normal(jax.random.key(2), z.shape)
    half = (np.asarray(levels) // 2)[None].astype(np.float32)
    through = jax.grad(lambda z: jnp.sum(weight * quantize(z, levels)))(z)
    smooth = jax.grad(lambda z: jnp.sum(weight * bound(z, levels) / half))(z)
    np.testing.assert_allclose(through, smooth, rtol=1e-6)
    # By hand: the derivative of tanh.
    sizes = np.asarray(levels)
    half_range = (sizes - 1) * (1 - 1e-3) / 2
    shift = np.tan(np.where(sizes % 2, 0, 0.5) / half_range)
    slope = half_range / half * (1 - np.tanh(np.asarray(z) + shift) ** 2)
    by_hand = np.asarray(weight) * slope
    np.testing.assert_allclose(through, by_hand, rtol=1e-3, atol=1e-6)


def test_bound_is_odd_for_odd_levels_and_near_zero_at_zero():
    z = np.linspace(-3, 3, 31, dtype=np.float32)[:, None]
    np.testing.assert_allclose(bound(z, (5,)), -bound(-z, (5,)), atol=1e-6)
    for level in range(2, 20):
        # tan(x) stands for atanh(x): they differ most for two levels, by 0.05.
        assert abs(bound(np.zeros((1,)), (level,))[0]) < 0.05
        assert quantize(np.zeros((1,)), (level,))[0] == 0


def compiled(model, method):
    graphdef, params = nnx.split(model)
    function = jax.jit(lambda p, x: getattr(nnx.merge(graphdef, p), method)(x))
    return lambda x: function(params, x)


@pytest.fixture(scope="module")
def results(model):
    reconstruction, indices = compiled(model, "__call__")(IMAGES)
    return np.asarray(reconstruction), np.asarray(indices)


def test_shapes_types_and_ranges_of_the_autoencoder(model, results):
    reconstruction, indices = results
    assert reconstruction.shape == IMAGES.shape
    assert reconstruction.dtype == np.float32
    assert indices.shape == (5, 2, 3)
    assert indices.dtype == np.int32
    assert 0 <= indices.min() <= indices.max() < CONFIG.vocabulary_size == 60
    assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
    np.testing.assert_array_equal(compiled(model, "encode")(IMAGES), indices)
    decoded = compiled(model, "decode")(indices)
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-6)


def test_patches_keep_their_place(model):
    """Attention off, a patch of the picture changes its own code and no other."""
    graphdef, params = nnx.split(model)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: x * ("attention" not in jax.tree_util.keystr(path)), params
    )
    silent = nnx.merge(graphdef, silent)
    changed = IMAGES.copy()
    changed[:, 2:4, 4:6] = 1 - changed[:, 2:4, 4:6]
    quantized, render = compiled(silent, "quantized"), compiled(silent, "render")
    codes = np.asarray(quantized(IMAGES))
    moved = np.asarray(quantized(changed)) - codes
    assert np.abs(moved[:, 1, 2]).max() > 0
    moved[:, 1, 2] = 0
    np.testing.assert_array_equal(moved, 0)
    changed = codes.copy()
    changed[:, 1, 2] = -codes[:, 1, 2]
    moved = np.asarray(render(changed)) - np.asarray(render(codes))
    assert np.abs(moved[:, 2:4, 4:6]).max() > 0
    moved[:, 2:4, 4:6] = 0
    np.testing.assert_array_equal(moved, 0)


def test_numpy_codec_agrees_with_the_model_for_any_batch(codec, results):
    reconstruction, indices = results
    for count in (0, 1, 4, 5):
        encoded = codec.encode_fn(IMAGES[:count])
        assert isinstance(encoded, np.ndarray)
        np.testing.assert_array_equal(encoded, indices[:count])
        decoded = codec.decode_fn(encoded)
        assert decoded.shape == (count, 4, 6, 3)
        np.testing.assert_allclose(decoded, reconstruction[:count], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(codec.encode_fn(IMAGES[0]), indices[0])
    np.testing.assert_array_equal(codec.decode_fn(indices), codec.decode_fn(indices))


def test_numpy_codec_is_an_image_tokenizer(codec):
    tokenizer = CallableImageTokenizer(
        name="fsq",
        encode_fn=codec.encode_fn,
        decode_fn=codec.decode_fn,
        image_shape=CONFIG.image_shape,
        grid=CONFIG.grid,
        vocabulary_size=CONFIG.vocabulary_size,
        fingerprint=codec.fingerprint,
    )
    codes = tokenizer.encode((255 * IMAGES[0]).astype(np.uint8))
    assert codes.shape == (6,)
    np.testing.assert_array_equal(
        tokenizer.decode(codes), codec.decode_fn(codes.reshape(2, 3))
    )


def test_fingerprint_follows_parameters_and_configuration(model, codec):
    assert re.fullmatch("[0-9a-f]{64}", codec.fingerprint)
    assert numpy_codec(model, batch_size=7).fingerprint == codec.fingerprint
    graphdef, params = nnx.split(model)
    other = jax.tree.map(lambda x: x, params)
    other["decoder"]["positions"] = jax.tree.map(
        lambda x: x.at[0, 0].add(1e-6), other["decoder"]["positions"]
    )
    assert numpy_codec(nnx.merge(graphdef, other)).fingerprint != codec.fingerprint
    # Same shapes of all parameters, other codes.
    levels = FSQConfig(**{**vars(CONFIG), "levels": [4, 5, 4]})
    assert numpy_codec(build(levels)).fingerprint != codec.fingerprint


def test_a_few_steps_of_training_reduce_the_error(model):
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: reconstruction_loss(IMAGES, nnx.merge(graphdef, p)(IMAGES)[0])
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    state, losses = optimizer.init(params), []
    for index in range(40):
        params, state, loss, grads = step(params, state)
        losses.append(float(loss))
        if index == 0:  # the straight-through gradient reaches the first kernel
            assert np.abs(grads["encoder"]["project_in"][...]).max() > 0
    assert losses[-1] < 0.6 * losses[0]


def test_reconstruction_loss_is_the_mean_square():
    assert reconstruction_loss(IMAGES, IMAGES) == 0
    np.testing.assert_allclose(reconstruction_loss(IMAGES, IMAGES - 0.5), 0.25, 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (8, 1)}, r"levels must lie in \[2, 1000\]"),
        ({"levels": (1001,)}, "levels must lie"),
        ({"levels": ()}, "levels must be a sequence"),
        ({"levels": (2.5,)}, "levels must be a sequence"),
        ({"levels": (1000,) * 4}, "fit int32"),
        ({"image_size": (4, 7)}, "multiple of patch_size"),
        ({"image_size": (4,)}, "image_size"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"width": 20}, "multiple of head_dim"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FSQConfig(**{**vars(CONFIG), **changes})


def with_value(value):
    images = IMAGES.copy()
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_value(np.nan), "NaN"),
        (with_value(1.01), r"\[0, 1\]"),
        (with_value(-0.01), r"\[0, 1\]"),
        (IMAGES[:, :, :4], "shape"),
        (IMAGES[..., 0], "shape"),
        ((255 * IMAGES).astype(np.uint8), "floating point"),
    ],
)
def test_bad_images_are_refused(model, codec, images, message):
    for function in (model, model.encode, codec.encode_fn):
        with pytest.raises(ValueError, match=message):
            function(images)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.full((1, 2, 3), 60), r"\[0, 60\)"),
        (np.full((1, 2, 3), -1), r"\[0, 60\)"),
        (np.zeros((1, 2, 3)), "integers"),
        (np.zeros((1, 3, 2), int), "shape"),
        (np.zeros((6,), int), "shape"),
    ],
)
def test_bad_indices_are_refused(model, codec, indices, message):
    for function in (model.decode, codec.decode_fn):
        with pytest.raises(ValueError, match=message):
            function(indices)


def test_other_bad_arguments_are_refused(model):
    with pytest.raises(ValueError, match="last axis of 2"):
        quantize(np.zeros((3, 3)), (3, 3))
    with pytest.raises(ValueError, match="last axis of 2"):
        codes_to_indices(np.zeros((3, 3)), (3, 3))
    with pytest.raises(ValueError, match="levels"):
        quantize(np.zeros((3, 1)), (1,))
    with pytest.raises(ValueError, match="batch_size"):
        numpy_codec(model, batch_size=0)
