"""A transformer on some positions of a row, and on shadows beside a row.

Both are attention of Q queries to S keys, `diffmm.typing.View`. Letters beside those of
`diffmm.models.transformer`: Q computed positions, G heads of keys and values, H of
queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.models.transformer import Block, Denoiser
from diffmm.models.views import row_places, view_of
from diffmm.typing import Array, Places


class KeyValueCache(NamedTuple):
    """Keys and values of all positions of all rows, in the compute dtype.

    Attributes:
      key: ``[layers, B, L, G, K]``, normalised and rotated.
      value: ``[layers, B, L, G, K]``.
    """

    key: Array
    value: Array


def empty_cache(model: Denoiser, num_rows: int, row_length: int) -> KeyValueCache:
    """A cache of zeros; its first use must compute whatever is seen."""
    groups, head_dim = model.blocks.attention.key.shape[-2:]
    shape = (model.config.num_layers, num_rows, row_length, groups, head_dim)
    # Two arrays, since one buffer cannot be donated twice.
    return KeyValueCache(*(jnp.zeros(shape, model.config.compute_dtype) for _ in "kv"))


def refreshed(
    model: Denoiser,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    cache: KeyValueCache,
) -> tuple[Array, KeyValueCache]:
    """Computes whole rows and stores all their keys and values.

    Args:
      model: the transformer.
      tokens: int32 ``[B, L]``.
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      cache: what was stored does not matter.

    Returns:
      Final normalised activations ``[B, L, D]``, the numbers of `Denoiser.hidden`, and
      the cache.
    """
    model.check_length(tokens.shape[1])
    view = model.row_view(positions, segment_ids)

    def apply(
        block: Block, x: Array, angles: Any, residuals: Array | None, memory: Any
    ) -> Any:
        layer, cache = memory
        query, key, value = block.heads(x, angles)
        cache = KeyValueCache(
            *(
                jax.lax.dynamic_update_index_in_dim(stored, new, layer, axis=0)
                for stored, new in zip(cache, (key, value), strict=True)
            )
        )
        mixed = block.attention.mix(query, key, value, segment_ids, view)
        return block.finish(x, mixed, residuals), (layer + 1, cache), None

    x, (_, cache), _ = model.run(apply, tokens, positions, (jnp.int32(0), cache))
    return model.final_norm(x), cache


def renewed(
    model: Denoiser,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    cache: KeyValueCache,
    queries: Array,
) -> tuple[Array, KeyValueCache]:
    """Computes some positions of each row against the stored keys of all others.

    In every block the keys and values of the computed positions are stored first, so
    that they see each other as they are now.

    Args:
      model: the transformer.
      tokens: int32 ``[B, L]``.
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      cache: with keys and values of whatever the computed positions see.
      queries: int32 ``[B, Q]``, indices into the row; L where a place is unused.

    Returns:
      Final normalised activations ``[B, Q, D]``, finite and meaningless at unused
      places, and the cache.
    """
    length = tokens.shape[1]
    model.check_length(length)
    row = row_places(positions, segment_ids)
    # An unused place computes the last position over again and stores nothing.
    at = jnp.minimum(queries, length - 1)
    places = _take(row, at)
    view = view_of(places, row, causal_block=model.config.causal_block)

    def apply(
        block: Block, x: Array, angles: Any, residuals: Array | None, memory: Any
    ) -> Any:
        layer, cache = memory
        query, *new = block.heads(x, angles)
        cache = KeyValueCache(
            *(
                _store(stored, layer, queries, some)
                for stored, some in zip(cache, new, strict=True)
            )
        )
        key, value = (
            jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
            for stored in cache
        )
        mixed = block.attention.mix(query, key, value, segment_ids, view)
        return block.finish(x, mixed, residuals), (layer + 1, cache), None

    x, (_, cache), _ = model.run(
        apply,
        jnp.take_along_axis(tokens, at, axis=1),
        places.positions,
        (jnp.int32(0), cache),
    )
    return model.final_norm(x), cache


def _take(places: Places, at: Array) -> Places:
    return Places(*(jnp.take_along_axis(x, at, axis=1) for x in places))


def _store(stored: Array, layer: Array, queries: Array, new: Array) -> Array:
    """Writes ``new [B, Q, G, K]`` to one layer of ``stored``, without unused places."""
    rows = jnp.arange(queries.shape[0], dtype=jnp.int32)[:, None]
    return stored.at[layer, rows, queries].set(new, mode="drop")


def with_shadows(
    model: Denoiser,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    scored: Array,
    mask_id: int,
    before: Array | None = None,
) -> tuple[Array, Array]:
    """Computes whole rows, and for each scored position what it would be if masked.

    The shadow of a scored position is a mask with the same position. It sees itself and
    all tokens of its segment but the one at its position; nobody sees shadows, other
    shadows no more than tokens. Hence the shadow of a position that is masked is that
    position itself, number by number, and the activations of tokens are those without
    shadows. (In the code published with the paper shadows also see each other, so that
    a token at one scored position is seen together with a mask at the same place.)

    What is hidden at one position is hidden from its shadow only: from the second block
    on other tokens carry traces of it.

    Args:
      model: the transformer.
      tokens: int32 ``[B, L]``.
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      scored: int32 ``[B, K]``.
      mask_id: the token of shadows.
      before: int32 ``[B, K]``: positions at which the scored ones are read, for models
        whose logits predict the next position; None for all others. Then a second
        shadow repeats the token there, and sees the first instead of the scored token.

    Returns:
      Final normalised activations of tokens ``[B, L, D]``, and of shadows
      ``[B, K, D]``.

    References:
      Hong et al., "Wide-In, Narrow-Out: Revokable Decoding for Efficient and Effective
      DLLMs", arXiv 2507.18578.
    """
    length, num_scored = tokens.shape[1], scored.shape[1]
    model.check_length(length)
    row = row_places(positions, segment_ids)
    groups = [row, _take(row, scored)]
    contents = [tokens, jnp.full_like(scored, mask_id)]
    if before is not None:
        groups.append(_take(row, before))
        contents.append(jnp.take_along_axis(tokens, before, axis=1))
    places = Places(*(jnp.concatenate(x, axis=1) for x in zip(*groups, strict=True)))
    visible = _seen_by_shadows(length, scored, before)
    view = view_of(
        places, places, causal_block=model.config.causal_block, visible=visible
    )
    hidden = model.hidden_in_view(
        jnp.concatenate(contents, axis=1), places.positions, places.segment_ids, view
    )
    shadows = hidden[:, length : length + num_scored]
    if before is not None:
        # The first position of a segment is read at itself.
        itself = (before == scored)[:, :, None]
        shadows = jnp.where(itself, shadows, hidden[:, length + num_scored :])
    return hidden[:, :length], shadows


def _seen_by_shadows(length: int, scored: Array, before: Array | None) -> Array:
    """Bool ``[B, N, N]``, N = L + K, or L + 2K with ``before``."""
    num_rows, num_scored = scored.shape
    index_11L = jnp.arange(length, dtype=jnp.int32)[None, None]
    tokens_BKL = index_11L != scored[:, :, None]
    if before is not None:
        # What reads a mask sees neither the token behind the mask nor its own double.
        reader_BKL = tokens_BKL & (index_11L != before[:, :, None])
        tokens_BKL = jnp.concatenate([tokens_BKL, reader_BKL], axis=1)
    num_shadows = tokens_BKL.shape[1]
    shadows_KK = jnp.eye(num_shadows, dtype=bool)
    if before is not None:
        shadows_KK = shadows_KK | jnp.eye(num_shadows, k=-num_scored, dtype=bool)
    shadows_BKK = jnp.broadcast_to(
        shadows_KK[None], (num_rows, num_shadows, num_shadows)
    )
    is_token_N = jnp.arange(length + num_shadows, dtype=jnp.int32) < length
    by_token_BLN = jnp.broadcast_to(
        is_token_N[None, None], (num_rows, length, length + num_shadows)
    )
    by_shadow_BKN = jnp.concatenate([tokens_BKL, shadows_BKK], axis=2)
    return jnp.concatenate([by_token_BLN, by_shadow_BKN], axis=1)
