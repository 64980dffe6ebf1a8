"""Averages of any width after training, from power-function averages that were stored.

`power_ema` keeps a few profiles. Stored at a few times of a run they are a basis:
`synthesis` finds the combination closest to the profile wanted, `synthesize` applies
it to the stored trees.

References:
  Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
  arXiv 2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from diffmm.optim import _averaging as averaging
from diffmm.optim import validate
from diffmm.optim.power_ema import check_gamma, one_gamma
from diffmm.typing import Params


def profile_inner_product(
    time_a: ArrayLike, gamma_a: ArrayLike, time_b: ArrayLike, gamma_b: ArrayLike
) -> np.ndarray:
    """``∫ p_a(s) p_b(s) ds`` of two profiles, in float64; arguments broadcast.

    >>> round(float(profile_inner_product(3, 2, 7, 5)), 8)
    0.0046473
    """
    time_a, gamma_a, time_b, gamma_b = (
        np.asarray(each, np.float64) for each in (time_a, gamma_a, time_b, gamma_b)
    )
    exponent = np.where(time_a < time_b, gamma_b, -gamma_a)
    return (
        (gamma_a + 1)
        * (gamma_b + 1)
        * (time_a / time_b) ** exponent
        / ((gamma_a + gamma_b + 1) * np.maximum(time_a, time_b))
    )


class Synthesis(NamedTuple):
    """How to build one average from stored ones.

    Attributes:
      weights: float64 ``[stored]``, what each stored average is multiplied by.
      residual: distance of the profile so built from the profile asked for, relative
        to the norm of the latter: 0 where it can be built exactly.
    """

    weights: np.ndarray
    residual: float


def synthesis(
    times: Sequence[float],
    gammas: Sequence[float],
    *,
    time: float,
    gamma: float | None = None,
    sigma_rel: float | None = None,
    normalize: bool = False,
) -> Synthesis:
    """Weights that build another profile from stored ones, after training.

    Least squares between profiles, in float64 on the host. The sum of the weights is
    close to 1, not equal: constant parameters come back multiplied by it unless
    ``normalize`` is set.

    Args:
      times: ``[stored]``, samples (in any unit) at which each average was stored.
      gammas: ``[stored]``, exponent of each.
      time: of the wanted profile, in the same unit; not after the last stored one.
      gamma: its exponent, above −1/2,
      sigma_rel: or its relative width.
      normalize: minimise under the constraint that the weights sum to 1.

    Returns:
      A `Synthesis`.

    Raises:
      ValueError: a value out of range, arguments of different lengths, the same
        profile twice, or both or neither of ``gamma`` and ``sigma_rel``.

    References:
      Karras et al., arXiv 2312.02696, "post-hoc EMA".
    """
    wanted = one_gamma(gamma, sigma_rel)
    time = validate.positive("time", time)
    stored = [
        (validate.positive("times", t), check_gamma(g, "gammas"))
        for t, g in zip(times, gammas, strict=False)
    ]
    if not stored or len(times) != len(gammas):
        raise ValueError(
            f"times and gammas need one entry for each stored average, got "
            f"{len(times)} and {len(gammas)}"
        )
    if len(set(stored)) != len(stored):
        raise ValueError(f"times and gammas name a profile twice: {sorted(stored)}")
    if time > max(t for t, _ in stored) * (1 + 1e-9):
        raise ValueError(
            f"time={time!r} lies after the last stored average, times={list(times)}"
        )
    for exponent in (wanted, *(g for _, g in stored)):
        if exponent <= -0.5:  # the profile is not square-integrable
            raise ValueError(f"gamma must be above -1/2 here, got {exponent!r}.")
    t, g = np.asarray(stored).T
    matrix = profile_inner_product(t[:, None], g[:, None], t[None], g[None])
    target = profile_inner_product(t, g, time, wanted)
    # Profiles scaled to norm 1: the matrix is then far better conditioned.
    scale = 1 / np.sqrt(np.diag(matrix))
    matrix, target = matrix * np.outer(scale, scale), target * scale
    solution = np.linalg.solve(matrix, target)
    if normalize:  # Lagrange multiplier of scale · x = 1
        direction = np.linalg.solve(matrix, scale)
        solution += direction * (1 - scale @ solution) / (scale @ direction)
    norm = float(profile_inner_product(time, wanted, time, wanted))
    error = norm + solution @ matrix @ solution - 2 * solution @ target
    return Synthesis(solution * scale, math.sqrt(max(error, 0.0) / norm))


def synthesize(
    averages: Sequence[Params],
    weights: Sequence[float] | np.ndarray,
    like: Params | None = None,
) -> Params:
    """The sum of stored averages times weights, in float64 on the host.

    Args:
      averages: trees of equal structure, for example loaded from checkpoints.
      weights: ``[stored]``, of `synthesis`.
      like: parameters, whose dtypes the result takes.

    Returns:
      A tree of NumPy arrays, in float32 at least; leaves that are not floating-point
      come from the last tree.

    Raises:
      ValueError: trees that differ, or not one weight for each.
    """
    if not averages or len(averages) != len(weights):
        raise ValueError(
            f"weights: need one for each of {len(averages)} averages, got "
            f"{len(weights)}"
        )
    for other in (*averages[1:], *(() if like is None else (like,))):
        averaging.check_same_trees(averages[0], other)

    def combine(*leaves: Any) -> Any:
        if not averaging.is_averaged(leaves[-1]):
            return leaves[-1]
        wide = (np.asarray(leaf).astype(np.float64) for leaf in leaves)
        return sum(float(w) * leaf for w, leaf in zip(weights, wide, strict=True))

    total = jax.tree.map(combine, *averages)
    dtypes = averages[-1] if like is None else like
    promote = like is None

    def cast(leaf: Any, reference: Any) -> Any:
        if not averaging.is_averaged(reference):
            return leaf
        dtype = jnp.result_type(reference)
        return leaf.astype(jnp.promote_types(dtype, jnp.float32) if promote else dtype)

    return jax.tree.map(cast, total, dtypes)
