"""Rules that commit as many positions as the denoiser is sure of.

Each rule is a pure function on one row, from statistics ``[K]`` to the set ``[K]`` that
is committed, and a thin `Rule` around it. The sets are never empty while a mask is
left: if no position qualifies the best one is taken, row by row. The lower position
comes first among equals.

| rule | commits |
|---|---|
| `Threshold` | every position with c ≥ λ |
| `Factor` | the largest n with (n + 1)·(1 − c₍ₙ₎) < f |
| `Frechet` | the largest n with Σ_{i≤n} (1 − c₍ᵢ₎) + (1 − c₍ₙ₎) < f |
| `EntropyBounded` | the largest n with Σ_{i≤n} H₍ᵢ₎ − max_{i≤n} H₍ᵢ₎ ≤ γ |
| `KLASS` | confident positions whose law has stopped moving |

c is the largest probability, c₍₁₎ ≥ c₍₂₎ ≥ … are sorted, H is the entropy in nats.

References:
  Wu et al., "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV
  Cache and Parallel Decoding", arXiv 2505.22618; Ben-Hamu et al., "Accelerated Sampling
  from Masked Diffusion Models via Entropy Bounded Unmasking", arXiv 2505.24857.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffmm.samplers.checks import (
    check_choice,
    check_number,
    check_score,
)
from diffmm.samplers.klass import KLASS as KLASS
from diffmm.samplers.rule import (
    Prediction,
    Rule,
    Selection,
    Window,
    ensure_progress,
)
from diffmm.samplers.scores import MaxProb, Score
from diffmm.typing import Array, ArrayLike

_STATIC = {"static": True}


def threshold_set(
    confidence: Array, masked: Array, threshold: ArrayLike | float
) -> Array:
    """{k: c_k ≥ λ}, or the most confident position alone.

    Args:
      confidence: float32 ``[K]``.
      masked: bool ``[K]``, what may be committed.
      threshold: λ. Above 1 it gives one position, 0 gives all.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    return ensure_progress(confidence >= threshold, confidence, masked)


def factor_set(confidence: Array, masked: Array, factor: ArrayLike | float) -> Array:
    """The top max(1, n), n the largest with (n + 1)·(1 − c₍ₙ₎) < f.

    With f = 1 the arg-maxes of the set are together the most probable word of the joint
    law: each is missed with probability at most 1 − c₍ₙ₎.

    Args:
      confidence: float32 ``[K]``.
      masked: bool ``[K]``.
      factor: f ≥ 0; the inequality is strict, so that 0 gives one position.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    order = _order(confidence, masked)
    doubt, masks = _sorted_doubt(confidence, masked, order)
    return _first(order, masks, _factor_count(doubt, masks, factor))


def frechet_set(confidence: Array, masked: Array, factor: ArrayLike | float) -> Array:
    """The top max(1, n), n the largest with Σ_{i≤n} (1 − c₍ᵢ₎) + (1 − c₍ₙ₎) < f.

    The Fréchet bound: all n arg-maxes occur together with probability at least 1 − Σ
    (1 − c₍ᵢ₎), and any other word has at most 1 − c₍ₙ₎. So `factor_set`'s guarantee at
    f = 1 holds, for a set that is never smaller.

    Args:
      confidence: float32 ``[K]``.
      masked: bool ``[K]``.
      factor: f ≥ 0; the inequality is strict, so that 0 gives one position.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    order = _order(confidence, masked)
    doubt, masks = _sorted_doubt(confidence, masked, order)
    fits = masks & (jnp.cumsum(doubt) + doubt < factor)
    # Equal in exact arithmetic where all doubts are; rounding must not undercut it.
    count = jnp.maximum(_prefix(fits), _factor_count(doubt, masks, factor))
    return _first(order, masks, count)


def entropy_bounded_set(
    entropy: Array, error: Array, masked: Array, gamma: ArrayLike | float
) -> Array:
    """The largest prefix by error with Σ H − max H ≤ γ.

    Σ H − max H bounds the information that drawing the set at once ignores.

    Args:
      entropy: float32 ``[K]``, nats.
      error: float32 ``[K]``, what positions are sorted by, rising.
      masked: bool ``[K]``.
      gamma: γ ≥ 0, nats; infinity gives all, 0 one position and those without entropy.

    Returns:
      bool ``[K]``, a subset of ``masked``; empty only if ``masked`` is.
    """
    order = _order(-error, masked)
    masks = masked[order]
    sorted_entropy = jnp.where(masks, jnp.maximum(entropy[order], 0.0), 0.0)
    largest = jax.lax.cummax(sorted_entropy)
    before = jnp.concatenate([jnp.zeros((1,), jnp.float32), largest[:-1]])
    # Σ − max grows by the smaller of the new entropy and the largest before it: no
    # cancellation, and exactly 0 for one position.
    excess = jnp.cumsum(jnp.minimum(sorted_entropy, before))
    return _first(order, masks, _prefix(masks & (excess <= gamma)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(Rule):
    """Every position whose score is at least λ (Fast-dLLM).

    Attributes:
      threshold: λ ≥ 0. Above 1 it is one token per evaluation, 0 one evaluation per
        block.
      score: what is compared, in [0, 1]. With `Drawn` the drawn token itself has to
        pass; that never commits a rare token of a confident law, and is biased.
    """

    threshold: ArrayLike | float = 0.9
    score: Score = dataclasses.field(default_factory=MaxProb)

    @property
    def needs_drawn(self) -> bool:  # type: ignore[override]
        """Whether the score looks at the drawn tokens."""
        return self.score.needs_drawn

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses thresholds below 0 or not a number, and what is no score."""
        check_number("threshold", self.threshold)
        check_score(self.score, vocabulary_size)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """`threshold_set`."""
        score = self.score(key, window, prediction)
        return Selection(threshold_set(score, window.masked, self.threshold), score, ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor(Rule):
    """As many as are safe if all were as uncertain as the last (Fast-dLLM).

    Attributes:
      factor: f ≥ 0. With 1 greedy decoding of the set is that of the joint law; 0 is
        one token per evaluation.
    """

    factor: ArrayLike | float = 1.0

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses factors below 0 or not a number."""
        check_number("factor", self.factor)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """`factor_set`."""
        score = prediction.statistics.max_prob
        return Selection(factor_set(score, window.masked, self.factor), score, ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frechet(Rule):
    """As many as are safe together, by the Fréchet bound; at least those of `Factor`.

    Attributes:
      factor: f ≥ 0. With 1 greedy decoding of the set is that of the joint law; 0 is
        one token per evaluation.
    """

    factor: ArrayLike | float = 1.0

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses factors below 0 or not a number."""
        check_number("factor", self.factor)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """`frechet_set`."""
        score = prediction.statistics.max_prob
        return Selection(frechet_set(score, window.masked, self.factor), score, ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBounded(Rule):
    """As many as fit an entropy budget per evaluation (EB-Sampler).

    Attributes:
      gamma: γ ≥ 0, nats; infinity is one evaluation per block. With 0 it is one token,
        those without entropy, and the one after them.
      proxy: what positions are sorted by: ``"entropy"`` (lowest first),
        ``"confidence"`` or ``"margin"`` (largest first).
    """

    gamma: ArrayLike | float = 0.1
    proxy: str = dataclasses.field(default="entropy", metadata=_STATIC)

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses budgets below 0 or not a number, and unknown proxies."""
        check_number("gamma", self.gamma)
        check_choice("proxy", self.proxy, ("entropy", "confidence", "margin"))

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """`entropy_bounded_set`."""
        statistics = prediction.statistics
        error = {
            "entropy": statistics.entropy,
            "confidence": -statistics.max_prob,
            "margin": -statistics.margin,
        }[self.proxy]
        commit = entropy_bounded_set(
            statistics.entropy, error, window.masked, self.gamma
        )
        return Selection(commit, -error, ())


def _order(score: Array, masked: Array) -> Array:
    """The order of `top_ranked`: masked positions by falling score, then the rest."""
    lowest = jnp.finfo(jnp.float32).min
    score = jnp.where(jnp.isnan(score), lowest, jnp.maximum(score, lowest))
    return jnp.argsort(jnp.where(masked, -score, jnp.inf), stable=True)


def _sorted_doubt(
    confidence: Array, masked: Array, order: Array
) -> tuple[Array, Array]:
    """1 − c in rising order with the masked positions first, and which are masked."""
    masks = masked[order]
    return jnp.where(masks, 1.0 - confidence[order], 0.0), masks


def _factor_count(doubt: Array, masks: Array, factor: ArrayLike | float) -> Array:
    rank = jnp.arange(1, len(doubt) + 1, dtype=jnp.float32)
    return _prefix(masks & ((rank + 1.0) * doubt < factor))


def _prefix(fits: Array) -> Array:
    """How many fit before the first that does not, int32 ``[]``."""
    return jnp.sum((jnp.cumsum((~fits).astype(jnp.int32)) == 0).astype(jnp.int32))


def _first(order: Array, masks: Array, count: Array) -> Array:
    """The first max(1, count) positions of an order, where they are masked."""
    place = jnp.arange(len(order), dtype=jnp.int32)
    chosen = masks & (place < jnp.maximum(count, 1))
    return jnp.zeros_like(masks).at[order].set(chosen)
