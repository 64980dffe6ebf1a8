"""Optimiser states after a change of the batch: Adam's memory and every step count."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffmm.optim import validate

# Products of numerator and denominator stay below this, inside int32.
_LARGEST_PRODUCT = 2**30
_LARGEST_COUNT = 2**31 - 1

#: States whose second moment is an average of squared gradients, and those fields.
_AVERAGES: dict[type, tuple[str, ...]] = {
    optax.ScaleByAdamState: ("nu",),
    optax.ScaleByBeliefState: ("nu",),
    optax.ScaleByAmsgradState: ("nu", "nu_max"),
    optax.ScaleByRmsState: ("nu",),
}
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _ratio(kappa: float) -> tuple[Fraction, float]:
    """κ as a fraction small enough for int32, and what 1/κ has beyond its inverse."""
    room = math.isqrt(int(_LARGEST_PRODUCT / max(kappa, 1 / kappa))) or 1
    if kappa >= 1:
        ratio = Fraction(kappa).limit_denominator(room)
    else:
        ratio = 1 / Fraction(1 / kappa).limit_denominator(room)
    excess = float(1 / Fraction(kappa) - 1 / ratio)
    # The quotient of two batches in float64 is off by rounding only.
    return ratio, 0.0 if abs(excess) <= 4e-16 / kappa else excess


def remap_count(count: Any, kappa: float) -> Any:
    """Steps of the new batch that hold as many tokens: max(1, round(count/κ)).

    Halves go to even, as in Python. Integer arithmetic, so that host and device agree
    at every count, if κ is a ratio of whole batches whose product, without common
    factors, is below 2^30; of other κ an array may round to the neighbour. 0 stays 0;
    what exceeds int32 stops at its largest value.

    >>> [remap_count(count, 4.0) for count in (0, 1, 10, 1000)]
    [0, 1, 2, 250]

    Args:
      count: a Python int, or an int32 array that may be traced.
      kappa: new over old batch, positive.

    Returns:
      The count, in the type that came.

    Raises:
      ValueError: ``kappa`` not positive, or beyond 2^±30.
    """
    kappa = validate.positive("kappa", kappa)
    if kappa == 1:
        return count
    if max(kappa, 1 / kappa) > _LARGEST_PRODUCT:
        raise ValueError(
            f"kappa must be a ratio of batches within 2^-30 and 2^30, got {kappa!r}."
        )
    ratio, excess = _ratio(kappa)
    if isinstance(count, int):
        quotient = count / (Fraction(kappa) if excess else ratio)
        return min(max(1, round(quotient)), _LARGEST_COUNT) if count else 0
    count = jnp.asarray(count)
    new, old = ratio.denominator, ratio.numerator
    whole, rest = count // old, count % old
    result = whole * new + rest * new // old
    spare = rest * new % old
    if excess:
        more = spare.astype(jnp.float32) / old + count.astype(jnp.float32) * excess
        result += jnp.round(more).astype(count.dtype)
    else:
        tie = (2 * spare == old) & (result % 2 == 1)
        result += ((2 * spare > old) | tie).astype(count.dtype)
    too_many = count.astype(jnp.float32) / kappa >= _LARGEST_COUNT
    result = jnp.where(too_many, _LARGEST_COUNT, jnp.maximum(result, 1))
    return jnp.where(count == 0, 0, result).astype(count.dtype)


def change_batch(opt_state: Any, kappa: float) -> Any:
    """Turns an optimiser's state into that of a run at κ times the batch.

    * The second moment is an average of squared gradients, hence of their noise:
      ν → ν/κ. The first moment, an average of gradients, is kept. (Adagrad's sum over
      steps of squares: /κ².)
    * Step counts, of bias correction and of schedules: `remap_count`. What bias
      correction needs is the weight that the zero initialisation still has, the product
      of all β so far. With the exponential form it is β^count = (β^κ)^(count/κ), so the
      new count with the new β continues it, in optax's own state; with the other forms
      to first order. Only rounding is lost, which matters while count is below a few κ:
      do not switch in the first steps.
    * A schedule that `diffmm.optim.schedules.by_steps` built for the *new* batch then
      stands at the same token as before, within half a step; `BatchRamp.phase_schedule`
      removes that too.

    The structure stays, so the state goes into the same optimiser built with the new
    hyper-parameters. All else is left alone: momentum traces, averages of weights,
    wrappers, and numbers that ``optax.inject_hyperparams`` holds in its state, which
    the caller sets. To save memory: ``jax.jit(change_batch, static_argnums=1,
    donate_argnums=0)``.

    >>> state = optax.adam(1e-3).init({"w": jnp.ones(2)})
    >>> state = (state[0]._replace(count=jnp.asarray(32), nu={"w": jnp.ones(2)}),)
    >>> new = change_batch(state, 16.0)[0]
    >>> int(new.count), new.nu["w"].tolist()
    (2, [0.0625, 0.0625])

    Args:
      opt_state: any nesting of optax states that holds Adam, AdaBelief, AMSGrad,
        RMSProp or Adagrad somewhere: chains, masks, partitions, accumulation.
      kappa: new over old batch, a positive number (not traced).

    Returns:
      A state of the same structure and dtypes.

    Raises:
      ValueError: ``kappa`` not positive, or no such state in ``opt_state``.

    References:
      Busbridge et al., How to Scale Your EMA, arXiv 2307.13813 (progressive scaling).
    """
    kappa = validate.positive("kappa", kappa)
    found = 0

    def is_known(node: Any) -> bool:
        return (
            isinstance(node, (*_AVERAGES, *_INJECTED, optax.ScaleByRssState))
            # ScaleByScheduleState and other clocks of schedules.
            or getattr(node, "_fields", None) == ("count",)
        )

    def divide(tree: Any, factor: float) -> Any:
        if factor == 1:
            return tree
        return jax.tree.map(lambda leaf: (leaf / factor).astype(leaf.dtype), tree)

    def remap(node: Any) -> Any:
        nonlocal found
        if not is_known(node):
            return node
        changes = {}
        if "count" in node._fields:
            changes["count"] = remap_count(node.count, kappa)
        if isinstance(node, _INJECTED):
            for name in ("hyperparams_states", "inner_state"):
                if name in node._fields:
                    changes[name] = visit(getattr(node, name))
        elif isinstance(node, optax.ScaleByRssState):
            found += 1
            changes["sum_of_squares"] = divide(node.sum_of_squares, kappa**2)
        elif type(node) in _AVERAGES:
            found += 1
            for name in _AVERAGES[type(node)]:
                changes[name] = divide(getattr(node, name), kappa)
        return node._replace(**changes)

    def visit(tree: Any) -> Any:
        return jax.tree.map(remap, tree, is_leaf=is_known)

    result = visit(opt_state)
    if not found:
        raise ValueError(
            "opt_state must hold the state of Adam or a relative of it (AdaBelief, "
            "AMSGrad, RMSProp, Adagrad), whose second moment a change of the batch "
            f"rescales; found none in {jax.tree.structure(opt_state)}."
        )
    return result
