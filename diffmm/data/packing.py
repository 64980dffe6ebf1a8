"""Cutting documents into chunks and packing chunks into rows, without losing a token.

Best-fit decreasing keeps text rows nearly full ("Fewer Truncations Improve Language
Modeling", Ding et al., arXiv 2404.10830, packs the same way).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Chunks(NamedTuple):
    """Pieces of documents: piece j is ``document[j]``'s ``[start[j], stop[j])``.

    Attributes:
      document: int64 ``[n]``, index of the document.
      start: int64 ``[n]``, first token.
      stop: int64 ``[n]``, one past the last token.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every piece, int64 ``[n]``."""
        return self.stop - self.start


def chunk_documents(lengths: Sequence[int] | np.ndarray, max_length: int) -> Chunks:
    """Cuts documents longer than ``max_length`` into consecutive pieces.

    Every piece but a document's last has exactly ``max_length`` tokens; the pieces
    of a document, joined, are the document. Empty documents have no piece.

    Args:
      lengths: tokens of every document, ``[n]``.
      max_length: the longest piece allowed, at least 1.

    Returns:
      The pieces in document order.

    >>> chunk_documents([5, 0, 2], 3)._asdict()
    {'document': array([0, 0, 2]), 'start': array([0, 3, 0]), 'stop': array([3, 5, 2])}
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1")
    sizes = _lengths(lengths, minimum=0)
    pieces = -(-sizes // max_length)
    document = np.repeat(np.arange(len(sizes)), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - first[document]) * max_length
    return Chunks(document, start, np.minimum(start + max_length, sizes[document]))


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into bins by best-fit decreasing.

    Each item, longest first, goes into the fullest bin that still has room. Open
    bins are kept by remaining room, so the cost is O(n log n) for n items.

    Args:
      lengths: sizes of the items, each in ``[1, capacity]``.
      capacity: size of a bin.

    Returns:
      Bins, each a list of indices into ``lengths``, longest item first.

    Raises:
      ValueError: an item is empty or larger than a bin.

    >>> pack([4, 7, 3, 6], capacity=10)
    [[1, 2], [3, 0]]
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1")
    sizes = _lengths(lengths, minimum=1)
    if len(sizes) and sizes.max() > capacity:
        worst = int(sizes.argmax())
        raise ValueError(
            f"lengths[{worst}]={sizes[worst]} is larger than capacity={capacity}"
        )
    bins: list[list[int]] = []
    rooms: list[int] = []  # sorted distinct rooms > 0 that some open bin has
    by_room: dict[int, list[int]] = {}
    order = np.argsort(-sizes, kind="stable")
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            target, left = len(bins), capacity - size
            bins.append([item])
        else:
            room = rooms[place]
            candidates = by_room[room]
            target, left = candidates.pop(), room - size
            if not candidates:
                del by_room[room], rooms[place]
            bins[target].append(item)
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(target)
    return bins


def fill_rate(
    lengths: Sequence[int] | np.ndarray, bins: Sequence[Sequence[int]], capacity: int
) -> float:
    """Share of all bin positions that hold a token, in [0, 1]."""
    total = len(bins) * capacity
    used = int(np.sum([np.sum(np.asarray(lengths)[list(b)]) for b in bins]))
    return used / total if total else 1.0


def _lengths(lengths: Sequence[int] | np.ndarray, *, minimum: int) -> np.ndarray:
    sizes = np.asarray(lengths, np.int64)
    if sizes.ndim != 1:
        raise ValueError(f"lengths: shape {sizes.shape} given, one axis needed")
    if len(sizes) and sizes.min() < minimum:
        worst = int(sizes.argmin())
        raise ValueError(f"lengths[{worst}]={sizes[worst]} must be at least {minimum}")
    return sizes
