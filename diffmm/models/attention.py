"""Attention functions: the argument ``attention`` of every transformer.

Letters: B rows, L row length, H heads, K head dimension, Q query and S key position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffmm.typing import Array

# Finite, so that a row of the softmax that is wholly masked yields no NaN.
_MASKED_SCORE = -1e30


def segment_mask(segment_ids: Array) -> Array:
    """Which pairs may attend: ``allow(i, j) = (segment_i == segment_j)``.

    Padding (segment 0) attends to padding only: real positions never see it, and its
    own (discarded) outputs stay finite.

    Args:
      segment_ids: int32 ``[B, L]``.

    Returns:
      bool ``[B, 1, L, L]``, the second axis stands for heads.
    """
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def softmax_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    segment_ids: Array | None = None,
) -> Array:
    """Bidirectional softmax attention, ``softmax(q kᵀ / sqrt(K)) v`` per segment.

    Scores and softmax are float32 whatever the compute dtype. Heads lead the batched
    products, so that each is over contiguous matrices.

    Args:
      query: ``[B, L, H, K]``.
      key: ``[B, L, H, K]``.
      value: ``[B, L, H, K]``.
      segment_ids: int32 ``[B, L]`` or None (every position sees every other).

    Returns:
      ``[B, L, H, K]`` in the dtype of ``value``.
    """
    query_BHQK, key_BHSK, value_BHSK = (x.swapaxes(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    scores_BHQS = jnp.einsum(
        "bhqk,bhsk->bhqs",
        query_BHQK * jnp.asarray(scale, query.dtype),
        key_BHSK,
        preferred_element_type=jnp.float32,
    )
    if segment_ids is not None:
        scores_BHQS = jnp.where(segment_mask(segment_ids), scores_BHQS, _MASKED_SCORE)
    # Mixed first and divided last: K numbers to divide per query instead of S. The
    # result does not depend on the maximum, hence neither does the gradient.
    peak_BHQ1 = jax.lax.stop_gradient(scores_BHQS.max(axis=-1, keepdims=True))
    weights_BHQS = jnp.exp(scores_BHQS - peak_BHQ1)
    total_BHQ1 = weights_BHQS.sum(axis=-1, keepdims=True)
    mixed_BHQK = jnp.einsum(
        "bhqs,bhsk->bhqk",
        weights_BHQS.astype(value.dtype),
        value_BHSK,
        preferred_element_type=jnp.float32,
    )
    return (mixed_BHQK / total_BHQ1).astype(value.dtype).swapaxes(1, 2)
