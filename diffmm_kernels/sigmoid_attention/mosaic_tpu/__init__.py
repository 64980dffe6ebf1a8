"""Sigmoid attention on TPUs: three Pallas kernels, forward, dq, and dk with dv.

Each walks a list of its visible tiles; masks are evaluated only in tiles that some pair
is invisible in. Sums are taken in a fixed order: gradients are deterministic.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu import schedule
from diffmm_kernels.sigmoid_attention.mosaic_tpu.dkv_kernel import key_gradients
from diffmm_kernels.sigmoid_attention.mosaic_tpu.dq_kernel import query_gradients
from diffmm_kernels.sigmoid_attention.mosaic_tpu.output_kernel import (
    forward as forward,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import (
    LANES,
    static_problem,
)

#: Tiles of scores of 1024 by 1024 fill most of the vector memory of a core.
MAX_BLOCK = 1024


def supports(operands: Operands, options: Options) -> str | None:
    """None, or why these kernels cannot serve a call.

    Raises:
      ValueError: the user's tiles are not ones that the kernels have.
    """
    if operands.q.dtype == jnp.float64:
        return "q, k, v of float64: TPU kernels compute in float32"
    if options.config is not None:
        for tiles in (options.config.forward, options.config.backward):
            if tiles is None:
                continue
            for name in ("block_q", "block_kv"):
                size = getattr(tiles, name)
                if size % LANES or size > MAX_BLOCK:
                    raise ValueError(
                        f"{name} must be a multiple of {LANES} up to {MAX_BLOCK} in "
                        f"the kernels for TPUs, got {size}"
                    )
    for axis, pass_ in ((2, "forward"), (2, "backward"), (1, "backward")):
        problem = static_problem(operands, options, 2 - axis, pass_)
        blocks = problem.block_q, problem.block_kv
        size = schedule.extent(operands, options, *blocks, axis)
        entries = size.rows * size.steps
        lengths = operands.q.shape[1], operands.k.shape[1]
        tiles_ = max(-(-n // m) for n, m in zip(lengths, blocks, strict=True))
        if entries > schedule.MAX_ENTRIES or tiles_ > schedule.MAX_TILES:
            return (
                f"lengths T, S = {lengths} need a list of {entries} tiles, of "
                f"{schedule.MAX_ENTRIES} that scalar memory holds; pass larger tiles "
                "in config or a smaller batch"
            )
    return None


def backward(operands: Operands, options: Options, do: Any, needs: Needs) -> Gradients:
    """Cotangents of the operands for the cotangent ``do`` of the output."""
    dq, dbias, dlogit_bias = query_gradients(operands, options, do, needs)
    dk, dv = key_gradients(operands, options, do)
    return Gradients(q=dq, k=dk, v=dv, bias=dbias, logit_bias=dlogit_bias)
