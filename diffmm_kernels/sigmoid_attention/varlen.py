"""Sequences of different lengths, concatenated without padding.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffmm_kernels.sigmoid_attention.api import sigmoid_attention
from diffmm_kernels.sigmoid_attention.arguments import concrete
from diffmm_kernels.sigmoid_attention.config import Config, Precision
from diffmm_kernels.sigmoid_attention.dispatch import Name


def sigmoid_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    *,
    bias: Any,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = 0,
    alibi_slopes: Any = None,
    precision: Precision = "default",
    out_dtype: Any = None,
    implementation: Name | None = None,
    deterministic: bool = False,
    config: Config | None = None,
    interpret: bool | None = None,
) -> Any:
    """Sigmoid attention inside each of N concatenated sequences.

    The same as N separate calls of `sigmoid_attention`, and differentiable like it:
    positions, and with them causality, windows and ALiBi, count from the start of each
    sequence. Letters: H query heads, K key heads, D and E head sizes.

    Args:
      q: ``[total_q, H, D]``.
      k: ``[total_kv, K, D]``.
      v: ``[total_kv, K, E]``.
      cu_seqlens_q: integers ``[N + 1]``: sequence n holds the queries
        ``cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1]``. The first is 0, none is less
        than the one before. Queries after the last return 0.
      cu_seqlens_kv: likewise for keys and values; keys after the last are invisible.
      bias: offset of the sigmoid, usually ``-log`` of the length trained at: a
        number, or a float array ``[]`` or ``[H]``.
      scale: multiplies q·k only; ``D ** -0.5`` by default.
      causal: query i of a sequence sees its keys ``j <= i + q_offset``.
      window: as in `sigmoid_attention`.
      q_offset: an integer, or integers ``[N]``: query i of sequence n sits at position
        ``i + q_offset[n]`` of its keys. 0 aligns the first query with the first key,
        ``jnp.diff(cu_seqlens_kv) - jnp.diff(cu_seqlens_q)`` the last ones.
      alibi_slopes: ``[H]``; as in `sigmoid_attention`.
      precision: as in `sigmoid_attention`.
      out_dtype: of the output; that of q by default.
      implementation: as in `sigmoid_attention`.
      deterministic: as in `sigmoid_attention`.
      config: as in `sigmoid_attention`.
      interpret: as in `sigmoid_attention`.

    Returns:
      ``[total_q, H, E]``.

    Raises:
      ValueError: an argument is out of what is allowed; names it and what came.
      NotImplementedError: the named implementation cannot serve this call; says why.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.ones((6, 2, 8))
      >>> cu_seqlens = jnp.array([0, 2, 5])
      >>> o = sigmoid_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, bias=1000.0)
      >>> o[:, 0, 0]
      Array([2., 2., 3., 3., 3., 0.], dtype=float32)
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            "q, k, v must be [total_q, H, D], [total_kv, K, D] and [total_kv, K, E], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if bias is None:
        raise ValueError(
            "bias must be given: the total number of keys is no length trained at; "
            "usually -log of the longest sequence in training"
        )
    queries = _packing("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = _packing("cu_seqlens_kv", cu_seqlens_kv, k.shape[0])
    if queries.starts.shape != keys.starts.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_kv must have the same length N + 1, got "
            f"{queries.starts.size + 1} and {keys.starts.size + 1}"
        )
    # Position of a query among all keys, less its index among all queries.
    shift = keys.starts - queries.starts + _per_sequence(q_offset, queries.starts.size)
    return sigmoid_attention(
        q,
        k,
        v,
        bias=bias,
        scale=scale,
        causal=causal,
        window=window,
        q_offset=shift[jnp.maximum(queries.ids, 0)],
        q_segment_ids=queries.ids,
        kv_segment_ids=keys.ids,
        alibi_slopes=alibi_slopes,
        precision=precision,
        out_dtype=out_dtype,
        implementation=implementation,
        deterministic=deterministic,
        config=config,
        interpret=interpret,
    )


class _Packing(NamedTuple):
    """Where sequences lie among ``total`` tokens.

    Attributes:
      starts: int32 ``[N]``.
      ids: int32 ``[total]``: the sequence of each token, -1 for none.
    """

    starts: Any
    ids: Any


def _packing(name: str, cu_seqlens: Any, total: int) -> _Packing:
    cu_seqlens = jnp.asarray(cu_seqlens)
    if not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.size < 2:
        raise ValueError(
            f"{name} must have shape [N + 1] for N >= 1 sequences, got "
            f"{list(cu_seqlens.shape)}"
        )
    if concrete(cu_seqlens):
        values = np.asarray(cu_seqlens)
        if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > total:
            raise ValueError(
                f"{name} must start at 0, never decrease and end at {total} at most, "
                f"got {values.tolist()}"
            )
    cu_seqlens = cu_seqlens.astype(jnp.int32)
    token = jnp.arange(total, dtype=jnp.int32)
    ids = jnp.searchsorted(cu_seqlens, token, side="right").astype(jnp.int32) - 1
    return _Packing(cu_seqlens[:-1], jnp.where(token < cu_seqlens[-1], ids, -1))


def _per_sequence(q_offset: Any, n: int) -> Any:
    q_offset = jnp.asarray(q_offset)
    if not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset must be integers, got {q_offset.dtype}")
    if q_offset.shape not in ((), (n,)):
        raise ValueError(
            f"q_offset must be an integer or integers of shape [N] = [{n}], got shape "
            f"{list(q_offset.shape)}"
        )
    return jnp.broadcast_to(q_offset.astype(jnp.int32), (n,))
