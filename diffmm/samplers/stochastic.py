"""Relatives of the ancestral rule: Dream's grid, and random quotas by score.

References:
  Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487; Shi et al.,
  "Simplified and Generalized Masked Diffusion for Discrete Data", arXiv 2406.04329.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffmm.diffusion.schedules import Linear
from diffmm.samplers.checks import check_number, check_score
from diffmm.samplers.rule import (
    Advance,
    Prediction,
    Selection,
    Window,
    steps_of_block,
    top_ranked,
    uniform_per_position,
)
from diffmm.samplers.rules import Ancestral
from diffmm.samplers.scores import MaxProb, Score
from diffmm.typing import Array, ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamOrigin(Ancestral):
    """`Ancestral` on the grid from 1 to ε that Dream's ``origin`` algorithm uses.

    With t_i = 1 − i·(1 − ε)/n, a mask is revealed with probability 1 − t_{i+1}/t_i, and
    in the last step with certainty.

    Attributes:
      epsilon: ε in [0, 1); 0 is `Ancestral`.
    """

    epsilon: ArrayLike | float = 1e-3

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range and any schedule but the linear one."""
        super().check(num_blocks, vocabulary_size)
        if check_number("epsilon", self.epsilon, high=1.0) == 1:
            raise ValueError(f"epsilon must be below 1, got {self.epsilon!r}")
        if not isinstance(self.schedule, Linear):
            raise ValueError(f"schedule must be Linear(), got {self.schedule!r}")

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> Array:
        """The step int32 ``[K]`` at which each position is revealed."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        level = uniform_per_position(key, window)
        step = jnp.floor(num_steps * (1.0 - level) / (1.0 - self.epsilon))
        return jnp.clip(step.astype(jnp.int32), 0, num_steps - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticQuota(Ancestral):
    """As many per step as `Ancestral` would reveal, but the best-scored ones.

    The number is Binomial(n, P) for n masks left, P the probability to be revealed;
    steps that reveal nothing cost no evaluation. Its deterministic counterpart is
    `FixedQuota` with `remaining_linear`.

    Attributes:
      score: the preference among positions.
    """

    score: Score = dataclasses.field(default_factory=MaxProb)

    @property
    def needs_drawn(self) -> bool:  # type: ignore[override]
        """Whether the score looks at the drawn tokens."""
        return self.score.needs_drawn

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses bad step counts, and what is no score."""
        super().check(num_blocks, vocabulary_size)
        check_score(self.score, vocabulary_size)

    def advance(self, key: Array, window: Window, aux: Array) -> Advance:
        """The next step with a quota above 0."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        # The steps are those of positions, but whose they are does not matter.
        ahead = window.valid & (aux >= window.step)
        following = window._replace(masked=ahead)
        advance = super().advance(key, following, aux)
        return advance._replace(step=jnp.minimum(advance.step, num_steps - 1))

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: Array
    ) -> Selection:
        """The best-scored positions."""
        quota = jnp.sum((window.valid & (aux == window.step)).astype(jnp.int32))
        score = self.score(key, window, prediction)
        return Selection(top_ranked(score, window.masked, quota), score, aux)
