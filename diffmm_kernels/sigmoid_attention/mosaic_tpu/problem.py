"""What is static about a kernel, and where a step of its grid is."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.config import Tiles, tiles_from_table
from diffmm_kernels.sigmoid_attention.mosaic_tpu import schedule as schedules
from diffmm_kernels.sigmoid_attention.visibility import unrestricted

LANES = 128
_SUBLANES = 32  # of the smallest dtype in use, int8


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below ``n``."""
    return -(-n // multiple) * multiple


def block(length: int, most: int) -> int:
    """Rows of a tile: at most ``most``, all tiles alike, little padding."""
    if length <= LANES:
        return round_up(length, _SUBLANES)
    return round_up(-(-length // -(-length // most)), LANES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is static about one kernel.

    Attributes:
      block_q: rows of queries of a tile.
      block_kv: keys of a tile.
      query_axis: of the tile of scores: 0 ``[block_q, block_kv]``, 1 transposed.
      group: query heads of a key head.
      heads: query heads.
      dtype: of what the matrix unit multiplies.
      options: of the call.
    """

    block_q: int
    block_kv: int
    query_axis: int
    group: int
    heads: int
    dtype: Any
    options: Options

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a tile of scores."""
        shape = self.block_q, self.block_kv
        return shape if self.query_axis == 0 else shape[::-1]


def static_problem(
    operands: Operands, options: Options, query_axis: int, pass_: str
) -> Problem:
    """The problem of a kernel of the pass "forward" or "backward"."""
    _, t, h, d = operands.q.shape
    s, kv_heads, e = operands.v.shape[1:]
    config = options.config
    tiles: Tiles | None = None if config is None else getattr(config, pass_)
    dtype = multiplied(operands.q.dtype)
    if tiles is None:
        facts = {
            "pass": pass_,
            "head_dim": max(d, e),
            "bytes": dtype.itemsize,
            "restricted": not unrestricted(operands, options),
            "dense": any(x is not None for x in (operands.mask, operands.logit_bias)),
        }
        tiles = tiles_from_table("mosaic_tpu", **facts)
    return Problem(
        block_q=block(t, tiles.block_q),
        block_kv=block(s, tiles.block_kv),
        query_axis=query_axis,
        group=h // kv_heads,
        heads=h,
        dtype=dtype,
        options=options,
    )


def multiplied(dtype: Any) -> Any:
    """What a dtype is multiplied as: no TPU multiplies float16."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


class At(NamedTuple):
    """Where a step of the grid is; int32 scalars."""

    b: Any
    h: Any
    kv_head: Any
    q_tile: Any
    kv_tile: Any
    flags: Any


def locate(problem: Problem, size: schedules.Extent, ids: Any, entries: Any) -> At:
    """Reads the list at the indices of a step.

    Forward and dq walk ``(b, h, step)``; dk and dv ``(b, kv_head, step, g)``.
    """
    b, head, step = ids[:3]
    entry = entries[step if size.rows == 1 else b * size.steps + step]
    tiles = schedules.outer(entry), schedules.inner(entry)
    if problem.query_axis == 1:
        h = head if problem.group == 1 else head * problem.group + ids[3]
        return At(b, h, head, tiles[1], tiles[0], entry)
    kv_head = (
        head if problem.group == 1 else jax.lax.div(head, jnp.int32(problem.group))
    )
    return At(b, head, kv_head, *tiles, entry)
