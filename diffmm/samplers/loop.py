"""The one generation loop: score a window, select, draw, commit, move on.

Every row has its own block pointer and step counter and stops on its own: rows do not
wait for each other, and what a row becomes does not depend on its neighbours.
Legend: B rows, L row length, N most generated positions of a row, K window
width, V ids.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.drawing import Drawn, draw_wanted
from diffmm.samplers.filters import suppress
from diffmm.samplers.guidance import guided_logits
from diffmm.samplers.rule import Prediction, Rule, Window, ensure_progress
from diffmm.samplers.settings import Controls
from diffmm.samplers.statistics import logit_statistics, map_rows
from diffmm.typing import Array, Params, PredictFn

# Streams of randomness of a row: its key is folded with the block, then with
# stream + 3·step. The entry of the block takes the number that is left over.
_ENTRY, _TOKENS, _REVEAL, _SCORE = range(4)
_STREAMS = 3


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

    positions: Array
    segment_ids: Array
    modality: Array
    condition: Array
    order: Array
    counts: Array
    keys: Array
    allowed: Array


class State(NamedTuple):
    """The loop's state.

    Attributes:
      tokens: int32 ``[B, L]``.
      remaining: bool ``[B, N]``, generated positions that are still masked.
      block: int32 ``[B]``.
      step: int32 ``[B]``, inside the block.
      entered: bool ``[B]``, the row is at the entry of its block.
      aux: the rule's memory.
      turns: int32 ``[B]``, steps in which the row was active.
      nfe: int32 ``[B]``, denoiser evaluations spent on the row.
      forwards: int32 ``[]``, denoiser calls.
      logprob: float32 ``[B, L]``, of committed tokens, in nats.
      committed_at: int32 ``[B, L]``, the row's turn of each commit; −1 elsewhere.
    """

    tokens: Array
    remaining: Array
    block: Array
    step: Array
    entered: Array
    aux: Any
    turns: Array
    nfe: Array
    forwards: Array
    logprob: Array
    committed_at: Array


@functools.partial(
    jax.jit,
    static_argnames=("predict", "mask_id", "width", "eos_id"),
    donate_argnames=("tokens",),
)
def generate(
    predict: PredictFn,
    params: Params,
    tokens: Array,
    problem: Problem,
    rule: Rule,
    controls: Controls,
    max_forwards: Array,
    *,
    mask_id: int,
    width: int,
    eos_id: int | None = None,
) -> State:
    """Runs the loop to its end; `diffmm.samplers.sample` is the checked way in.

    Compiles once per shape, denoiser, kind of rule and set of filters in use.

    Args:
      predict: the denoiser; a new function object compiles again.
      params: its parameters.
      tokens: int32 ``[B, L]``; donated.
      problem: the rest of the canvas.
      rule: the selection rule; its numbers are traced.
      controls: temperatures, filters, guidance; traced.
      max_forwards: int32 ``[]``, evaluations after which a row stops.
      mask_id: the mask.
      width: K, positions per block.
      eos_id: a row stops at the end of the block that holds this id; what is left is
        filled with it.

    Returns:
      The final `State`.
    """
    num_rows, row_length = tokens.shape
    num_generated = problem.order.shape[1]
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]

    def keys_of(block_keys: Array, stream: Array) -> Array:
        return jax.vmap(jax.random.fold_in)(block_keys, stream)

    def active_rows(state: State) -> Array:
        return jnp.any(state.remaining, axis=1) & (state.nfe < max_forwards)

    def enter(window: Window, block_keys: Array) -> Any:
        keys = keys_of(block_keys, jnp.full((num_rows,), _ENTRY, jnp.int32))
        return jax.vmap(rule.enter)(keys, window)

    def body(state: State) -> State:
        active = active_rows(state)
        window = _window(problem, state.remaining, state.block, state.step, width)
        block_keys = jax.vmap(jax.random.fold_in)(problem.keys, state.block)
        aux = jax.lax.cond(
            jnp.any(state.entered),
            lambda: _where_rows(state.entered, enter(window, block_keys), state.aux),
            lambda: state.aux,
        )
        advance = jax.vmap(rule.advance)(
            keys_of(block_keys, _REVEAL + _STREAMS * state.step), window, aux
        )
        step = jnp.where(active, advance.step, state.step)
        window = window._replace(step=step)
        token_keys, score_keys = (
            keys_of(block_keys, stream + _STREAMS * step)
            for stream in (_TOKENS, _SCORE)
        )
        modality = jnp.take_along_axis(problem.modality, window.positions, axis=1)
        live = window.masked & active[:, None]

        scale = controls.scale_at(modality, advance.t)
        if scale is not None:
            scale = jnp.where(live, scale, 1.0)
        logits = guided_logits(
            predict,
            params,
            state.tokens,
            problem.positions,
            problem.segment_ids,
            window.positions,
            condition=problem.condition,
            scale=scale,
            mask_id=mask_id,
        )
        _check_logits(logits, (num_rows, width, problem.allowed.shape[1]))

        def draw_at(wanted: Array) -> Drawn:
            temperature = controls.temperature_at(modality, 1.0 - advance.s)
            top_k, top_p = controls.top_k, controls.top_p
            return draw_wanted(
                logits,
                problem.allowed,
                modality,
                wanted,
                token_keys,
                window.rank,
                temperature=jnp.where(advance.greedy[:, None], 0.0, temperature),
                top_k=None if top_k is None else top_k[modality],
                top_p=None if top_p is None else top_p[modality],
            )

        def allowed_logits(logits: Array, modality: Array) -> Array:
            return suppress(logits, problem.allowed[modality])

        prediction = Prediction(
            statistics=map_rows(
                lambda *row: logit_statistics(allowed_logits(*row)), logits, modality
            ),
            logits=allowed_logits(logits, modality),
        )
        drawn = None
        if rule.needs_drawn:
            drawn = draw_at(live)
            prediction = prediction._replace(
                drawn=drawn.tokens, drawn_prob=jnp.exp(drawn.logprob)
            )
        selection = jax.vmap(rule.select)(score_keys, window, prediction, advance.aux)
        commit = selection.commit & live
        if rule.guarded:
            commit = jax.vmap(ensure_progress)(commit, selection.score, live)
        if drawn is None:
            drawn = draw_at(commit)

        def write(array: Array, values: Array) -> Array:
            at = jnp.where(commit, window.positions, row_length)
            return array.at[rows, at].set(values, mode="drop")

        second = (
            jnp.zeros((num_rows,), bool)
            if scale is None
            else jnp.any(scale != 1.0, axis=1)
        )
        state = state._replace(
            tokens=write(state.tokens, drawn.tokens),
            logprob=write(state.logprob, drawn.logprob),
            committed_at=write(
                state.committed_at,
                jnp.broadcast_to(state.turns[:, None], commit.shape),
            ),
            remaining=state.remaining.at[
                rows, jnp.where(commit, window.rank, num_generated)
            ].set(False, mode="drop"),
            step=jnp.where(active, step + 1, state.step),
            aux=_where_rows(active, selection.aux, aux),
            turns=state.turns + active,
            nfe=state.nfe + jnp.where(active, 1 + second.astype(jnp.int32), 0),
            forwards=state.forwards + 1 + jnp.any(second),
        )
        entered = active & ~jnp.any(window.masked & ~commit, axis=1)
        if eos_id is not None:
            state = stop_at_eos(state, entered, window)
        return state._replace(
            entered=entered,
            block=jnp.where(entered, state.block + 1, state.block),
            step=jnp.where(entered, 0, state.step),
        )

    def stop_at_eos(state: State, full: Array, window: Window) -> State:
        in_block = jnp.take_along_axis(state.tokens, window.positions, axis=1)
        stop = full & jnp.any((in_block == eos_id) & window.valid, axis=1)
        left = state.remaining & stop[:, None]
        at = jnp.where(left, problem.order, row_length)
        return state._replace(
            tokens=state.tokens.at[rows, at].set(eos_id or 0, mode="drop"),
            remaining=state.remaining & ~left,
        )

    zero = jnp.zeros((num_rows,), jnp.int32)
    remaining = (
        jnp.arange(num_generated, dtype=jnp.int32)[None] < problem.counts[:, None]
    )
    window = _window(problem, remaining, zero, zero, width)
    memory = jax.eval_shape(enter, window, problem.keys)
    state = State(
        tokens=tokens,
        remaining=remaining,
        block=zero,
        step=zero,
        entered=jnp.ones((num_rows,), bool),
        aux=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory),
        turns=zero,
        nfe=zero,
        forwards=jnp.int32(0),
        logprob=jnp.zeros(tokens.shape, jnp.float32),
        committed_at=jnp.full(tokens.shape, -1, jnp.int32),
    )
    return jax.lax.while_loop(lambda s: jnp.any(active_rows(s)), body, state)


def _window(
    problem: Problem, remaining: Array, block: Array, step: Array, width: int
) -> Window:
    last = problem.order.shape[1] - 1
    index = block[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None]
    clipped = jnp.minimum(index, last)
    valid = index < problem.counts[:, None]
    return Window(
        masked=jnp.take_along_axis(remaining, clipped, axis=1) & valid,
        valid=valid,
        rank=index,
        positions=jnp.take_along_axis(problem.order, clipped, axis=1),
        block=block,
        num_blocks=jnp.maximum(-(-problem.counts // width), 1),
        step=step,
    )


def _where_rows(rows: Array, new: Any, old: Any) -> Any:
    def pick(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)


def _check_logits(logits: Array, expected: tuple[int, int, int]) -> None:
    if logits.shape != expected:
        raise ValueError(
            f"predict must return logits of shape [B, K, V] = {expected} (V is that of "
            f"the allowed table), got {logits.shape}"
        )
