"""Power-function averages: exact at any batch; widths; synthesis afterwards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmm.optim.post_hoc import profile_inner_product, synthesis, synthesize
from diffmm.optim.power_ema import (
    MAX_SIGMA_REL,
    averaged_profiles,
    gamma_from_sigma_rel,
    power_ema,
    power_rate,
    sigma_rel_from_gamma,
)

GAMMA = gamma_from_sigma_rel(0.1)


def follow(transformation, values, state=None, **extra):
    values = jax.tree.map(jnp.asarray, values)
    if state is None:
        state = transformation.init(jax.tree.map(lambda v: v[0], values))

    def step(state, value_and_extra):
        value, extra = value_and_extra
        still = jax.tree.map(jnp.zeros_like, value)
        return transformation.update(still, state, value, **extra)[1], None

    return jax.jit(lambda *a: jax.lax.scan(step, *a)[0])(state, (values, extra))


def profile(gamma, times):
    """Weights of the parameters that entered at the given times."""
    ends = (np.asarray(times) / times[-1]) ** (gamma + 1)
    return np.diff(ends, prepend=0)


def test_golden_values_of_the_relative_width():
    for sigma_rel, gamma in {
        0.05: 16.9722,
        0.10: 6.9372,
        0.15: 3.5579,
        0.20: 1.8262,
        0.25: 0.71982,
        0.28: 0.16934,
    }.items():
        assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=6e-5)
    for sigma_rel in np.linspace(0.002, 0.288675, 60):
        gamma = gamma_from_sigma_rel(sigma_rel)
        assert sigma_rel_from_gamma(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    assert sigma_rel_from_gamma(0) == pytest.approx(MAX_SIGMA_REL, rel=1e-15)
    assert gamma_from_sigma_rel(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-9)
    assert sigma_rel_from_gamma(-0.382) == pytest.approx(0.300283, abs=1e-6)


def test_rates_telescope():
    in_one = 1 - power_rate(400, 404, GAMMA)
    in_four = math.prod(1 - power_rate(t, t + 1, GAMMA) for t in range(400, 404))
    assert in_one == pytest.approx(0.924060433528, abs=1e-12)
    assert in_four == pytest.approx(in_one, abs=1e-12)
    traced = jax.jit(functools.partial(power_rate, gamma=GAMMA))(400.0, 404.0)
    assert float(traced) == pytest.approx(1 - in_one, rel=1e-5)
    assert power_rate(0, 3, GAMMA) == 1


def test_weights_have_the_closed_form_and_its_moments():
    """One value per step, each a unit vector, shows every weight of the profile."""
    steps = 40
    state = follow(power_ema(gamma=GAMMA), np.eye(steps, dtype=np.float32))
    (weights,) = averaged_profiles(state)
    times = np.arange(1, steps + 1)
    np.testing.assert_allclose(weights, profile(GAMMA, times), rtol=2e-5, atol=1e-9)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    # In the limit: centre (γ+1)/(γ+2), standard deviation σ_rel.
    t = 20_000
    exact = profile(GAMMA, np.arange(1, t + 1))
    centre = exact @ np.arange(1, t + 1) / t
    spread = math.sqrt(exact @ (np.arange(1, t + 1) / t - centre) ** 2)
    assert centre == pytest.approx((GAMMA + 1) / (GAMMA + 2), abs=5e-5)
    assert spread == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_any_batches_give_the_profile_of_their_samples(every):
    batches = np.random.default_rng(0).integers(1, 100, 24)
    transformation = power_ema(sigma_rel=[0.05, 0.2], batch_ref=10, update_every=every)
    values = {"w": np.eye(24, dtype=np.float32)}
    state = follow(transformation, values, batch=jnp.asarray(batches))
    times = np.cumsum(batches)[every - 1 :: every]
    for sigma_rel, average in zip((0.05, 0.2), averaged_profiles(state), strict=True):
        expected = np.zeros(24)
        expected[every - 1 :: every] = profile(gamma_from_sigma_rel(sigma_rel), times)
        np.testing.assert_allclose(average["w"], expected, rtol=1e-4, atol=1e-7)


def test_a_change_of_batch_changes_nothing():
    """Four steps to the same parameters are one step of four times the batch."""
    values = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
    slow = follow(power_ema(gamma=2.0), np.repeat(values, 4, 0))
    state = follow(power_ema(gamma=2.0), np.repeat(values[:8], 4, 0))
    mixed = follow(power_ema(gamma=2.0, kappa=4), values[8:], state)
    np.testing.assert_allclose(
        averaged_profiles(slow)[0], averaged_profiles(mixed)[0], rtol=1e-5, atol=1e-6
    )
    assert mixed.reference_batches == 64


@pytest.mark.parametrize("order", ["post", "pre"])
def test_beside_an_optimizer_with_bfloat16_parameters(order):
    optimizer = optax.chain(optax.sgd(1.0), power_ema(gamma=[0.0, 5.0], order=order))
    params = {"w": jnp.zeros(2, jnp.bfloat16), "none": None}
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    seen = []
    for k in range(1, 5):
        grads = {"w": jnp.full(2, -k, jnp.bfloat16), "none": None}
        updates, state = step(grads, state, params)
        new = optax.apply_updates(params, updates)
        seen.append((new if order == "post" else params)["w"].astype(jnp.float32))
        params = new
    mean, late = averaged_profiles(state)
    np.testing.assert_allclose(mean["w"], np.mean(seen, 0), rtol=1e-6)
    expected = profile(5.0, [1, 2, 3, 4]) @ np.asarray(seen)
    np.testing.assert_allclose(late["w"], expected, rtol=1e-5)
    assert late["none"] is None
    assert averaged_profiles(state, like=params)[1]["w"].dtype == jnp.bfloat16


def test_what_is_not_finite_never_enters():
    transformation = power_ema(gamma=[1.0, 3.0])
    state = follow(transformation, np.ones((3, 2), np.float32))
    bad = jnp.array([jnp.nan, 1.0])
    _, after = transformation.update(jnp.zeros(2), state, bad)
    jax.tree.map(np.testing.assert_array_equal, state.averages, after.averages)
    assert (state.skipped, after.skipped) == (0, 1)
    assert after.reference_batches == 4
    _, later = transformation.update(jnp.zeros(2), after, jnp.full(2, 3.0))
    # The fifth step keeps (4/5)^(γ+1) of what there was.
    for gamma, average in zip((1.0, 3.0), later.averages, strict=True):
        np.testing.assert_allclose(average, 3 - 2 * 0.8 ** (gamma + 1), rtol=1e-6)


# Synthesis.

TIMES = [25, 50, 75, 100] * 2
GAMMAS = [gamma_from_sigma_rel(s) for s in (0.05, 0.10) for _ in range(4)]


def test_golden_inner_products():
    golden = {(3, 2, 7, 5): 0.00464729832, (4, 1.5, 4, 6.9): 19.75 / 37.6}
    for arguments, value in golden.items():
        assert profile_inner_product(*arguments) == pytest.approx(value, abs=1e-11)
        swapped = profile_inner_product(*arguments[2:], *arguments[:2])
        assert swapped == pytest.approx(value, abs=1e-11)
    # Against quadrature.
    s = (np.arange(200_000) + 0.5) / 200_000 * 7
    a = np.where(s < 3, 3 * s**2 / 3**3, 0)
    b = 6 * s**5 / 7**6
    quadrature = float((a * b).mean() * 7)
    assert quadrature == pytest.approx(golden[3, 2, 7, 5], rel=1e-4)


def test_stored_profiles_come_back_exactly():
    for index in (3, 7):
        result = synthesis(TIMES, GAMMAS, time=100, gamma=GAMMAS[index])
        np.testing.assert_allclose(result.weights, np.eye(8)[index], atol=1e-8)
        assert result.residual < 1e-7


@pytest.mark.parametrize(
    ("sigma_rel", "residual", "total"),
    [(0.075, 0.03292, 1.01087), (0.15, 0.09861, 0.96326), (0.20, 0.20040, 0.90997)],
)
def test_golden_synthesis(sigma_rel, residual, total):
    result = synthesis(TIMES, GAMMAS, time=100, sigma_rel=sigma_rel)
    assert result.residual == pytest.approx(residual, abs=1e-4 * residual + 6e-6)
    assert result.weights.dtype == np.float64
    assert result.weights.sum() == pytest.approx(total, abs=1e-5)
    if sigma_rel == 0.15:
        assert result.weights[-1] == pytest.approx(1.07438, abs=1e-5)
    normalized = synthesis(TIMES, GAMMAS, time=100, sigma_rel=sigma_rel, normalize=True)
    assert normalized.weights.sum() == pytest.approx(1, abs=1e-12)
    # The constraint costs something, and less than dividing by the sum does.
    assert result.residual < normalized.residual < 1.1 * result.residual


def test_synthesis_from_a_run_approximates_the_average_of_another_width():
    steps = 200
    path = np.cumsum(np.random.default_rng(3).normal(size=(steps, 64)), 0) * 0.1
    values = {"w": path.astype(np.float32), "n": np.arange(steps)}
    transformation = power_ema(sigma_rel=(0.05, 0.10))
    state, stored, times, gammas = None, [], [], []
    for start in range(0, steps, 50):
        part = jax.tree.map(lambda v, a=start: v[a : a + 50], values)
        state = follow(transformation, part, state)
        for average, sigma_rel in zip(
            averaged_profiles(state), (0.05, 0.10), strict=True
        ):
            stored.append(jax.device_get(average))
            times.append(start + 50)
            gammas.append(gamma_from_sigma_rel(sigma_rel))
    result = synthesis(times, gammas, time=steps, sigma_rel=0.075)
    built = synthesize(stored, result.weights)
    (exact,) = averaged_profiles(follow(power_ema(sigma_rel=0.075), values))
    assert built["w"].dtype == np.float32
    assert built["n"] == steps - 1

    def distance(a):
        return float(np.linalg.norm(a - np.asarray(exact["w"])))

    # Better than either stored average at the end, which differ in width only.
    nearest = min(distance(stored[-2]["w"]), distance(stored[-1]["w"]))
    assert distance(built["w"]) < 0.5 * nearest
    like = {"w": jnp.zeros(64, jnp.bfloat16), "n": np.int32(0)}
    assert synthesize(stored, result.weights, like)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gamma_from_sigma_rel(0.0), "sigma_rel"),
        (lambda: gamma_from_sigma_rel(-0.1), "sigma_rel"),
        (lambda: gamma_from_sigma_rel(0.289), "sigma_rel"),
        (lambda: gamma_from_sigma_rel(math.nan), "sigma_rel"),
        (lambda: sigma_rel_from_gamma(-1), "gamma"),
        (lambda: power_ema(), "exactly one of gamma and sigma_rel"),
        (lambda: power_ema(gamma=1, sigma_rel=0.1), "exactly one"),
        (lambda: power_ema(gamma=-1), "gamma"),
        (lambda: power_ema(gamma=[]), "got none"),
        (lambda: power_ema(gamma=1, kappa=0), "kappa"),
        (lambda: power_ema(gamma=1, update_every=0), "update_every"),
        (lambda: power_ema(gamma=1, order="both"), "order"),
        (lambda: power_rate(4, 4, 1.0), "before"),
        (lambda: power_rate(-1, 4, 1.0), "before"),
        (lambda: averaged_profiles(()), "0 states"),
        (lambda: synthesis([1], [1, 2], time=1, gamma=1), "one entry"),
        (lambda: synthesis([], [], time=1, gamma=1), "one entry"),
        (lambda: synthesis([1, 1], [1, 1], time=1, gamma=1), "twice"),
        (lambda: synthesis([1, 2], [1, 1], time=3, gamma=1), "time=3"),
        (lambda: synthesis([1, 0], [1, 1], time=1, gamma=1), "times"),
        (lambda: synthesis([1, 2], [1, -1], time=1, gamma=1), "gammas"),
        (lambda: synthesis([1, 2], [1, 1], time=1, gamma=-0.6), "above -1/2"),
        (lambda: synthesis([1, 2], [1, 1], time=1), "exactly one"),
        (lambda: synthesize([{"w": 1.0}], [0.5, 0.5]), "weights"),
        (lambda: synthesize([{"w": 1.0}, {"v": 1.0}], [0.5, 0.5]), "structure"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
