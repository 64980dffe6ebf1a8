"""Kernels for Hopper GPUs (compute capability 9.0) in Pallas' Mosaic GPU dialect.

Tensor memory accelerator and wgmma, one warpgroup that loads and two that compute. They
lower on every supported JAX without a GPU and run in Pallas' interpreter from jax
0.11.2 on.
"""

from __future__ import annotations

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.mosaic_gpu.backward import (
    backward as backward,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.backward import (
    backward_tiles,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import refusal
from diffmm_kernels.sigmoid_attention.mosaic_gpu.forward import (
    forward as forward,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.forward import (
    forward_tiles,
)


def supports(operands: Operands, options: Options) -> str | None:
    """None, or the reason why these kernels cannot serve a call.

    Raises:
      ValueError: the user's tiles are not ones that the kernels have.
    """
    reason = refusal(operands, options)
    if reason is None:
        forward_tiles(operands, options)
        backward_tiles(operands, options)
    return reason
