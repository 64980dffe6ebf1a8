"""Noise schedules: the mask probability m(t) and its likelihood weight m'(t)/m(t).

Diffusion time t runs from 0 (clean) to 1 (fully masked). Every schedule computes m
directly and never α = 1 − m: in float32 ``1 - (1 - t**3)`` is exactly zero at
t = 1e-3, and the weight of a token masked there is then not a number.

| class | m(t) | m'(t)/m(t) |
|---|---|---|
| `Linear` | t | 1/t |
| `Polynomial` | t^p | p/t |
| `Cosine` | sin(πt/2) | (π/2)·cot(πt/2) |
| `CosineMDLM` | 1 − cos(πt/2) | (π/2)·cot(πt/4) |
| `Geometric` | 1 − exp(−σ(t)), σ = σ_min^(1−t)·σ_max^t | σ'/expm1(σ) |
| `LogLinear` | (1 − eps)·t | 1/t |

With one schedule for all positions the likelihood bound ∫ F(m)/m dm does not depend
on the schedule (up to what the end points leave out); a schedule moves the variance
of the estimator only.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Array, ArrayLike, Schedule

END_TOLERANCE = 1e-3
# LogLinear(eps=1e-3) sits on the tolerance exactly; float32 must not decide for it.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """m(t) = t, weight 1/t: the default.

    References:
      Ou et al., "Your Absorbing Discrete Diffusion Secretly Models the Conditional
      Distributions of Clean Data", arXiv 2406.03736; Nie et al., "Large Language
      Diffusion Models", arXiv 2502.09992.
    """

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = t."""
        return jnp.asarray(t)

    def weight(self, t: ArrayLike) -> Array:
        """1/t."""
        return 1.0 / jnp.asarray(t)

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = m."""
        return jnp.asarray(m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial:
    """m(t) = t^p, weight p/t.

    Attributes:
      exponent: p > 0; 1 is `Linear`.

    References:
      Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data",
      arXiv 2406.04329.
    """

    exponent: float = 2.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not (math.isfinite(self.exponent) and self.exponent > 0):
            raise ValueError(
                f"exponent must be a finite number above 0, got {self.exponent!r}"
            )

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = t^p."""
        return jnp.asarray(t) ** self.exponent

    def weight(self, t: ArrayLike) -> Array:
        """p/t."""
        return self.exponent / jnp.asarray(t)

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = m^(1/p)."""
        return jnp.asarray(m) ** (1.0 / self.exponent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """m(t) = sin(πt/2), weight (π/2)·cot(πt/2): MaskGIT's cos(πu/2) with u = 1 − t.

    `CosineMDLM` is another function that also goes by the name of cosine.

    References:
      Chang et al., "MaskGIT: Masked Generative Image Transformer", arXiv 2202.04200;
      Shi et al., arXiv 2406.04329.
    """

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = sin(πt/2)."""
        return jnp.sin(0.5 * math.pi * jnp.asarray(t))

    def weight(self, t: ArrayLike) -> Array:
        """(π/2)·cot(πt/2), written so that it is exactly 0 at t = 1."""
        t = jnp.asarray(t)
        # cos(π/2) is −4e-8 in float32, a negative weight; sin(π(1 − t)/2) is 0.
        cosine = jnp.sin(0.5 * math.pi * (1.0 - t))
        return 0.5 * math.pi * cosine / jnp.sin(0.5 * math.pi * t)

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = (2/π)·asin(m)."""
        return jnp.arcsin(jnp.asarray(m)) * (2.0 / math.pi)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineMDLM:
    """m(t) = 1 − cos(πt/2) = 2·sin²(πt/4), weight (π/2)·cot(πt/4).

    References:
      Sahoo et al., "Simple and Effective Masked Diffusion Language Models",
      arXiv 2406.07524 (the function that its code calls cosine).
    """

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = 2·sin²(πt/4), which keeps its precision near t = 0."""
        sine = jnp.sin(0.25 * math.pi * jnp.asarray(t))
        return jnp.minimum(2.0 * sine * sine, 1.0)

    def weight(self, t: ArrayLike) -> Array:
        """(π/2)·cot(πt/4)."""
        return 0.5 * math.pi / jnp.tan(0.25 * math.pi * jnp.asarray(t))

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = (4/π)·asin(sqrt(m/2))."""
        return jnp.arcsin(jnp.sqrt(0.5 * jnp.asarray(m))) * (4.0 / math.pi)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometric:
    """m(t) = 1 − exp(−σ(t)) with σ(t) = σ_min^(1−t)·σ_max^t.

    The levels below m(0) = 1 − exp(−σ_min) and above m(1) are left out, so that the
    bound is short by about m(0) times the clean-limit loss per token.

    Attributes:
      sigma_min: total noise at t = 0; m(0) must lie within 1e-3 of 0.
      sigma_max: total noise at t = 1; m(1) must lie within 1e-3 of 1.

    References:
      Lou, Meng, Ermon, "Discrete Diffusion Modeling by Estimating the Ratios of the
      Data Distribution", arXiv 2310.16834.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not (self.sigma_min > 0 and -math.expm1(-self.sigma_min) <= END_TOLERANCE):
            raise ValueError(
                f"sigma_min must lie in (0, 1.0005e-3] so that m(0) is within "
                f"{END_TOLERANCE} of 0, got {self.sigma_min!r}"
            )
        if not (
            math.isfinite(self.sigma_max) and math.exp(-self.sigma_max) <= END_TOLERANCE
        ):
            raise ValueError(
                f"sigma_max must be finite and at least 6.91 so that m(1) is within "
                f"{END_TOLERANCE} of 1, got {self.sigma_max!r}"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _sigma(self, t: ArrayLike) -> Array:
        return self.sigma_min * jnp.exp(self._log_ratio * jnp.asarray(t))

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = −expm1(−σ(t))."""
        return -jnp.expm1(-self._sigma(t))

    def weight(self, t: ArrayLike) -> Array:
        """σ'(t)/expm1(σ(t))."""
        sigma = self._sigma(t)
        return self._log_ratio * sigma / jnp.expm1(sigma)

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = log(−log(1 − m)/σ_min)/log(σ_max/σ_min), within [0, 1]."""
        sigma = -jnp.log1p(-jnp.asarray(m))
        return jnp.clip(jnp.log(sigma / self.sigma_min) / self._log_ratio, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear:
    """m(t) = (1 − eps)·t, weight exactly 1/t: σ(t) = −log(1 − (1 − eps)·t).

    Attributes:
      eps: what stays unmasked at t = 1, in [0, 1e-3].

    References:
      Sahoo et al., arXiv 2406.07524; Lou, Meng, Ermon, arXiv 2310.16834.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 <= self.eps <= END_TOLERANCE:
            raise ValueError(f"eps must lie in [0, {END_TOLERANCE}], got {self.eps!r}")

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t) = (1 − eps)·t."""
        return (1.0 - self.eps) * jnp.asarray(t)

    def weight(self, t: ArrayLike) -> Array:
        """1/t."""
        return 1.0 / jnp.asarray(t)

    def inverse(self, m: ArrayLike) -> Array:
        """The time t = m/(1 − eps)."""
        return jnp.asarray(m) / (1.0 - self.eps)


# Right by construction: their own constructors refuse bad parameters.
BUILT_IN = (Linear, Polynomial, Cosine, CosineMDLM, Geometric, LogLinear)


def validate_schedule(schedule: Schedule, *, num_points: int = 257) -> None:
    """Checks a schedule on a grid, on the host.

    Args:
      schedule: anything with ``mask_probability``, ``weight`` and ``inverse``.
      num_points: grid points in [0, 1].

    Raises:
      ValueError: if a method is missing; m(0) or m(1) is further than 1e-3 from 0 or
        1; m does not increase; or the weight is negative or not finite in (0, 1].
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule must have the methods mask_probability, weight and inverse, "
            f"got {schedule!r}"
        )
    t = np.linspace(0.0, 1.0, num_points, dtype=np.float32)
    with jax.ensure_compile_time_eval():
        m = np.asarray(schedule.mask_probability(t), np.float64)
        weight = np.asarray(schedule.weight(t[1:]), np.float64)
    for end, value in ((0, m[0]), (1, m[-1])):
        if not abs(value - end) <= END_TOLERANCE + _ROUNDING:
            raise ValueError(
                f"schedule {schedule!r} has m({end}) = {value:.6g}, which must be "
                f"{end} within {END_TOLERANCE}"
            )
    # Close to 1 float32 may saturate; a negated comparison also finds not-a-number.
    rises = (np.diff(m) > 0) | ((np.diff(m) == 0) & (m[:-1] > 1 - _ROUNDING))
    if not np.all(rises):
        first = int(np.argmax(~rises))
        raise ValueError(
            f"schedule {schedule!r} must increase, but m({t[first]:.4f}) = "
            f"{m[first]:.6g} and m({t[first + 1]:.4f}) = {m[first + 1]:.6g}"
        )
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if np.any(wrong):
        first = int(np.argmax(wrong))
        raise ValueError(
            f"schedule {schedule!r} must have a finite weight m'(t)/m(t) of at least "
            f"0 in (0, 1], but weight({t[first + 1]:.4f}) = {weight[first]:.6g}"
        )
