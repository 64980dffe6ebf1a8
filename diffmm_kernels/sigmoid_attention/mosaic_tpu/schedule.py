"""Which tiles a kernel visits, as a list in scalar memory.

A grid over all pairs of tiles spends a step on each invisible pair. Here one axis of
the grid walks a list of the visible pairs in the order of their outer tile, and its
length is a run-time value: the rest is neither fetched nor stepped over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.visibility import (
    ranges,
    tile_plan,
    unrestricted,
)

# An entry of the list: number of the outer tile, of the inner tile, and flags.
FIRST = 1  # of its outer tile
LAST = 2  # of its outer tile
VISIT = 4  # unset for an outer tile that sees nothing, which has one entry
FULL = 8  # every pair of the tile is visible
_INNER_SHIFT, _OUTER_SHIFT = 4, 17

MAX_TILES = 1 << (_OUTER_SHIFT - _INNER_SHIFT)
MAX_ENTRIES = (512 << 10) // 4  # half of a core's scalar memory, TPU v4 and later


def outer(entry: Any) -> Any:
    """Number of the outer tile of an entry."""
    return entry >> _OUTER_SHIFT


def inner(entry: Any) -> Any:
    """Number of the inner tile of an entry."""
    return (entry >> _INNER_SHIFT) & (MAX_TILES - 1)


class Extent(NamedTuple):
    """Size of the list.

    Attributes:
      rows: B, or 1 where all rows of the batch see alike.
      steps: entries of a row, enough for all values of the arrays.
    """

    rows: int
    steps: int


def extent(
    operands: Operands, options: Options, block_q: int, block_kv: int, axis: int
) -> Extent:
    """Size of the list of `schedule`, from shapes alone."""
    lengths = operands.q.shape[1], operands.k.shape[1]
    blocks = block_q, block_kv
    num = [-(-length // block) for length, block in zip(lengths, blocks, strict=True)]
    num_outer, num_inner = num[2 - axis], num[axis - 1]
    left, right = options.left, options.right
    if left is not None and right is not None and operands.q_offset is None:
        # What a tile sees lies in one interval.
        width = blocks[2 - axis] + left + right
        num_inner = min(num_inner, max(width - 2, 0) // blocks[axis - 1] + 2)
    varying = (
        *(operands.q_offset, operands.q_lengths, operands.kv_lengths),
        operands.q_segment_ids,
    )
    alike = all(x is None for x in varying)
    return Extent(1 if alike else operands.q.shape[0], num_outer * num_inner)


class Schedule(NamedTuple):
    """The list and how much of it is used.

    Attributes:
      entries: int32 ``[rows · steps]``.
      extent: rows and steps.
      count: entries to walk: the most that any row has; an int where known.
    """

    entries: Any
    extent: Extent
    count: Any


def schedule(
    operands: Operands, options: Options, block_q: int, block_kv: int, axis: int
) -> Schedule:
    """The visible tiles, in the order of their outer tile.

    Args:
      operands: of the call.
      options: likewise.
      block_q: rows of queries of a tile.
      block_kv: keys of a tile.
      axis: 2: tiles of queries are outer and of keys inner; 1: the converse.
    """
    size = extent(operands, options, block_q, block_kv, axis)
    plan = tile_plan(operands, options, block_q, block_kv)
    bounds = ranges(type(plan)(*(x[: size.rows] for x in plan)), axis)
    # An outer tile that sees nothing has one entry too: its output is written.
    entries = jnp.maximum(bounds.high - bounds.low, 1)
    end = jnp.cumsum(entries, axis=1, dtype=jnp.int32)
    total = end[:, -1:]
    index = jnp.arange(size.steps, dtype=jnp.int32)[None, :]
    # Past its end a row stays where it is: nothing is fetched.
    step = jnp.minimum(index, total - 1)
    start = end - entries
    here = (start[:, None] <= step[:, :, None]) & (step[:, :, None] < end[:, None])
    number = jnp.broadcast_to(
        jnp.arange(end.shape[1], dtype=jnp.int32)[None], end.shape
    )
    # What an entry needs of its outer tile: a sum over all of them compares in lanes,
    # where a gather is serial.
    wanted = jnp.stack((number, start, entries, *bounds))
    found = jnp.where(here[None], wanted[:, :, None], 0).sum(-1, dtype=jnp.int32)
    tile_outer, start, entries, low, full_low, full_high, high = found
    position = step - start
    tile_inner = low + position
    flags = FIRST * (position == 0) + LAST * (position == entries - 1)
    flags = flags + VISIT * (tile_inner < high)
    if operands.mask is None:
        flags = flags + FULL * ((full_low <= tile_inner) & (tile_inner < full_high))
    flags = jnp.where(index < total, flags, 0).astype(jnp.int32)
    packed = (tile_outer << _OUTER_SHIFT) + (tile_inner << _INNER_SHIFT) + flags
    count = size.steps if unrestricted(operands, options) else jnp.max(total)
    return Schedule(packed.reshape(-1), size, count)
