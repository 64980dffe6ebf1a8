"""The laws of actions: golden values, normalisation, gradients, draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.policies import act, bernoulli_entropy, bernoulli_logs
from diffmm.policies import log_prob as eager_log_prob

log_prob = jax.jit(eager_log_prob, static_argnames="mode")
draw = jax.jit(act, static_argnames="mode")

RNG = np.random.default_rng(0)


def every_action(n):
    return jnp.asarray(list(itertools.product((0, 1), repeat=n)), jnp.int32)


def every_order(n):
    """All ordered non-empty subsets of n items."""
    rows = []
    for size in range(1, n + 1):
        for picks in itertools.permutations(range(n), size):
            row = np.zeros(n, np.int32)
            row[list(picks)] = np.arange(1, size + 1)
            rows.append(row)
    return jnp.asarray(np.stack(rows))


def spread(row, rows):
    return jnp.broadcast_to(jnp.asarray(row)[None], (rows, len(row)))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["bernoulli", "bernoulli-argmax", "dpls"])
def test_probabilities_sum_to_one(mode, n):
    logits = RNG.normal(size=n).astype(np.float32) * 2
    actions = every_order(n) if mode == "dpls" else every_action(n)
    rows = len(actions)
    extra = {"stop_logit": RNG.normal()} if mode == "dpls" else {"beta": 0.7}
    logs = log_prob(
        spread(logits, rows), actions, jnp.ones((rows, n), bool), mode=mode,
        policy_temperature=0.8, **extra,
    )  # fmt: skip
    assert float(jnp.sum(jnp.exp(logs))) == pytest.approx(1, abs=2e-6)
    # A further position that is not allowed adds nothing, whatever its logit.
    wide = jnp.concatenate([spread(logits, rows), jnp.full((rows, 1), 3.0)], axis=1)
    zeros = jnp.zeros((rows, 1), jnp.int32)
    same = log_prob(
        wide, jnp.concatenate([actions, zeros], axis=1),
        jnp.concatenate([jnp.ones((rows, n), bool), zeros > 0], axis=1), mode=mode,
        policy_temperature=0.8, **extra,
    )  # fmt: skip
    np.testing.assert_allclose(same, logs, atol=1e-6)


def test_golden_values():
    pair = jnp.array([-2.0, -2.0])
    both = jnp.ones(2, bool)
    assert float(log_prob(pair, jnp.array([1, 0]), both)) == pytest.approx(
        -2.253856, abs=1e-6
    )
    forced = log_prob(
        jnp.array([-2.0, -1.0]), jnp.array([0, 1]), both, mode="bernoulli-argmax"
    )
    assert float(jnp.exp(forced)) == pytest.approx(0.236883 + 0.643914, abs=1e-6)
    three = jnp.log(jnp.array([1.0, 2.0, 3.0]))
    for order, probability in [
        ([0, 0, 1], 0.125),
        ([0, 2, 1], 0.125),
        ([3, 2, 1], 0.125),
        ([0, 1, 2], 0.1),
        ([1, 0, 0], 0.0277778),
    ]:
        log = log_prob(three, jnp.array(order), jnp.ones(3, bool), mode="dpls")
        assert float(jnp.exp(log)) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("mode", ["bernoulli", "bernoulli-argmax", "dpls"])
def test_nothing_allowed_is_certain_and_others_have_no_gradient(mode):
    logits = jnp.array([[1.0, 40.0, -3.0, 60.0]])
    nothing = jnp.zeros((1, 4), bool)
    empty = jnp.zeros((1, 4), jnp.int32)
    assert float(log_prob(logits, empty, nothing, mode=mode)[0]) == 0.0
    allowed = jnp.array([[True, False, True, False]])
    action = jnp.array([[1, 0, 0, 0]])

    def total(logits):
        return jnp.sum(log_prob(logits, action, allowed, mode=mode))

    gradient = np.asarray(jax.grad(total)(logits))[0]
    assert gradient[[0, 2]].all()
    np.testing.assert_array_equal(gradient[[1, 3]], 0)
    # Extreme logits keep finite gradients.
    assert np.isfinite(jax.grad(total)(logits * 1e3)).all()


def test_logarithms_stay_exact_where_probabilities_round():
    log_s, log_not = bernoulli_logs(jnp.array([-60.0, 60.0]))
    np.testing.assert_allclose(log_s, [-60, 0], atol=1e-6)
    np.testing.assert_allclose(log_not, [0, -60], atol=1e-6)
    log_s, log_not = bernoulli_logs(jnp.array([0.0, 3.0]), beta=1.5)
    np.testing.assert_allclose(jnp.exp(log_s), [0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(log_not), [0.25, 0.0], rtol=1e-6)
    one = bernoulli_logs(jnp.linspace(-9, 9, 7), 0.5, 1.0)
    close = bernoulli_logs(jnp.linspace(-9, 9, 7), 0.5, 1.0 - 1e-7)
    np.testing.assert_allclose(one[0], close[0], atol=1e-6)


def test_entropy_by_enumeration():
    logits = jnp.array([0.3, -1.0, 2.0, 5.0])
    allowed = jnp.array([True, True, True, False])
    actions = every_action(3)
    logs = log_prob(spread(logits[:3], 8), actions, jnp.ones((8, 3), bool))
    expected = -float(jnp.sum(jnp.exp(logs) * logs))
    assert float(bernoulli_entropy(logits, allowed)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("mode", "extra"),
    [
        ("bernoulli", {"beta": 1.3}),
        ("bernoulli-argmax", {}),
        ("dpls", {"stop_logit": 0.4}),
    ],
)
def test_draws_follow_the_likelihood(mode, extra):
    n, draws = 3, 20_000
    logits, allowed = jnp.array([-1.0, 0.5, 1.0, 9.0]), jnp.array([True] * n + [False])
    keys = jax.random.split(jax.random.key(3), 3)
    uniforms = (
        jax.random.uniform(keys[0], (draws, n + 1)),
        jax.random.uniform(keys[1], (draws, n + 1)),
        jax.random.uniform(keys[2], (draws,)),
    )
    numbers = {"mode": mode, "policy_temperature": 0.7, **extra}
    drawn = draw(uniforms, spread(logits, draws), spread(allowed, draws), **numbers)
    assert not np.asarray(drawn[:, n]).any()
    table = every_order(n) if mode == "dpls" else every_action(n)
    same = jnp.all(drawn[:, None, :n] == table[None], axis=-1)
    assert bool(jnp.all(jnp.sum(same.astype(jnp.int32), axis=1) == 1))
    counts = np.asarray(jnp.sum(same.astype(jnp.int32), axis=0))
    rows = len(table)
    law = np.exp(
        log_prob(spread(logits[:n], rows), table, jnp.ones((rows, n), bool), **numbers)
    )
    assert not counts[law < 1e-20].any()
    if mode != "bernoulli":
        assert np.asarray(drawn).any(axis=1).all()
    keep = law > 1e-20
    chi2 = ((counts - draws * law)[keep] ** 2 / (draws * law)[keep]).sum()
    freedom = keep.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 6  # four sigmas and the tail


def test_refuses_bad_arguments():
    b, u, a = jnp.zeros(2), jnp.array([0, 1]), jnp.array([True, False])
    with pytest.raises(ValueError, match="allowed"):
        eager_log_prob(b, u, a)
    u = jnp.array([1, 0])
    for name, value in [
        ("policy_temperature", 0.0),
        ("policy_temperature", float("nan")),
        ("beta", 0.0),
        ("mode", "greedy"),
    ]:
        with pytest.raises(ValueError, match=name):
            eager_log_prob(b, u, a, **{name: value})
    with pytest.raises(ValueError, match="beta"):
        eager_log_prob(b, u, a, mode="dpls", beta=2.0)
