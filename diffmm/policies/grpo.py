"""Updates by group-relative policy optimisation; a step of the sampler is an action.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffmm.policies.actions import (
    bernoulli_entropy,
    bernoulli_log_prob_per_position,
    bernoulli_logs,
    log_prob,
)
from diffmm.policies.network import PolicyConfig
from diffmm.policies.objective import Objective, clipped_objective, es_mixture
from diffmm.policies.replay import Steps, fold_steps, replay, steps_of
from diffmm.samplers import Trace
from diffmm.typing import Array, Params

# Smaller advantages than this, in all of a batch, are rounding.
_SMALLEST_ADVANTAGE = 1e-6
_SELDOM = 1e-3


class PolicyState(NamedTuple):
    """Parameters in training.

    Attributes:
      params: of the network.
      opt_state: of the optimiser.
      num_updates: int32 ``[]``, optimiser steps that were not skipped.
    """

    params: Params
    opt_state: optax.OptState
    num_updates: Array


class Experience(NamedTuple):
    """Rollouts to learn from; rows of the policy first, then those of experts.

    Attributes:
      trace: what was seen and done.
      advantage: float32 ``[B]``.
      is_expert: bool ``[B]``.
    """

    trace: Trace
    advantage: Array
    is_expert: Array


class _Sums(NamedTuple):
    """Sums over steps of the policy's own rows; ``most`` is a maximum."""

    s: Array
    allowed: Array
    often: Array
    most: Array
    entropy: Array
    clipped: Array
    steps: Array


def grpo_loss(
    params: Params,
    config: PolicyConfig,
    experience: Experience,
    objective: Objective,
    *,
    block_length: int | None = None,
) -> Array:
    """−mean over rows of the mean over their steps of `clipped_objective`.

    The gradient at the parameters that made the rollouts is that of REINFORCE with
    advantages. `update` computes the same with gradients accumulated over few steps at
    a time; this is the definition in one piece.

    Args:
      params: of the network.
      config: of the network.
      experience: rollouts.
      objective: what to maximise; the recorded likelihoods are the old ones.
      block_length: of the rollout, for policies without full context.

    Returns:
      float32 ``[]``.
    """
    steps, active, weight = _prepare(experience, config, block_length)
    old = _old_log_prob(params, config, steps, active, experience, objective)
    loss, _ = _loss(params, config, steps, active, weight, old, experience, objective)
    return loss


def update(
    state: PolicyState,
    config: PolicyConfig,
    experience: Experience,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    block_length: int | None = None,
) -> tuple[PolicyState, dict[str, Array]]:
    """Takes μ optimiser steps on one batch of rollouts; for use under ``jit``.

    Args:
      state: parameters.
      config: of the network.
      experience: rollouts of these parameters.
      objective: what to maximise.
      optimizer: of optax.
      block_length: of the rollout, for policies without full context.

    Returns:
      The new state and metrics, scalars of the first step: ``loss``, ``grad_norm``,
      ``probability_mean`` and ``probability_max`` of allowed positions,
      ``probability_often`` (share above 0.001), ``entropy`` per step, and ``clipped``,
      the share of ratios that were clipped in the last step; ``skipped`` is 1 where all
      advantages vanish and nothing changes.
    """
    steps, active, weight = _prepare(experience, config, block_length)
    old = _old_log_prob(state.params, config, steps, active, experience, objective)
    advantage = experience.advantage[steps.row]
    is_expert = experience.is_expert[steps.row]
    everything = (steps, weight, old, advantage, is_expert)

    def gradient(params: Params) -> tuple[Array, _Sums, Params]:
        def chunk(carry, picked, index, live):
            steps, weight, old, advantage, is_expert = picked
            (loss, sums), grads = jax.value_and_grad(_chunk_loss, has_aux=True)(
                params,
                config,
                steps,
                weight,
                old,
                advantage,
                is_expert,
                live,
                objective,
            )
            total, sums_before, grads_before = carry
            most = jnp.maximum(sums_before.most, sums.most)
            added = jax.tree.map(jnp.add, sums_before, sums)._replace(most=most)
            return total + loss, added, jax.tree.map(jnp.add, grads_before, grads)

        zeros = jax.tree.map(jnp.zeros_like, params)
        carry = (jnp.float32(0), _Sums(*[jnp.float32(0)] * 7), zeros)
        return fold_steps(chunk, carry, everything, active, chunk=objective.chunk)

    differs = jnp.max(jnp.abs(experience.advantage)) >= _SMALLEST_ADVANTAGE

    def step(index: Array, carry: tuple) -> tuple:
        state, before, _ = carry
        loss, sums, grads = gradient(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        new = PolicyState(params, opt_state, state.num_updates + 1)
        now = loss, sums, optax.tree.norm(grads)
        return _where(differs, new, state), _where(index == 0, now, before), sums

    # Without advantages one look without a step is left, for the metrics.
    zero = jnp.float32(0)
    nothing = _Sums(*[zero] * 7)
    count = jnp.where(differs, objective.num_updates, 1)
    carry = state, (zero, nothing, zero), nothing
    state, (loss, first, norm), last = jax.lax.fori_loop(0, count, step, carry)
    allowed, total = jnp.maximum(first.allowed, 1), jnp.maximum(first.steps, 1)
    return state, {
        "loss": loss,
        "grad_norm": norm,
        "probability_mean": first.s / allowed,
        "probability_max": first.most,
        "probability_often": first.often / allowed,
        "entropy": first.entropy / total,
        "clipped": last.clipped / total,
        "skipped": 1.0 - differs.astype(jnp.float32),
    }


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _prepare(
    experience: Experience, config: PolicyConfig, block_length: int | None
) -> tuple[Steps, Array, Array]:
    """Flat steps, which took place, and the weight 1/(B · steps of the row) of each."""
    trace, is_expert = experience.trace, experience.is_expert
    # An expert is imitated on the whole canvas, whatever blocks it went through.
    allowed = jnp.where(is_expert[:, None, None], trace.masked, trace.allowed)
    exists = jnp.broadcast_to(trace.exists[:, None], allowed.shape)
    trace = trace._replace(allowed=allowed & exists)
    steps, active = steps_of(trace, config, block_length=block_length)
    num_rows = len(is_expert)
    taken = jnp.sum(active.reshape(num_rows, -1).astype(jnp.float32), axis=1)
    weight = 1.0 / (num_rows * jnp.maximum(taken, 1.0))
    return steps, active, weight[steps.row]


def _old_log_prob(
    params: Params,
    config: PolicyConfig,
    steps: Steps,
    active: Array,
    experience: Experience,
    objective: Objective,
) -> Array:
    """Likelihoods under the rollouts' parameters: ``[M]``, or ``[M, N]`` by position.

    Those of the policy's rows were recorded; others take one replay.
    """
    if not (objective.num_experts or objective.per_position):
        return steps.log_likelihood
    params = jax.lax.stop_gradient(params)

    def chunk(old, picked, index, live):
        new = _log_prob(replay(params, config, picked), picked, objective)
        at = jnp.where(live, index, len(old))
        return old.at[at].set(new, mode="drop")

    shape = steps.action.shape if objective.per_position else active.shape
    old = jnp.zeros(shape, jnp.float32)
    old = fold_steps(chunk, old, steps, active, chunk=objective.chunk)
    if objective.per_position:
        return old
    return jnp.where(experience.is_expert[steps.row], old, steps.log_likelihood)


def _log_prob(logits: Array, steps: Steps, objective: Objective) -> Array:
    if objective.per_position:
        return bernoulli_log_prob_per_position(
            logits,
            steps.action,
            steps.allowed,
            policy_temperature=objective.policy_temperature,
        )
    return log_prob(
        logits,
        steps.action,
        steps.allowed,
        mode=objective.mode,
        policy_temperature=objective.policy_temperature,
    )


def _loss(
    params: Params,
    config: PolicyConfig,
    steps: Steps,
    active: Array,
    weight: Array,
    old: Array,
    experience: Experience,
    objective: Objective,
) -> tuple[Array, _Sums]:
    advantage = experience.advantage[steps.row]
    is_expert = experience.is_expert[steps.row]
    return _chunk_loss(
        params, config, steps, weight, old, advantage, is_expert, active, objective
    )


def _chunk_loss(
    params: Params,
    config: PolicyConfig,
    steps: Steps,
    weight: Array,
    old: Array,
    advantage: Array,
    is_expert: Array,
    live: Array,
    objective: Objective,
) -> tuple[Array, _Sums]:
    """The share of some steps in the loss; all arguments ``[chunk, ...]``."""
    group = objective.group_size, objective.num_experts
    logits = replay(params, config, steps)
    new = _log_prob(logits, steps, objective)
    temperature = objective.policy_temperature
    if objective.per_position:
        a = jnp.broadcast_to(advantage[:, None], new.shape)
        gain = clipped_objective(new, old, a, objective.epsilon) - a
        gain = advantage + jnp.sum(jnp.where(steps.allowed, gain, 0.0), axis=-1)
        new, old = jnp.sum(new, axis=-1), jnp.sum(old, axis=-1)
        if objective.num_experts:
            joint = es_mixture(new, *group), es_mixture(old, *group)
            expert = clipped_objective(*joint, advantage, objective.epsilon)
            gain = jnp.where(is_expert, expert, gain)
    else:
        if objective.num_experts:
            new = jnp.where(is_expert, es_mixture(new, *group), new)
            old = jnp.where(is_expert, es_mixture(old, *group), old)
        gain = clipped_objective(new, old, advantage, objective.epsilon)
    own = live & ~is_expert
    entropy = -new
    if objective.mode != "dpls":
        entropy = bernoulli_entropy(
            logits, steps.allowed, policy_temperature=temperature
        )
        gain = gain + objective.entropy_bonus * jnp.where(own, entropy, 0.0)
    loss = -jnp.sum(jnp.where(live, weight * gain, 0.0))

    s = jnp.exp(bernoulli_logs(logits, temperature)[0])
    acts = steps.allowed & own[:, None]
    clipped = jnp.abs(jnp.exp(new - old) - 1.0) > objective.epsilon
    count = [acts, acts & (s > _SELDOM), own & clipped, own]
    allowed, often, clips, total = (jnp.sum(x.astype(jnp.float32)) for x in count)
    sums = _Sums(
        s=jnp.sum(jnp.where(acts, s, 0.0)),
        allowed=allowed,
        often=often,
        most=jnp.max(jnp.where(acts, s, 0.0)),
        entropy=jnp.sum(jnp.where(own, entropy, 0.0)),
        clipped=clips,
        steps=total,
    )
    return loss, jax.tree.map(jax.lax.stop_gradient, sums)
