"""Schedules: golden integrals in float64, float32 precision, names, bad input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.diffusion import (
    BernoulliMasking,
    Cosine,
    CosineMDLM,
    Geometric,
    Linear,
    LogLinear,
    Polynomial,
    schedule_by_name,
    softmin_snr_weight,
    validate_schedule,
)
from diffmm.typing import Modality, Schedule

EXACT = [
    Linear(),
    Polynomial(exponent=2),
    Polynomial(exponent=3),
    Cosine(),
    CosineMDLM(),
]
ALL = [*EXACT, Geometric(), LogLinear()]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def expected_loss(m):
    """F(m) = m·(2 + sin 3m), the toy of the golden values."""
    return m * (2 + np.sin(3 * m))


def integrate(function, start=0.0, stop=1.0):
    """∫ function(t) dt in float64."""
    t = start + (stop - start) * (NODES + 1) / 2
    with jax.enable_x64(True):
        values = np.asarray(function(t))
    assert values.dtype == np.float64
    return (stop - start) / 2 * float(WEIGHTS @ values)


def bound(schedule, start=0.0, stop=1.0):
    return integrate(
        lambda t: (
            schedule.weight(t) * expected_loss(np.asarray(schedule.mask_probability(t)))
        ),
        start,
        stop,
    )


@pytest.mark.parametrize("schedule", EXACT, ids=repr)
def test_bound_is_the_same_for_every_schedule(schedule):
    assert bound(schedule) == pytest.approx(2 + (1 - math.cos(3)) / 3, abs=1e-9)
    assert bound(schedule) == pytest.approx(2.66333083, abs=1e-6)


def test_golden_values_of_clipped_and_geometric_schedules():
    assert bound(Geometric(sigma_min=1e-3, sigma_max=20)) == pytest.approx(
        2.66133033, abs=1e-6
    )
    eps = 1e-3
    # Averages over [eps, 1], as BernoulliMasking(t_min=eps) takes them: of MDLM's
    # m = (1 - eps) t with weight 1/t, and of LLaDA's p = (1 - eps) t + eps with 1/p.
    mdlm = bound(LogLinear(eps=eps), start=eps) / (1 - eps)
    assert mdlm == pytest.approx(2.66185058, abs=1e-6)
    llada = bound(Linear(), start=eps) / (1 - eps)
    assert llada == pytest.approx(2.66399333, abs=1e-6)


def test_cosine_with_one_over_m_is_biased_and_with_tan_is_not():
    schedule = Cosine()

    def with_tan(u):
        weight = math.pi / 2 * jnp.tan(math.pi * u / 2)
        np.testing.assert_allclose(weight, schedule.weight(1 - u), rtol=1e-9)
        return weight * expected_loss(np.asarray(schedule.mask_probability(1 - u)))

    def with_one_over_m(t):
        m = np.asarray(schedule.mask_probability(t))
        return expected_loss(m) / m

    assert integrate(with_tan) == pytest.approx(2.66333083, abs=1e-6)
    assert integrate(with_one_over_m) == pytest.approx(2.57430615, abs=1e-6)


def test_golden_values_of_surrogates():
    schedule = Cosine()
    pooled = integrate(
        lambda t: expected_loss(np.asarray(schedule.mask_probability(t)))
    ) / integrate(schedule.mask_probability)
    assert pooled == pytest.approx(2.53259257, abs=1e-6)
    capped = integrate(lambda t: softmin_snr_weight(t, gamma=5.0) * expected_loss(t))
    assert capped == pytest.approx(2.02538426, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "golden"),
    [
        (Linear(), 1, 2.14112),
        (Linear(), 4, 2.64958),
        (Linear(), 16, 2.66580),
        (Linear(), 64, 2.66431),
        (Linear(), 1024, 2.66340),
        (Cosine(), 4, 2.71461),
        (Cosine(), 64, 2.66966),
        (Cosine(), 1024, 2.66374),
    ],
)
def test_golden_values_of_discrete_time(schedule, num_steps, golden):
    with jax.enable_x64(True):
        grid = np.asarray(
            schedule.mask_probability(np.arange(num_steps + 1) / num_steps)
        )
    value = np.sum(np.diff(grid) / grid[1:] * expected_loss(grid[1:]))
    # The table is printed with five digits after the point.
    assert value == pytest.approx(golden, abs=6e-6)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_weight_is_the_log_derivative_and_inverse_inverts(schedule):
    with jax.enable_x64(True):
        t = jnp.linspace(0.01, 0.99, 50)
        log_derivative = jax.vmap(
            jax.grad(lambda t: jnp.log(schedule.mask_probability(t)))
        )(t)
        # Near t = 1 the geometric m'(t)/m(t) is 1e-7 of its parts.
        np.testing.assert_allclose(schedule.weight(t), log_derivative, rtol=1e-8)
        inverse = schedule.inverse(schedule.mask_probability(t))
        # Near m = 1 the geometric schedule rounds 1 - 1e-8 and loses digits of t.
        np.testing.assert_allclose(inverse, t, rtol=1e-6)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_float32_is_precise_at_tiny_times(schedule):
    t = np.float32(1e-6)
    m, weight = schedule.mask_probability(t), schedule.weight(t)
    with jax.enable_x64(True):
        exact_m = float(schedule.mask_probability(np.float64(t)))
        exact_weight = float(schedule.weight(np.float64(t)))
    assert m.dtype == weight.dtype == jnp.float32
    assert float(m) > 0
    assert float(m) == pytest.approx(exact_m, rel=1e-5)
    assert float(weight) == pytest.approx(exact_weight, rel=1e-5)
    if schedule in EXACT:
        assert float(schedule.inverse(m)) == pytest.approx(1e-6, rel=1e-5)


def test_float32_ends_are_clean():
    for schedule in ALL:
        assert 0 <= float(schedule.mask_probability(0.0)) <= 1e-3
        assert 0.999 <= float(schedule.mask_probability(1.0)) <= 1.0
        assert float(schedule.weight(1.0)) >= 0
        assert 0 <= float(schedule.inverse(1.0)) <= 1.01
        assert float(schedule.inverse(0.0)) == 0
    assert float(Cosine().weight(1.0)) == 0.0


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_validation_accepts_the_built_in_schedules(schedule):
    assert isinstance(schedule, Schedule)
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    validate_schedule(schedule)


class _Bad(Linear):
    def __init__(self, function):
        object.__setattr__(self, "function", function)

    def mask_probability(self, t):
        return jnp.asarray(self.function(t))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: 0.01 + 0.99 * t, r"m\(0\) = 0.01"),
        (lambda t: 0.9 * t, r"m\(1\) = 0.9"),
        (lambda t: t - 0.2 * np.sin(2 * np.pi * t) ** 2, "must increase"),
        (lambda t: np.where(t == 0.5, np.nan, t), "must increase"),
    ],
)
def test_validation_refuses(function, message):
    with pytest.raises(ValueError, match=message):
        validate_schedule(_Bad(function))
    with pytest.raises(ValueError, match=message):
        BernoulliMasking(schedules={Modality.IMAGE: _Bad(function)})


def test_validation_refuses_bad_weights_and_missing_methods():
    class Infinite(Linear):
        def weight(self, t):
            return jnp.where(t > 0.9, jnp.inf, 1 / t)

    with pytest.raises(ValueError, match="weight"):
        validate_schedule(Infinite())
    with pytest.raises(ValueError, match="mask_probability"):
        validate_schedule("cosine")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Polynomial(exponent=0), "exponent"),
        (lambda: Polynomial(exponent=math.nan), "exponent"),
        (lambda: Geometric(sigma_min=0.1), "sigma_min"),
        (lambda: Geometric(sigma_max=2.0), "sigma_max"),
        (lambda: LogLinear(eps=0.1), "eps"),
    ],
)
def test_parameters_are_checked(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_schedules_by_name():
    assert schedule_by_name("linear") == Linear()
    for name in ("poly2", "poly:2", "poly(2)"):
        assert schedule_by_name(name) == Polynomial(exponent=2.0)
    assert schedule_by_name("cosine") == Cosine()
    assert schedule_by_name("cosine_mdlm") == CosineMDLM()
    assert schedule_by_name("geometric") == Geometric()
    for name in ("cos", "poly", "poly:2.5.1", ""):
        with pytest.raises(ValueError, match=r"sin\(pi t/2\).*1 - cos\(pi t/2\)"):
            schedule_by_name(name)
