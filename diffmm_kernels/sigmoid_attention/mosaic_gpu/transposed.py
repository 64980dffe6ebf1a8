"""What the kernels for dK and dV share: a tile of keys that meets tiles of queries.

Tiles of scores are transposed, keys by queries, because then P and dS lie in registers
as the left operands of dV = Pᵀ·dO and dK = dSᵀ·Q. The loop runs over the query heads of
the tile's key head and, inside, over the tiles of queries; a warpgroup copies each with
its dO and what masking needs of its queries to shared memory.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.mosaic_gpu import common
from diffmm_kernels.sigmoid_attention.mosaic_gpu import score_tiles as tiles
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import Extras, Rows
from diffmm_kernels.sigmoid_attention.mosaic_gpu.score_tiles import Call, Span, Work

# Fields of `Extras` with one number per query.
_PER_QUERY = ("start", "end", "q_ids", "position")


def stream_buffers(
    qk_dim: int, v_dim: int, block_q: int, stages: int, dtype: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the tiles of q and dO in flight."""
    return {
        "q": ((stages, block_q, qk_dim), dtype),
        "do": ((stages, block_q, v_dim), dtype),
    }


def vector_buffers(
    block_q: int, stages: int, present: tuple[str, ...] = _PER_QUERY
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The same for vectors over queries; by default for all that there can be."""
    return {
        name: ((stages, block_q), jnp.float32 if name == "position" else jnp.int32)
        for name in present
    }


def stream_scratch(
    call: Call, extras: Extras, block_q: int, stages: int, users: int
) -> dict[str, Any]:
    """Memory and barriers of the stream; ``users`` warpgroups use each tile."""
    present = tuple(x for x in _PER_QUERY if getattr(extras, x) is not None)
    vectors = vector_buffers(block_q, stages, present)
    sizes = call.qk_dim, call.v_dim, block_q
    buffers = stream_buffers(*sizes, stages, call.dtype)
    scratch = {name: common.tiled_smem(*each) for name, each in buffers.items()}
    scratch |= {name: plgpu.SMEM(*each) for name, each in vectors.items()}
    for name, copies in (("q", 1 + len(vectors)), ("do", 1)):
        scratch[f"{name}_ready"] = plgpu.Barrier(
            num_arrivals=copies, num_barriers=stages
        )
        scratch[f"{name}_used"] = plgpu.Barrier(num_arrivals=users, num_barriers=stages)
    return scratch


def steps(call: Call, span: Span) -> Any:
    """Length of the loop over heads and tiles of queries."""
    return span.count * call.group


def following(call: Call, span: Span, member: Any, j: Any) -> tuple[Any, Any]:
    """The head of the group and the tile of queries after ``member``, ``j``."""
    if call.group == 1:
        return member, j + 1
    last = j + 1 == span.high
    return jnp.where(last, member + 1, member), jnp.where(last, span.low, j + 1)


def query_loop(call: Call, span: Span, body: Any, *carry: Any) -> Any:
    """``carry = body(i, member, j, *carry)`` for every tile of queries, in order."""

    def step(i: Any, member: Any, j: Any, *carry: Any) -> tuple[Any, ...]:
        carry = body(i, member, j, *carry)
        return *following(call, span, member, j), *carry

    count = steps(call, span)
    return tiles.loop(count, step, jnp.int32(0), span.low, *carry)[2:]


def copy_stream(
    call: Call,
    work: Work,
    q_ref: Any,
    do_ref: Any,
    refs: Extras,
    s: dict[str, Any],
    block_q: int,
    stages: int,
) -> None:
    """What the copying warpgroup does after the tile's keys and values."""

    def step(i: Any, member: Any, j: Any) -> tuple[()]:
        head = work.head * call.group + member
        queries = pl.ds(j * block_q, block_q)
        copies = [(q_ref.at[work.batch, queries, head], s["q"], s["q_ready"])]
        for name in _PER_QUERY:
            ref = getattr(refs, name)
            if ref is not None:
                copies.append((ref.at[work.batch, queries], s[name], s["q_ready"]))
        tiles.copy_in_turn(i, stages, s["q_used"], *copies)
        copy = do_ref.at[work.batch, queries, head], s["do"], s["do_ready"]
        tiles.copy_in_turn(i, stages, s["do_used"], copy)
        return ()

    query_loop(call, work.span, step)
    tiles.drain(steps(call, work.span), stages, s["q_used"])
    tiles.drain(steps(call, work.span), stages, s["do_used"])


def copy_keys(
    work: Work, ref: Any, buffers: Any, ready: Any, warpgroups: int, rows: int
) -> None:
    """Copies the keys, or values, of each of ``warpgroups``."""
    for w in range(warpgroups):
        mine = pl.ds((work.tile * warpgroups + w) * rows, rows)
        source = ref.at[work.batch, mine, work.head]
        plgpu.copy_gmem_to_smem(source, buffers.at[w], ready)


def load_key_ids(refs: Extras, work: Work, first_key: Any, rows: int) -> Any:
    """Segment ids of a warpgroup's keys, or None."""
    if refs.kv_ids is None:
        return None
    return common.load_vector(refs.kv_ids.at[work.batch, pl.ds(first_key, rows)], 0)


def probabilities(
    call: Call,
    qk: Any,
    refs: Extras,
    work: Work,
    s: dict[str, Any],
    *,
    slot: Any,
    head: Any,
    j: Any,
    first_key: Any,
    key_ids: Any,
) -> Any:
    """Recomputes p of a transposed tile in float32.

    Args:
      call: facts.
      qk: q·k, keys by queries.
      refs: further operands.
      work: of the thread block.
      s: scratch, of which `stream_scratch` is part.
      slot: buffer that holds the tile of queries.
      head: index of the query head.
      j: index of the tile of queries.
      first_key: index of the first key.
      key_ids: from `load_key_ids`.
    """

    def vector(name: str) -> Any:
        buffers = s.get(name)
        return None if buffers is None else common.load_vector(buffers.at[slot], 1)

    def mask(p: Any) -> Any:
        rows = Rows(vector("start"), vector("end"), vector("q_ids"))
        return common.masked(p, rows, key_ids, first_key, 1)

    z = tiles.logits(call, qk, refs, work, head)
    if refs.slopes is not None:
        slope = refs.slopes[work.batch, head]
        z = common.subtract_alibi(z, slope, vector("position"), first_key, 1)
    return tiles.mask_unless(work.span.full(j), mask, call.activation(z))


def query_head(call: Call, work: Work, member: Any) -> Any:
    """Index of the ``member``-th query head of the tile's key head."""
    return work.head * call.group + member


def this_work(call: Call, refs: Extras, block_q: int) -> Work:
    """What the calling thread block and warpgroup have to do."""
    batch, tile = lax.axis_index("batch"), lax.axis_index("keys")
    span = tiles.span(refs, batch, tile, call.q_length // block_q)
    return Work(batch, lax.axis_index("heads"), tile, span, lax.axis_index("warpgroup"))


def store_gradient(buffer: Any, tile: Any, work: Work, ref: Any, keys: Any) -> None:
    """Casts a finished tile of dK or dV and starts its copy through ``buffer``."""
    buffer[...] = tile.astype(ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, ref.at[work.batch, keys, work.head])
