"""Power-function averages: a window that grows with the run, and any window afterwards.

After t samples the parameters of sample s weigh ``(γ+1) s^γ / t^(γ+1)``. The relative
width of this profile, its standard deviation over t, is σ_rel, a more telling name for
γ. Between two refreshes the old average keeps ``β = (s_before / s_after)^(γ+1)``, which
telescopes: no batch size enters, nothing changes at a change of batch, and there is no
hyper-parameter to scale.

`power_ema` tracks several profiles at once. Stored at a few times of a run, they are a
basis from which `diffmm.optim.synthesis` builds the average of any other width.

References:
  Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
  arXiv 2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffmm.optim import _averaging as averaging
from diffmm.optim import validate
from diffmm.optim.ema import Order
from diffmm.typing import Array, ArrayLike, Params

MAX_SIGMA_REL = 1 / (2 * math.sqrt(3))  # at γ = 0, the mean of everything


def check_gamma(gamma: float, name: str = "gamma") -> float:
    """Returns the exponent as a float above −1, or raises a ValueError."""
    gamma = validate.number(name, gamma)
    if gamma <= -1:
        raise ValueError(f"{name} must be above -1, got {gamma!r}.")
    return gamma


def sigma_rel_from_gamma(gamma: float) -> float:
    """Relative width of a profile: ``√(γ+1) / ((γ+2) √(γ+3))``.

    >>> round(sigma_rel_from_gamma(6.9372), 6)
    0.1

    Raises:
      ValueError: γ of −1 or below.
    """
    gamma = check_gamma(gamma)
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent of a profile of given relative width.

    The largest real root of ``γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²)``.

    >>> round(gamma_from_sigma_rel(0.1), 4)
    6.9372

    Args:
      sigma_rel: in (0, 1/√12]; the upper end is the mean of all parameters, γ = 0.

    Returns:
      γ, at least 0.

    Raises:
      ValueError: ``sigma_rel`` out of range.
    """
    sigma_rel = validate.positive("sigma_rel", sigma_rel)
    # 1/√12 written with six digits, .288675, is below it; allow for a last bit.
    if sigma_rel > MAX_SIGMA_REL * (1 + 1e-12):
        raise ValueError(
            f"sigma_rel must lie in (0, {MAX_SIGMA_REL:.6f}], got {sigma_rel!r}."
        )
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16 - inverse, 12 - inverse])
    gamma = float(roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real.max())
    # Two steps of Newton's method on σ(γ)⁻² polish what the eigenvalues leave.
    for _ in range(2):
        value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
        gamma -= value / ((3 * gamma + 14) * gamma + 16 - inverse)
    return max(gamma, 0.0)


def one_gamma(gamma: float | None, sigma_rel: float | None) -> float:
    """The exponent from exactly one of its two names, or a ValueError."""
    if (gamma is None) == (sigma_rel is None):
        raise ValueError(
            f"pass exactly one of gamma and sigma_rel, got gamma={gamma!r} and "
            f"sigma_rel={sigma_rel!r}"
        )
    if gamma is not None:
        return check_gamma(gamma)
    assert sigma_rel is not None
    return gamma_from_sigma_rel(sigma_rel)


def power_rate(
    before: float | ArrayLike, after: float | ArrayLike, gamma: float
) -> float | Array:
    """The weight of new parameters, ``1 − (before / after)^(γ+1)``.

    Args:
      before: samples seen at the last refresh, in any unit; may be traced.
      after: samples seen now, in the same unit, more than ``before``.
      gamma: exponent of the profile, above −1.

    Returns:
      A Python float if all arguments are Python numbers, else a float32 scalar.

    Raises:
      ValueError: γ of −1 or below; Python numbers without 0 ≤ before < after.
    """
    exponent = check_gamma(gamma) + 1
    if averaging.is_number(before) and averaging.is_number(after):
        first = validate.non_negative("before", before)
        last = validate.positive("after", after)
        if first >= last:
            raise ValueError(
                f"before must be below after, got {before!r} and {after!r}."
            )
        if first == 0:
            return 1.0
        return -math.expm1(exponent * math.log1p((first - last) / last))
    return _rate_of_step(
        averaging.scalar(after) - averaging.scalar(before), after, gamma
    )


def _rate_of_step(step: Any, after: Any, gamma: float) -> Array:
    """As `power_rate`, from the difference, which a float32 clock would lose."""
    return -jnp.expm1((gamma + 1) * jnp.log1p(-jnp.minimum(step / after, 1.0)))


class PowerEmaState(NamedTuple):
    """State of `power_ema`: plain arrays.

    Attributes:
      averages: one tree per profile, in float32 at least.
      progress: clock and counters.
    """

    averages: tuple[Params, ...]
    progress: averaging.Progress

    @property
    def skipped(self) -> Array:
        """Int32 scalar: steps that were left out because something was not finite."""
        return self.progress.skipped

    @property
    def reference_batches(self) -> Array:
        """Float32 scalar: samples seen so far over the reference batch."""
        return self.progress.clock.read()


def power_ema(
    *,
    gamma: float | Sequence[float] | None = None,
    sigma_rel: float | Sequence[float] | None = None,
    kappa: float | ArrayLike = 1.0,
    batch_ref: float | None = None,
    order: Order = "post",
    update_every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Power-function averages of the *parameters* beside an optimiser.

    Put it last in an `optax.chain`; read with `averaged_profiles`. The first refresh
    replaces the initial values altogether. Batches only tell the time: a run at one
    fixed batch needs neither ``kappa`` nor ``batch_ref``.

    A step after which a parameter is not finite never enters: as in `ema_params`, the
    averages stay, ``skipped`` grows by one, and the clock moves on.

    Args:
      gamma: exponents of the profiles, one or several; above −1.
      sigma_rel: or their relative widths, in (0, 0.288675].
      kappa: batch over some reference batch, if it is going to change between parts of
        a run that are fixed in themselves.
      batch_ref: if it varies from step to step: any number of samples, the unit of the
        clock. Each step then needs ``update(..., batch=B_t)``.
      order: as in `diffmm.optim.ema_params`.
      update_every: optimiser steps between refreshes.

    Returns:
      A transformation whose state is a `PowerEmaState`.

    Raises:
      ValueError: both or neither of ``gamma`` and ``sigma_rel``, a value out of range;
        in ``update`` as `diffmm.optim.ema_params`.
    """
    gammas = _profiles(gamma, sigma_rel)
    averaging.check_batches(kappa, batch_ref)
    validate.one_of("order", order, ("post", "pre"))
    update_every = validate.whole("update_every", update_every)

    def init_fn(params: Params) -> PowerEmaState:
        averages = tuple(jax.tree.map(averaging.accumulator, params) for _ in gammas)
        return PowerEmaState(averages, averaging.start_progress())

    def rates(progress: averaging.Progress, step: Any) -> list[Array]:
        after = progress.clock.read() + (step - progress.pending)
        return [_rate_of_step(step, after, each) for each in gammas]

    def apply(averages: Any, params: Params, rates: Any, enter: Array) -> Any:
        averaging.check_same_trees(averages[0], params)
        pairs = zip(averages, rates, strict=True)
        return tuple(averaging.move(old, params, rate, enter) for old, rate in pairs)

    def update_fn(
        updates: Params,
        state: PowerEmaState,
        params: Params | None = None,
        *,
        batch: Any = None,
        **extra_args: Any,
    ) -> tuple[Params, PowerEmaState]:
        del extra_args
        progress, averages = averaging.refresh(
            state.progress,
            state.averages,
            updates,
            params,
            averaging.step_kappa(kappa, batch_ref, batch),
            order=order,
            update_every=update_every,
            rate=rates,
            apply=apply,
        )
        return updates, PowerEmaState(averages, progress)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _profiles(gamma: Any, sigma_rel: Any) -> tuple[float, ...]:
    if (gamma is None) == (sigma_rel is None):
        one_gamma(gamma, sigma_rel)
    given = np.atleast_1d(gamma if sigma_rel is None else sigma_rel)
    if given.ndim != 1 or not given.size:
        raise ValueError("gamma or sigma_rel must be a number or several, got none")
    convert = check_gamma if sigma_rel is None else gamma_from_sigma_rel
    return tuple(convert(float(each)) for each in given)


def averaged_profiles(opt_state: Any, like: Params | None = None) -> tuple[Params, ...]:
    """Reads the averages of `power_ema`, in the order of its profiles.

    Args:
      opt_state: a `PowerEmaState`, or any pytree that contains exactly one.
      like: parameters, whose dtypes and containers the results take.

    Returns:
      One tree per profile; without ``like`` in float32 at least.

    Raises:
      ValueError: no `PowerEmaState` or more than one; ``like`` with other names
        or shapes.
    """
    state = averaging.only_state(opt_state, PowerEmaState, "power_ema")
    return tuple(averaging.cast_like(each, like) for each in state.averages)
