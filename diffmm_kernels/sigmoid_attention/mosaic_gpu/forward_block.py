"""The forward kernel itself: what each warpgroup of a thread block does.

One warpgroup streams tiles of keys and values through ``stages`` buffers each; two
others compute, with ``block_q`` queries each. Nothing reads the accumulator of the
output before the end, so that the loop "pipeline" keeps the tensor cores busy while it
evaluates σ:

    s = q·k_0
    for j:  issue q·k_{j+1};  p = σ(s);  issue acc += p·v_j;  s = result of the first

The loop "ping_pong" has no such overlap inside a warpgroup; the two take turns at the
tensor cores instead.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431; Shah et al., "FlashAttention-3: Fast and Accurate Attention with
  Asynchrony and Low-precision", arXiv 2407.08608 (both ways to overlap).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.arguments import Options
from diffmm_kernels.sigmoid_attention.config import Tiles
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import (
    Activation,
    Extras,
    Rows,
    compiler_params,
    interpreter,
    load_rows,
    load_vector,
    masked,
    subtract_alibi,
    tiled_smem,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.work import (
    Grid,
    Loop,
    Work,
    multiprocessors,
)

#: Warpgroups that compute; each has ``block_q`` queries.
COMPUTE_WARPGROUPS = 2

# Registers of a thread: 2 · 128 · 232 + 128 · 40 of the 65,536 there are.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 232, 40
# Two tiles of scores and the output may take this many registers of a thread if both
# tiles are to have their own, instead of copies from one to the other.
_PAIR_REGISTERS = 160


def buffers(
    tiles: Tiles, d: int, e: int, dtype: Any, out_dtype: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the buffers in shared memory."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        "q": ((COMPUTE_WARPGROUPS, tiles.block_q, d), dtype),
        "k": ((tiles.stages, tiles.block_kv, d), dtype),
        "v": ((tiles.stages, tiles.block_kv, e), dtype),
    }
    # The output leaves through the buffer of q; float32 goes straight to memory.
    if d != e and jnp.dtype(out_dtype) == dtype:
        found["o"] = ((COMPUTE_WARPGROUPS, tiles.block_q, e), dtype)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a kernel is known when it is traced; d and e are padded head sizes."""

    tiles: Tiles
    grid: Grid
    sigma: Activation
    options: Options
    extras: Extras
    key_tiles: int
    d: int
    e: int
    dtype: Any

    @property
    def score(self) -> tuple[int, int]:
        """Shape of a tile of scores."""
        return self.tiles.block_q, self.tiles.block_kv

    @property
    def masked(self) -> bool:
        """Whether something may be invisible."""
        return self.extras.bounds is not None

    @property
    def pairs(self) -> bool:
        """Whether two tiles of scores have registers of their own."""
        block_q, block_kv = self.score
        return block_q * (2 * block_kv + self.e) <= 128 * _PAIR_REGISTERS

    @property
    def blocks(self) -> int:
        """Number of thread blocks."""
        if self.tiles.persistent:
            return min(multiprocessors(), self.grid.size)
        return self.grid.size


def kernel(plan: Plan) -> Callable[..., Any]:
    """The kernel as a function of q, k, v and the further arrays."""
    tiles, grid, options = plan.tiles, plan.grid, plan.options
    tiled = buffers(tiles, plan.d, plan.e, plan.dtype, options.out_dtype)
    if options.interpret:
        tiled["p"] = ((COMPUTE_WARPGROUPS, *plan.score), plan.dtype)
    scratch = {name: tiled_smem(*buffer) for name, buffer in tiled.items()}
    scratch["q_ready"] = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS)
    for name in ("k", "v"):
        scratch[f"{name}_ready"] = plgpu.Barrier(num_barriers=tiles.stages)
        scratch[f"{name}_used"] = plgpu.Barrier(
            num_arrivals=COMPUTE_WARPGROUPS, num_barriers=tiles.stages
        )
    if tiles.loop == "ping_pong":
        scratch["turn"] = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)

    def body(*refs: Any, **scratch: Any) -> None:
        q, k, v, *others, o = refs
        _Block(plan, {"q": q, "k": k, "v": v, "o": o}, others, scratch).run()

    length = grid.tiles * COMPUTE_WARPGROUPS * tiles.block_q
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (grid.batch, length, grid.heads, plan.e), options.out_dtype
        ),
        scratch_types=scratch,
        compiler_params=compiler_params(),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpreter(options),
        kernel_name="sigmoid_attention_forward",
    )


class _Block:
    """What one thread block does, in all its warpgroups."""

    def __init__(self, plan: Plan, memory: dict, others: Any, scratch: dict) -> None:
        self.plan = plan
        self.memory = memory
        self.extras = plan.extras.bind(others)
        self.s = scratch
        self.warpgroup = lax.axis_index("warpgroup")

    def run(self) -> None:
        @pl.when(self.warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            self.each(self.compute)

        @pl.when(self.warpgroup == COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
            self.drain(self.each(self.load))

    def each(self, do: Callable[[Work, Any], Any]) -> Any:
        """``do(work, visited)`` for all work; returns the number of tiles visited."""
        grid, blocks = self.plan.grid, self.plan.blocks
        first, zero = lax.axis_index("block"), jnp.int32(0)
        if not self.plan.tiles.persistent:
            return do(grid.work(first), zero)
        # Back and forth, so that no block always has the longest work of its turn.
        turns, more = divmod(grid.size, blocks)
        back = blocks - 1 - first
        extra = (back if turns % 2 else first) < more

        def turn(i: Any, visited: Any) -> Any:
            place = jnp.where(lax.rem(i, jnp.int32(2)) == 1, back, first)
            return do(grid.work(i * blocks + place), visited)

        return lax.fori_loop(0, turns + extra.astype(jnp.int32), turn, zero)

    def loop(self, work: Work) -> Loop:
        """The tiles of keys that a piece of work visits."""
        if not self.plan.masked:
            zero, count = jnp.int32(0), jnp.int32(self.plan.key_tiles)
            return Loop(zero, zero, count, count)
        low, full_low, full_high, high = (
            self.extras.bounds[work.batch, work.tile, i] for i in range(4)
        )
        return Loop(low, full_low, full_high - full_low, high - low)

    def first_key(self, loop: Loop, step: Any) -> Any:
        """Index of the first key of the tile of a step."""
        tile = loop.tile(step) if self.plan.masked else step
        return tile * self.plan.tiles.block_kv

    def slot(self, step: Any) -> Any:
        """Buffer of a step, counted over all work of the block."""
        return lax.rem(step, jnp.int32(self.plan.tiles.stages))

    # The warpgroup that loads.

    def load(self, work: Work, visited: Any) -> Any:
        """Streams the tiles; keys run one ahead of values, as they are used."""
        loop = self.loop(work)

        def fetch(name: str, step: Any) -> None:
            slot = self.slot(visited + step)

            @pl.when(visited + step >= self.plan.tiles.stages)
            def _() -> None:
                plgpu.barrier_wait(self.s[f"{name}_used"].at[slot])

            keys = pl.ds(self.first_key(loop, step), self.plan.tiles.block_kv)
            plgpu.copy_gmem_to_smem(
                self.memory[name].at[work.batch, keys, work.kv_head],
                self.s[name].at[slot],
                self.s[f"{name}_ready"].at[slot],
            )

        fetch("k", jnp.int32(0))

        @pl.loop(jnp.int32(1), loop.count)
        def _(step: Any) -> None:
            fetch("k", step)
            fetch("v", step - 1)

        fetch("v", loop.count - 1)
        return visited + loop.count

    def drain(self, visited: Any) -> None:
        """Sees the last buffers used: no barrier is given back in a phase unseen."""

        @pl.loop(jnp.maximum(visited - self.plan.tiles.stages, 0), visited)
        def _(step: Any) -> None:
            plgpu.barrier_wait(self.s["k_used"].at[self.slot(step)])
            plgpu.barrier_wait(self.s["v_used"].at[self.slot(step)])

    # The warpgroups that compute.

    def compute(self, work: Work, visited: Any) -> Any:
        block_q, wg = self.plan.tiles.block_q, self.warpgroup
        first = work.tile * (COMPUTE_WARPGROUPS * block_q) + wg * block_q
        rows = pl.ds(first, block_q)
        here = work.batch, rows, work.head
        q = self.s["q"].at[wg]
        plgpu.copy_gmem_to_smem(self.memory["q"].at[here], q, self.s["q_ready"].at[wg])
        loop = self.loop(work)
        weigh = self.weights(work, rows, loop)
        plgpu.barrier_wait(self.s["q_ready"].at[wg])
        steps = self.pipeline
        if self.plan.tiles.loop == "ping_pong":
            steps = self.ping_pong

        def load_mask() -> Rows:
            return load_rows(self.extras, work.batch, rows, 0)

        def accumulate(acc: Any) -> Any:
            steps(acc, q, loop, visited, weigh, load_mask)
            return acc[...]

        shape = block_q, self.plan.e
        o = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
        self.store(o, self.memory["o"].at[here])
        return visited + loop.count

    def weights(self, work: Work, rows: Any, loop: Loop) -> Callable[..., Any]:
        """The function ``(scores, step, rows of the mask or None) -> p``."""
        sigma, options, extras = self.plan.sigma, self.plan.options, self.extras
        scale, bias = options.scale * sigma.fold, options.bias * sigma.fold
        if extras.bias is not None:
            bias = extras.bias[work.batch, work.head]
        slope = position = None
        if extras.slopes is not None:
            slope = extras.slopes[work.batch, work.head]
            position = load_vector(extras.position.at[work.batch, rows], 0)

        def weigh(scores: Any, step: Any, mask: Rows | None) -> Any:
            first = self.first_key(loop, step)
            z = scores * scale + bias
            if slope is not None:
                z = subtract_alibi(z, slope, position, first, 0)
            p = sigma(z, scaled=True)
            if mask is not None:
                ids = None
                if mask.ids is not None:
                    keys = pl.ds(first, self.plan.tiles.block_kv)
                    ids = load_vector(extras.kv_ids.at[work.batch, keys], 1)
                p = masked(p, mask, ids, first, 0)
            return p.astype(self.plan.dtype)

        return weigh

    def add(self, acc: Any, p: Any, slot: Any) -> None:
        """Issues ``acc += p · v``."""
        if self.plan.options.interpret:  # whose products take operands from memory
            buffer = self.s["p"].at[self.warpgroup]
            buffer[...] = p
            plgpu.commit_smem()
            p = buffer
        plgpu.barrier_wait(self.s["v_ready"].at[slot])
        plgpu.wgmma(acc, p, self.s["v"].at[slot])

    def scores(self, ref: Any, q: Any, slot: Any) -> None:
        """Issues ``ref += q · k``."""
        plgpu.barrier_wait(self.s["k_ready"].at[slot])
        plgpu.wgmma(ref, q, self.s["k"].at[slot].T)

    def pipeline(
        self,
        acc: Any,
        q: Any,
        loop: Loop,
        visited: Any,
        weigh: Callable[..., Any],
        load_mask: Callable[[], Rows],
    ) -> None:
        plan, s = self.plan, self.s
        tile = plgpu.ACC(plan.score, jnp.float32)

        def begin(ref: Any) -> Any:
            slot = self.slot(visited)
            self.scores(ref, q, slot)
            found = plgpu.wgmma_accumulator_load(ref)
            plgpu.barrier_arrive(s["k_used"].at[slot])
            return found

        def advance(mask: Rows | None, step: Any, scores: Any) -> Any:
            slot, ahead = self.slot(visited + step), self.slot(visited + step + 1)

            def run(ref: Any) -> Any:
                self.scores(ref, q, ahead)
                self.add(acc, weigh(scores, step, mask), slot)
                # The scores are there; the product with v may still be under way.
                found = plgpu.wgmma_accumulator_load(ref, wait_n=1)
                plgpu.barrier_arrive(s["k_used"].at[ahead])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["v_used"].at[slot])
                return found

            return pl.run_scoped(run, tile)

        scores = pl.run_scoped(begin, tile)
        last = loop.count - 1
        # Masked steps are right for unmasked tiles too: for the last tile of all, and
        # for the odd one where unmasked ones are done two at a time.
        size = 2 if plan.pairs else 1
        turns: Any
        if plan.masked:
            begun = 0
            turns = lax.div(jnp.minimum(loop.full, last), jnp.int32(size))
        else:
            turns, begun = divmod(plan.key_tiles - 1, size)
            if begun:
                scores = advance(None, jnp.int32(0), scores)

        def turn(i: Any, scores: Any) -> Any:
            for step in range(size):
                scores = advance(None, begun + size * i + step, scores)
            return scores

        scores = lax.fori_loop(0, turns, turn, scores)
        mask = None
        if plan.masked:
            mask = load_mask()
            scores = lax.fori_loop(
                size * turns, last, functools.partial(advance, mask), scores
            )
        slot = self.slot(visited + last)
        self.add(acc, weigh(scores, last, mask), slot)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(s["v_used"].at[slot])

    def ping_pong(
        self,
        acc: Any,
        q: Any,
        loop: Loop,
        visited: Any,
        weigh: Callable[..., Any],
        load_mask: Callable[[], Rows],
    ) -> None:
        plan, s = self.plan, self.s
        tile = plgpu.ACC(plan.score, jnp.float32)

        def meet() -> None:
            plgpu.barrier_arrive(s["turn"])
            plgpu.barrier_wait(s["turn"])

        def advance(mask: Rows | None, step: Any, carry: Any) -> Any:
            slot = self.slot(visited + step)

            def run(ref: Any) -> Any:
                self.scores(ref, q, slot)
                meet()  # the other's products may start behind these
                return plgpu.wgmma_accumulator_load(ref)

            scores = pl.run_scoped(run, tile)
            plgpu.barrier_arrive(s["k_used"].at[slot])
            p = weigh(scores, step, mask)
            meet()
            self.add(acc, p, slot)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s["v_used"].at[slot])
            return carry

        # The second warpgroup is half a step behind the first.
        pl.when(self.warpgroup == 1)(meet)
        zero = jnp.int32(0)
        lax.fori_loop(0, loop.full, functools.partial(advance, None), zero)
        if plan.masked:
            masked_step = functools.partial(advance, load_mask())
            lax.fori_loop(loop.full, loop.count, masked_step, zero)
        pl.when(self.warpgroup == 0)(meet)

    def store(self, o: Any, target: Any) -> None:
        if self.plan.sigma.exponent:
            o = o * 2.0**-self.plan.sigma.exponent
        o = o.astype(self.plan.options.out_dtype)
        if o.dtype != self.plan.dtype:
            target[...] = o
            return
        buffer = self.s["o" if "o" in self.s else "q"].at[self.warpgroup]
        buffer[...] = o
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target)
        plgpu.wait_smem_to_gmem(0)
