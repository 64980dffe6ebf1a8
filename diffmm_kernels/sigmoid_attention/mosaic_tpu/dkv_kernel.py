"""Backward kernel of the keys: dk and dv."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.mosaic_tpu.launch import call, flagged, visit
from diffmm_kernels.sigmoid_attention.mosaic_tpu.layout import (
    Output,
    rows_last,
    tensors,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import At, static_problem
from diffmm_kernels.sigmoid_attention.mosaic_tpu.schedule import FIRST, LAST
from diffmm_kernels.sigmoid_attention.mosaic_tpu.scores import multiply, probabilities


def key_gradients(operands: Operands, options: Options, do: Any) -> tuple[Any, Any]:
    """``dk = scale·dSᵀ·q`` and ``dv = pᵀ·do``, summed over the heads of a group.

    Scores are computed transposed, so that no product needs a transpose.
    """
    problem = static_problem(operands, options, 1, "backward")
    inputs = tensors(problem, operands, do)
    group = problem.group
    shapes = {"dk": inputs["k"].array.shape, "dv": inputs["v"].array.shape}
    wide = operands.q.dtype != jnp.bfloat16
    outputs = {
        name: Output(
            shape,
            jnp.float32 if wide else jnp.bfloat16,
            (None, None, problem.block_kv, shape[3]),
            inputs["k"].place,
        )
        for name, shape in shapes.items()
    }

    def body(refs: dict[str, Any], at: At) -> None:
        dk, dv = refs["dk_sum"], refs["dv_sum"]
        g = pl.program_id(3)

        @pl.when(flagged(at, FIRST) & (g == 0))
        def _() -> None:
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)

        def step(masked: bool) -> None:
            p = probabilities(problem, refs, at, masked)
            q, do = refs["q"][...], refs["do"][...]
            dv[...] += multiply(p.astype(problem.dtype), do, (1, 0))
            dp = multiply(refs["v"][...], do, (1, 1))
            ds = dp * (p * (1.0 - p))
            dk[...] += multiply(ds.astype(problem.dtype), q, (1, 0))

        visit(problem, refs, at, step)

        @pl.when(flagged(at, LAST) & (g == group - 1))
        def _() -> None:
            refs["dk"][...] = (dk[...] * options.scale).astype(refs["dk"].dtype)
            refs["dv"][...] = dv[...].astype(refs["dv"].dtype)

    results = call(
        body,
        problem,
        operands,
        inputs=inputs,
        outputs=outputs,
        scratch={f"{n}_sum": (problem.block_kv, x[3]) for n, x in shapes.items()},
        name="sigmoid_attention_dkv",
    )
    return (
        rows_last(results["dk"], operands.k, operands.k.dtype),
        rows_last(results["dv"], operands.v, operands.v.dtype),
    )
