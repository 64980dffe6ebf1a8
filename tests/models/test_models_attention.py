"""Attention functions: definitions in float64, masks, mass of rows, statistics."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.models import (
    SigmoidAttention,
    SoftmaxAttention,
    TransformerConfig,
    alibi_slopes,
    attention_function,
    attention_statistics,
    softmax_attention,
)


def random_heads(shape=(2, 6, 2, 4), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, *shape)).astype(np.float32)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]], np.int32)


def definition(attention, query, key, value, segments):
    """One output at a time, in float64."""
    rows, length, heads, dim = query.shape
    slopes = alibi_slopes(heads) if attention.alibi else np.zeros(heads)
    sigmoid = isinstance(attention, SigmoidAttention)
    expected = np.zeros(query.shape)
    for b, h, i in itertools.product(range(rows), range(heads), range(length)):
        if sigmoid and segments[b, i] == 0:
            continue
        seen = [
            j
            for j in range(length)
            if segments[b, i] == segments[b, j] and (j <= i or not attention.causal)
        ]
        scores = np.array(
            [
                query[b, i, h].astype(float) @ key[b, j, h] / np.sqrt(dim)
                - slopes[h] * abs(i - j)
                for j in seen
            ]
        )
        if sigmoid:
            weights = 1 / (1 + np.exp(-(scores + attention.constant)))
        else:
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
        expected[b, i, h] = weights @ value[b, seen, h].astype(float)
    return expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_attention_equals_float64_definition(kind, causal, alibi):
    config = TransformerConfig(
        vocabulary_size=2,
        width=8,
        num_layers=1,
        head_dim=4,
        attention=kind,
        length=5,
        causal=causal,
        positions="alibi" if alibi else "rope",
    )
    attention = attention_function(config)
    heads = random_heads()
    out = attention(*map(jnp.asarray, heads), segment_ids=jnp.asarray(SEGMENTS))
    expected = definition(attention, *heads, SEGMENTS)
    # Sums of six products in float32.
    np.testing.assert_allclose(out, expected, atol=2e-6)
    if kind == "sigmoid":
        padding = np.asarray(out)[SEGMENTS == 0]
        np.testing.assert_array_equal(padding, np.zeros_like(padding))


def test_padding_takes_and_gives_no_gradient():
    heads = tuple(map(jnp.asarray, random_heads()))
    attention = SigmoidAttention(length=6)

    def loss(heads):
        return jnp.sum(attention(*heads, segment_ids=jnp.asarray(SEGMENTS)) ** 2)

    for gradient in jax.jit(jax.grad(loss))(heads):
        assert not np.any(np.asarray(gradient)[SEGMENTS == 0])
        assert np.all(np.any(np.asarray(gradient)[SEGMENTS != 0], axis=(1, 2)))


def test_softmax_attention_object_is_the_function():
    heads = tuple(map(jnp.asarray, random_heads()))
    np.testing.assert_array_equal(SoftmaxAttention()(*heads), softmax_attention(*heads))
    assert hash(SoftmaxAttention()) == hash(SoftmaxAttention())
    assert SigmoidAttention(length=8) == SigmoidAttention(length=8)


@pytest.mark.parametrize(
    ("heads", "golden"),
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (
            12,
            [2.0**-i for i in range(1, 9)]
            + [0.70710678, 0.35355339, 0.1767767, 0.08838835],
        ),
        (32, [0.84089642 ** (i + 1) for i in range(32)]),
        (1, [1 / 256]),
    ],
)
def test_alibi_slopes(heads, golden):
    slopes = alibi_slopes(heads)
    assert slopes.dtype == np.float32
    # 0.84089642 is given to eight digits, and the last is its 32nd power.
    np.testing.assert_allclose(slopes, golden, rtol=3e-7)
    if heads == 32:
        assert slopes[-1] == np.float32(1 / 256)


def test_alibi_subtracts_the_whole_distance_also_under_a_causal_mask():
    """A term that is constant in a row is nothing to softmax, but not to sigmoid."""
    length = 5
    value = jnp.ones((1, length, 1, 4))
    zero = jnp.zeros_like(value)
    attention = SigmoidAttention(length=length, causal=True, alibi=True)
    out = attention(zero, zero, value)[0, :, 0, 0]
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    weights = 1 / (1 + length * np.exp(distance / 256.0))  # one head: slope 1/256
    np.testing.assert_allclose(out, (weights * (distance >= 0)).sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "bias"), [(2048, -7.624619), (4096, -8.317766), (8192, -9.010913)]
)
def test_bias_is_minus_the_logarithm_of_the_configured_length(length, bias):
    assert SigmoidAttention(length=length).constant == pytest.approx(bias, abs=5e-7)
    assert SigmoidAttention(length=length, bias=-1.5).constant == -1.5
    # Also for rows of another length.
    zeros = jnp.zeros((1, 3, 1, 2))
    out = SigmoidAttention(length=length)(zeros, zeros, jnp.ones_like(zeros))
    np.testing.assert_allclose(out, 3 / (1 + length), rtol=1e-6)


def normal_moments(n):
    """n·E[σ(s - log n)] and n²·Var, s standard normal; by the trapezoidal rule."""
    s = np.linspace(-12.0, 12.0, 4801)
    density = np.exp(-s * s / 2) / np.sqrt(2 * np.pi) * (s[1] - s[0])
    weight = n / (1 + n * np.exp(-s))
    mean = np.sum(weight * density)
    return mean, np.sum((weight - mean) ** 2 * density)


@pytest.mark.parametrize(
    ("length", "golden"),
    [
        (16, 1.346241),
        (128, 1.595536),
        (1024, 1.641589),
        (2048, 1.645134),
        (4096, 1.646923),
        (16384, 1.648271),
    ],
)
def test_row_mass_of_normal_logits(length, golden):
    mean, variance = normal_moments(length)
    assert mean == pytest.approx(golden, abs=5e-7)
    if length > 2048:
        return
    # The attention function itself: queries whose logits are the first key dimension.
    rows, dim = 4, 4
    keys = np.random.default_rng(length).normal(size=(rows, length, 1, dim))
    query = np.zeros_like(keys)
    query[..., 0] = np.sqrt(dim)
    statistics = jax.jit(
        lambda q, k: attention_statistics(
            SigmoidAttention(length=length), q, k, jnp.ones_like(k)
        )
    )(jnp.asarray(query, jnp.float32), jnp.asarray(keys, jnp.float32))
    # All queries of a row share its keys: a mean over rows·length independent logits.
    error = np.sqrt(variance / (rows * length))
    assert statistics.row_mass[0] == pytest.approx(golden, abs=5 * error)


def test_statistics_of_known_cases():
    n = 12
    query, key, value = map(jnp.asarray, random_heads((2, n, 3, 4)))
    zero = jnp.zeros_like(query)
    cases = {
        "softmax": (softmax_attention, 1.0),
        "rule": (SigmoidAttention(length=n), n / (n + 1)),
        "no bias": (SigmoidAttention(length=n, bias=0.0), n / 2),
    }
    for name, (attention, mass) in cases.items():
        found = attention_statistics(attention, zero, zero, value)
        np.testing.assert_allclose(found.row_mass, mass, rtol=1e-6, err_msg=name)
        mean = np.asarray(value).mean(1, keepdims=True) * mass
        ratio = np.sqrt(n * (mean**2).sum((0, 1, 3)) / (value**2).sum((0, 1, 3)))
        np.testing.assert_allclose(found.ratio, ratio, rtol=1e-5, err_msg=name)
    # Padding is left out: a padded row has the numbers of the row alone.
    segments = jnp.asarray([[1] * 8 + [0] * 4] * 2, jnp.int32)
    attention = SigmoidAttention(length=n)
    padded = attention_statistics(attention, query, key, value, segment_ids=segments)
    alone = attention_statistics(attention, query[:, :8], key[:, :8], value[:, :8])
    for left, right in zip(padded, alone, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)


def largest_array(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [getattr(v.aval, "size", 0) for v in equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


def test_statistics_never_hold_all_weights():
    length = 4096
    heads = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
    attention = SigmoidAttention(length=length, implementation="xla")
    jaxpr = jax.make_jaxpr(
        lambda q, k, v: attention_statistics(attention, q, k, v).row_mass
    )(*heads)
    # One tile of weights at a time; all of them would be length².
    assert largest_array(jaxpr.jaxpr) <= length**2 // 8


def test_the_gradient_of_a_bias_offset_is_the_sum_over_weights():
    heads = tuple(map(jnp.asarray, random_heads()))
    attention = SigmoidAttention(length=6)

    def loss(offset):
        return jnp.sum(attention(*heads, bias_offset=offset) ** 2)

    zero = jnp.zeros(2)
    np.testing.assert_allclose(
        attention(*heads, bias_offset=zero), attention(*heads), rtol=1e-5, atol=1e-7
    )
    per_head = jax.grad(loss)(zero)
    shared = jax.grad(loss)(jnp.zeros(()))
    np.testing.assert_allclose(per_head.sum(), shared, rtol=1e-5)
    step = 1e-2
    for head in range(2):
        unit = zero.at[head].set(step)
        difference = (loss(unit) - loss(-unit)) / (2 * step)
        # Central difference: error step²·loss'''/6, and rounding eps·loss/step.
        np.testing.assert_allclose(per_head[head], difference, rtol=1e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        SigmoidAttention(length=0)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        alibi_slopes(0)
    config = TransformerConfig(vocabulary_size=2, width=8, num_layers=1, head_dim=4)
    for change, match in [
        ({"attention": "sigmoid"}, "length must be given for attention='sigmoid'"),
        ({"attention": "linear"}, "attention must be one of .*'linear'"),
        ({"attention": "sigmoid", "length": 0}, "length must be at least 1"),
        ({"attention_bias": -1.0}, "attention_bias is for attention='sigmoid'"),
        ({"trainable_bias": "head"}, "trainable_bias is for attention='sigmoid'"),
        ({"trainable_bias": "all"}, "trainable_bias must be one of"),
        (
            {"attention": "sigmoid", "length": 4, "attention_bias": float("nan")},
            "attention_bias must be finite",
        ),
        ({"positions": "learned"}, "positions must be one of"),
        ({"norm": None}, "norm must be one of"),
        ({"qk_norm": "l2"}, "qk_norm must be one of"),
        ({"mlp": "relu"}, "mlp must be one of"),
        ({"layer_scale": 0.0}, "layer_scale must be positive"),
        ({"norm_epsilon": -1e-6}, "norm_epsilon must be positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="head_dim must be even"):
        dataclasses.replace(config, width=9, head_dim=3)
    assert dataclasses.replace(config, width=9, head_dim=3, positions="alibi")
