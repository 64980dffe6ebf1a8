"""One step of generation against a cache of keys and values.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm_kernels.sigmoid_attention import cache, dispatch
from diffmm_kernels.sigmoid_attention.arguments import Options, canonical, concrete
from diffmm_kernels.sigmoid_attention.cache import Step
from diffmm_kernels.sigmoid_attention.dispatch import Choice, Name
from diffmm_kernels.sigmoid_attention.varying import uniformly_varying

#: Most new tokens in one step; more are a prefill, which is `sigmoid_attention`.
MAX_QUERIES = 8

#: Dot products side by side that fill an accelerator, about.
_PARALLEL = 256


def sigmoid_decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    *,
    bias: Any,
    pages: Any = None,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    alibi_slopes: Any = None,
    splits: int | None = None,
    out_dtype: Any = None,
    implementation: Name | None = None,
) -> Any:
    """The last rows of causal sigmoid attention over a cache.

    Query i of T sits at position ``lengths - T + i`` and sees the keys up to there, so
    that the step equals those rows of ``sigmoid_attention(..., causal=True)``. Write
    the new keys and values into the cache first. What lies in the cache from
    ``lengths`` on, or before every window, changes nothing, NaN included. The cost
    follows the longest of the lengths. There is no gradient.

    Letters: B batch, S keys of the cache, P pages of L keys, H query heads, K key
    heads, D and E head sizes.

    Args:
      q: ``[B, T, H, D]``, T from 1 to 8.
      k_cache: ``[B, S, K, D]``; with ``pages``, ``[P, L, K, D]``.
      v_cache: ``[B, S, K, E]``; with ``pages``, ``[P, L, K, E]``.
      lengths: integers ``[B]``: keys of each sequence, the T new ones included. Rows
        of the output at negative positions are 0.
      bias: offset of the sigmoid, usually ``-log`` of the length trained at: a
        number, or a float array ``[]``, ``[H]`` or ``[B, H]``.
      pages: integers ``[B, max_pages]``: key j of sequence b is at ``j % L`` in page
        ``pages[b, j // L]``. Entries for keys past the length may be anything.
      scale: multiplies q·k only; ``D ** -0.5`` by default.
      window: as in `sigmoid_attention`; keys after the query stay invisible.
      alibi_slopes: ``[H]`` or ``[B, H]``: subtracts ``slope · |i - j|``.
      splits: parts of the keys that are summed side by side and then added, always in
        the same order; by default one on CPU, more for small batches elsewhere.
      out_dtype: of the output; that of q by default.
      implementation: "xla", "reference" (dense, gathers all pages), or None.

    Returns:
      ``[B, T, H, E]``.

    Raises:
      ValueError: an argument is out of what is allowed; names it and what came.
      NotImplementedError: another implementation, or a gradient, was asked for.

    Example:
      >>> import jax.numpy as jnp
      >>> q, cache = jnp.ones((2, 1, 2, 8)), jnp.ones((2, 16, 2, 8))
      >>> o = sigmoid_decode(q, cache, cache, jnp.array([3, 5]), bias=1000.0)
      >>> o[:, 0, 0, 0]
      Array([3., 5.], dtype=float32)
    """
    q, k_cache, v_cache = (jnp.asarray(x) for x in (q, k_cache, v_cache))
    capacity, pages = _check(q, k_cache, v_cache, pages, bias, splits)
    b = q.shape[0]
    if pages is None:
        k, v = k_cache, v_cache
    else:
        # For checking alone: the first key of each page is as good as any.
        k, v = (jnp.zeros((b, 1, *x.shape[2:]), x.dtype) for x in (k_cache, v_cache))
    operands, options, _ = canonical(
        q,
        k,
        v,
        bias=bias,
        scale=scale,
        causal=True,
        window=window,
        q_offset=0,
        q_segment_ids=None,
        kv_segment_ids=None,
        q_lengths=None,
        kv_lengths=None,
        alibi_slopes=alibi_slopes,
        mask=None,
        logit_bias=None,
        precision="high",
        out_dtype=out_dtype,
        deterministic=True,
        config=None,
        interpret=None,
    )
    lengths = _lengths(lengths, b, capacity)
    device = dispatch.current_device()
    choice = _choose(implementation, device)
    dispatch.report(choice, device, f"decoding {q.dtype} q {q.shape}, {capacity} keys")
    step = Step(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        lengths=lengths,
        bias=operands.bias,
        slopes=operands.alibi_slopes,
        pages=pages,
    )
    if splits is None:
        heads = b * k_cache.shape[2]
        splits = 1 if device.platform == "cpu" else max(1, _PARALLEL // heads)
    with jax.named_scope("sigmoid_decode"):
        step = uniformly_varying(step)
        return _compiled(choice.name, options, min(splits, capacity), step)


def _choose(implementation: Name | None, device: dispatch.Device) -> Choice:
    if implementation is None:
        why = f"no kernel for decoding on {device.platform} {device.kind}".rstrip()
        return Choice("xla", None, () if device.platform == "cpu" else (why,))
    if implementation not in dispatch.IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {dispatch.IMPLEMENTATIONS}, got "
            f"{implementation!r}"
        )
    if implementation not in ("xla", "reference"):
        raise NotImplementedError(
            f"implementation {implementation!r}: it has no kernel for decoding"
        )
    return Choice(implementation, None, ())


def _check(
    q: Any, k_cache: Any, v_cache: Any, pages: Any, bias: Any, splits: Any
) -> tuple[int, Any]:
    """Keys that the cache can hold of one sequence, and the page table."""
    caches = f"k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)}"
    came = f"q {list(q.shape)}, {caches}"
    if not q.ndim == k_cache.ndim == v_cache.ndim == 4 or (
        k_cache.shape[:3] != v_cache.shape[:3]
    ):
        raise ValueError(
            "q, k_cache, v_cache must be [B, T, H, D], [B, S, K, D] and [B, S, K, E], "
            "or with pages [B, T, H, D], [P, L, K, D] and [P, L, K, E]; got " + came
        )
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"q must hold 1 to {MAX_QUERIES} queries of a sequence, got {came}; "
            "sigmoid_attention serves more"
        )
    if bias is None:
        raise ValueError(
            "bias must be given: the size of the cache is no length trained at; "
            "usually -log of the longest sequence in training"
        )
    if splits is not None and (
        isinstance(splits, bool)
        or not isinstance(splits, (int, np.integer))
        or splits < 1
    ):
        raise ValueError(f"splits must be None or an integer >= 1, got {splits!r}")
    if pages is None:
        if k_cache.shape[0] != q.shape[0]:
            raise ValueError(f"q and the caches must agree in B, got {came}")
        return k_cache.shape[1], None
    pages = jnp.asarray(pages)
    if (
        not jnp.issubdtype(pages.dtype, jnp.integer)
        or pages.ndim != 2
        or pages.shape[0] != q.shape[0]
        or 0 in pages.shape
        or 0 in k_cache.shape
    ):
        raise ValueError(
            f"pages must be integers [B, max_pages] with B = {q.shape[0]} into caches "
            f"of at least one page, got {pages.dtype}{list(pages.shape)} and {came}"
        )
    return pages.shape[1] * k_cache.shape[1], pages.astype(jnp.int32)


def _lengths(lengths: Any, b: int, capacity: int) -> Any:
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (b,):
        raise ValueError(
            f"lengths must be integers of shape [B] = [{b}], got {lengths.dtype}"
            f"{list(lengths.shape)}"
        )
    # With numpy: inside jit, jax.numpy would make a tracer even of a constant.
    values = np.asarray(lengths) if concrete(lengths) else np.zeros(1)
    if values.min() < 0 or values.max() > capacity:
        raise ValueError(
            f"lengths must lie in 0 … {capacity}, what the cache holds, got "
            f"{values.tolist()}"
        )
    return lengths.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode(name: Name, options: Options, splits: int, step: Step) -> Any:
    if name == "reference":
        return cache.dense(options, step)
    return cache.blockwise(options, splits, step)


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError(
        "sigmoid_decode has no gradient: use sigmoid_attention for training"
    )


_decode.defvjp(_no_gradient, _no_gradient)
_compiled = jax.jit(_decode, static_argnums=(0, 1, 2))
