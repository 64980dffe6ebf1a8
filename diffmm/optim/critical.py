"""Where batch invariance ends: critical steps, critical batch, noise scale."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

from diffmm.optim import validate
from diffmm.optim.sde import Budget, critical_batch


class CriticalReport(NamedTuple):
    """A planned run against the limit of the batch-size rule.

    Attributes:
      steps: optimiser steps of the run.
      critical_steps: S_crit; None if unknown.
      critical_batch: the largest batch with at least S_crit steps; None if unknown.
      per_device_batch: the largest micro-batch of a device that stays within it.
      noise_scale: batch at which signal and noise of a step are equal; None if unknown.
      within: whether neither known limit is exceeded.
    """

    steps: float
    critical_steps: float | None
    critical_batch: int | None
    per_device_batch: int | None
    noise_scale: float | None
    within: bool


def check_critical(
    target: Budget,
    critical_steps: float | None = None,
    *,
    noise_scale: float | None = None,
    devices: int = 1,
    accumulation: int = 1,
) -> CriticalReport:
    """Warns, and never raises, if a run leaves the regime where batch does not matter.

    Args:
      target: batch and duration of the run, in one unit: both in rows gives the limits
        in rows, both in tokens in tokens.
      critical_steps: S_crit, from `measure_critical_steps`; None checks nothing.
      noise_scale: σ²/|∇|², the batch at which a step's noise equals its signal, in the
        unit of ``target.batch``; None checks nothing.
      devices: that share a batch.
      accumulation: micro-batches per optimiser step.

    Returns:
      A `CriticalReport`.

    Raises:
      ValueError: a number out of range.

    Warns:
      UserWarning: fewer steps than S_crit, or a batch above the noise scale.
    """
    devices = validate.whole("devices", devices)
    accumulation = validate.whole("accumulation", accumulation)
    within = True
    largest = per_device = None
    if critical_steps is not None:
        largest = critical_batch(target.tokens, critical_steps)
        per_device = largest // (devices * accumulation)
        if target.steps < critical_steps:
            within = False
            warnings.warn(
                f"{target.steps:.6g} steps are below the critical {critical_steps:g}: "
                f"batch {target.batch:g} exceeds the critical batch {largest}; the "
                f"largest batch per device is {per_device} ({devices} devices, "
                f"{accumulation} micro-batches). Expect a higher loss.",
                stacklevel=2,
            )
    if noise_scale is not None:
        noise_scale = validate.positive("noise_scale", noise_scale)
        if target.batch > noise_scale:
            within = False
            warnings.warn(
                f"batch {target.batch:g} exceeds the gradient noise scale "
                f"{noise_scale:g}: the learning rate of the rule is too small there.",
                stacklevel=2,
            )
    return CriticalReport(
        steps=target.steps,
        critical_steps=critical_steps,
        critical_batch=largest,
        per_device_batch=per_device,
        noise_scale=noise_scale,
        within=within,
    )


class CriticalRow(NamedTuple):
    """One run of a sweep over κ at fixed tokens.

    Attributes:
      kappa: physical over logical batch.
      steps: optimiser steps.
      loss: final loss.
      excess: (loss − reference) / |reference|, the reference being the smallest κ.
      within: whether this run and all of smaller κ stay within the tolerance.
    """

    kappa: float
    steps: float
    loss: float
    excess: float
    within: bool


class CriticalSteps(NamedTuple):
    """A measured S_crit.

    Attributes:
      steps: the fewest steps that still reach the reference loss.
      table: all runs in the order of κ.
      reached: whether some run left the tolerance; if not, S_crit is only known to be
        at most ``steps``.
    """

    steps: float
    table: tuple[CriticalRow, ...]
    reached: bool


def measure_critical_steps(
    runs: Iterable[tuple[float, float, float]], tolerance: float = 0.01
) -> CriticalSteps:
    """S_crit from runs at one number of tokens and κ = 1, 2, 4, ….

    A run counts while it and every run of smaller κ stay within the tolerance of the
    smallest κ's loss: a lucky run beyond the first failure proves nothing. A loss that
    is not finite is a failure.

    >>> runs = [(1, 4000, 2.00), (2, 2000, 2.01), (4, 1000, 2.01), (8, 500, 2.20)]
    >>> measure_critical_steps(runs).steps
    1000.0

    Args:
      runs: of (κ, steps, final loss); at least two.
      tolerance: relative rise of the loss that is still the same loss.

    Returns:
      `CriticalSteps` with the whole table.

    Raises:
      ValueError: fewer than two runs, a κ given twice, numbers out of range, or a
        reference loss that is not finite.
    """
    tolerance = validate.positive("tolerance", tolerance)
    ordered = sorted(
        (
            validate.positive("kappa", kappa),
            validate.positive("steps", steps),
            float(loss),
        )
        for kappa, steps, loss in runs
    )
    kappas = [row[0] for row in ordered]
    if len(set(kappas)) != len(kappas) or len(kappas) < 2:
        raise ValueError(f"runs must hold two or more different kappa, got {kappas}.")
    reference = validate.number("loss of the smallest kappa", ordered[0][2])
    table = []
    within = True
    for kappa, steps, loss in ordered:
        rise = loss - reference
        excess = rise / abs(reference) if reference else math.copysign(math.inf, rise)
        if rise == 0:
            excess = 0.0
        within = within and excess <= tolerance
        table.append(CriticalRow(kappa, steps, loss, excess, within))
    fewest = min(row.steps for row in table if row.within)
    return CriticalSteps(steps=fewest, table=tuple(table), reached=not within)


def learning_rate_deficit(kappa: float, snr_squared: float) -> float:
    """By how much signal makes the rule's learning rate too small.

    √((1 + κ·snr²) / (1 + snr²)): Adam divides by √(signal² + noise²/B), which stops
    falling with the batch where the signal is seen.

    >>> round(learning_rate_deficit(64, 1e-2), 3)
    1.274

    Args:
      kappa: positive.
      snr_squared: g²·B_base/σ² of one base step; not negative.

    Returns:
      Right over given learning rate; 1 where noise dominates.

    Raises:
      ValueError: an argument out of range.
    """
    kappa = validate.positive("kappa", kappa)
    snr_squared = validate.non_negative("snr_squared", snr_squared)
    return math.sqrt((1 + kappa * snr_squared) / (1 + snr_squared))
