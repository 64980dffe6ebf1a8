"""Recorded steps of rollouts: what the policy saw and did, read again.

Updates look at records alone. The denoiser, which made them, is not run again.
Letters: B rows, T recorded turns, N generated positions, M steps of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from diffmm.policies.network import PolicyConfig, apply
from diffmm.policies.rule import policy_time
from diffmm.samplers import Trace
from diffmm.typing import Array, Params

#: Steps that go through the network together.
CHUNK = 256

Carry = TypeVar("Carry")


class Steps(NamedTuple):
    """Steps of rollouts, one per row.

    Attributes:
      masked: bool ``[M, N]``, what was masked.
      confidence: float32 ``[M, N]``.
      time: float32 ``[M]``, share of the budget that was used.
      seen: bool ``[M, N]``, positions that the policy attended to.
      allowed: bool ``[M, N]``, what could be committed.
      action: int32 ``[M, N]``.
      log_likelihood: float32 ``[M]``, of the action when it was taken.
      row: int32 ``[M]``, the row that the step belongs to.
    """

    masked: Array
    confidence: Array
    time: Array
    seen: Array
    allowed: Array
    action: Array
    log_likelihood: Array
    row: Array


def steps_of(
    trace: Trace, config: PolicyConfig, *, block_length: int | None = None
) -> tuple[Steps, Array]:
    """All recorded steps of all rows, and which of them took place.

    Args:
      trace: of `diffmm.samplers.sample`.
      config: of the policy.
      block_length: of the rollout; needed where the policy sees its block alone.

    Returns:
      `Steps` with M = B·T, and bool ``[M]``: the row was active and could act.

    Raises:
      ValueError: if a policy without full context comes without ``block_length``.
    """
    num_rows, num_turns, length = trace.masked.shape
    count = jnp.sum(trace.exists.astype(jnp.int32), axis=1)
    exists = jnp.broadcast_to(trace.exists[:, None], trace.masked.shape)
    seen = exists
    if not config.full_context:
        if block_length is None:
            raise ValueError(
                "block_length must be given for a policy without full_context, got None"
            )
        block = jnp.arange(length) // block_length
        block = jnp.broadcast_to(block, trace.masked.shape)
        current = jnp.take_along_axis(
            block, jnp.argmax(trace.allowed, axis=-1)[..., None], axis=-1
        )
        seen = exists & (block == current)
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    steps = Steps(
        masked=trace.masked,
        confidence=trace.confidence,
        time=policy_time(
            trace.turn, jnp.broadcast_to(count[:, None], trace.turn.shape)
        ),
        seen=seen,
        allowed=trace.allowed,
        action=trace.action,
        log_likelihood=trace.log_likelihood,
        row=jnp.broadcast_to(rows, trace.turn.shape),
    )
    active = trace.active & jnp.any(trace.allowed, axis=-1)
    total = num_rows * num_turns
    flat = jax.tree.map(lambda leaf: leaf.reshape(total, *leaf.shape[2:]), steps)
    return flat, active.reshape(total)


def replay(params: Params, config: PolicyConfig, steps: Steps) -> Array:
    """The policy's logits float32 ``[M, N]`` in recorded situations."""
    return apply(
        params,
        config,
        steps.masked,
        steps.confidence,
        steps.time,
        exists=steps.seen,
    )


def fold_steps(
    function: Callable[[Carry, Any, Array, Array], Carry],
    carry: Carry,
    steps: Any,
    active: Array,
    *,
    chunk: int = CHUNK,
) -> Carry:
    """Folds a function over the steps that took place, ``chunk`` at a time.

    Memory is that of one chunk, and time that of the steps that took place: rows which
    were quick cost little, whatever the longest did.

    Args:
      function: ``(carry, steps, index, live) -> carry`` with leaves ``[chunk, ...]``,
        the index int32 ``[chunk]`` of each step, and bool ``[chunk]``, false in what
        fills the last chunk.
      carry: initial value.
      steps: any tree of ``[M, ...]``.
      active: bool ``[M]``.
      chunk: steps at a time.

    Returns:
      The last carry.
    """
    total = len(active)
    chunk = min(chunk, total)
    order = jnp.argsort(~active, stable=True).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.zeros((chunk,), jnp.int32)])
    count = jnp.sum(active.astype(jnp.int32))

    def body(index: Array, carry: Carry) -> Carry:
        start = index * chunk
        picked = jax.lax.dynamic_slice_in_dim(order, start, chunk)
        live = start + jnp.arange(chunk, dtype=jnp.int32) < count
        chosen = jax.tree.map(lambda leaf: leaf[picked], steps)
        return function(carry, chosen, picked, live)

    return jax.lax.fori_loop(0, -(-count // chunk), body, carry)


def concatenate_traces(first: Trace, second: Trace) -> Trace:
    """Rows of two traces of equal length and width, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)
