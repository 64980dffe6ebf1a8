import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmm.optim.batch_ramp import BatchRamp, change_batch, ramp, remap_count
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.rates import scale_beta
from diffmm.optim.schedules import TokenSchedule, WarmupCosine, by_steps
from diffmm.optim.sde import Budget, scale_by_kappa

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def _filled(tx, count, params=PARAMS):
    """A state with all counters at ``count`` and positive numbers elsewhere."""
    generator = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(generator.uniform(0.1, 1, leaf.shape), leaf.dtype)
        return jnp.full_like(leaf, count)

    return jax.tree.map(fill, tx.init(params))


# Counts -----------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 1e3))
def test_remapped_count_is_the_rounded_quotient(count, kappa):
    got = remap_count(count, kappa)
    exact = count / kappa
    expected = min(max(1, exact), 2**31 - 1) if count else 0
    # Half a step, and rounding of the quotient.
    assert abs(got - expected) <= 0.5 + 1e-15 * exact


def test_remapped_count_on_the_device_equals_the_host():
    generator = np.random.default_rng(0)
    counts = np.concatenate([np.arange(70), generator.integers(0, 2**31 - 1, 200)])
    # Batches of up to 2^15 or so have exact ratios; those of others may round to the
    # neighbour.
    ratios = (2, 4, 0.5, 16, 1.5, 96 / 250, 1000 / 7, 30_000 / 30_011, 1e-3, 1e5)
    for kappa in (*ratios, math.pi, 0.99999, 1 / math.e, 1e-5, 1234.567):
        expected = [remap_count(count, kappa) for count in counts.tolist()]
        got = remap_count(jnp.asarray(counts, jnp.int32), kappa)
        assert got.dtype == jnp.int32
        slack = 0 if kappa in ratios else 1
        # A difference of int32 must not wrap.
        assert np.abs(np.asarray(got, np.int64) - expected).max() <= slack


def test_ties_and_ends():
    assert [remap_count(count, 2) for count in (1, 3, 5, 33)] == [1, 2, 2, 16]
    assert remap_count(0, 0.1) == 0
    assert remap_count(3, 16) == 1
    assert remap_count(2**31 - 1, 0.5) == 2**31 - 1
    assert remap_count(12345, 1) == 12345


# States -----------------------------------------------------------------------------


def _schedule(count):
    return 1e-3 / (1 + count)


TRANSFORMATIONS = {
    "adamw": optax.adamw(_schedule),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.chain(optax.adam(_schedule))
    ),
    "masked": optax.masked(optax.adamw(_schedule), {"w": True, "b": False}),
    "multi_transform": optax.multi_transform(
        {"x": optax.adamw(_schedule), "y": optax.adam(_schedule)},
        {"w": "x", "b": "y"},
    ),
    "multi_steps": optax.MultiSteps(
        optax.adamw(_schedule), 1
    ).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=_schedule),
    "amsgrad": optax.amsgrad(_schedule),
    "adabelief": optax.adabelief(_schedule),
    "mu in bfloat16": optax.adamw(_schedule, mu_dtype=jnp.bfloat16),
}


def _fields(state, names):
    """Leaves of the fields of that name, anywhere."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        leaf
        for path, leaf in flat
        if any(getattr(entry, "name", None) in names for entry in path)
    ]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_any_nesting(name):
    state = _filled(TRANSFORMATIONS[name], 10)
    new = change_batch(state, 4.0)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for old_leaf, new_leaf in zip(
        jax.tree.leaves(state), jax.tree.leaves(new), strict=True
    ):
        assert old_leaf.dtype == new_leaf.dtype
        assert old_leaf.shape == new_leaf.shape
    counts = _fields(new, {"count"})
    assert len(counts) >= 2  # of Adam and of the schedule
    for count in counts:
        assert int(count) == 2  # 2.5, halves to even
    seconds = zip(
        _fields(state, {"nu", "nu_max"}), _fields(new, {"nu", "nu_max"}), strict=True
    )
    for before, after in seconds:
        np.testing.assert_array_equal(before / 4, after)
    for field in ("mu", "hyperparams", "acc_grads", "gradient_step", "mini_step"):
        for before, after in zip(
            _fields(state, {field}), _fields(new, {field}), strict=True
        ):
            np.testing.assert_array_equal(before, after)


def test_under_jit_and_at_the_ends():
    state = _filled(TRANSFORMATIONS["adamw"], 33)
    eager = change_batch(state, 16.0)
    jitted = jax.jit(change_batch, static_argnums=1)(state, 16.0)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    assert int(eager[0].count) == 2
    fresh = TRANSFORMATIONS["adamw"].init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, change_batch(fresh, 7.0), fresh)
    jax.tree.map(np.testing.assert_array_equal, change_batch(state, 1), state)


def test_rmsprop_and_adagrad():
    state = _filled(optax.rmsprop(1e-3), 3)
    before, after = (_fields(s, {"nu"}) for s in (state, change_batch(state, 4)))
    np.testing.assert_allclose(after[1], before[1] / 4)
    state = _filled(optax.adagrad(1e-3), 3)
    new = change_batch(state, 4)
    before, after = (_fields(s, {"sum_of_squares"}) for s in (state, new))
    np.testing.assert_allclose(after[1], before[1] / 16)


def test_bias_correction_goes_on():
    # Product of all coefficients, before and after: continued by the exponential form.
    for kappa, switch in ((16, 32), (0.25, 7), (3, 30)):
        new_beta = scale_beta(0.99, kappa)
        count = remap_count(switch, kappa)
        for later in (1, 2, 8):
            product = 0.99**switch * new_beta**later
            assert new_beta ** (count + later) == pytest.approx(product, rel=1e-12)


def test_second_moment_after_a_switch():
    # 20 000 particles with gradient 0.05 + noise; √v̂ over the new noise.
    generator = np.random.default_rng(0)
    particles, kappa = 20_000, 16.0
    hyper = AdamW(learning_rate=1.0, b1=0.9, b2=0.99)
    tx = optax.scale_by_adam(hyper.b1, hyper.b2)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(particles))
    for _ in range(32):
        grads = jnp.asarray(0.05 + generator.standard_normal(particles), jnp.float32)
        _, state = update(grads, state)
    full = change_batch(state, kappa)
    variants = {
        "full": full,
        "moment only": full._replace(count=state.count),
        "none": state,
    }
    new = scale_by_kappa(hyper, kappa)
    tx = optax.scale_by_adam(new.b1, new.b2)
    update = jax.jit(tx.update)
    ratios = {name: [] for name in variants}
    for _ in range(8):
        noise = generator.standard_normal(particles) / math.sqrt(kappa)
        grads = jnp.asarray(0.05 + noise, jnp.float32)
        for name, value in variants.items():
            _, value = update(grads, value)
            variants[name] = value
            v = np.asarray(value.nu) / (1 - new.b2 ** int(value.count))
            ratios[name].append(np.sqrt(v).mean() * math.sqrt(kappa))
    # √v̂ of a particle scatters by about 0.25: the mean of 20 000 by 0.002.
    known = {
        "full": (0.976, 0.989),
        "moment only": (0.605, 0.885),
        "none": (1.97, 1.39),
    }
    for name, (first, last) in known.items():
        assert ratios[name][0] == pytest.approx(first, abs=0.01)
        assert ratios[name][-1] == pytest.approx(last, abs=0.01)
    assert np.all(np.abs(np.subtract(ratios["full"], 1)) < 0.05)
    assert abs(ratios["moment only"][0] - 1) > 0.3
    assert abs(ratios["none"][0] - 1) > 0.3


def test_progressive_scaling_on_a_quadratic():
    # κ 1 → 16 at half of 4096 base steps, with the average of weights (order "pre").
    paths, half = 2000, 2048
    hyper = AdamW(learning_rate=3e-3, b1=0.98, b2=0.995, ema=0.998)

    @functools.partial(jax.jit, static_argnums=0)
    def run(hyper, carry, noise):
        tx = optax.adam(hyper.learning_rate, hyper.b1, hyper.b2, hyper.eps)

        def step(carry, z):
            theta, average, state = carry
            average += (1 - hyper.ema) * (theta - average)
            updates, state = tx.update(theta + z, state)
            return (theta + updates, average, state), None

        return jax.lax.scan(step, carry, noise)[0]

    generator = np.random.default_rng(0)

    def noise(steps, kappa):
        z = generator.standard_normal((steps, paths), np.float32)
        return jnp.asarray(z * np.float32(10 / math.sqrt(kappa)))

    start = jnp.full(paths, 2.0)
    carry = (start, start, optax.adam(1.0).init(start))
    theta, average, state = run(hyper, carry, noise(half, 1))
    new = scale_by_kappa(hyper, 16)
    later = noise(half // 16, 16)
    # Known values of another 4000 paths; with a deviation of θ of 0.085, four standard
    # errors of the difference are 0.009.
    for kept, expected in ((state, (0.672, 0.779)), (None, (0.612, 0.713))):
        carry = (theta, average, change_batch(state, 16) if kept is None else kept)
        end, end_average, _ = run(new, carry, later)
        assert (end.mean(), end_average.mean()) == pytest.approx(expected, abs=0.015)
    end, end_average, _ = run(hyper, (theta, average, state), noise(half, 1))
    assert (end.mean(), end_average.mean()) == pytest.approx((0.581, 0.686), abs=0.015)


# Ramps -----------------------------------------------------------------------------

RAMP = ramp(batches=(96, 256, 64), tokens=(10_000, 40_000, 5_000))


def test_phases():
    assert RAMP.steps == (104, 156, 79)
    assert RAMP.num_steps == 339
    assert RAMP.first_steps == (0, 104, 260)
    assert RAMP.first_tokens == (0, 9984, 49920)
    assert RAMP.tokens == 54976
    assert [RAMP.phase(step) for step in (0, 103, 104, 259, 260, 999)] == [
        *(0, 0, 1, 1, 2, 2)
    ]
    assert RAMP.batch_ratio(0) == 1.0
    assert RAMP.batch_ratio(2) == 0.25
    # 104·96/256 = 39; 195·256/64 = 780.
    assert RAMP.counts == (0, 39, 780)


def test_phases_end_at_the_nearest_step():
    generator = np.random.default_rng(0)
    for _ in range(50):
        batches = generator.integers(1, 500, 4)
        tokens = generator.uniform(1000, 1e5, 4)
        steps = ramp(batches, tokens)
        ends = np.append(steps.first_tokens[1:], steps.tokens)
        assert np.all(np.abs(ends - np.cumsum(tokens)) <= batches / 2)
    assert ramp([1000, 1], [10, 10]).steps == (1, 1)


def test_share_of_the_tokens():
    batches = np.repeat(RAMP.batches, RAMP.steps)
    seen = np.append(0, np.cumsum(batches))
    steps = np.arange(RAMP.num_steps + 1)
    np.testing.assert_allclose(RAMP.fraction(steps), seen / RAMP.tokens, rtol=1e-14)
    middle = (seen[:-1] + batches / 2) / RAMP.tokens
    np.testing.assert_allclose(RAMP.fraction(steps[:-1], at="middle"), middle)
    assert RAMP.fraction(104) == pytest.approx(9984 / 54976)
    traced = jax.jit(RAMP.fraction)(jnp.asarray(steps))
    np.testing.assert_allclose(traced, seen / RAMP.tokens, atol=1e-6)


def test_share_beyond_int32():
    # 6.4e12 tokens and 1.6 million steps: the traced share errs by rounding only.
    stages = ramp(batches=(2**20, 2**21, 2**23), tokens=(0.4e12, 1e12, 5e12))
    steps = np.array([0, 1, 381_469, 381_470, 858_000, 1_400_000])
    traced = jax.jit(stages.fraction)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(traced, stages.fraction(steps), atol=2e-7)


def test_schedule_stands_still_at_a_switch():
    schedule = TokenSchedule(shape=WarmupCosine(warmup=0.3), tokens=RAMP.tokens)
    whole = RAMP.by_steps(schedule)
    steps = np.arange(RAMP.num_steps)
    expected = whole(steps)
    np.testing.assert_allclose(jax.jit(whole)(jnp.asarray(steps)), expected, atol=1e-6)

    # What the optimiser's own, remapped count reads, phase by phase.
    state = optax.adamw(_schedule).init(jnp.ones(1))
    step = 0
    for phase, length in enumerate(RAMP.steps):
        state = change_batch(state, RAMP.batch_ratio(phase))
        function = RAMP.phase_schedule(schedule, phase)
        update = jax.jit(optax.adamw(function).update)
        nearest = by_steps(schedule, RAMP.batches[phase])
        counts = int(state[2].count) + np.arange(length)
        np.testing.assert_allclose(
            jax.jit(function)(jnp.asarray(counts)), function(counts), atol=1e-6
        )
        for _ in range(length):
            count = int(state[2].count)
            assert int(state[0].count) == count
            assert function(count) == pytest.approx(expected[step], rel=1e-12)
            # The plain schedule of the phase's batch is within half a step.
            slope = math.pi / 2 / 0.3 * RAMP.batches[phase] / RAMP.tokens
            assert abs(nearest(count) - expected[step]) <= 0.5 * slope + 1e-12
            _, state = update(jnp.ones(1), state, jnp.ones(1))
            step += 1
    assert step == RAMP.num_steps


def test_uneven_ratios_lose_no_tokens():
    stages = ramp(batches=(100, 333, 70, 1024), tokens=(12_345,) * 4)
    schedule = TokenSchedule(shape=lambda x: 1 - x, tokens=stages.tokens)
    whole = stages.by_steps(schedule)
    count = 0
    for phase, first in enumerate(stages.first_steps):
        count = remap_count(count, stages.batch_ratio(phase))
        function = stages.phase_schedule(schedule, phase)
        for inside in range(stages.steps[phase]):
            expected = whole(first + inside)
            assert function(count + inside) == pytest.approx(expected, abs=1e-13)
        count += stages.steps[phase]


def test_hyperparameters_of_a_phase():
    hyper = AdamW(learning_rate=1e-3, b2=0.95, weight_decay=0.1, ema=0.999)
    base = Budget(batch=96, tokens=RAMP.tokens)
    assert RAMP.hyperparameters(hyper, base, 0) is hyper
    second = RAMP.hyperparameters(hyper, base, 1, exact_decay=True)
    assert second == scale_by_kappa(hyper, 256 / 96, exact_decay=True)
    longer = RAMP.hyperparameters(
        hyper, Budget(batch=96, tokens=RAMP.tokens / 4), 0, horizon=0.5
    )
    assert longer == scale_by_kappa(hyper, 0.5)
    # The decay of averaged weights over the ramp is that of its tokens.
    total = sum(
        steps * math.log(RAMP.hyperparameters(hyper, base, phase).ema)
        for phase, steps in enumerate(RAMP.steps)
    )
    assert total == pytest.approx(RAMP.tokens / 96 * math.log(0.999), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: change_batch(optax.adam(1.0).init(PARAMS), 0), "kappa must be posit"),
        (lambda: change_batch(optax.adam(1.0).init(PARAMS), -2), "kappa"),
        (lambda: change_batch(optax.sgd(1.0).init(PARAMS), 2), "state of Adam"),
        (lambda: change_batch({}, 2), "opt_state"),
        (lambda: remap_count(1, math.nan), "kappa"),
        (lambda: remap_count(1, 1e12), "kappa must be a ratio of batches"),
        (lambda: ramp([0.5], [10]), "batch must be at least 1"),
        (lambda: ramp([], []), "batches and tokens"),
        (lambda: ramp([1, 2], [10]), "got 2 and 1"),
        (lambda: ramp([1], [0]), "tokens must be positive"),
        (lambda: BatchRamp(batches=(1.0,), steps=(0,)), "steps"),
        (lambda: BatchRamp(batches=(1.0,), steps=(1, 2)), "got 1 and 2"),
        (lambda: RAMP.by_steps(_schedule), "TokenSchedule"),
        (lambda: RAMP.phase_schedule(_schedule, 0), "TokenSchedule"),
        (lambda: RAMP.fraction(0, at="centre"), "at must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
