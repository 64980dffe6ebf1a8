"""Which keys and values a step computes anew, and which it takes from a cache.

A denoiser with a cache (`diffmm.typing.CachedFn`) evaluates any set of positions
against the stored keys and values of all others. A strategy says, before each
evaluation, which rows are computed whole (``refresh``) and which positions of the other
rows are computed (``want``). Rows are treated one by one: what a row becomes does not
depend on when its neighbours refresh. All strategies but `Exact` are approximations of
a bidirectional model, which refreshed in every evaluation equal no cache.

References:
  Wu et al., "Fast-dLLM", arXiv 2505.22618 (prefix, dual); Ma et al., "dKV-Cache", arXiv
  2505.15781 (delayed); Arriola et al., "Block Diffusion", arXiv 2503.09573 (exact).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.typing import Array, CachedFn, PredictFn


class CacheView(NamedTuple):
    """What a strategy may look at; bool ``[B, L]`` over positions unless said.

    Attributes:
      exists: positions of a segment.
      block: positions of the row's block.
      masked: generated positions that are still masked.
      fresh: positions whose token changed in the row's previous evaluation.
      positions: int32 ``[B, L]``.
      segment_ids: int32 ``[B, L]``.
      first: int32 ``[B]``, index in the row of the block's first position.
      entered: bool ``[B]``, the row is at the entry of its block.
      age: int32 ``[B]``, evaluations since the last refresh; −1 before the first.
      causal_block: the denoiser's, an int that is known when tracing.
    """

    exists: Array
    block: Array
    masked: Array
    fresh: Array
    positions: Array
    segment_ids: Array
    first: Array
    entered: Array
    age: Array
    causal_block: int


class CacheStrategy:
    """How keys and values are kept.

    Attributes:
      aligned: blocks of the loop end where blocks of a block-causal model end.
    """

    aligned: ClassVar[bool] = False

    def check(self, predict: PredictFn, block_length: int | None) -> None:
        """Raises ``ValueError`` where the denoiser and the strategy do not fit."""
        _check_denoiser(type(self).__name__, predict)
        assert isinstance(predict, CachedFn)
        if predict.causal_block:
            raise ValueError(
                f"cache must be Exact() for a block-causal denoiser (causal_block="
                f"{predict.causal_block}), got {type(self).__name__}()"
            )
        every = getattr(self, "refresh_every", None)
        if every is not None and int(every) < 1:
            raise ValueError(f"refresh_every must be at least 1, got {every!r}")

    def refresh(self, view: CacheView) -> Array:
        """Rows to compute whole, bool ``[B]``."""
        raise NotImplementedError

    def want(self, view: CacheView) -> Array:
        """Positions to compute in the other rows, bool ``[B, L]``."""
        raise NotImplementedError

    def sizes(self, width: int, row_length: int, contiguous: bool) -> tuple[int, ...]:
        """Numbers of positions per row to compile for, rising.

        The smallest that holds what all rows want is used.

        Args:
          width: positions of a block, those that a shifted denoiser reads included.
          row_length: L.
          contiguous: the positions of every block are adjacent.
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(CacheStrategy):
    """Keeps what lies before the block; computes the block and all after it.

    Attributes:
      refresh_every: compute whole rows at least every so many evaluations, beside
        the entry of each block; ``None`` for at the entries only.
    """

    refresh_every: Any = None

    def refresh(self, view: CacheView) -> Array:
        """At block entries."""
        return view.entered | _overdue(view, self.refresh_every)

    def want(self, view: CacheView) -> Array:
        """From the block's first position on."""
        index = jnp.arange(view.exists.shape[1], dtype=jnp.int32)
        return view.exists & (index[None] >= view.first[:, None])

    def sizes(self, width: int, row_length: int, contiguous: bool) -> tuple[int, ...]:
        """The block, four times as much, and so on, to L."""
        return _geometric(width, row_length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dual(CacheStrategy):
    """Keeps what lies before and after the block; computes the block alone.

    Attributes:
      refresh_every: as in `Prefix`.
      vicinity: positions before and after the block that are computed too (16 in
        dInfer).

    References:
      Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language
      Models", arXiv 2510.08666 (vicinity).
    """

    refresh_every: Any = None
    vicinity: int = dataclasses.field(default=0, metadata={"static": True})

    def check(self, predict: PredictFn, block_length: int | None) -> None:
        """Refuses a negative vicinity too."""
        super().check(predict, block_length)
        if self.vicinity < 0:
            raise ValueError(f"vicinity must be at least 0, got {self.vicinity!r}")

    def refresh(self, view: CacheView) -> Array:
        """At block entries."""
        return view.entered | _overdue(view, self.refresh_every)

    def want(self, view: CacheView) -> Array:
        """The block and its vicinity."""
        near = view.block.astype(jnp.float32)
        if self.vicinity:
            reach = (1, 2 * self.vicinity + 1)
            near = jax.lax.reduce_window(near, 0.0, jax.lax.max, reach, (1, 1), "SAME")
        return view.exists & (near > 0)

    def sizes(self, width: int, row_length: int, contiguous: bool) -> tuple[int, ...]:
        """The block with its vicinity; for scattered blocks L as well."""
        near = min(width + 2 * self.vicinity, row_length)
        return (near,) if contiguous else tuple(sorted({near, row_length}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed(CacheStrategy):
    """Stores a token one evaluation after it was decoded; masks are never stored.

    Attributes:
      refresh_every: compute whole rows every so many evaluations (4 to 16 in the
        paper); ``None`` for at the first evaluation only.
    """

    refresh_every: Any = 8

    def refresh(self, view: CacheView) -> Array:
        """At the first evaluation and when overdue."""
        return (view.age < 0) | _overdue(view, self.refresh_every)

    def want(self, view: CacheView) -> Array:
        """What is masked, and what was not masked for the first time."""
        return view.exists & (view.masked | view.fresh | view.block)

    def sizes(self, width: int, row_length: int, contiguous: bool) -> tuple[int, ...]:
        """As for `Prefix`: it shrinks as the row fills."""
        return _geometric(width, row_length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(CacheStrategy):
    """For block-causal models: finished blocks never change, so their cache is exact.

    The first evaluation of a block also computes the block before it, which is clean
    only now: no evaluation is spent on storing it.
    """

    aligned: ClassVar[bool] = True

    def check(self, predict: PredictFn, block_length: int | None) -> None:
        """Asks for a block-causal denoiser and its block length."""
        _check_denoiser("Exact", predict)
        assert isinstance(predict, CachedFn)
        if not predict.causal_block:
            raise ValueError(
                "cache=Exact() needs a block-causal denoiser, got causal_block=0; use "
                "Prefix(), Dual() or Delayed()"
            )
        if block_length != predict.causal_block:
            raise ValueError(
                f"block_length must be the denoiser's causal_block, "
                f"{predict.causal_block}, with cache=Exact(), got {block_length!r}"
            )

    def refresh(self, view: CacheView) -> Array:
        """At the first evaluation: the prompt is computed."""
        return view.age < 0

    def want(self, view: CacheView) -> Array:
        """The model's block of the window, and at its entry the block before."""
        first = view.first[:, None]
        number = view.positions // view.causal_block
        current = jnp.take_along_axis(number, first, axis=1)
        segment = jnp.take_along_axis(view.segment_ids, first, axis=1)
        before = view.entered[:, None] & (number == current - 1)
        same = view.exists & (view.segment_ids == segment)
        return same & ((number == current) | before)

    def sizes(self, width: int, row_length: int, contiguous: bool) -> tuple[int, ...]:
        """One block, and two."""
        return tuple(sorted({min(width, row_length), min(2 * width, row_length)}))


def _check_denoiser(name: str, predict: PredictFn) -> None:
    if not isinstance(predict, CachedFn):
        raise ValueError(
            f"cache={name}() needs a denoiser with cached_features (see "
            f"diffmm.typing.CachedFn), got {predict!r}"
        )


def _overdue(view: CacheView, every: Any) -> Array:
    never = view.age < 0
    return never if every is None else never | (view.age + 1 >= jnp.asarray(every))


def _geometric(width: int, row_length: int) -> tuple[int, ...]:
    sizes = [min(width, row_length)]
    while sizes[-1] < row_length:
        sizes.append(min(4 * sizes[-1], row_length))
    return tuple(sizes)
