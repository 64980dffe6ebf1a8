"""Schedules on the clock of tokens, which a change of the batch does not move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.optim import validate
from diffmm.optim.hyperparameters import DECAYS, Decay
from diffmm.optim.sde import Budget, logical_batch

Warmup = Literal["logical", "steps", "fraction"]
WARMUPS: tuple[str, ...] = get_args(Warmup)

#: Where within a step its schedule is read, in steps.
OFFSETS = {"start": 0.0, "middle": 0.5, "end": 1.0}


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """Linear rise from 0 to 1, then half a cosine down to ``final_ratio``.

    Attributes:
      warmup: share of the run that the rise takes, in [0, 1).
      final_ratio: last value over peak, in [0, 1].
    """

    warmup: float = 0.0
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Checks both numbers."""
        validate.probability("warmup", self.warmup)
        validate.probability("final_ratio", self.final_ratio, one=True)

    def __call__(self, fraction: Any) -> Any:
        """The value at a fraction of the run in [0, 1], relative to the peak."""
        xp = jnp if isinstance(fraction, jax.Array) else np
        progress = xp.maximum(fraction - self.warmup, 0.0) / (1 - self.warmup)
        falling = self.final_ratio + (1 - self.final_ratio) * 0.5 * (
            1 + xp.cos(np.pi * progress)
        )
        if self.warmup == 0:
            return falling
        return xp.where(fraction < self.warmup, fraction / self.warmup, falling)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSchedule:
    """A multiplier of a peak, as a function of the tokens seen.

    Because the clock is tokens and the values are relative, the same schedule serves
    every batch size and every per-leaf peak, and drives independent weight decay too.

    >>> schedule = TokenSchedule(shape=WarmupCosine(warmup=0.1), tokens=6.4e12)
    >>> float(schedule(0.32e12)), float(schedule(6.4e12))
    (0.5, 0.0)

    Attributes:
      shape: function of the token fraction in [0, 1]; its values are relative to the
        peak, hence in [0, 1]. It takes and returns floats or arrays.
      tokens: length of the run.

    Raises:
      ValueError: ``tokens`` not positive; values below 0 or above 1, or a largest
        value below ½, as an absolute learning rate has.
    """

    shape: Callable[[Any], Any]
    tokens: float

    def __post_init__(self) -> None:
        """Checks the length, and the range of the shape on a grid."""
        validate.positive("tokens", self.tokens)
        if not callable(self.shape):
            raise ValueError(
                f"shape must be a function of the token fraction, got {self.shape!r}."
            )
        with jax.ensure_compile_time_eval():
            values = [float(self.shape(x)) for x in np.linspace(0, 1, 33).tolist()]
        if not (min(values) >= -1e-6 and 0.5 <= max(values) <= 1 + 1e-3):
            raise ValueError(
                "shape must give values in [0, 1], relative to the peak, over "
                "fractions in [0, 1] of the run; got values from "
                f"{min(values):.6g} to {max(values):.6g}."
            )

    def at(self, fraction: Any) -> Any:
        """The value at a fraction of the run, which is clipped to [0, 1]."""
        xp = jnp if isinstance(fraction, jax.Array) else np
        return self.shape(xp.clip(fraction, 0.0, 1.0))

    def __call__(self, tokens: Any) -> Any:
        """The value after ``tokens`` tokens, a number or an array.

        Under tracing, tokens must be float32 or a fraction given to `at`: an int32
        overflows after 2^31.
        """
        return self.at(tokens / self.tokens)


def require_token_schedule(schedule: Any, name: str = "schedule") -> TokenSchedule:
    """Returns ``schedule`` if its clock is tokens.

    Raises:
      ValueError: it is anything else, such as an optax schedule, whose clock is steps
        and which therefore means another run at every batch size.
    """
    if not isinstance(schedule, TokenSchedule):
        raise ValueError(
            f"{name} must be a TokenSchedule, whose clock is tokens; got {schedule!r}. "
            "A function of the step count changes its meaning with the batch size: "
            "TokenSchedule(shape=function of the token fraction, tokens=total)."
        )
    return schedule


def warmup_fraction(
    base: Budget,
    target: Budget,
    *,
    horizon: float = 1.0,
    warmup: Warmup = "logical",
    warmup_steps: float = 1000,
    limit: float = 0.25,
) -> float:
    """The share of the target run that warm-up takes: min(warmup_steps/S, limit).

    * ``"logical"``: S is the number of logical steps, D/B̃. The warm-up's tokens do not
      depend on the physical batch; at γ = 1 its share does not depend on duration.
    * ``"steps"``: S is the number of physical steps; not invariant to the batch.
    * ``"fraction"``: S is the base run's number of steps, hence the base run's share.

    Args:
      base: where ``warmup_steps`` was tuned; batch and tokens in one unit.
      target: of the run.
      horizon: γ, see `diffmm.optim.sde.kappa`.
      warmup: as above.
      warmup_steps: length of the warm-up in steps of the kind above.
      limit: largest share, in (0, 1).

    Returns:
      A share in [0, limit].

    Raises:
      ValueError: an argument out of range, or an unknown ``warmup``.
    """
    validate.one_of("warmup", warmup, WARMUPS)
    warmup_steps = validate.non_negative("warmup_steps", warmup_steps)
    limit = validate.positive("limit", validate.probability("limit", limit))
    if warmup == "logical":
        steps = target.tokens / logical_batch(base, target.tokens, horizon)
    else:
        steps = (target if warmup == "steps" else base).steps
    return min(warmup_steps / steps, limit)


def warmup_cosine(
    base: Budget,
    target: Budget,
    *,
    horizon: float = 1.0,
    warmup: Warmup = "logical",
    warmup_steps: float = 1000,
    limit: float = 0.25,
    final_ratio: float = 0.0,
) -> TokenSchedule:
    """Linear warm-up and cosine decay over the target run.

    >>> base = Budget(batch=2**18, tokens=1e9)
    >>> small, large = (Budget(batch=b, tokens=1e9) for b in (2**16, 2**20))
    >>> warmup_cosine(base, small) == warmup_cosine(base, large)
    True

    Args:
      base: where ``warmup_steps`` was tuned.
      target: of the run.
      horizon: γ, see `diffmm.optim.sde.kappa`.
      warmup: ``"logical"``, ``"steps"`` or ``"fraction"``, see `warmup_fraction`.
      warmup_steps: length of the warm-up.
      limit: largest share of the run that warm-up takes.
      final_ratio: last value over peak.

    Returns:
      A `TokenSchedule` of length ``target.tokens``.

    Raises:
      ValueError: as `warmup_fraction` and `WarmupCosine`.
    """
    fraction = warmup_fraction(
        base,
        target,
        horizon=horizon,
        warmup=warmup,
        warmup_steps=warmup_steps,
        limit=limit,
    )
    shape = WarmupCosine(warmup=fraction, final_ratio=final_ratio)
    return TokenSchedule(shape=shape, tokens=target.tokens)


def by_steps(
    schedule: TokenSchedule,
    tokens_per_step: float,
    *,
    at: Literal["start", "middle", "end"] = "middle",
) -> Callable[[Any], Any]:
    """The schedule as a function of the step count, for optax.

    Reads the schedule in the middle of each step by default: sums over the run then
    differ between batch sizes in second order only, and a warm-up does not waste its
    first step on 0. Works on Python and numpy numbers in float64, and on traced counts
    in float32, where tokens are never formed, only their fraction.

    Args:
      schedule: on the clock of tokens.
      tokens_per_step: the batch, constant; for ramps see `diffmm.optim.batch_ramp`.
      at: ``"start"`` (as optax), ``"middle"`` or ``"end"`` of the step.

    Returns:
      A function from count (steps done before this one) to the multiplier.

    Raises:
      ValueError: not a `TokenSchedule`, batch not positive, unknown ``at``.
    """
    schedule = require_token_schedule(schedule)
    tokens_per_step = validate.positive("tokens_per_step", tokens_per_step)
    validate.one_of("at", at, OFFSETS)
    scale = tokens_per_step / schedule.tokens

    def multiplier(count: Any) -> Any:
        if isinstance(count, jax.Array):
            count = count.astype(jnp.float32)
        return schedule.at((count + OFFSETS[at]) * scale)

    return multiplier


class GroupedSteps(NamedTuple):
    """Steps of a schedule, merged; float64 ``[steps / kappa]``.

    Attributes:
      learning_rate: √(Σ η²) of each group.
      shrink: 1 − Π(1 − a) of each group, what it removes of a weight.
    """

    learning_rate: np.ndarray
    shrink: np.ndarray


def group_steps(
    learning_rates: Any,
    kappa: int,
    *,
    weight_decay: float = 0.0,
    decay: Decay = "coupled",
) -> GroupedSteps:
    """Merges κ steps into one, exactly, under a schedule that moves within them.

    SDE time Σ η² and total decay Π(1 − ηλ) of the run are kept to rounding, where
    √κ·η(x) keeps them to first order.

    Args:
      learning_rates: η of every base step, ``[steps]``; a multiple of κ of them.
      kappa: a whole number.
      weight_decay: λ at the base.
      decay: ``"coupled"``: a = ηλ; ``"independent"``: a = λη/max η.

    Returns:
      `GroupedSteps`; the coupled λ of a group is its shrink over its learning rate.

    Raises:
      ValueError: κ not whole, a number of steps that it does not divide, rates that
        are negative or not finite, or a shrink of 1 or more.
    """
    kappa = validate.whole("kappa", kappa)
    weight_decay = validate.non_negative("weight_decay", weight_decay)
    validate.one_of("decay", decay, DECAYS)
    rates = np.asarray(learning_rates, np.float64)
    if rates.ndim != 1 or not len(rates) or len(rates) % kappa:
        raise ValueError(
            f"learning_rates must be a vector of a multiple of kappa={kappa} steps, "
            f"got shape {rates.shape}."
        )
    if not np.all(np.isfinite(rates)) or rates.min() < 0:
        raise ValueError("learning_rates must be finite and not negative.")
    relative = rates / (rates.max() or 1.0) if decay == "independent" else rates
    shrinks = weight_decay * relative
    if shrinks.max() >= 1:
        raise ValueError(
            f"weight_decay={weight_decay!r} would remove a whole weight in one step: "
            f"the largest shrink is {shrinks.max():.6g}."
        )
    logs = np.log1p(-shrinks).reshape(-1, kappa)
    return GroupedSteps(
        learning_rate=np.sqrt(np.sum(rates.reshape(-1, kappa) ** 2, axis=1)),
        shrink=-np.expm1(np.sum(logs, axis=1)),
    )
