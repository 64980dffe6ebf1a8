"""dQ, dK and dV in one pass on Hopper: five matrix products per tile.

As the "rows" form of `dkv`, and for each tile also dQ += dS·K: both warpgroups put
their dSᵀ into shared memory, each multiplies one half of the tile's dQ, over all 128
keys, and adds it to memory in float32 by a reducing copy. The order of these additions
between thread blocks is not fixed, so that the last bits of dQ vary from run to run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.mosaic_gpu import common, transposed
from diffmm_kernels.sigmoid_attention.mosaic_gpu import score_tiles as tiles
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import Extras
from diffmm_kernels.sigmoid_attention.mosaic_gpu.score_tiles import Call, Work
from diffmm_kernels.sigmoid_attention.varying import uniformly_varying

_ROWS = tiles.WARPGROUP_ROWS
#: Keys per thread block.
BLOCK_KV = 2 * _ROWS
# dS of the next step is written while the other warpgroup still reads this one's.
_SLOTS = 2


def queries_per_step(qk_dim: int) -> int:
    """Tile of queries whose dQ two warpgroups can halve in pieces of 64 by 64."""
    return 2 * _ROWS * _ROWS // qk_dim


def refusal(qk_dim: int, v_dim: int) -> str | None:
    """Why padded head sizes cannot be served, or None."""
    if qk_dim in (64, 128) and v_dim <= qk_dim:
        return None
    return (
        "a single pass serves head sizes up to 128, of v not above that of q and k, "
        f"got {qk_dim} and {v_dim}"
    )


def _buffers(
    qk_dim: int, v_dim: int, dtype: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {
        "k": ((2, _ROWS, qk_dim), dtype),
        "v": ((2, _ROWS, v_dim), dtype),
        "ds": ((_SLOTS, 2, _ROWS, queries_per_step(qk_dim)), dtype),
        "dq": ((2, _ROWS, _ROWS), jnp.float32),
    }


def shared_memory(qk_dim: int, v_dim: int, stages: int) -> int:
    """Bytes per thread block, with every kind of mask."""
    block_q, dtype = queries_per_step(qk_dim), jnp.bfloat16
    return common.smem_bytes(
        *_buffers(qk_dim, v_dim, dtype).values(),
        *transposed.stream_buffers(qk_dim, v_dim, block_q, stages, dtype).values(),
        *transposed.vector_buffers(block_q, stages).values(),
        barriers=4 * stages + 2,
    )


def gradients(
    call: Call,
    arrays: tuple[Any, ...],
    extras: Extras,
    *,
    stages: int,
    column_sums: bool,
) -> tuple[Any, Any, Any, Any]:
    """Runs the kernel.

    Args:
      call: facts; ``kv_length`` in multiples of `BLOCK_KV`, ``q_length`` of
        `queries_per_step`.
      arrays: q, k, v, dO of those sizes.
      extras: further operands, of a plan with these blocks that loops over axis 1.
      stages: tiles of queries in flight.
      column_sums: also return the sums of dS over queries; no tile of keys may then
        have an empty loop.

    Returns:
      dQ in float32 without its scale, ``[B, T, H, D]``; dk, dv; and float32
      ``[B, H, S]`` or None. In the interpreter, which does not reduce, dQ is that of
      one tile of keys.
    """
    block_q = queries_per_step(call.qk_dim)
    shape = (_ROWS, block_q)
    score = plgpu.ACC(shape, jnp.float32)
    by_columns = block_q == _ROWS
    dk_factor = call.scale * 2.0**-call.gradient_exponent
    dv_factor = 2.0**-call.activation.exponent

    def compute(
        refs: Extras, work: Work, dq_ref: Any, outputs: Any, sums_ref: Any, s: Any
    ) -> None:
        first_key = work.tile * BLOCK_KV + work.warpgroup * _ROWS
        keys = pl.ds(first_key, _ROWS)
        half = pl.ds(work.warpgroup * _ROWS, _ROWS)
        key_ids = transposed.load_key_ids(refs, work, first_key, _ROWS)
        k, v = s["k"].at[work.warpgroup], s["v"].at[work.warpgroup]
        dq_buffer = s["dq"].at[work.warpgroup]
        p_buffer, ds_buffer = tiles.parts_of(s["left"], work.warpgroup)
        plgpu.barrier_wait(s["kv_ready"])

        def dq_operands(ds: Any, w: int) -> tuple[Any, Any]:
            """What this warpgroup multiplies of the dSᵀ and the keys of ``w``."""
            if by_columns:
                return ds.at[w].T, s["k"].at[w, :, half]
            return ds.at[w, :, half].T, s["k"].at[w]

        def dq_target(head: Any, j: Any) -> Any:
            if by_columns:
                queries = pl.ds(j * block_q, block_q)
                return dq_ref.at[work.batch, queries, head, half]
            queries = pl.ds(j * block_q + work.warpgroup * _ROWS, _ROWS)
            return dq_ref.at[work.batch, queries, head]

        def step(
            dk_acc: Any, dv_acc: Any, i: Any, member: Any, j: Any, *sums: Any
        ) -> tuple[Any, ...]:
            slot = tiles.in_turn(i, stages)
            q, do = s["q"].at[slot], s["do"].at[slot]
            head = transposed.query_head(call, work, member)

            def scores(qk_acc: Any, dp_acc: Any) -> tuple[Any, Any]:
                plgpu.barrier_wait(s["q_ready"].at[slot])
                plgpu.wgmma(qk_acc, k, q.T)
                plgpu.barrier_wait(s["do_ready"].at[slot])
                plgpu.wgmma(dp_acc, v, do.T)
                p = transposed.probabilities(
                    call,
                    plgpu.wgmma_accumulator_load(qk_acc, wait_n=1),
                    refs,
                    work,
                    s,
                    slot=slot,
                    head=head,
                    j=j,
                    first_key=first_key,
                    key_ids=key_ids,
                )
                return p, plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)

            p, dp = pl.run_scoped(scores, score, score)
            left = tiles.left_operand(tiles.cast_probabilities(call, p), p_buffer)
            plgpu.wgmma(dv_acc, left, do)
            ds = tiles.score_gradients(p, dp)
            ds16 = tiles.cast_gradients(call, ds)
            shared = s["ds"].at[tiles.in_turn(i, _SLOTS)]
            shared.at[work.warpgroup][...] = ds16
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["ds_ready"])
            plgpu.wgmma(dk_acc, tiles.left_operand(ds16, ds_buffer), q)
            if sums:
                total = sums[0] + ds.sum(axis=1)
                last = j + 1 == work.span.high

                @pl.when(last)
                def _store() -> None:
                    sums_ref.at[work.batch, head, keys][...] = total

                sums = (total * jnp.where(last, 0.0, 1.0),)
            plgpu.barrier_wait(s["ds_ready"])

            def queries(dq_acc: Any) -> Any:
                for w in range(2):
                    plgpu.wgmma(dq_acc, *dq_operands(shared, w))
                plgpu.wgmma_wait(2)  # dV and dK are done
                plgpu.barrier_arrive(s["do_used"].at[slot])
                plgpu.barrier_arrive(s["q_used"].at[slot])
                return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)

            dq = pl.run_scoped(queries, plgpu.ACC((_ROWS, _ROWS), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last step
            dq_buffer[...] = dq
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                dq_buffer,
                dq_target(head, j),
                reduction_op=None if call.interpret else "add",
            )
            return sums

        def accumulate(dk_acc: Any, dv_acc: Any) -> tuple[Any, Any]:
            sums = (tiles.zeros(_ROWS, 0),) if column_sums else ()
            transposed.query_loop(
                call,
                work.span,
                lambda i, member, j, *sums: step(dk_acc, dv_acc, i, member, j, *sums),
                *sums,
            )
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(
            accumulate,
            plgpu.ACC((_ROWS, call.qk_dim), jnp.float32),
            plgpu.ACC((_ROWS, call.v_dim), jnp.float32),
        )
        transposed.store_gradient(v, dv * dv_factor, work, outputs[1], keys)
        # The other warpgroup may still multiply dS by these keys.
        plgpu.barrier_arrive(s["ds_ready"])
        plgpu.barrier_wait(s["ds_ready"])
        transposed.store_gradient(k, dk * dk_factor, work, outputs[0], keys)
        plgpu.wait_smem_to_gmem(0)

    def copy(inputs: tuple[Any, ...], refs: Extras, work: Work, s: Any) -> None:
        q_ref, k_ref, v_ref, do_ref = inputs
        transposed.copy_keys(work, k_ref, s["k"], s["kv_ready"], 2, _ROWS)
        transposed.copy_keys(work, v_ref, s["v"], s["kv_ready"], 2, _ROWS)
        transposed.copy_stream(call, work, q_ref, do_ref, refs, s, block_q, stages)

    def body(*references: Any, **s: Any) -> None:
        given = iter(references)
        inputs = tuple(next(given) for _ in arrays)
        refs = extras.bind([next(given) for _ in extras.arrays])
        dq_ref, dk_ref, dv_ref, sums_ref = (*given, None)[:4]
        work = transposed.this_work(call, refs, block_q)

        @pl.when(work.warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
            compute(refs, work, dq_ref, (dk_ref, dv_ref), sums_ref, s)

        @pl.when(work.warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
            copy(inputs, refs, work, s)

    buffers = _buffers(call.qk_dim, call.v_dim, call.dtype)
    scratch = {name: common.tiled_smem(*each) for name, each in buffers.items()}
    left = common.tiled_smem((2, 2, *shape), call.dtype)
    scratch["left"] = left if call.interpret else None
    scratch["kv_ready"] = plgpu.Barrier(num_arrivals=4)
    scratch["ds_ready"] = plgpu.Barrier(num_arrivals=2)
    scratch |= transposed.stream_scratch(call, extras, block_q, stages, users=2)
    outputs = [jax.ShapeDtypeStruct(x.shape, call.dtype) for x in arrays[1:3]]
    if column_sums:
        sums = (call.batch, call.q_heads, call.kv_length)
        outputs.append(jax.ShapeDtypeStruct(sums, jnp.float32))
    dq = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)

    def run(outputs: list[Any], *added: Any) -> tuple[Any, ...]:
        return tiles.launch(
            call,
            body,
            name="backward",
            outputs=tuple(outputs),
            scratch=scratch,
            grid={
                "batch": call.batch,
                "heads": call.kv_heads,
                "keys": call.kv_length // BLOCK_KV,
            },
            operands=(*arrays, *extras.arrays),
            added=added,
        )

    if call.interpret:
        found = run([dq, *outputs])
    else:
        # A state that lives inside: to the caller this is a function without effects.
        def fill(states: tuple[Any, ...]) -> None:
            for state, value in zip(states[1:], run(outputs, states[0]), strict=True):
                state[...] = value

        like = arrays[0]
        start = (
            # Kernels take references only if they vary over no axis of `shard_map`.
            jnp.zeros(dq.shape, dq.dtype),
            *(jnp.zeros_like(like, shape=x.shape, dtype=x.dtype) for x in outputs),
        )
        found = uniformly_varying((*pl.run_state(fill)(start), like))[:-1]
    return (*found, None)[:4]
