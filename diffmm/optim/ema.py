"""Exponential moving averages of parameters whose clock is samples, not steps.

An average that was tuned at batch B_ref is the same average at batch κ·B_ref if its
decay becomes ρ^κ: per sample it forgets as before. `ema_params` keeps one beside any
optax optimiser, `update_average` is the same rule as a plain function.

The linear form of the rule, 1 − κ(1−ρ), is `scale_decay(rho, kappa, "linear")`, passed
as ``rho`` with κ left at 1; it agrees to first order in κ(1−ρ).

Limits. κ(1−ρ) must be small, since parameters within one large step are not seen; the
learning rate has to be scaled too. With gradient accumulation the average belongs
inside `optax.MultiSteps`, so that it moves once per optimiser step; κ counts the whole
accumulated batch, summed over devices.

References:
  Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813.
  Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffmm.optim import _averaging as averaging
from diffmm.optim import validate
from diffmm.optim.rates import complement, scale_decay
from diffmm.typing import Array, ArrayLike, Params

Order = Literal["post", "pre"]
#: A decay at the reference batch: a number, a traced scalar, or a function of the
#: samples seen so far in reference batches, n = s / B_ref.
Decay = float | ArrayLike | Callable[[Array], Array]


def decay_rate(rho: float | ArrayLike, kappa: float | ArrayLike = 1.0) -> float | Array:
    """The weight 1 − ρ^κ of new parameters, without cancellation.

    Args:
      rho: decay in [0, 1]; a Python number, or a scalar that may be traced.
      kappa: positive exponent, likewise.

    Returns:
      A Python float if both arguments are Python numbers, else a float32 scalar.

    Raises:
      ValueError: a Python number out of range.
    """
    if averaging.is_number(rho):
        validate.probability("rho", rho, one=True)
    if averaging.is_number(kappa):
        validate.positive("kappa", kappa)
    if averaging.is_number(rho) and averaging.is_number(kappa):
        return complement(float(rho), float(kappa))
    rho = averaging.scalar(rho)
    if isinstance(rho, float):
        log_rho: Any = math.log(rho) if rho > 0 else -math.inf
    else:
        log_rho = jnp.log(rho)
    return -jnp.expm1(log_rho * averaging.scalar(kappa))


def update_average(
    average: Params,
    params: Params,
    rho: float | ArrayLike,
    kappa: float | ArrayLike = 1.0,
) -> Params:
    """One update of an average: ``ζ + (1 − ρ^κ)(θ − ζ)``.

    If any floating-point leaf of ``params`` is not finite the average stays as it is.

    Args:
      average: ζ, the same pytree as ``params``.
      params: θ. Leaves that are not floating-point replace those of the average.
      rho: decay at the reference batch, in [0, 1]; may be traced.
      kappa: batch over reference batch, times the number of steps since the average
        was last updated; may be traced.

    Returns:
      The new average, floating-point leaves in float32 at least.

    Raises:
      ValueError: a Python number out of range, or trees that differ.
    """
    averaging.check_same_trees(average, params)
    rate = decay_rate(rho, kappa)
    return averaging.move(average, params, rate, averaging.all_finite(params))


def update_batch_stats(
    average: Params,
    batch_stats: Params,
    rho: float | ArrayLike,
    kappa: float | ArrayLike = 1.0,
    *,
    mode: Literal["ema", "copy", "skip"] = "ema",
) -> Params:
    """Normalisation statistics of the averaged model, after one step.

    Not to be confused with the momentum of the normalisation layer itself; see
    `scale_batch_norm_momentum`.

    Args:
      average: statistics that go with the averaged parameters.
      batch_stats: those of the trained model.
      rho: decay of the parameters' average at the reference batch.
      kappa: as in `update_average`.
      mode: ``"ema"`` averages them like the parameters, ``"copy"`` takes those of the
        trained model, ``"skip"`` leaves the average as it is.

    Returns:
      The new statistics. Under ``"ema"`` and ``"copy"``, statistics that are not
      finite do not enter.

    Raises:
      ValueError: an unknown mode, and as `update_average`.
    """
    validate.one_of("mode", mode, ("ema", "copy", "skip"))
    if mode == "skip":
        averaging.check_same_trees(average, batch_stats)
        return average
    return update_average(average, batch_stats, 0.0 if mode == "copy" else rho, kappa)


def scale_batch_norm_momentum(momentum: float, kappa: float) -> float:
    """Momentum m of running statistics after the batch grew by κ: m^κ.

    ``momentum`` weighs the *old* value, as in Flax; PyTorch's is one minus it. The
    number of samples that the statistics are computed over should stay as it was
    (ghost batches), or the loss itself changes.

    >>> round(scale_batch_norm_momentum(0.9, 4), 4)
    0.6561

    Raises:
      ValueError: an argument out of range.
    """
    return scale_decay(momentum, kappa, name="momentum")


class EmaState(NamedTuple):
    """State of `ema_params`: plain arrays.

    Attributes:
      average: ζ, the tree of the parameters, in float32 at least.
      weight: float32 scalar, total weight of what has entered, 1 − Π ρ^κ from zeros
        and 1 otherwise; dividing by it is exact under any sequence of decays.
      progress: clock and counters.
    """

    average: Params
    weight: Array
    progress: averaging.Progress

    @property
    def skipped(self) -> Array:
        """Int32 scalar: steps that were left out because something was not finite."""
        return self.progress.skipped

    @property
    def reference_batches(self) -> Array:
        """Float32 scalar: samples seen so far over the reference batch."""
        return self.progress.clock.read()


def ema_params(
    rho: Decay,
    *,
    kappa: float | ArrayLike = 1.0,
    batch_ref: float | None = None,
    order: Order = "post",
    update_every: int = 1,
    init: Literal["copy", "zeros"] | Params = "copy",
) -> optax.GradientTransformationExtraArgs:
    """Averages the *parameters* beside an optimiser; updates pass through unchanged.

    Put it last in an `optax.chain`, where updates are what is added to the parameters,
    and read the average with `averaged_params`::

        optimizer = optax.chain(optax.adamw(1e-3), ema_params(0.9999, kappa=4))

    At every refresh ``ζ ← ζ + (1 − ρ^(κ n)) (θ − ζ)`` with n = ``update_every``.

    A step after which a floating-point parameter is not finite never enters: average,
    weight and the refresh that was due stay as they were, ``skipped`` in the state
    grows by one, and the clock moves on, as the data did. Training steps that restore
    the whole optimiser state after such a gradient (`diffmm.training.make_train_step`,
    `optax.apply_if_finite`) never show the step to the average, nor to the counter.

    Args:
      rho: decay at the reference batch, in [0, 1]: a number, a scalar that may be
        traced, or a schedule, called with n = s / B_ref before the step (float32
        scalar: the step count of the reference run) and raised to the power
        afterwards; see `cosine_decay` and `warmup_decay`.
      kappa: batch over reference batch, where the batch is fixed.
      batch_ref: where the batch varies from step to step, the reference batch, in
        samples or tokens. Each step then needs ``update(..., batch=B_t)``, a number or
        a traced scalar, and decays by ρ^(B_t / B_ref): by ρ^(s / B_ref) in total after
        s samples if ρ is constant.
      order: ``"post"`` averages the parameters that the step leads to, ``"pre"`` those
        that it starts from.
      update_every: n, optimiser steps between refreshes.
      init: ``"copy"`` of the initial parameters, ``"zeros"`` (`averaged_params` then
        divides by the weight that has entered), or a tree of initial values.

    Returns:
      A transformation whose state is an `EmaState`. States of transformations with
      other ``rho``, ``kappa`` or ``batch_ref`` are interchangeable, so that a new κ
      continues where the old one stopped.

    Raises:
      ValueError: an argument out of range; in ``init`` and ``update``, trees that
        differ, parameters that are missing, or ``batch`` that is missing, below 1, or
        present where κ is fixed.

    References:
      Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813.
    """
    averaging.check_batches(kappa, batch_ref)
    validate.one_of("order", order, ("post", "pre"))
    update_every = validate.whole("update_every", update_every)
    if isinstance(init, str):
        validate.one_of("init", init, ("copy", "zeros"))
    if averaging.is_number(rho):
        validate.probability("rho", rho, one=True)

    def init_fn(params: Params) -> EmaState:
        start, weight = params, 1.0
        if not isinstance(init, str):
            averaging.check_same_trees(init, params, "init")
            start = init
        average = jax.tree.map(averaging.accumulator, start)
        if isinstance(init, str) and init == "zeros":
            weight = 0.0
            average = jax.tree.map(averaging.zeros, average)
        return EmaState(
            average, jnp.asarray(weight, jnp.float32), averaging.start_progress()
        )

    def rate(progress: averaging.Progress, exponent: Any) -> float | Array:
        now = rho(progress.clock.read()) if callable(rho) else rho
        return decay_rate(now, exponent)

    def apply(averages: Any, params: Params, rate: Any, enter: Array) -> Any:
        average, weight = averages
        averaging.check_same_trees(average, params)
        # The weight is the average of the constant 1: same operations, same rounding.
        return (
            averaging.move(average, params, rate, enter),
            averaging.move(weight, jnp.ones(()), rate, enter),
        )

    def update_fn(
        updates: Params,
        state: EmaState,
        params: Params | None = None,
        *,
        batch: Any = None,
        **extra_args: Any,
    ) -> tuple[Params, EmaState]:
        del extra_args
        progress, (average, weight) = averaging.refresh(
            state.progress,
            (state.average, state.weight),
            updates,
            params,
            averaging.step_kappa(kappa, batch_ref, batch),
            order=order,
            update_every=update_every,
            rate=rate,
            apply=apply,
        )
        return updates, EmaState(average, weight, progress)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ema_from_half_life(
    half_life: float, *, batch: float | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """`ema_params` that forgets half within a number of samples, at any batch.

    Args:
      half_life: samples (or tokens), positive.
      batch: samples (or tokens) per step; None if each step passes its own,
        ``update(..., batch=B_t)``.
      **options: ``order``, ``update_every``, ``init`` of `ema_params`.

    Raises:
      ValueError: an argument out of range.
    """
    half_life = validate.positive("half_life", half_life)
    # With one half-life as the reference batch, ρ is one half.
    if batch is None:
        return ema_params(0.5, batch_ref=half_life, **options)
    kappa = validate.positive("batch", batch) / half_life
    return ema_params(0.5, kappa=kappa, **options)


def averaged_params(
    opt_state: Any, like: Params | None = None, *, debias: bool = True
) -> Params:
    """Reads the averaged parameters from an optimiser's state.

    Args:
      opt_state: an `EmaState`, or any pytree that contains exactly one, such as the
        state of an `optax.chain` or a whole training state.
      like: parameters, whose dtypes and containers the result takes. Before anything
        has entered an average that started from zeros, the result is ``like`` itself.
      debias: divide by the total weight, which matters for ``init="zeros"`` only.

    Returns:
      The tree of the parameters; without ``like`` in float32 at least.

    Raises:
      ValueError: no `EmaState` or more than one; ``like`` with other names
        or shapes.
    """
    state = averaging.only_state(opt_state, EmaState, "ema_params")
    average = state.average
    if debias:
        empty = state.weight == 0
        total = jnp.where(empty, 1.0, state.weight)
        if like is not None:
            average = averaging.arranged_like(average, like)
            average = averaging.move(average, like, 1.0, empty)
        average = jax.tree.map(
            lambda leaf: (
                leaf / total.astype(jnp.finfo(leaf.dtype).dtype)
                if averaging.is_averaged(leaf)
                else leaf
            ),
            average,
        )
    return averaging.cast_like(average, like)
