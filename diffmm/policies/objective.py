"""What an update maximises: groups compared with their mean, ratios that are clipped.

Several rollouts of each prompt are compared with their mean. There is no division by a
standard deviation, which would blow up groups that differ by a few forwards only, and
no penalty on the distance to an earlier policy.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106; Shao et al., "DeepSeekMath", arXiv 2402.03300; Liu et al., "Understanding
  R1-Zero-Like Training", arXiv 2503.20783.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from diffmm.policies.actions import check_mode
from diffmm.policies.replay import CHUNK
from diffmm.typing import Array, ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What an update maximises.

    Attributes:
      group_size: G, rollouts of the policy per prompt.
      num_experts: E, rollouts of an expert per prompt.
      epsilon: ε > 0, ratios are clipped to [1 − ε, 1 + ε].
      num_updates: μ, optimiser steps per batch of rollouts.
      mode: the law of actions: ``"bernoulli"``, ``"dpls"``, or ``"bernoulli-argmax"``:
        progress is forced in training as it is in use, and the likelihood is that of
        the forced outcome.
      policy_temperature: τ of rollouts and likelihoods.
      per_position: clip the ratio of every position by itself, and not the joint one,
        which leaves the interval soon where many positions act. Bernoulli only.
      entropy_bonus: weight of the policy's entropy per step, nats.
      kl_weight: must be 0; the method has no such term.
      chunk: steps that go through the network together.
    """

    group_size: int = 8
    num_experts: int = 0
    epsilon: float = 0.5
    num_updates: int = 2
    mode: str = "bernoulli"
    policy_temperature: float = 1.0
    per_position: bool = False
    entropy_bonus: float = 0.0
    kl_weight: float = 0.0
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        check_mode(self.mode, self.policy_temperature)
        if self.num_experts < 0:
            raise ValueError(
                f"num_experts must be at least 0, got {self.num_experts!r}"
            )
        if self.group_size < 1 or self.group_size + self.num_experts < 2:
            raise ValueError(
                f"group_size must be at least 2, or 1 with experts, got "
                f"{self.group_size!r} with {self.num_experts} experts"
            )
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(
                f"epsilon must be finite and above 0, got {self.epsilon!r}"
            )
        if self.num_updates < 1 or self.chunk < 1:
            raise ValueError(
                f"num_updates and chunk must be at least 1, got {self.num_updates!r} "
                f"and {self.chunk!r}"
            )
        if self.per_position and self.mode != "bernoulli":
            raise ValueError(
                f"per_position needs mode='bernoulli', got {self.mode!r}: other laws "
                f"are no product over positions"
            )
        if not (math.isfinite(self.entropy_bonus) and self.entropy_bonus >= 0):
            raise ValueError(
                f"entropy_bonus must be finite and at least 0, got "
                f"{self.entropy_bonus!r}"
            )
        if self.entropy_bonus and self.mode == "dpls":
            raise ValueError("entropy_bonus needs a Bernoulli mode, got mode='dpls'")
        if self.kl_weight != 0:
            raise ValueError(
                f"kl_weight must be 0: the objective has no such term, got "
                f"{self.kl_weight!r}"
            )


def advantages(rewards: Array) -> Array:
    """Rewards float32 ``[groups, G + E]`` minus the mean of their group.

    >>> print(advantages(jnp.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])))
    [[ 0.5 -0.5 -0.5  0.5]
     [ 0.   0.   0.   0. ]]
    """
    return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def es_mixture(log_likelihood: Array, group_size: int, num_experts: int) -> Array:
    """log(G/(G + E)·π + 1/(G + E)): the law that an expert's action was drawn from.

    Each expert knows its own action alone, hence 1/(G + E). The imitation that follows
    has weight G·π/(G·π + 1) and is as good as off until π nears 1/G; before, experts
    only move the mean of the group.

    Args:
      log_likelihood: log π, float32 ``[...]``.
      group_size: G.
      num_experts: E.

    Returns:
      float32 ``[...]``.

    >>> print(f"{es_mixture(jnp.float32(-38.0), 8, 1):.6f}")
    -2.197225
    """
    if not num_experts:
        return log_likelihood
    total = math.log(group_size + num_experts)
    return jnp.logaddexp(log_likelihood + (math.log(group_size) - total), -total)


def clipped_objective(
    new: Array, old: Array, advantage: Array, epsilon: ArrayLike | float
) -> Array:
    """min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) with ρ = exp(new − old); all ``[...]``."""
    ratio = jnp.exp(new - old)
    clipped = jnp.clip(ratio, 1.0 - epsilon, 1.0 + epsilon)
    return jnp.minimum(ratio * advantage, clipped * advantage)
