"""Batch size and duration: one factor κ reparameterises every hyper-parameter.

Where gradient noise dominates, AdamW follows a stochastic differential equation in the
time η² per step. Runs that agree in it train alike, so hyper-parameters tuned once, at
a base batch and token count, hold at any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from diffmm.optim import validate
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.other_optimizers import power, scale_hyperparameters
from diffmm.optim.rates import BETA_FORMS, BetaForm

ClipForm = Literal["keep", "batch"]
CLIP_FORMS: tuple[str, ...] = get_args(ClipForm)

#: Horizon exponent fitted by Bethune et al., The Design Space of Tri-Modal Masked
#: Diffusion Models, arXiv 2602.21472; it moves with schedule and data.
TRIMODAL_HORIZON = 0.44


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Batch size and duration of a run, both counted in one unit.

    Only ratios of two budgets enter the rules, so tokens or samples serve alike; where
    the row length differs between base and target, only tokens are right.

    Attributes:
      batch: of one optimiser step, over all devices and accumulated micro-batches.
      tokens: of the whole run.
    """

    batch: float
    tokens: float

    def __post_init__(self) -> None:
        """Checks both sizes."""
        for name in ("batch", "tokens"):
            validate.positive(name, getattr(self, name))

    @property
    def steps(self) -> float:
        """Optimiser steps of the run, tokens / batch."""
        return self.tokens / self.batch


def kappa(base: Budget, target: Budget, horizon: float = 1.0) -> float:
    """Base steps that one target step replaces: (B/B_base)·(D_base/D)^γ.

    >>> kappa(Budget(batch=256, tokens=1e9), Budget(batch=1024, tokens=1e9))
    4.0

    Args:
      base: where the hyper-parameters were tuned.
      target: where they are to be used.
      horizon: γ ≥ 0. At 1, the default, SDE time and total decay of a run do not
        change with its duration, and nothing changes if batch and tokens grow alike;
        at 0 duration is ignored. Fits differ: see `TRIMODAL_HORIZON`.

    Returns:
      κ, a positive Python float; exactly 1 for equal budgets.

    Raises:
      ValueError: ``horizon`` negative or not finite.

    References:
      Mlodozeniec et al., Completed Hyperparameter Transfer across Modules, Width,
      Depth, Batch and Duration, arXiv 2512.22382.
    """
    horizon = validate.non_negative("horizon", horizon)
    return (target.batch / base.batch) / (target.tokens / base.tokens) ** horizon


def logical_batch(base: Budget, tokens: float, horizon: float = 1.0) -> float:
    """The batch at which the base hyper-parameters need no change: B_base·m_D^γ.

    The physical batch B is a choice of hardware; κ = B over this number.

    >>> base = Budget(batch=256, tokens=13e9)
    >>> round(logical_batch(base, 6.4e12, TRIMODAL_HORIZON), 3)
    3915.832

    Args:
      base: where the hyper-parameters were tuned.
      tokens: D of the target run, in the unit of ``base.tokens``.
      horizon: γ as in `kappa`.

    Returns:
      B̃ in the unit of ``base.batch``.

    Raises:
      ValueError: an argument out of range.
    """
    tokens = validate.positive("tokens", tokens)
    horizon = validate.non_negative("horizon", horizon)
    return base.batch * (tokens / base.tokens) ** horizon


def scale_by_kappa(
    hyper: AdamW,
    kappa: float,
    *,
    beta_form: BetaForm = "exponential",
    exact_decay: bool = False,
    clip_batch_ratio: float = 1.0,
) -> AdamW:
    """AdamW's hyper-parameters after one step has become κ steps.

    η, λ ∝ √κ (independent λ ∝ κ); ε ∝ 1/√κ, eps_root ∝ 1/κ; β and ρ to the power κ;
    clip ∝ 1/√(clip_batch_ratio).

    Args:
      hyper: at the base.
      kappa: positive; 1 leaves everything but ``clip`` untouched.
      beta_form: of b1 and b2, see `diffmm.optim.rates.scale_beta`.
      exact_decay: composes decay exactly over the κ steps, 1 − a′ = (1 − a)^κ with a
        the shrink per step, instead of a′ = κa.
      clip_batch_ratio: target batch over base batch, if clipping shall follow it.

    Returns:
      The hyper-parameters at the target.

    Raises:
      ValueError: ``kappa`` not positive, a linear β without a value, or a decay that
        would remove a whole weight in one step.
    """
    kappa = validate.positive("kappa", kappa)
    validate.one_of("beta_form", beta_form, BETA_FORMS)
    ratio = validate.positive("clip_batch_ratio", clip_batch_ratio)
    changes: dict[str, Any] = {}
    if kappa != 1:
        numbers = {
            name: getattr(hyper, name)
            for name in ("learning_rate", "b1", "b2", "eps", "eps_root")
        }
        if hyper.ema is not None:
            numbers["ema"] = hyper.ema
        numbers["weight_decay"] = hyper.weight_decay
        if hyper.learning_rate == 0:
            # Nothing to scale, and no shrink that exact decay could keep.
            del numbers["learning_rate"]
            exact_decay = exact_decay and hyper.decay == "independent"
        changes.update(
            scale_hyperparameters(
                numbers,
                kappa,
                "adamw",
                decay=hyper.decay,
                beta_form=beta_form,
                exact_decay=exact_decay,
            )
        )
    if hyper.clip is not None and ratio != 1:
        changes["clip"] = hyper.clip * power(ratio, -0.5)
    return dataclasses.replace(hyper, **changes) if changes else hyper


def reparameterise(
    hyper: AdamW,
    base: Budget,
    target: Budget,
    *,
    horizon: float = 1.0,
    beta_form: BetaForm = "exponential",
    exact_decay: bool = False,
    clip: ClipForm = "keep",
) -> AdamW:
    """Carries hyper-parameters from one batch size and duration to another.

    `scale_by_kappa` at κ = `kappa` (base, target, horizon). Below the critical batch
    size the target run then has the loss curve of a base run at the logical batch,
    over tokens. Per-leaf factors of width and depth are not touched by κ: they
    multiply, before or after.

    >>> hyper = AdamW(learning_rate=1e-3, b2=0.95, weight_decay=0.1)
    >>> base, target = Budget(batch=256, tokens=1e9), Budget(batch=1024, tokens=1e9)
    >>> new = reparameterise(hyper, base, target)
    >>> new.learning_rate, round(new.b1, 4), new.eps, new.weight_decay
    (0.002, 0.6561, 5e-09, 0.2)

    Args:
      hyper: tuned at ``base``.
      base: its batch size and duration.
      target: batch size and duration of the run to come, in the same units.
      horizon: γ, see `kappa`.
      beta_form: of b1 and b2, see `diffmm.optim.rates.scale_beta`.
      exact_decay: see `scale_by_kappa`.
      clip: ``"keep"``, as in the sources, or ``"batch"``: the threshold falls with
        √(B/B_base) as a noise-dominated gradient norm does; duration never enters.

    Returns:
      Hyper-parameters at the target; ``hyper`` itself if nothing changes.

    Raises:
      ValueError: as `kappa` and `scale_by_kappa`; unknown option.

    References:
      Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
      arXiv 2205.10287. Mlodozeniec et al., arXiv 2512.22382.
    """
    validate.one_of("clip", clip, CLIP_FORMS)
    ratio = target.batch / base.batch if clip == "batch" else 1.0
    return scale_by_kappa(
        hyper,
        kappa(base, target, horizon),
        beta_form=beta_form,
        exact_decay=exact_decay,
        clip_batch_ratio=ratio,
    )


class HorizonFit(NamedTuple):
    """A fitted horizon exponent.

    Attributes:
      horizon: γ.
      low: lower end of the bootstrap interval.
      high: upper end.
      intercept: of the fitted line, in natural logarithms.
      residuals: of the fitted line, in natural logarithms, in the order of the data.
    """

    horizon: float
    low: float
    high: float
    intercept: float
    residuals: tuple[float, ...]


def fit_horizon(
    tokens: Sequence[float],
    optimum: Sequence[float],
    *,
    of: Literal["learning_rate", "batch"] = "learning_rate",
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> HorizonFit:
    """Measures γ from the optima of sweeps at several durations.

    Least squares of log η* on log D at one batch size (slope −γ/2), or of the log of
    the optimal batch on log D at fixed hyper-parameters (slope γ). The interval is the
    percentile interval of a residual bootstrap: durations stay as designed, residuals
    are divided by √(1 − leverage), centred and drawn anew. It measures scatter about
    the line, not how coarse the sweep's grid was.

    >>> fit = fit_horizon([1e9, 1e10, 1e11], [1e-3, 6e-4, 3.6e-4])
    >>> round(fit.horizon, 2)
    0.44

    Args:
      tokens: D of each sweep; at least three, of two or more values.
      optimum: the best learning rate, or the best batch, of each.
      of: which of the two.
      level: of the interval, in (0, 1).
      num_samples: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      A `HorizonFit`; a negative slope of the batch gives a negative γ, which `kappa`
      refuses.

    Raises:
      ValueError: lengths that differ, too few or equal durations, values ≤ 0.
    """
    validate.one_of("of", of, ("learning_rate", "batch"))
    level = validate.positive("level", validate.probability("level", level))
    num_samples = validate.whole("num_samples", num_samples)
    if len(tokens) != len(optimum):
        raise ValueError(
            f"tokens and optimum must have one length, got {len(tokens)} and "
            f"{len(optimum)}."
        )
    x = np.log([validate.positive("tokens", value) for value in tokens])
    y = np.log([validate.positive("optimum", value) for value in optimum])
    if len(set(tokens)) < 2 or len(x) < 3:
        raise ValueError(
            f"tokens must hold at least 3 sweeps of 2 durations, got {list(tokens)}."
        )
    centred = x - x.mean()
    weights = centred / np.sum(centred**2)
    slope = weights @ y
    residuals = y - y.mean() - slope * centred
    spare = 1 - 1 / len(x) - weights * centred
    # A point with leverage 1 lies on the line whatever its error: it tells nothing.
    usable = spare > 1e-9
    errors = residuals[usable] / np.sqrt(spare[usable])
    errors -= errors.mean()
    draws = np.random.default_rng(seed).choice(errors, (num_samples, len(x)))
    tails = np.quantile(draws @ weights, [(1 - level) / 2, (1 + level) / 2])
    factor = -2.0 if of == "learning_rate" else 1.0
    low, high = sorted(factor * (slope + tails))
    return HorizonFit(
        horizon=float(factor * slope),
        low=float(low),
        high=float(high),
        intercept=float(y.mean() - slope * x.mean()),
        residuals=tuple(residuals.tolist()),
    )


def critical_batch(tokens: float, critical_steps: float, *, length: int = 1) -> int:
    """The largest batch that leaves the least number of steps: ⌊D/(L·S_crit)⌋.

    >>> critical_batch(1e9, 10_000, length=1024)
    97

    Args:
      tokens: D of the run.
      critical_steps: S_crit, the fewest optimiser steps that still reach the loss.
      length: L, tokens per row; 1 gives the batch in tokens.

    Returns:
      B_crit in rows; 0 if the run is too short for any.

    Raises:
      ValueError: an argument out of range.
    """
    tokens = validate.positive("tokens", tokens)
    critical_steps = validate.positive("critical_steps", critical_steps)
    length = validate.whole("length", length)
    return math.floor(tokens / (length * critical_steps))
