"""How many of N masks a fixed-quota rule leaves after step i of n.

A quota is the function R(N, n, i): masks left after i of n steps, an integer that falls
from R(N, n, 0) = N to R(N, n, n) = 0. Step i commits R(N, n, i) − R(N, n, i + 1) ≥ 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from diffmm.typing import Array, ArrayLike

RemainingFn = Callable[[ArrayLike, ArrayLike, ArrayLike], Array]


def remaining_even(num_masked: ArrayLike, num_steps: ArrayLike, i: ArrayLike) -> Array:
    """Equal shares; the first N mod n steps commit one more (LLaDA).

    Args:
      num_masked: N, integer.
      num_steps: n, integer ≥ 1.
      i: steps taken, integer in [0, n].

    Returns:
      int32, broadcast of the arguments.
    """
    base, rest = _int(num_masked) // num_steps, _int(num_masked) % num_steps
    return _int(num_masked) - i * base - jnp.minimum(_int(i), rest)


def remaining_linear(
    num_masked: ArrayLike, num_steps: ArrayLike, i: ArrayLike
) -> Array:
    """round(N·(1 − i/n)); arguments as in `remaining_even`."""
    left = (_int(num_steps) - i).astype(jnp.float32) / num_steps
    return jnp.round(_int(num_masked) * left).astype(jnp.int32)


def remaining_cosine(
    num_masked: ArrayLike, num_steps: ArrayLike, i: ArrayLike
) -> Array:
    """round(N·cos(πi/2n)), few tokens first; arguments as in `remaining_even`.

    References:
      Chang et al., "MaskGIT: Masked Generative Image Transformer", arXiv 2202.04200.
    """
    # sin(π(n − i)/2n), because cos(π/2) is not 0 in float32.
    left = (_int(num_steps) - i).astype(jnp.float32) / num_steps
    share = jnp.sin(0.5 * math.pi * left)
    return jnp.round(_int(num_masked) * share).astype(jnp.int32)


def quota_table(
    num_masked: ArrayLike, num_steps: int, remaining: RemainingFn = remaining_cosine
) -> Array:
    """Tokens committed at each step; rows are non-negative and sum to N.

    Args:
      num_masked: N, integer ``[...]``.
      num_steps: n ≥ 1.
      remaining: the quota.

    Returns:
      int32 ``[..., n]``.

    >>> print(quota_table(10, 4, remaining_even))
    [3 3 2 2]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
    masked = _int(num_masked)[..., None]
    steps = jnp.arange(num_steps + 1, dtype=jnp.int32)
    steps = jnp.broadcast_to(steps, masked.shape[:-1] + steps.shape)
    left = remaining(jnp.broadcast_to(masked, steps.shape), jnp.int32(num_steps), steps)
    return left[..., :-1] - left[..., 1:]


def _int(value: ArrayLike) -> Array:
    return jnp.asarray(value, jnp.int32)
