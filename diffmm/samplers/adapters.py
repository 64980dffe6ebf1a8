"""Denoisers in other conventions, made to look like a `PredictFn`."""

from __future__ import annotations

import jax.numpy as jnp

from diffmm.typing import Array, Params, PredictFn


def shifted(predict: PredictFn) -> PredictFn:
    """A denoiser whose logits at i predict position i + 1, as one that predicts i.

    Models converted from autoregressive ones (Dream) are like that. The first position
    of a segment has no predecessor and keeps its own logits.

    Args:
      predict: the denoiser. Wrap it once and keep the result: every call of this
        function returns a new object, and a new object compiles again.

    Returns:
      The denoiser read one position to the left.
    """

    def aligned(
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Array:
        before = jnp.maximum(scored - 1, 0)
        own = jnp.take_along_axis(segment_ids, scored, axis=1)
        same = jnp.take_along_axis(segment_ids, before, axis=1) == own
        at = jnp.where(same, before, scored)
        return predict(params, tokens, positions, segment_ids, at)

    return aligned
