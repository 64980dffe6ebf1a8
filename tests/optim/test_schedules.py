import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmm.optim.schedules import (
    TokenSchedule,
    WarmupCosine,
    by_steps,
    group_steps,
    require_token_schedule,
    warmup_cosine,
    warmup_fraction,
)
from diffmm.optim.sde import Budget, logical_batch

BASE = Budget(batch=2**18, tokens=1.3e10)


def _constant():
    return TokenSchedule(shape=lambda x: 1.0 + 0.0 * x, tokens=1e9)


def test_shape_of_warmup_cosine():
    shape = WarmupCosine(warmup=0.2, final_ratio=0.1)
    x = np.array([0, 0.1, 0.2, 0.6, 1.0])
    np.testing.assert_allclose(shape(x), [0, 0.5, 1, 0.55, 0.1], atol=1e-15)
    assert WarmupCosine()(0.0) == 1.0
    fine = np.linspace(0, 1, 1001)
    assert np.max(np.abs(np.diff(shape(fine)))) < 0.006  # continuous
    np.testing.assert_allclose(
        jax.jit(shape)(jnp.asarray(x, jnp.float32)), shape(x), atol=1e-6
    )


def test_clock_is_tokens():
    schedule = TokenSchedule(shape=WarmupCosine(), tokens=6.4e12)
    assert schedule(3.2e12) == pytest.approx(0.5)
    assert schedule(7e12) == schedule.at(1.0) == schedule.at(1.5)
    assert schedule.at(-0.1) == 1.0
    got = jax.jit(schedule.at)(jnp.float32(0.25))
    assert got == pytest.approx(float(schedule.at(0.25)), abs=1e-6)


@pytest.mark.parametrize("at", ["start", "middle", "end"])
def test_by_steps_beyond_int32_tokens(at):
    schedule = TokenSchedule(shape=WarmupCosine(warmup=0.01), tokens=6.4e12)
    function = by_steps(schedule, 2**22, at=at)
    offset = {"start": 0, "middle": 0.5, "end": 1}[at]
    counts = np.array([0, 1, 5000, 600_000, 1_525_878, 2_000_000])
    expected = [schedule((count + offset) * 2**22) for count in counts.tolist()]
    np.testing.assert_allclose(function(counts), expected, rtol=1e-12)
    assert function(5000) == pytest.approx(expected[2], rel=1e-12)
    traced = jax.jit(function)(jnp.asarray(counts, jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, atol=3e-7)


def test_by_steps_drives_optax():
    schedule = TokenSchedule(shape=WarmupCosine(warmup=0.5), tokens=64)
    function = by_steps(schedule, 16)
    tx = optax.scale_by_schedule(function)
    state = tx.init(jnp.ones(2))
    seen = []
    for _ in range(4):
        update, state = tx.update(jnp.ones(2), state)
        seen.append(float(update[0]))
    np.testing.assert_allclose(seen, [function(count) for count in range(4)], rtol=1e-6)


def test_middle_of_the_step_is_second_order():
    # Σ η² B over a run moves with the batch: B² for the middle, B for the start.
    schedule = TokenSchedule(shape=WarmupCosine(warmup=0.25), tokens=4096)

    def time(batch, at):
        rates = by_steps(schedule, batch, at=at)(np.arange(4096 // batch))
        return np.sum(rates**2) * batch / 4096

    exact = 0.25 / 3 + 0.75 * 3 / 8
    for batch in (16, 64):
        assert abs(time(batch, "middle") - exact) < 0.3 * (batch / 4096) ** 2 / 0.25
    # A rise from 0 that reads its start loses nothing here: both ends are 0.
    open_ended = TokenSchedule(shape=WarmupCosine(), tokens=4096)

    def error(batch, at):
        rates = by_steps(open_ended, batch, at=at)(np.arange(4096 // batch))
        return abs(np.sum(rates**2) * batch / 4096 - 3 / 8)

    assert error(64, "start") / error(32, "start") == pytest.approx(2, rel=0.1)
    assert error(64, "middle") < error(64, "start") / 100


@pytest.mark.parametrize("horizon", [0.0, 0.44, 1.0])
def test_logical_warmup_does_not_see_the_batch(horizon):
    def schedule(batch, **options):
        target = Budget(batch=batch, tokens=9e10)
        return warmup_cosine(BASE, target, horizon=horizon, **options)

    one = schedule(2**18)
    assert all(schedule(batch) == one for batch in (2**12, 77_777, 2**24))
    logical = logical_batch(BASE, 9e10, horizon)
    tokens = one.shape.warmup * one.tokens
    assert tokens == pytest.approx(logical * min(1000, 0.25 * 9e10 / logical))
    # At the logical batch it is the literal rule; elsewhere that one moves.
    literal = schedule(logical, warmup="steps")
    assert literal.shape.warmup == pytest.approx(one.shape.warmup)
    assert schedule(logical * 2, warmup="steps") != literal


def test_warmup_and_duration():
    shares = [
        warmup_fraction(BASE, Budget(batch=2**20, tokens=BASE.tokens * m))
        for m in (0.5, 1, 30)
    ]
    # At γ = 1 a fixed share of the run, whatever its duration, the base run's.
    assert shares == pytest.approx([1000 / BASE.steps] * 3)
    longer = Budget(batch=2**20, tokens=1e12)
    got = warmup_fraction(BASE, longer, horizon=0.44, warmup="fraction")
    assert got == pytest.approx(shares[0])
    assert warmup_fraction(BASE, longer, horizon=0.44) < shares[0]
    # Short runs warm up over a quarter.
    short = Budget(batch=2**18, tokens=2**18 * 100)
    for warmup in ("steps", "logical"):
        assert warmup_fraction(BASE, short, warmup=warmup, horizon=0.0) == 0.25
    assert warmup_fraction(BASE, short, warmup="steps", limit=0.1) == 0.1
    assert warmup_fraction(BASE, short, warmup_steps=0) == 0.0


def test_exact_groups():
    i = np.arange(1024)
    rates = 0.01 * np.minimum((i + 1) / 100, 1) * 0.5 * (1 + np.cos(np.pi * i / 1024))
    grouped = group_steps(rates, 16, weight_decay=0.1)
    assert grouped.learning_rate.shape == (64,)
    assert np.sum(grouped.learning_rate**2) == pytest.approx(0.0318934254, abs=5e-11)
    assert np.sum(grouped.learning_rate**2) == pytest.approx(np.sum(rates**2))
    kept = np.prod(1 - grouped.shrink)
    assert kept == pytest.approx(0.6291740718, abs=5e-11)
    assert kept == pytest.approx(np.prod(1 - rates * 0.1), rel=1e-13)
    # Square-root scaling of each group's first step misses it.
    simple = 1 - (4 * rates[::16]) * (4 * 0.1)
    assert np.prod(simple) == pytest.approx(0.6277328321, abs=5e-11)


def test_groups_of_one_and_constant_groups():
    rates = np.array([0.1, 0.2])
    one = group_steps(rates, 1, weight_decay=0.3)
    np.testing.assert_allclose(one.learning_rate, rates)
    np.testing.assert_allclose(one.shrink, 0.3 * rates, rtol=1e-14)
    four = group_steps(np.full(8, 1e-3), 4, weight_decay=0.5, decay="independent")
    np.testing.assert_allclose(four.learning_rate, 2e-3)
    np.testing.assert_allclose(four.shrink, 1 - 0.5**4)
    np.testing.assert_allclose(group_steps(np.zeros(4), 2).shrink, 0.0)


def test_schedules_of_steps_are_refused():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)
    with pytest.raises(ValueError, match="schedule must be a TokenSchedule"):
        require_token_schedule(schedule)
    with pytest.raises(ValueError, match="clock is tokens"):
        by_steps(schedule, 128)
    assert require_token_schedule(_constant()).tokens == 1e9


@pytest.mark.parametrize("inside", [False, True])
def test_shapes_may_be_written_in_jax(inside):
    def make():
        return TokenSchedule(shape=lambda x: jnp.exp(-jnp.asarray(x)), tokens=8.0)

    def value(x):
        return (make() if inside else schedule).at(x)

    schedule = make()
    assert jax.jit(value)(jnp.float32(1)) == pytest.approx(math.exp(-1), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WarmupCosine(warmup=1.0), "warmup"),
        (lambda: WarmupCosine(final_ratio=1.1), "final_ratio"),
        (lambda: TokenSchedule(shape=WarmupCosine(), tokens=0), "tokens"),
        (lambda: TokenSchedule(shape=0.5, tokens=1), "shape must be a function"),
        (lambda: TokenSchedule(shape=lambda x: 3e-4, tokens=1), "relative to the peak"),
        (lambda: TokenSchedule(shape=lambda x: 2.0 * x, tokens=1), "0 to 2"),
        (lambda: TokenSchedule(shape=lambda x: x - 0.1, tokens=1), "-0.1"),
        (lambda: TokenSchedule(shape=lambda x: math.nan, tokens=1), "nan"),
        (lambda: by_steps(_constant(), 0), "tokens_per_step"),
        (lambda: by_steps(_constant(), 1, at="centre"), "'start', 'middle', 'end'"),
        (lambda: warmup_fraction(BASE, BASE, warmup="tokens"), "warmup"),
        (lambda: warmup_fraction(BASE, BASE, warmup_steps=-1), "warmup_steps"),
        (lambda: warmup_fraction(BASE, BASE, limit=1.0), "limit"),
        (lambda: warmup_fraction(BASE, BASE, horizon=-1), "horizon"),
        (lambda: group_steps([0.1] * 6, 4), "multiple of kappa=4"),
        (lambda: group_steps([0.1] * 6, 1.5), "kappa"),
        (lambda: group_steps([0.1, -0.1], 2), "learning_rates"),
        (lambda: group_steps([0.5, 0.1], 2, weight_decay=2), "weight_decay=2"),
        (lambda: group_steps([0.5, 0.1], 2, weight_decay=-2), "weight_decay"),
        (lambda: group_steps([0.5], 1, decay="l2"), "decay"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
