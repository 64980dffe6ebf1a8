"""Rewards, advantages, the clipped objective, experts, the update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies_toy import TINY, params_of, run, toy

from diffmm.policies import (
    Experience,
    Objective,
    PolicyRule,
    PolicyState,
    Training,
    additive_reward,
    advantages,
    clipped_objective,
    es_mixture,
    grpo_loss,
    multiplicative_reward,
    repeat_rows,
    row_reward,
    update,
)
from diffmm.policies.replay import concatenate_traces
from diffmm.samplers import Threshold

CANVAS = repeat_rows(toy.prompts(np.random.default_rng(0), 3), 2)
GROUPS = Objective(group_size=2, chunk=16)


def test_rewards():
    r = multiplicative_reward
    assert float(r(1, 64, 256, 0.3)) == pytest.approx(0.918745, abs=1e-6)
    assert float(r(1, 256, 256, 0.3)) == pytest.approx(0.189465, abs=1e-6)
    assert float(r(1, 300, 256, 0.3)) == float(r(1, 256, 256, 0.3))
    correct = jnp.array([0.0, 1.0, 0.5])
    np.testing.assert_array_equal(r(correct, jnp.ones(3), 16, 3.0), correct)
    np.testing.assert_array_equal(r(correct, jnp.full(3, 9), 16, 0.0), correct)
    assert float(r(1, 16, 16, 2.0)) == pytest.approx(16**-2.0)
    assert float(additive_reward(1, 4, 16, 0.5)) == pytest.approx(1 - 0.5 / 4)
    for bad in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="alpha"):
            r(1, 1, 4, bad)


def test_rewards_of_rows_on_the_host():
    seen = []

    def ends_well(prompt, completion):
        seen.append((prompt, completion))
        return float(completion[-1] == prompt[0])

    scores = row_reward(ends_well)(
        jnp.array([[7, -1], [7, 2]]), jnp.array([[1, 7], [7, -1]])
    )
    np.testing.assert_array_equal(scores, [1, 1])
    assert seen == [([7], [1, 7]), ([7, 2], [7])]


def test_advantages_of_groups():
    rng = np.random.default_rng(0)
    a = advantages(jnp.asarray(rng.random((5, 4)), jnp.float32))
    np.testing.assert_allclose(jnp.sum(a, axis=1), 0, atol=1e-6)
    # All wrong: the product says nothing, the difference rewards haste.
    nfe = jnp.array([[3, 9, 16, 4]])
    wrong = jnp.zeros((1, 4))
    assert not np.asarray(advantages(multiplicative_reward(wrong, nfe, 16, 1.0))).any()
    collapse = advantages(additive_reward(wrong, nfe, 16, 0.5))
    np.testing.assert_allclose(
        collapse, 0.5 * (jnp.mean(nfe.astype(jnp.float32)) - nfe) / 16, atol=1e-6
    )


def test_clipped_objective_is_the_smaller_of_two():
    ratio = np.array([0.2, 0.9, 1.0, 1.2, 3.0], np.float32)
    for a in (1.0, -1.0):
        value = clipped_objective(jnp.log(ratio), jnp.zeros(5), jnp.full(5, a), 0.5)
        expected = np.minimum(ratio * a, np.clip(ratio, 0.5, 1.5) * a)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_expert_mixture():
    log = jnp.float32(-38.0)
    value, weight = jax.value_and_grad(es_mixture)(log, 8, 1)
    assert float(value) == pytest.approx(-2.197225, abs=1e-6)
    assert float(weight) == pytest.approx(2.5e-16, rel=0.05)
    assert float(es_mixture(log, 8, 0)) == float(log)
    near = jax.grad(es_mixture)(jnp.log(jnp.float32(1 / 8)), 8, 1)
    assert float(near) == pytest.approx(0.5, abs=1e-6)


@functools.cache
def experience(num_experts=0):
    """Rollouts with arbitrary rewards."""
    trace = run(CANVAS).trace
    rows = len(CANVAS.tokens)
    rng = np.random.default_rng(1)
    if num_experts:
        expert = run(repeat_rows(toy.prompts(rng, 3), 1), Threshold(threshold=0.8))
        trace = concatenate_traces(trace, expert.trace)
    total = len(trace.masked)
    gain = jnp.asarray(rng.normal(size=total), jnp.float32)
    return Experience(trace, gain, jnp.arange(total) >= rows)


@functools.partial(jax.jit, static_argnames=("objective", "optimizer"))
def updated(state, batch, objective, optimizer):
    return update(state, TINY, batch, objective, optimizer)


SGD = optax.sgd(1.0)
ADAM = optax.adamw(0.01)  # its decay moves parameters even without a gradient


def start(optimizer=SGD):
    params = params_of()
    return PolicyState(params, optimizer.init(params), jnp.int32(0))


def assert_tree_close(left, right, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right
    )


@pytest.mark.slow
def test_the_first_gradient_is_that_of_reinforce():
    """−mean over rows of A · mean over steps of ∇log π, whatever ε and chunks."""
    from diffmm.policies import log_prob, replay, steps_of

    batch = experience()

    def reinforce(params):
        steps, active = steps_of(batch.trace, TINY)
        logs = log_prob(replay(params, TINY, steps), steps.action, steps.allowed)
        logs = jnp.where(active, logs, 0.0).reshape(len(batch.advantage), -1)
        taken = jnp.sum(active.reshape(logs.shape).astype(jnp.float32), axis=1)
        return -jnp.mean(batch.advantage * jnp.sum(logs, axis=1) / taken)

    expected = jax.jit(jax.grad(reinforce))(params_of())
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.05
    for objective in (
        dataclasses.replace(GROUPS, num_updates=1),
        dataclasses.replace(GROUPS, num_updates=1, per_position=True, chunk=1000),
    ):
        new, metrics = updated(start(), batch, objective, SGD)
        step = jax.tree.map(jnp.subtract, params_of(), new.params)
        assert_tree_close(step, expected, atol=3e-5)
        assert int(new.num_updates) == 1
        assert float(metrics["clipped"]) == 0
        mean = float(jnp.mean(batch.advantage))
        assert float(metrics["loss"]) == pytest.approx(-mean, abs=1e-5)  # all ρ are 1


@pytest.mark.parametrize("changes", [{"num_experts": 1, "entropy_bonus": 0.1}])
def test_updates_follow_the_definition_of_the_loss(changes):
    objective = dataclasses.replace(GROUPS, num_updates=1, **changes)
    batch = experience(objective.num_experts)
    new, metrics = updated(start(), batch, objective, SGD)
    loss, grads = jax.jit(
        jax.value_and_grad(lambda params: grpo_loss(params, TINY, batch, objective))
    )(params_of())
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=1e-5)
    step = jax.tree.map(jnp.subtract, params_of(), new.params)
    assert_tree_close(step, grads, atol=3e-5)


@pytest.mark.slow
def test_experts_that_are_none_change_nothing():
    batch = experience()
    objective = dataclasses.replace(GROUPS, num_experts=1, num_updates=1)
    plain = dataclasses.replace(objective, num_experts=0)
    one, _ = updated(start(), batch, objective, SGD)
    two, _ = updated(start(), batch, plain, SGD)
    assert_tree_close(one.params, two.params, atol=1e-6)


def test_experts_are_imitated_on_the_whole_canvas():
    from diffmm.policies.grpo import _prepare

    trace = run(CANVAS, Threshold(threshold=0.8), block_length=4).trace
    assert np.asarray(trace.allowed).sum(-1).max() == 4
    rows = len(CANVAS.tokens)
    batch = Experience(trace, jnp.ones(rows), jnp.ones(rows, bool))
    steps, active, weight = _prepare(batch, TINY, None)
    masked = np.asarray(trace.masked).reshape(-1, 16)
    at = np.asarray(active)
    np.testing.assert_array_equal(steps.allowed[at], masked[at])
    assert float(jnp.sum(jnp.where(active, weight, 0.0))) == pytest.approx(1, abs=1e-5)


def test_ratios_are_clipped_from_the_second_step_on():
    objective = dataclasses.replace(GROUPS, num_updates=3, epsilon=1e-4)
    new, metrics = updated(start(ADAM), experience(), objective, ADAM)
    assert float(metrics["clipped"]) > 0.5
    assert int(new.num_updates) == 3


def test_equal_rewards_are_skipped():
    batch = experience()._replace(advantage=jnp.full((6,), 5e-7))
    objective = dataclasses.replace(GROUPS, num_updates=3, epsilon=1e-4)
    new, metrics = updated(start(ADAM), batch, objective, ADAM)
    jax.tree.map(np.testing.assert_array_equal, new.params, params_of())
    assert int(new.num_updates) == 0
    assert float(metrics["skipped"]) == 1
    assert 0 < float(metrics["probability_mean"]) < 1


def test_metrics_describe_the_policy_alone():
    objective = dataclasses.replace(GROUPS, num_updates=1, num_experts=1)
    batch = experience(1)
    _, metrics = updated(start(), batch, objective, SGD)
    own = jax.tree.map(lambda x: x[:6], batch.trace)
    plain = dataclasses.replace(GROUPS, num_updates=1)
    alone = Experience(own, batch.advantage[:6], jnp.zeros(6, bool))
    _, expected = updated(start(), alone, plain, SGD)
    for name in ("probability_mean", "probability_max", "probability_often", "entropy"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("group_size", {"group_size": 1}),
        ("epsilon", {"epsilon": 0.0}),
        ("kl_weight", {"kl_weight": 0.01}),
        ("num_experts", {"num_experts": -1}),
        ("mode", {"mode": "greedy"}),
        ("per_position", {"per_position": True, "mode": "dpls"}),
        ("policy_temperature", {"policy_temperature": 0.0}),
        ("entropy_bonus", {"entropy_bonus": -1.0}),
        ("num_updates", {"num_updates": 0}),
    ],
)
def test_refuses_bad_objectives(field, changes):
    with pytest.raises(ValueError, match=field):
        Objective(**changes)


def test_refuses_bad_training():
    assert Objective(group_size=1, num_experts=1).group_size == 1
    with pytest.raises(ValueError, match="alpha"):
        Training(alpha=-1.0)
    with pytest.raises(ValueError, match="reward"):
        Training(reward="product")
    with pytest.raises(ValueError, match="window"):
        Training(window=0)
    assert isinstance(PolicyRule(params=params_of(), config=TINY), PolicyRule)
