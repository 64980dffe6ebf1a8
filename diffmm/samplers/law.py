"""From a denoiser's features to guided, suppressed laws, few positions at a time.

A denoiser hands out features ``[B, K, ...]``: its logits, or, if it can tell them apart
(`diffmm.typing.FeatureFn`), what comes before its unembedding. Everything the loop
wants to know is read from them in small groups of positions, so that the float32
logits of all scored positions never exist together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.filters import FILL, suppress
from diffmm.samplers.guidance import combine
from diffmm.typing import Array, FeatureFn, Params, PredictFn


class Law(NamedTuple):
    """The laws of positions ``[B, K]``, or of any group of them ``[...]``.

    Attributes:
      features: pytree ``[..., ...]`` of the conditional branch.
      other: the same of the unconditional branch, or ``None``.
      scale: float32 ``[...]``, guidance scale, or ``None``.
      modality: int32 ``[...]``.
      barred: bool ``[...]``, the stop id is not allowed here yet, or ``None``.
    """

    features: Any
    other: Any
    scale: Array | None
    modality: Array
    barred: Array | None


class Reader(NamedTuple):
    """How laws are read.

    Attributes:
      logits: features ``[..., ...]`` to logits ``[..., V]``.
      allowed: bool ``[4, V]``, ids by modality.
      stop_id: the id that ``barred`` is about, or ``None``.
    """

    logits: Callable[[Any], Array]
    allowed: Array
    stop_id: int | None = None

    def __call__(self, law: Law) -> Array:
        """Float32 logits ``[..., V]``: guided, then suppressed.

        Logits of −inf become a large finite number; +inf and NaN stay what they are
        and are found by the loop.
        """
        own = self.logits(law.features).astype(jnp.float32)
        if law.other is not None:
            scale = jnp.asarray(law.scale)

            def guided() -> Array:
                other = self.logits(law.other).astype(jnp.float32)
                return combine(own, other, scale)

            own = jax.lax.cond(jnp.any(scale != 1.0), guided, lambda: own)
        own = jnp.maximum(suppress(own, self.allowed[law.modality]), FILL)
        if law.barred is None:
            return own
        ids = jax.lax.broadcasted_iota(jnp.int32, own.shape, own.ndim - 1)
        return suppress(own, ~(law.barred[..., None] & (ids == self.stop_id)))


def reader_of(predict: PredictFn, params: Params) -> Callable[[Any], Array]:
    """What turns the features of ``predict`` into logits."""
    if isinstance(predict, FeatureFn):
        return lambda features: predict.logits(params, features)
    return lambda logits: logits


def take(law: Law, at: Array) -> Law:
    """The laws at columns ``at [B, C]`` of laws ``[B, K]``."""

    def pick(leaf: Array) -> Array:
        index = at.reshape(at.shape + (1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=1)

    return jax.tree.map(pick, law)
