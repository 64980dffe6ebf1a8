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
_ROWS_AT_A_TIME = 4
_SMALL_VOCABULARY = 4096


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
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    z = logits - top
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
        argmax=first_argmax(z),
        log_normalizer=top[..., 0] + log_s,
    )


def first_argmax(values: Array) -> Array:
    """``jnp.argmax`` over the last axis, int32, several times faster on a CPU.

    Args:
      values: float32 ``[..., V]``.

    Returns:
      int32 ``[...]``, the lowest index of a maximum (of a not-a-number, if any).
    """
    # Two vector reductions instead of one reduction of (value, index) pairs.
    top = jnp.max(values, axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    hit = (values == top) | jnp.isnan(values)
    return jnp.min(jnp.where(hit, ids, values.shape[-1] - 1), axis=-1)


def map_rows(function: Callable[..., Any], logits: Array, *rest: Array) -> Any:
    """Applies ``function`` to every row of ``logits``, few rows at a time on a CPU.

    The result is that of ``function`` on the whole arrays; only the memory traffic
    differs. On accelerators, and for small vocabularies, it is one vectorised call.

    Args:
      function: maps ``([..., V], [...], ...)`` to a pytree of ``[...]``.
      logits: ``[B, K, V]``.
      *rest: arrays ``[B, K]``, passed on with the rows they belong to.

    Returns:
      A pytree of ``[B, K]``.
    """
    rows, positions, size = logits.shape
    if size <= _SMALL_VOCABULARY:
        return function(logits, *rest)

    def in_groups(logits: Array, *rest: Array) -> Any:
        flat = [x.reshape(rows * positions, *x.shape[2:]) for x in (logits, *rest)]
        out = jax.lax.map(
            lambda row: function(*row), tuple(flat), batch_size=_ROWS_AT_A_TIME
        )
        return jax.tree.map(lambda x: x.reshape(rows, positions), out)

    return jax.lax.platform_dependent(logits, *rest, cpu=in_groups, default=function)
