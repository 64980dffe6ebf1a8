"""The policy network: size, initialisation, what it depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies_toy import SMALL, TINY, params_of

from diffmm.policies import PolicyConfig, init
from diffmm.policies import apply as eager_apply

apply = jax.jit(eager_apply, static_argnums=1)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 331_265),
        ({"num_inputs": 50}, 337_537),
        ({"num_blocks": 2}, 628_609),
        ({"width": 32, "mlp_hidden": 64, "time_width": 32}, 17_217),
        ({"num_inputs": 4096, "probabilities": False}, 855_425),
    ],
)
def test_number_of_parameters(changes, count):
    config = PolicyConfig(**changes)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def inputs(rows=3, length=7, seed=0):
    rng = np.random.default_rng(seed)
    masked = jnp.asarray(rng.random((rows, length)) < 0.5)
    confidence = jnp.asarray(rng.random((rows, length)), jnp.float32)
    return masked, confidence, jnp.asarray(rng.random(rows), jnp.float32)


def test_at_the_start_the_output_is_the_bias_plus_a_function_of_confidence():
    params = init(jax.random.key(1), SMALL)
    masked, confidence, time = inputs()
    logits = apply(params, SMALL, masked, confidence, time)
    other = apply(params, SMALL, ~masked, confidence, 1 - time)
    np.testing.assert_array_equal(logits, other)
    moved = apply(params, SMALL, masked, 1 - confidence, time)
    assert np.abs(logits - moved).max() > 1e-3
    # w_o · LN(x) is about N(0, H·Var(w_o)) = N(0, 1/3) over seeds; 48 of them.
    first = jax.vmap(
        lambda key: apply(init(key, SMALL), SMALL, masked, confidence, time)[0, 0]
    )(jax.random.split(jax.random.key(0), 48))
    assert abs(first.mean() + 2) < 4 * 0.58 / 48**0.5
    assert 0.58 / 1.5 < first.std() < 0.58 * 1.5


def test_initial_values_have_their_ranges():
    params = init(jax.random.key(0), PolicyConfig())
    for name in ("time_in", "inputs", "logit"):
        weight = params[name]["weight"]
        bound = weight.shape[0] ** -0.5
        assert 0.7 * bound < np.abs(weight).max() <= bound
    assert np.abs(params["time_in"]["bias"]).max() <= 128**-0.5
    assert float(params["logit"]["bias"][0]) == -2.0
    assert not jax.tree.reduce(
        lambda any_, x: any_ or bool(x.any()), params["block_0"]["adaln"], False
    )
    plain = init(jax.random.key(0), PolicyConfig(smart_init=None))
    assert np.abs(plain["logit"]["bias"]).max() <= 128**-0.5
    assert np.asarray(plain["block_0"]["adaln"]["weight"]).any()


def reference(params, config, masked, confidence, time):
    """The published equations, one position at a time, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    from scipy.special import erf

    def linear(layer, x):
        return x @ layer["weight"] + layer["bias"]

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * layer["scale"] + layer["bias"]

    half = config.time_width // 2
    angle = time * config.time_period ** (-np.arange(half) / half)
    hidden = linear(params["time_in"], np.concatenate([np.cos(angle), np.sin(angle)]))
    tau = linear(params["time_out"], hidden / (1 + np.exp(-hidden)))
    g = params["mask"][masked.astype(int)] + tau
    x = linear(params["inputs"], confidence[:, None])
    size = config.width // config.num_heads
    positions = np.arange(len(masked))

    def rope(x):  # pairs (even, odd) as complex numbers
        pairs = x[..., : size // 2] + 1j * x[..., size // 2 :]
        frequency = 10_000.0 ** (-np.arange(0, size, 2) / size)
        return pairs * np.exp(1j * positions[:, None, None] * frequency)

    for index in range(config.num_blocks):
        block = params[f"block_{index}"]
        g1, b1, a1, g2, b2, a2 = np.split(linear(block["adaln"], g), 6, axis=-1)
        h = norm(block["norm1"], x) * (1 + g1) + b1
        q, k, v = (
            linear(block[name], h).reshape(len(h), -1, size)
            for name in ("query", "key", "value")
        )
        products = np.einsum("qhd,khd->hqk", rope(q), rope(k).conj()).real
        weights = np.exp(products / np.sqrt(size))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(h), -1)
        x = x + (1 + a1) * linear(block["out"], mixed)
        h = linear(block["mlp_in"], norm(block["norm2"], x) * (1 + g2) + b2)
        x = x + (1 + a2) * linear(block["mlp_out"], h * (1 + erf(h / 2**0.5)) / 2)
    return linear(params["logit"], norm(params["final_norm"], x))[:, 0]


@pytest.mark.parametrize("period", [1.0, 10_000.0])
def test_equals_the_published_equations(period):
    config = PolicyConfig(
        width=12, num_heads=3, mlp_hidden=10, num_blocks=2, time_width=6,
        time_period=period,
    )  # fmt: skip
    params = params_of(config)
    masked, confidence, time = inputs()
    logits = apply(params, config, masked, confidence, time[:, None])
    for row in range(len(masked)):
        expected = reference(
            params, config, np.asarray(masked[row]), np.asarray(confidence[row]),
            float(time[row]),
        )  # fmt: skip
        np.testing.assert_allclose(logits[row], expected, atol=2e-5)


def test_any_length_and_filling_that_changes_nothing():
    params = params_of()
    masked, confidence, time = inputs(length=9)
    full = apply(params, TINY, masked, confidence, time)
    assert full.shape == (3, 9)
    short = apply(params, TINY, masked[:, :5], confidence[:, :5], time)
    exists = jnp.broadcast_to(jnp.arange(9)[None] < 5, (3, 9))
    filled = apply(params, TINY, masked, confidence, time, exists=exists)
    np.testing.assert_allclose(filled[:, :5], short, atol=1e-6)
    assert np.abs(full[:, :5] - short).max() > 1e-3  # others do matter


def test_rounded_time_is_a_choice():
    config = dataclasses.replace(TINY, exact_time=False)
    masked, confidence, time = inputs()
    exact = apply(params_of(), TINY, masked, confidence, time)
    rounded = apply(params_of(), config, masked, confidence, time)
    assert 0 < np.abs(exact - rounded).max() < 0.05
    # Zero has no rounding.
    zero = jnp.zeros_like(time)
    np.testing.assert_allclose(
        apply(params_of(), TINY, masked, confidence, zero),
        apply(params_of(), config, masked, confidence, zero),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 3),  # does not divide 128
        ("num_heads", 128),  # heads of odd size
        ("num_inputs", 0),
        ("time_width", 3),
        ("time_period", 0.0),
        ("smart_init", float("nan")),
        ("num_blocks", 0),
    ],
)
def test_refuses_bad_configs(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyConfig(**{field: value})


def test_refuses_bad_inputs():
    masked, confidence, time = inputs()
    params = params_of()
    with pytest.raises(ValueError, match="masked"):
        eager_apply(params, TINY, masked[0], confidence, time)
    with pytest.raises(ValueError, match="confidence"):
        eager_apply(params, TINY, masked, confidence[:, :4], time)
    with pytest.raises(ValueError, match="time"):
        eager_apply(params, TINY, masked, confidence, time[:2])
    with pytest.raises(ValueError, match="exists"):
        eager_apply(params, TINY, masked, confidence, time, exists=masked[:2])
    for bad in (jnp.nan, 1.5, -0.1):
        with pytest.raises(ValueError, match="confidence"):
            eager_apply(params, TINY, masked, confidence.at[0, 0].set(bad), time)
