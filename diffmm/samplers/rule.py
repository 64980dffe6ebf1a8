"""What a selection rule is: which masked positions are committed now.

The loop walks every row through its blocks. In each block a rule is asked up to three
questions, always about ONE row, so that a rule cannot look at its neighbours:

1. `enter`: what do you want to remember for this block?
2. `advance`: which step of yours comes next? Steps that are known to commit nothing
   are skipped here, before the denoiser runs, and cost no evaluation.
3. `select`: given what the denoiser says, what is committed, and what is taken back?

A rule is a frozen dataclass registered as a pytree: numbers (steps, temperatures,
thresholds) are traced leaves, so that a sweep compiles once; choices of algorithm
(quota, schedule) are static. Most rules are a subclass of `Rule` with `select` alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffmm.samplers.statistics import Statistics, first_argmax
from diffmm.typing import Array

# Rules find their next useful step by bisection over [0, 2^20).
MAX_STEPS_LOG2 = 20


class Window(NamedTuple):
    """The scored positions of one row; K of them.

    They are those of the current block, or, for rules with ``sees_canvas`` and where a
    trace is kept, all generated positions of the row.

    Attributes:
      masked: bool ``[K]``, in the block and still masked: what may be committed.
      valid: bool ``[K]``, belongs to the block.
      exists: bool ``[K]``, is a generated position of the row and not filling.
      remaining: bool ``[K]``, still masked, in the block or elsewhere.
      rank: int32 ``[K]``, rank among the generated positions of the row.
      positions: int32 ``[K]``, where in the row they are.
      tokens: int32 ``[K]``, what is there now, the mask id included.
      logprob: float32 ``[K]``, log-probability at which each token was committed, 0
        where nothing was; nats.
      block: int32 ``[]``, index of the block.
      num_blocks: int32 ``[]``, blocks of this row.
      start: int32 ``[]``, rank at which the block begins.
      count: int32 ``[]``, generated positions of the row.
      step: int32 ``[]``, step inside the block.
      turn: int32 ``[]``, evaluated steps of the row so far; with guidance a step is
        two evaluations and one turn.
    """

    masked: Array
    valid: Array
    exists: Array
    remaining: Array
    rank: Array
    positions: Array
    tokens: Array
    logprob: Array
    block: Array
    num_blocks: Array
    start: Array
    count: Array  # type: ignore[assignment]
    step: Array
    turn: Array


class Prediction(NamedTuple):
    """What the denoiser says about the window of one row.

    Attributes:
      statistics: of the guided, suppressed, untempered law, fields ``[K]``.
      logits: float32 ``[K, V]``, guided and suppressed; ``None`` unless the rule has
        ``needs_logits``.
      drawn: int32 ``[K]``, tokens drawn at the masked positions; ``None`` unless the
        rule has ``needs_drawn``.
      drawn_prob: float32 ``[K]``, their untempered probability, or ``None``.
      shadow_prob: float32 ``[K]``, the probability of the present token when its own
        position is hidden; ``None`` unless the rule has ``needs_shadow``.
    """

    statistics: Statistics
    logits: Array | None = None
    drawn: Array | None = None
    drawn_prob: Array | None = None
    shadow_prob: Array | None = None


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
      remask: bool ``[K]``, committed positions of the block that become masks again.
      edit: bool ``[K]``, committed positions of the block that take the arg-max.
      hold: bool ``[]``, stay in this block even if it is full now.
      action: int32 ``[K]``, what a trace records: 0 where nothing was chosen, else
        the place in the order of choice, from 1. ``commit`` where it is ``None``.
      log_likelihood: float32 ``[]``, of the action, for a trace.
    """

    commit: Array
    score: Array
    aux: Any
    remask: Array | None = None
    edit: Array | None = None
    hold: Array | None = None
    action: Array | None = None
    log_likelihood: Array | None = None


class Rule:
    """A selection rule; see the module for the three questions.

    Attributes:
      guarded: the best-scored masked position is forced when nothing was selected.
      needs_drawn: `select` looks at the drawn tokens (a biased compatibility mode).
      needs_logits: `select` or `adjust` looks at whole laws, so that the logits of the
        window are kept in memory.
      needs_shadow: `select` looks at ``shadow_prob``.
      sees_canvas: the window is all generated positions and not the block alone.
      remasks: commits can be taken back, so that a budget of forwards is required.
      counts_steps: the rule shares ``num_steps`` among blocks, so that the number of
        blocks must be known.
    """

    guarded: ClassVar[bool] = True
    needs_drawn: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    needs_shadow: ClassVar[bool] = False
    sees_canvas: ClassVar[bool] = False
    remasks: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Raises ``ValueError`` on bad fields; runs on the host.

        Args:
          num_blocks: most blocks that a row of the canvas has.
          vocabulary_size: V.
        """

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Any:
        """Memory at the entry of a block: any pytree of arrays of fixed shape."""
        return ()

    def advance(self, key: Array, window: Window, aux: Any) -> Advance:
        """The next step that can commit something; times by the share of masks."""
        valid = jnp.maximum(jnp.sum(window.valid.astype(jnp.float32)), 1.0)
        t = jnp.sum(window.masked.astype(jnp.float32)) / valid
        return Advance(window.step, t, t, jnp.bool_(False), aux)

    def adjust(self, window: Window, logits: Array, aux: Any) -> tuple[Array, Any]:
        """Changes the laws ``[K, V]`` themselves, and the memory; `select` sees both.

        Asked only with ``needs_logits``.
        """
        return logits, aux

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Any
    ) -> Selection:
        """The positions that are committed in this step."""
        raise NotImplementedError(f"{type(self).__name__} does not define select")


class BlockEnds(Protocol):
    """Where blocks end, if that depends on what is predicted at their entry."""

    def check(self, vocabulary_size: int) -> None:
        """Raises ``ValueError`` on bad fields; runs on the host."""
        ...

    def width(self, block_length: int, num_generated: int) -> int:
        """Positions to score, at least ``block_length``; runs on the host."""
        ...

    def __call__(
        self, window: Window, statistics: Statistics, default_end: Array
    ) -> Array:
        """The rank int32 ``[]`` at which the block of one row ends.

        Between ``window.start`` + 1 and ``window.count``, and inside the width.
        """
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
