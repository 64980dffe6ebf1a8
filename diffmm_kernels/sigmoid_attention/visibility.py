"""Which keys a query sees, in the two forms that implementations need.

Windows, causality and lengths give every query an interval of keys; segment ids are
compared; a dense mask is intersected. `visible` is the definition. Kernels take the
intervals, and from `tile_plan` and `ranges` which tiles to visit and which of those
need no masking at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options


def positions(operands: Operands, options: Options) -> Any:
    """Positions of the queries among the keys, int32 ``[B, T]``."""
    b, t = operands.q.shape[:2]
    index = jnp.arange(t, dtype=jnp.int32)[None]
    if operands.q_offset is not None:
        return index + operands.q_offset
    return jnp.broadcast_to(index + options.q_offset, (b, t))


class Intervals(NamedTuple):
    """Query i sees at most the keys ``start[b, i] <= j < end[b, i]``; int32 ``[B, T]``.

    Invisible rows have ``start = end = 0``.
    """

    start: Any
    end: Any


def row_intervals(operands: Operands, options: Options) -> Intervals:
    """What windows, causality, lengths and padding leave to each query.

    Queries with negative segment ids see nothing. Other ids must still be compared.
    """
    s = operands.k.shape[1]
    position = positions(operands, options)
    start = jnp.zeros_like(position)
    end = jnp.full_like(position, s)
    if options.left is not None:
        start = jnp.maximum(start, position - options.left)
    if options.right is not None:
        end = jnp.minimum(end, position + options.right + 1)
    if operands.kv_lengths is not None:
        end = jnp.minimum(end, operands.kv_lengths[:, None])
    seen = start < end
    if operands.q_lengths is not None:
        row = jnp.arange(position.shape[1], dtype=jnp.int32)[None]
        seen = seen & (row < operands.q_lengths[:, None])
    if operands.q_segment_ids is not None:
        seen = seen & (operands.q_segment_ids >= 0)
    return Intervals(jnp.where(seen, start, 0), jnp.where(seen, end, 0))


def unrestricted(operands: Operands, options: Options) -> bool:
    """Whether every query sees every key, as far as tracing can tell."""
    restricting = (
        *(operands.q_segment_ids, operands.q_lengths, operands.kv_lengths),
        *(operands.mask, options.left, options.right),
    )
    return all(x is None for x in restricting)


def visible(operands: Operands, options: Options) -> Any:
    """Boolean ``[B, 1 or H, T, S]``: the definition."""
    s = operands.k.shape[1]
    start, end = row_intervals(operands, options)
    key = jnp.arange(s, dtype=jnp.int32)[None, None, :]
    seen = (start[:, :, None] <= key) & (key < end[:, :, None])
    if operands.q_segment_ids is not None:
        ids = operands.q_segment_ids[:, :, None], operands.kv_segment_ids[:, None, :]
        seen = seen & (ids[0] == ids[1])
    seen = seen[:, None]
    return seen if operands.mask is None else seen & operands.mask


class TilePlan(NamedTuple):
    """Boolean ``[B, tiles of queries, tiles of keys]``, dense masks left aside.

    Attributes:
      some: some pair of the tile may be visible; False only where none is.
      every: all pairs of the tile are visible, and all its rows and keys exist.
    """

    some: Any
    every: Any


def tile_plan(
    operands: Operands, options: Options, block_q: int, block_kv: int
) -> TilePlan:
    """Which tiles of ``block_q`` by ``block_kv`` to visit and which to mask.

    From the extremes of each tile alone, so that its cost is that of one pass over
    the rows; exact for intervals, and for segment ids in ascending order.
    """
    t, s = operands.q.shape[1], operands.k.shape[1]
    num_q, num_kv = -(-t // block_q), -(-s // block_kv)
    start, end = row_intervals(operands, options)

    def tiles(x: Any, num: int, block: int, fill: int) -> Any:
        x = jnp.pad(x, ((0, 0), (0, num * block - x.shape[1])), constant_values=fill)
        return x.reshape(x.shape[0], num, block)

    # Rows past T and rows that see nothing do not widen a tile's interval.
    empty = start >= end
    low = tiles(jnp.where(empty, s, start), num_q, block_q, s).min(-1)[:, :, None]
    high = tiles(end, num_q, block_q, 0).max(-1)[:, :, None]
    inner_low = tiles(start, num_q, block_q, s).max(-1)[:, :, None]
    inner_high = tiles(end, num_q, block_q, 0).min(-1)[:, :, None]
    first = (jnp.arange(num_kv, dtype=jnp.int32) * block_kv)[None, None, :]
    last = first + block_kv  # one past the end
    some = (first < high) & (last > low)
    every = (inner_low <= first) & (last <= inner_high)
    if operands.q_segment_ids is not None:
        largest = jnp.iinfo(jnp.int32).max
        q_ids, kv_ids = operands.q_segment_ids, operands.kv_segment_ids
        q_low = jnp.where(q_ids < 0, largest, q_ids)
        kv_low = jnp.where(kv_ids < 0, largest, kv_ids)
        q_low = tiles(q_low, num_q, block_q, largest).min(-1)[:, :, None]
        q_high = tiles(q_ids, num_q, block_q, -1).max(-1)[:, :, None]
        kv_low = tiles(kv_low, num_kv, block_kv, largest).min(-1)[:, None, :]
        kv_high = tiles(kv_ids, num_kv, block_kv, -1).max(-1)[:, None, :]
        # Padding inside a tile of keys: then not every key of it is visible.
        kv_least = tiles(kv_ids, num_kv, block_kv, -1).min(-1)[:, None, :]
        some = some & (q_low <= kv_high) & (kv_low <= q_high)
        every = every & (q_low == q_high) & (kv_least == kv_high) & (q_low == kv_low)
    return TilePlan(some, every)


class Ranges(NamedTuple):
    """Tiles to visit along one axis, int32 ``[B, n]`` each, in units of tiles.

    Visit ``low <= j < high``; those with ``full_low <= j < full_high`` unmasked.
    ``low <= full_low <= full_high <= high`` always; nothing to visit: all 0.
    """

    low: Any
    full_low: Any
    full_high: Any
    high: Any


def ranges(plan: TilePlan, axis: int) -> Ranges:
    """Bounds of the loops over one axis of a plan.

    Args:
      plan: from `tile_plan`.
      axis: 2 loops over the tiles of keys of each tile of queries (forward, dq);
        1 loops over the tiles of queries of each tile of keys (dk, dv).
    """
    n = plan.some.shape[axis]
    index = jnp.arange(n, dtype=jnp.int32)
    index = jnp.expand_dims(index, (0, 3 - axis))
    low = jnp.where(plan.some, index, n).min(axis)
    high = jnp.where(plan.some, index + 1, 0).max(axis)
    low = jnp.minimum(low, high)
    # The first run of full tiles.
    full_low = jnp.minimum(jnp.where(plan.every, index, n).min(axis), high)
    after = index >= jnp.expand_dims(full_low, axis)
    full_high = jnp.where(after & ~plan.every, index, n).min(axis)
    full_high = jnp.clip(full_high, full_low, high)
    return Ranges(low, full_low, full_high, high)
