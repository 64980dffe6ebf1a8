"""Backward pass: which kernels run, their operands, and what becomes of their results.

Two variants. The single pass recomputes S and dP once, five matrix products per tile,
and adds dQ to memory in an order that is not fixed. The other has a kernel for dQ and
one for dK and dV, seven products per tile; its bits are those of every run.

`Tiles` here: ``block_kv`` keys per step of the dQ kernel, whose thread blocks have 128
queries; ``block_q`` queries per step of the others, whose thread blocks have 128 keys
(64 where D + E exceeds 256); ``stages`` steps in flight.
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
from diffmm_kernels.sigmoid_attention.config import Tiles, tiles_from_table
from diffmm_kernels.sigmoid_attention.mosaic_gpu import common, single_pass
from diffmm_kernels.sigmoid_attention.mosaic_gpu import dkv as dkv_kernel
from diffmm_kernels.sigmoid_attention.mosaic_gpu import dq as dq_kernel
from diffmm_kernels.sigmoid_attention.mosaic_gpu.score_tiles import (
    Call,
    call_of,
    padded_arrays,
)
from diffmm_kernels.sigmoid_attention.visibility import unrestricted

TABLE = "mosaic_gpu_backward"


def facts(operands: Operands, options: Options) -> dict[str, Any]:
    """What the rows of the table are chosen by."""
    d, e = operands.q.shape[-1], operands.v.shape[-1]
    return {
        "head_dim": common.padded_head(max(d, e)),
        "causal": options.right is not None,
        "masked": not unrestricted(operands, options),
        "segments": operands.q_segment_ids is not None,
        "alibi": operands.alibi_slopes is not None,
        "dtype": operands.q.dtype.name,
        "deterministic": options.deterministic,
        "keys": operands.k.shape[1],
    }


def backward_tiles(operands: Operands, options: Options) -> Tiles:
    """The tiles that `backward` uses: the user's, or the table's.

    Raises:
      ValueError: the user's tiles are none that the kernels have, or need more shared
        memory than there is.
    """
    chosen = options.config.backward if options.config is not None else None
    if chosen is None:
        return tiles_from_table(TABLE, **facts(operands, options))
    for name in ("block_q", "block_kv"):
        value = getattr(chosen, name)
        if value not in (64, 128):
            raise ValueError(f"config.backward: {name} must be 64 or 128, got {value}")
    d, e = _head_sizes(operands)
    if chosen.single_pass:
        reason = single_pass.refusal(d, e)
        if reason is not None:
            raise ValueError(f"config.backward: {reason}")
        block_q = single_pass.queries_per_step(d)
        if chosen.block_q != block_q:
            raise ValueError(
                f"config.backward: a single pass has block_q {block_q} for head size "
                f"{d}, got {chosen.block_q}"
            )
    needed = shared_memory(operands, options, chosen)
    if needed > common.SMEM_LIMIT:
        raise ValueError(
            f"config.backward {chosen} needs {needed:,} bytes of shared memory for "
            f"head sizes {d} and {e}; at most {common.SMEM_LIMIT:,} are there"
        )
    return chosen


def _head_sizes(operands: Operands) -> tuple[int, int]:
    d, e = (common.padded_head(x.shape[-1]) for x in (operands.q, operands.v))
    return d, e


def shared_memory(operands: Operands, options: Options, tiles: Tiles) -> int:
    """Bytes per thread block, of the kernel that needs most."""
    d, e = _head_sizes(operands)
    if in_single_pass(operands, options, tiles):
        return single_pass.shared_memory(d, e, tiles.stages)
    both = dq_kernel.stages_that_fit(tiles.block_kv, tiles.stages, d, e)
    return max(
        dq_kernel.shared_memory(tiles.block_kv, both, d, e),
        dkv_kernel.shared_memory(d, e, tiles.block_q, tiles.stages),
    )


def in_single_pass(operands: Operands, options: Options, tiles: Tiles) -> bool:
    """Whether the single pass serves a call."""
    return (
        tiles.single_pass
        and not options.deterministic
        and not options.interpret  # has no reducing copies
        and single_pass.refusal(*_head_sizes(operands)) is None
    )


def backward(operands: Operands, options: Options, do: Any, needs: Needs) -> Gradients:
    """Cotangents of q, k, v, and of the bias if needed, for the cotangent ``do``."""
    tiles = backward_tiles(operands, options)
    if in_single_pass(operands, options, tiles):
        return _single_pass(operands, options, do, needs, tiles)
    return _two_kernels(operands, options, do, needs, tiles)


def _call(
    operands: Operands, options: Options, do: Any, block_q: int, block_kv: int
) -> tuple[Call, tuple[Any, ...]]:
    call = call_of(operands, options, block_q=block_q, block_kv=block_kv)
    return call, padded_arrays(call, operands, do)


def _two_kernels(
    operands: Operands, options: Options, do: Any, needs: Needs, tiles: Tiles
) -> Gradients:
    # One set of padded arrays serves both kernels.
    block_q = dq_kernel.BLOCK_Q
    d, e = _head_sizes(operands)
    block_kv = max(tiles.block_kv, dkv_kernel.block_keys(d, e))
    call, arrays = _call(operands, options, do, block_q, block_kv)
    fold = call.activation.fold
    dq, sums = dq_kernel.dq(
        call,
        arrays,
        common.extras(
            operands,
            options,
            fold,
            block_q=block_q,
            block_kv=tiles.block_kv,
            axis=2,
            at_least_one=False,
        ),
        block_kv=tiles.block_kv,
        stages=tiles.stages,
        row_sums=needs.bias,
    )
    dk, dv = dkv_kernel.dkv(
        call,
        arrays,
        common.extras(
            operands,
            options,
            fold,
            block_q=tiles.block_q,
            block_kv=dkv_kernel.block_keys(d, e),
            axis=1,
            at_least_one=False,
        ),
        block_q=tiles.block_q,
        stages=tiles.stages,
    )
    return _cropped(operands, dq, dk, dv, sums)


def _single_pass(
    operands: Operands, options: Options, do: Any, needs: Needs, tiles: Tiles
) -> Gradients:
    d = common.padded_head(operands.q.shape[-1])
    block_q, block_kv = single_pass.queries_per_step(d), single_pass.BLOCK_KV
    call, arrays = _call(operands, options, do, block_q, block_kv)
    extras = common.extras(
        operands,
        options,
        call.activation.fold,
        block_q=block_q,
        block_kv=block_kv,
        axis=1,
        at_least_one=needs.bias,
    )
    dq, dk, dv, sums = single_pass.gradients(
        call, arrays, extras, stages=tiles.stages, column_sums=needs.bias
    )
    return finished(call, operands, dq, dk, dv, sums)


def finished(
    call: Call, operands: Operands, dq: Any, dk: Any, dv: Any, sums: Any
) -> Gradients:
    """Gradients from what the single pass leaves."""
    dq = (dq * (call.scale * 2.0**-call.gradient_exponent)).astype(call.dtype)
    return _cropped(operands, dq, dk, dv, sums)


def _cropped(operands: Operands, dq: Any, dk: Any, dv: Any, sums: Any) -> Gradients:
    t, d = operands.q.shape[1], operands.q.shape[3]
    s, e = operands.v.shape[1], operands.v.shape[3]
    return Gradients(
        q=dq[:, :t, :, :d],
        k=dk[:, :s, :, :d],
        v=dv[:, :s, :, :e],
        bias=None if sums is None else jnp.sum(sums, axis=-1),
    )
