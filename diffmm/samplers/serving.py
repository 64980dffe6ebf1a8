"""A stream of requests through a fixed number of slots.

Rows that are done still cost a share of every evaluation. Here the loop returns as soon
as some rows are at rest; the host takes them out and puts the next requests into their
slots. Shapes never change, so nothing is compiled again, and a request gives the tokens
that it would give alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.loop import resume
from diffmm.samplers.rule import Rule
from diffmm.samplers.sampling import check_faults, prepare
from diffmm.samplers.state import Problem, Program, State, active_rows, start
from diffmm.typing import Array, Canvas, Params, PredictFn


class Finished(NamedTuple):
    """One completed request, on the host.

    Attributes:
      request: place in the stream of requests, from 0.
      tokens: int32 ``[L]``.
      nfe: denoiser evaluations spent on it.
      logprob: float32 ``[L]``, nats, as in `SampleResult`.
      step_committed: int32 ``[L]``, as in `SampleResult`.
      still_masked: whether it ran out of evaluations.
    """

    request: int
    tokens: np.ndarray
    nfe: int
    logprob: np.ndarray
    step_committed: np.ndarray
    still_masked: bool


def sample_stream(
    predict: PredictFn,
    params: Params,
    requests: Iterable[tuple[Canvas, Array]],
    *,
    slots: int,
    num_generated: int,
    rule: Rule,
    mask_id: int,
    refill_at: int = 1,
    **options: Any,
) -> Iterator[Finished]:
    """Completes requests as they come, ``slots`` at a time.

    Args:
      predict: the denoiser.
      params: its parameters.
      requests: one-row canvases ``[1, L]``, all of one length L, each with its key.
      slots: rows of the batch.
      num_generated: N, most positions that a request generates.
      rule: which positions are committed when.
      mask_id: the mask.
      refill_at: finished rows at which the loop returns to the host; more mean fewer
        interruptions, and more idle rows.
      **options: of `sample`, without ``trace``.

    Yields:
      `Finished`, in the order of completion.

    Raises:
      ValueError: as `sample` does, and for bad numbers of slots.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots!r}")
    if not 1 <= refill_at <= slots:
        raise ValueError(f"refill_at must lie in [1, {slots}], got {refill_at!r}")
    if options.get("trace") is not None:
        raise ValueError(f"trace must be None in a stream, got {options['trace']!r}")
    waiting = enumerate(requests)
    owner: list[int | None] = [None] * slots
    state = problem = None
    idle: list[Canvas] = []
    while True:
        empty = [slot for slot, index in enumerate(owner) if index is None]
        arrived = list(itertools.islice(waiting, len(empty)))
        if arrived:
            rows = dict(zip(empty, (request for _, request in arrived), strict=False))
            owner = [
                arrived[empty.index(slot)][0] if slot in rows else index
                for slot, index in enumerate(owner)
            ]
            if not idle:
                idle = [_without_work(arrived[0][1][0])]
            canvases, keys = zip(
                *(rows.get(slot, (idle[0], _any_key())) for slot in range(slots)),
                strict=True,
            )
            request = prepare(
                predict,
                params,
                _stacked(canvases),
                jnp.stack([_typed(key) for key in keys]),
                rule=rule,
                mask_id=mask_id,
                num_generated=num_generated,
                **options,
            )
            taken = np.isin(np.arange(slots), list(rows))
            incoming = jax.tree.map(jnp.asarray, request.problem)
            fresh = start(
                predict,
                params,
                jnp.asarray(request.tokens),
                incoming,
                request.program,
                spec=request.spec,
            )
            if state is None or problem is None:
                state, problem = fresh, incoming
            else:
                state, problem = _refilled(state, problem, fresh, incoming, taken)
            program, spec = request.program, request.spec
        if all(index is None for index in owner):
            return
        resting = sum(index is None for index in owner)
        until = np.int32(min(resting + refill_at, slots))
        program = program._replace(limits=program.limits._replace(until=until))
        state = resume(predict, params, state, problem, program, spec=spec)
        check_faults(state)
        for slot in _at_rest(state, program):
            index = owner[slot]
            if index is not None:
                yield _finished(index, state, slot)
                owner[slot] = None


def _finished(index: int, state: State, slot: int) -> Finished:
    return Finished(
        request=index,
        tokens=np.asarray(state.tokens[slot]),
        nfe=int(state.nfe[slot]),
        logprob=np.asarray(state.logprob[slot]),
        step_committed=np.asarray(state.committed_at[slot]),
        still_masked=bool(np.asarray(state.remaining[slot]).any()),
    )


def _at_rest(state: State, program: Program) -> list[int]:
    return np.flatnonzero(~np.asarray(active_rows(state, program.limits))).tolist()


@functools.partial(jax.jit, donate_argnames=("state", "problem"))
def _refilled(
    state: State, problem: Problem, fresh: State, incoming: Problem, taken: Array
) -> tuple[State, Problem]:
    def pick(new: Array, old: Array) -> Array:
        if new.ndim == 0:
            return old
        return jnp.where(taken.reshape(taken.shape + (1,) * (new.ndim - 1)), new, old)

    # Keys and values of a new row are computed at its first evaluation, as its age
    # says: what the slot held before is never read.
    kept = state._replace(cache=None)
    state = jax.tree.map(pick, fresh._replace(cache=None), kept)._replace(
        cache=state.cache
    )
    allowed = incoming.allowed
    problem = jax.tree.map(
        pick, incoming._replace(allowed=None), problem._replace(allowed=None)
    )
    return state, problem._replace(allowed=allowed)


def _stacked(canvases: Iterable[Canvas]) -> Canvas:
    fields = zip(*canvases, strict=True)
    return Canvas(*(np.concatenate([np.asarray(x) for x in field]) for field in fields))


def _without_work(canvas: Canvas) -> Canvas:
    nothing = np.zeros_like(np.asarray(canvas.generate))
    return canvas._replace(generate=nothing)


def _typed(key: Array) -> Array:
    key = jnp.asarray(key)
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.reshape(())
    return jax.random.wrap_key_data(key.reshape(-1))


def _any_key() -> Array:
    return jax.random.key(0)
