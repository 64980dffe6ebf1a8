"""Additive counts of rows and tokens, to check realised shares against the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffmm.data.templates import TASKS
from diffmm.typing import Batch


class TokenCounts(NamedTuple):
    """Additive counts of some rows.

    Attributes:
      rows: rows.
      maskable: maskable tokens.
      pad: positions outside every segment.
      positions: all positions (nominal tokens, rows times L).
    """

    rows: int
    maskable: int
    pad: int
    positions: int


def token_counts(
    batch: Batch,
    labels: np.ndarray | None = None,
    names: Sequence[str] = TASKS,
) -> dict[str, TokenCounts]:
    """Rows and tokens of a batch by label.

    Args:
      batch: fields ``[B, L]``.
      labels: int ``[B]``, indices into ``names``; the tasks by default. For counts by
        source pass ``loader.last_sources`` and ``loader.names``.
      names: names of the labels.

    Returns:
      Counts of every name that occurs.
    """
    labels = np.asarray(batch.task if labels is None else labels)
    maskable = np.asarray(batch.maskable).sum(axis=1)
    pad = (np.asarray(batch.segment_ids) == 0).sum(axis=1)
    length = np.shape(batch.tokens)[1]
    if labels.shape != maskable.shape:
        raise ValueError(f"labels: shape {labels.shape} given, {maskable.shape} needed")
    out = {}
    for label in np.unique(labels).tolist():
        here = labels == label
        rows = int(here.sum())
        out[names[label]] = TokenCounts(
            rows, int(maskable[here].sum()), int(pad[here].sum()), rows * length
        )
    return out


def add_counts(
    total: Mapping[str, TokenCounts], more: Mapping[str, TokenCounts]
) -> dict[str, TokenCounts]:
    """The sum of two results of `token_counts`."""
    zero = TokenCounts(0, 0, 0, 0)
    return {
        name: TokenCounts(
            *map(sum, zip(total.get(name, zero), more.get(name, zero), strict=True))
        )
        for name in [*total, *(n for n in more if n not in total)]
    }


def realised_shares(counts: Mapping[str, TokenCounts]) -> dict[str, float]:
    """Share of the maskable tokens by name, to compare with the request."""
    total = sum(c.maskable for c in counts.values())
    return {name: c.maskable / max(total, 1) for name, c in counts.items()}
