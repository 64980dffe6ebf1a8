"""Logit filters: suppression, temperature, top-k, top-p, min-p.

All of them take traced hyper-parameters, scalars or one number per position, and none
of them sorts the vocabulary: a cut by mass is found by bisection over the bits of the
logits, 32 passes of compare and add.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffmm.typing import Array, ArrayLike

# Finite, so that 0 * FILL is 0 and FILL − FILL is 0; exp(FILL) is 0 in float32.
FILL = -1e30


def suppress(logits: Array, allowed: Array) -> Array:
    """Gives ids that are not allowed a large finite negative logit.

    Args:
      logits: float32 ``[..., V]``.
      allowed: bool, broadcastable to ``[..., V]`` with the same rank.

    Returns:
      float32 ``[..., V]``; allowed ids keep their logits bit-exactly.
    """
    return jnp.where(allowed, logits, jnp.float32(FILL))


def temper(logits: Array, temperature: ArrayLike | float) -> Array:
    """Logits of p^(1/τ) up to a constant; τ = 1 returns the argument bit-exactly.

    The maximum is subtracted first, so that no τ > 0 overflows. Where τ = 0 (greedy)
    the logits come back unchanged: the draw takes their arg-max.

    Args:
      logits: float32 ``[..., V]``.
      temperature: τ ≥ 0, scalar or ``[...]``.

    Returns:
      float32 ``[..., V]``.
    """
    tau = _per_position(temperature, logits)
    divisor = jnp.where(tau > 0, tau, 1.0)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor
    unchanged = (tau == 1.0) | (tau == 0.0)
    return jnp.where(unchanged, logits, jnp.maximum(scaled, FILL))


def top_k(logits: Array, k: ArrayLike | int) -> Array:
    """Keeps the k largest logits, the lower id among equals.

    Args:
      logits: float32 ``[..., V]``.
      k: integer ≥ 1, scalar or ``[...]``; k ≥ V returns the argument bit-exactly.

    Returns:
      float32 ``[..., V]``; everything else is suppressed.

    >>> import jax.numpy as jnp
    >>> print(top_k(jnp.array([1.0, 3.0, 3.0, 2.0]), 1) > FILL)
    [False  True False False]
    """
    k = _per_position(k, logits)
    # Counts in float32 are exact below 2^24, above every vocabulary.
    keep = _heaviest(logits, jnp.ones_like(logits), k)
    return suppress(logits, keep | (k >= logits.shape[-1]))


def top_p(logits: Array, p: ArrayLike | float) -> Array:
    """Keeps the smallest set of most probable ids with mass ≥ p (nucleus).

    The id that crosses p is kept; among equal logits the lower ids are.

    Args:
      logits: float32 ``[..., V]``.
      p: in (0, 1], scalar or ``[...]``; p = 1 returns the argument bit-exactly.

    Returns:
      float32 ``[..., V]``; everything else is suppressed.

    References:
      Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
    """
    p = _per_position(p, logits)
    keep = _heaviest(logits, jax.nn.softmax(logits, axis=-1), p)
    return suppress(logits, keep | (p >= 1.0))


def min_p(logits: Array, p: ArrayLike | float) -> Array:
    """Keeps ids at least ``p`` times as probable as the most probable one.

    Args:
      logits: float32 ``[..., V]``.
      p: in [0, 1], scalar or ``[...]``; 0 returns the argument bit-exactly.

    Returns:
      float32 ``[..., V]``; everything else is suppressed.

    References:
      Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
      Outputs", arXiv 2407.01082.
    """
    p = _per_position(p, logits)
    cut = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.maximum(p, 1e-38))
    return suppress(logits, (logits >= cut) | (p <= 0.0))


def _per_position(value: ArrayLike | float, logits: Array) -> Array:
    """Scalar or ``[...]`` to float32 ``[..., 1]``."""
    value = jnp.asarray(value, jnp.float32)
    return jnp.broadcast_to(value, logits.shape[:-1])[..., None]


def _heaviest(logits: Array, weights: Array, target: Array) -> Array:
    """The shortest prefix, by falling logit then rising id, that weighs ``target``.

    Ids with equal logits must have equal weights. ``target`` is ``[..., 1]``. If all
    ids together weigh less than ``target``, all are kept.
    """
    # −0.0 and 0.0 are equal as numbers but not as bits.
    bits = jax.lax.bitcast_convert_type(
        jnp.where(logits == 0.0, 0.0, logits), jnp.uint32
    )
    # Flipping makes unsigned order equal numeric order.
    negative = bits >> 31 == 1
    order = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))

    def weight_of(mask: Array) -> Array:
        return jnp.sum(jnp.where(mask, weights, 0.0), axis=-1, keepdims=True)

    def step(index: Array, cut: Array) -> Array:
        candidate = cut | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(weight_of(order >= candidate) >= target, candidate, cut)

    start = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    cut = jax.lax.fori_loop(0, 32, step, start)
    above, equal = order > cut, order == cut
    each = jnp.max(jnp.where(equal, weights, 0.0), axis=-1, keepdims=True)
    earlier = (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) - 1).astype(jnp.float32)
    return above | (equal & (weight_of(above) + earlier * each < target))
