"""Arrays as the kernels read and write them.

Rows are laid out ``[B, H, rows, D]`` and padded with zeros to whole tiles, head sizes
to whole lanes: padding adds exactly 0 to every sum, and needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import Operands
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import (
    LANES,
    At,
    Problem,
    round_up,
)
from diffmm_kernels.sigmoid_attention.visibility import positions

Place = Callable[[At], tuple[Any, ...]]


class Input(NamedTuple):
    """An array and how a step sees it: its block, and the block's place."""

    array: Any
    block: tuple[int | None, ...]
    place: Place


class Output(NamedTuple):
    """Likewise, for an array to be made."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    place: Place


def rows_first(x: Any, length: int, dtype: Any, real: Any = None) -> Any:
    """``[B, n, H, D]`` to ``[B, H, length, lanes]``, zero in padding.

    Args:
      x: the array.
      length: rows with padding.
      dtype: of the result.
      real: int32 ``[B]`` or None: rows from there on become 0, whatever they hold.
    """
    if real is not None:
        row = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        x = jnp.where((row < real[:, None])[:, :, None, None], x, jnp.zeros_like(x))
    d = x.shape[3]
    lanes = 64 if d <= 64 else round_up(d, LANES)
    x = x.astype(dtype).transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, lanes - d)))


def rows_last(x: Any, like: Any, dtype: Any) -> Any:
    """Undoes `rows_first`, to the shape of ``like``."""
    return x[:, :, : like.shape[1], : like.shape[3]].transpose(0, 2, 1, 3).astype(dtype)


def tensors(problem: Problem, operands: Operands, do: Any = None) -> dict[str, Input]:
    """q, k, v and do as the kernels read them."""
    t = round_up(operands.q.shape[1], problem.block_q)
    s = round_up(operands.k.shape[1], problem.block_kv)

    def queries(x: Any) -> Input:
        x = rows_first(x, t, problem.dtype, operands.q_lengths)
        place = lambda at: (at.b, at.h, at.q_tile, 0)  # noqa: E731
        return Input(x, (None, None, problem.block_q, x.shape[3]), place)

    def keys(x: Any) -> Input:
        x = rows_first(x, s, problem.dtype, operands.kv_lengths)
        place = lambda at: (at.b, at.kv_head, at.kv_tile, 0)  # noqa: E731
        return Input(x, (None, None, problem.block_kv, x.shape[3]), place)

    inputs = {"q": queries(operands.q), "k": keys(operands.k), "v": keys(operands.v)}
    if do is not None:
        inputs["do"] = queries(do)
    return inputs


def restrictions(problem: Problem, operands: Operands) -> dict[str, Input]:
    """What masks and additive terms read, tile by tile."""
    blocks = problem.block_q, problem.block_kv
    inputs = {}

    def vector(name: str, x: Any, side: int, fill: int) -> None:
        # Along the tile's first axis as a column, along its second as a row.
        n = round_up(x.shape[1], blocks[side])
        x = jnp.pad(x, ((0, 0), (0, n - x.shape[1])), constant_values=fill)
        if side == problem.query_axis:
            x, shape = x[:, :, None], (None, blocks[side], 1)
            place = lambda at: (at.b, (at.q_tile, at.kv_tile)[side], 0)  # noqa: E731
        else:
            x, shape = x[:, None, :], (None, 1, blocks[side])
            place = lambda at: (at.b, 0, (at.q_tile, at.kv_tile)[side])  # noqa: E731
        inputs[name] = Input(x, shape, place)

    def tile(name: str, x: Any) -> None:
        whole = [n > 1 for n in x.shape]
        shape = [b if w else 1 for b, w in zip(blocks, whole[2:], strict=True)]
        pads = [(0, -n % m) for n, m in zip(x.shape[2:], shape, strict=True)]
        x = jnp.pad(x, ((0, 0), (0, 0), *pads))
        if problem.query_axis == 1:
            x, shape = x.swapaxes(2, 3), shape[::-1]

        def place(at: At) -> tuple[Any, ...]:
            tiles = (at.b, at.h, at.q_tile, at.kv_tile)
            index = [i if w else 0 for i, w in zip(tiles, whole, strict=True)]
            if problem.query_axis == 1:
                index[2:] = index[:1:-1]
            return tuple(index)

        inputs[name] = Input(x, (None, None, *shape), place)

    options = problem.options
    windowed = (options.left, options.right) != (None, None)
    positioned = windowed or operands.alibi_slopes is not None
    if positioned and operands.q_offset is not None:
        vector("positions", positions(operands, options), 0, 0)
    if operands.q_segment_ids is not None:
        # Padding has two ids: it does not see itself.
        ids = operands.q_segment_ids, operands.kv_segment_ids
        vector("q_ids", jnp.maximum(ids[0], -1), 0, -1)
        vector("kv_ids", jnp.where(ids[1] < 0, -2, ids[1]), 1, -2)
    if operands.mask is not None:
        tile("mask", operands.mask.astype(jnp.int8))
    if operands.logit_bias is not None:
        tile("logit_bias", operands.logit_bias.astype(jnp.float32))
    return inputs


def scalars(operands: Operands) -> dict[str, Any]:
    """What steps read from scalar memory beside the list; flat arrays."""
    found = {
        "bias": operands.bias,
        "slopes": operands.alibi_slopes,
        "q_lengths": operands.q_lengths,
        "kv_lengths": operands.kv_lengths,
    }
    return {name: x.reshape(-1) for name, x in found.items() if x is not None}
