"""The sigmoid as kernels evaluate it, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffmm_kernels.sigmoid_attention.activation import (
    LOG2_E,
    POLYNOMIAL_4,
    POLYNOMIAL_6,
    polynomial_sigmoid,
    tanh_sigmoid,
)

Z = np.linspace(-30.0, 10.0, 200_001).astype(np.float32)
EXACT = 1.0 / (1.0 + np.exp(-Z.astype(np.float64)))


def evaluate(coefficients):
    z_base2 = jnp.asarray(Z * np.float32(LOG2_E))
    return np.asarray(polynomial_sigmoid(z_base2, coefficients), np.float64)


# Greatest relative error of the fits, and what float32 adds: rounding z·log2(e) at
# |z| = 30 moves p by up to 30 · 2^-24 · 1.5, which is 2.7e-6.
@pytest.mark.parametrize(
    ("coefficients", "error"), [(POLYNOMIAL_4, 3.6e-4), (POLYNOMIAL_6, 1.1e-5)]
)
def test_relative_error_of_the_polynomials(coefficients, error):
    p = evaluate(coefficients)
    assert np.abs(p / EXACT - 1).max() < error + 3e-6
    assert p.max() <= 1.0
    assert np.all(np.diff(p) >= 0)


def test_small_weights_keep_their_relative_accuracy():
    """The constant term is 1, so that p tends to e^z; the tanh form cancels there."""
    small = Z < -8.0
    p = evaluate(POLYNOMIAL_4)
    # 4.1e-6 of the fit (1.2e-2 · e^-8), and rounding as above.
    assert np.abs(p / EXACT - 1)[small].max() < 4.1e-6 + 3e-6
    smaller = (Z > -14.0) & (Z < -11.0)
    cancelled = np.asarray(tanh_sigmoid(jnp.asarray(Z / 2)), np.float64)
    assert np.abs(cancelled / EXACT - 1)[smaller].max() > 1e-3
    np.testing.assert_allclose(cancelled, EXACT, atol=1e-6)
