"""The signature of a selection rule: which masked positions are committed now.

The loop walks every row through its blocks. In each block a rule is asked three
questions, always about ONE row, so that a rule cannot look at its neighbours:

1. `enter`: what do you want to remember for this block?
2. `advance`: which step of yours comes next? Steps that are known to commit nothing
   are skipped here, before the denoiser runs, and cost no evaluation.
3. `select`: given what the denoiser says, what is committed?

A rule is a frozen dataclass registered as a pytree: numbers (steps, temperatures,
thresholds) are traced leaves, so that a sweep compiles once; choices of algorithm
(score, schedule, quota) are static.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffmm.samplers.statistics import Statistics, first_argmax
from diffmm.typing import Array

# Rules find their next useful step by bisection over [0, 2^20).
MAX_STEPS_LOG2 = 20


class Window(NamedTuple):
    """The block of one row that is being generated; K positions.

    Attributes:
      masked: bool ``[K]``, still to be generated.
      valid: bool ``[K]``, belongs to the block (the last block may be shorter).
      rank: int32 ``[K]``, rank among the generated positions of the row.
      positions: int32 ``[K]``, where in the row they are.
      block: int32 ``[]``, index of the block.
      num_blocks: int32 ``[]``, blocks of this row.
      step: int32 ``[]``, step inside the block.
    """

    masked: Array
    valid: Array
    rank: Array
    positions: Array
    block: Array
    num_blocks: Array
    step: Array


class Prediction(NamedTuple):
    """What the denoiser says about the window of one row.

    Attributes:
      statistics: of the guided, suppressed, untempered law, fields ``[K]``.
      logits: float32 ``[K, V]``, guided and suppressed; not materialised unless used.
      drawn: int32 ``[K]``, tokens drawn at the masked positions; ``None`` unless the
        rule has ``needs_drawn``.
      drawn_prob: float32 ``[K]``, their untempered probability, or ``None``.
    """

    statistics: Statistics
    logits: Array
    drawn: Array | None = None
    drawn_prob: Array | None = None


class Advance(NamedTuple):
    """The step that comes next.

    Attributes:
      step: int32 ``[]``, at least the current one.
      t: float32 ``[]``, time of the state that is denoised, 1 = fully masked.
      s: float32 ``[]``, time after the step; 1 − s is the annealing ratio.
      greedy: bool ``[]``, take the arg-max instead of drawing.
      aux: the rule's memory.
    """

    step: Array
    t: Array
    s: Array
    greedy: Array
    aux: Any


class Selection(NamedTuple):
    """What a rule decided.

    Attributes:
      commit: bool ``[K]``; the loop ignores it outside the masked positions.
      score: float32 ``[K]``, the preference that a guarded rule falls back on.
      aux: the rule's memory.
    """

    commit: Array
    score: Array
    aux: Any


class Rule(Protocol):
    """A selection rule; see the module for the three questions."""

    @property
    def guarded(self) -> bool:
        """Whether the best-scored position is forced when nothing was selected."""
        ...

    @property
    def needs_drawn(self) -> bool:
        """Whether `select` looks at the drawn tokens (a biased compatibility mode)."""
        ...

    def check(self, num_blocks: int) -> None:
        """Raises ``ValueError`` on bad fields; runs on the host.

        Args:
          num_blocks: most blocks that a row of the canvas has.
        """
        ...

    def enter(self, key: Array, window: Window) -> Any:
        """Memory at the entry of a block: any pytree of arrays of fixed shape."""
        ...

    def advance(self, key: Array, window: Window, aux: Any) -> Advance:
        """The next step that can commit something."""
        ...

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Any
    ) -> Selection:
        """The positions that are committed in this step."""
        ...


def top_ranked(score: Array, masked: Array, count: Array) -> Array:
    """The ``count`` best-scored masked positions; the lower position among equals.

    Args:
      score: float32 ``[K]``; not-a-number ranks last among the masked.
      masked: bool ``[K]``.
      count: int32 ``[]``; more than there are masks selects all of them.

    Returns:
      bool ``[K]``, a subset of ``masked``.
    """
    order = jnp.argsort(-_ranked(score, masked), stable=True)
    place = jnp.arange(len(order), dtype=jnp.int32)
    rank = jnp.zeros_like(place).at[order].set(place)
    return masked & (rank < count)


def best_ranked(score: Array, masked: Array) -> Array:
    """The best-scored masked position alone: `top_ranked` with count 1, unsorted.

    Args:
      score: float32 ``[K]``.
      masked: bool ``[K]``.

    Returns:
      bool ``[K]``, with one position if ``masked`` has any.
    """
    place = jnp.arange(len(score), dtype=jnp.int32)
    return masked & (place == first_argmax(_ranked(score, masked)))


def ensure_progress(commit: Array, score: Array, masked: Array) -> Array:
    """Forces the best-scored masked position where nothing was selected.

    Args:
      commit: bool ``[K]``.
      score: float32 ``[K]``.
      masked: bool ``[K]``.

    Returns:
      bool ``[K]``, with at least one position if ``masked`` has one.
    """
    commit = commit & masked
    return jnp.where(jnp.any(commit), commit, best_ranked(score, masked))


def uniform_per_position(key: Array, window: Window) -> Array:
    """Uniform numbers ``[K]`` that depend on the key and each position's rank only.

    One draw of shape ``[K]`` would change with the width of the window, hence with the
    other rows of the batch.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, window.rank)
    return jax.vmap(lambda key: jax.random.uniform(key, ()))(keys)


def steps_of_block(num_steps: Array, window: Window) -> Array:
    """The row's share of ``num_steps`` for its current block; the first get the rest.

    It is counted from the blocks of the row itself, so that a shorter row in a batch
    is treated as it would be alone.
    """
    base, rest = num_steps // window.num_blocks, num_steps % window.num_blocks
    return jnp.maximum(base + (window.block < rest), 1)


def check_num_steps(num_steps: Any, num_blocks: int) -> None:
    """Raises ``ValueError`` unless the steps can be shared among the blocks."""
    steps = int(num_steps)
    if not 1 <= steps <= 1 << MAX_STEPS_LOG2:
        raise ValueError(
            f"num_steps must lie in [1, 2^{MAX_STEPS_LOG2}], got {num_steps!r}"
        )
    if num_blocks > 1 and steps % num_blocks:
        raise ValueError(
            f"num_steps must be a multiple of the number of blocks, {num_blocks}, "
            f"got {steps}"
        )


def _ranked(score: Array, masked: Array) -> Array:
    """Scores that sort: finite where masked, −inf elsewhere."""
    lowest = jnp.finfo(jnp.float32).min
    score = jnp.where(jnp.isnan(score), lowest, jnp.maximum(score, lowest))
    return jnp.where(masked, score, -jnp.inf)
