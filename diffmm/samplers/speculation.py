"""Lossless speculation for greedy decoding of one token at a time.

From the laws at one state the next decisions are guessed: the best position, the second
best, and so on, each with its arg-max. All states on this path are evaluated in one
batch; a guess is accepted where it equals the decision that its own state asks for.
The tokens are those of sequential decoding, with fewer denoiser calls of more rows
each: a gain as long as a call costs the same for more rows (weights, not products, are
what takes the time).

References:
  Gao et al., "Self Speculative Decoding for Diffusion Large Language Models", arXiv
  2510.04147.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffmm.samplers.evaluation import Scene, evaluate
from diffmm.samplers.law import Law, Reader, reader_of
from diffmm.samplers.rule import Prediction, Window
from diffmm.samplers.rules import FixedQuota
from diffmm.samplers.sampling import prepare
from diffmm.samplers.scores import Drawn, MaxProb, Random, Score
from diffmm.samplers.settings import Settings
from diffmm.samplers.state import (
    Problem,
    Program,
    Spec,
    State,
    leave_blocks,
    start,
    window_of,
)
from diffmm.samplers.statistics import logit_statistics, map_positions
from diffmm.typing import Array, ArrayLike, Canvas, FeatureFn, Params, PredictFn


class SpeculativeResult(NamedTuple):
    """Completed rows.

    Attributes:
      tokens: int32 ``[B, L]``.
      nfe: int32 ``[B]``, denoiser calls while the row was active.
      decisions: int32 ``[B]``, tokens committed: the calls of sequential decoding.
      forwards: int32 ``[]``, denoiser calls, of ``drafts`` times B rows each.
    """

    tokens: Array
    nfe: Array
    decisions: Array
    forwards: Array


def sample_speculatively(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    *,
    mask_id: int,
    drafts: int = 4,
    score: Score | None = None,
    allowed: ArrayLike | None = None,
    suppressed: Sequence[int] = (),
    block_length: int | None = None,
) -> SpeculativeResult:
    """Greedy decoding, one token per decision, several decisions per call.

    Args:
      predict: the denoiser.
      params: its parameters.
      canvas: rows to complete.
      mask_id: the mask.
      drafts: states per row and call; 1 is sequential decoding.
      score: which position comes first; it must not be random. `MaxProb` by default.
      allowed: as in `sample`.
      suppressed: as in `sample`.
      block_length: as in `sample`.

    Returns:
      `SpeculativeResult`; tokens equal those of ``sample`` with
      ``FixedQuota(num_steps=N, score=score)`` and temperature 0.

    Raises:
      ValueError: as `sample` does, for ``drafts`` below 1 and for random scores.
    """
    if drafts < 1:
        raise ValueError(f"drafts must be at least 1, got {drafts!r}")
    score = MaxProb() if score is None else score
    if isinstance(score, Random | Drawn):
        raise ValueError(f"score must not depend on random numbers, got {score!r}")
    request = prepare(
        predict,
        params,
        canvas,
        jax.random.key(0),
        rule=FixedQuota(num_steps=_enough(canvas, block_length), score=score),
        mask_id=mask_id,
        allowed=allowed,
        suppressed=suppressed,
        settings=Settings(temperature=0.0),
        block_length=block_length,
    )
    return _decode(
        predict,
        params,
        jnp.array(request.tokens),
        request.problem,
        request.program,
        score,
        spec=request.spec,
        drafts=drafts,
    )


class _Path(NamedTuple):
    """Guessed decisions ``[B, J − 1]``, best first: columns (K = none) and tokens."""

    columns: Array
    tokens: Array


@functools.partial(
    jax.jit, static_argnames=("predict", "spec", "drafts"), donate_argnames=("tokens",)
)
def _decode(
    predict: PredictFn,
    params: Params,
    tokens: Array,
    problem: Problem,
    program: Program,
    score: Score,
    *,
    spec: Spec,
    drafts: int,
) -> SpeculativeResult:
    num_rows, row_length = tokens.shape
    num_generated = problem.order.shape[1]
    width, size = spec.width, problem.allowed.shape[1]
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    read = Reader(reader_of(predict, params), jnp.asarray(problem.allowed))
    # One row of the batch per state: problem arrays repeated for the denoiser.
    again = functools.partial(jnp.repeat, repeats=drafts, axis=0)
    fixed = [again(jnp.asarray(x)) for x in problem[:4]]
    positions, segment_ids, modality_of, condition = fixed

    def states_on(path: _Path, window: Window, tokens: Array) -> tuple[Array, Array]:
        """Tokens ``[B·J, L]`` and masks ``[B·J, K]`` after 0, 1, … J − 1 guesses."""
        taken = jnp.arange(drafts - 1)[None] < jnp.arange(drafts)[:, None]
        columns = jnp.where(taken[None], path.columns[:, None], width)
        batch = jnp.arange(num_rows)[:, None, None]
        branch = jnp.arange(drafts)[None, :, None]
        masked = jnp.broadcast_to(window.masked[:, None], (num_rows, drafts, width))
        masked = masked.at[batch, branch, columns].set(False, mode="drop")
        clipped = jnp.minimum(columns, width - 1)
        at = jnp.take_along_axis(window.positions[:, None], clipped, axis=2)
        at = jnp.where(columns < width, at, row_length)
        states = jnp.broadcast_to(tokens[:, None], (num_rows, drafts, row_length))
        guessed = jnp.broadcast_to(path.tokens[:, None], columns.shape)
        states = states.at[batch, branch, at].set(guessed, mode="drop")
        return states.reshape(-1, row_length), masked.reshape(-1, width)

    def decisions_at(tokens: Array, masked: Array, window: Window) -> tuple:
        """Columns and tokens ``[B, J, J]``: per state, its best decisions in order."""
        wide = jax.tree.map(again, window)._replace(masked=masked)
        scene = Scene(tokens, positions, segment_ids, condition, wide.positions)
        out = evaluate(
            predict, params, scene, scale=None, mask_id=spec.mask_id, shadows=False
        )
        modality = jnp.take_along_axis(modality_of, wide.positions, axis=1)
        statistics = map_positions(
            lambda law: logit_statistics(read(law)),
            Law(out.features, None, None, modality, None),
            size,
            given=not isinstance(predict, FeatureFn),
        )
        key = jax.random.key(0)  # asked for, never used: the score is not random
        values = jax.vmap(lambda w, p: score(key, w, p))(wide, Prediction(statistics))
        lowest = jnp.finfo(jnp.float32).min
        values = jnp.where(masked, jnp.maximum(values, lowest), -jnp.inf)
        best = jnp.argsort(-values, axis=1, stable=True)[:, :drafts]
        best = jnp.pad(best, ((0, 0), (0, drafts - best.shape[1])))
        real = jnp.arange(drafts)[None] < jnp.sum(masked, axis=1)[:, None]
        columns = jnp.where(real, best, width).astype(jnp.int32)
        chosen = jnp.take_along_axis(statistics.argmax, best, axis=1)
        shape = (num_rows, drafts, drafts)
        return columns.reshape(shape), chosen.reshape(shape)

    def turn(carry: tuple[State, _Path, Array]) -> tuple[State, _Path, Array]:
        state, path, decisions = carry
        active = jnp.any(state.remaining, axis=1)
        window = window_of(problem, state, spec)
        tokens, masked = states_on(path, window, state.tokens)
        columns, chosen = decisions_at(tokens, masked, window)
        # State i + 1 is right if state i is and asks for the guess between them.
        agrees = (columns[:, :-1, 0] == path.columns) & (path.columns < width)
        agrees &= chosen[:, :-1, 0] == path.tokens
        right = jnp.sum(jnp.cumprod(agrees, axis=1, dtype=jnp.int32), axis=1)
        pick = right[:, None, None]
        tokens = jnp.take_along_axis(
            tokens.reshape(num_rows, drafts, row_length), pick, axis=1
        )[:, 0]
        masked = jnp.take_along_axis(
            masked.reshape(num_rows, drafts, width), pick, axis=1
        )[:, 0]
        columns = jnp.take_along_axis(columns, pick, axis=1)[:, 0]
        chosen = jnp.take_along_axis(chosen, pick, axis=1)[:, 0]
        # The decision of the last right state is certain: no guess.
        column = jnp.where(active, columns[:, 0], width)[:, None]
        at = jnp.take_along_axis(
            window.positions, jnp.minimum(column, width - 1), axis=1
        )
        at = jnp.where(column < width, at, row_length)
        tokens = tokens.at[rows, at].set(chosen[:, :1], mode="drop")
        masked = masked.at[rows, column].set(False, mode="drop")
        gone = window.masked & ~masked & active[:, None]
        slot = jnp.where(gone, window.rank, num_generated)
        state = state._replace(
            tokens=jnp.where(active[:, None], tokens, state.tokens),
            remaining=state.remaining.at[rows, slot].set(False, mode="drop"),
            turns=state.turns + active,
            nfe=state.nfe + active,
            counts=state.counts._replace(whole_calls=state.counts.whole_calls + 1),
        )
        before = state.block
        state = leave_blocks(state, problem, program.limits, active, spec)
        stays = (state.block == before)[:, None]
        path = _Path(jnp.where(stays, columns[:, 1:], width), chosen[:, 1:])
        return state, path, decisions + jnp.sum(gone, axis=1, dtype=jnp.int32)

    state = start(predict, params, tokens, problem, program, spec=spec)
    none = jnp.full((num_rows, drafts - 1), width, jnp.int32)
    zero = jnp.zeros((num_rows,), jnp.int32)
    state, _, decisions = jax.lax.while_loop(
        lambda carry: jnp.any(carry[0].remaining),
        turn,
        (state, _Path(none, jnp.zeros_like(none)), zero),
    )
    return SpeculativeResult(
        state.tokens, state.nfe, decisions, state.counts.whole_calls
    )


def _enough(canvas: Canvas, block_length: int | None) -> int:
    """Steps for one token at a time: a multiple of any number of blocks."""
    generate = jnp.asarray(canvas.generate, bool)
    longest = int(jnp.max(jnp.sum(generate, axis=-1), initial=0))
    blocks = -(-longest // block_length) if block_length else 1
    return max(longest, 1) * max(blocks, 1)
