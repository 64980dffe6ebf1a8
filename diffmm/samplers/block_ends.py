"""Where a block of semi-autoregressive generation ends.

References:
  Lu et al., "AdaBlock-dLLM: Semantic-Aware Diffusion LLM Inference via Adaptive Block
  Size", arXiv 2509.26432.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.checks import check_number
from diffmm.samplers.rule import Window, best_ranked
from diffmm.samplers.statistics import Statistics
from diffmm.typing import Array, ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveEnds:
    """Blocks end after the most confidently predicted delimiter (AdaBlock).

    At the first evaluation of a block, the masked positions within ``share`` of the
    row's generated length, counted from the start of the block, are looked at. Among
    those whose arg-max is a delimiter the most confident one ends the block, itself
    included, if its probability is at least ``threshold``. Else the block has its
    ordinary length. It costs no evaluation of its own.

    Attributes:
      delimiter_ids: what ends a block, such as the newline.
      share: in (0, 1].
      threshold: ≥ 0; above 1 blocks always have their ordinary length.
    """

    delimiter_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    share: ArrayLike | float = 0.25
    threshold: ArrayLike | float = 0.3

    def check(self, vocabulary_size: int) -> None:
        """Raises ``ValueError`` on bad fields; runs on the host."""
        ids = self.delimiter_ids
        try:
            fits = bool(ids) and all(
                0 <= operator.index(token) < vocabulary_size for token in ids
            )
        except TypeError:
            fits = False
        if not (isinstance(ids, tuple) and fits):
            raise ValueError(
                f"delimiter_ids must be a tuple of ids in [0, {vocabulary_size}), "
                f"got {ids!r}"
            )
        check_number("share", self.share, high=1.0, above_low=True)
        check_number("threshold", self.threshold)

    def width(self, block_length: int, num_generated: int) -> int:
        """How many positions have to be scored; runs on the host.

        Args:
          block_length: ordinary length of a block.
          num_generated: most generated positions of a row.

        Returns:
          At least ``block_length``, at most ``num_generated``.
        """
        # In float32, as `reach` computes it.
        reach = int(np.float32(self.share) * np.float32(num_generated))
        return min(max(block_length, reach), max(num_generated, 1))

    def reach(self, count: Array) -> Array:
        """How many positions are looked at, of ``count`` generated ones; int32."""
        far = jnp.float32(self.share) * count.astype(jnp.float32)
        return jnp.maximum(far.astype(jnp.int32), 1)

    def __call__(
        self, window: Window, statistics: Statistics, default_end: Array
    ) -> Array:
        """The rank at which the block of one row ends; that rank is not in it.

        Args:
          window: of the row; its positions reach as far as `width` says.
          statistics: of the window, fields ``[K]``.
          default_end: int32 ``[]``, where the block ends without a delimiter.

        Returns:
          int32 ``[]``, above ``window.start`` and at most ``window.count``.
        """
        last = window.start + self.reach(window.count)
        near = window.remaining & (window.rank >= window.start) & (window.rank < last)
        ids = jnp.asarray(self.delimiter_ids, jnp.int32)
        ends = near & jnp.isin(statistics.argmax, ids)
        best = best_ranked(statistics.max_prob, ends)
        sure = jnp.any(best & (statistics.max_prob >= self.threshold))
        end = jnp.max(jnp.where(best, window.rank, -1)) + 1
        return jnp.where(sure, end, default_end)
