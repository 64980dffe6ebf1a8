"""One evaluation of a denoiser: with guidance, with a cache, with shadows.

An evaluation gives the features of the scored positions; `diffmm.samplers.law` reads
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.guidance import hide_condition
from diffmm.typing import Array, CachedFn, FeatureFn, Params, PredictFn, ShadowFn


class Scene(NamedTuple):
    """What a denoiser is asked about.

    Attributes:
      tokens: int32 ``[B, L]``.
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      condition: bool ``[B, L]``, tokens that the unconditional branch hides.
      scored: int32 ``[B, K]``, indices into the row.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    condition: Array
    scored: Array


class Renewal(NamedTuple):
    """What is computed anew in this evaluation.

    Attributes:
      whole: bool ``[B]``, rows that are computed whole.
      want: bool ``[B, L]``, positions that are computed in the other active rows.
      partial: bool ``[B]``, rows that are computed in part.
    """

    whole: Array
    want: Array
    partial: Array


class Evaluated(NamedTuple):
    """Features ``[B, K, ...]`` and what was spent.

    Attributes:
      features: of the conditional branch.
      other: of the unconditional branch, or ``None``.
      shadows: of the shadows, or ``None``.
      cache: of both branches, or ``None``.
      branches: int32 ``[B]``, evaluations per row, 1 or 2.
      whole_calls: int32 ``[]``, calls on whole rows.
      partial_calls: int32 ``[]``, calls on some positions.
      processed: float32 ``[]``, positions computed, all rows and calls.
    """

    features: Any
    other: Any
    shadows: Any
    cache: Any
    branches: Array
    whole_calls: Array
    partial_calls: Array
    processed: Array


def evaluate(
    predict: PredictFn,
    params: Params,
    scene: Scene,
    *,
    scale: Array | None,
    mask_id: int,
    shadows: bool,
) -> Evaluated:
    """Whole rows; the second branch runs only if some scale differs from 1.

    Args:
      predict: the denoiser.
      params: its parameters.
      scene: what to score.
      scale: float32 ``[B, K]``, or ``None`` for no guidance at all.
      mask_id: the mask.
      shadows: ask for shadows too; without guidance only.

    Returns:
      `Evaluated`.
    """
    num_rows, row_length = scene.tokens.shape
    length = row_length
    branches = jnp.ones((num_rows,), jnp.int32)
    calls = jnp.int32(1)
    own, other, hidden = None, None, None
    if shadows:
        assert isinstance(predict, ShadowFn)
        own, hidden = predict.shadow_features(params, *_asked(scene), mask_id)
        # A shifted denoiser needs two rows for a shadow.
        length += scene.scored.shape[1] * (1 + getattr(predict, "shift", 0))
    else:
        own = _features(predict, params, scene)
    if scale is not None:

        def second() -> Any:
            return _features(predict, params, _unconditional(scene, mask_id))

        needed = jnp.any(scale != 1.0, axis=1)
        other = jax.lax.cond(jnp.any(needed), second, lambda: own)
        branches = branches + needed
        calls = calls + jnp.any(needed)
    return Evaluated(
        features=own,
        other=other,
        shadows=hidden,
        cache=None,
        branches=branches,
        whole_calls=calls,
        partial_calls=jnp.int32(0),
        processed=calls.astype(jnp.float32) * (num_rows * length),
    )


def evaluate_cached(
    predict: CachedFn,
    params: Params,
    scene: Scene,
    cache: Any,
    renewal: Renewal,
    *,
    scale: Array | None,
    mask_id: int,
    sizes: Sequence[int],
) -> Evaluated:
    """Whole rows where asked, some positions of the others; each branch has its cache.

    With guidance both branches run in every evaluation, whatever the scale: a branch
    that pauses would miss what was committed meanwhile.

    Args:
      predict: the denoiser.
      params: its parameters.
      scene: what to score.
      cache: of `empty_caches` or of an earlier evaluation.
      renewal: what to compute.
      scale: as in `evaluate`.
      mask_id: the mask.
      sizes: numbers of positions per row to compile for, rising; the last one holds
        whatever is wanted.

    Returns:
      `Evaluated`.
    """
    num_rows, row_length = scene.tokens.shape
    wanted = renewal.want & renewal.partial[:, None]
    needed = jnp.max(jnp.sum(wanted.astype(jnp.int32), axis=1))
    any_whole, any_partial = jnp.any(renewal.whole), jnp.any(renewal.partial)
    place = sum((needed > size for size in sizes[:-1]), start=jnp.int32(0))

    def branch(scene: Scene, cache: Any) -> tuple[Any, Any]:
        def whole() -> tuple[Any, Any]:
            features, new = predict.cached_features(params, *_asked(scene), cache, None)
            return features, _where_rows(renewal.whole, new, cache, axis=1)

        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole)[0]
        )
        features, cache = jax.lax.cond(any_whole, whole, lambda: (empty, cache))

        def part(size: int) -> tuple[Any, Any]:
            queries = _packed(wanted, size)
            some, new = predict.cached_features(params, *_asked(scene), cache, queries)
            return _where_rows(renewal.partial, some, features, axis=0), new

        def parts() -> tuple[Any, Any]:
            if len(sizes) == 1:
                return part(sizes[0])
            choices = [lambda size=size: part(size) for size in sizes]
            return jax.lax.switch(place, choices)

        return jax.lax.cond(any_partial, parts, lambda: (features, cache))

    own_cache, other_cache = cache
    own, own_cache = branch(scene, own_cache)
    other, branches = None, jnp.ones((num_rows,), jnp.int32)
    if scale is not None:
        other, other_cache = branch(_unconditional(scene, mask_id), other_cache)
        branches = branches + 1
    runs = 1 if scale is None else 2
    size = jnp.asarray(sizes, jnp.int32)[place]
    columns = any_whole * row_length + any_partial * size
    return Evaluated(
        features=own,
        other=other,
        shadows=None,
        cache=(own_cache, other_cache),
        branches=branches,
        whole_calls=runs * any_whole.astype(jnp.int32),
        partial_calls=runs * any_partial.astype(jnp.int32),
        processed=(runs * num_rows) * columns.astype(jnp.float32),
    )


def empty_caches(
    predict: CachedFn, params: Params, num_rows: int, row_length: int, *, guided: bool
) -> tuple[Any, Any]:
    """A cache for each branch; ``None`` for the second without guidance."""
    first = predict.empty_cache(params, num_rows, row_length)
    second = predict.empty_cache(params, num_rows, row_length) if guided else None
    return first, second


def _features(predict: PredictFn, params: Params, scene: Scene) -> Any:
    if isinstance(predict, FeatureFn):
        return predict.features(params, *_asked(scene))
    return predict(params, *_asked(scene))


def _asked(scene: Scene) -> tuple[Array, Array, Array, Array]:
    return scene.tokens, scene.positions, scene.segment_ids, scene.scored


def _unconditional(scene: Scene, mask_id: int) -> Scene:
    hidden = hide_condition(scene.tokens, scene.condition, mask_id)
    return scene._replace(tokens=hidden)


def _packed(wanted: Array, size: int) -> Array:
    """Indices of the wanted positions of each row, int32 ``[B, size]``; L = unused."""
    num_rows, row_length = wanted.shape
    place = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    index = jax.lax.broadcasted_iota(jnp.int32, wanted.shape, 1)
    start = jnp.full((num_rows, size), row_length, jnp.int32)
    return start.at[rows, jnp.where(wanted, place, size)].set(index, mode="drop")


def _where_rows(rows: Array, new: Any, old: Any, *, axis: int) -> Any:
    def pick(new: Array, old: Array) -> Array:
        shape = [1] * new.ndim
        shape[axis] = len(rows)
        return jnp.where(rows.reshape(shape), new, old)

    return jax.tree.map(pick, new, old)
