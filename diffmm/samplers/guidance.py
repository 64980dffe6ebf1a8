"""Classifier-free guidance: l = l_u + s·(l_c − l_u), combined on raw logits.

Two conventions name one family: the scale s (s = 1 is conditional) and the weight
w of (1 + w)·l_c − w·l_u (w = 0 is conditional), with s = 1 + w. The unconditional
branch sees the conditioning tokens replaced by the mask.

References:
  Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598; Chang et al.,
  "Muse", arXiv 2301.00704; Nie et al., "Scaling up Masked Diffusion Models on Text"
  (unsupervised guidance), arXiv 2410.18514.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffmm.typing import Array, ArrayLike


class GuidanceSchedule(Protocol):
    """How the guidance weight w = s − 1 depends on diffusion time."""

    def weight(self, weight: Array, t: Array) -> Array:
        """The weight at time ``t`` (1 = fully masked, 0 = clean)."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """w(t) = w."""

    def weight(self, weight: Array, t: Array) -> Array:
        """The weight itself."""
        return jnp.broadcast_to(weight, t.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRamp:
    """w(t) = w·(1 − t): none on the empty canvas, all of it at the end.

    References:
      Swerdlow et al., "Unified Multimodal Discrete Diffusion", arXiv 2503.20853.
    """

    def weight(self, weight: Array, t: Array) -> Array:
        """w·(1 − t)."""
        return weight * (1.0 - t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """w(t) = w for low ≤ t ≤ high, else 0 (and then no second forward is paid).

    Attributes:
      low: earliest (cleanest) time with guidance.
      high: latest (most masked) time with guidance.

    References:
      Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and
      Distribution Quality in Diffusion Models", arXiv 2404.07724.
    """

    low: ArrayLike | float = 0.0
    high: ArrayLike | float = 1.0

    def weight(self, weight: Array, t: Array) -> Array:
        """W inside the interval, 0 outside."""
        return jnp.where((t >= self.low) & (t <= self.high), weight, 0.0)


def combine(
    conditional: Array, unconditional: Array, scale: ArrayLike | float
) -> Array:
    """l_u + s·(l_c − l_u); s = 1 gives l_c and s = 0 gives l_u, bit-exactly.

    Nothing may be suppressed before: (−inf) − (−inf) is not a number.

    Args:
      conditional: float32 ``[..., V]``.
      unconditional: float32 ``[..., V]``.
      scale: s, scalar or ``[...]``.

    Returns:
      float32 ``[..., V]``.
    """
    scale = jnp.asarray(scale, jnp.float32)
    scale = jnp.broadcast_to(scale, conditional.shape[:-1])[..., None]
    guided = unconditional + scale * (conditional - unconditional)
    guided = jnp.where(scale == 0.0, unconditional, guided)
    return jnp.where(scale == 1.0, conditional, guided)


def hide_condition(tokens: Array, condition: Array, mask_id: int) -> Array:
    """The input of the unconditional branch: conditioning tokens become masks."""
    return jnp.where(condition, jnp.int32(mask_id), tokens)
