"""How a step of decoding reads its cache of keys and values.

Without a normaliser the parts of a sum over keys simply add: the cache is read block
by block, and within a block by several splits side by side, with no maximum to share.

Letters, beside those of `arguments`: P pages, L keys of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention import reference
from diffmm_kernels.sigmoid_attention.activation import exact_sigmoid
from diffmm_kernels.sigmoid_attention.arguments import Operands, Options

#: Keys that one split reads at a time.
BLOCK_KV = 512


class Step(NamedTuple):
    """The arrays of a step; absent ones are None.

    Attributes:
      q: ``[B, T, H, D]``, at positions ``lengths - T`` to ``lengths - 1``.
      k_cache: ``[B, S, K, D]``, or with pages ``[P, L, K, D]``.
      v_cache: ``[B, S, K, E]``, or with pages ``[P, L, K, E]``.
      lengths: int32 ``[B]``.
      bias: float32 ``[B, H]``, or None: the constant ``Options.bias``.
      slopes: float32 ``[B, H]`` of ALiBi.
      pages: int32 ``[B, max_pages]``.
    """

    q: Any
    k_cache: Any
    v_cache: Any
    lengths: Any
    bias: Any = None
    slopes: Any = None
    pages: Any = None


def dense(options: Options, step: Step) -> Any:
    """By the definition, over the whole cache.

    Args:
      options: of the call, causal.
      step: see there.

    Returns:
      ``[B, T, H, E]`` in ``options.out_dtype``.
    """
    b, t = step.q.shape[:2]
    k, v = step.k_cache, step.v_cache
    if step.pages is not None:
        k, v = (
            x.at[step.pages].get(mode="clip").reshape(b, -1, *x.shape[2:])
            for x in (k, v)
        )
    offset = jnp.broadcast_to((step.lengths - t)[:, None], (b, t))
    visible = _visible(options, step, k.shape[1])
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    k, v = (jnp.where(visible.inside(key)[:, :, None, None], x, 0) for x in (k, v))
    operands = Operands(
        q=step.q,
        k=k,
        v=v,
        bias=step.bias,
        q_offset=offset,
        alibi_slopes=step.slopes,
    )
    return reference.forward(operands, options)


class _Visible(NamedTuple):
    """Query i sees the keys ``start[b, i] <= j < end[b, i]``.

    Some query of b sees each key of ``first[b] <= j < last[b]``, and no other.
    """

    position: Any
    start: Any
    end: Any
    first: Any
    last: Any

    def inside(self, key: Any) -> Any:
        """Whether any query sees the keys ``key``: bool ``[B, keys]``."""
        key = key[None]
        return (self.first[:, None] <= key) & (key < self.last[:, None])

    def seen(self, key: Any) -> Any:
        """Whether each query sees the keys ``key``: bool ``[B, T, keys]``."""
        key = key[None, None]
        return (self.start[:, :, None] <= key) & (key < self.end[:, :, None])


def _visible(options: Options, step: Step, capacity: int) -> _Visible:
    t = step.q.shape[1]
    position = (step.lengths - t)[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    end = jnp.clip(position + 1, 0, capacity)
    start = jnp.zeros_like(end)
    if options.left is not None:
        start = jnp.maximum(start, position - options.left)
    last = end.max(1)
    # A sequence without keys does not widen the range of the others.
    first = jnp.where(last > 0, start.min(1), capacity)
    return _Visible(position, start, end, first, last)


class _Blocks(NamedTuple):
    """The cache in blocks of ``size`` keys.

    ``read(i)`` gives k and v ``[B, size, K, ·]`` and the index of their first key,
    which may be before that of the block, ``i · size``.
    """

    size: int
    capacity: int
    read: Callable[[Any], tuple[Any, Any, Any]]


def _contiguous(step: Step, splits: int) -> _Blocks:
    capacity = step.k_cache.shape[1]
    size = splits * min(BLOCK_KV, capacity // splits)

    def read(i: Any) -> tuple[Any, Any, Any]:
        # The last block ends where the cache does.
        first = jnp.minimum(i * size, capacity - size)
        k, v = (
            jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)
            for x in (step.k_cache, step.v_cache)
        )
        return k, v, first

    return _Blocks(size, capacity, read)


def _paged(step: Step, splits: int) -> _Blocks:
    b, max_pages = step.pages.shape
    length = step.k_cache.shape[1]
    count = min(max_pages, max(1, splits * BLOCK_KV // length))

    def read(i: Any) -> tuple[Any, Any, Any]:
        first = jnp.minimum(i * count, max_pages - count)
        table = jax.lax.dynamic_slice_in_dim(step.pages, first, count, axis=1)
        k, v = (
            x.at[table].get(mode="clip").reshape(b, count * length, *x.shape[2:])
            for x in (step.k_cache, step.v_cache)
        )
        return k, v, first * length

    return _Blocks(count * length, max_pages * length, read)


def blockwise(options: Options, splits: int, step: Step) -> Any:
    """Block by block up to the longest length; sums in a fixed order.

    Args:
      options: of the call, causal.
      splits: parts of a block that are summed side by side.
      step: see there.

    Returns:
      ``[B, T, H, E]`` in ``options.out_dtype``.
    """
    q = step.q
    b, t, h, d = q.shape
    kv_heads, e = step.v_cache.shape[2:]
    g = h // kv_heads
    real = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    blocks = (_contiguous if step.pages is None else _paged)(step, splits)
    size = blocks.size
    visible = _visible(options, step, blocks.capacity)
    # Blocks of whole pages: as many splits as share one out evenly.
    splits = max(n for n in range(1, splits + 1) if size % n == 0)

    q_BKGTD = q.reshape(b, t, kv_heads, g, d).transpose(0, 2, 3, 1, 4)
    q_BKMD = q_BKGTD.reshape(b, kv_heads, g * t, d)
    per_head = (b, 1, kv_heads, g, 1, 1)

    def body(i: Any, sums: Any) -> Any:
        k, v, first = blocks.read(i)
        key = first + jnp.arange(size, dtype=jnp.int32)
        # Keys that no query sees may be NaN, and 0·NaN is NaN: their values become 0.
        v = jnp.where(visible.inside(key)[:, :, None, None], v, 0)
        k, v = (x.reshape(b, splits, size // splits, *x.shape[2:]) for x in (k, v))
        z = jnp.einsum(
            "bkmd,bnskd->bnkms",
            q_BKMD,
            k,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=real,
        )
        z = z.reshape(b, splits, kv_heads, g, t, size // splits) * options.scale
        z = z + (options.bias if step.bias is None else step.bias.reshape(per_head))

        def along(x_BTS: Any) -> Any:
            x = x_BTS.reshape(b, t, splits, size // splits)
            return x.transpose(0, 2, 1, 3)[:, :, None, None]

        if step.slopes is not None:
            distance = jnp.abs(visible.position[:, :, None] - key[None, None])
            z = z - step.slopes.reshape(per_head) * along(distance.astype(real))
        # The last block may reach back over keys of the one before it.
        seen = visible.seen(key) & (key >= i * size)[None, None]
        p = jnp.where(along(seen), exact_sigmoid(z), 0)
        p = p.reshape(b, splits, kv_heads, g * t, -1).astype(v.dtype)
        return sums + jnp.einsum(
            "bnkms,bnske->bnkme",
            p,
            v,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=real,
        )

    low = visible.first.min() // size
    high = (visible.last.max() + size - 1) // size
    # Like an operand, also in its type inside shard_map.
    sums = jnp.zeros_like(q, real, (b, splits, kv_heads, g * t, e))
    o_BKME = jax.lax.fori_loop(low, high, body, sums).sum(1)
    o_BTKGE = o_BKME.reshape(b, kv_heads, g, t, e).transpose(0, 3, 1, 2, 4)
    return o_BTKGE.reshape(b, t, h, e).astype(options.out_dtype)
