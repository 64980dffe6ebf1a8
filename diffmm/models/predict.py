"""The transformer as samplers see it: a hashable function of parameters and arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffmm.models import cached
from diffmm.models.cached import KeyValueCache
from diffmm.models.transformer import Denoiser, unembed
from diffmm.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class TransformerPredict:
    """A `Denoiser` without its parameters; made by `predict_fn`.

    It is a `PredictFn`, a `FeatureFn`, a `CachedFn` and a `ShadowFn` of
    `diffmm.typing`. Equal structures give equal objects with equal hashes, so that what
    was compiled for one serves the other. Features are final normalised activations
    ``[B, K, D]`` in the compute dtype.

    With ``shift`` 1 position i is read at i − 1: models converted from autoregressive
    ones (Dream) predict the next position. The first position of a segment has no
    predecessor and keeps its own logits; a cached evaluation that reads it must compute
    it, and a shadow costs two positions instead of one.

    Attributes:
      graphdef: first result of ``nnx.split(model)``.
      shift: 0, or 1 if logits at i predict i + 1.
      causal_block: of the configuration.

    References:
      Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487 (shift).
    """

    graphdef: Any
    shift: int = 0
    causal_block: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Refuses other shifts, and looks the block up in the configuration."""
        if self.shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1, got {self.shift!r}")
        # The configuration is in the structure: any leaves do to get at it.
        leaf = jax.ShapeDtypeStruct((), jnp.float32)
        model: Denoiser = nnx.merge(self.graphdef, [leaf] * self.graphdef.num_leaves)
        object.__setattr__(self, "causal_block", model.config.causal_block)

    def __call__(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Array:
        """Logits of the scored positions, float32 ``[B, K, V]``; a `PredictFn`."""
        features = self.features(params, tokens, positions, segment_ids, scored)
        return self.logits(params, features)

    def features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Array:
        """Activations of the scored positions ``[B, K, D]``; see `FeatureFn`."""
        hidden_BLD = self._model(params).hidden(tokens, positions, segment_ids)
        return _at(hidden_BLD, self._read_at(segment_ids, scored))

    def logits(self, params: Params, features: Array) -> Array:
        """Features ``[..., D]`` to float32 logits ``[..., V]``; see `FeatureFn`."""
        return unembed(features, self._model(params).output_matrix)

    def empty_cache(
        self, params: Params, num_rows: int, row_length: int
    ) -> KeyValueCache:
        """A cache for rows of one length; see `CachedFn`."""
        return cached.empty_cache(self._model(params), num_rows, row_length)

    def cached_features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
        cache: KeyValueCache,
        queries: Array | None,
    ) -> tuple[Array, KeyValueCache]:
        """Features of some positions, all others as in the cache; see `CachedFn`.

        A block-causal model is exact as long as the stored blocks before the computed
        ones are finished and stored as such. Any other model sees the others as they
        were when they were last computed.
        """
        row = tokens, positions, segment_ids
        model = self._model(params)
        at = self._read_at(segment_ids, scored)
        if queries is None:
            hidden, cache = cached.refreshed(model, *row, cache)
            return _at(hidden, at), cache
        hidden, cache = cached.renewed(model, *row, cache, queries)
        place = jax.vmap(_places_of, in_axes=(0, None))(queries, tokens.shape[1])
        return _at(hidden, jnp.take_along_axis(place, at, axis=1)), cache

    def shadow_features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
        mask_id: int,
    ) -> tuple[Array, Array]:
        """Features of the scored positions and of their shadows; see `ShadowFn`.

        What shadows see is said at `diffmm.models.cached.with_shadows`.
        """
        at = self._read_at(segment_ids, scored)
        hidden, shadows = cached.with_shadows(
            self._model(params),
            tokens,
            positions,
            segment_ids,
            scored,
            mask_id,
            before=at if self.shift else None,
        )
        return _at(hidden, at), shadows

    def _model(self, params: Params) -> Denoiser:
        return nnx.merge(self.graphdef, params)

    def _read_at(self, segment_ids: Array, scored: Array) -> Array:
        """Indices at which the scored positions are read, int32 ``[B, K]``."""
        if not self.shift:
            return scored
        before = jnp.maximum(scored - 1, 0)
        own = jnp.take_along_axis(segment_ids, scored, axis=1)
        same = jnp.take_along_axis(segment_ids, before, axis=1) == own
        return jnp.where(same, before, scored)


def _at(hidden: Array, index: Array) -> Array:
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1, mode="clip")


def _places_of(queries: Array, length: int) -> Array:
    """Place of each index of a row among ``queries [Q]``; 0 where it is in none."""
    place = jnp.arange(queries.shape[0], dtype=jnp.int32)
    return jnp.zeros((length,), jnp.int32).at[queries].set(place, mode="drop")


def predict_fn(graphdef: Any, shift: int = 0) -> TransformerPredict:
    """The denoiser as samplers see it: logits of the scored positions only.

    Args:
      graphdef: first result of ``nnx.split(model)`` of a `Denoiser`.
      shift: 1 if logits at i predict position i + 1.

    Returns:
      A `diffmm.typing.PredictFn` of ``(params, tokens, positions, segment_ids,
      scored)``; the unembedding is applied to the K scored positions alone.

    Raises:
      ValueError: another shift.
    """
    return TransformerPredict(graphdef, shift)
