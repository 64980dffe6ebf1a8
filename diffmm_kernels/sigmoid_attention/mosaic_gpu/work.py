"""In which order kernels take their work, and which tiles each piece visits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Heads are taken in groups whose keys and values stay in this much of the L2 cache.
_CACHE_BYTES = 32 * 2**20
# Of an H100, where nothing better is known.
_MULTIPROCESSORS = 132


class Work(NamedTuple):
    """Indices of what a thread block computes at a time."""

    batch: Any
    head: Any
    kv_head: Any
    tile: Any


class Grid(NamedTuple):
    """All there is to compute, in the order in which it is best started.

    Attributes:
      batch: B.
      heads: H.
      kv_heads: K.
      tiles: tiles of queries of each head.
      group: key heads (of all rows of the batch) that are worked on together.
      last_first: start with the last tile; under causal masks it has the most keys.
    """

    batch: int
    heads: int
    kv_heads: int
    tiles: int
    group: int
    last_first: bool

    @property
    def size(self) -> int:
        """Number of pieces of work."""
        return self.batch * self.heads * self.tiles

    def work(self, index: Any) -> Work:
        """The ``index``-th piece of work."""
        ratio = self.heads // self.kv_heads
        section, rest = _divmod(index, self.group * ratio * self.tiles)
        tile, rest = _divmod(rest, self.group * ratio)
        if self.last_first:
            tile = self.tiles - 1 - tile
        member, query_head = _divmod(rest, ratio)
        batch, kv_head = _divmod(section * self.group + member, self.kv_heads)
        return Work(batch, kv_head * ratio + query_head, kv_head, tile)


def _divmod(x: Any, y: int) -> tuple[Any, Any]:
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))


def group_size(kv_heads: int, bytes_each: int) -> int:
    """Largest divisor of a number of key heads that fits into the cache."""
    most = max(1, _CACHE_BYTES // bytes_each)
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)


class Loop(NamedTuple):
    """The tiles that one piece of work visits: those without masks come first.

    Attributes:
      low: first tile.
      full_low: first unmasked tile.
      full: number of unmasked tiles.
      count: number of tiles.
    """

    low: Any
    full_low: Any
    full: Any
    count: Any

    def tile(self, step: Any) -> Any:
        """Which tile the ``step``-th is."""
        after = step - self.full  # among the masked ones
        before = self.full_low - self.low
        outside = self.low + after + jnp.where(after < before, 0, self.full)
        return jnp.where(step < self.full, self.full_low + step, outside)


def multiprocessors() -> int:
    """Of the device in use."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.num_cores or _MULTIPROCESSORS
    return getattr(jax.devices()[0], "core_count", None) or _MULTIPROCESSORS
