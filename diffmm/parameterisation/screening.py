"""Judging trials by less, and by more, than one training run: stopping, rescoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def rescore(
    losses: Sequence[float] | np.ndarray,
    top: int,
    evaluate: Callable[[list[int]], Sequence[float] | np.ndarray],
) -> np.ndarray:
    """Evaluates the best of a batch again, before they are told.

    The lowest of many noisy losses is low by luck too. Told as it is, it sets a mark
    that later and better points do not reach. The loss of the start should come from
    the same new seeds.

    Args:
      losses: of one batch, first evaluation.
      top: how many of the lowest finite ones to evaluate again, at least 1.
      evaluate: maps positions in ``losses`` to new losses, with new seeds.

    Returns:
      float64 ``[n]``: the new losses, and ``inf`` for all that were not evaluated
      again, which can then not become the center.

    Raises:
      ValueError: ``top`` below 1, or a wrong number of new losses.

    >>> rescore([2.0, 1.0, 1.5], 2, lambda indices: [1.4, 1.2]).tolist()
    [inf, 1.4, 1.2]
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    first = np.asarray(losses, np.float64)
    first = np.where(np.isfinite(first), first, np.inf)
    order = [int(i) for i in np.argsort(first, kind="stable")[:top]]
    chosen = [i for i in order if math.isfinite(first[i])]
    result = np.full(first.shape, np.inf)
    if chosen:
        again = np.asarray(evaluate(chosen), np.float64)
        if again.shape != (len(chosen),):
            raise ValueError(
                f"evaluate must return {len(chosen)} losses, got shape {again.shape}"
            )
        result[chosen] = np.where(np.isfinite(again), again, np.inf)
    return result


def should_stop(
    losses: Sequence[float] | np.ndarray,
    incumbent: Sequence[float] | np.ndarray,
    *,
    margin: float,
    decay: float = 0.9,
) -> bool:
    """Whether a trial's loss curve has left the incumbent's behind, upwards.

    Compares exponential moving averages (with bias correction) at the trial's last
    step. A trial that was stopped is told as ``inf``.

    Args:
      losses: ``[k]``, of the trial so far.
      incumbent: ``[K]``, K >= k, the same of the best point.
      margin: nats by which the trial may be worse.
      decay: of the averages per step, in [0, 1).

    Raises:
      ValueError: ``decay`` outside [0, 1), a ``margin`` that is negative or NaN, an
        empty curve, or an incumbent shorter than the trial.
    """
    trial, best = np.asarray(losses, np.float64), np.asarray(incumbent, np.float64)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if not 1 <= len(trial) <= len(best):
        raise ValueError(
            f"losses must have between 1 and {len(best)} steps, those of incumbent, "
            f"got {len(trial)}"
        )
    weights = decay ** np.arange(len(trial))[::-1]
    weights = weights / weights.sum()
    if not np.all(np.isfinite(trial)):
        return True
    return bool(weights @ trial > weights @ best[: len(trial)] + margin)
