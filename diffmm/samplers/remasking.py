"""Rules that take back or rewrite what the denoiser would not write again.

`WINO` turns committed positions into masks again, so that `max_forwards` must be given.
`JointThreshold` rewrites committed tokens a bounded number of times.

References:
  Hong et al., "Wide-In, Narrow-Out: Revokable Decoding for Efficient and Effective
  DLLMs", arXiv 2507.18578; Bie et al., "LLaDA2.1: Speeding Up Text Diffusion via Token
  Editing", arXiv 2602.08676.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffmm.samplers.checks import check_integer, check_number
from diffmm.samplers.rule import (
    Prediction,
    Rule,
    Selection,
    Window,
    ensure_progress,
    top_ranked,
)
from diffmm.typing import Array, ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WINO(Rule):
    """Drafts many, and takes back what the denoiser would not write again.

    Draft: masked positions with c > ``draft``, or the best one; of these at most
    ``share`` of the n masks left, but no fewer than ``least`` and no more than
    ``most``. Verify: of the tokens that were there already, those whose probability is
    below ``verify`` when only they are hidden become masks again, the least probable
    first, and at least one fewer than were drafted. So every evaluation ends with
    fewer masks.

    Attributes:
      draft: ≥ 0.
      verify: ≥ 0; 0 takes nothing back.
      share: in [0, 1].
      least: ≥ 1.
      most: ≥ ``least``.
    """

    draft: ArrayLike | float = 0.6
    verify: ArrayLike | float = 0.9
    share: ArrayLike | float = 0.7
    least: ArrayLike | int = 5
    most: ArrayLike | int = 20

    needs_shadow: ClassVar[bool] = True
    remasks: ClassVar[bool] = True

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range."""
        check_number("draft", self.draft)
        check_number("verify", self.verify)
        check_number("share", self.share, high=1.0)
        least = check_integer("least", self.least, low=1)
        check_integer("most", self.most, low=least)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """Drafts, then verifies."""
        assert prediction.shadow_prob is not None
        score = prediction.statistics.max_prob
        commit, remask = wino_sets(
            score,
            prediction.shadow_prob,
            window.masked,
            window.valid & ~window.masked,
            draft=self.draft,
            verify=self.verify,
            most=draft_limit(_count(window.masked), self.share, self.least, self.most),
        )
        return Selection(commit, score, (), remask=remask)


def draft_limit(
    num_masked: Array,
    share: ArrayLike | float,
    least: ArrayLike | int,
    most: ArrayLike | int,
) -> Array:
    """⌊share·n⌋, at least ``least`` and at most ``most``; int32.

    >>> print(draft_limit(jnp.int32(10), 0.7, 5, 20))
    7
    """
    # .7·10 is 7 in float32 only after rounding.
    part = jnp.floor(share * num_masked.astype(jnp.float32) + 1e-4)
    return jnp.clip(part.astype(jnp.int32), least, most)


def wino_sets(
    confidence: Array,
    shadow_prob: Array,
    masked: Array,
    committed: Array,
    *,
    draft: ArrayLike | float,
    verify: ArrayLike | float,
    most: Array,
) -> tuple[Array, Array]:
    """What is committed, and what is masked again.

    Args:
      confidence: float32 ``[K]``.
      shadow_prob: float32 ``[K]``, probability of the present token with its own
        position hidden.
      masked: bool ``[K]``.
      committed: bool ``[K]``, what may be masked again.
      draft: confidence to exceed.
      verify: probability not to fall below.
      most: int32 ``[]``, positions to draft at most.

    Returns:
      Two bool ``[K]``; the second holds fewer positions than the first, unless
      ``masked`` is empty, when both are.
    """
    drafted = top_ranked(confidence, masked & (confidence > draft), most)
    drafted = ensure_progress(drafted, confidence, masked)
    doubted = committed & (shadow_prob < verify)
    return drafted, top_ranked(-shadow_prob, doubted, _count(drafted) - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class JointThreshold(Rule):
    """Commits by one threshold and rewrites by another (token-to-token editing).

    Masked positions with c > ``threshold`` are committed, or the best one. Committed
    positions of the block where another token has a probability above
    ``edit_threshold`` take that token. A full block is evaluated again until nothing
    changes, at most ``max_edits`` times.

    Attributes:
      edit_threshold: ≥ 0; required, for no value suits all models (LLaDA2.1's quality
        mode is 0.5 with a threshold of 0.7). Above 1 nothing is rewritten.
      threshold: ≥ 0.
      max_edits: ≥ 0, evaluations of a full block.
    """

    edit_threshold: ArrayLike | float
    threshold: ArrayLike | float = 0.5
    max_edits: ArrayLike | int = 16

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range."""
        check_number("edit_threshold", self.edit_threshold)
        check_number("threshold", self.threshold)
        check_integer("max_edits", self.max_edits, low=0)

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Array:
        """No evaluation of the full block yet."""
        return jnp.int32(0)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Array
    ) -> Selection:
        """Commits, edits, and whether to look once more."""
        statistics = prediction.statistics
        score, masked = statistics.max_prob, window.masked
        commit = ensure_progress(score > self.threshold, score, masked)
        edit = edit_set(
            statistics.argmax,
            score,
            window.tokens,
            window.valid & ~masked,
            self.edit_threshold,
        )
        was_full = ~jnp.any(masked)
        edits = aux + was_full
        full = ~jnp.any(masked & ~commit)
        changed = jnp.any(commit | edit)
        hold = full & changed & (edits < self.max_edits)
        return Selection(commit, score, edits, edit=edit, hold=hold)


def edit_set(
    argmax: Array,
    confidence: Array,
    tokens: Array,
    committed: Array,
    threshold: ArrayLike | float,
) -> Array:
    """Committed positions where another token is more probable than ``threshold``.

    Args:
      argmax: int32 ``[K]``.
      confidence: float32 ``[K]``, its probability.
      tokens: int32 ``[K]``, what is there.
      committed: bool ``[K]``.
      threshold: probability to exceed.

    Returns:
      bool ``[K]``.
    """
    return committed & (argmax != tokens) & (confidence > threshold)


def _count(mask: Array) -> Array:
    return jnp.sum(mask.astype(jnp.int32))
