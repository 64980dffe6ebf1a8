"""One pure training step; micro-batches and devices leave its numbers unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from diffmm.training.state import TrainState
from diffmm.typing import Array, Params

RESERVED_METRICS = ("loss", "grad_norm", "nonfinite")


class LossFn(Protocol):
    """A loss that is additive over the rows of the batch."""

    def __call__(
        self, params: Params, batch: Any, key: Array, rows: Array, num_rows: int
    ) -> tuple[Array, Mapping[str, Any]]:
        """Loss and metrics of some rows of the global batch.

        Args:
          params: any pytree.
          batch: the rows, every leaf with a leading axis ``[b]``.
          key: the key of this step, the same for all rows; fold the row index in.
          rows: int32 ``[b]``, index of each row within the global batch.
          num_rows: rows in the global batch.

        Returns:
          ``(loss, metrics)``: a float32 scalar and a pytree of arrays, all of them
          sums over rows, so that the values of two disjoint sets of rows add up to
          the value of their union.
        """
        ...


def _split_rows(batch: Any, num_rows: int, micro_batches: int) -> tuple[Any, Array]:
    """Leaves ``[B, ...]`` to ``[M, B/M, ...]``, where micro-batch m has rows m::M.

    Interleaving keeps data parallelism balanced: the batch axis is sharded in
    contiguous blocks, and every block holds the same number of rows of each
    micro-batch. Contiguous micro-batches would sit on one device each.
    """
    shape = (num_rows // micro_batches, micro_batches)
    rows = jnp.arange(num_rows, dtype=jnp.int32).reshape(shape).T

    def split(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.moveaxis(leaf.reshape(shape + leaf.shape[1:]), 1, 0)

    return jax.tree.map(split, batch), rows


def _num_rows(batch: Any, micro_batches: int) -> int:
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in _leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "batch: every leaf needs the same leading axis of rows, got sizes "
            f"{sorted(map(str, sizes))}"
        )
    num_rows = int(next(iter(sizes)) or 0)
    if num_rows == 0 or num_rows % micro_batches:
        raise ValueError(
            f"batch has {num_rows} rows, which micro_batches={micro_batches} does not "
            "divide into equal non-empty parts"
        )
    return num_rows


def _leaves(batch: Any) -> list[Any]:
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError("batch has no arrays")
    return leaves


def _accumulator(shape: jax.ShapeDtypeStruct) -> Array:
    """Zeros, in float32 at least: sums of bfloat16 gradients would lose digits."""
    dtype = shape.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.promote_types(dtype, jnp.float32)
    return jnp.zeros(shape.shape, dtype)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    prepare: Callable[[Any], Any] | None = None,
    micro_batches: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """Builds ``step(state, batch) -> (state, metrics)``, a pure function.

    With rows split into micro-batches ``b_1 ... b_M`` the gradient is the sum
    ``Σ_m ∇ loss_fn(params, b_m)``: never a mean of means, because ``loss_fn`` sums
    over rows and ``prepare`` has already divided by denominators of the global batch.

    A step whose loss or gradient is not finite leaves ``params`` and ``opt_state``
    as they were, bit by bit, and reports ``nonfinite``; the caller decides what then
    (see `check_finite`). ``step`` advances in any case, as the data did.

    Args:
      loss_fn: a `LossFn`.
      optimizer: an optax transformation; it also receives ``value=loss``, for those
        that use it.
      prepare: applied once to the whole batch before it is split, for example to
        divide loss weights by the number of maskable positions.
      micro_batches: number M of equal parts that are run one after the other to
        save memory; part m holds the rows ``m::M``.

    Returns:
      A function to compile with ``jax.jit(step, donate_argnums=0)``. Its metrics are
      those of ``loss_fn`` plus float32 scalars ``loss`` and ``grad_norm`` (global
      norm, before anything the optimiser does) and bool ``nonfinite``.

    Raises:
      ValueError: if ``micro_batches`` is below 1; from the step, if the rows cannot
        be divided into that many parts or a metric has a reserved name.
    """
    if int(micro_batches) != micro_batches or micro_batches < 1:
        raise ValueError(f"micro_batches must be a positive integer: {micro_batches}")
    micro_batches = int(micro_batches)
    transformation = optax.with_extra_args_support(optimizer)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(params: Params, batch: Any, key: Array, num_rows: int) -> Any:
        if micro_batches == 1:
            rows = jnp.arange(num_rows, dtype=jnp.int32)
            return value_and_grad(params, batch, key, rows, num_rows)
        parts = _split_rows(batch, num_rows, micro_batches)

        def body(total: Any, part: Any) -> tuple[Any, None]:
            rows_batch, rows = part
            return _add(
                total, value_and_grad(params, rows_batch, key, rows, num_rows)
            ), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(
            lambda p, b, r: value_and_grad(p, b, key, r, num_rows), params, *first
        )
        total, _ = jax.lax.scan(body, jax.tree.map(_accumulator, shapes), parts)
        return total

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        num_rows = _num_rows(batch, micro_batches)
        if prepare is not None:
            batch = prepare(batch)
        key = jax.random.fold_in(state.key, state.step)
        (loss, extra), grads = accumulate(state.params, batch, key, num_rows)
        taken = [name for name in RESERVED_METRICS if name in extra]
        if taken:
            raise ValueError(f"loss_fn: metrics {taken} are reserved names")
        grad_norm = optax.tree.norm(
            jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = transformation.update(
            grads, state.opt_state, state.params, value=loss
        )
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = {**extra, "loss": loss, "grad_norm": grad_norm, "nonfinite": ~finite}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step
