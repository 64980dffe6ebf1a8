"""dK = scale · dSᵀ·Q and dV = Pᵀ·dO on Hopper, four matrix products per tile.

A thread block takes a tile of keys of one key head, and all queries that see it of all
query heads of its group: dK and dV accumulate in registers, without a sum over heads
afterwards. The order of all sums is fixed.

Two divisions of the work. "rows": each of two warpgroups has 64 of 128 keys and does
all four products, which head sizes D + E up to 256 leave registers for. "roles": both
have the same 64 keys; the first makes P and dV, the second dP, dS and dK, and p passes
between them through shared memory in float32.
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

_ROWS = tiles.WARPGROUP_ROWS
# Accumulators of dK and dV of this total width leave registers for S and dP.
_WIDEST_ROWS = 256


def by_roles(qk_dim: int, v_dim: int) -> bool:
    """Whether the warpgroups divide the products among them, not the keys."""
    return qk_dim + v_dim > _WIDEST_ROWS


def block_keys(qk_dim: int, v_dim: int) -> int:
    """Keys per thread block."""
    return _ROWS if by_roles(qk_dim, v_dim) else 2 * _ROWS


def _buffers(
    qk_dim: int, v_dim: int, block_q: int, dtype: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes beside those of the stream of queries."""
    roles = by_roles(qk_dim, v_dim)
    parts = 1 if roles else 2
    found = {
        "k": ((parts, _ROWS, qk_dim), dtype),
        "v": ((parts, _ROWS, v_dim), dtype),
    }
    return found | ({"p": ((_ROWS, block_q), jnp.float32)} if roles else {})


def shared_memory(qk_dim: int, v_dim: int, block_q: int, stages: int) -> int:
    """Bytes per thread block, with every kind of mask."""
    sizes = qk_dim, v_dim, block_q
    return common.smem_bytes(
        *_buffers(*sizes, jnp.bfloat16).values(),
        *transposed.stream_buffers(*sizes, stages, jnp.bfloat16).values(),
        *transposed.vector_buffers(block_q, stages).values(),
        barriers=4 * stages + 3,
    )


def dkv(
    call: Call,
    arrays: tuple[Any, ...],
    extras: Extras,
    *,
    block_q: int,
    stages: int,
) -> tuple[Any, Any]:
    """Runs the kernel.

    Args:
      call: facts; ``kv_length`` in multiples of `block_keys`, ``q_length`` of block_q.
      arrays: q, k, v, dO of those sizes.
      extras: further operands, of a plan with these blocks that loops over axis 1.
      block_q: queries per step.
      stages: tiles of queries in flight.

    Returns:
      dk ``[B, S, K, D]`` and dv ``[B, S, K, E]``.
    """
    roles = by_roles(call.qk_dim, call.v_dim)
    shape = (_ROWS, block_q)
    parts = 1 if roles else 2
    score = plgpu.ACC(shape, jnp.float32)
    dk_acc = plgpu.ACC((_ROWS, call.qk_dim), jnp.float32)
    dv_acc = plgpu.ACC((_ROWS, call.v_dim), jnp.float32)
    dk_factor = call.scale * 2.0**-call.gradient_exponent
    dv_factor = 2.0**-call.activation.exponent

    def compute_rows(refs: Extras, work: Work, outputs: Any, s: Any) -> None:
        """All four products for the 64 keys of this warpgroup."""
        first_key = (work.tile * 2 + work.warpgroup) * _ROWS
        key_ids = transposed.load_key_ids(refs, work, first_key, _ROWS)
        k, v = s["k"].at[work.warpgroup], s["v"].at[work.warpgroup]
        buffers = tiles.parts_of(s["left"], work.warpgroup)
        plgpu.barrier_wait(s["kv_ready"])

        def accumulate(dk_acc: Any, dv_acc: Any) -> tuple[Any, Any]:
            def step(i: Any, member: Any, j: Any) -> tuple[()]:
                slot = tiles.in_turn(i, stages)
                q, do = s["q"].at[slot], s["do"].at[slot]

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
                        head=transposed.query_head(call, work, member),
                        j=j,
                        first_key=first_key,
                        key_ids=key_ids,
                    )
                    return p, plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)

                p, dp = pl.run_scoped(scores, score, score)
                left = tiles.left_operand(tiles.cast_probabilities(call, p), buffers[0])
                plgpu.wgmma(dv_acc, left, do)
                ds = tiles.score_gradients(p, dp)
                left = tiles.left_operand(tiles.cast_gradients(call, ds), buffers[1])
                plgpu.wgmma(dk_acc, left, q)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["do_used"].at[slot])
                plgpu.barrier_arrive(s["q_used"].at[slot])
                return ()

            transposed.query_loop(call, work.span, step)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(accumulate, dk_acc, dv_acc)
        keys = pl.ds(first_key, _ROWS)
        transposed.store_gradient(k, dk * dk_factor, work, outputs[0], keys)
        transposed.store_gradient(v, dv * dv_factor, work, outputs[1], keys)
        plgpu.wait_smem_to_gmem(0)

    def compute_values(refs: Extras, work: Work, outputs: Any, s: Any) -> None:
        """First role: P, for the other one too, and dV."""
        first_key = work.tile * _ROWS
        key_ids = transposed.load_key_ids(refs, work, first_key, _ROWS)
        buffer = tiles.parts_of(s["left"], 0)[0]
        plgpu.barrier_wait(s["kv_ready"])

        def accumulate(dv_acc: Any) -> Any:
            def step(i: Any, member: Any, j: Any) -> tuple[()]:
                slot = tiles.in_turn(i, stages)

                def scores(qk_acc: Any) -> Any:
                    plgpu.barrier_wait(s["q_ready"].at[slot])
                    plgpu.wgmma(qk_acc, s["k"].at[0], s["q"].at[slot].T)
                    return transposed.probabilities(
                        call,
                        plgpu.wgmma_accumulator_load(qk_acc),
                        refs,
                        work,
                        s,
                        slot=slot,
                        head=transposed.query_head(call, work, member),
                        j=j,
                        first_key=first_key,
                        key_ids=key_ids,
                    )

                p = pl.run_scoped(scores, score)
                plgpu.barrier_arrive(s["q_used"].at[slot])

                @pl.when(i > 0)
                def _wait() -> None:
                    plgpu.barrier_wait(s["p_used"])

                s["p"][...] = p
                plgpu.barrier_arrive(s["p_ready"])
                plgpu.barrier_wait(s["do_ready"].at[slot])
                left = tiles.left_operand(tiles.cast_probabilities(call, p), buffer)
                plgpu.wgmma(dv_acc, left, s["do"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["do_used"].at[slot])
                return ()

            transposed.query_loop(call, work.span, step)
            return dv_acc[...]

        dv = pl.run_scoped(accumulate, dv_acc)
        count = transposed.steps(call, work.span)
        pl.when(count > 0)(lambda: plgpu.barrier_wait(s["p_used"]))
        keys = pl.ds(first_key, _ROWS)
        # The other role no longer reads V once it has used the last p.
        transposed.store_gradient(s["v"].at[0], dv * dv_factor, work, outputs[1], keys)
        plgpu.wait_smem_to_gmem(0)

    def compute_keys(refs: Extras, work: Work, outputs: Any, s: Any) -> None:
        """Second role: dP, dS and dK."""
        del refs  # masks and biases are in p
        buffer = tiles.parts_of(s["left"], 0)[1]
        plgpu.barrier_wait(s["kv_ready"])

        def accumulate(dk_acc: Any) -> Any:
            def step(i: Any, member: Any, j: Any) -> tuple[()]:
                slot = tiles.in_turn(i, stages)

                def scores(dp_acc: Any) -> Any:
                    plgpu.barrier_wait(s["do_ready"].at[slot])
                    plgpu.wgmma(dp_acc, s["v"].at[0], s["do"].at[slot].T)
                    return plgpu.wgmma_accumulator_load(dp_acc)

                dp = pl.run_scoped(scores, score)
                plgpu.barrier_arrive(s["do_used"].at[slot])
                plgpu.barrier_wait(s["p_ready"])
                p = s["p"][...]
                plgpu.barrier_arrive(s["p_used"])
                ds = tiles.score_gradients(p, dp)
                left = tiles.left_operand(tiles.cast_gradients(call, ds), buffer)
                plgpu.barrier_wait(s["q_ready"].at[slot])
                plgpu.wgmma(dk_acc, left, s["q"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["q_used"].at[slot])
                return ()

            transposed.query_loop(call, work.span, step)
            return dk_acc[...]

        dk = pl.run_scoped(accumulate, dk_acc)
        keys = pl.ds(work.tile * _ROWS, _ROWS)
        transposed.store_gradient(s["k"].at[0], dk * dk_factor, work, outputs[0], keys)
        plgpu.wait_smem_to_gmem(0)

    def copy(inputs: tuple[Any, ...], refs: Extras, work: Work, s: Any) -> None:
        q_ref, k_ref, v_ref, do_ref = inputs
        transposed.copy_keys(work, k_ref, s["k"], s["kv_ready"], parts, _ROWS)
        transposed.copy_keys(work, v_ref, s["v"], s["kv_ready"], parts, _ROWS)
        transposed.copy_stream(call, work, q_ref, do_ref, refs, s, block_q, stages)

    def body(*references: Any, **s: Any) -> None:
        given = iter(references)
        inputs = tuple(next(given) for _ in arrays)
        refs = extras.bind([next(given) for _ in extras.arrays])
        outputs = tuple(given)
        work = transposed.this_work(call, refs, block_q)

        def run(compute: Any) -> None:
            plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
            compute(refs, work, outputs, s)

        if roles:
            pl.when(work.warpgroup == 0)(lambda: run(compute_values))
            pl.when(work.warpgroup == 1)(lambda: run(compute_keys))
        else:
            pl.when(work.warpgroup < 2)(lambda: run(compute_rows))

        @pl.when(work.warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
            copy(inputs, refs, work, s)

    # Keys may be padded further than to whole tiles of this kernel.
    num_tiles = call.kv_length // block_keys(call.qk_dim, call.v_dim)
    if extras.bounds is not None:
        num_tiles = extras.bounds.shape[1]
    buffers = _buffers(call.qk_dim, call.v_dim, block_q, call.dtype)
    scratch = {name: common.tiled_smem(*each) for name, each in buffers.items()}
    left = common.tiled_smem((parts, 2, *shape), call.dtype)
    scratch["left"] = left if call.interpret else None
    scratch["kv_ready"] = plgpu.Barrier(num_arrivals=2 * parts)
    if roles:
        scratch |= {"p_ready": plgpu.Barrier(), "p_used": plgpu.Barrier()}
    scratch |= transposed.stream_scratch(call, extras, block_q, stages, users=2)
    dk, dv = tiles.launch(
        call,
        body,
        name="dkv",
        outputs=tuple(jax.ShapeDtypeStruct(x.shape, call.dtype) for x in arrays[1:3]),
        scratch=scratch,
        grid={
            "batch": call.batch,
            "heads": call.kv_heads,
            "keys": num_tiles,
        },
        operands=(*arrays, *extras.arrays),
    )
    return dk, dv
