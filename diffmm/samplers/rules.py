"""Selection rules: ancestral, first-hitting, fixed quota by score.

References:
  Sahoo et al., "Simple and Effective Masked Diffusion Language Models", arXiv
  2406.07524; Shi et al., arXiv 2406.04329; Zheng et al., arXiv 2409.02908; Chang et
  al., "MaskGIT", arXiv 2202.04200; Nie et al., "Large Language Diffusion Models",
  arXiv 2502.09992.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffmm.diffusion.schedules import Linear
from diffmm.samplers.quota import RemainingFn, remaining_even
from diffmm.samplers.rule import (
    MAX_STEPS_LOG2,
    Advance,
    Prediction,
    Rule,
    Selection,
    Window,
    best_ranked,
    check_num_steps,
    steps_of_block,
    top_ranked,
    uniform_per_position,
)
from diffmm.samplers.scores import MaxProb, Score
from diffmm.typing import Array, ArrayLike, Schedule

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Rule):
    """Reverse process on the grid t_i = 1 − i/n.

    A masked position is revealed between t and s with probability (m(t) − m(s))/m(t),
    independently, and then drawn from the denoiser. Neither depends on the denoiser,
    so each position's step is drawn at the entry of the block: with a level u uniform
    on (0, m(1)) it is the step whose interval holds m⁻¹(u). On the linear schedule and
    L positions the evaluations are n·(1 − (1 − 1/n)^L) in expectation.

    Attributes:
      num_steps: n ≥ 1, over all blocks of a row.
      schedule: the mask probability m(t).
      lazy: skip the evaluation in steps that reveal nothing; the tokens are the same.
      final_argmax: decode what the last step reveals by arg-max (a bias that some
        released samplers have) instead of drawing it.
    """

    num_steps: ArrayLike | int
    schedule: Schedule = dataclasses.field(default=Linear(), metadata=_STATIC)
    lazy: bool = dataclasses.field(default=True, metadata=_STATIC)
    final_argmax: bool = dataclasses.field(default=False, metadata=_STATIC)

    guarded: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses step counts that do not fit the blocks."""
        check_num_steps(self.num_steps, num_blocks)

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Array:
        """The step int32 ``[K]`` at which each position is revealed."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        top = self.schedule.mask_probability(jnp.float32(1.0))
        hit = self.schedule.inverse(uniform_per_position(key, window) * top)
        step = jnp.floor(num_steps * (1.0 - hit)).astype(jnp.int32)
        return jnp.clip(step, 0, num_steps - 1)

    def advance(self, key: Array, window: Window, aux: Array) -> Advance:
        """The next step in which something is revealed."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        step = window.step
        if self.lazy:
            step = jnp.min(jnp.where(window.masked, aux, num_steps))
        greedy = (step == num_steps - 1) & self.final_argmax
        return _on_grid(step, num_steps, greedy, aux)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Array
    ) -> Selection:
        """The positions whose step has come."""
        commit = aux == window.step
        return Selection(commit, jnp.zeros(commit.shape, jnp.float32), aux)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting(Rule):
    """The reverse process in continuous time: one token per evaluation, exact.

    With c masks left at mask probability m, the next reveal is at m·u^(1/c), u uniform;
    a uniformly chosen position is drawn. Schedules enter through their inverse; they
    move the times (hence time-dependent guidance), not the law of the tokens.

    Attributes:
      schedule: the mask probability m(t).
    """

    schedule: Schedule = dataclasses.field(default=Linear(), metadata=_STATIC)

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Array:
        """Time 1."""
        return jnp.float32(1.0)

    def advance(self, key: Array, window: Window, aux: Array) -> Advance:
        """Draws the next hitting time."""
        count = jnp.sum(window.masked.astype(jnp.int32))
        u = jax.random.uniform(key, ())
        t = first_hitting_time(aux, count, u, self.schedule)
        return Advance(window.step, t, t, jnp.bool_(False), t)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Array
    ) -> Selection:
        """One uniformly chosen masked position."""
        score = uniform_per_position(key, window)
        return Selection(best_ranked(score, window.masked), score, aux)


def first_hitting_time(
    t: ArrayLike, num_masked: ArrayLike, u: ArrayLike, schedule: Schedule
) -> Array:
    """The time m⁻¹(u^(1/c)·m(t)) at which the next of c masks is revealed.

    Args:
      t: current time.
      num_masked: c ≥ 1.
      u: uniform number in [0, 1).
      schedule: the mask probability m(t).

    Returns:
      float32, the next time, at most ``t``.

    >>> print(f"{first_hitting_time(1.0, 4, 0.5, Linear()):.6f}")
    0.840896
    """
    count = jnp.maximum(jnp.asarray(num_masked, jnp.float32), 1.0)
    level = schedule.mask_probability(jnp.asarray(t, jnp.float32))
    return schedule.inverse(level * jnp.asarray(u, jnp.float32) ** (1.0 / count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedQuota(Rule):
    """Commits a fixed number of best-scored positions per step.

    Step i of n commits R(N, n, i) − R(N, n, i + 1) of the N masks of the block; steps
    without a commit cost no evaluation. ``num_steps`` ≥ N gives one token per
    evaluation.

    Attributes:
      num_steps: n ≥ 1, over all blocks of a row.
      score: the preference among positions.
      remaining: the quota R.
      choice_temperature: τ ≥ 0 or ``None`` (off): ranks by score + τ·(1 − r)·Gumbel
        with r = (i + 1)/n; for `MaxProb` and `Drawn` by the logarithm of the score
        (MaskGIT).
      deferred_ids: positions whose arg-max is one of these are ranked last (LLaDA's
        deferred end of text).
    """

    num_steps: ArrayLike | int
    score: Score = dataclasses.field(default_factory=MaxProb)
    remaining: RemainingFn = dataclasses.field(default=remaining_even, metadata=_STATIC)
    choice_temperature: ArrayLike | float | None = None
    deferred_ids: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)

    counts_steps: ClassVar[bool] = True

    @property
    def needs_drawn(self) -> bool:  # type: ignore[override]
        """Whether the score looks at the drawn tokens."""
        return self.score.needs_drawn

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses bad step counts, noise and scores."""
        check_num_steps(self.num_steps, num_blocks)
        noise = self.choice_temperature
        if noise is not None and not float(noise) >= 0:
            raise ValueError(f"choice_temperature must be at least 0, got {noise!r}")
        if not callable(self.score) or not hasattr(self.score, "needs_drawn"):
            raise ValueError(
                f"score must be a score such as MaxProb(), got {self.score!r}"
            )
        if hasattr(self.score, "check"):
            self.score.check(vocabulary_size)

    def advance(self, key: Array, window: Window, aux: tuple[()]) -> Advance:
        """The next step with a quota above 0."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        total, left = _count(window.valid), _count(window.masked)
        low, high = window.step, num_steps - 1
        # Unrolled: scalar arithmetic that fuses, where a loop would launch kernels.
        for _ in range(MAX_STEPS_LOG2 + 1):
            middle = (low + high) // 2
            commits = self.remaining(total, num_steps, middle + 1) < left
            low = jnp.where(commits, low, jnp.minimum(middle + 1, high))
            high = jnp.where(commits, middle, high)
        return _on_grid(high, num_steps, jnp.bool_(False), aux)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """The best-scored positions, as many as the quota says."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        total, left = _count(window.valid), _count(window.masked)
        quota = left - self.remaining(total, num_steps, window.step + 1)
        order_key, noise_key = jax.random.split(key)
        score = self.score(order_key, window, prediction)
        if self.choice_temperature is not None:
            if isinstance(self.score, MaxProb) or self.needs_drawn:
                score = jnp.log(jnp.maximum(score, jnp.finfo(jnp.float32).tiny))
            # -log(-log u) with u in [0, 1): the noise ranks, it draws no token.
            u = jnp.maximum(uniform_per_position(noise_key, window), 1e-20)
            s = 1.0 - (window.step + 1).astype(jnp.float32) / num_steps
            score = score - self.choice_temperature * s * jnp.log(-jnp.log(u))
        if self.deferred_ids:
            deferred = jnp.asarray(self.deferred_ids, jnp.int32)
            is_deferred = jnp.isin(prediction.statistics.argmax, deferred)
            score = jnp.where(is_deferred, jnp.finfo(jnp.float32).min, score)
        return Selection(top_ranked(score, window.masked, quota), score, aux)


def _count(mask: Array) -> Array:
    return jnp.sum(mask.astype(jnp.int32))


def _on_grid(step: Array, num_steps: Array, greedy: Array, aux: Any) -> Advance:
    step = step.astype(jnp.int32)
    t = 1.0 - step.astype(jnp.float32) / num_steps
    s = 1.0 - (step + 1).astype(jnp.float32) / num_steps
    return Advance(step, t, s, greedy, aux)
