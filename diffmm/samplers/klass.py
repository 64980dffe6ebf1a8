"""Commits confident positions whose law has stopped moving.

References:
  Kim et al., "KLASS: KL-Guided Fast Inference in Masked Diffusion Models", arXiv
  2511.05664.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.checks import check_choice, check_integer, check_number
from diffmm.samplers.rule import Prediction, Rule, Selection, Window, top_ranked
from diffmm.typing import Array, ArrayLike

_STATIC = {"static": True}


def klass_set(
    confidence: Array,
    stable: Array,
    masked: Array,
    threshold: ArrayLike | float,
    quota: ArrayLike | int = 1,
) -> Array:
    """All stable positions with c_k > threshold, else the ``quota`` most confident.

    Args:
      confidence: float32 ``[K]``.
      stable: bool ``[K]``, the law has stopped moving.
      masked: bool ``[K]``.
      threshold: of the confidence.
      quota: positions to commit where none is ready; at most the masks there are.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    ready = masked & stable & (confidence > threshold)
    fallback = top_ranked(confidence, masked, jnp.asarray(quota, jnp.int32))
    return jnp.where(jnp.any(ready), ready, fallback)


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """Σ_v p log(p/q), nats.

    Args:
      log_p: float32 ``[..., V]``, finite.
      log_q: float32 ``[..., V]``, finite.

    Returns:
      float32 ``[...]``.
    """
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


class KLASSMemory(NamedTuple):
    """What `KLASS` remembers.

    Attributes:
      log_prob: ``[K, V]``, log-probabilities of the evaluation before.
      calm: int32 ``[K]``, evaluations in a row whose divergence was small.
      seen: int32 ``[]``, evaluations of this block.
    """

    log_prob: Array
    calm: Array
    seen: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KLASS(Rule):
    """Confident positions whose law has stopped moving.

    A position is ready if c > ``confidence`` and each of its last ``history``
    divergences KL(p_now ‖ p_before) is below ``kl``. All ready positions are committed,
    else the ``quota`` most confident. Nothing is ready before evaluation
    ``history`` + 1 of a block.

    Attributes:
      confidence: ≥ 0.
      kl: ≥ 0, nats; 0 leaves the quota alone.
      history: h ≥ 1.
      quota: ≥ 1, tokens per evaluation while none is ready.
      dtype: in which log-probabilities are kept: ``"float32"``, ``"float16"`` or
        ``"bfloat16"``, for K·V numbers per row. Rounding adds divergence noise of about
        the entropy times 2⁻¹² or 2⁻⁹.
    """

    confidence: ArrayLike | float = 0.9
    kl: ArrayLike | float = 0.01
    history: int = dataclasses.field(default=2, metadata=_STATIC)
    quota: ArrayLike | int = 1
    dtype: str = dataclasses.field(default="float32", metadata=_STATIC)

    needs_logits: ClassVar[bool] = True

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range."""
        check_number("confidence", self.confidence)
        check_number("kl", self.kl)
        check_integer("history", self.history, low=1)
        check_integer("quota", self.quota, low=1)
        check_choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> KLASSMemory:
        """Nothing seen yet."""
        size = window.masked.shape[0]
        return KLASSMemory(
            jnp.zeros((size, vocabulary_size), self.dtype),
            jnp.zeros((size,), jnp.int32),
            jnp.int32(0),
        )

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: KLASSMemory
    ) -> Selection:
        """`klass_set`."""
        assert prediction.logits is not None
        statistics = prediction.statistics
        lowest = math.sqrt(float(jnp.finfo(self.dtype).max))
        log_prob = jnp.maximum(
            prediction.logits - statistics.log_normalizer[:, None], -lowest
        )
        before = aux.log_prob.astype(jnp.float32)
        divergence = jnp.maximum(kl_divergence(log_prob, before), 0.0)
        calm = jnp.where((aux.seen > 0) & (divergence < self.kl), aux.calm + 1, 0)
        commit = klass_set(
            statistics.max_prob,
            calm >= self.history,
            window.masked,
            self.confidence,
            self.quota,
        )
        memory = KLASSMemory(log_prob.astype(self.dtype), calm, aux.seen + 1)
        return Selection(commit, statistics.max_prob, memory)
