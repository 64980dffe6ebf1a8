"""Draws tokens at the chosen positions only.

Noise, sorting and filtering over the vocabulary are the costly part of a step outside
the denoiser. A step commits few of the positions that it scores, so the loop first
decides which, then gathers their logits, a few per row at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.categorical import draw
from diffmm.samplers.statistics import Statistics
from diffmm.typing import Array

_POSITIONS_AT_A_TIME = 4


class Drawn(NamedTuple):
    """Tokens and their log-probability, ``[B, K]``; 0 where nothing was wanted."""

    tokens: Array
    logprob: Array


def draw_wanted(
    read: Callable[[Array], Array],
    wanted: Array,
    keys: Array,
    index: Array,
    *,
    statistics: Statistics,
    temperature: Array,
    top_k: Array | None,
    top_p: Array | None,
    min_p: Array | None,
) -> Drawn:
    """One token for every wanted position.

    Each position has its own key, folded with its rank in the row: the draw depends
    neither on the other positions nor on the width of the window. Where τ = 0 the
    token is the arg-max that the statistics know already, and no law is read again.

    Args:
      read: columns ``[B, C]`` to their float32 logits ``[B, C, V]``, guided and
        suppressed.
      wanted: bool ``[B, K]``.
      keys: key array ``[B]``, one per row and step.
      index: int32 ``[B, K]``, rank among the generated positions of the row.
      statistics: of all positions, ``[B, K]``.
      temperature: float32 ``[B, K]``.
      top_k: int32 ``[B, K]`` or ``None``.
      top_p: float32 ``[B, K]`` or ``None``.
      min_p: float32 ``[B, K]`` or ``None``.

    Returns:
      `Drawn`; the log-probability is that of the untempered, unfiltered law, in nats.
    """
    greedy = wanted & (temperature == 0.0)
    start = Drawn(
        jnp.where(greedy, statistics.argmax, 0),
        jnp.where(greedy, jnp.log(statistics.max_prob), 0.0),
    )
    wanted = wanted & ~greedy
    num_rows, width = wanted.shape
    chunk = min(width, max(1, _POSITIONS_AT_A_TIME // num_rows))
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    # The wanted positions of each row in order; the rest makes the last chunk whole.
    place = jnp.cumsum(wanted, axis=1, dtype=jnp.int32)
    counts = place[:, -1]
    columns = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], wanted.shape)
    order = jnp.zeros((num_rows, width + chunk - 1), jnp.int32)
    slot = jnp.where(wanted, place - 1, width + chunk)
    order = order.at[rows, slot].set(columns, mode="drop")
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))

    def body(carry: tuple[Array, Drawn]) -> tuple[Array, Drawn]:
        start, drawn = carry
        at = jax.lax.dynamic_slice_in_dim(order, start, chunk, axis=1)

        def take(table: Array | None) -> Array | None:
            return None if table is None else jnp.take_along_axis(table, at, axis=1)

        picked = read(at)
        tau = jnp.take_along_axis(temperature, at, axis=1)
        rank = start + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        live = rank < counts[:, None]
        tokens = draw(
            fold(keys, jnp.take_along_axis(index, at, axis=1)),
            picked,
            temperature=jnp.where(live, tau, 0.0),
            top_k=take(top_k),
            top_p=take(top_p),
            min_p=take(min_p),
        )
        chosen = jnp.take_along_axis(picked, tokens[..., None], axis=2)[..., 0]
        logprob = chosen - jax.nn.logsumexp(picked, axis=-1)
        target = jnp.where(live, at, width)
        return start + chunk, Drawn(
            drawn.tokens.at[rows, target].set(tokens, mode="drop"),
            drawn.logprob.at[rows, target].set(logprob, mode="drop"),
        )

    _, drawn = jax.lax.while_loop(
        lambda carry: carry[0] < jnp.max(counts), body, (jnp.int32(0), start)
    )
    return drawn
