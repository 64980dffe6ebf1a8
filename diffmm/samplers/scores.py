"""Scores: how much a rule wants to commit a position; higher is earlier.

A score looks at the untempered, unfiltered law and never at the drawn token: with one
token per step the joint law of the denoiser is then exact, whatever the score.
`Drawn` breaks this on purpose, for comparison with code that does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.checks import check_number, check_options
from diffmm.samplers.rule import Prediction, Window, uniform_per_position
from diffmm.typing import Array, ArrayLike


class Score(Protocol):
    """A score of the positions of one row."""

    needs_drawn: ClassVar[bool]

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxProb:
    """max_v p(v): MaskGIT's and LLaDA's confidence at temperature 0."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in (0, 1]."""
        return prediction.statistics.max_prob


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Uniform noise: a random order."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]`` in [0, 1)."""
        return uniform_per_position(key, window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Left to right."""

    needs_drawn: ClassVar[bool] = False

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``."""
        return -window.rank.astype(jnp.float32)


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PCScore:
    """exp(−λ·d)·min(α, −p·log(f + 1e-9)): near the start of the block and not trivial.

    d is the distance from the start of the block, p the largest probability, f the
    frequency of the arg-max in a corpus: tokens that are likely anywhere come late.

    Attributes:
      frequency: float ``[V]``, share of each id in a corpus.
      decay: λ ≥ 0; 0 ignores the position.
      cap: α > 0.

    References:
      Huang et al., "PC-Sampler: Position-Aware Calibration of Decoding Bias in Masked
      Diffusion Models", arXiv 2508.13021.
    """

    frequency: ArrayLike
    decay: ArrayLike | float = 0.25
    cap: ArrayLike | float = 10.0

    needs_drawn: ClassVar[bool] = False

    def check(self, vocabulary_size: int) -> None:
        """Raises ``ValueError`` on bad fields; runs on the host."""
        table = np.asarray(self.frequency)
        if table.shape != (vocabulary_size,):
            raise ValueError(
                f"frequency must have shape ({vocabulary_size},), one number per id, "
                f"got {table.shape}"
            )
        if not np.all((table >= 0) & (table <= 1)):
            raise ValueError("frequency must lie in [0, 1] everywhere")
        check_number("decay", self.decay)
        check_number("cap", self.cap, above_low=True)

    def __call__(self, key: Array, window: Window, prediction: Prediction) -> Array:
        """float32 ``[K]``, about 0 or above."""
        statistics = prediction.statistics
        frequency = jnp.asarray(self.frequency, jnp.float32)[statistics.argmax]
        rarity = -statistics.max_prob * jnp.log(frequency + 1e-9)
        distance = (window.rank - window.start).astype(jnp.float32)
        return jnp.exp(-self.decay * distance) * jnp.minimum(self.cap, rarity)


SCORES: dict[str, type] = {
    "max_prob": MaxProb,
    "margin": Margin,
    "entropy": NegativeEntropy,
    "random": Random,
    "position": Position,
    "drawn": Drawn,
    "pc": PCScore,
}


def score_from_name(name: str, **options: Any) -> Score:
    """The score that a command line calls ``name``.

    Args:
      name: a key of `SCORES`.
      **options: its fields; only ``"pc"`` has any.

    Raises:
      ValueError: if there is none of that name, or it does not take the options.
    """
    if name not in SCORES:
        raise ValueError(f"score must be one of {sorted(SCORES)}, got {name!r}")
    check_options(f"score {name!r}", SCORES[name], options)
    return SCORES[name](**options)
