import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmm.optim.rates import (
    BETA_FORMS,
    beta_from_half_life,
    complement,
    half_life,
    scale_beta,
    scale_decay,
)

betas = st.floats(1e-3, 1 - 1e-6)
kappas = st.floats(1e-3, 1e3)


@pytest.mark.parametrize(
    ("beta", "kappa", "exponential", "linear", "harmonic"),
    [
        (0.9, 0.25, 0.9740, 0.975, 0.9730),
        (0.9, 4, 0.6561, 0.6, 0.6923),
        (0.9, 16, 0.1853, None, 0.36),
        (0.95, 8, 0.6634, 0.6, 0.7037),
        (0.95, 16, 0.4401, 0.2, 0.5429),
        (0.99, 16, 0.8515, 0.84, 0.8609),
        (0.99, 32, 0.7250, 0.68, 0.7557),
        (0.999, 32, 0.9685, 0.968, 0.9690),
    ],
)
def test_three_forms(beta, kappa, exponential, linear, harmonic):
    assert scale_beta(beta, kappa) == pytest.approx(exponential, abs=5.1e-5)
    assert scale_beta(beta, kappa, "harmonic") == pytest.approx(harmonic, abs=5.1e-5)
    if linear is None:
        with pytest.raises(ValueError, match=r"b1=0.9.*kappa=16.*exponential"):
            scale_beta(beta, kappa, "linear", name="b1")
    else:
        assert scale_beta(beta, kappa, "linear") == pytest.approx(linear, abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "kappa", "expected"),
    [
        (0.9999, 0.5, 0.99994999875),
        (0.9999, 4, 0.99960006),
        (0.996, 0.25, 0.9989984965),
        (0.99, 6, 0.9414801494),
        (0.992, 24, 0.8246698779),
        (1.0, 7, 1.0),
        (0.0, 7, 0.0),
    ],
)
def test_decay_of_weights(rho, kappa, expected):
    assert scale_decay(rho, kappa) == pytest.approx(expected, abs=1e-10)


ratios = st.floats(1 / 30, 30)


@given(st.floats(0.5, 1 - 1e-6), ratios, ratios, st.sampled_from(BETA_FORMS))
def test_forms_are_semigroups(beta, first, second, form):
    if form == "linear" and max(first, first * second) * (1 - beta) > 0.9:
        return
    twice = scale_beta(scale_beta(beta, first, form), second, form)
    once = scale_beta(beta, first * second, form)
    assert twice == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize("form", BETA_FORMS)
def test_forms_agree_to_first_order(form):
    # (1 − β)/κ → 1 − β₀ as β₀ → 1, with an error of order κ(1 − β₀).
    for small in (1e-3, 1e-4):
        beta = scale_beta(1 - small, 8, form)
        assert (1 - beta) / 8 / small == pytest.approx(1, abs=10 * small)


@given(betas, kappas, kappas)
def test_monotone(beta, first, second):
    low, high = sorted((first, second))
    assert scale_decay(beta, high) <= scale_decay(beta, low)
    assert scale_decay(beta * 0.9, low) <= scale_decay(beta, low)


@pytest.mark.parametrize("form", BETA_FORMS)
def test_fixed_points(form):
    for beta in (0.0, 0.9, 1 / 3, 0.999):
        assert scale_beta(beta, 1, form) == beta
        assert scale_decay(beta, 1.0, form) == beta
    for kappa in (1e-3, 0.5, 8, 1e3):
        assert scale_beta(0.0, kappa, form) == 0.0
        assert scale_decay(1.0, kappa, form) == 1.0


@given(st.floats(0.5, 0.9999), kappas)
def test_inside_the_unit_interval(beta, kappa):
    for form in ("exponential", "harmonic"):
        assert 0 < scale_beta(beta, kappa, form) < 1


def test_bias_correction_curves():
    # 1 − β^t at equal tokens: kept by the exponential form only.
    kept = 1 - 0.95**80
    assert kept == pytest.approx(0.9834846, abs=1e-7)
    linear = {2: 0.9852191, 4: 0.9884708, 8: 0.9939534}
    for kappa, expected in linear.items():
        count = 80 // kappa
        assert 1 - scale_beta(0.95, kappa) ** count == pytest.approx(kept)
        got = 1 - scale_beta(0.95, kappa, "linear") ** count
        assert got == pytest.approx(expected, abs=1e-7)


@given(st.floats(0.01, 0.9999), kappas, st.sampled_from(BETA_FORMS))
def test_complement(beta, kappa, form):
    if form == "linear" and kappa * (1 - beta) > 1:
        return
    expected = 1 - scale_decay(beta, kappa, form)
    assert complement(beta, kappa, form) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_complement_keeps_relative_precision():
    rate = 0.001000500333583534  # −ln 0.999
    for kappa in (1 / 64, 1e-3, 1e-9):
        x = kappa * rate
        expected = x - x**2 / 2 + x**3 / 6
        assert complement(0.999, kappa) == pytest.approx(expected, rel=1e-12)
    # What float32 makes of the subtraction: 1.3 % off at κ = 1e-3.
    stored = np.float32(1) - np.float32(scale_beta(0.999, 1e-3))
    assert abs(stored / 1.0005e-6 - 1) > 0.01
    assert complement(0.0, 3) == 1.0
    assert complement(1.0, 3) == 0.0
    assert complement(0.9) == 1 - 0.9


@pytest.mark.parametrize(
    ("batch", "rho", "expected"),
    [
        (1024, 0.9999, 7097472),
        (4096, 0.99, 282491),
        (1024, 0.992, 88367.5),
        (256, 0.996, 44272.6),
    ],
)
def test_half_life(batch, rho, expected):
    assert half_life(rho, batch) == pytest.approx(expected, rel=2e-6)
    assert beta_from_half_life(half_life(rho, batch), batch) == pytest.approx(
        rho, rel=1e-14
    )


def test_half_life_is_the_invariant():
    for kappa in (0.25, 3, 64):
        got = half_life(scale_decay(0.9999, kappa), 1024 * kappa)
        assert got == pytest.approx(half_life(0.9999, 1024), rel=1e-10)
    assert half_life(0.0, 8) == 0.0
    assert half_life(1.0, 8) == math.inf
    assert beta_from_half_life(math.inf, 8) == 1.0


def test_linear_decay_may_reach_zero_but_not_pass_it():
    # 1 − 10·(1 − 0.9) is 2.2e-16: zero for a decay of weights, no value for Adam.
    assert scale_decay(0.9, 10, "linear") == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match=r"beta=0.9"):
        scale_beta(0.9, 10, "linear")
    with pytest.raises(ValueError, match=r"rho=0.9.*kappa=10.5"):
        scale_decay(0.9, 10.5, "linear")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_beta(1.0, 2, name="b2"), r"b2 must lie in \[0, 1\), got 1.0"),
        (lambda: scale_beta(-0.1, 2), "beta"),
        (lambda: scale_beta(math.nan, 2), "beta must be finite"),
        (lambda: scale_beta(0.9, 0), "kappa must be positive, got 0"),
        (lambda: scale_beta(0.9, math.inf), "kappa must be finite"),
        (lambda: scale_beta(0.9, 2, "power"), "'exponential', 'linear', 'harmonic'"),
        (lambda: scale_beta("x", 2), "beta must be a number"),
        (lambda: scale_decay(1.1, 2), r"rho must lie in \[0, 1\], got 1.1"),
        (lambda: scale_decay(0.9, -1), "kappa"),
        (lambda: half_life(0.9, 0), "batch"),
        (lambda: half_life(-1, 1), "beta"),
        (lambda: beta_from_half_life(0, 1), "half_life"),
        (lambda: beta_from_half_life(-math.inf, 1), "half_life"),
        (lambda: complement(0.9, -2), "kappa"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
