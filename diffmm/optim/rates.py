"""Exponential averages when one step becomes κ steps: β₁, β₂, and decays of weights.

An average that keeps β per step forgets at a rate. Batch size and duration multiply
the rate by κ; three discrete forms do so, all semigroups in κ and equal to first order.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from diffmm.optim import validate

BetaForm = Literal["exponential", "linear", "harmonic"]
BETA_FORMS: tuple[str, ...] = get_args(BetaForm)

# 1 - 10 * (1 - 0.9) is 2.2e-16 in float64: what is this close to 0 is 0.
_ROUNDING = 1e-9


def _scaled(value: float, kappa: float, form: str) -> float:
    if kappa == 1 or value in (0.0, 1.0):
        return value
    if form == "exponential":
        return math.exp(kappa * math.log(value))
    if form == "linear":
        return 1 - kappa * (1 - value)
    return value / (value + kappa * (1 - value))


def scale_beta(
    beta: float, kappa: float, form: BetaForm = "exponential", *, name: str = "beta"
) -> float:
    """The coefficient of a moment after one step has become κ steps.

    ========================  ====================  ================================
    form                      β′                    keeps exactly
    ========================  ====================  ================================
    ``"exponential"``         β^κ                   half-life in tokens; 1 − β^count
    ``"linear"``              1 − κ(1 − β)          Euler coefficient
    ``"harmonic"``            1/(1 + κ(1/β − 1))    mean lag β/(1 − β) in tokens
    ========================  ====================  ================================

    >>> round(scale_beta(0.9, 4), 4), round(scale_beta(0.9, 4, "linear"), 4)
    (0.6561, 0.6)

    Args:
      beta: in [0, 1); 0 stays 0 under every form.
      kappa: positive; 1 returns ``beta`` untouched.
      form: as in the table.
      name: of the argument, for messages.

    Returns:
      A Python float in [0, 1).

    Raises:
      ValueError: ``beta`` or ``kappa`` out of range, an unknown form, or the linear
        form with κ(1 − β) ≥ 1, which has no value.

    References:
      Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
      arXiv 2205.10287 (linear form). Mlodozeniec et al., Completed Hyperparameter
      Transfer across Modules, Width, Depth, Batch and Duration, arXiv 2512.22382.
    """
    beta = validate.probability(name, beta)
    kappa = validate.positive("kappa", kappa)
    validate.one_of("form", form, BETA_FORMS)
    result = _scaled(beta, kappa, form)
    if form == "linear" and beta > 0 and result < _ROUNDING:
        raise ValueError(
            f"{name}={beta!r} has no linear form at kappa={kappa!r}: "
            f"1 - kappa * (1 - {name}) = {result:.3g} must be positive. "
            "The 'exponential' form always exists."
        )
    return result


def scale_decay(
    rho: float, kappa: float, form: BetaForm = "exponential", *, name: str = "rho"
) -> float:
    """The decay of averaged weights after one step has become κ steps: ρ^κ.

    As `scale_beta`, but 1 (an average that never moves) is legal and stays 1, and the
    linear form may reach 0. A refresh every n steps enters as κ·n.

    >>> round(scale_decay(0.9999, 4), 8)
    0.99960006

    Args:
      rho: in [0, 1], the weight of the old average.
      kappa: positive; 1 returns ``rho`` untouched.
      form: as in `scale_beta`; ``"exponential"`` is the EMA scaling rule.
      name: of the argument, for messages.

    Returns:
      A Python float in [0, 1].

    Raises:
      ValueError: ``rho`` or ``kappa`` out of range, an unknown form, or the linear
        form with κ(1 − ρ) > 1.

    References:
      Busbridge et al., How to Scale Your EMA, arXiv 2307.13813.
    """
    rho = validate.probability(name, rho, one=True)
    kappa = validate.positive("kappa", kappa)
    validate.one_of("form", form, BETA_FORMS)
    result = _scaled(rho, kappa, form)
    if result < -_ROUNDING:
        raise ValueError(
            f"{name}={rho!r} has no linear form at kappa={kappa!r}: "
            f"1 - kappa * (1 - {name}) = {result:.3g} must not be negative. "
            "The 'exponential' form always exists."
        )
    return max(result, 0.0)


def complement(
    beta: float, kappa: float = 1.0, form: BetaForm = "exponential"
) -> float:
    """The weight of the new value, 1 − β′, to full relative precision.

    1 − β^κ is formed as −expm1(κ ln β): at κ = 1e-3 and β = 0.999 it is 1.0005e-6,
    which a subtraction in float32 gets wrong by a percent.

    >>> f"{complement(0.999, 1e-3):.6e}"
    '1.000500e-06'

    Args:
      beta: in [0, 1].
      kappa: positive.
      form: as in `scale_beta`.

    Returns:
      A Python float in [0, 1].

    Raises:
      ValueError: as `scale_decay`.
    """
    scaled = scale_decay(beta, kappa, form, name="beta")
    if kappa == 1 or beta in (0, 1):
        return 1 - scaled
    if form == "exponential":
        return -math.expm1(kappa * math.log(beta))
    if form == "linear":
        return min(kappa * (1 - beta), 1.0)
    return kappa * (1 - beta) / (beta + kappa * (1 - beta))


def half_life(beta: float, batch: float) -> float:
    """Tokens (or samples) after which an average has forgotten half: B ln ½ / ln β.

    >>> round(half_life(0.9999, 1024))
    7097472

    Args:
      beta: in [0, 1]; 0 gives 0 and 1 gives infinity.
      batch: tokens (or samples) per step.

    Returns:
      The half-life in the unit of ``batch``.

    Raises:
      ValueError: an argument out of range.
    """
    beta = validate.probability("beta", beta, one=True)
    batch = validate.positive("batch", batch)
    if beta == 0:
        return 0.0
    return math.inf if beta == 1 else -batch * math.log(2) / math.log(beta)


def beta_from_half_life(half_life: float, batch: float) -> float:
    """The coefficient per step, 2^(−B/h), of an average with half-life h.

    Args:
      half_life: positive, in tokens (or samples); infinity gives 1.
      batch: tokens (or samples) per step, in the same unit.

    Returns:
      A Python float in [0, 1].

    Raises:
      ValueError: an argument out of range.
    """
    if half_life != math.inf:
        half_life = validate.positive("half_life", half_life)
    batch = validate.positive("batch", batch)
    return math.exp(-math.log(2) * batch / half_life)
