"""Sigmoid attention in plain JAX, tile by tile: memory linear in the lengths.

For CPUs, and for every device and argument that no kernel serves. Weights exist for one
tile at a time, in the forward and in the backward pass; tiles that no query of theirs
sees are skipped. Letters beside those of the folder: N units = B·K pairs of batch row
and key head, n units of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
)
from diffmm_kernels.sigmoid_attention.config import Tiles
from diffmm_kernels.sigmoid_attention.visibility import (
    positions,
    ranges,
    row_intervals,
    tile_plan,
    unrestricted,
)

# Scores of one tile over all units of a group: 4 MB in float32. Smaller tiles cost more
# in starting operations, larger ones leave the cache.
_TILE_SCORES = 1 << 20
_TILE_SIDE_Q = 512
_TILE_SIDE_KV = 256


def supports(operands: Operands, options: Options) -> str | None:
    """Everything is supported.

    Of tiles ``block_q`` and ``block_kv`` are used, the rest means nothing here; every
    precision gets the exact sigmoid, and gradients are always deterministic.
    """
    del operands, options
    return None


class _Layout(NamedTuple):
    """How a call is cut; all static.

    Attributes:
      group: n, units that are computed together; divides N.
      block_q: queries of a tile.
      block_kv: keys of a tile.
      num_q: tiles of queries.
      num_kv: tiles of keys.
    """

    group: int
    block_q: int
    block_kv: int
    num_q: int
    num_kv: int


def _layout(operands: Operands, tiles: Tiles | None) -> _Layout:
    b, t, h, _ = operands.q.shape
    s, kv_heads = operands.k.shape[1:3]
    heads_per_unit = h // kv_heads

    def even(length: int, side: int) -> tuple[int, int]:
        num = -(-length // side)
        return -(-length // num), num

    if tiles is None:
        side_q = _TILE_SIDE_Q
        if t > side_q:
            side_q = max(1, side_q // heads_per_unit)
        block_q, num_q = even(t, side_q)
        block_kv, num_kv = even(s, _TILE_SIDE_KV)
    else:
        block_q, num_q = min(t, tiles.block_q), -(-t // min(t, tiles.block_q))
        block_kv, num_kv = min(s, tiles.block_kv), -(-s // min(s, tiles.block_kv))
    fit = max(1, _TILE_SCORES // (heads_per_unit * block_q * block_kv))
    units = b * kv_heads
    group = max(n for n in range(1, min(units, fit) + 1) if units % n == 0)
    return _Layout(group, block_q, block_kv, num_q, num_kv)


class _Group(NamedTuple):
    """What belongs to the n units of a group; absent arrays are None.

    Attributes:
      units: int32 ``[n]``, indices of the units.
      q: ``[n, G, T', D]``, T' the padded length.
      k: ``[n, S', D]``.
      v: ``[n, S', E]``.
      bias: ``[n, G]``.
      slopes: ``[n, G]``.
      position: ``[n, T']`` of the queries.
      start: ``[n, T']``, with …
      end: ``[n, T']``: interval of visible keys.
      q_ids: ``[n, T']``.
      kv_ids: ``[n, S']``.
      low: ``[num_q]``, with …
      high: ``[num_q]``: tiles of keys to visit for each tile of queries.
      do: ``[n, G, T', E]``.
    """

    units: Any
    q: Any
    k: Any
    v: Any
    bias: Any = None
    slopes: Any = None
    position: Any = None
    start: Any = None
    end: Any = None
    q_ids: Any = None
    kv_ids: Any = None
    low: Any = None
    high: Any = None
    do: Any = None


def _pad(x: Any, axis: int, length: int, fill: int = 0) -> Any:
    missing = length - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=fill)


def _grouped(
    operands: Operands, options: Options, layout: _Layout, do: Any = None
) -> _Group:
    """All groups, stacked on a leading axis; padded k, v and do are 0, and add 0."""
    b, _, h, _ = operands.q.shape
    kv_heads = operands.k.shape[2]
    group = h // kv_heads
    padded_t = layout.num_q * layout.block_q
    padded_s = layout.num_kv * layout.block_kv
    units = b * kv_heads

    def queries(x_BTHD: Any) -> Any:
        x = x_BTHD.reshape(b, -1, kv_heads, group, x_BTHD.shape[-1])
        x = x.transpose(0, 2, 3, 1, 4).reshape(units, group, -1, x.shape[-1])
        return _pad(x, 2, padded_t)

    def keys(x_BSKD: Any) -> Any:
        x = x_BSKD.swapaxes(1, 2).reshape(units, -1, x_BSKD.shape[-1])
        return _pad(x, 1, padded_s)

    def rows(x: Any, length: int, fill: int) -> Any:
        if x is None:
            return None
        return jnp.repeat(_pad(x, 1, length, fill), kv_heads, axis=0)

    def heads(x: Any) -> Any:
        return None if x is None else x.reshape(units, group)

    everything = unrestricted(operands, options)
    # A mask alone leaves every interval whole.
    intervals = None if everything else row_intervals(operands, options)
    parts = _Group(
        units=jnp.arange(units, dtype=jnp.int32),
        q=queries(operands.q),
        k=keys(operands.k),
        v=keys(operands.v),
        bias=heads(operands.bias),
        slopes=heads(operands.alibi_slopes),
        position=None
        if operands.alibi_slopes is None
        else rows(positions(operands, options), padded_t, 0),
        start=None if intervals is None else rows(intervals.start, padded_t, 0),
        end=None if intervals is None else rows(intervals.end, padded_t, 0),
        q_ids=rows(operands.q_segment_ids, padded_t, -1),
        kv_ids=rows(operands.kv_segment_ids, padded_s, -1),
        do=None if do is None else queries(do.astype(operands.q.dtype)),
    )
    num_groups = units // layout.group

    def split(x: Any) -> Any:
        return x.reshape(num_groups, layout.group, *x.shape[1:])

    parts = jax.tree.map(split, parts)
    if everything:
        return parts
    visits = ranges(tile_plan(operands, options, layout.block_q, layout.block_kv), 2)
    # Rows that visit nothing have high = 0 and must not lower their group's low.
    low = jnp.where(visits.high > 0, visits.low, layout.num_kv)
    low, high = (split(jnp.repeat(x, kv_heads, axis=0)) for x in (low, visits.high))
    return parts._replace(low=low.min(1), high=high.max(1))


def _slice(x: Any, index: Any, size: int, axis: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _einsum(subscripts: str, a: Any, b: Any) -> Any:
    """Accumulates in float32; float32 inputs are not rounded on accelerators."""
    full = a.dtype in (jnp.float32, jnp.float64)
    return jnp.einsum(
        subscripts,
        a,
        b,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
        precision=jax.lax.Precision.HIGHEST if full else None,
    )


def _dense_tile(
    x: Any, units: Any, kv_heads: int, layout: _Layout, i: Any, j: Any
) -> Any:
    """The tile ``[n, G or 1, block_q or 1, block_kv or 1]`` of a mask or logit bias."""
    b, h, t, s = x.shape
    if t > 1:
        x = _pad(x, 2, layout.num_q * layout.block_q)
        x = _slice(x, i, layout.block_q, 2)
    if s > 1:
        x = _pad(x, 3, layout.num_kv * layout.block_kv)
        x = _slice(x, j, layout.block_kv, 3)
    row = units // kv_heads if b > 1 else jnp.zeros_like(units)
    head = units % kv_heads if h > 1 else jnp.zeros_like(units)
    x = x.reshape(b, kv_heads if h > 1 else 1, -1, *x.shape[2:])
    return x[row, head]


class _Tile(NamedTuple):
    """One tile of queries and what masks it, before a tile of keys is chosen."""

    q: Any
    do: Any
    position: Any
    start: Any
    end: Any
    q_ids: Any


def _tile(group: _Group, layout: _Layout, i: Any) -> _Tile:
    def take(x: Any, axis: int) -> Any:
        return None if x is None else _slice(x, i, layout.block_q, axis)

    rows = (take(x, 1) for x in (group.position, group.start, group.end, group.q_ids))
    return _Tile(take(group.q, 2), take(group.do, 2), *rows)


def _merge(x_nGtd: Any) -> Any:
    """The heads of a unit read the same keys: they are rows of one product."""
    return x_nGtd.reshape(x_nGtd.shape[0], -1, x_nGtd.shape[-1])


def _probabilities(
    operands: Operands,
    options: Options,
    layout: _Layout,
    group: _Group,
    tile: _Tile,
    k_j: Any,
    i: Any,
    j: Any,
) -> Any:
    """``p [n, G·block_q, block_kv]`` of one tile in float32."""
    n, heads = tile.q.shape[:2]
    s_nxs = _einsum("nxd,nsd->nxs", _merge(tile.q), k_j)
    z = s_nxs.reshape(n, heads, layout.block_q, layout.block_kv) * options.scale
    z = z + (options.bias if group.bias is None else group.bias[:, :, None, None])
    key = (j * layout.block_kv + jnp.arange(layout.block_kv, dtype=jnp.int32))[
        None, None, :
    ]
    if group.slopes is not None:
        distance = jnp.abs(tile.position[:, :, None] - key)[:, None].astype(z.dtype)
        z = z - group.slopes[:, :, None, None] * distance
    kv_heads = operands.k.shape[2]
    if operands.logit_bias is not None:
        added = _dense_tile(operands.logit_bias, group.units, kv_heads, layout, i, j)
        z = z + added.astype(z.dtype)
    p = jax.nn.sigmoid(z)
    if group.start is not None:
        seen = (tile.start[:, :, None] <= key) & (key < tile.end[:, :, None])
        if group.kv_ids is not None:
            ids = _slice(group.kv_ids, j, layout.block_kv, 1)[:, None, :]
            seen = seen & (tile.q_ids[:, :, None] == ids)
        seen = seen[:, None]
        if operands.mask is not None:
            dense = _dense_tile(operands.mask, group.units, kv_heads, layout, i, j)
            seen = seen & dense
        p = jnp.where(seen, p, 0.0)
    return p.reshape(s_nxs.shape)


def _over_keys(
    layout: _Layout, group: _Group, i: Any, body: Callable[[Any, Any], Any], init: Any
) -> Any:
    """Runs ``carry = body(j, carry)`` over the tiles of keys that tile i visits."""
    if layout.num_kv == 1:
        return body(0, init)
    if group.low is None:
        return jax.lax.fori_loop(0, layout.num_kv, body, init)
    return jax.lax.fori_loop(group.low[i], group.high[i], body, init)


def _map(f: Callable[[Any], Any], xs: Any, length: int) -> Any:
    """`jax.lax.map`, without a loop where there is one element."""
    if length == 1:
        return jax.tree.map(lambda y: y[None], f(jax.tree.map(lambda x: x[0], xs)))
    return jax.lax.map(f, xs)


def _merge_tiles(x: Any, like: Any) -> Any:
    """``[groups, num_q, n, G·block_q, D]`` to ``[B, T, H, D]``."""
    b, t, h, _ = like.shape
    groups, num_q, n, rows, d = x.shape
    # With H = K·G and the units ordered (b, key head), heads come out in order.
    units = groups * n
    heads_per_unit = b * h // units
    x = x.reshape(groups, num_q, n, heads_per_unit, rows // heads_per_unit, d)
    x = x.transpose(0, 2, 3, 1, 4, 5).reshape(b, h, -1, d)
    return x[:, :, :t].swapaxes(1, 2)


def forward(operands: Operands, options: Options) -> Any:
    """``o = Σ_j p_j v_j`` accumulated in float32.

    Returns:
      ``[B, T, H, E]`` in ``options.out_dtype``.
    """
    tiles = options.config.forward if options.config else None
    layout = _layout(operands, tiles)

    def of_group(group: _Group) -> Any:
        def of_tile(i: Any) -> Any:
            tile = _tile(group, layout, i)

            def add(j: Any, o: Any) -> Any:
                k_j, v_j = (
                    _slice(x, j, layout.block_kv, 1) for x in (group.k, group.v)
                )
                p = _probabilities(operands, options, layout, group, tile, k_j, i, j)
                return o + _einsum("nxs,nse->nxe", p.astype(v_j.dtype), v_j)

            n, heads = tile.q.shape[:2]
            shape = (n, heads * layout.block_q, group.v.shape[-1])
            real = jnp.promote_types(group.v.dtype, jnp.float32)
            # Like an operand, also in its type inside shard_map.
            o = jnp.zeros_like(group.v, real, shape)
            return _over_keys(layout, group, i, add, o).astype(options.out_dtype)

        return _map(of_tile, jnp.arange(layout.num_q, dtype=jnp.int32), layout.num_q)

    groups = _grouped(operands, options, layout)
    o = _map(of_group, groups, groups.units.shape[0])
    return _merge_tiles(o, operands.q)


class _Sums(NamedTuple):
    """What a group accumulates; keys and values transposed, see `backward`.

    Attributes:
      k: ``[n, D, S']``.
      v: ``[n, E, S']``.
      bias: ``[n, G]`` or None.
      scores: dS ``[n, G·T', S']`` or None.
    """

    k: Any
    v: Any
    bias: Any
    scores: Any


def backward(operands: Operands, options: Options, do: Any, needs: Needs) -> Gradients:
    """``dS = dP·p·(1-p)`` tile by tile; nothing but the inputs was saved.

    dk and dv accumulate transposed, ``dvᵀ = doᵀ·p``: XLA's CPU backend takes more than
    twice as long for a product whose left factor is transposed in memory.

    Returns:
      Gradients in the dtypes of the operands.
    """
    tiles = options.config.backward if options.config else None
    layout = _layout(operands, tiles)
    real = jnp.promote_types(operands.q.dtype, jnp.float32)
    b, t, h, d = operands.q.shape
    s, kv_heads, e = operands.v.shape[1:]

    def of_group(group: _Group) -> Any:
        n, heads, padded_t, _ = group.q.shape
        padded_s = group.k.shape[1]

        def zeros(*shape: int) -> Any:
            # Like an operand, also in its type inside shard_map.
            return jnp.zeros_like(group.q, real, shape)

        sums = _Sums(
            k=zeros(n, d, padded_s),
            v=zeros(n, e, padded_s),
            bias=zeros(n, heads) if needs.bias else None,
            scores=zeros(n, heads, padded_t, padded_s) if needs.logit_bias else None,
        )

        def of_tile(sums: _Sums, i: Any) -> tuple[_Sums, Any]:
            tile = _tile(group, layout, i)
            q_i, do_i = _merge(tile.q), _merge(tile.do)
            qT_i, doT_i = q_i.swapaxes(1, 2), do_i.swapaxes(1, 2)

            def add(j: Any, carry: Any) -> Any:
                dq, sums = carry
                k_j, v_j = (
                    _slice(x, j, layout.block_kv, 1) for x in (group.k, group.v)
                )
                p = _probabilities(operands, options, layout, group, tile, k_j, i, j)
                dp = _einsum("nxe,nse->nxs", do_i, v_j)
                # One evaluation of the sigmoid, though two products need it.
                p, dp = jax.lax.optimization_barrier((p, dp))
                ds = dp * (p * (1.0 - p))
                ds16 = ds.astype(k_j.dtype)

                def accumulate(total: Any, left: Any, right: Any) -> Any:
                    at = j * layout.block_kv
                    old = jax.lax.dynamic_slice_in_dim(total, at, layout.block_kv, 2)
                    new = old + _einsum("ndx,nxs->nds", left, right)
                    return jax.lax.dynamic_update_slice_in_dim(total, new, at, 2)

                sums = sums._replace(
                    k=accumulate(sums.k, qT_i, ds16),
                    v=accumulate(sums.v, doT_i, p.astype(v_j.dtype)),
                )
                ds_nGts = ds.reshape(n, heads, layout.block_q, layout.block_kv)
                if needs.bias:
                    sums = sums._replace(bias=sums.bias + ds_nGts.sum((2, 3)))
                if needs.logit_bias:
                    at = (0, 0, i * layout.block_q, j * layout.block_kv)
                    scores = jax.lax.dynamic_update_slice(sums.scores, ds_nGts, at)
                    sums = sums._replace(scores=scores)
                return dq + _einsum("nxs,nsd->nxd", ds16, k_j), sums

            dq = zeros(*q_i.shape)
            dq, sums = _over_keys(layout, group, i, add, (dq, sums))
            return sums, dq * options.scale

        if layout.num_q == 1:
            sums, dq = of_tile(sums, 0)
            dq = dq[None]
        else:
            index = jnp.arange(layout.num_q, dtype=jnp.int32)
            sums, dq = jax.lax.scan(of_tile, sums, index)
        return dq, sums._replace(k=sums.k * options.scale)

    groups = _grouped(operands, options, layout, do)
    dq, sums = _map(of_group, groups, groups.units.shape[0])

    def keys(x: Any) -> Any:
        x = x.reshape(b, kv_heads, *x.shape[2:])[..., :s]
        return x.transpose(0, 3, 1, 2)

    scores = None
    if needs.logit_bias:
        scores = sums.scores.reshape(b, h, *sums.scores.shape[-2:])[:, :, :t, :s]
        shape = operands.logit_bias.shape
        shared = tuple(axis for axis in range(4) if shape[axis] == 1)
        scores = scores.sum(shared, keepdims=True).astype(operands.logit_bias.dtype)
    return Gradients(
        q=_merge_tiles(dq, operands.q).astype(operands.q.dtype),
        k=keys(sums.k).astype(operands.k.dtype),
        v=keys(sums.v).astype(operands.v.dtype),
        bias=sums.bias.reshape(b, h) if needs.bias else None,
        logit_bias=scores,
    )
