"""What a policy does with its logits: two laws over sets of positions.

Bernoulli: every allowed position is unmasked with probability s = σ(b/τ),
independently. Nothing may come of it, at the price of a forward; for evaluation the
best position is then forced.

Dynamic Plackett–Luce: positions are taken one after the other, each with probability
proportional to exp(b/τ) among those left, until an item called STOP, of fixed logit, is
taken. STOP cannot be first.

Everything is a function of logits ``[..., N]``, so that a rollout and its replay use
the same code. Likelihoods are float32 natural logarithms.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106; Plackett, "The Analysis of Permutations", 1975.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Array, ArrayLike

Mode = Literal["bernoulli", "bernoulli-argmax", "dpls"]
MODES: tuple[str, ...] = get_args(Mode)

# Stands for −∞ where gradients must stay finite.
_LOWEST = -1e30


def check_mode(
    mode: str, policy_temperature: Any = 1.0, beta: Any = 1.0, stop_logit: Any = 0.0
) -> None:
    """Checks on the host how actions are drawn; traced numbers pass.

    Raises:
      ValueError: naming the argument.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    for name, value in (("policy_temperature", policy_temperature), ("beta", beta)):
        if isinstance(value, jax.core.Tracer):
            continue
        if not (math.isfinite(float(value)) and float(value) > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    if isinstance(beta, jax.core.Tracer) or isinstance(stop_logit, jax.core.Tracer):
        return
    if mode == "dpls" and float(beta) != 1:
        raise ValueError(f"beta scales Bernoulli probabilities only, got {beta!r}")
    if not math.isfinite(float(stop_logit)):
        raise ValueError(f"stop_logit must be finite, got {stop_logit!r}")


def bernoulli_logs(
    logits: Array,
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
) -> tuple[Array, Array]:
    """Logarithms of s and 1 − s with s = min(1, β·σ(b/τ)).

    Args:
      logits: b, float32 ``[...]``.
      policy_temperature: τ > 0.
      beta: β > 0; above 1 unmasks more per step, without training again.

    Returns:
      Two float32 ``[...]``; log(1 − s) is a large negative number where s = 1.
    """
    beta = jnp.asarray(beta, jnp.float32)
    scaled = logits / policy_temperature
    log_s = jnp.minimum(jax.nn.log_sigmoid(scaled) + jnp.log(beta), 0.0)
    # log(1 − exp(log s)) loses digits near s = 0 and s = 1 that log σ(−b) has.
    below = log_s < -1e-7
    complement = jnp.log(-jnp.expm1(jnp.where(below, log_s, -1.0)))
    complement = jnp.where(below, complement, _LOWEST)
    return log_s, jnp.where(beta == 1.0, jax.nn.log_sigmoid(-scaled), complement)


def bernoulli_log_prob(
    logits: Array,
    action: Array,
    allowed: Array,
    *,
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
) -> Array:
    """Σ over allowed positions of u·log s + (1 − u)·log(1 − s).

    Args:
      logits: float32 ``[..., N]``.
      action: int32 or bool ``[..., N]``, nonzero where the position was unmasked.
      allowed: bool ``[..., N]``.
      policy_temperature: τ.
      beta: β.

    Returns:
      float32 ``[...]``, nats.

    >>> b, both = jnp.array([-2.0, -2.0]), jnp.array([True, True])
    >>> print(f"{bernoulli_log_prob(b, jnp.array([1, 0]), both):.6f}")
    -2.253856
    """
    per_position = bernoulli_log_prob_per_position(
        logits, action, allowed, policy_temperature=policy_temperature, beta=beta
    )
    return jnp.sum(per_position, axis=-1)


def bernoulli_log_prob_per_position(
    logits: Array,
    action: Array,
    allowed: Array,
    *,
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
) -> Array:
    """The terms ``[..., N]`` of `bernoulli_log_prob`, 0 where not allowed."""
    logits = jnp.where(allowed, logits, 0.0)
    log_s, log_not = bernoulli_logs(logits, policy_temperature, beta)
    return jnp.where(allowed, jnp.where(action > 0, log_s, log_not), 0.0)


def bernoulli_entropy(
    logits: Array, allowed: Array, *, policy_temperature: ArrayLike | float = 1.0
) -> Array:
    """Entropy of the Bernoulli law, nats: float32 ``[...]``."""
    log_s, log_not = bernoulli_logs(jnp.where(allowed, logits, 0.0), policy_temperature)
    entropy = -(jnp.exp(log_s) * log_s + jnp.exp(log_not) * log_not)
    return jnp.sum(jnp.where(allowed, entropy, 0.0), axis=-1)


def forced_log_prob(
    logits: Array,
    action: Array,
    allowed: Array,
    *,
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
) -> Array:
    """Of the Bernoulli law that forces the largest logit when nothing was unmasked.

    P({k*}) = P_Bernoulli({k*}) + P_Bernoulli(∅), P(∅) = 0, others as before.

    Arguments and result as in `bernoulli_log_prob`; the empty action has a large
    negative logarithm, unless nothing is allowed.
    """
    scale = {"policy_temperature": policy_temperature, "beta": beta}
    natural = bernoulli_log_prob(logits, action, allowed, **scale)
    nothing = bernoulli_log_prob(logits, jnp.zeros_like(action), allowed, **scale)
    chosen = (action > 0) & allowed
    is_best = jnp.all(chosen == _best(logits, allowed), axis=-1)
    is_empty = ~jnp.any(chosen, axis=-1)
    forced = jnp.where(is_best & ~is_empty, jnp.logaddexp(natural, nothing), natural)
    return jnp.where(is_empty & jnp.any(allowed, axis=-1), _LOWEST, forced)


def dpls_log_prob(
    logits: Array,
    action: Array,
    allowed: Array,
    *,
    policy_temperature: ArrayLike | float = 1.0,
    stop_logit: ArrayLike | float = 0.0,
) -> Array:
    """Of the ordered sequence of picks, not of the set.

    ``b[i₁] − lse(b) + Σ_{j ≥ 2} (b[iⱼ] − lse({b left, z})) + z − lse({b left, z})``
    with logits b/τ and the fixed logit z of STOP.

    Args:
      logits: float32 ``[..., N]``.
      action: int32 ``[..., N]``, 0 where not picked, else the place in the order from
        1.
      allowed: bool ``[..., N]``; rows without any have likelihood 1.
      policy_temperature: τ.
      stop_logit: z.

    Returns:
      float32 ``[...]``, nats; a large negative number for an empty action.

    >>> b = jnp.log(jnp.array([1.0, 2.0, 3.0]))
    >>> order = jnp.array([0, 2, 1])
    >>> print(f"{jnp.exp(dpls_log_prob(b, order, jnp.ones(3, bool))):.4f}")
    0.1250
    """
    size = logits.shape[-1]
    action = jnp.where(allowed, action.astype(jnp.int32), 0)
    place = jnp.where(action > 0, action, jnp.where(allowed, size + 1, size + 2))
    order = jnp.argsort(place, axis=-1)
    b = jnp.where(allowed, logits / policy_temperature, _LOWEST)
    b = jnp.take_along_axis(b, order, axis=-1)
    stop = jnp.broadcast_to(jnp.asarray(stop_logit, jnp.float32), b.shape)
    left = jax.lax.cumlogsumexp(b, axis=b.ndim - 1, reverse=True)
    index = jnp.broadcast_to(jnp.arange(size), b.shape)
    count = jnp.sum((action > 0).astype(jnp.int32), axis=-1)[..., None]
    others = jnp.where(index == 0, left, jnp.logaddexp(left, stop))
    picks = jnp.sum(jnp.where(index < count, b - others, 0.0), axis=-1)
    # STOP ends the sequence against what is left; nothing left makes it certain.
    ends = jnp.sum(jnp.where(index == count, stop - others, 0.0), axis=-1)
    result = jnp.where(count[..., 0] > 0, picks + ends, _LOWEST)
    return jnp.where(jnp.any(allowed, axis=-1), result, 0.0)


def log_prob(
    logits: Array,
    action: Array,
    allowed: Array,
    *,
    mode: str = "bernoulli",
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
    stop_logit: ArrayLike | float = 0.0,
) -> Array:
    """Log-likelihood of an action under any of the laws.

    Args:
      logits: float32 ``[..., N]``.
      action: int32 ``[..., N]``, 0 where not chosen; with ``"dpls"`` the order from 1.
      allowed: bool ``[..., N]``; others contribute 0 and get no gradient.
      mode: the law.
      policy_temperature: τ; the same as in sampling, or ratios are biased.
      beta: β, Bernoulli only.
      stop_logit: logit of STOP, ``"dpls"`` only.

    Returns:
      float32 ``[...]``, nats.

    Raises:
      ValueError: for a bad argument; outside ``jit`` also for actions outside
        ``allowed``.
    """
    check_mode(mode, policy_temperature, beta, stop_logit)
    if not any(isinstance(x, jax.core.Tracer) for x in (action, allowed)):
        outside = (np.asarray(action) > 0) & ~np.asarray(allowed, bool)
        if outside.any():
            raise ValueError(
                f"action must be 0 outside allowed, got a choice at index "
                f"{tuple(map(int, np.argwhere(outside)[0]))}"
            )
    if mode == "dpls":
        return dpls_log_prob(
            logits,
            action,
            allowed,
            policy_temperature=policy_temperature,
            stop_logit=stop_logit,
        )
    law = bernoulli_log_prob if mode == "bernoulli" else forced_log_prob
    return law(
        logits, action, allowed, policy_temperature=policy_temperature, beta=beta
    )


def act(
    uniforms: tuple[Array, Array, Array],
    logits: Array,
    allowed: Array,
    *,
    mode: str = "bernoulli",
    policy_temperature: ArrayLike | float = 1.0,
    beta: ArrayLike | float = 1.0,
    stop_logit: ArrayLike | float = 0.0,
) -> Array:
    """Draws an action from uniform numbers in [0, 1).

    Args:
      uniforms: two float32 ``[..., N]`` and one ``[...]``, independent. Bernoulli
        actions use the first; the others are for the later picks and for STOP.
      logits: float32 ``[..., N]``.
      allowed: bool ``[..., N]``.
      mode: the law.
      policy_temperature: τ.
      beta: β, Bernoulli only.
      stop_logit: logit of STOP, ``"dpls"`` only.

    Returns:
      int32 ``[..., N]``, 0 where not chosen, else 1, or the order from 1.
    """
    if mode == "dpls":
        return _draw_dpls(uniforms, logits / policy_temperature, allowed, stop_logit)
    log_s, _ = bernoulli_logs(logits, policy_temperature, beta)
    chosen = (uniforms[0] < jnp.exp(log_s)) & allowed
    if mode == "bernoulli-argmax":
        nothing = ~jnp.any(chosen, axis=-1, keepdims=True)
        chosen = chosen | (nothing & _best(logits, allowed))
    return chosen.astype(jnp.int32)


def _draw_dpls(
    uniforms: tuple[Array, Array, Array],
    logits: Array,
    allowed: Array,
    stop_logit: ArrayLike | float,
) -> Array:
    # Later picks need noise of their own: that of the items which lost to the first
    # is biased downwards against STOP.
    first = _best(logits + _gumbel(uniforms[0]), allowed)
    rest = allowed & ~first
    noisy = jnp.where(rest, logits + _gumbel(uniforms[1]), -jnp.inf)
    stop = (jnp.asarray(stop_logit, jnp.float32) + _gumbel(uniforms[2]))[..., None]
    accepted = rest & (noisy > stop)
    order = jnp.argsort(-noisy, axis=-1)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32) + 2
    return jnp.where(first, 1, jnp.where(accepted, place, 0))


def _gumbel(uniform: Array) -> Array:
    # In [0, 1) by steps of 2^-23: moved to the middle of the step, away from 0.
    return -jnp.log(-jnp.log(uniform + 2.0**-24))


def _best(logits: Array, allowed: Array) -> Array:
    """The allowed position of the largest logit, the lower one among equals."""
    index = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    places = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    return allowed & (places == index[..., None])
