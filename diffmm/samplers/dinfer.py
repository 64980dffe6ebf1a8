"""The rules of dInfer: one token per run of masks, and credit for steady arg-maxes.

References:
  Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language Models",
  arXiv 2510.08666; Wang et al., "CreditDecoding: Accelerating Parallel Decoding in
  Diffusion Large Language Models with Trace Credits", arXiv 2510.06133.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffmm.samplers.adaptive import threshold_set
from diffmm.samplers.checks import check_number
from diffmm.samplers.rule import Prediction, Rule, Selection, Window, ensure_progress
from diffmm.samplers.statistics import first_argmax
from diffmm.typing import Array, ArrayLike


def hierarchy_set(
    confidence: Array,
    masked: Array,
    positions: Array,
    high: ArrayLike | float,
    low: ArrayLike | float,
) -> Array:
    """{c > high}, the best of every run of masks if c > low, and the best of all.

    A run is a maximal stretch of neighbouring masked positions: committing one token in
    each splits all of them at once, and the tokens are far from each other.

    Args:
      confidence: float32 ``[K]``.
      masked: bool ``[K]``.
      positions: int32 ``[K]``, rising; given tokens in between end a run.
      high: committed whatever the run.
      low: what the best of a run must exceed.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    size = len(masked)
    follows = masked[:-1] & (positions[1:] == positions[:-1] + 1)
    starts = masked & ~jnp.concatenate([jnp.zeros((1,), bool), follows])
    run = jnp.cumsum(starts.astype(jnp.int32)) - 1
    run = jnp.where(masked, run, size)
    score = jnp.where(masked & ~jnp.isnan(confidence), confidence, -jnp.inf)
    best = jnp.full((size,), -jnp.inf).at[run].max(score, mode="drop")
    best_of_run = jnp.take(best, jnp.minimum(run, size - 1))
    place = jnp.arange(size, dtype=jnp.int32)
    candidate = masked & (score == best_of_run)
    first = (
        jnp.full((size,), size, jnp.int32)
        .at[jnp.where(candidate, run, size)]
        .min(place, mode="drop")
    )
    is_first = place == jnp.take(first, jnp.minimum(run, size - 1))
    commit = (score > high) | (candidate & is_first & (score > low))
    return ensure_progress(commit, confidence, masked)


def credit_due(
    logits: Array, masked: Array, gain: ArrayLike | float
) -> tuple[Array, Array]:
    """What earns credit in one evaluation: the arg-max of each masked position, p^γ.

    Args:
      logits: float32 ``[K, V]``, of the law itself: no credit in them.
      masked: bool ``[K]``.
      gain: γ; p is the largest probability.

    Returns:
      ``(token, amount)``, int32 ``[K]`` and float32 ``[K]``; 0 where nothing is masked.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    max_prob = 1.0 / jnp.sum(jnp.exp(logits - top), axis=-1)
    return first_argmax(logits), jnp.where(masked, max_prob**gain, 0.0)


def credited(
    credit: Array, token: Array, amount: Array, decay: ArrayLike | float
) -> Array:
    """β·credit, and then ``amount`` more at one token per position.

    Args:
      credit: float32 ``[K, V]``, ≥ 0.
      token: int32 ``[K]``.
      amount: float32 ``[K]``.
      decay: β.

    Returns:
      float32 ``[K, V]``.
    """
    place = jnp.arange(len(token), dtype=jnp.int32)
    return jnp.asarray(decay * credit).at[place, token].add(amount)


def fused(logits: Array, credit: Array, boost: ArrayLike | float) -> Array:
    """Logits + a·log(1 + credit), float32 ``[K, V]``."""
    return logits + boost * jnp.log1p(credit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy(Rule):
    """Divides and conquers: the best token of every run of masks, and all sure ones.

    Attributes:
      high: ≥ 0; positions with c > high are committed.
      low: in [0, high]; the best position of a run is committed if c > low.
    """

    high: ArrayLike | float = 0.9
    low: ArrayLike | float = 0.4

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses thresholds out of range or order."""
        high = check_number("high", self.high)
        check_number("low", self.low, high=high)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """`hierarchy_set`."""
        score = prediction.statistics.max_prob
        commit = hierarchy_set(
            score, window.masked, window.positions, self.high, self.low
        )
        return Selection(commit, score, ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit(Rule):
    """A threshold on laws that are raised where the arg-max has been steady.

    Each evaluation, C ← β·C, then C[k, argmax_k] += p_k^γ at the masked positions, from
    the law as the denoiser gives it, then logits += a·log(1 + C). Scores and draws use
    the raised law. C starts at 0 in every block.

    Attributes:
      boost: a ≥ 0; 0 is `Threshold`.
      gain: γ ≥ 0.
      decay: β in [0, 1].
      threshold: ≥ 0.
    """

    boost: ArrayLike | float = 0.7
    gain: ArrayLike | float = 0.2
    decay: ArrayLike | float = 0.8
    threshold: ArrayLike | float = 0.9

    needs_logits: ClassVar[bool] = True

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range."""
        check_number("boost", self.boost)
        check_number("gain", self.gain)
        check_number("decay", self.decay, high=1.0)
        check_number("threshold", self.threshold)

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Array:
        """No credit, float32 ``[K, V]``."""
        return jnp.zeros((window.masked.shape[0], vocabulary_size), jnp.float32)

    def adjust(self, window: Window, logits: Array, aux: Array) -> tuple[Array, Array]:
        """The raised laws, and the credit after this evaluation."""
        token, amount = credit_due(logits, window.masked, self.gain)
        credit = credited(aux, token, amount, self.decay)
        return fused(logits, credit, self.boost), credit

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Array
    ) -> Selection:
        """`threshold_set` of the raised laws."""
        score = prediction.statistics.max_prob
        return Selection(
            threshold_set(score, window.masked, self.threshold), score, aux
        )
