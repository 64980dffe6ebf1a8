"""Exact categorical draws in float32.

A float32 uniform number in [2^-23, 1) gives Gumbel noise that never exceeds 15.94, so
that rare classes of a large vocabulary are drawn too rarely and the entropy of the
samples falls. Two measures avoid it without float64: the high-resolution mode of the
generator, and never putting "stay masked" into the same categorical as the tokens.

References:
  Zheng et al., "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and
  Exploit Inaccurate Categorical Sampling", arXiv 2409.02908.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffmm.samplers import filters
from diffmm.samplers.statistics import first_argmax
from diffmm.typing import Array, ArrayLike


def categorical(keys: Array, logits: Array) -> Array:
    """Draws one id per position, exactly, with one key per position.

    The draw is that of ``jax.random.categorical(key, logits, mode="high")``.

    Args:
      keys: key array ``[...]`` (or one key for a single position).
      logits: float32 ``[..., V]``.

    Returns:
      int32 ``[...]``.
    """

    def one(key: Array, row: Array) -> Array:
        noise = jax.random.gumbel(key, row.shape, jnp.float32, mode="high")
        return first_argmax(row + noise)

    flat = logits.reshape(-1, logits.shape[-1])
    return jax.vmap(one)(keys.reshape(-1), flat).reshape(logits.shape[:-1])


def draw(
    keys: Array,
    logits: Array,
    *,
    temperature: ArrayLike | float = 1.0,
    top_k: ArrayLike | int | None = None,
    top_p: ArrayLike | float | None = None,
    min_p: ArrayLike | float | None = None,
) -> Array:
    """Temperature, then top-k, top-p and min-p, then one draw per position.

    Args:
      keys: key array ``[...]``.
      logits: float32 ``[..., V]``, guided and suppressed.
      temperature: τ ≥ 0, scalar or ``[...]``; 0 takes the arg-max, and a call in which
        every τ is 0 makes no random numbers.
      top_k: k ≥ 1, scalar or ``[...]``, or ``None`` for no filter.
      top_p: p in (0, 1], scalar or ``[...]``, or ``None`` for no filter.
      min_p: p in [0, 1], scalar or ``[...]``, or ``None`` for no filter.

    Returns:
      int32 ``[...]``.
    """
    tau = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), logits.shape[:-1])
    greedy = first_argmax(logits)

    def sampled() -> Array:
        filtered = filter_logits(
            logits, temperature=tau, top_k=top_k, top_p=top_p, min_p=min_p
        )
        return jnp.where(tau > 0, categorical(keys, filtered), greedy)

    return jax.lax.cond(jnp.any(tau > 0), sampled, lambda: greedy)


def filter_logits(
    logits: Array,
    *,
    temperature: ArrayLike | float = 1.0,
    top_k: ArrayLike | int | None = None,
    top_p: ArrayLike | float | None = None,
    min_p: ArrayLike | float | None = None,
) -> Array:
    """Logits of the law that `draw` draws from, where τ > 0.

    Args:
      logits: float32 ``[..., V]``.
      temperature: as in `draw`.
      top_k: as in `draw`.
      top_p: as in `draw`; the mass is that of the tempered, top-k filtered law.
      min_p: as in `draw`, a share of the largest probability of the tempered law.

    Returns:
      float32 ``[..., V]``.
    """
    logits = filters.temper(logits, temperature)
    if top_k is not None:
        logits = filters.top_k(logits, top_k)
    if top_p is not None:
        logits = filters.top_p(logits, top_p)
    if min_p is not None:
        logits = filters.min_p(logits, min_p)
    return logits
