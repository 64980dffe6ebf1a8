"""What every running average of parameters needs: trees, rates and a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffmm._tree import map_with_name, named_leaves
from diffmm.optim import validate
from diffmm.typing import Array, ArrayLike, Params

Scalar = float | ArrayLike
MAX_INT = np.iinfo(np.int32).max


def is_number(value: Any) -> bool:
    """Whether the value is known on the host; arrays may be traced and are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def scalar(value: Scalar) -> Scalar:
    """Host numbers as Python floats, arrays in float32 at least."""
    if is_number(value):
        return float(value)
    array = jnp.asarray(value)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _check_names_and_shapes(average: Params, params: Params, name: str) -> None:
    ours, theirs = named_leaves(average), named_leaves(params)
    if set(ours) != set(theirs):
        raise ValueError(
            f"{name} and the parameters differ in tree structure: only in {name}: "
            f"{sorted(set(ours) - set(theirs))}, only in the parameters: "
            f"{sorted(set(theirs) - set(ours))}"
        )
    for leaf, value in ours.items():
        if jnp.shape(value) != jnp.shape(theirs[leaf]):
            raise ValueError(
                f"{name}: leaf {leaf!r} has shape {jnp.shape(value)}, the parameter "
                f"has {jnp.shape(theirs[leaf])}"
            )


def check_same_trees(average: Params, params: Params, name: str = "average") -> None:
    """Raises ValueError unless two trees agree in structure and shapes."""
    _check_names_and_shapes(average, params, name)
    ours: Any = jax.tree.structure(average)
    theirs: Any = jax.tree.structure(params)
    if ours != theirs:
        raise ValueError(
            f"{name} and the parameters differ in tree structure: {ours} against "
            f"{theirs}"
        )


def arranged_like(average: Params, like: Params) -> Params:
    """The leaves of one tree in the containers of another with the same names.

    Optimiser wrappers put containers of their own around what they hold, as
    `flax.nnx.Optimizer` does around variables.
    """
    _check_names_and_shapes(average, like, "average")
    leaves = named_leaves(average)
    return map_with_name(lambda name, _: leaves[name], like)


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf has an average; integers, booleans and PRNG keys are copied."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def accumulator(leaf: Any) -> Array:
    """A copy of a leaf in the precision of its average: float32 at least."""
    if not is_averaged(leaf):
        return jnp.array(leaf)
    return jnp.array(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def zeros(leaf: Array) -> Array:
    """Zeros in place of an average; copied leaves stay."""
    return jnp.zeros_like(leaf) if is_averaged(leaf) else leaf


def all_finite(tree: Params) -> Array:
    """Bool scalar: no NaN or infinity in any floating-point leaf."""
    # Maxima carry NaN along, and unlike a mask they never lie in memory.
    largest = [
        jnp.max(jnp.abs(leaf), initial=0)
        for leaf in jax.tree.leaves(tree)
        if is_averaged(leaf)
    ]
    finite = [jnp.isfinite(each) for each in largest]
    return jnp.stack(finite).all() if finite else jnp.array(True)


def move(average: Params, params: Params, rate: Scalar, enter: Array) -> Params:
    """``average + rate (params − average)`` where ``enter``, ``average`` elsewhere."""

    def leaf(old: Any, new: Any) -> Array:
        if not is_averaged(old):
            return jnp.where(enter, new, old)
        old, new = jnp.asarray(old), jnp.asarray(new)
        old = old.astype(jnp.promote_types(old.dtype, jnp.float32))
        # NaN times zero is NaN: what may not enter is replaced, not weighted by zero.
        new = jnp.where(enter, new.astype(old.dtype), old)
        step = jnp.asarray(rate, jnp.finfo(old.dtype).dtype)
        return old + step * (new - old)

    return jax.tree.map(leaf, average, params)


def cast_like(average: Params, like: Params | None) -> Params:
    """The average in the dtypes of another tree; as it is when that is None."""
    if like is None:
        return average
    return jax.tree.map(
        lambda a, p: a.astype(jnp.result_type(p)) if is_averaged(a) else a,
        arranged_like(average, like),
        like,
    )


def states_of(tree: Any, kind: type) -> list[Any]:
    """All states of one kind, anywhere in a pytree such as a nested optax state."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def only_state(tree: Any, kind: type, maker: str) -> Any:
    states = states_of(tree, kind)
    if len(states) != 1:
        raise ValueError(
            f"found {len(states)} states of type {kind.__name__}, need exactly 1: "
            + (
                "pass the one that is meant"
                if states
                else f"put {maker}(...) last in the optax.chain"
            )
        )
    return states[0]


class Clock(NamedTuple):
    """Samples seen so far, in reference batches; exact where float32 would stall.

    Attributes:
      whole: int32 scalar, full reference batches; saturates at 2³¹ − 1.
      part: float32 scalar in [0, 1), the rest.
    """

    whole: Array
    part: Array

    def read(self) -> Array:
        """Float32 scalar s / B_ref."""
        return self.whole.astype(jnp.float32) + self.part

    def advance(self, kappa: Scalar) -> Clock:
        """The clock after a batch of ``kappa`` reference batches."""
        total = self.part + jnp.asarray(kappa, jnp.float32)
        carry = jnp.floor(total)
        step = carry.astype(jnp.int32)
        whole = jnp.where(self.whole > MAX_INT - step, MAX_INT, self.whole + step)
        return Clock(whole, total - carry)


class Progress(NamedTuple):
    """When an average was refreshed last, and what has happened since.

    Attributes:
      clock: samples seen, in reference batches.
      since: int32 scalar, optimiser steps since the last refresh.
      pending: float32 scalar, samples of these steps in reference batches.
      skipped: int32 scalar, refreshes left out because something was not finite.
    """

    clock: Clock
    since: Array
    pending: Array
    skipped: Array


def start_progress() -> Progress:
    # An array each: one that appears twice cannot be donated.
    counters = [jnp.zeros((), jnp.int32) for _ in range(3)]
    sums = [jnp.zeros((), jnp.float32) for _ in range(2)]
    return Progress(
        clock=Clock(whole=counters[0], part=sums[0]),
        since=counters[1],
        pending=sums[1],
        skipped=counters[2],
    )


def check_batches(kappa: Any, batch_ref: Any) -> None:
    if is_number(kappa):
        validate.positive("kappa", kappa)
    if batch_ref is None:
        return
    validate.positive("batch_ref", batch_ref)
    if not (is_number(kappa) and kappa == 1):
        raise ValueError(
            f"pass either kappa or batch_ref, got kappa={kappa!r} and "
            f"batch_ref={batch_ref!r}: with batch_ref each step brings its own kappa"
        )


def step_kappa(kappa: Scalar, batch_ref: float | None, batch: Any) -> Scalar:
    """κ of this step: fixed, or from the batch that the update was called with."""
    if batch_ref is None:
        if batch is not None:
            raise ValueError(
                "batch was passed to update, but the average was made with a fixed "
                "kappa; make it with batch_ref=... to count in samples"
            )
        return kappa
    if batch is None:
        raise ValueError(
            "batch_ref is set: call update(updates, state, params, batch=...) with "
            "the number of samples (or tokens) of the step"
        )
    if is_number(batch) and validate.positive("batch", batch) < 1:
        raise ValueError(f"batch must be at least 1, got {batch!r}.")
    return scalar(batch) / batch_ref


def refresh(
    progress: Progress,
    averages: Any,
    updates: Params,
    params: Params | None,
    kappa: Scalar,
    *,
    order: str,
    update_every: int,
    rate: Callable[[Progress, Scalar], Any],
    apply: Callable[[Any, Params, Any, Array], Any],
) -> tuple[Progress, Any]:
    """One optimiser step of any average.

    Args:
      progress: before the step.
      averages: whatever ``apply`` moves.
      updates: of the step, as they will be added to the parameters.
      params: before the step.
      kappa: samples of the step in reference batches.
      order: ``"post"`` averages ``params + updates``, ``"pre"`` averages ``params``.
      update_every: refresh on every that many steps.
      rate: of the refresh, from the progress before the step and the samples since
        the last refresh in reference batches.
      apply: ``(averages, parameters, rate, enter) -> averages``.

    Returns:
      Progress and averages after the step.
    """
    if params is None:
        raise ValueError(
            "params is None: the average is of the parameters, call "
            "update(updates, state, params)"
        )
    after = optax.apply_updates(params, updates)
    entering = after if order == "post" else params
    # Finite parameters after the step imply finite parameters before it and finite
    # updates.
    finite = all_finite(after)
    due = progress.since + 1 >= update_every
    exponent = kappa if update_every == 1 else progress.pending + kappa

    def moved() -> Any:
        return apply(averages, entering, rate(progress, exponent), finite)

    if update_every == 1:  # nothing to branch on: fuses with the optimiser's update
        averages = moved()
    else:
        averages = jax.lax.cond(due, moved, lambda: averages)
    enter, skip = due & finite, due & ~finite
    pending = progress.pending + jnp.asarray(kappa, jnp.float32)
    return Progress(
        clock=progress.clock.advance(kappa),
        since=jnp.where(enter, 0, jnp.where(skip, progress.since, progress.since + 1)),
        pending=jnp.where(enter, 0.0, jnp.where(skip, progress.pending, pending)),
        skipped=progress.skipped + skip.astype(jnp.int32),
    ), averages
