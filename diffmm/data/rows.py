"""Row sources: examples that are already codes, as rows of the stream.

A `RowSource` is anything with a length, a mean number of maskable tokens per row and
a ``row`` method that is a pure function of its arguments; loader threads call it
concurrently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffmm.data.layout import RowLayout
from diffmm.data.mixture import stable_hash
from diffmm.data.packing import chunk_documents, pack
from diffmm.data.templates import BadExampleError, template_of
from diffmm.typing import Batch, Modality


@runtime_checkable
class RowSource(Protocol):
    """Random access to the rows of one source of a mixture."""

    @property
    def mean_tokens(self) -> float:
        """Mean maskable tokens per row; turns token shares into row probabilities."""
        ...

    def __len__(self) -> int:
        """Number of rows of an epoch."""
        ...

    def row(self, index: int, *, seed: int = 0, epoch: int = 0) -> Batch:
        """One row without batch axis.

        Args:
          index: in ``[0, len)``.
          seed: the stream's seed for this source; the same in all epochs.
          epoch: how often the source was visited before; augmentations and the
            choice among several captions may depend on it.

        Raises:
          BadExampleError: the example cannot become a row; the loader skips it.
        """
        ...


class PairRows:
    """Text paired with image or audio codes, all pre-encoded.

    Where an example has several captions, the row shows a different one in each
    epoch, in a rotation that starts at a place drawn from (seed, index).

    Args:
      layout: builds the rows.
      task: one of the two-stretch tasks (``t2i``, ``i2t``, ``t2a``, ``a2t``, joint).
      text: per example, the text codes ``[n]`` or a list of alternatives.
      codes: per example, image or audio codes ``[n]``; an array ``[N, n]`` is fine.

    Raises:
      ValueError: the lengths differ, the task has no pairs, no example fits the row.
    """

    def __init__(
        self,
        layout: RowLayout,
        task: str,
        *,
        text: Sequence[Any],
        codes: Sequence[Any],
    ) -> None:
        """See the class."""
        if len(template_of(task)) != 2:
            raise ValueError(f"task={task!r} has no pairs; use TextRows")
        if len(text) != len(codes):
            raise ValueError(
                f"text has {len(text)} examples, codes has {len(codes)}; equal needed"
            )
        self.layout, self.task = layout, task
        self._text, self._codes = text, codes
        self.mean_tokens = self._mean_tokens()

    def _mean_tokens(self) -> float:
        text_first = template_of(self.task)[0][0] is Modality.TEXT
        counts = [
            (len(caption), len(codes), 1.0 / len(captions))
            for item, codes in zip(self._text, self._codes, strict=True)
            for captions in [_alternatives(item)]
            for caption in captions
        ]
        if not counts:
            raise ValueError("text is empty; at least one example is needed")
        table = np.array(counts)
        sizes, which = np.unique(table[:, :2].astype(int), axis=0, return_inverse=True)
        weights = np.bincount(which.reshape(-1), weights=table[:, 2])
        total, used = 0.0, 0.0
        for pair, weight in zip(sizes.tolist(), weights.tolist(), strict=True):
            try:
                order = pair if text_first else pair[::-1]
                row = self.layout.geometry(self.task, tuple(order)).row
            except BadExampleError as error:
                reason = error
                continue
            total += weight * int(row.maskable.sum())
            used += weight
        if not used:
            raise ValueError(f"no example of task {self.task!r} fits its row: {reason}")
        return total / used

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._codes)

    def row(self, index: int, *, seed: int = 0, epoch: int = 0) -> Batch:
        """The row of an example; see `RowSource`."""
        captions = _alternatives(self._text[index])
        choice = 0
        if len(captions) > 1:
            choice = (stable_hash(seed, index) + epoch) % len(captions)
        return self.layout.row(
            self.task, text=captions[choice], codes=self._codes[index]
        )


class TextRows:
    """Tokenised documents, cut where longer than a row and packed by best fit.

    A row holds whole segments ``task_text bos tokens eos``. The pieces of a document
    that was cut are segments of their own; only the last piece ends in ``eos``, since
    the document goes on after the others. No token is lost.

    Args:
      layout: builds the rows.
      documents: per document, text codes ``[n]``.

    Raises:
      ValueError: no tokens at all, or rows too short for a single token.
    """

    def __init__(self, layout: RowLayout, documents: Sequence[Any]) -> None:
        """See the class."""
        if layout.length < 4:
            raise ValueError(f"length={layout.length} must be at least 4 for text rows")
        self.layout = layout
        self._documents = documents
        self._sizes = np.array([len(document) for document in documents], np.int64)
        # The closing token is cut like any other: it counts as a document's last.
        ends = np.where(self._sizes > 0, self._sizes + 1, 0)
        self._pieces = chunk_documents(ends, layout.length - 2)
        if not len(self._pieces.lengths):
            raise ValueError("documents holds no token; at least one is needed")
        self._rows = pack(self._pieces.lengths + 2, layout.length)
        predicted = layout.predicts(Modality.TEXT)
        tokens = int(self._pieces.lengths.sum())
        if predicted:
            last = np.array([row[-1] for row in self._rows])
            used = np.array(
                [int((self._pieces.lengths[row] + 2).sum()) for row in self._rows]
            )
            tokens += int(((layout.length - used) * self._closed(last)).sum())
        self.mean_tokens = tokens / len(self._rows)

    def _closed(self, pieces: np.ndarray) -> np.ndarray:
        stops = self._pieces.stop[pieces]
        return stops == self._sizes[self._pieces.document[pieces]] + 1

    def __len__(self) -> int:
        """Number of packed rows."""
        return len(self._rows)

    def row(self, index: int, *, seed: int = 0, epoch: int = 0) -> Batch:
        """A packed row; see `RowSource`. Neither seed nor epoch matters."""
        del seed, epoch
        pieces = np.array(self._rows[index])
        parts = [
            self._documents[document][start:stop]
            for document, start, stop in zip(
                self._pieces.document[pieces].tolist(),
                self._pieces.start[pieces].tolist(),
                self._pieces.stop[pieces].tolist(),
                strict=True,
            )
        ]
        return self.layout.text_row(parts, closed=self._closed(pieces).tolist())


def _alternatives(item: Any) -> Sequence[Any]:
    """The captions of an example: the item itself, or the items that it lists."""
    if isinstance(item, np.ndarray):
        return [item] if item.ndim == 1 else list(item)
    if len(item) and not np.isscalar(item[0]):
        return item
    return [item]
