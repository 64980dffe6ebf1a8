"""The one generation loop: evaluate, read, select, draw, write, move on.

Every row has its own block, step counter and end: rows do not wait for each other, and
what a row becomes does not depend on its neighbours.
Legend: B rows, L row length, N most generated positions of a row, K scored positions
(those of a block, or all N), V ids, T turns of a trace.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffmm.samplers.caches import CacheView
from diffmm.samplers.drawing import Drawn, draw_wanted
from diffmm.samplers.evaluation import (
    Evaluated,
    Renewal,
    Scene,
    evaluate,
    evaluate_cached,
)
from diffmm.samplers.law import Law, Reader, reader_of, take
from diffmm.samplers.rule import Prediction, Window, ensure_progress
from diffmm.samplers.state import (
    REVEAL,
    SCORE,
    STREAMS,
    TOKENS,
    Counts,
    Problem,
    Program,
    Spec,
    State,
    Trace,
    active_rows,
    enter,
    fold,
    leave_blocks,
    start,
    window_of,
)
from diffmm.samplers.statistics import Statistics, logit_statistics, map_positions
from diffmm.typing import Array, FeatureFn, Params, PredictFn

#: The statistics that must be finite.
CHECKED = ("log_normalizer", "max_prob", "entropy")


@functools.partial(
    jax.jit, static_argnames=("predict", "spec"), donate_argnames=("tokens",)
)
def generate(
    predict: PredictFn,
    params: Params,
    tokens: Array,
    problem: Problem,
    program: Program,
    *,
    spec: Spec,
) -> State:
    """Runs the loop from the start; `diffmm.samplers.sample` is the checked way in.

    Compiles once per shape, denoiser, kind of rule and set of filters in use.

    Args:
      predict: the denoiser; a new function object compiles again.
      params: its parameters.
      tokens: int32 ``[B, L]``; donated.
      problem: the rest of the canvas.
      program: rule, settings, bounds; its numbers are traced.
      spec: what to compile for.

    Returns:
      The final `State`.
    """
    state = start(predict, params, tokens, problem, program, spec=spec)
    return _run(predict, params, state, problem, program, spec)


@functools.partial(
    jax.jit, static_argnames=("predict", "spec"), donate_argnames=("state",)
)
def resume(
    predict: PredictFn,
    params: Params,
    state: State,
    problem: Problem,
    program: Program,
    *,
    spec: Spec,
) -> State:
    """Runs on until ``program.limits.until`` rows are at rest; ``state`` is donated."""
    return _run(predict, params, state, problem, program, spec)


def _run(
    predict: PredictFn,
    params: Params,
    state: State,
    problem: Problem,
    program: Program,
    spec: Spec,
) -> State:
    num_rows = state.tokens.shape[0]

    def unfinished(state: State) -> Array:
        resting = num_rows - jnp.sum(
            active_rows(state, program.limits), dtype=jnp.int32
        )
        return resting < program.limits.until

    def turn(state: State) -> State:
        return _turn(predict, params, state, problem, program, spec)

    return jax.lax.while_loop(unfinished, turn, state)


def _turn(
    predict: PredictFn,
    params: Params,
    state: State,
    problem: Problem,
    program: Program,
    spec: Spec,
) -> State:
    """One evaluation of every active row, and what follows from it."""
    rule, controls, limits = program.rule, program.controls, program.limits
    num_rows, row_length = state.tokens.shape
    num_generated = problem.order.shape[1]
    size = problem.allowed.shape[1]
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    active = active_rows(state, limits)
    window = window_of(problem, state, spec)

    # The rule's memory and its next step.
    block_keys = fold(problem.keys, state.block)
    aux = state.aux
    if jax.tree.leaves(aux):
        aux = jax.lax.cond(
            jnp.any(state.entered),
            lambda: _where_rows(
                state.entered, enter(rule, window, problem, block_keys), state.aux
            ),
            lambda: state.aux,
        )
    advance = jax.vmap(rule.advance)(
        fold(block_keys, REVEAL + STREAMS * state.step), window, aux
    )
    step = jnp.where(active, advance.step, state.step)
    window = window._replace(step=step)
    token_keys, score_keys = (
        fold(block_keys, stream + STREAMS * step) for stream in (TOKENS, SCORE)
    )
    modality = jnp.take_along_axis(problem.modality, window.positions, axis=1)

    # The denoiser.
    scale = controls.scale_at(modality, advance.t)
    if scale is not None:
        scale = jnp.where(window.masked & active[:, None], scale, 1.0)
    scene = Scene(
        state.tokens,
        problem.positions,
        problem.segment_ids,
        problem.condition,
        window.positions,
    )
    evaluated, renewal = _evaluate(
        predict, params, scene, state, problem, program, spec, window, active, scale
    )

    # What it says.
    barred = None
    if spec.stop_id is not None:
        barred = window.rank < limits.min_tokens
    given = not isinstance(predict, FeatureFn)
    law = Law(evaluated.features, evaluated.other, scale, modality, barred)
    read = Reader(reader_of(predict, params), problem.allowed, spec.stop_id)
    _check_logits(jax.eval_shape(read.logits, law.features), (*modality.shape, size))
    logits, memory = None, advance.aux
    if rule.needs_logits:
        logits, memory = jax.vmap(rule.adjust)(window, read(law), memory)
        law = Law(logits, None, None, modality, barred)
        read, given = read._replace(logits=lambda logits: logits), True
    statistics = map_positions(
        lambda law: logit_statistics(read(law)), law, size, given=given
    )
    if program.block_ends is not None:
        ends = jax.vmap(program.block_ends)(window, statistics, state.end)
        state = state._replace(end=jnp.where(state.entered & active, ends, state.end))
        window = window_of(problem, state, spec)._replace(step=step)
    state, active = _faults(state, statistics, window, active)
    live = window.masked & active[:, None]

    def draw_at(wanted: Array) -> Drawn:
        temperature = controls.temperature_at(modality, 1.0 - advance.s)
        top_k, top_p, min_p = controls.top_k, controls.top_p, controls.min_p
        return draw_wanted(
            lambda at: read(take(law, at)),
            wanted,
            token_keys,
            window.rank,
            statistics=statistics,
            temperature=jnp.where(advance.greedy[:, None], 0.0, temperature),
            top_k=None if top_k is None else top_k[modality],
            top_p=None if top_p is None else top_p[modality],
            min_p=None if min_p is None else min_p[modality],
        )

    # What the rule makes of it.
    prediction = Prediction(statistics=statistics, logits=logits)
    if rule.needs_shadow:
        shadow = Law(evaluated.shadows, None, None, modality, None)
        probability = map_positions(
            lambda pair: _probability(read(pair[0]), pair[1]),
            (shadow, window.tokens),
            size,
            given=given,
        )
        prediction = prediction._replace(shadow_prob=probability)
    drawn = None
    if rule.needs_drawn:
        drawn = draw_at(live)
        prediction = prediction._replace(
            drawn=drawn.tokens, drawn_prob=jnp.exp(drawn.logprob)
        )
    selection = jax.vmap(rule.select)(score_keys, window, prediction, memory)
    commit = selection.commit & live
    if rule.guarded:
        commit = jax.vmap(ensure_progress)(commit, selection.score, live)
    if drawn is None:
        drawn = draw_at(commit)

    # Writing it down.
    def write(array: Array, values: Array, where: Array) -> Array:
        at = jnp.where(where, window.positions, row_length)
        return array.at[rows, at].set(values, mode="drop")

    def mark(array: Array, value: bool, where: Array) -> Array:
        at = jnp.where(where, window.rank, num_generated)
        return array.at[rows, at].set(value, mode="drop")

    tokens, logprob, committed_at, remaining, changed = (
        write(state.tokens, drawn.tokens, commit),
        write(state.logprob, drawn.logprob, commit),
        write(state.committed_at, _spread(state.turns, commit), commit),
        mark(state.remaining, False, commit),
        commit,
    )
    settled = window.valid & ~window.masked & active[:, None]
    if selection.edit is not None:
        edit = selection.edit & settled
        tokens = write(tokens, statistics.argmax, edit)
        logprob = write(logprob, jnp.log(statistics.max_prob), edit)
        committed_at = write(committed_at, _spread(state.turns, edit), edit)
        changed = changed | edit
    if selection.remask is not None:
        remask = selection.remask & settled
        tokens = write(tokens, jnp.full(remask.shape, spec.mask_id, jnp.int32), remask)
        logprob = write(logprob, jnp.zeros(remask.shape, jnp.float32), remask)
        committed_at = write(committed_at, jnp.full(remask.shape, -1), remask)
        remaining = mark(remaining, True, remask)
        changed = changed | remask
    held = jnp.zeros((num_rows,), bool)
    if selection.hold is not None:
        held = jnp.where(active, selection.hold, state.held)
    trace = state.trace
    if trace is not None:
        trace = _recorded(
            trace, state.turns, window, statistics, selection, commit, active
        )._replace(
            tokens=_put(
                trace.tokens,
                state.turns,
                active,
                jnp.take_along_axis(tokens, problem.order, axis=1),
            )
        )
    counts = state.counts
    spent = jnp.where(active, evaluated.branches, 0)
    state = state._replace(
        tokens=tokens,
        remaining=remaining,
        fresh=jnp.where(
            active[:, None],
            mark(jnp.zeros(remaining.shape, bool), True, changed),
            state.fresh,
        ),
        step=jnp.where(active, step + 1, state.step),
        block_turns=state.block_turns + active,
        held=held,
        aux=_where_rows(active, selection.aux, aux),
        turns=state.turns + active,
        nfe=state.nfe + spent,
        logprob=logprob,
        committed_at=committed_at,
        cache=evaluated.cache,
        age=jnp.where(
            renewal.whole, 0, jnp.where(renewal.partial, state.age + 1, state.age)
        ),
        trace=trace,
        counts=Counts(
            whole=counts.whole + renewal.whole,
            partial=counts.partial + renewal.partial,
            unconditional=counts.unconditional + jnp.maximum(spent - 1, 0),
            whole_calls=counts.whole_calls + evaluated.whole_calls,
            partial_calls=counts.partial_calls + evaluated.partial_calls,
            processed=counts.processed + evaluated.processed,
            scored=counts.scored + jnp.float32(num_rows * spec.width),
        ),
    )
    return leave_blocks(state, problem, limits, active, spec)


def _evaluate(
    predict: PredictFn,
    params: Params,
    scene: Scene,
    state: State,
    problem: Problem,
    program: Program,
    spec: Spec,
    window: Window,
    active: Array,
    scale: Array | None,
) -> tuple[Evaluated, Renewal]:
    if program.cache is None:
        evaluated = evaluate(
            predict,
            params,
            scene,
            scale=scale,
            mask_id=spec.mask_id,
            shadows=program.rule.needs_shadow,
        )
        nothing = jnp.zeros_like(active)
        return evaluated, Renewal(active, jnp.zeros(scene.tokens.shape, bool), nothing)
    rows = jnp.arange(len(active), dtype=jnp.int32)[:, None]

    def spread(where: Array, positions: Array) -> Array:
        at = jnp.where(where, positions, scene.tokens.shape[1])
        empty = jnp.zeros(scene.tokens.shape, bool)
        return empty.at[rows, at].set(True, mode="drop")

    first = jnp.minimum(state.start, problem.order.shape[1] - 1)[:, None]
    block = spread(window.valid, window.positions)
    view = CacheView(
        exists=scene.segment_ids > 0,
        block=block,
        masked=spread(state.remaining, problem.order),
        fresh=spread(state.fresh, problem.order),
        positions=scene.positions,
        segment_ids=scene.segment_ids,
        first=jnp.take_along_axis(problem.order, first, axis=1)[:, 0],
        entered=state.entered,
        age=state.age,
        causal_block=predict.causal_block,  # type: ignore[attr-defined]
    )
    whole = program.cache.refresh(view) & active
    want = program.cache.want(view)
    if predict.shift:  # type: ignore[attr-defined]
        read = block[:, 1:] & view.exists[:, :-1]
        want = want | jnp.pad(read, ((0, 0), (0, 1)))
    renewal = Renewal(whole=whole, want=want, partial=active & ~whole)
    evaluated = evaluate_cached(
        predict,  # type: ignore[arg-type]
        params,
        scene,
        state.cache,
        renewal,
        scale=scale,
        mask_id=spec.mask_id,
        sizes=spec.sizes,
    )
    return evaluated, renewal


def _faults(
    state: State, statistics: Statistics, window: Window, active: Array
) -> tuple[State, Array]:
    """Stops rows where a law is not a law; says where and by which statistic."""
    values = jnp.stack([getattr(statistics, name) for name in CHECKED])
    bad = ~jnp.isfinite(values) & (window.exists & active[:, None])[None]
    column = jnp.argmax(jnp.any(bad, axis=0), axis=1)[:, None]
    position = jnp.take_along_axis(window.positions, column, axis=1)[:, 0]
    field = jnp.argmax(jnp.take_along_axis(bad, column[None], axis=2)[..., 0], axis=0)
    hit = jnp.any(bad, axis=(0, 2))
    state = state._replace(
        fault=jnp.where(hit, position, state.fault),
        fault_field=jnp.where(hit, field.astype(jnp.int32), state.fault_field),
    )
    return state, active & ~hit


def _recorded(
    trace: Trace,
    turns: Array,
    window: Window,
    statistics: Statistics,
    selection: Any,
    commit: Array,
    active: Array,
) -> Trace:
    action = selection.action
    action = commit.astype(jnp.int32) if action is None else action
    likelihood = selection.log_likelihood
    if likelihood is None:
        likelihood = jnp.zeros(turns.shape, jnp.float32)
    put = functools.partial(_put, turns=turns, active=active)
    return trace._replace(
        masked=put(trace.masked, value=window.remaining),
        confidence=put(trace.confidence, value=statistics.max_prob * window.exists),
        allowed=put(trace.allowed, value=window.masked),
        action=put(trace.action, value=jnp.where(window.masked, action, 0)),
        turn=put(trace.turn, value=turns),
        active=put(trace.active, value=active),
        log_likelihood=put(trace.log_likelihood, value=likelihood),
    )


def _put(buffer: Array, turns: Array, active: Array, value: Array) -> Array:
    """Writes one entry per active row at its turn; turns beyond the end are lost."""
    rows = jnp.arange(len(turns), dtype=jnp.int32)
    at = jnp.where(active, turns, buffer.shape[1])
    return buffer.at[rows, at].set(value.astype(buffer.dtype), mode="drop")


def _probability(logits: Array, tokens: Array) -> Array:
    """The probability of ``tokens [G]`` under ``logits [G, V]``."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def _spread(per_row: Array, like: Array) -> Array:
    return jnp.broadcast_to(per_row[:, None], like.shape)


def _where_rows(rows: Array, new: Any, old: Any) -> Any:
    def pick(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)


def _check_logits(logits: Any, expected: tuple[int, ...]) -> None:
    if logits.shape != expected:
        raise ValueError(
            f"predict must return logits of shape [B, K, V] = {expected} (V is that of "
            f"the allowed table), got {logits.shape}"
        )
