"""Several short rows in one: pairs that fill half a row need not pad the other half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffmm.data.mixture import stable_hash
from diffmm.data.rows import RowSource
from diffmm.data.templates import BadExampleError
from diffmm.typing import Batch, Group, Modality

_EMPTY = {
    "positions": 0,
    "segment_ids": 0,
    "modality": Modality.NONE,
    "maskable": False,
    "condition": False,
    "loss_weight": 0.0,
    "group": Group.NONE,
}


def join(rows: Sequence[Batch], length: int, *, pad_id: int) -> Batch:
    """Joins rows without batch axis into one; segments are numbered on.

    Args:
      rows: rows of one task; their own padding is dropped.
      length: L of the result.
      pad_id: fills the rest.

    Returns:
      A `Batch` without batch axis, fields ``[L]``. Attention never crosses segments
      and positions restart in each, so a joined row means what its parts mean.

    Raises:
      BadExampleError: the parts need more than ``length`` positions.
    """
    used = [int(np.count_nonzero(row.segment_ids)) for row in rows]
    total = sum(used)
    if total > length:
        raise BadExampleError(
            f"the {len(rows)} rows to join need {total} positions, length={length}"
        )
    fields = {}
    for name in Batch._fields[:-1]:
        parts = [
            np.asarray(getattr(row, name))[:n]
            for row, n in zip(rows, used, strict=True)
        ]
        if name == "segment_ids":
            ends = np.cumsum([part.max() for part in parts])
            parts = [p + e - p.max() for p, e in zip(parts, ends, strict=True)]
        fill = pad_id if name == "tokens" else _EMPTY[name]
        out = np.full(length, fill, np.asarray(getattr(rows[0], name)).dtype)
        np.concatenate(parts, out=out[:total])
        fields[name] = out
    return Batch(**fields, task=rows[0].task)


class JoinedRows:
    """Rows of another source, ``per_row`` to a row, with new neighbours every epoch.

    Args:
      rows: the source of the parts; every part must begin at position 0.
      per_row: parts to a row.
      length: L of the joined rows.
      pad_id: fills the rest of a row.

    Raises:
      ValueError: ``per_row`` below 1.
    """

    def __init__(
        self, rows: RowSource, *, per_row: int, length: int, pad_id: int
    ) -> None:
        """See the class."""
        if per_row < 1:
            raise ValueError(f"per_row={per_row} must be at least 1")
        self._rows, self._per_row = rows, per_row
        self._length, self._pad_id = length, pad_id
        self._last: tuple[Any, np.ndarray] = (None, np.empty(0, np.int64))

    @property
    def mean_tokens(self) -> float:
        """Mean maskable tokens per joined row."""
        return self._rows.mean_tokens * self._per_row

    def __len__(self) -> int:
        """Joined rows of an epoch; the last one may repeat a part to be full."""
        return -(-len(self._rows) // self._per_row)

    def row(self, index: int, *, seed: int = 0, epoch: int = 0) -> Batch:
        """A joined row; see `diffmm.data.rows.RowSource`."""
        number = len(self._rows)
        order = self._order(seed, epoch)
        slots = np.arange(index * self._per_row, (index + 1) * self._per_row)
        parts = [
            self._rows.row(int(part), seed=seed, epoch=epoch)
            for part in order[slots % number]
        ]
        return join(parts, self._length, pad_id=self._pad_id)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the last one is kept."""
        known, order = self._last
        if known != (seed, epoch):
            rng = np.random.default_rng(stable_hash(seed, epoch))
            order = rng.permutation(len(self._rows))
            self._last = ((seed, epoch), order)
        return order
