"""The bias rule and the Jacobian bound, as numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm_kernels.sigmoid_attention.api import sigmoid_attention
from diffmm_kernels.sigmoid_attention.theory import (
    jacobian,
    jacobian_bound,
    jacobian_norm,
    row_mass,
)

# n·E[σ(s - log n)] for s ~ N(0, 1), computed independently.
ROW_MASSES = {
    16: 1.346241,
    128: 1.595536,
    1024: 1.641589,
    2048: 1.645134,
    4096: 1.646923,
    16384: 1.648271,
}


def head(n, d, std=1.0, seed=0, scale=1.0):
    """Gaussian tokens and weights of standard deviation ``std/√d``."""
    rng = np.random.default_rng(seed)
    weights = (std / math.sqrt(d) * rng.normal(size=(d, d)) for _ in range(3))
    return (scale * rng.normal(size=(n, d)), *weights)


@pytest.mark.parametrize(("n", "mass"), ROW_MASSES.items())
def test_row_mass(n, mass):
    assert row_mass(n) == pytest.approx(mass, abs=6e-7)


def test_row_mass_of_constant_logits_and_without_bias():
    assert row_mass(7, std=0) == pytest.approx(7 / 8)  # n · 1/(n + 1)
    for std in (0.5, 1, 3):
        assert row_mass(4096, alpha=0, std=std) == pytest.approx(2048)


def test_row_mass_of_random_logits():
    """The row sums of the attention function itself.

    The norm of a query varies by 9 %, hence the mass of its row by 9 % and the mean of
    1024 rows by 0.3 %; the same for the keys; and the mean of e^s over the norms is
    0.4 % above that for N(0, 1).
    """
    n = 1024
    q, k = jax.random.normal(jax.random.key(0), (2, 1, n, 1, 64))
    ones = jnp.ones((1, n, 1, 1))
    mass = sigmoid_attention(q, k, ones, implementation="reference").mean()
    assert float(mass) == pytest.approx(row_mass(n), rel=0.02)


def test_only_alpha_one_has_a_limit():
    lengths = [2**power for power in (8, 12, 16, 20, 24)]
    for alpha in (0.8, 1.0, 1.25):
        masses = np.array([row_mass(n, alpha=alpha) for n in lengths])
        limit = np.exp(0.5) * np.array(lengths, float) ** (1 - alpha)
        error = np.abs(masses / limit - 1)
        assert np.all(np.diff(error) < 0)
        assert error[-1] < 1e-5  # E[e^2s] / E[e^s] · n^-α = 4.5 · 2^-19.2
    assert row_mass(2**24, alpha=0.8) > 25
    assert row_mass(2**24, alpha=1.25) < 0.03
    assert row_mass(2**30, std=1.5) == pytest.approx(math.exp(1.125), rel=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_jacobian_is_the_derivative(activation):
    x, *_ = head(6, 3)
    rng = np.random.default_rng(1)
    w_q, w_k, w_v = (rng.normal(size=(3, size)) for size in (4, 4, 2))
    bias = -0.7

    def attend(x):
        q, k, v = (jnp.asarray(x @ w)[:, None] for w in (w_q, w_k, w_v))
        if activation == "softmax":
            weights = jax.nn.softmax((q[:, 0] @ k[:, 0].T) / 2, axis=-1)
            return (weights @ v[:, 0]).reshape(-1)
        return sigmoid_attention(
            q, k, v, bias=bias, implementation="reference"
        ).reshape(-1)

    with jax.enable_x64(True):
        expected = jax.jacfwd(attend)(jnp.asarray(x)).reshape(12, 18)
    found = jacobian(x, w_q, w_k, w_v, bias=bias, activation=activation)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    norm = jacobian_norm(x, w_q, w_k, w_v, bias=bias, activation=activation)
    assert norm == pytest.approx(np.linalg.svd(expected)[1][0], rel=1e-9)


@pytest.mark.parametrize("std", [1.0, 3.0])
@pytest.mark.parametrize("d", [8, 16])
@pytest.mark.parametrize("n", [1, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_bounds_hold(n, d, std):
    rounding = 1 + 1e-12  # for one token the bounds coincide
    for seed in range(3):
        arguments = head(n, d, std, seed)
        for bias in (0.0, None, 2.5):
            norm = jacobian_norm(*arguments, bias=bias)
            measured = jacobian_bound(*arguments, bias=bias)
            universal = jacobian_bound(*arguments, bias=bias, suprema="universal")
            exponential = jacobian_bound(*arguments, bias=bias, suprema="exponential")
            assert norm <= measured.first * rounding
            assert measured.first <= measured.second * rounding
            assert measured.m1 <= universal.m1
            assert measured.m2 <= universal.m2
            assert measured.m2 <= measured.m1 <= exponential.m1
            for bound in (universal, exponential):
                assert measured.first <= bound.first * rounding
                assert measured.second <= bound.second * rounding
                assert bound.first <= bound.second * rounding


@pytest.mark.parametrize("n", [32, 64, pytest.param(128, marks=pytest.mark.slow)])
def test_the_bias_lowers_the_norm(n):
    for seed in range(3 if n < 64 else 1):
        arguments = head(n, 8, seed=seed)
        assert jacobian_norm(*arguments) < 0.5 * jacobian_norm(*arguments, bias=0.0)
        with_bias, without = (jacobian_bound(*arguments, bias=b) for b in (None, 0.0))
        assert with_bias.first < without.first
        assert with_bias.second < without.second


def test_closed_forms_of_the_bounds():
    n, d = 16, 4
    x, w_q, w_k, w_v = head(n, d, 2.0, 5)
    a = np.linalg.norm(w_q @ w_k.T / math.sqrt(d), 2)
    square = (x**2).sum() / n
    s_max = (x @ w_q @ w_k.T @ x.T / math.sqrt(d)).max()
    value = np.linalg.norm(w_v, 2)
    assert jacobian_bound(x, w_q, w_k, w_v, suprema="universal").second == (
        pytest.approx(value * n * (1 + a * square / 2))
    )
    assert jacobian_bound(x, w_q, w_k, w_v, suprema="exponential").second == (
        pytest.approx(value * math.exp(s_max) * (1 + 2 * a * square))
    )


def test_universal_bound_is_quadratic_in_the_tokens():
    """Slope 2 on log axes, whatever the logits."""
    bounds = [
        jacobian_bound(*head(8, 8, scale=r), suprema="universal").second
        for r in (50.0, 500.0)
    ]
    assert math.log10(bounds[1] / bounds[0]) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_mass(0), "n must be at least 1, got 0"),
        (lambda: row_mass(4, std=5.0), "std must be between 0 and 4"),
        (lambda: jacobian_norm(*head(4, 4)[:3], np.ones((3, 4))), r"w_v \[4, E\]"),
        (lambda: jacobian_norm(np.ones(4), *head(4, 4)[1:]), r"x must be a .*\(4,\)"),
        (
            lambda: jacobian_norm(np.full((4, 4), np.nan), *head(4, 4)[1:]),
            "x must be finite",
        ),
        (lambda: jacobian_norm(*head(4, 4), activation="relu"), "got 'relu'"),
        (lambda: jacobian_bound(*head(4, 4), suprema="mine"), "got 'mine'"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
