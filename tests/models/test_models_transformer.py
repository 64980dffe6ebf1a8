"""The denoiser: sizes, equal numbers on every path, invariance to layout."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm._tree import named_leaves, path_name
from diffmm.models import (
    Denoiser,
    TransformerConfig,
    logical_axes,
    num_parameters,
    predict_fn,
    preset,
    rotary_angles,
    rotate,
    segment_mask,
    softmax_attention,
    training_flops_per_token,
)

CONFIG = TransformerConfig(vocabulary_size=19, width=16, num_layers=3, head_dim=8)


def build(config=CONFIG, **kwargs):
    model = Denoiser(config, rngs=nnx.Rngs(0), **kwargs)
    # Larger logits than at initialisation, so that differences would show.
    model.unembedding[...] = model.unembedding[...] * 16.0
    return model


class Compiled:
    """A model whose forward pass is jitted: eager scans are slow to test."""

    def __init__(self, model):
        self.graphdef, self.params = nnx.split(model)
        self.forward = jax.jit(
            lambda params, *arguments: nnx.merge(self.graphdef, params)(*arguments)
        )

    def __call__(self, *arguments):
        return self.forward(self.params, *arguments)


@pytest.fixture(scope="module")
def model():
    return Compiled(build())


def random_tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocabulary_size)


@pytest.mark.parametrize(
    ("name", "total", "blocks", "flops_at_1024"),
    [
        ("trimodal-320m", 324_951_040, 83_886_080, 1_327_116_288),
        ("trimodal-3b", 2_988_217_344, 2_264_924_160, 16_664_924_160),
    ],
)
def test_parameter_counts_and_flops_of_presets(name, total, blocks, flops_at_1024):
    config = preset(name)
    abstract = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    leaves = named_leaves(nnx.split(abstract)[1])
    assert num_parameters(nnx.split(abstract)[1]) == total
    matrices = sum(
        leaf.size
        for path, leaf in leaves.items()
        if path.startswith("blocks/") and not path.endswith("gain")
    )
    assert matrices == blocks == 10 * config.width**2 * config.num_layers
    assert training_flops_per_token(config, 1024) == flops_at_1024
    assert config.width // config.num_layers == 128  # the constant shape rule


def test_unknown_preset_and_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="trimodal-demo"):
        preset("trimodal-7b")
    for field, value in [("width", 20), ("head_dim", 0), ("compute_dtype", "int8")]:
        with pytest.raises(ValueError, match=field):
            preset("trimodal-tiny", **{field: value})


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": True}])
def test_scan_unrolled_and_rematerialised_give_the_same_numbers(model, change):
    tokens = random_tokens((2, 7))
    params = model.params

    def loss(params, config):
        graphdef, _ = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))
        return jnp.sum(nnx.merge(graphdef, params)(tokens) ** 2)

    changed = dataclasses.replace(CONFIG, **change)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = step(params, CONFIG)
    other_value, other_grads = step(params, changed)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    for name, leaf in named_leaves(grads).items():
        other = named_leaves(other_grads)[name]
        scale = np.abs(leaf).max() + 1e-30
        np.testing.assert_allclose(leaf / scale, other / scale, atol=2e-6, err_msg=name)


def test_attention_equals_float64_definition():
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 6, 2, 4)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]], np.int32)
    expected = np.zeros(query.shape)
    for b, h, i in itertools.product(range(2), range(2), range(6)):
        seen = [j for j in range(6) if segments[b, i] == segments[b, j]]
        scores = [query[b, i, h].astype(float) @ key[b, j, h] / 2.0 for j in seen]
        weights = np.exp(scores - np.max(scores))
        weights /= weights.sum()
        expected[b, i, h] = sum(
            w * value[b, j, h] for w, j in zip(weights, seen, strict=True)
        )
    out = softmax_attention(
        jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), segment_ids=segments
    )
    np.testing.assert_allclose(out, expected, atol=2e-6)
    mask = segment_mask(jnp.asarray(segments))
    assert mask.shape == (2, 1, 6, 6)
    # Nothing real sees padding, and no query is without a key.
    assert not np.any(mask[0, 0, :5, 5])
    assert np.all(mask.any(axis=-1))


def test_rotary_inner_products_depend_on_distance_only():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    products = []
    for shift in (0, 5, 31):
        positions = jnp.asarray([[shift, shift + 3]], jnp.int32)
        cos, sin = rotary_angles(positions, 8, 10_000.0)
        left = rotate(x, (cos[:, :1], sin[:, :1]))
        right = rotate(y, (cos[:, 1:], sin[:, 1:]))
        products.append(float(jnp.sum(left * right)))
    np.testing.assert_allclose(products, products[0], rtol=1e-5)


def test_batch_padding_and_packing_do_not_change_logits(model):
    first, second = random_tokens((1, 5)), random_tokens((1, 4), seed=1)
    alone_first, alone_second = model(first), model(second)
    padding = jnp.zeros((1, 3), jnp.int32)
    packed = jnp.concatenate([first, second, padding], axis=1)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], jnp.int32)
    together = model(packed, positions, segments)
    np.testing.assert_allclose(together[:, :5], alone_first, atol=1e-5)
    np.testing.assert_allclose(together[:, 5:9], alone_second, atol=1e-5)
    assert np.all(np.isfinite(together))
    eight = model(
        jnp.tile(packed, (8, 1)),
        jnp.tile(positions, (8, 1)),
        jnp.tile(segments, (8, 1)),
    )
    np.testing.assert_allclose(eight[3], together[0], atol=1e-5)


def test_attention_is_bidirectional(model):
    tokens = random_tokens((1, 6))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % CONFIG.vocabulary_size)
    assert float(jnp.abs(model(tokens)[0, 0] - model(changed)[0, 0]).max()) > 1e-4


def test_scored_positions_equal_full_logits(model):
    graphdef, params = model.graphdef, model.params
    tokens = random_tokens((2, 6))
    positions = jnp.tile(jnp.arange(6, dtype=jnp.int32)[None], (2, 1))
    segments = jnp.ones((2, 6), jnp.int32)
    scored = jnp.asarray([[5, 0, 0], [2, 3, 4]], jnp.int32)
    out = jax.jit(predict_fn(graphdef))(params, tokens, positions, segments, scored)
    full = model(tokens)
    assert out.dtype == jnp.float32
    for row in range(2):
        np.testing.assert_allclose(out[row], full[row, scored[row]], atol=1e-5)


def test_attention_function_is_an_argument():
    calls = []

    def mean_attention(query, key, value, *, segment_ids=None):
        calls.append(segment_ids is None)
        return jnp.broadcast_to(value.mean(axis=1, keepdims=True), value.shape)

    model = Compiled(build(attention=mean_attention))
    assert np.all(np.isfinite(model(random_tokens((1, 4)))))
    assert calls


def test_bfloat16_compute_keeps_float32_masters_and_logits(model):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params = model.params
    graphdef, _ = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))
    half = nnx.merge(graphdef, params)
    forward = jax.jit(lambda tokens: (half.hidden(tokens), half(tokens)))
    tokens = random_tokens((2, 7))
    hidden, logits = forward(tokens)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    # bfloat16 keeps 8 bits: 3 blocks of sums accumulate a few times 2^-8.
    reference = model(tokens)
    assert float(jnp.abs(logits - reference).max()) < 0.1 * float(
        jnp.abs(reference).max()
    )


def test_learned_positions_tell_places_apart_and_bound_the_length():
    config = dataclasses.replace(CONFIG, num_positions=6)
    positioned = Compiled(build(config))
    same = jnp.zeros((1, 6), jnp.int32)
    logits = positioned(same)
    # Without them a constant row looks the same from every place.
    assert float(jnp.abs(logits[0, 0] - logits[0, 5]).max()) > 1e-2
    with pytest.raises(ValueError, match="num_positions=6"):
        positioned(jnp.zeros((1, 7), jnp.int32))
    with pytest.raises(ValueError, match="num_positions"):
        dataclasses.replace(CONFIG, num_positions=-1)


def test_every_parameter_has_named_axes():
    config = dataclasses.replace(CONFIG, num_positions=6)
    params = Compiled(build(config)).params
    axes = named_leaves_of_axes(logical_axes(params))
    for name, leaf in named_leaves(params).items():
        assert len(axes[name]) == leaf.ndim, name


def named_leaves_of_axes(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    return {path_name(path): leaf for path, leaf in leaves}


def test_initial_loss_is_near_log_vocabulary():
    model = Compiled(Denoiser(CONFIG, rngs=nnx.Rngs(1)))
    tokens = random_tokens((4, 8))
    nll = -jax.nn.log_softmax(model(tokens), axis=-1)
    mean = jnp.take_along_axis(nll, tokens[..., None], axis=-1).mean()
    # Logits have variance 1/width, which raises the mean by about 1/(2·width).
    np.testing.assert_allclose(mean, np.log(19), atol=0.15)


@pytest.mark.parametrize("graph_mode", [True, False])
def test_both_graph_modes_of_nnx_build_the_same_model(model, graph_mode):
    with nnx.set_graph_mode(graph_mode):
        other = Compiled(build())
        tokens = random_tokens((1, 5))
        np.testing.assert_array_equal(other(tokens), model(tokens))
