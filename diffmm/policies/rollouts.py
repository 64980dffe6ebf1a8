"""Rollouts: completions made by a rule, with a record of every turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffmm.samplers import Rule, SampleResult, Settings, generate, prepare, result_of
from diffmm.samplers.sampling import check_faults
from diffmm.typing import Array, ArrayLike, Canvas, Modality, Params, PredictFn


def rollout(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    key: Array,
    *,
    rule: Rule,
    mask_id: int,
    allowed: ArrayLike | None = None,
    settings: Settings | Mapping[Modality, Settings] | None = None,
    block_length: int | None = None,
    max_forwards: int | None = None,
    block_forwards: int | None = None,
    **options: Any,
) -> SampleResult:
    """`diffmm.samplers.sample` as policies are trained with it: greedy and recorded.

    Tokens are arg-maxima, so that all randomness is the rule's. A row has as many
    forwards as generated positions, and so has a block; a rule that commits nothing
    ends there, with ``still_masked``.

    Args:
      predict: the denoiser.
      params: its parameters.
      canvas: rows to complete.
      key: one key, or one per row.
      rule: a `PolicyRule` in a training mode, or an expert.
      mask_id: the mask.
      allowed: bool ``[4, V]``, ids by modality.
      settings: how tokens are drawn; temperature 0 by default.
      block_length: positions per block; one block by default.
      max_forwards: of a row, N by default; also the length T of the record.
      block_forwards: of a block; its length by default.
      **options: others of `diffmm.samplers.sample`.

    Returns:
      `SampleResult` with ``trace``.

    Raises:
      ValueError: as `diffmm.samplers.sample` does.
    """
    longest = int(np.asarray(canvas.generate).sum(axis=1).max(initial=0))
    budget = max(longest, 1) if max_forwards is None else max_forwards
    if block_forwards is None:
        block_forwards = budget if block_length is None else block_length
    request = prepare(
        predict,
        params,
        canvas,
        key,
        rule=rule,
        mask_id=mask_id,
        allowed=allowed,
        settings=Settings(temperature=0.0) if settings is None else settings,
        block_length=block_length,
        max_forwards=budget,
        block_forwards=block_forwards,
        trace=budget,
        **options,
    )
    state = generate(
        predict,
        params,
        jax.numpy.array(request.tokens),
        request.problem,
        request.program,
        spec=request.spec,
    )
    check_faults(state)
    return result_of(state, request.record)


def repeat_rows(canvas: Canvas, times: int) -> Canvas:
    """Every row ``times`` times, one copy after the other: groups of rollouts."""
    return Canvas(*(np.repeat(np.asarray(field), times, axis=0) for field in canvas))


def prompts_and_completions(
    canvas: Canvas, tokens: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """What a reward is asked about.

    Args:
      canvas: what was given, fields ``[B, L]``.
      tokens: int32 ``[B, L]``, what became of it.

    Returns:
      Given tokens int32 ``[B, P]`` and generated ones int32 ``[B, N]`` in the order of
      the row, then −1. Padding belongs to neither.

    >>> canvas = Canvas(*[np.array([x]) for x in (
    ...     [5, 9, 9, 0], [0, 1, 2, 0], [1, 1, 1, 0], [3, 0, 0, 3], [0, 1, 1, 0],
    ...     [1, 0, 0, 0])])
    >>> print(*prompts_and_completions(canvas, np.array([[5, 6, 7, 0]])))
    [[5]] [[6 7]]
    """
    tokens = np.asarray(tokens)
    generated = np.asarray(canvas.generate, bool)
    given = ~generated & (np.asarray(canvas.segment_ids) > 0)
    return _gathered(tokens, given), _gathered(tokens, generated)


def _gathered(tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    counts = chosen.sum(axis=1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : counts.max(initial=0)]
    found = np.take_along_axis(tokens, order, axis=1)
    inside = np.arange(order.shape[1])[None] < counts[:, None]
    return np.where(inside, found, -1).astype(np.int32)
