"""Forward kernel: ``o = Σ_j p_j v_j``."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.mosaic_tpu.launch import call, flagged, visit
from diffmm_kernels.sigmoid_attention.mosaic_tpu.layout import Output, tensors
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import At, static_problem
from diffmm_kernels.sigmoid_attention.mosaic_tpu.schedule import FIRST, LAST
from diffmm_kernels.sigmoid_attention.mosaic_tpu.scores import multiply, probabilities


def forward(operands: Operands, options: Options) -> Any:
    """``[B, T, H, E]`` in ``options.out_dtype``.

    A tile of queries stays while its visible tiles of keys pass by: no maximum, no sum,
    no rescaling.
    """
    problem = static_problem(operands, options, 0, "forward")
    inputs = tensors(problem, operands)
    b, h, t, _ = inputs["q"].array.shape
    e = inputs["v"].array.shape[3]

    def body(refs: dict[str, Any], at: At) -> None:
        accumulator = refs["accumulator"]

        @pl.when(flagged(at, FIRST))
        def _() -> None:
            accumulator[...] = jnp.zeros_like(accumulator)

        def step(masked: bool) -> None:
            p = probabilities(problem, refs, at, masked)
            p = p.astype(problem.dtype)
            accumulator[...] += multiply(p, refs["v"][...], (1, 0))

        visit(problem, refs, at, step)

        @pl.when(flagged(at, LAST))
        def _() -> None:
            refs["o"][...] = accumulator[...].astype(refs["o"].dtype)

    bfloat16 = options.out_dtype == "bfloat16"
    outputs = {
        "o": Output(
            (b, h, t, e),
            jnp.bfloat16 if bfloat16 else jnp.float32,
            (None, None, problem.block_q, e),
            inputs["q"].place,
        )
    }
    o = call(
        body,
        problem,
        operands,
        inputs=inputs,
        outputs=outputs,
        scratch={"accumulator": (problem.block_q, e)},
        name="sigmoid_attention",
    )["o"]
    o = o[:, :, : operands.q.shape[1], : operands.v.shape[3]].transpose(0, 2, 1, 3)
    return o.astype(options.out_dtype)
