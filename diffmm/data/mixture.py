"""Mixing sources in token shares, as a pure function of seed and global row index.

``shares`` count tokens (Bethune et al., arXiv 2602.21472, mix by tokens): with mean
maskable tokens per row ℓ_s, rows are drawn with p_s ∝ share_s / ℓ_s. Rows are laid
out by systematic sampling in strata of a fixed number of rows R: row i of stratum k
takes the source whose cumulative interval contains (u_k + i) / R, then a permutation
keyed by (seed, k) shuffles the stratum. Each stratum holds floor or ceil of R·p_s
rows of source s, and the mean over strata is exactly R·p_s.

The stratum does not depend on the batch size. Floor-or-ceil counts inside every
batch, for every batch size, and an order that is independent of the batch size cannot
both hold for three or more sources in general; the stratum is the resolution at which
counts are exact. With strata of one global batch, every batch is exact.
"""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import grain.experimental
import numpy as np

_CHUNK = 4096  # strata whose counts are computed together
_LARGE = 2**20  # longer sources are shuffled without a table (slow for short ones)
_ONE = 32  # probabilities are fixed-point numbers with this many fractional bits


def row_probabilities(
    shares: Mapping[str, float], mean_lengths: Mapping[str, float]
) -> dict[str, float]:
    """Row probabilities that realise token shares: p_s ∝ share_s / ℓ_s.

    Args:
      shares: wanted share of tokens per source, any positive scale.
      mean_lengths: mean maskable tokens per row of every source.

    Returns:
      Probabilities per source of ``mean_lengths``, summing to 1; a source that
      ``shares`` leaves out has 0.

    Raises:
      ValueError: negative shares or sum 0, an unknown source, a mean length ≤ 0.

    >>> p = row_probabilities(dict(a=1, b=1, c=1), dict(a=3072, b=1280, c=512))
    >>> [round(47 * x, 9) for x in p.values()]
    [5.0, 12.0, 30.0]
    """
    for name, share in shares.items():
        if name not in mean_lengths:
            raise ValueError(
                f"shares: unknown source {name!r}; known: {sorted(mean_lengths)}"
            )
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"shares[{name!r}]={share} must be finite and >= 0")
    if not sum(shares.values()) > 0:
        raise ValueError(f"shares={dict(shares)} must have a positive sum")
    for name, length in mean_lengths.items():
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"mean length of {name!r}={length} must be above 0")
    rates = {n: shares.get(n, 0.0) / length for n, length in mean_lengths.items()}
    total = math.fsum(rates.values())
    return {name: rate / total for name, rate in rates.items()}


class Draw(NamedTuple):
    """Which example a row of the stream is.

    Attributes:
      source: name of the source.
      example: index of the example in the source.
      epoch: how many times the source was wholly visited before.
      position: place of the example in the visiting order of this epoch.
    """

    source: str
    example: int
    epoch: int
    position: int


class Mixture:
    """The infinite stream of rows as a random-access sequence of `Draw`.

    Row j is a pure function of (seed, j): its order depends neither on the batch size
    nor on the number of processes nor on restarts. A source visits each of its
    examples once per epoch, in a fresh order every epoch.

    Args:
      lengths: number of examples of every source; the order of names is part of the
        definition of the stream.
      probabilities: row probability of every source (`row_probabilities`).
      seed: any integer.
      stratum: R, rows per stratum.
      num_rows: where the stream ends; None for never.

    Raises:
      ValueError: an empty source that has a positive probability, unequal names,
        probabilities that do not sum to 1, a stratum outside [1, 2^24].
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        probabilities: Mapping[str, float],
        *,
        seed: int,
        stratum: int,
        num_rows: int | None = None,
    ) -> None:
        """See the class."""
        if set(lengths) != set(probabilities) or not lengths:
            raise ValueError(
                f"probabilities are for {sorted(probabilities)}, lengths for "
                f"{sorted(lengths)}; both must name the same sources"
            )
        self.names = tuple(lengths)
        p = np.array([probabilities[name] for name in self.names], np.float64)
        if not (np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1) < 1e-6):
            raise ValueError(
                f"probabilities={dict(probabilities)} must be >= 0 and sum to 1"
            )
        for name in self.names:
            if lengths[name] < 1 and probabilities[name] > 0:
                raise ValueError(f"source {name!r} is empty")
        if not 1 <= stratum <= 2**24:
            raise ValueError(f"stratum={stratum} must be in [1, 2**24]")
        if num_rows is not None and num_rows < 0:
            raise ValueError(f"num_rows={num_rows} must be at least 0")
        self.lengths = tuple(int(lengths[name]) for name in self.names)
        self.seed, self.stratum = int(seed), int(stratum)
        self.num_rows = sys.maxsize if num_rows is None else int(num_rows)
        # Fixed point makes floor-or-ceil counts exact, whatever the rounding of p.
        # The rounding residue goes to the count that is least an integer anyway.
        expected = np.rint(p * (stratum << _ONE)).astype(np.int64)
        fraction = np.abs(p * stratum - np.rint(p * stratum))
        expected[fraction.argmax()] += (stratum << _ONE) - expected.sum()
        self._bounds = np.cumsum(expected)
        self._key = stable_hash(self.seed, "strata")
        self._before = [np.zeros(len(self.names), np.int64)]
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._plans: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._orders: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Rows of the stream."""
        return self.num_rows

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the order of the stream."""
        parts = (self.names, self.lengths, self.seed, self.stratum)
        return f"{stable_hash(0, *parts, *self._bounds.tolist()):016x}"

    def __getitem__(self, row: int) -> Draw:
        """The example at global row index ``row``."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row={row} is outside [0, {self.num_rows})")
        k, i = divmod(int(row), self.stratum)
        sources, ranks = self._plan(k)
        source, rank = int(sources[i]), int(ranks[i])
        epoch, position = divmod(rank, self.lengths[source])
        example = self.example(self.names[source], epoch, position)
        return Draw(self.names[source], example, epoch, position)

    def example(self, source: str, epoch: int, position: int) -> int:
        """The example that ``source`` visits at a position of an epoch."""
        size = self.lengths[self.names.index(source)]
        if size > _LARGE:
            seed = stable_hash(self.seed, source, epoch) & 0xFFFFFFFF
            return int(
                grain.experimental.index_shuffle(
                    position, max_index=size - 1, seed=seed, rounds=4
                )
            )
        with self._lock:
            order = self._orders.get((source, epoch))
            if order is None:
                key = stable_hash(self.seed, source, epoch)
                noise = _keys(key, np.arange(size))
                order = np.argsort(noise, kind="stable").astype(np.int32)
                self._orders[source, epoch] = order
                # Readers run ahead of one another by an epoch of a source at most.
                while len(self._orders) > 3 * len(self.names):
                    self._orders.popitem(last=False)
        return int(order[position])

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """Index into ``names`` of the source of every row, int64 of the same shape."""
        rows = np.asarray(rows, np.int64)
        strata = rows // self.stratum
        out = np.empty(rows.shape, np.int64)
        for k in np.unique(strata).tolist():
            here = strata == k
            out[here] = self._plan(k)[0][rows[here] - k * self.stratum]
        return out

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first ``rows`` rows of the stream each source supplies."""
        k, i = divmod(int(rows), self.stratum)
        totals = self._total_before(k)
        totals = totals + np.bincount(self._plan(k)[0][:i], minlength=len(self.names))
        return dict(zip(self.names, totals.tolist(), strict=True))

    def _plan(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and running count of the source for every row of stratum k."""
        with self._lock:
            found = self._plans.get(k)
        if found is not None:
            return found
        base = self._total_before(k)
        counts = self._counts(np.array([k]))[0]
        noise = _scramble(
            np.arange(self.stratum, dtype=np.uint64) + _keys(self._key + 1, [k])
        )
        order = np.argsort(noise, kind="stable")
        sources = np.repeat(np.arange(len(self.names)), counts)[order]
        ranks = np.empty(self.stratum, np.int64)
        for s in range(len(self.names)):
            here = sources == s
            ranks[here] = base[s] + np.arange(counts[s])
        with self._lock:
            self._plans[k] = (sources, ranks)
            while len(self._plans) > 16:
                self._plans.popitem(last=False)
        return sources, ranks

    def _counts(self, strata: np.ndarray) -> np.ndarray:
        """Rows of every source in each stratum, int64 ``[n, sources]``."""
        u = (_keys(self._key, strata) >> np.uint64(64 - _ONE)).astype(np.int64)
        # Row i belongs to a source whose bound exceeds u + i: ceil(bound − u) rows do.
        ends = -((u[:, None] - self._bounds[None, :]) >> _ONE)
        return np.diff(ends, axis=1, prepend=0)

    def _total_before(self, k: int) -> np.ndarray:
        """Rows of every source before stratum k."""
        chunk, inside = divmod(k, _CHUNK)
        with self._lock:
            while len(self._before) <= chunk:
                c = len(self._before) - 1
                counts = self._counts(np.arange(c * _CHUNK, (c + 1) * _CHUNK))
                self._before.append(self._before[-1] + counts.sum(axis=0))
            if chunk not in self._chunks:
                strata = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
                counts = self._counts(strata)
                self._chunks[chunk] = np.cumsum(counts, axis=0) - counts
                while len(self._chunks) > 4:
                    self._chunks.popitem(last=False)
            return self._before[chunk] + self._chunks[chunk][inside]


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of numbers, strings and tuples, the same in every process.

    >>> stable_hash(0, "a") == stable_hash(0, "a") != stable_hash(1, "a")
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _keys(key: int, indices: np.ndarray | list[int]) -> np.ndarray:
    """One uint64 per index, well mixed and different for every key."""
    base = np.array([key & (2**64 - 1)], np.uint64)
    return _scramble(np.asarray(indices).astype(np.uint64) + _scramble(base))


def _scramble(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, on uint64 arrays (wrapping)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
