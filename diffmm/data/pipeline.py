"""From row sources to batches: a checkpointable grain iterator.

Every process reads its own rows of each global batch, interleaved as
``i = process + num_processes * local``, so that each also holds evenly spaced strata
of the diffusion time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from diffmm.data.canvases import stack
from diffmm.data.mixture import Mixture, row_probabilities, stable_hash
from diffmm.data.rows import RowSource
from diffmm.data.templates import BadExampleError
from diffmm.data.validate import validate_batch
from diffmm.data.vocabulary import JointVocabulary
from diffmm.typing import Batch

_LOG = logging.getLogger("diffmm.data")
_MAX_SKIPS = 1000  # consecutive bad examples after which a source counts as broken


def process_rows(
    batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    """Indices, within the global batch, of the rows that a process holds.

    Args:
      batch_size: rows of the global batch.
      process_index: which process.
      process_count: number of processes; must divide ``batch_size``.

    Returns:
      int32 ``[batch_size / process_count]``.

    >>> process_rows(8, process_index=1, process_count=4)
    array([1, 5], dtype=int32)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"process_count={process_count} must divide batch_size={batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} outside [0, {process_count})")
    return np.arange(process_index, batch_size, process_count, dtype=np.int32)


class _Reader:
    """Rows of the stream by global index, with bad examples replaced."""

    def __init__(self, sources: Mapping[str, RowSource], mixture: Mixture) -> None:
        self.sources, self.mixture = sources, mixture
        self.seeds = {n: stable_hash(mixture.seed, "rows", n) for n in sources}
        self.bad: dict[str, set[int]] = {name: set() for name in sources}
        self._lock = threading.Lock()

    def row(self, index: int) -> Batch:
        draw = self.mixture[index]
        source, name = self.sources[draw.source], draw.source
        example, size = draw.example, len(source)
        # The replacement is the next good example in this epoch's visiting order:
        # again a pure function of the row index.
        for step in range(1, min(size, _MAX_SKIPS) + 1):
            # Known bad examples are tried again: what makes them bad (a long caption)
            # may change with the epoch, and the outcome must not depend on history.
            try:
                return source.row(example, seed=self.seeds[name], epoch=draw.epoch)
            except BadExampleError as error:
                self._skip(name, example, error)
            position = (draw.position + step) % size
            example = self.mixture.example(name, draw.epoch, position)
        raise ValueError(
            f"sources[{name!r}]: no usable example among {min(size, _MAX_SKIPS)} tried"
        )

    def _skip(self, name: str, example: int, error: BadExampleError) -> None:
        with self._lock:
            known = example in self.bad[name]
            self.bad[name].add(example)
            count = len(self.bad[name])
        if (
            not known and count & (count - 1) == 0
        ):  # powers of two: a broken source is not a flood
            _LOG.warning(
                "source %r: example %d skipped (%s); %d skipped so far",
                name,
                example,
                error,
                count,
            )


class _Batches:
    """The batches of one process as a random-access source for grain."""

    def __init__(
        self,
        reader: _Reader,
        start_row: int,
        batch_size: int,
        rows: np.ndarray,
        vocabulary: JointVocabulary | None,
    ) -> None:
        self._reader, self._start, self._size = reader, start_row, batch_size
        self._rows = rows.tolist()
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return max(len(self._reader.mixture) - self._start, 0) // self._size

    def __getitem__(self, step: int) -> Batch:
        first = self._start + int(step) * self._size
        batch = stack([self._reader.row(first + i) for i in self._rows])
        if self._vocabulary is not None:
            validate_batch(batch, self._vocabulary)
        return batch


class Loader(grain.DatasetIterator):
    """Iterator over a process's part of each global batch; made by `make_loader`.

    Its whole state is the index of the next global row, so a run may resume with
    another batch size, number of processes or number of threads and still see the
    same stream. ``grain.checkpoint.CheckpointSave`` takes it as it is.

    Attributes:
      mixture: the stream.
      names: source names, in the order of ``last_sources``.
      last_sources: int64 ``[rows]``, source of each row of the last batch.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        mixture: Mixture,
        *,
        batch_size: int,
        rows: np.ndarray,
        options: grain.ReadOptions,
        vocabulary: JointVocabulary | None = None,
    ) -> None:
        """Use `make_loader`."""
        super().__init__()
        self.mixture, self.batch_size = mixture, batch_size
        self.names = mixture.names
        self._rows, self._options = rows.astype(np.int64), options
        self._vocabulary = vocabulary
        self._reader = _Reader(sources, mixture)
        self._open(0)

    def _open(self, next_row: int) -> None:
        self._next_row = next_row
        self.last_sources = np.zeros(0, np.int64)
        batches = _Batches(
            self._reader, next_row, self.batch_size, self._rows, self._vocabulary
        )
        dataset = grain.MapDataset.source(batches)
        self._batches = iter(dataset.to_iter_dataset(self._options))

    def __next__(self) -> Batch:
        """The next batch, fields ``[batch_size / process_count, L]``."""
        batch = next(self._batches)
        self.last_sources = self.mixture.sources(self._next_row + self._rows)
        self._next_row += self.batch_size
        return batch

    @property
    def skipped(self) -> dict[str, int]:
        """Distinct bad examples met so far by source, prefetched rows included."""
        return {name: len(bad) for name, bad in self._reader.bad.items()}

    @property
    def next_row(self) -> int:
        """Global index of the first row of the next batch."""
        return self._next_row

    def get_state(self) -> dict[str, Any]:
        """A JSON-serialisable state."""
        return {"next_row": self._next_row, "mixture": self.mixture.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the row that a state names.

        Raises:
          ValueError: the state is of a stream with other sources, shares, seed or
            stratum; drop its "mixture" entry to continue with the new one on purpose.
        """
        found = state.get("mixture", self.mixture.fingerprint)
        if found != self.mixture.fingerprint:
            raise ValueError(
                f"state: mixture={found!r} differs from {self.mixture.fingerprint!r}: "
                "sources, shares, seed or stratum changed (the stratum defaults to the "
                "batch size: pass stratum= to change the batch size within a run)"
            )
        next_row = int(state["next_row"])
        if not 0 <= next_row <= len(self.mixture):
            raise ValueError(f"state: next_row={next_row} is outside the stream")
        self._batches.close()
        self._open(next_row)

    def start_prefetch(self) -> None:
        """Starts reading ahead before the first batch is asked for."""
        self._batches.start_prefetch()

    def close(self) -> None:
        """Ends the reading threads."""
        self._batches.close()
        super().close()


def make_loader(
    sources: Mapping[str, RowSource],
    shares: Mapping[str, float] | None = None,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    stratum: int | None = None,
    num_rows: int | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
    vocabulary: JointVocabulary | None = None,
) -> Loader:
    """Batches of a mixture of sources.

    Args:
      sources: name to `RowSource`; their order is part of the stream's definition.
      shares: name to token share, on any scale; equal shares by default.
      batch_size: rows of the global batch.
      seed: any integer.
      process_index: this process, for example ``jax.process_index()``.
      process_count: number of processes; must divide ``batch_size``.
      stratum: rows within which row counts are exact (`Mixture`); the batch size by
        default. Give it explicitly if the batch size may change within a run.
      num_rows: rows of the stream, None for no end; an incomplete last batch is
        dropped.
      num_threads: reading threads; 0 reads in the caller.
      prefetch: batches read ahead.
      vocabulary: if given, every batch goes through `validate_batch`.

    Returns:
      A `Loader`: an iterator of `Batch` with ``get_state`` and ``set_state``.

    Raises:
      ValueError: bad shares, an empty source, sizes out of range.
    """
    if not sources:
        raise ValueError("sources is empty; at least one is needed")
    rows = process_rows(
        batch_size, process_index=process_index, process_count=process_count
    )
    if num_threads < 0 or prefetch < 0:
        raise ValueError(
            f"num_threads={num_threads} and prefetch={prefetch} must be at least 0"
        )
    if shares is None:
        shares = dict.fromkeys(sources, 1.0)
    means = {name: source.mean_tokens for name, source in sources.items()}
    mixture = Mixture(
        {name: len(source) for name, source in sources.items()},
        row_probabilities(shares, means),
        seed=seed,
        stratum=batch_size if stratum is None else stratum,
        num_rows=num_rows,
    )
    threads = min(num_threads, prefetch)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
    )
    return Loader(
        sources,
        mixture,
        batch_size=batch_size,
        rows=rows,
        options=options,
        vocabulary=vocabulary,
    )
