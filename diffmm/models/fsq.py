"""Finite scalar quantisation: an implicit product codebook, nothing to learn.

Letters: d quantised dimensions, one per entry of ``levels``; L levels of one of them.

References:
  Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made
  Simple", arXiv 2309.15505.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Array, ArrayLike

# arXiv 2309.15505, appendix A.1: keeps tanh · half-range short of the next integer.
_MARGIN = 1e-3
# Above it, `_MARGIN` would put the outermost levels out of reach of the rounding.
_MAX_LEVEL = 1000


def check_levels(levels: Sequence[int]) -> np.ndarray:
    """``levels`` as an integer array ``[d]``; ValueError if not all in [2, 1000]."""
    array = np.asarray(levels)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"levels must be a sequence of integers, got {levels!r}")
    if array.min() < 2 or array.max() > _MAX_LEVEL:
        raise ValueError(f"levels must lie in [2, {_MAX_LEVEL}], got {levels!r}")
    if math.prod(array.tolist()) >= 2**31:
        raise ValueError(f"the product of levels must fit int32, got {levels!r}")
    return array


def _per_dimension(values: np.ndarray, ndim: int, dtype: Any) -> np.ndarray:
    """``[d]`` with leading axes of 1, so that no rank is promoted silently."""
    return values.astype(dtype).reshape((1,) * (ndim - 1) + values.shape)


def _check_last_axis(name: str, x: Array, levels: np.ndarray) -> None:
    if x.ndim < 1 or x.shape[-1] != levels.size:
        raise ValueError(
            f"{name} must have a last axis of {levels.size} (one per level), got "
            f"shape {x.shape}"
        )


def check_indices(indices: ArrayLike, levels: Sequence[int]) -> Array:
    """``indices`` as int32; ValueError unless integers in ``[0, prod(levels))``.

    The range is checked outside of jit only: a tracer has no values yet.
    """
    bound = math.prod(check_levels(levels).tolist())
    if not isinstance(indices, jax.Array):
        indices = np.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must be integers, got dtype {indices.dtype}")
    if not isinstance(indices, jax.core.Tracer) and indices.size:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= bound:
            raise ValueError(f"indices must lie in [0, {bound}), got [{low}, {high}]")
    return jnp.asarray(indices, jnp.int32)


def bound(z: ArrayLike, levels: Sequence[int]) -> Array:
    """Squeezes each dimension into an interval that holds exactly L integers.

    ``bound(z) = (1 - ε)(L - 1)/2 · tanh(z + s) - o`` where ``o`` is 1/2 for even L
    and 0 for odd L, and ``s = tan(2o / ((1 - ε)(L - 1)))`` brings z = 0 near 0.
    Rounded, it takes the values ``-⌊L/2⌋ … ⌈L/2⌉ - 1``.

    Args:
      z: floating point ``[..., d]``.
      levels: L of each dimension, at least 2.

    Returns:
      float32 ``[..., d]``.

    Raises:
      ValueError: a level out of range, or a last axis other than ``len(levels)``.

    References:
      Mentzer et al., arXiv 2309.15505, appendix A.1.
    """
    sizes = check_levels(levels)
    z = jnp.asarray(z, jnp.float32)
    _check_last_axis("z", z, sizes)
    half_range = (sizes - 1) * (1 - _MARGIN) / 2
    offset = np.where(sizes % 2, 0.0, 0.5)
    half_range, offset, shift = (
        _per_dimension(array, z.ndim, np.float32)
        for array in (half_range, offset, np.tan(offset / half_range))
    )
    return jnp.tanh(z + shift) * half_range - offset


def quantize(z: ArrayLike, levels: Sequence[int]) -> Array:
    """Rounds ``bound(z)`` to the nearest level; gradients pass as if it had not.

    ``quantize(z) = round(bound(z)) / ⌊L/2⌋``, with the straight-through gradient
    ``∂quantize/∂z = ∂bound/∂z / ⌊L/2⌋``.

    Args:
      z: floating point ``[..., d]``.
      levels: L of each dimension, at least 2.

    Returns:
      float32 ``[..., d]`` in [-1, 1], one of ``prod(levels)`` points.

    Raises:
      ValueError: as `bound`.

    References:
      Mentzer et al., arXiv 2309.15505, section 3.1 and appendix A.1.

    Example:
      >>> quantize(jnp.array([[-9.0, 0.2], [9.0, 9.0]]), (3, 4)).tolist()
      [[-1.0, 0.0], [1.0, 0.5]]
    """
    bounded = bound(z, levels)
    # Exact in float32: a number and its rounding are within a factor 2, or one is 0.
    rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
    half = np.asarray(levels) // 2
    return rounded / _per_dimension(half, rounded.ndim, np.float32)


def codes_to_indices(codes: ArrayLike, levels: Sequence[int]) -> Array:
    """Numbers a point of the grid in mixed radix, first dimension fastest.

    ``index = Σ_i digit_i · Π_{j<i} L_j`` with ``digit_i = (code_i + 1) ⌊L_i/2⌋``.

    Args:
      codes: floating point ``[..., d]``, results of `quantize`.
      levels: L of each dimension.

    Returns:
      int32 ``[...]`` in ``[0, prod(levels))``.

    Raises:
      ValueError: as `bound`.
    """
    sizes = check_levels(levels)
    codes = jnp.asarray(codes, jnp.float32)
    _check_last_axis("codes", codes, sizes)
    half = _per_dimension(sizes // 2, codes.ndim, np.float32)
    digits = jnp.round(codes * half + half).astype(jnp.int32)
    basis = np.cumprod(np.concatenate([[1], sizes[:-1]]))
    weights = _per_dimension(basis, codes.ndim, np.int32)
    return jnp.sum(digits * weights, axis=-1, dtype=jnp.int32)


def indices_to_codes(indices: ArrayLike, levels: Sequence[int]) -> Array:
    """Inverse of `codes_to_indices`.

    Args:
      indices: integers ``[...]`` in ``[0, prod(levels))``.
      levels: L of each dimension.

    Returns:
      float32 ``[..., d]`` in [-1, 1].

    Raises:
      ValueError: not integers, or (outside of jit) out of range.

    Example:
      >>> codes_to_indices(indices_to_codes(np.arange(6), (2, 3)), (2, 3)).tolist()
      [0, 1, 2, 3, 4, 5]
    """
    sizes = check_levels(levels)
    indices = check_indices(indices, levels)
    basis = np.cumprod(np.concatenate([[1], sizes[:-1]]))
    rank = indices.ndim + 1
    quotients = indices[..., None] // _per_dimension(basis, rank, np.int32)
    digits = quotients % _per_dimension(sizes, rank, np.int32)
    half = _per_dimension(sizes // 2, rank, np.float32)
    return (digits.astype(jnp.float32) - half) / half
