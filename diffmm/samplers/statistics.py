"""What a selection rule may know about a categorical law, from few passes over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.typing import Array

# Four rows of a vocabulary of 126,464 float32 logits are 2 MB: they stay in the
# last-level cache of a CPU core between the passes (measured 5 to 8 times faster than
# letting every pass stream the whole array).
_GIVEN_AT_A_TIME = 4
# A matrix product of 32 rows takes half as long again as that share of one of 128.
_PRODUCTS_AT_A_TIME = 128
_ELEMENTS_AT_A_TIME = 1 << 26
_SMALL_VOCABULARY = 4096
_CHUNK = 512


class Statistics(NamedTuple):
    """Statistics of softmax(logits), one number per position.

    Attributes:
      max_prob: float32 ``[...]``, the largest probability.
      margin: float32 ``[...]``, largest minus second largest probability.
      entropy: float32 ``[...]``, nats.
      argmax: int32 ``[...]``, the most probable id, the lowest one among equals.
      log_normalizer: float32 ``[...]``, logsumexp of the logits.
    """

    max_prob: Array
    margin: Array
    entropy: Array
    argmax: Array
    log_normalizer: Array


def logit_statistics(logits: Array) -> Statistics:
    """Confidence statistics of the untempered, unfiltered law.

    With z = l − max l and s = Σ exp z: max-prob 1/s, margin (1 − exp z₍₂₎)/s, entropy
    log s − Σ z·exp(z)/s. Fields that are not used cost nothing under ``jit``.

    Args:
      logits: float32 ``[..., V]``; suppressed ids carry a large finite negative value.

    Returns:
      `Statistics` with fields ``[...]``.

    >>> import jax.numpy as jnp
    >>> statistics = logit_statistics(jnp.log(jnp.array([1.0, 2.0, 5.0])))
    >>> print(f"{statistics.max_prob:.3f} {statistics.entropy:.6f}")
    0.625 0.900256
    """
    size = logits.shape[-1]
    flat = logits.reshape(-1, size)
    if size <= _SMALL_VOCABULARY or flat.shape[0] <= _GIVEN_AT_A_TIME:
        return _statistics(logits)
    out = jax.lax.platform_dependent(
        flat,
        cpu=lambda flat: _in_groups(_statistics, flat, _GIVEN_AT_A_TIME),
        default=_statistics,
    )
    return jax.tree.map(lambda x: x.reshape(logits.shape[:-1]), out)


def _statistics(logits: Array) -> Statistics:
    logits = logits.astype(jnp.float32)
    top, argmax = _top(logits)
    z = logits - top[..., None]
    exponential = jnp.exp(z)
    normalizer = jnp.sum(exponential, axis=-1)
    below = jnp.max(jnp.where(z < 0, z, -jnp.inf), axis=-1)
    tied = jnp.sum((z == 0).astype(jnp.int32), axis=-1) > 1
    second = jnp.where(tied, 1.0, jnp.exp(below))
    log_s = jnp.log(normalizer)
    return Statistics(
        max_prob=1.0 / normalizer,
        margin=(1.0 - second) / normalizer,
        entropy=log_s - jnp.sum(exponential * z, axis=-1) / normalizer,
        argmax=argmax,
        log_normalizer=top + log_s,
    )


def first_argmax(values: Array) -> Array:
    """``jnp.argmax`` over the last axis, int32, several times faster on a CPU.

    Args:
      values: float32 ``[..., V]``.

    Returns:
      int32 ``[...]``, the lowest index of a maximum; where there are not-a-numbers, any
      index.
    """
    return _top(values)[1]


def _top(values: Array) -> tuple[Array, Array]:
    """Maximum and `first_argmax`, ``[...]``, from one pass over the values."""
    size = values.shape[-1]
    if size <= _SMALL_VOCABULARY:
        top = jnp.max(values, axis=-1)
        return top, _first_equal(values, top)
    # Maxima of chunks, the first of the largest ones, and where in it the maximum is.
    whole = size // _CHUNK * _CHUNK
    chunks = values[..., :whole].reshape(*values.shape[:-1], -1, _CHUNK)
    tops = jnp.max(chunks, axis=-1)
    if whole < size:
        rest = jnp.max(values[..., whole:], axis=-1, keepdims=True)
        tops = jnp.concatenate([tops, rest], axis=-1)
    top = jnp.max(tops, axis=-1)
    # The last chunk may reach back: no value before it is as large.
    start = jnp.minimum(_first_equal(tops, top) * _CHUNK, size - _CHUNK)
    index = start[..., None] + jnp.arange(_CHUNK, dtype=jnp.int32).reshape(
        *(1,) * start.ndim, _CHUNK
    )
    chunk = jnp.take_along_axis(values, index, axis=-1)
    return top, start + _first_equal(chunk, top)


def _first_equal(values: Array, top: Array) -> Array:
    # Two vector reductions instead of one reduction of (value, index) pairs.
    ids = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    hit = (values == top[..., None]) | jnp.isnan(values)
    return jnp.min(jnp.where(hit, ids, values.shape[-1] - 1), axis=-1)


def map_positions(
    function: Callable[[Any], Any],
    tree: Any,
    vocabulary_size: int,
    *,
    given: bool = True,
) -> Any:
    """Applies ``function`` to all positions, few of them at a time.

    The result is that of ``function`` on the whole arrays; only the memory differs. On
    a CPU groups stay in the last-level cache. On accelerators the groups bound the
    float32 logits that ``function`` makes; a small vocabulary is one call everywhere.

    Args:
      function: maps a pytree of ``[G, ...]`` to a pytree of ``[G]``.
      tree: pytree of ``[B, K, ...]``.
      vocabulary_size: V of the logits that ``function`` reads or makes.
      given: the logits exist. Else ``function`` makes them by a matrix product, which
        wants more positions at once than a scan of what is there.

    Returns:
      A pytree of ``[B, K]``.
    """
    rows, width = jax.tree.leaves(tree)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(rows * width, *x.shape[2:]), tree)
    cpu = _GIVEN_AT_A_TIME if given else _PRODUCTS_AT_A_TIME
    default = max(_ELEMENTS_AT_A_TIME // vocabulary_size, 1)
    if vocabulary_size <= _SMALL_VOCABULARY:
        out = function(flat)
    else:
        out = jax.lax.platform_dependent(
            flat,
            cpu=lambda flat: _in_groups(function, flat, cpu),
            default=lambda flat: _in_groups(function, flat, default),
        )
    return jax.tree.map(lambda x: x.reshape(rows, width), out)


def _in_groups(function: Callable[[Any], Any], flat: Any, size: int) -> Any:
    total = jax.tree.leaves(flat)[0].shape[0]
    if total <= size:
        return function(flat)
    groups = -(-total // size)
    # The last group starts early rather than being shorter: one shape, one compilation.
    starts = jnp.minimum(jnp.arange(groups, dtype=jnp.int32) * size, total - size)

    def one(start: Array) -> Any:
        slices = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in leaves)
        return function(jax.tree.unflatten(structure, slices))

    leaves, structure = jax.tree.flatten(flat)
    out = jax.lax.map(one, starts)
    index = starts[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return jax.tree.map(
        lambda x: jnp.zeros((total,), x.dtype).at[index.reshape(-1)].set(x.reshape(-1)),
        out,
    )
