"""dQ = scale · dS·K on Hopper: one thread block per tile of 128 queries.

Two warpgroups hold 64 queries each and loop over the tiles of keys, which a third one
copies to shared memory: S = Q·Kᵀ and dP = dO·Vᵀ are issued together, dS is computed
from both in registers, and dQ accumulates there. Three matrix products per tile; the
order of all sums is fixed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.mosaic_gpu import common
from diffmm_kernels.sigmoid_attention.mosaic_gpu import score_tiles as tiles
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import Extras
from diffmm_kernels.sigmoid_attention.mosaic_gpu.score_tiles import Call, Work

_ROWS = tiles.WARPGROUP_ROWS
#: Queries per thread block.
BLOCK_Q = 2 * _ROWS


def _buffers(
    block_kv: int, stages: tuple[int, int], qk_dim: int, v_dim: int, dtype: Any
) -> dict[str, Any]:
    return {
        "q": ((2, _ROWS, qk_dim), dtype),
        "do": ((2, _ROWS, v_dim), dtype),
        "k": ((stages[0], block_kv, qk_dim), dtype),
        "v": ((stages[1], block_kv, v_dim), dtype),
    }


def shared_memory(
    block_kv: int, stages: tuple[int, int], qk_dim: int, v_dim: int
) -> int:
    """Bytes per thread block; ``stages`` of keys and of values."""
    buffers = _buffers(block_kv, stages, qk_dim, v_dim, jnp.bfloat16)
    return common.smem_bytes(*buffers.values(), barriers=1 + 2 * sum(stages))


def stages_that_fit(
    block_kv: int, stages: int, qk_dim: int, v_dim: int
) -> tuple[int, int]:
    """Stages of keys and of values: as many as fit, and of values rather one less.

    Values are needed for a shorter time than keys.
    """
    for total in range(2 * stages, 2, -1):
        chosen = total - total // 2, total // 2
        needed = shared_memory(block_kv, chosen, qk_dim, v_dim)
        if needed <= common.SMEM_LIMIT:
            return chosen
    return 1, 1


def dq(
    call: Call,
    arrays: tuple[Any, ...],
    extras: Extras,
    *,
    block_kv: int,
    stages: int,
    row_sums: bool,
) -> tuple[Any, Any]:
    """Runs the kernel.

    Args:
      call: facts; ``q_length`` in multiples of `BLOCK_Q`, ``kv_length`` of block_kv.
      arrays: q, k, v, dO of those sizes.
      extras: further operands, of a plan with these blocks that loops over axis 2.
      block_kv: keys per step.
      stages: tiles of keys in flight, fewer if they do not fit.
      row_sums: also return the sums of dS over keys.

    Returns:
      dq ``[B, T, H, D]`` and float32 ``[B, H, T]`` or None.
    """
    shape = (_ROWS, block_kv)
    num_tiles = call.q_length // BLOCK_Q
    both = stages_that_fit(block_kv, stages, call.qk_dim, call.v_dim)
    k_stages, v_stages = both

    def compute(refs: Extras, work: Work, dq_ref: Any, sums_ref: Any, s: Any) -> None:
        first_query = work.tile * BLOCK_Q + work.warpgroup * _ROWS
        mine = pl.ds(first_query, _ROWS)
        q, do = s["q"].at[work.warpgroup], s["do"].at[work.warpgroup]
        buffer = None if s["ds"] is None else s["ds"].at[work.warpgroup]
        rows: Any = None
        position = None
        if refs.bounds is not None:
            rows = common.load_rows(refs, work.batch, mine, 0)
        if refs.position is not None:
            position = common.load_vector(refs.position.at[work.batch, mine], 0)
        plgpu.barrier_wait(s["ready"])

        def probabilities(qk: Any, j: Any) -> Any:
            first_key = j * block_kv

            def mask(p: Any) -> Any:
                ids = None
                if refs.kv_ids is not None:
                    keys = refs.kv_ids.at[work.batch, pl.ds(first_key, block_kv)]
                    ids = common.load_vector(keys, 1)
                return common.masked(p, rows, ids, first_key, 0)

            z = tiles.logits(call, qk, refs, work, work.head)
            if refs.slopes is not None:
                slope = refs.slopes[work.batch, work.head]
                z = common.subtract_alibi(z, slope, position, first_key, 0)
            return tiles.mask_unless(work.span.full(j), mask, call.activation(z))

        def step(dq_acc: Any, i: Any, *sums: Any) -> tuple[Any, ...]:
            k_slot, v_slot = tiles.in_turn(i, k_stages), tiles.in_turn(i, v_stages)

            def scores(qk_acc: Any, dp_acc: Any) -> tuple[Any, Any]:
                plgpu.barrier_wait(s["k_ready"].at[k_slot])
                plgpu.wgmma(qk_acc, q, s["k"].at[k_slot].T)
                plgpu.barrier_wait(s["v_ready"].at[v_slot])
                plgpu.wgmma(dp_acc, do, s["v"].at[v_slot].T)
                qk = plgpu.wgmma_accumulator_load(qk_acc, wait_n=1)
                p = probabilities(qk, work.span.low + i)
                return p, plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)

            accumulator = plgpu.ACC(shape, jnp.float32)
            p, dp = pl.run_scoped(scores, accumulator, accumulator)
            plgpu.barrier_arrive(s["v_used"].at[v_slot])
            ds = tiles.score_gradients(p, dp)
            left = tiles.left_operand(tiles.cast_gradients(call, ds), buffer)
            plgpu.wgmma(dq_acc, left, s["k"].at[k_slot])
            sums = tuple(x + ds.sum(axis=1) for x in sums)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s["k_used"].at[k_slot])
            return sums

        def accumulate(dq_acc: Any) -> tuple[Any, Any]:
            sums = (tiles.zeros(_ROWS, 0),) if row_sums else ()
            sums = tiles.loop(
                work.span.count, lambda i, *sums: step(dq_acc, i, *sums), *sums
            )
            return dq_acc[...], sums

        dq_acc = plgpu.ACC((_ROWS, call.qk_dim), jnp.float32)
        dq_tile, sums = pl.run_scoped(accumulate, dq_acc)
        factor = call.scale * 2.0**-call.gradient_exponent
        q[...] = (dq_tile * factor).astype(call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[work.batch, mine, work.head])
        if row_sums:
            sums_ref.at[work.batch, work.head, mine][...] = sums[0]
        plgpu.wait_smem_to_gmem(0)

    def copy(inputs: tuple[Any, ...], work: Work, s: Any) -> None:
        q_ref, k_ref, v_ref, do_ref = inputs
        kv_head = lax.div(work.head, jnp.int32(call.group))
        for w in range(2):
            mine = pl.ds(work.tile * BLOCK_Q + w * _ROWS, _ROWS)
            at = work.batch, mine, work.head
            plgpu.copy_gmem_to_smem(q_ref.at[at], s["q"].at[w], s["ready"])
            plgpu.copy_gmem_to_smem(do_ref.at[at], s["do"].at[w], s["ready"])

        def step(i: Any) -> tuple[()]:
            keys = pl.ds((work.span.low + i) * block_kv, block_kv)
            at = work.batch, keys, kv_head
            k_copy = k_ref.at[at], s["k"], s["k_ready"]
            tiles.copy_in_turn(i, k_stages, s["k_used"], k_copy)
            v_copy = v_ref.at[at], s["v"], s["v_ready"]
            tiles.copy_in_turn(i, v_stages, s["v_used"], v_copy)
            return ()

        tiles.loop(work.span.count, step)
        tiles.drain(work.span.count, k_stages, s["k_used"])
        tiles.drain(work.span.count, v_stages, s["v_used"])

    def body(*references: Any, **s: Any) -> None:
        given = iter(references)
        inputs = tuple(next(given) for _ in arrays)
        refs = extras.bind(next(given) for _ in extras.arrays)
        dq_ref, sums_ref = (*given, None)[:2]
        batch, head = lax.axis_index("batch"), lax.axis_index("heads")
        tile = lax.axis_index("queries")
        if call.longest_last:
            tile = num_tiles - 1 - tile
        span = tiles.span(refs, batch, tile, call.kv_length // block_kv)
        work = Work(batch, head, tile, span, lax.axis_index("warpgroup"))

        @pl.when(work.warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
            compute(refs, work, dq_ref, sums_ref, s)

        @pl.when(work.warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
            copy(inputs, work, s)

    buffers = _buffers(block_kv, both, call.qk_dim, call.v_dim, call.dtype)
    scratch = {name: common.tiled_smem(*each) for name, each in buffers.items()}
    interpreted = common.tiled_smem((2, *shape), call.dtype)
    scratch["ds"] = interpreted if call.interpret else None
    scratch["ready"] = plgpu.Barrier(num_arrivals=4)
    for name, count in (("k", k_stages), ("v", v_stages)):
        scratch[f"{name}_ready"] = plgpu.Barrier(num_barriers=count)
        scratch[f"{name}_used"] = plgpu.Barrier(num_arrivals=2, num_barriers=count)
    sums = jax.ShapeDtypeStruct((call.batch, call.q_heads, call.q_length), jnp.float32)
    found = tiles.launch(
        call,
        body,
        name="dq",
        outputs=(jax.ShapeDtypeStruct(arrays[0].shape, call.dtype), sums)[
            : 1 + row_sums
        ],
        scratch=scratch,
        grid={"batch": call.batch, "heads": call.q_heads, "queries": num_tiles},
        operands=(*arrays, *extras.arrays),
    )
    return found[0], found[1] if row_sums else None
