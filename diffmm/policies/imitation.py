"""Supervised learning from what any sampler did: also a warm start of reinforcement.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from diffmm.policies.actions import bernoulli_log_prob
from diffmm.policies.network import PolicyConfig
from diffmm.policies.optimizers import Recipe, optimizer_of
from diffmm.policies.replay import CHUNK, Steps, fold_steps, replay, steps_of
from diffmm.samplers import Trace
from diffmm.typing import Array, Params


def imitation_loss(
    params: Params,
    config: PolicyConfig,
    trace: Trace,
    *,
    block_length: int | None = None,
) -> Array:
    """Binary cross-entropy of a recorded sampler's decisions under the policy.

    Args:
      params: of the network.
      config: of the network.
      trace: of `diffmm.samplers.sample` with any rule.
      block_length: of the sampler, for policies without full context.

    Returns:
      float32 ``[]``, nats per allowed position of every turn.
    """
    steps, active = steps_of(trace, config, block_length=block_length)

    def chunk(carry, picked, index, live):
        loss, count = _summed_loss(params, config, picked, live)
        return carry[0] + loss, carry[1] + count

    loss, count = fold_steps(chunk, (jnp.float32(0), jnp.float32(0)), steps, active)
    return loss / jnp.maximum(count, 1.0)


@functools.partial(
    jax.jit,
    static_argnames=("config", "num_steps", "recipe", "batch_size", "block_length"),
)
def imitate(
    params: Params,
    config: PolicyConfig,
    trace: Trace,
    key: Array,
    *,
    num_steps: int,
    recipe: Recipe,
    batch_size: int = CHUNK,
    block_length: int | None = None,
) -> tuple[Params, Array]:
    """Trains a Bernoulli policy to decide as a recorded sampler did.

    Args:
      params: to start from; see `diffmm.policies.init`.
      config: of the network.
      trace: of `diffmm.samplers.sample` with any rule.
      key: chooses the turns of each optimiser step.
      num_steps: optimiser steps.
      recipe: of the optimiser.
      batch_size: turns per optimiser step.
      block_length: of the sampler, for policies without full context.

    Returns:
      ``(params, losses)``, the losses float32 ``[num_steps]`` in nats per decision.
    """
    optimizer = optimizer_of(recipe)
    steps, active = steps_of(trace, config, block_length=block_length)
    order = jnp.argsort(~active, stable=True)
    count = jnp.sum(active.astype(jnp.int32))

    def loss_of(params: Params, picked: Steps, live: Array) -> Array:
        loss, decisions = _summed_loss(params, config, picked, live)
        return loss / jnp.maximum(decisions, 1.0)

    def one(carry, key):
        params, opt_state = carry
        index = order[jax.random.randint(key, (batch_size,), 0, jnp.maximum(count, 1))]
        picked = jax.tree.map(lambda leaf: leaf[index], steps)
        loss, grads = jax.value_and_grad(loss_of)(params, picked, active[index])
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), loss

    carry = params, optimizer.init(params)
    (params, _), losses = jax.lax.scan(one, carry, jax.random.split(key, num_steps))
    return params, losses


def _summed_loss(
    params: Params, config: PolicyConfig, steps: Steps, live: Array
) -> tuple[Array, Array]:
    logits = replay(params, config, steps)
    allowed = steps.allowed & live[:, None]
    loss = -jnp.sum(bernoulli_log_prob(logits, steps.action, allowed))
    return loss, jnp.sum(allowed.astype(jnp.float32))
