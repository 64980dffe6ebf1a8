"""Backward kernel of the queries: dq, and the gradients of what is added to logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from diffmm_kernels.sigmoid_attention.arguments import Needs, Operands, Options
from diffmm_kernels.sigmoid_attention.mosaic_tpu.launch import call, flagged, visit
from diffmm_kernels.sigmoid_attention.mosaic_tpu.layout import (
    Output,
    rows_last,
    tensors,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import At, static_problem
from diffmm_kernels.sigmoid_attention.mosaic_tpu.schedule import FIRST, LAST
from diffmm_kernels.sigmoid_attention.mosaic_tpu.scores import multiply, probabilities
from diffmm_kernels.sigmoid_attention.visibility import visible

_SUBLANES = 8  # of float32


def query_gradients(
    operands: Operands, options: Options, do: Any, needs: Needs
) -> tuple[Any, Any, Any]:
    """``dq = scale·dS·k`` with ``dS = dP·p·(1 - p)``, ``dP = do·vᵀ``.

    Returns:
      dq, dbias or None, dlogit_bias or None.
    """
    problem = static_problem(operands, options, 0, "backward")
    inputs = tensors(problem, operands, do)
    b, h, t, d = inputs["q"].array.shape
    s = inputs["k"].array.shape[2]
    block_q, block_kv = problem.block_q, problem.block_kv
    by_queries = inputs["q"].place
    wide = operands.q.dtype != jnp.bfloat16
    outputs = {
        "dq": Output(
            (b, h, t, d),
            jnp.float32 if wide else jnp.bfloat16,
            (None, None, block_q, d),
            by_queries,
        )
    }
    if needs.bias:
        # Sums over groups of rows only: adds of whole registers.
        outputs["dbias"] = Output(
            (b, h, t // block_q, _SUBLANES, block_kv),
            jnp.float32,
            (None, None, None, _SUBLANES, block_kv),
            lambda at: (at.b, at.h, at.q_tile, 0, 0),
        )
    if needs.logit_bias:
        outputs["ds"] = Output(
            (b, h, t, s),
            jnp.float32,
            (None, None, block_q, block_kv),
            lambda at: (at.b, at.h, at.q_tile, at.kv_tile),
        )

    def body(refs: dict[str, Any], at: At) -> None:
        accumulator = refs["accumulator"]

        @pl.when(flagged(at, FIRST))
        def _() -> None:
            accumulator[...] = jnp.zeros_like(accumulator)
            if needs.bias:
                refs["dbias"][...] = jnp.zeros_like(refs["dbias"])

        def step(masked: bool) -> None:
            p = probabilities(problem, refs, at, masked)
            dp = multiply(refs["do"][...], refs["v"][...], (1, 1))
            ds = dp * (p * (1.0 - p))
            if needs.bias:
                groups = ds.reshape(block_q // _SUBLANES, _SUBLANES, block_kv)
                refs["dbias"][...] += groups.sum(0)
            if needs.logit_bias:
                refs["ds"][...] = ds
            ds = ds.astype(problem.dtype)
            accumulator[...] += multiply(ds, refs["k"][...], (1, 0))

        visit(problem, refs, at, step)

        @pl.when(flagged(at, LAST))
        def _() -> None:
            dq = accumulator[...] * options.scale
            refs["dq"][...] = dq.astype(refs["dq"].dtype)

    results = call(
        body,
        problem,
        operands,
        inputs=inputs,
        outputs=outputs,
        scratch={"accumulator": (block_q, d)},
        name="sigmoid_attention_dq",
    )
    dq = rows_last(results["dq"], operands.q, operands.q.dtype)
    dbias = results["dbias"].sum((2, 3, 4)) if needs.bias else None
    if not needs.logit_bias:
        return dq, dbias, None
    ds = results["ds"][:, :, : operands.q.shape[1], : operands.k.shape[1]]
    # Tiles that were not visited hold anything.
    ds = jnp.where(visible(operands, options), ds, 0.0)
    shape = operands.logit_bias.shape
    over = tuple(i for i in range(4) if shape[i] == 1 and ds.shape[i] > 1)
    ds = ds.sum(over, keepdims=True)
    return dq, dbias, ds.astype(operands.logit_bias.dtype)
