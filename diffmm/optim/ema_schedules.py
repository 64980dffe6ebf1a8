"""Schedules of the EMA decay, written for the reference run.

Their argument is n = s / B_ref, the samples seen so far in reference batches, which is
the step count of the run that was tuned. `ema_params` raises their value to the power κ
at every step, so one schedule serves every batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from diffmm.optim import validate
from diffmm.typing import Array, ArrayLike

Schedule = Callable[[ArrayLike], Array]


def cosine_decay(rho: float, total: float) -> Schedule:
    """From ρ to 1 along a cosine: ``1 − (1 − ρ)(cos(π n / total) + 1) / 2``.

    >>> schedule = cosine_decay(0.996, total=1000)
    >>> [round(float(schedule(n)), 4) for n in (0, 250, 500, 1000)]
    [0.996, 0.9966, 0.998, 1.0]

    Args:
      rho: initial decay, in [0, 1].
      total: samples of the whole run over the reference batch; the decay stays 1
        afterwards.

    Returns:
      A function of n.

    Raises:
      ValueError: an argument out of range.

    References:
      Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733.
    """
    rho = validate.probability("rho", rho, one=True)
    total = validate.positive("total", total)

    def schedule(n: ArrayLike) -> Array:
        fraction = jnp.clip(jnp.asarray(n) / total, 0, 1)
        return 1 - (1 - rho) * (jnp.cos(jnp.pi * fraction) + 1) / 2

    return schedule


def warmup_decay(rho: float, power: float = 2 / 3) -> Schedule:
    """Forgets the initial parameters first: ``min(ρ, 1 − (1 + n)^(−power))``.

    >>> schedule = warmup_decay(0.9999)
    >>> [round(float(schedule(n)), 4) for n in (0, 7, 999, 1e7)]
    [0.0, 0.75, 0.99, 0.9999]

    Args:
      rho: final decay, in [0, 1].
      power: positive.

    Returns:
      A function of n.

    Raises:
      ValueError: an argument out of range.
    """
    rho = validate.probability("rho", rho, one=True)
    power = validate.positive("power", power)

    def schedule(n: ArrayLike) -> Array:
        return jnp.minimum(rho, 1 - (1 + jnp.asarray(n)) ** -power)

    return schedule
