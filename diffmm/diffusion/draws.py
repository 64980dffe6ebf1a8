"""Random draws keyed by the global row index.

Nothing here depends on how a global batch is cut into micro-batches or spread over
devices: a row's draws are a function of (key, global row index) alone, and the one
number that rows share is drawn from the key alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffmm.typing import Array, ArrayLike

_BELOW_ONE = 1.0 - 2.0**-24


def row_keys(key: Array, rows: ArrayLike) -> Array:
    """Folds the key with each global row index: ``[B]`` keys from int32 ``[B]``."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(rows))


def _fine_uniform(key: Array, length: int) -> Array:
    """float32 ``[length]`` in [0, 1) with 32 random bits.

    `jax.random.uniform` draws multiples of 2^-23: it would mask a token of
    probability 1e-9 (``Polynomial(exponent=3)`` at t = 1e-3) a hundred times too
    often.
    """
    bits = jax.random.bits(key, (length,), jnp.uint32)
    return jnp.minimum(bits.astype(jnp.float32) * 2.0**-32, _BELOW_ONE)


def row_uniform(key: Array, rows: ArrayLike, length: int) -> Array:
    """Uniform draws in [0, 1), independent over rows and positions.

    Args:
      key: a PRNG key, equal on all devices and micro-batches of a step.
      rows: int32 ``[B]``, global row indices.
      length: draws per row.

    Returns:
      float32 ``[B, length]``.
    """
    return jax.vmap(_fine_uniform, (0, None))(row_keys(key, rows), length)


def stratified_times(key: Array, rows: ArrayLike, num_rows: int | ArrayLike) -> Array:
    """Low-discrepancy times τ_i = (u + i/num_rows) mod 1 with one shared u.

    Each τ_i is uniform on [0, 1), and the times of the global batch are evenly
    spaced, which takes most of the noise of the time integral out of the loss. With
    rows dealt to devices in turn (device d holds d, d + n, d + 2n, ...), each device
    also holds an evenly spaced set.

    Args:
      key: a PRNG key, equal on all devices and micro-batches of a step.
      rows: int32 ``[B]``, global row indices i; never a local ``arange``.
      num_rows: rows of the global batch.

    Returns:
      float32 ``[B]`` in [0, 1).

    References:
      Kingma et al., "Variational Diffusion Models", arXiv 2107.00630, appendix I.1.
    """
    shift = jax.random.uniform(key, (), jnp.float32)
    fraction = jnp.asarray(rows).astype(jnp.float32) / num_rows
    times = shift + fraction
    return times - jnp.floor(times)


def uniform_subset(keys: Array, maskable: ArrayLike, size: ArrayLike) -> Array:
    """Uniform subsets of given size of each row's maskable positions.

    Args:
      keys: ``[B]`` PRNG keys.
      maskable: bool ``[B, L]``.
      size: int32 ``[B]``, number of positions to take; more than there are takes all.

    Returns:
      bool ``[B, L]``.
    """
    maskable = jnp.asarray(maskable)

    def order(key: Array, row: Array) -> Array:
        bits = jax.random.bits(key, row.shape, jnp.uint32)
        return jnp.lexsort((bits, ~row))

    # The inverse of the ordering is each position's rank in it.
    rank = jnp.argsort(jax.vmap(order)(keys, maskable), axis=-1)
    return maskable & (rank < jnp.asarray(size)[:, None])
