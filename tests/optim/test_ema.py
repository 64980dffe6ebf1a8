"""The EMA scaling rule: identities, oracles in closed form, containers, bad input."""

import functools
import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from diffmm.optim.ema import (
    EmaState,
    averaged_params,
    decay_rate,
    ema_from_half_life,
    ema_params,
    scale_batch_norm_momentum,
    update_average,
    update_batch_stats,
)
from diffmm.optim.ema_schedules import cosine_decay, warmup_decay
from diffmm.optim.rates import scale_decay
from diffmm.training import Checkpointer, init_state, make_mesh


def follow(transformation, values, state=None, **extra):
    """Averages of parameters that take the given values, one per step; in one scan."""
    values = jax.tree.map(jnp.asarray, values)
    first = jax.tree.map(lambda v: v[0], values)
    state = transformation.init(first) if state is None else state

    def step(state, value_and_extra):
        value, extra = value_and_extra
        still = jax.tree.map(jnp.zeros_like, value)
        _, state = transformation.update(still, state, value, **extra)
        return state, None

    return jax.jit(lambda *a: jax.lax.scan(step, *a)[0])(state, (values, extra))


def reference(values, decays, start):
    """The definition, in float64."""
    average = np.asarray(start, np.float64)
    for value, decay in zip(values, decays, strict=True):
        average = decay * average + (1 - decay) * np.asarray(value, np.float64)
    return average


WALK = np.cumsum(np.random.default_rng(0).normal(size=(48, 3)), 0).astype(np.float32)


# The rule itself.


@pytest.mark.parametrize("kappa", [0.25, 1.0, 1.7, 8.0])
def test_equals_the_definition_with_decay_to_the_power_kappa(kappa):
    state = follow(ema_params(0.97, kappa=kappa), WALK)
    expected = reference(WALK, [0.97**kappa] * len(WALK), WALK[0])
    np.testing.assert_allclose(state.average, expected, rtol=2e-6, atol=1e-6)
    assert state.weight == 1
    np.testing.assert_allclose(state.reference_batches, kappa * len(WALK), rtol=1e-6)


@pytest.mark.parametrize(
    ("order", "deltas"),
    [
        ("pre", {2: -0.01, 5: -0.09049, 10: -0.3486784401}),
        ("post", {2: 0.009, 5: 0.073314, 10: 0.2375109638}),
    ],
)
def test_small_and_large_steps_differ_by_the_known_second_order_term(order, deltas):
    """η = .1, ρ = .9, θ₀ = 3, ζ₀ = 2, gradient 1: one matrix power in closed form."""

    def average_after(steps, kappa):
        optimizer = optax.chain(
            optax.sgd(0.1 * kappa),
            ema_params(0.9, kappa=kappa, order=order, init=jnp.array(2.0)),
        )
        params = jnp.array(3.0)
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(jnp.array(1.0), state, params)
            params = optax.apply_updates(params, updates)
        return float(averaged_params(state))

    with jax.enable_x64(True):
        for kappa, delta in deltas.items():
            small, large = average_after(kappa, 1), average_after(1, kappa)
            assert small - large == pytest.approx(delta, abs=1e-10)
            if order == "pre":
                golden = {2: 2.18, 5: 2.31902, 10: 2.3026431198}[kappa]
                assert small == pytest.approx(golden, abs=1e-10)


def test_blocks_of_constant_parameters_are_averaged_exactly_at_any_batch():
    with jax.enable_x64(True):
        values = np.random.default_rng(1).normal(size=(6, 2))
        start = jnp.asarray([5.0, -1.0])
        for kappa in (2, 4):
            small = large = start
            for value in values:
                for _ in range(kappa):
                    small = update_average(small, value, 0.98)
                large = update_average(large, value, 0.98, kappa)
            np.testing.assert_allclose(small, large, rtol=1e-12)
        # Constant parameters: ζ_n − θ = ρⁿ (ζ₀ − θ).
        average = start
        for _ in range(20):
            average = update_average(average, values[0], 0.98)
        np.testing.assert_allclose(
            average - values[0], 0.98**20 * (start - values[0]), rtol=1e-12
        )


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 7.5])
def test_rate_of_numbers_and_of_traced_scalars(rho, kappa):
    exact = decay_rate(rho, kappa)
    assert isinstance(exact, float)
    assert exact == pytest.approx(1 - scale_decay(rho, kappa), rel=1e-6, abs=1e-12)
    traced = jax.jit(functools.partial(decay_rate, rho))(kappa)
    np.testing.assert_allclose(traced, exact, rtol=3e-6)
    if rho <= 0.99:  # float32 resolves 1 − ρ to 6e-8
        both = jax.jit(decay_rate)(rho, kappa)
        np.testing.assert_allclose(both, exact, rtol=1e-5)


def noisy_parabola(kappa, rho, paths, steps, key, order="post"):
    """SGD on θ²/2 with gradient variance (θ²/2 + 1)/κ at η = .01 κ, from 0."""
    optimizer = optax.chain(optax.sgd(0.01 * kappa), ema_params(rho, order=order))

    def step(carry, key):
        theta, state = carry
        scale = jnp.sqrt((0.5 * theta**2 + 1) / kappa)
        gradient = theta + scale * jax.random.normal(key, theta.shape)
        updates, state = optimizer.update(gradient, state, theta)
        return (optax.apply_updates(theta, updates), state), None

    theta = jnp.zeros(paths)
    carry = (theta, optimizer.init(theta))
    (theta, state), _ = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        carry, jax.random.split(key, steps)
    )
    return theta, averaged_params(state)


@pytest.mark.parametrize(
    ("kappa", "rho", "golden"),
    [(1, 0.98, 0.003364), (8, 0.98**8, 0.003454), (8, 0.98, 0.001019)],
)
def test_stationary_variance_of_average_is_kept_by_the_rule_only(kappa, rho, golden):
    """V_ζ and Cov(θ, ζ) in closed form, after at least ten units of time."""
    steps = 1000 if kappa == 1 else 250
    theta, average = noisy_parabola(kappa, rho, 2000, steps, jax.random.key(kappa))
    e, p, r = 0.01 * kappa, 1 - 0.01 * kappa, rho
    variance = 0.01 / (2 - e - e * 0.5 / kappa)
    exact = variance * (1 - r) * (1 + p * r) / ((1 + r) * (1 - p * r))
    assert exact == pytest.approx(golden, abs=1e-6)
    # The standard error of a variance is √(2 / 2000) = 3.2%: four of them.
    assert jnp.var(average) == pytest.approx(exact, rel=0.13)
    assert jnp.var(theta) == pytest.approx(variance, rel=0.13)
    covariance = jnp.mean((theta - theta.mean()) * (average - average.mean()))
    assert covariance == pytest.approx(variance * (1 - r) / (1 - p * r), rel=0.13)


def feedback(stages, rule, rho=0.998, rate=1e-3, strength=0.9):
    """Mean of SGD drawn to its own average; one value per reference batch and stage."""

    def run(kappa, carry, steps):
        def step(carry, _):
            theta, average = carry
            new = theta - kappa * rate * (theta - strength * average)
            average = update_average(average, theta, rho, kappa if rule else 1.0)
            return (new, average), jnp.stack([new, average])

        return jax.lax.scan(step, carry, length=steps)

    carry, out = (jnp.array(1.0), jnp.array(0.0)), []
    for kappa, samples in stages:
        carry, path = run(kappa, carry, samples // kappa)
        out.append((kappa, np.asarray(path)))
    return out


def test_averages_that_feed_back_follow_the_same_path_with_the_rule():
    with jax.enable_x64(True):
        base = feedback([(1, 4096)], True)[0][1]
        np.testing.assert_allclose(base[-1], [0.510150, 0.528159], atol=1e-6)

        def error(stages, rule):
            errors, seen = [], 0
            for kappa, path in feedback(stages, rule):
                at = seen + kappa * np.arange(1, len(path) + 1)
                errors.extend(np.abs(path - base[at - 1]).max(1))
                seen = int(at[-1])
            return errors[-1], max(errors)  # in the end, and anywhere

        for kappa, with_rule, without in ((4, 3.976e-4, 0.2256), (16, 1.990e-3, 0.421)):
            last, worst = error([(kappa, 4096)], True)
            assert last == pytest.approx(with_rule, rel=1e-3)
            assert worst < 3e-4 * (kappa - 1)  # first order in κ, on the whole path
            assert error([(kappa, 4096)], False)[0] == pytest.approx(without, rel=1e-3)
        stages = [(1, 1024), (4, 1024), (16, 2048)]
        assert error(stages, True)[0] == pytest.approx(4.486e-4, rel=1e-3)
        assert error(stages, False)[0] == pytest.approx(0.07466, rel=1e-3)


def test_adamw_with_average_is_the_same_experiment_at_four_times_the_batch():
    """θ²/2, gradient noise 10/√κ, 4096 reference steps from 2; 2000 paths."""

    def final(kappa, rho):
        root = math.sqrt(kappa)
        optimizer = optax.chain(
            optax.adamw(
                3e-3 * root,
                b1=1 - kappa * 0.02,
                b2=1 - kappa * 0.005,
                eps=1e-8 / root,
                weight_decay=0.1 * root,
            ),
            ema_params(rho, kappa=1.0, order="pre"),
        )

        @jax.jit
        def run(theta, key):
            def step(carry, key):
                theta, state = carry
                noise = jax.random.normal(key, theta.shape)
                updates, state = optimizer.update(
                    theta + 10 / root * noise, state, theta
                )
                return (optax.apply_updates(theta, updates), state), None

            keys = jax.random.split(key, 4096 // kappa)
            return jax.lax.scan(step, (theta, optimizer.init(theta)), keys)[0]

        theta, state = run(jnp.full(2000, 2.0), jax.random.key(0))
        return float(theta.mean()), float(averaged_params(state).mean())

    # Standard errors: .084 / √2000 = .0019 of θ, less of ζ; tolerance five of them,
    # one for the goldens, which 4000 other paths gave.
    assert final(4, 0.998**4) == pytest.approx((0.1696, 0.2437), abs=0.011)
    assert final(4, 0.998) == pytest.approx((0.1696, 0.6931), abs=0.011)


# Time: schedules, refresh interval, varying batches, bias.


@pytest.mark.parametrize("rho", [0.9999, cosine_decay(0.9, 40), warmup_decay(0.99)])
def test_debiased_average_of_a_constant_is_the_constant(rho):
    """Under any sequence of decays; 1 − ρ^count would be wrong under a schedule."""
    values = {"w": np.full((40, 2), 3.7, np.float32)}
    state = follow(ema_params(rho, init="zeros"), values)
    np.testing.assert_allclose(averaged_params(state)["w"], 3.7, rtol=2e-6)
    decays = [float(rho(jnp.float32(n))) if callable(rho) else rho for n in range(40)]
    np.testing.assert_allclose(state.weight, 1 - np.prod(decays), rtol=1e-3)
    raw = averaged_params(state, debias=False)["w"]
    np.testing.assert_allclose(raw, 3.7 * (1 - np.prod(decays)), rtol=1e-3)


def test_before_anything_has_entered_the_average_from_zeros_is_the_parameters():
    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    state = ema_params(0.9, init="zeros").init(params)
    assert state.weight == 0
    np.testing.assert_array_equal(averaged_params(state)["w"], 0)
    read = averaged_params(state, like=params)["w"]
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, params["w"])


def test_schedules_have_their_golden_values_pointwise_to_the_power():
    fractions = np.array([0, 0.25, 0.5, 0.75, 1])
    with jax.enable_x64(True):
        rho = np.asarray(cosine_decay(0.996, 800.0)(800 * fractions))
        golden = [0.996, 0.9965857864, 0.998, 0.9994142136, 1]
        np.testing.assert_allclose(rho, golden, atol=1e-10)
        golden = [0.9840957, 0.9864129, 0.9920240, 0.9976589, 1]
        np.testing.assert_allclose(rho**4, golden, atol=5e-8)
        assert cosine_decay(0.996, 800.0)(1e9) == 1
        warm = warmup_decay(0.9)
        np.testing.assert_allclose(warm(np.array([0, 7, 1e6])), [0, 0.75, 0.9])


@pytest.mark.parametrize("schedule", [cosine_decay(0.9, 48), warmup_decay(0.97)])
@pytest.mark.parametrize("kappa", [0.5, 1, 4])
def test_a_schedule_is_read_at_the_samples_seen_not_at_the_step(schedule, kappa):
    state = follow(ema_params(schedule, kappa=kappa), WALK)
    decays = [float(schedule(kappa * k)) ** kappa for k in range(len(WALK))]
    expected = reference(WALK, decays, WALK[0])
    np.testing.assert_allclose(state.average, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [2, 5])
def test_refresh_interval_enters_the_exponent(every):
    state = follow(ema_params(0.97, kappa=1.5, update_every=every), WALK)
    seen = WALK[every - 1 :: every]
    expected = reference(seen, [0.97 ** (1.5 * every)] * len(seen), WALK[0])
    np.testing.assert_allclose(state.average, expected, rtol=1e-5, atol=1e-6)
    assert state.progress.since == len(WALK) % every


def test_refresh_interval_and_accumulation_keep_the_half_life():
    """From 0 towards 1 the average is at one half after one half-life of samples."""
    for every, batch in ((1, 1), (1, 16), (8, 1), (4, 8)):
        transformation = ema_from_half_life(256, batch=batch, update_every=every)
        values = np.concatenate([[0.0], np.ones(256 // batch)]).astype(np.float32)
        state = transformation.init(values[0])
        state = follow(transformation, values[1:], state)
        assert state.average == pytest.approx(0.5, abs=1e-6), (every, batch)

    inner = optax.chain(optax.sgd(0.0), ema_params(0.9, kappa=4, init="zeros"))
    optimizer = optax.MultiSteps(inner, every_k_schedule=4)
    params = jnp.ones(2)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(12):
        _, state = step(jnp.ones(2), state, params)
    raw = averaged_params(state, debias=False)
    np.testing.assert_allclose(raw, 1 - 0.9**12, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_total_decay_depends_on_samples_only(every):
    """From 1 with parameters at 0, the average is ρ^(s / B_ref) for any batches."""
    batches = np.random.default_rng(2).integers(1, 200, 42)
    transformation = ema_params(0.99, batch_ref=64, update_every=every)
    start = transformation.init(jnp.float32(1))
    state = follow(
        transformation, np.zeros(42, np.float32), start, batch=jnp.asarray(batches)
    )
    exact = 0.99 ** (batches.sum() / 64)
    np.testing.assert_allclose(state.average, exact, rtol=1e-5)
    np.testing.assert_allclose(state.reference_batches, batches.sum() / 64, rtol=1e-6)
    # Samples instead of a decay, and a batch known on the host.
    transformation = ema_from_half_life(6400)
    state = transformation.init(jnp.float32(1))
    for batch in (1600, 4800):
        _, state = transformation.update(0.0, state, jnp.float32(0), batch=batch)
    assert state.average == pytest.approx(0.5, abs=1e-6)


def test_a_new_kappa_continues_from_the_old_state():
    first, second = ema_params(0.97), ema_params(0.97, kappa=4)
    state = follow(second, WALK[24:], follow(first, WALK[:24]))
    decays = [0.97] * 24 + [0.97**4] * 24
    expected = reference(WALK, decays, WALK[0])
    np.testing.assert_allclose(state.average, expected, rtol=1e-5, atol=1e-6)
    assert state.reference_batches == 24 + 4 * 24


def test_clock_counts_where_float32_would_stall():
    transformation = ema_params(0.9, kappa=1 / 3)
    state = transformation.init(jnp.float32(0))
    clock = state.progress.clock._replace(whole=jnp.int32(1_000_000_000))
    state = state._replace(progress=state.progress._replace(clock=clock))
    state = follow(transformation, np.zeros(300, np.float32), state)
    clock = state.progress.clock
    total = int(clock.whole) - 1_000_000_000 + float(clock.part)
    assert total == pytest.approx(100, abs=1e-4)
    full = state.progress.clock._replace(whole=jnp.int32(2**31 - 1))
    assert full.advance(5.0).whole == 2**31 - 1


# What is not finite.


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_enters(every, order, bad):
    transformation = ema_params(0.9, update_every=every, order=order)
    params = {"a": jnp.ones(3), "b": jnp.zeros(2), "n": jnp.array(0)}
    state = transformation.init(params)
    step = jax.jit(transformation.update)
    fine = jax.tree.map(jnp.zeros_like, params)
    nasty = {**fine, "b": jnp.array([0.0, bad])}
    for _ in range(every):
        _, state = step(fine, state, {**params, "a": 2 * params["a"]})
    before = jax.device_get(state)
    np.testing.assert_allclose(before.average["a"], 2 - 0.9**every, rtol=1e-6)
    for count in range(every):  # the step that is due meets something not finite
        updates, state = step(nasty if count == every - 1 else fine, state, params)
    assert not np.isfinite(updates["b"]).all()  # updates pass through unchanged
    assert state.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, state.average, before.average)
    assert state.weight == before.weight
    assert state.reference_batches == 2 * every  # the data were seen
    # Then the refresh is made up for, with its exponent and no more.
    _, state = step(fine, state, params)
    assert state.skipped == 1
    expected = 1 + (1 - 0.9**every) * 0.9**every
    np.testing.assert_allclose(state.average["a"], expected, rtol=1e-6)


def test_plain_function_leaves_the_average_when_parameters_are_not_finite():
    average = {"a": jnp.ones(2), "b": jnp.ones(2)}
    bad = {"a": jnp.zeros(2), "b": jnp.array([np.nan, 0])}
    new = update_average(average, bad, 0.5)
    jax.tree.map(np.testing.assert_array_equal, new, average)


# Containers, dtypes, devices.


def test_float32_beside_bfloat16_parameters():
    """2000 steps at ρ = .9999 from 1 towards 2: bfloat16 would stay at 1."""
    transformation = ema_params(0.9999)
    state = transformation.init(jnp.ones((), jnp.bfloat16))
    assert state.average.dtype == jnp.float32
    state = follow(transformation, jnp.full(2000, 2, jnp.bfloat16), state)
    assert state.average.dtype == jnp.float32
    assert float(state.average) == pytest.approx(2 - 0.9999**2000, abs=2e-5)
    assert float(state.average) == pytest.approx(1.181278, abs=2e-5)
    like = jnp.ones((), jnp.bfloat16)
    assert averaged_params(state, like=like).dtype == jnp.bfloat16


def test_leaves_without_an_average_are_copied_and_none_is_kept():
    def tree(value):
        return {
            "w": jnp.full(2, value),
            "z": jnp.full(2, value * 1j),
            "count": jnp.array(int(value)),
            "flag": jnp.array(value > 1),
            "empty": jnp.zeros((0, 3)),
            "none": None,
            "masked": optax.MaskedNode(),
        }

    transformation = ema_params(0.5, init="zeros")
    state = transformation.init(tree(1.0))
    updates = {**jax.tree.map(jnp.zeros_like, tree(3.0)), "flag": jnp.array(False)}
    _, state = transformation.update(updates, state, tree(3.0))
    read = averaged_params(state, like=tree(3.0))
    assert read["count"] == 3
    assert read["flag"]
    assert read["none"] is None
    assert read["masked"] == optax.MaskedNode()
    np.testing.assert_allclose(read["w"], 3)
    np.testing.assert_allclose(read["z"], 3j)
    np.testing.assert_allclose(state.average["z"], 1.5j)

    keys = {"key": jax.random.key(1), "w": jnp.ones(2)}
    new = update_average({"key": jax.random.key(0), "w": jnp.zeros(2)}, keys, 0.5)
    assert new["key"] == keys["key"]
    np.testing.assert_allclose(new["w"], 0.5)


def test_float64_parameters_have_a_float64_average():
    with jax.enable_x64(True):
        state = ema_params(0.9).init(jnp.ones(2, jnp.float64))
        assert state.average.dtype == jnp.float64


def test_initial_values_are_copies_zeros_or_a_given_tree():
    params = {"w": jnp.ones(2)}
    copied = ema_params(0.9).init(params)
    assert copied.average["w"] is not params["w"]
    assert (
        copied.average["w"].unsafe_buffer_pointer()
        != params["w"].unsafe_buffer_pointer()
    )
    given = ema_params(0.9, init={"w": np.full(2, 7.0, np.float16)}).init(params)
    np.testing.assert_array_equal(given.average["w"], 7)
    assert given.average["w"].dtype == jnp.float32
    assert (copied.weight, given.weight) == (1, 1)


def test_flax_nnx_state_in_a_deeply_nested_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.adamw(learning_rate), ema_params(0.5)
            )
        )(learning_rate=0.1),
    )
    state = init_state(params, optimizer, jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, opt_state = jax.jit(optimizer.update)(grads, state.opt_state, params)
    new = optax.apply_updates(params, updates)
    read = averaged_params(state._replace(opt_state=opt_state), like=params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, params, new)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), read, expected
    )
    nnx.merge(graphdef, read)(jnp.ones((1, 3)))


def test_flax_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = nnx.state(model, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    chain = optax.chain(optax.sgd(0.1), ema_params(0.5))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    after = nnx.state(model, nnx.Param)
    read = averaged_params(optimizer.opt_state, like=after)
    assert jax.tree.structure(read) == jax.tree.structure(after)
    for old, new, average in zip(
        *map(jax.tree.leaves, (before, after, read)), strict=True
    ):
        np.testing.assert_allclose(average, (old + new) / 2, rtol=1e-6, atol=1e-7)


def test_decay_may_be_a_traced_scalar_or_an_injected_hyperparameter():
    @jax.jit
    def average(rho, kappa):
        return follow(ema_params(rho, kappa=kappa), WALK).average

    expected = reference(WALK, [0.95**3] * len(WALK), WALK[0])
    np.testing.assert_allclose(average(0.95, 3.0), expected, rtol=1e-4, atol=1e-5)
    injected = optax.inject_hyperparams(ema_params, static_args=("update_every",))
    state = follow(injected(rho=0.95, kappa=3.0), WALK)
    np.testing.assert_allclose(averaged_params(state), expected, rtol=1e-4, atol=1e-5)


def test_sharded_parameters_have_an_average_sharded_alike():
    mesh = make_mesh(data=4)
    sharding = NamedSharding(mesh, PartitionSpec("data", None))
    params = {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)}
    optimizer = optax.chain(optax.sgd(0.1), ema_params(0.5))
    state = optimizer.init(params)
    assert state[-1].average["w"].sharding.is_equivalent_to(sharding, 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    expected = np.asarray(params["w"]) * 0.95
    params, state = step(params, state)
    assert state[-1].average["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(averaged_params(state)["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 4])
def test_needs_no_memory_but_the_average(every):
    params = {"a": jnp.ones((256, 256)), "b": jnp.ones((256, 256))}
    size = 2 * 256 * 256 * 4

    def memory(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
            params, optimizer.init(params), params
        )
        return compiled.compile().memory_analysis()

    plain = memory(optax.adam(1e-3))
    chain = optax.chain(optax.adam(1e-3), ema_params(0.9, update_every=every))
    averaged = memory(chain)
    slack = 4096  # scalars
    assert averaged.temp_size_in_bytes <= plain.temp_size_in_bytes + slack
    extra = averaged.argument_size_in_bytes - plain.argument_size_in_bytes
    assert size <= extra <= size + slack
    assert averaged.alias_size_in_bytes >= averaged.output_size_in_bytes - slack


def test_checkpoint_round_trip_of_a_run_continues_bit_by_bit(tmp_path):
    optimizer = optax.chain(
        optax.sgd(0.1), ema_params(warmup_decay(0.9), kappa=0.5, update_every=2)
    )

    @jax.jit
    def step(state):
        updates, opt_state = optimizer.update(
            state.params, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state)

    fresh = init_state({"w": jnp.arange(3.0)}, optimizer, jax.random.key(0))
    state = fresh
    for _ in range(5):
        state = step(state)
    iterator = iter(grain.MapDataset.source([0]).to_iter_dataset())
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(5, state, iterator, config={})
    with Checkpointer(tmp_path) as checkpoints:
        restored = checkpoints.restore(fresh, iterator, config={}).state
    jax.tree.map(
        np.testing.assert_array_equal,
        step(step(state)).opt_state,
        step(step(restored)).opt_state,
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state.opt_state))


# Normalisation statistics.


def test_batch_statistics_of_the_averaged_model():
    average, stats = {"mean": jnp.zeros(2)}, {"mean": jnp.ones(2, jnp.bfloat16)}
    for mode, value in (("ema", 1 - 0.9**4), ("copy", 1.0), ("skip", 0.0)):
        new = update_batch_stats(average, stats, 0.9, 4, mode=mode)
        np.testing.assert_allclose(new["mean"], value, rtol=1e-6)
        assert new["mean"].dtype == jnp.float32
    assert scale_batch_norm_momentum(0.99, 0.5) == pytest.approx(math.sqrt(0.99))


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema_params(1.5), "rho"),
        (lambda: ema_params(-0.1), "rho"),
        (lambda: ema_params(math.nan), "rho"),
        (lambda: ema_params(0.9, kappa=0), "kappa"),
        (lambda: ema_params(0.9, kappa=-1), "kappa"),
        (lambda: ema_params(0.9, kappa=math.inf), "kappa"),
        (lambda: ema_params(0.9, update_every=0), "update_every"),
        (lambda: ema_params(0.9, update_every=1.5), "update_every"),
        (lambda: ema_params(0.9, order="after"), "order"),
        (lambda: ema_params(0.9, init="ones"), "init"),
        (lambda: ema_params(0.9, batch_ref=0), "batch_ref"),
        (lambda: ema_params(0.9, kappa=2, batch_ref=64), "either kappa or batch_ref"),
        (lambda: ema_params(scale_decay(0.9, 11, "linear")), "linear"),
        (lambda: ema_from_half_life(0), "half_life"),
        (lambda: ema_from_half_life(10, batch=-1), "batch"),
        (lambda: cosine_decay(1.1, 10), "rho"),
        (lambda: cosine_decay(0.9, 0), "total"),
        (lambda: warmup_decay(0.9, -1), "power"),
        (lambda: update_average(1.0, 1.0, 2.0), "rho"),
        (lambda: update_average(1.0, 1.0, 0.5, -2), "kappa"),
        (lambda: update_average({"a": 1.0}, {"b": 1.0}, 0.5), "'a'.*'b'"),
        (lambda: update_average([1.0], (1.0,), 0.5), "differ in tree structure"),
        (
            lambda: update_average({"a": np.ones(1)}, {"a": np.ones(3)}, 0.5),
            "'a'.*shape",
        ),
        (lambda: update_batch_stats({}, {}, 0.9, mode="mean"), "mode"),
        (lambda: scale_batch_norm_momentum(0.9, 0), "kappa"),
        (lambda: ema_params(0.9, init={"a": 1.0}).init({"b": 1.0}), "init"),
        (lambda: averaged_params(optax.adam(0.1).init(jnp.ones(1))), "0 states"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls_are_explained():
    params = jnp.ones(2)
    fixed, varying = ema_params(0.9), ema_params(0.9, batch_ref=8)
    state = fixed.init(params)
    with pytest.raises(ValueError, match="params is None"):
        fixed.update(params, state)
    with pytest.raises(ValueError, match="fixed kappa"):
        fixed.update(params, state, params, batch=8)
    with pytest.raises(ValueError, match="batch_ref is set"):
        varying.update(params, state, params)
    with pytest.raises(ValueError, match="batch must be"):
        varying.update(params, state, params, batch=0.5)
    with pytest.raises(ValueError, match="2 states"):
        averaged_params(optax.chain(fixed, fixed).init(params))
    with pytest.raises(ValueError, match="differ in tree structure"):
        averaged_params(state, like={"w": params})
    with pytest.raises(ValueError, match="shape"):
        fixed.update(jnp.ones(3), state, jnp.ones(3))
    assert isinstance(state, EmaState)
