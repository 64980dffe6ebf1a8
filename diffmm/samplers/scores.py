"""Scores: how much a rule wants to commit a position; higher is earlier.

A score looks at the untempered, unfiltered law and never at the drawn token: with one
token per step the joint law of the denoiser is then exact, whatever the score.
`Drawn` breaks this on purpose, for comparison with code that does.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax.numpy as jnp

from diffmm.samplers.rule import Prediction, Window, uniform_per_position
from diffmm.typing import Array


class Score(Protocol):
    """A score of the positions of one row."""

    needs_drawn: ClassVar[bool]

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxProb:
    """max_v p(v): MaskGIT's and LLaDA's confidence at temperature 0."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in (0, 1]."""
        return prediction.statistics.max_prob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """Largest minus second largest probability.

    References:
      Kim et al., "Train for the Worst, Plan for the Best", arXiv 2502.06768.
    """

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in [0, 1]."""
        return prediction.statistics.margin


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeEntropy:
    """Σ p log p, in nats: the least uncertain position first (Dream).

    References:
      Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487.
    """

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``, at most 0."""
        return -prediction.statistics.entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Uniform noise: a random order."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in [0, 1)."""
        return uniform_per_position(key, window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Left to right."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``."""
        return -window.rank.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Probability of the drawn token, as released LLaDA code scores: biased.

    At temperature 0 it equals `MaxProb`. Above, likely tokens are committed early
    *because* they were drawn, which bends the law even on independent positions.
    """

    needs_drawn: ClassVar[bool] = True

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in [0, 1]."""
        assert prediction.drawn_prob is not None
        return prediction.drawn_prob


SCORES: dict[str, type] = {
    "max_prob": MaxProb,
    "margin": Margin,
    "entropy": NegativeEntropy,
    "random": Random,
    "position": Position,
    "drawn": Drawn,
}


def score_from_name(name: str) -> Score:
    """The score that a command line calls ``name``.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in SCORES:
        raise ValueError(f"score must be one of {sorted(SCORES)}, got {name!r}")
    return SCORES[name]()
