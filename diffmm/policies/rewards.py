"""Rewards: how right a completion is, and how many forwards it took.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Array, ArrayLike

#: Scores completions: ``(prompts [B, P], completions [B, N]) -> [B]``, both int32 with
#: −1 where a row has no more tokens. It may be written in numpy or jax.
RewardFn = Callable[[Any, Any], ArrayLike]


def multiplicative_reward(
    correct: ArrayLike | float,
    nfe: ArrayLike | float,
    length: ArrayLike | float,
    alpha: ArrayLike | float,
) -> Array:
    """r·((L − min(n, L) + 1)/L)^α: nothing for wrong completions, however quick.

    Groups without a right completion thus have no advantage, where an additive penalty
    would teach them to be wrong quickly. This is the form of the authors' code; the
    paper's text has (1 − n/L)^α, one forward less.

    Args:
      correct: r, float ``[...]``.
      nfe: n ≥ 1, forwards of the row ``[...]``, or their cost in units of a forward.
      length: L, generated positions ``[...]``.
      alpha: α ≥ 0; 0 rewards being right alone.

    Returns:
      float32 ``[...]``.

    >>> print(f"{multiplicative_reward(1.0, 64, 256, 0.3):.6f}")
    0.918745
    """
    check_alpha(alpha)
    nfe, length = jnp.asarray(nfe, jnp.float32), jnp.asarray(length, jnp.float32)
    unused = (length - jnp.minimum(nfe, length) + 1.0) / length
    return jnp.asarray(correct, jnp.float32) * unused ** jnp.asarray(alpha, jnp.float32)


def additive_reward(
    correct: ArrayLike | float,
    nfe: ArrayLike | float,
    length: ArrayLike | float,
    alpha: ArrayLike | float,
) -> Array:
    """Rightness minus the cost α·n/L, for comparison only.

    While everything is wrong it prefers the quickest failure, and can end with policies
    that unmask everything at once. Arguments as in `multiplicative_reward`.

    Returns:
      float32 ``[...]``.
    """
    check_alpha(alpha)
    nfe, length = jnp.asarray(nfe, jnp.float32), jnp.asarray(length, jnp.float32)
    cost = jnp.asarray(alpha, jnp.float32) * nfe / length
    return jnp.asarray(correct, jnp.float32) - cost


REWARDS: dict[str, Callable[..., Array]] = {
    "multiplicative": multiplicative_reward,
    "additive": additive_reward,
}


def check_alpha(alpha: Any) -> None:
    """Raises ``ValueError`` unless α is finite and at least 0; traced ones pass."""
    if isinstance(alpha, jax.core.Tracer):
        return
    if not (math.isfinite(float(alpha)) and float(alpha) >= 0):
        raise ValueError(f"alpha must be finite and at least 0, got {alpha!r}")


def row_reward(
    function: Callable[[Sequence[int], Sequence[int]], float],
) -> RewardFn:
    """Makes a `RewardFn` of a function of one prompt and one completion.

    Args:
      function: called on the host with two lists of token ids, for every row.

    Returns:
      The function of a batch.

    >>> ends_in = row_reward(lambda prompt, completion: completion[-1] == prompt[0])
    >>> print(ends_in(np.array([[7], [7]]), np.array([[1, 7], [7, -1]])))
    [1. 1.]
    """

    def batched(prompts: ArrayLike, completions: ArrayLike) -> np.ndarray:
        pairs = zip(np.asarray(prompts), np.asarray(completions), strict=True)
        return np.asarray(
            [function(_ids(prompt), _ids(completion)) for prompt, completion in pairs],
            np.float32,
        )

    return batched


def _ids(row: np.ndarray) -> list[int]:
    return [int(token) for token in row if token >= 0]
