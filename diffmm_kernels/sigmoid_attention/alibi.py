"""Slopes of ALiBi."""

from __future__ import annotations

import numpy as np


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of ALiBi, ``2^(-8(h + 1) / H)`` for H a power of two.

    Otherwise those of the largest power of two H' below H, followed by every second of
    those of 2H', from the first on, until there are H.

    Args:
      num_heads: H.

    Returns:
      float32 ``[H]``.

    Raises:
      ValueError: fewer than one head.

    References:
      Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables
      Input Length Extrapolation", arXiv 2108.12409.

    Example:
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")

    def geometric(heads: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)

    power = 1 << (num_heads.bit_length() - 1)
    slopes = geometric(power)
    if power < num_heads:
        slopes = np.concatenate([slopes, geometric(2 * power)[::2]])
    return slopes[:num_heads].astype(np.float32)
