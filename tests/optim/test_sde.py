import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from sde_toys import adamw_paths

from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.rates import BETA_FORMS, half_life
from diffmm.optim.sde import (
    TRIMODAL_HORIZON,
    Budget,
    critical_batch,
    fit_horizon,
    kappa,
    logical_batch,
    reparameterise,
    scale_by_kappa,
)

replace = dataclasses.replace
BASE = Budget(batch=256, tokens=13e9)
HYPER = AdamW(
    learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, ema=0.9999
)
ratios = st.floats(1e-3, 1e3)

# B, D, then kappa, lr, b1, b2, eps, wd, ema, logical batch, clip factor; γ = 0.44.
GOLDEN = [
    (256, 13e9, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.9999, 256, 1),
    (1024, 13e9, 4, 2e-3, 0.6561, 0.81450625, 5e-9, 0.2, 0.99960006, 256, 0.5),
    (
        64,
        13e9,
        0.25,
        5e-4,
        0.9740037464,
        0.9872585449,
        2e-8,
        0.05,
        0.9999749991,
        256,
        2,
    ),
    (
        *(4096, 13e9, 16, 4e-3, 0.1853020189, 0.4401266687),
        *(2.5e-9, 0.4, 0.9984011994, 256, 0.25),
    ),
    (
        *(256, 130e9, 0.3630780548, 6.025595861e-4, 0.9624683552, 0.9815488757),
        *(1.659586907e-8, 0.06025595861, 0.999963691, 705.0825481, 1),
    ),
    (
        *(256, 6.4e12, 0.06537562992, 2.556865853e-4, 0.9931356579, 0.9966522847),
        *(3.91103819e-8, 0.02556865853, 0.9999934621, 3915.83225, 1),
    ),
    (
        *(8192, 6.4e12, 2.092020157, 1.446381747e-3, 0.8021847608, 0.898250222),
        *(6.913804065e-9, 0.1446381747, 0.9997908094, 3915.83225, 0.1767766953),
    ),
]


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_table(row):
    batch, tokens, factor, lr, b1, b2, eps, decay, ema, logical, clip = row
    target = Budget(batch=batch, tokens=tokens)
    new = reparameterise(
        replace(HYPER, clip=1.0), BASE, target, horizon=TRIMODAL_HORIZON, clip="batch"
    )
    got = (
        kappa(BASE, target, TRIMODAL_HORIZON),
        *(new.learning_rate, new.b1, new.b2, new.eps, new.weight_decay, new.ema),
        *(logical_batch(BASE, tokens, TRIMODAL_HORIZON), new.clip),
    )
    expected = (factor, lr, b1, b2, eps, decay, ema, logical, clip)
    # Ten printed digits.
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_other_horizons():
    target = Budget(batch=8192, tokens=6.4e12)
    assert kappa(BASE, target, 0) == 32
    assert kappa(BASE, target, 1) == pytest.approx(0.065)
    assert logical_batch(BASE, 6.4e12, 1) == pytest.approx(126030.77, abs=5e-3)
    assert kappa(BASE, target) == kappa(BASE, target, 1)  # the default
    factor = logical_batch(BASE, 6.4e12, 0.44) / BASE.batch
    assert 1 / factor == pytest.approx(0.0653756299, rel=1e-9)


def test_identity_is_the_object_itself():
    hyper = replace(HYPER, eps_root=1 / 3, clip=0.7)
    for clip in ("keep", "batch"):
        for form in BETA_FORMS:
            options = {"clip": clip, "beta_form": form, "exact_decay": True}
            assert reparameterise(hyper, BASE, BASE, horizon=0.44, **options) is hyper
    # Equal growth of batch and duration changes nothing at γ = 1.
    for m in (3, 0.7, 1000 / 256):
        target = Budget(batch=256 * m, tokens=13e9 * m)
        assert reparameterise(hyper, BASE, target) is hyper


@given(ratios, ratios, st.floats(0, 2))
def test_physical_over_logical_batch(m_b, m_d, horizon):
    target = Budget(batch=BASE.batch * m_b, tokens=BASE.tokens * m_d)
    got = target.batch / kappa(BASE, target, horizon)
    expected = logical_batch(BASE, target.tokens, horizon)
    assert got == pytest.approx(expected, rel=1e-12)


@given(
    st.floats(1 / 20, 20),
    st.floats(1 / 20, 20),
    st.sampled_from(["exponential", "harmonic"]),
    st.booleans(),
    st.sampled_from(["coupled", "independent"]),
)
def test_group_law(first, second, form, exact, decay):
    hyper = replace(HYPER, weight_decay=1e-3, eps_root=1e-9, decay=decay)
    options = {"beta_form": form, "exact_decay": exact}
    twice = scale_by_kappa(scale_by_kappa(hyper, first, **options), second, **options)
    once = scale_by_kappa(hyper, first * second, **options)
    np.testing.assert_allclose(_numbers(twice), _numbers(once), rtol=1e-12)


def test_group_law_over_three_budgets():
    a, b, c = BASE, Budget(batch=64, tokens=1e9), Budget(batch=4096, tokens=7e11)
    through = reparameterise(
        reparameterise(HYPER, a, b, horizon=0.44), b, c, horizon=0.44
    )
    at_once = reparameterise(HYPER, a, c, horizon=0.44)
    np.testing.assert_allclose(_numbers(through), _numbers(at_once), rtol=1e-12)


def _numbers(hyper):
    values = dataclasses.asdict(hyper)
    del values["decay"]
    return [value for value in values.values() if value is not None]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_invariants_of_the_batch(exact, decay):
    hyper = replace(HYPER, eps_root=1e-9, decay=decay, weight_decay=0.01)

    def invariants(batch):
        target = Budget(batch=batch, tokens=2e11)
        new = reparameterise(hyper, BASE, target, horizon=0.44, exact_decay=exact)
        shrink = -math.log1p(-new.shrink) if exact else new.shrink
        return (
            new.learning_rate**2 * target.steps,
            shrink * target.steps,
            target.steps * math.log(new.b1),
            half_life(new.b2, batch),
            half_life(new.ema, batch),
            new.learning_rate * new.eps,
            new.eps**2 / target.steps,
            new.eps_root / target.steps,
        )

    reference = invariants(256)
    for batch in (16, 255, 1024, 30_000):
        # A ρ within 1e-5 of 1 keeps its half-life to 1e-16 / 1e-5.
        np.testing.assert_allclose(invariants(batch), reference, rtol=1e-10)
        np.testing.assert_allclose(
            np.delete(invariants(batch), 4), np.delete(reference, 4), rtol=1e-12
        )


@pytest.mark.parametrize("horizon", [0.0, 0.44, 1.0, 1.3])
def test_duration(horizon):
    for m_d in (0.1, 10, 500):
        target = Budget(batch=256, tokens=13e9 * m_d)
        new = reparameterise(HYPER, BASE, target, horizon=horizon)
        scale = m_d ** (1 - horizon)
        steps = target.steps / BASE.steps
        np.testing.assert_allclose(
            (
                steps * new.learning_rate**2 / HYPER.learning_rate**2,
                steps * new.shrink / HYPER.shrink,
                steps * math.log(new.b1) / math.log(HYPER.b1),
                half_life(new.b2, 1) / half_life(HYPER.b2, 1) * scale / m_d,
            ),
            (scale, scale, scale, 1),
            rtol=1e-12,
        )
    decade = reparameterise(HYPER, BASE, Budget(batch=256, tokens=13e10), horizon=0.44)
    assert decade.learning_rate / 1e-3 == pytest.approx(0.6026, abs=1e-4)


@given(ratios)
def test_safe_at_every_kappa(factor):
    hyper = AdamW(learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.1, ema=0.9999)
    new = scale_by_kappa(hyper, factor, exact_decay=True)
    assert 0 < new.b1 < 1
    assert 0 < new.b2 < 1
    assert 0 < new.ema < 1
    assert new.eps > 0
    assert new.weight_decay > 0
    assert scale_by_kappa(replace(hyper, b1=0.0), factor).b1 == 0.0


def test_exact_decay():
    hyper = AdamW(learning_rate=3e-3, weight_decay=0.1)
    for factor, expected in ((4, 0.99955), (16, 0.99775), (64, 0.99061)):
        exact = scale_by_kappa(hyper, factor, exact_decay=True)
        assert 1 - exact.shrink == pytest.approx((1 - 3e-4) ** factor, rel=1e-14)
        ratio = exact.weight_decay / scale_by_kappa(hyper, factor).weight_decay
        assert ratio == pytest.approx(expected, abs=5e-6)
    independent = replace(hyper, decay="independent", weight_decay=3e-4)
    assert scale_by_kappa(independent, 4).weight_decay == pytest.approx(12e-4)
    got = scale_by_kappa(independent, 4, exact_decay=True).weight_decay
    assert got == pytest.approx(1 - (1 - 3e-4) ** 4, rel=1e-12)


def test_clip():
    hyper = replace(HYPER, clip=2.0)
    target = Budget(batch=1024, tokens=9e11)
    assert reparameterise(hyper, BASE, target).clip == 2.0
    assert reparameterise(hyper, BASE, target, clip="batch").clip == 1.0
    longer = replace(target, tokens=9e13)
    assert reparameterise(hyper, BASE, longer, clip="batch").clip == 1.0
    assert reparameterise(HYPER, BASE, target, clip="batch").clip is None


def test_zero_learning_rate_and_zero_decay():
    frozen = AdamW(learning_rate=0.0, weight_decay=0.1)
    assert scale_by_kappa(frozen, 4, exact_decay=True).learning_rate == 0.0
    assert scale_by_kappa(replace(HYPER, weight_decay=0.0), 4).weight_decay == 0.0


# One linear mode with a frozen preconditioner, whose moments are exact. ------------

SIGMA, EPS, PEAK, SAMPLES = 3.0, 0.5, 0.01, 512
FIRST_ORDER = {
    "exponential": math.exp(-1 / 40),
    "linear": 1 - 1 / 40,
    "harmonic": 1 / (1 + 1 / 40),
}


def _linear_base(form):
    decay = -math.expm1(-1 / 1000) / PEAK
    return AdamW(learning_rate=PEAK, b1=FIRST_ORDER[form], eps=EPS, weight_decay=decay)


def _moments(hyper, batch):
    """Mean and variance of θ after all samples."""
    noise = SIGMA / math.sqrt(batch)
    rate = hyper.learning_rate / (noise + hyper.eps)
    keep = hyper.b1
    step = np.array(
        [[1 - hyper.shrink - rate * (1 - keep), -rate * keep], [1 - keep, keep]]
    )
    kick = (1 - keep) * noise * np.array([-rate, 1.0])
    mean, covariance = np.array([1.0, 0.0]), np.zeros((2, 2))
    for _ in range(round(SAMPLES / batch)):
        mean = step @ mean
        covariance = step @ covariance @ step.T + np.outer(kick, kick)
    return mean[0], covariance[0, 0]


def _limit():
    """The same of the stochastic differential equation."""
    drift = np.array([[-1 / 1000, -PEAK / (SIGMA + EPS)], [1 / 40, -1 / 40]])
    noise = np.array([0, SIGMA / 40])
    mean = scipy.linalg.expm(drift * SAMPLES)[0, 0]
    blocks = np.block([[-drift, np.outer(noise, noise)], [np.zeros((2, 2)), drift.T]])
    flow = scipy.linalg.expm(blocks * SAMPLES)
    return mean, (flow[2:, 2:].T @ flow[:2, 2:])[0, 0]


def test_limit_of_the_linear_mode():
    assert _limit() == pytest.approx((0.1214266682, 0.0089780910), rel=1e-7)


@pytest.mark.parametrize(
    ("form", "mean_errors", "variance_error_ends"),
    [
        (
            "exponential",
            (8.1e-5, 1.6e-4, 3.3e-4, 6.5e-4, 1.3e-3, 2.6e-3, 5.4e-3, 1.1e-2),
            (1.9e-4, 4.7e-2),
        ),
        (
            "linear",
            (2.1e-5, 4.3e-5, 8.5e-5, 1.7e-4, 3.3e-4, 6.6e-4, 1.3e-3, 2.4e-3),
            (3.1e-4, 8.5e-2),
        ),
        (
            "harmonic",
            (1.4e-4, 2.8e-4, 5.6e-4, 1.1e-3, 2.3e-3, 4.5e-3, 9.1e-3, 1.9e-2),
            (6.7e-5, 2.7e-2),
        ),
    ],
)
def test_weak_error_is_of_first_order(form, mean_errors, variance_error_ends):
    mean, variance = _limit()
    batches = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    base = _linear_base(form)
    moments = [
        _moments(scale_by_kappa(base, b, beta_form=form, exact_decay=True), b)
        for b in batches
    ]
    errors = np.array([(abs(m - mean), abs(v / variance - 1)) for m, v in moments])
    # Two printed digits.
    np.testing.assert_allclose(errors[:, 0], mean_errors, rtol=0.05)
    np.testing.assert_allclose(errors[[0, -1], 1], variance_error_ends, rtol=0.05)
    slopes = np.polyfit(np.log(batches), np.log(errors), 1)[0]
    assert np.all((slopes > 0.85) & (slopes < 1.3))
    if form == "exponential":
        assert np.all(errors[-1] < 0.06)


def test_wrong_rules_miss_the_limit():
    limit = _limit()
    base = _linear_base("exponential")
    right = scale_by_kappa(base, 16, exact_decay=True)
    linear_rate = replace(
        right, learning_rate=16 * PEAK, weight_decay=right.shrink / (16 * PEAK)
    )
    same_rate = replace(right, learning_rate=PEAK, weight_decay=right.shrink / PEAK)
    rows = [
        (right, 0.1160, 1.018),
        (linear_rate, 0.0012, 5.21),
        (same_rate, 0.414, 0.117),
        (replace(right, eps=EPS), 0.200, 0.620),
        (replace(right, b1=base.b1), 0.299, 0.294),
        (replace(right, weight_decay=base.weight_decay), 0.183, 1.261),
    ]
    for hyper, mean, ratio in rows:
        got = _moments(hyper, 16)
        assert got[0] == pytest.approx(mean, abs=5.1e-4)
        assert got[1] / limit[1] == pytest.approx(ratio, rel=2e-3)


# Full AdamW with bias correction, by Monte Carlo. ------------------------------------

PARTICLE = AdamW(learning_rate=0.01, b1=0.9, b2=0.99, eps=0.3, weight_decay=0.01)


def _particles(hyper, factor, particles):
    theta, _, _ = adamw_paths(
        hyper,
        round(12_800 / factor),
        curvature=0.01,
        noise=1 / math.sqrt(factor),
        start=1.0,
        shape=particles,
        seed=round(factor),
    )
    return theta.mean(), theta.std()


def _wrong_rules(factor):
    right = scale_by_kappa(PARTICLE, factor)
    return {
        "eps unscaled": replace(right, eps=PARTICLE.eps),
        "decay unscaled": replace(right, weight_decay=PARTICLE.weight_decay),
        "nothing scaled": PARTICLE,
        # The linear scaling rule of SGD, and nothing else.
        "linear rate": replace(PARTICLE, learning_rate=PARTICLE.learning_rate * factor),
    }


def _check_particles(particles, reference, factors):
    # Order-1 error of the rule, measured: 0.03 in the mean, 8 % in the standard
    # deviation; plus 3 standard errors of a difference, with a deviation of 0.4.
    mean_error = 0.03 + 3 * 0.4 * math.sqrt(2 / particles)
    spread_error = 0.08 + 3 / math.sqrt(particles)
    for factor in factors:
        mean, spread = _particles(scale_by_kappa(PARTICLE, factor), factor, particles)
        assert abs(mean - reference[0]) < mean_error
        assert abs(spread / reference[1] - 1) < spread_error
    for hyper in _wrong_rules(16).values():
        mean, spread = _particles(hyper, 16, particles)
        outside = abs(mean - reference[0]) > mean_error
        assert outside or abs(spread / reference[1] - 1) > spread_error


def test_particles():
    reference = _particles(PARTICLE, 1, 1000)
    # Known values 0.105 and 0.404; 3 standard errors at 1000 particles.
    assert reference[0] == pytest.approx(0.105, abs=3 * 0.404 / math.sqrt(1000))
    assert reference[1] == pytest.approx(0.404, rel=3 / math.sqrt(2000))
    _check_particles(1000, reference, (4, 16))


@pytest.mark.slow
def test_particles_in_full():
    table = {
        1: (0.105, 0.404),
        4: (0.099, 0.405),
        16: (0.111, 0.391),
        "eps unscaled": (0.158, 0.254),
        "decay unscaled": (0.285, 0.498),
        "nothing scaled": (0.798, 0.115),
        "linear rate": (0.021, 0.753),
    }
    reference = _particles(PARTICLE, 1, 20_000)
    _check_particles(20_000, reference, (4, 16))
    wrong = _wrong_rules(16)
    for name, (mean, spread) in table.items():
        factor = name if name in (1, 4, 16) else 16
        hyper = wrong[name] if name in wrong else scale_by_kappa(PARTICLE, factor)
        got = _particles(hyper, factor, 20_000)
        # Both sides are samples of 20 000: 4 standard errors of the difference.
        assert got[0] == pytest.approx(mean, abs=5e-4 + 4 * spread * 0.01)
        assert got[1] == pytest.approx(spread, abs=5e-4 + 4 * spread * 0.00707)


# A noisy quadratic loss. -----------------------------------------------------------

TOY = AdamW(learning_rate=2e-3, b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.1)
CURVATURES = np.logspace(-2, 0, 500)


def _losses(hyper, factor, seeds):
    """At 25, 50 and 100 % of the tokens, mean over seeds."""
    steps = round(4096 / factor)
    _, _, seen = adamw_paths(
        hyper,
        steps,
        curvature=CURVATURES,
        noise=1 / math.sqrt(factor),
        start=1.0,
        shape=(seeds, 500),
        seed=1,
        marks=(steps // 4, steps // 2, steps),
    )
    return [float(np.mean(0.5 * CURVATURES * theta**2)) for theta in seen]


def test_loss_does_not_see_the_batch():
    one = _losses(TOY, 1, 4)
    # One seed of 4000 dimensions scatters by 1.6 %; 4 × 500 are half of them, and the
    # known values are one seed themselves: 4 standard errors of the difference.
    scatter = 4 * 0.016 * math.sqrt(3)
    np.testing.assert_allclose(one, (0.0175, 0.0057, 0.00133), rtol=scatter)
    for factor in (0.25, 4):
        final = _losses(scale_by_kappa(TOY, factor), factor, 4)[-1]
        assert abs(final / one[-1] - 1) < 0.10
    assert _losses(TOY, 4, 4)[-1] / one[-1] > 2
    no_decay_rule = replace(scale_by_kappa(TOY, 4), weight_decay=TOY.weight_decay)
    assert _losses(no_decay_rule, 4, 4)[-1] == pytest.approx(0.00285, rel=scatter)


@pytest.mark.slow
def test_loss_table():
    # Means of 8 seeds of 4000 dimensions, which scatter by 1.6 % / √8 each.
    scatter = 4 * 0.016 / math.sqrt(8) * math.sqrt(1 + 500 / 4000)
    means = {0.25: 0.001322, 1: 0.001343, 4: 0.001362, 16: 0.001443}
    unscaled = {0.25: 0.000372, 1: 0.001343, 4: 0.008721, 16: 0.04028}
    for factor, expected in means.items():
        got = _losses(scale_by_kappa(TOY, factor), factor, 8)[-1]
        assert got == pytest.approx(expected, rel=scatter * math.sqrt(8))
        got = _losses(TOY, factor, 8)[-1]
        assert got == pytest.approx(unscaled[factor], rel=scatter * math.sqrt(8))


# Fits and bad input. -----------------------------------------------------------------


def test_fit_recovers_a_planted_exponent():
    tokens = np.array([1e9, 3e9, 1e10, 3e10, 1e11])
    fit = fit_horizon(tokens, 3e-3 * (tokens / 1e9) ** -0.22)
    assert fit.horizon == pytest.approx(0.44, rel=1e-12)
    assert fit.high - fit.low == pytest.approx(0, abs=1e-12)
    assert np.exp(fit.intercept) * 1e9**-0.22 == pytest.approx(3e-3)
    fit = fit_horizon(tokens, 64 * tokens**0.6, of="batch")
    assert fit.horizon == pytest.approx(0.6, rel=1e-12)


def test_fit_interval_covers():
    generator = np.random.default_rng(0)
    tokens = np.repeat([1e9, 1e10, 1e11], 5)
    covered, widths, errors = 0, [], []
    for _ in range(200):
        optimum = tokens**-0.5 * np.exp(0.1 * generator.standard_normal(15))
        fit = fit_horizon(tokens, optimum, level=0.9, num_samples=300)
        covered += fit.low <= 1.0 <= fit.high
        widths.append(fit.high - fit.low)
        errors.append(fit.horizon - 1)
    # 90 % of 200 with a binomial deviation of 4.2; the percentile interval of 15 points
    # is about 2 % short. Three deviations.
    assert 162 <= covered <= 193
    # Least squares: deviation of γ is 2·0.1/√Σ(x − x̄)².
    deviation = 0.2 / np.sqrt(np.sum((np.log(tokens) - np.log(tokens).mean()) ** 2))
    assert np.std(errors) == pytest.approx(deviation, rel=3 / math.sqrt(400))
    assert np.mean(widths) == pytest.approx(2 * 1.645 * deviation, rel=0.1)


def test_fit_with_a_lonely_duration():
    # The point with leverage 1 fits itself; the others still scatter.
    fit = fit_horizon([1e9, 1e9, 1e10], [1e-3, 1.2e-3, 5e-4])
    assert fit.low <= fit.horizon <= fit.high
    assert fit.residuals[2] == pytest.approx(0, abs=1e-12)


def test_critical_batch():
    assert critical_batch(6.4e12, 100_000, length=3256) == 19656
    assert critical_batch(100, 1000) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Budget(batch=0, tokens=1), "batch must be positive, got 0"),
        (lambda: Budget(batch=1, tokens=math.inf), "tokens must be finite"),
        (lambda: kappa(BASE, BASE, -0.1), "horizon must not be negative, got -0.1"),
        (lambda: kappa(BASE, BASE, math.nan), "horizon"),
        (lambda: logical_batch(BASE, 0), "tokens"),
        (lambda: scale_by_kappa(HYPER, 0), "kappa"),
        (lambda: scale_by_kappa(HYPER, 2, beta_form="power"), "beta_form"),
        (lambda: scale_by_kappa(HYPER, 10, beta_form="linear"), "b1=0.9.*kappa=10"),
        (lambda: scale_by_kappa(HYPER, 10_001), "weight_decay=0.1 .*exact_decay"),
        (lambda: scale_by_kappa(HYPER, 2, clip_batch_ratio=0), "clip_batch_ratio"),
        (lambda: reparameterise(HYPER, BASE, BASE, clip="sqrt"), "'keep', 'batch'"),
        (lambda: fit_horizon([1, 2], [1, 2]), "tokens must hold at least 3"),
        (lambda: fit_horizon([2, 2, 2], [1, 2, 3]), "2 durations"),
        (lambda: fit_horizon([1, 2, 3], [1, 2]), "got 3 and 2"),
        (lambda: fit_horizon([1, 2, 3], [1, 0, 2]), "optimum"),
        (lambda: fit_horizon([1, 2, 3], [1, 2, 3], of="eps"), "of must be"),
        (lambda: fit_horizon([1, 2, 3], [1, 2, 3], level=1.0), "level"),
        (lambda: critical_batch(1e9, 0), "critical_steps"),
        (lambda: critical_batch(1e9, 10, length=0), "length"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
