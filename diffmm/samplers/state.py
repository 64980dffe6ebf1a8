"""What the loop carries, and how it begins and moves from block to block.

Legend: B rows, L row length, N most generated positions of a row, K scored positions
(those of a block, or all N), V ids, T turns of a trace.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.caches import CacheStrategy
from diffmm.samplers.evaluation import empty_caches
from diffmm.samplers.rule import BlockEnds, Rule, Window
from diffmm.samplers.settings import Controls
from diffmm.typing import Array, Params, PredictFn

# Streams of randomness of a row: its key is folded with the block, then with
# stream + 3·step. The entry of the block takes the number that is left over.
ENTRY, TOKENS, REVEAL, SCORE = range(4)
STREAMS = 3


class Problem(NamedTuple):
    """What does not change while rows are generated.

    Attributes:
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      modality: int32 ``[B, L]``.
      condition: bool ``[B, L]``.
      order: int32 ``[B, N]``, the generated positions of each row in rising order.
      counts: int32 ``[B]``, how many of them are real; the rest is filling.
      keys: key array ``[B]``, one per row.
      allowed: bool ``[4, V]``, ids by modality; never the mask id.
    """

    positions: Any
    segment_ids: Any
    modality: Any
    condition: Any
    order: Any
    counts: Any
    keys: Array
    allowed: Any


class Limits(NamedTuple):
    """Bounds, all traced, int32 ``[]``.

    Attributes:
      forwards: evaluations after which a row stops.
      block_turns: turns after which a row leaves its block, full or not.
      min_tokens: generated positions of a row that may not hold the stop id.
      until: the loop returns when so many rows are at rest.
    """

    forwards: Any
    block_turns: Any
    min_tokens: Any
    until: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What the loop is compiled for.

    Attributes:
      mask_id: the mask.
      block_length: positions per block.
      width: K, scored positions.
      aligned: blocks end where ``position % block_length`` is 0.
      stop_id: a row stops at the end of the block that holds this id; what is left is
        filled with it.
      trace_length: T, or 0 for no trace.
      sizes: numbers of positions per row that a cached evaluation computes.
    """

    mask_id: int
    block_length: int
    width: int
    aligned: bool = False
    stop_id: int | None = None
    trace_length: int = 0
    sizes: tuple[int, ...] = ()


class Trace(NamedTuple):
    """What happened, turn by turn, for replay, imitation and policy gradients.

    Attributes:
      masked: bool ``[B, T, N]``, still masked before the turn.
      confidence: float32 ``[B, T, N]``, max-prob of every generated position.
      allowed: bool ``[B, T, N]``, what could be committed.
      action: int32 ``[B, T, N]``, 0 where nothing was chosen, else the place in the
        order of choice, from 1.
      turn: int32 ``[B, T]``, index of the turn, from 0.
      active: bool ``[B, T]``, the turn happened.
      log_likelihood: float32 ``[B, T]``, of the action, 0 for rules without one.
      tokens: int32 ``[B, T, N]``, the generated positions after the turn.
      exists: bool ``[B, N]``, real positions.
    """

    masked: Array
    confidence: Array
    allowed: Array
    action: Array
    turn: Array
    active: Array
    log_likelihood: Array
    tokens: Array
    exists: Array


class Counts(NamedTuple):
    """Evaluations by kind.

    Attributes:
      whole: int32 ``[B]``, turns in which the row was computed whole.
      partial: int32 ``[B]``, turns in which some of its positions were.
      unconditional: int32 ``[B]``, evaluations of the second branch.
      whole_calls: int32 ``[]``, denoiser calls on whole rows.
      partial_calls: int32 ``[]``, denoiser calls on some positions.
      processed: float32 ``[]``, positions computed, idle rows included.
      scored: float32 ``[]``, positions whose law was read, idle rows included.
    """

    whole: Array
    partial: Array
    unconditional: Array
    whole_calls: Array
    partial_calls: Array
    processed: Array
    scored: Array


class State(NamedTuple):
    """The loop's state.

    Attributes:
      tokens: int32 ``[B, L]``.
      remaining: bool ``[B, N]``, generated positions that are still masked.
      fresh: bool ``[B, N]``, positions that changed in the row's last turn.
      block: int32 ``[B]``.
      start: int32 ``[B]``, rank at which the block begins.
      end: int32 ``[B]``, rank at which it ends.
      step: int32 ``[B]``, inside the block.
      block_turns: int32 ``[B]``, turns spent in the block.
      entered: bool ``[B]``, the row is at the entry of its block.
      held: bool ``[B]``, the rule keeps the row in its full block.
      aux: the rule's memory.
      turns: int32 ``[B]``, steps in which the row was active.
      nfe: int32 ``[B]``, denoiser evaluations spent on the row.
      logprob: float32 ``[B, L]``, of committed tokens, in nats.
      committed_at: int32 ``[B, L]``, the row's turn of each commit; −1 elsewhere.
      cache: keys and values of both branches, or ``None``.
      age: int32 ``[B]``, evaluations since the row was computed whole; −1 = never.
      fault: int32 ``[B]``, position whose law is not a law, or −1.
      fault_field: int32 ``[B]``, which of `CHECKED` was not finite there.
      trace: `Trace` or ``None``.
      counts: `Counts`.
    """

    tokens: Array
    remaining: Array
    fresh: Array
    block: Array
    start: Array
    end: Array
    step: Array
    block_turns: Array
    entered: Array
    held: Array
    aux: Any
    turns: Array
    nfe: Array
    logprob: Array
    committed_at: Array
    cache: Any
    age: Array
    fault: Array
    fault_field: Array
    trace: Trace | None
    counts: Counts


class Program(NamedTuple):
    """How rows are generated: traced numbers in fixed structures.

    Attributes:
      rule: which positions are committed when.
      controls: temperatures, filters, guidance.
      limits: bounds.
      cache: how keys and values are kept, or ``None``.
      block_ends: where blocks end, if that depends on what is predicted.
    """

    rule: Rule
    controls: Controls
    limits: Limits
    cache: CacheStrategy | None = None
    block_ends: BlockEnds | None = None


@functools.partial(jax.jit, static_argnames=("predict", "spec"))
def start(
    predict: PredictFn,
    params: Params,
    tokens: Array,
    problem: Problem,
    program: Program,
    *,
    spec: Spec,
) -> State:
    """The state before the first evaluation; arguments as of `generate`."""
    num_rows, row_length = tokens.shape
    num_generated = problem.order.shape[1]
    zero = jnp.zeros((num_rows,), jnp.int32)
    never = jnp.zeros((num_rows,), bool)
    index = jnp.arange(num_generated, dtype=jnp.int32)[None]
    exists = index < problem.counts[:, None]
    trace = None
    if spec.trace_length:
        shape = (num_rows, spec.trace_length)
        wide = (*shape, num_generated)
        trace = Trace(
            masked=jnp.zeros(wide, bool),
            confidence=jnp.zeros(wide, jnp.float32),
            allowed=jnp.zeros(wide, bool),
            action=jnp.zeros(wide, jnp.int32),
            turn=jnp.zeros(shape, jnp.int32),
            active=jnp.zeros(shape, bool),
            log_likelihood=jnp.zeros(shape, jnp.float32),
            tokens=jnp.zeros(wide, jnp.int32),
            exists=exists,
        )
    cache = None
    if program.cache is not None:
        guided = program.controls.scale is not None
        cache = empty_caches(
            predict,  # type: ignore[arg-type]
            params,
            num_rows,
            row_length,
            guided=guided,
        )
    state = State(
        tokens=tokens,
        remaining=exists,
        fresh=jnp.zeros(exists.shape, bool),
        block=zero,
        start=zero,
        end=default_end(problem, zero, spec),
        step=zero,
        block_turns=zero,
        entered=~never,
        held=never,
        aux=None,
        turns=zero,
        nfe=zero,
        logprob=jnp.zeros(tokens.shape, jnp.float32),
        committed_at=jnp.full(tokens.shape, -1, jnp.int32),
        cache=cache,
        age=zero - 1,
        fault=zero - 1,
        fault_field=zero,
        trace=trace,
        counts=Counts(
            whole=zero,
            partial=zero,
            unconditional=zero,
            whole_calls=jnp.int32(0),
            partial_calls=jnp.int32(0),
            processed=jnp.float32(0),
            scored=jnp.float32(0),
        ),
    )
    memory = jax.eval_shape(
        lambda: enter(program.rule, window_of(problem, state, spec), problem)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return state._replace(aux=zeros)


def active_rows(state: State, limits: Limits) -> Array:
    """Rows that have something to do, bool ``[B]``."""
    ahead = jnp.arange(state.remaining.shape[1])[None] >= state.start[:, None]
    work = jnp.any(state.remaining & ahead, axis=1) | state.held
    return work & (state.nfe < limits.forwards) & (state.fault < 0)


def window_of(problem: Problem, state: State, spec: Spec) -> Window:
    """What rules see of the block, or of the whole canvas; fields ``[B, ...]``."""
    last = problem.order.shape[1] - 1
    whole = spec.width == last + 1
    first = jnp.zeros_like(state.start) if whole else state.start
    index = first[:, None] + jnp.arange(spec.width, dtype=jnp.int32)[None]
    clipped = jnp.minimum(index, last)
    exists = index < problem.counts[:, None]
    valid = (index >= state.start[:, None]) & (index < state.end[:, None]) & exists
    remaining = jnp.take_along_axis(state.remaining, clipped, axis=1) & exists
    positions = jnp.take_along_axis(problem.order, clipped, axis=1)
    counts = problem.counts
    if spec.aligned:
        offset = jnp.take_along_axis(problem.positions, problem.order[:, :1], axis=1)
        counts = counts + offset[:, 0] % spec.block_length
    return Window(
        masked=remaining & valid,
        valid=valid,
        exists=exists,
        remaining=remaining,
        rank=index,
        positions=positions,
        tokens=jnp.take_along_axis(state.tokens, positions, axis=1),
        logprob=jnp.take_along_axis(state.logprob, positions, axis=1),
        block=state.block,
        num_blocks=jnp.maximum(-(-counts // spec.block_length), 1),
        start=state.start,
        count=problem.counts,
        step=state.step,
        turn=state.turns,
    )


def leave_blocks(
    state: State, problem: Problem, limits: Limits, active: Array, spec: Spec
) -> State:
    """Leaves blocks that are full, or whose turns are spent."""
    index = jnp.arange(state.remaining.shape[1], dtype=jnp.int32)[None]
    inside = (index >= state.start[:, None]) & (index < state.end[:, None])
    full = ~jnp.any(state.remaining & inside, axis=1) & ~state.held
    leave = active & (full | (state.block_turns >= limits.block_turns))
    state = state._replace(held=state.held & ~leave)
    if spec.stop_id is not None:
        tokens = jnp.take_along_axis(state.tokens, problem.order, axis=1)
        hit = (tokens == spec.stop_id) & inside & ~state.remaining
        left = state.remaining & (leave & jnp.any(hit, axis=1))[:, None]
        rows = jnp.arange(len(active), dtype=jnp.int32)[:, None]
        at = jnp.where(left, problem.order, state.tokens.shape[1])
        state = state._replace(
            tokens=state.tokens.at[rows, at].set(spec.stop_id, mode="drop"),
            remaining=state.remaining & ~left,
        )
    begin = jnp.where(leave, state.end, state.start)
    return state._replace(
        block=state.block + leave,
        start=begin,
        end=jnp.where(leave, default_end(problem, begin, spec), state.end),
        step=jnp.where(leave, 0, state.step),
        block_turns=jnp.where(leave, 0, state.block_turns),
        entered=leave | (state.entered & ~active),
    )


def enter(
    rule: Rule, window: Window, problem: Problem, block_keys: Array | None = None
) -> Any:
    """The rule's memory at the entry of a block, leaves ``[B, ...]``."""
    keys = problem.keys if block_keys is None else block_keys
    keys = fold(keys, jnp.full((len(problem.counts),), ENTRY, jnp.int32))
    size = problem.allowed.shape[1]
    return jax.vmap(lambda key, window: rule.enter(key, window, size))(keys, window)


def default_end(problem: Problem, start: Array, spec: Spec) -> Array:
    """The rank at which blocks that begin at ``start [B]`` end, int32 ``[B]``."""
    length = jnp.full(start.shape, spec.block_length, jnp.int32)
    if spec.aligned:
        last = problem.order.shape[1] - 1
        at = jnp.take_along_axis(
            problem.order, jnp.minimum(start, last)[:, None], axis=1
        )
        position = jnp.take_along_axis(problem.positions, at, axis=1)[:, 0]
        length = length - position % spec.block_length
    return jnp.minimum(start + length, problem.counts)


def fold(keys: Array, numbers: Array) -> Array:
    """One key per row, folded with one number per row."""
    return jax.vmap(jax.random.fold_in)(keys, numbers)
