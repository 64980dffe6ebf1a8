"""What queries see of keys where these are not simply one row: `diffmm.typing.View`."""

from __future__ import annotations

import jax.numpy as jnp

from diffmm.typing import Array, Places, View


def row_places(positions: Array, segment_ids: Array) -> Places:
    """Places of a whole row; both arguments int32 ``[B, L]``."""
    index_1L = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    return Places(jnp.broadcast_to(index_1L, positions.shape), positions, segment_ids)


def view_of(
    queries: Places,
    keys: Places,
    *,
    causal_block: int = 0,
    visible: Array | None = None,
) -> View:
    """What queries see of keys, block by block where the model is block-causal.

    Args:
      queries: places ``[B, Q]``.
      keys: places ``[B, S]``.
      causal_block: c > 0: a query at position p sees the keys of its segment at
        positions p' with ``p' // c <= p // c``, which are its own block and all before
        it. 0 = no such restriction.
      visible: bool ``[B, Q, S]``, a further restriction, or None.

    Returns:
      The view.

    References:
      Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and
      Diffusion Language Models", arXiv 2503.09573.
    """
    if causal_block:
        block_BQ1 = (queries.positions // causal_block)[:, :, None]
        seen_BQS = (keys.positions // causal_block)[:, None, :] <= block_BQ1
        visible = seen_BQS if visible is None else visible & seen_BQS
    return View(queries, keys, visible)
