"""What the backward kernels for Hopper do with one tile of scores.

No output, row sum or other statistic of the forward pass is needed: with p recomputed
from q and k, dP = dO·Vᵀ and dS = dP·p·(1 - p) follow score by score.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.mosaic_gpu import common
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import Activation, Extras
from diffmm_kernels.sigmoid_attention.varying import result_struct, uniformly_varying

#: Rows of a tile that one warpgroup works on: those of one wgmma instruction.
WARPGROUP_ROWS = 64
#: Registers per thread of the two computing warpgroups and of the one that copies.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
#: float16 holds dS times a power of two of at most this exponent.
MAX_GRADIENT_EXPONENT = 8


class Span(NamedTuple):
    """Tiles that a loop visits, see `visibility.Ranges`.

    Attributes:
      low: the first one.
      full_low: from here …
      full_high: … to here, exclusive, nothing is masked.
      high: one past the last.
      masked: whether there is anything to mask at all, known when tracing.
    """

    low: Any
    full_low: Any
    full_high: Any
    high: Any
    masked: bool

    @property
    def count(self) -> Any:
        """Number of tiles."""
        return self.high - self.low

    def full(self, j: Any) -> Any:
        """Whether nothing of tile ``j`` is masked; None: of no tile."""
        if not self.masked:
            return None
        return (self.full_low <= j) & (j < self.full_high)


def span(refs: Extras, batch: Any, tile: Any, tiles: int) -> Span:
    """What the loop of ``tile`` visits; all ``tiles`` where nothing is masked."""
    if refs.bounds is None:
        zero, end = jnp.int32(0), jnp.int32(tiles)
        return Span(zero, zero, end, end, masked=False)
    zero = jnp.int32(0)  # the sum has no axes of `jax.shard_map`, as loops want it
    low, full_low, full_high, high = (
        zero + refs.bounds[batch, tile, i] for i in range(4)
    )
    return Span(low, full_low, full_high, high, masked=True)


class Work(NamedTuple):
    """What one thread block computes.

    Attributes:
      batch: index.
      head: index of the query head (dq), or of the key head (dk, dv).
      tile: index of the tile of queries (dq), or of keys.
      span: tiles that its loop visits.
      warpgroup: index of the calling warpgroup.
    """

    batch: Any
    head: Any
    tile: Any
    span: Span
    warpgroup: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What the kernels know of a call when they are traced; sizes are padded.

    Attributes:
      batch: B.
      q_heads: H.
      kv_heads: K.
      q_length: T in whole tiles.
      kv_length: S in whole tiles.
      qk_dim: D.
      v_dim: E.
      dtype: of q, k, v, dO and of their gradients.
      scale: multiplies q·k.
      bias: offset of the sigmoid where it is not an operand.
      longest_last: whether later tiles of queries see more keys.
      activation: evaluates p.
      interpret: parameters of Pallas' interpreter, or False.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    qk_dim: int
    v_dim: int
    dtype: Any
    scale: float
    bias: float
    longest_last: bool
    activation: Activation
    interpret: Any

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q_heads // self.kv_heads

    @property
    def gradient_exponent(self) -> int:
        """Before its cast, dS is scaled by two to this power."""
        return min(MAX_GRADIENT_EXPONENT, self.activation.exponent)


def call_of(
    operands: Operands, options: Options, *, block_q: int, block_kv: int
) -> Call:
    """The facts of a call whose lengths are padded to whole blocks."""
    b, t, h, d = operands.q.shape
    s, kv_heads, e = operands.v.shape[1:]
    return Call(
        batch=b,
        q_heads=h,
        kv_heads=kv_heads,
        q_length=common.padded_length(t, block_q),
        kv_length=common.padded_length(s, block_kv),
        qk_dim=common.padded_head(d),
        v_dim=common.padded_head(e),
        dtype=operands.q.dtype,
        scale=options.scale,
        bias=options.bias,
        longest_last=options.right is not None,
        activation=common.activation(operands, options),
        interpret=common.interpreter(options),
    )


def padded_arrays(call: Call, operands: Operands, do: Any) -> tuple[Any, ...]:
    """q, k, v and dO in whole tiles."""
    return (
        common.pad_heads(operands.q, call.q_length),
        common.pad_heads(operands.k, call.kv_length),
        common.pad_heads(operands.v, call.kv_length),
        common.pad_heads(do.astype(call.dtype), call.q_length),
    )


def logits(call: Call, qk: Any, refs: Extras, work: Work, head: Any) -> Any:
    """From q·k, z times ``fold`` of the activation, without ALiBi."""
    fold = call.activation.fold
    bias = call.bias * fold if refs.bias is None else refs.bias[work.batch, head]
    return qk * (call.scale * fold) + bias


def mask_unless(full: Any, mask: Callable[[Any], Any], p: Any) -> Any:
    """``p``, through ``mask`` unless ``full``; None: there is nothing to mask."""
    return p if full is None else lax.cond(full, lambda p: p, mask, p)


def cast_probabilities(call: Call, p: Any) -> Any:
    """Operand P of the tensor cores, times ``2**exponent``."""
    exponent = call.activation.exponent
    return (p * 2.0**exponent if exponent else p).astype(call.dtype)


def score_gradients(p: Any, dp: Any) -> Any:
    """Gradient dS in float32: one multiplication and one fused multiply-add."""
    pdp = p * dp
    return pdp - p * pdp


def cast_gradients(call: Call, ds: Any) -> Any:
    """Operand dS of the tensor cores, times ``2**gradient_exponent``."""
    exponent = call.gradient_exponent
    return (ds * 2.0**exponent if exponent else ds).astype(call.dtype)


def left_operand(x: Any, buffer: Any) -> Any:
    """A tile as left operand of wgmma: registers, or memory for the interpreter.

    Args:
      x: the tile.
      buffer: where the interpreter, which only multiplies from memory, puts it; None
        outside of it.
    """
    if buffer is None:
        return x
    buffer[...] = x
    plgpu.commit_smem()
    return buffer


def parts_of(buffers: Any, index: Any) -> tuple[Any, Any]:
    """The interpreter's buffers of P and dS of one warpgroup, or twice None."""
    if buffers is None:
        return None, None
    return buffers.at[index, 0], buffers.at[index, 1]


def zeros(length: int, axis: int) -> Any:
    """float32 vector in registers that lies along ``axis`` of score tiles."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.layout_cast(jnp.zeros((length,), jnp.float32), layout)


def in_turn(i: Any, stages: int) -> Any:
    """Which of ``stages`` buffers step ``i`` uses."""
    return lax.rem(i, jnp.int32(stages))


def loop(steps: Any, body: Callable[..., Any], *carry: Any, start: Any = 0) -> Any:
    """``carry = body(i, *carry)`` for ``start <= i < steps``, in int32."""
    return lax.fori_loop(
        jnp.int32(start), jnp.int32(steps), lambda i, c: tuple(body(i, *c)), carry
    )


def copy_in_turn(i: Any, stages: int, free: Any, *copies: tuple[Any, Any, Any]) -> None:
    """Fills buffer ``i % stages`` once what it held ``stages`` steps ago was used.

    Args:
      i: step.
      stages: number of buffers.
      free: barriers at which the users of a buffer arrive.
      *copies: source, buffers and barriers at which the copy arrives.
    """
    slot = in_turn(i, stages)

    @pl.when(i >= stages)
    def _wait() -> None:
        plgpu.barrier_wait(free.at[slot])

    for source, buffers, ready in copies:
        plgpu.copy_gmem_to_smem(source, buffers.at[slot], ready.at[slot])


def drain(steps: Any, stages: int, free: Any) -> None:
    """Waits until the last buffers were used: barriers must not be left unobserved."""

    def wait(i: Any) -> tuple[()]:
        plgpu.barrier_wait(free.at[in_turn(i, stages)])
        return ()

    loop(steps, wait, start=jnp.maximum(steps - stages, 0))


def launch(
    call: Call,
    body: Callable[..., None],
    *,
    name: str,
    outputs: tuple[Any, ...],
    scratch: dict[str, Any],
    grid: dict[str, int],
    operands: tuple[Any, ...],
    added: tuple[Any, ...] = (),
) -> tuple[Any, ...]:
    """Runs ``body(*operands, *added, *outputs, **scratch)`` by three warpgroups.

    Args:
      call: facts.
      body: of references.
      name: shown by profilers.
      outputs: shapes and dtypes.
      scratch: shared memory and barriers; None where a call has no such thing.
      grid: name and size of each axis, the fastest one last.
      operands: arrays.
      added: references to arrays that the kernel adds to.
    """
    present = {key: value for key, value in scratch.items() if value is not None}
    absent = dict.fromkeys(scratch.keys() - present.keys())
    name = f"sigmoid_attention_{name}"
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
    )

    def block(*refs: Any) -> None:
        pl.run_scoped(
            lambda **found: body(*refs, **found, **absent),
            collective_axes="warpgroup",
            **present,
        )

    # `plgpu.kernel` adds a rule for `jax.vmap`, which takes no references to add to.
    operands = uniformly_varying(operands)
    kernel = pl.kernel(
        block,
        out_type=tuple(result_struct(x.shape, x.dtype, operands[0]) for x in outputs),
        mesh=mesh,
        compiler_params=common.compiler_params(),
        interpret=call.interpret,
        name=name,
    )
    with _mixed_axes():
        return kernel(*operands, *added)


def _mixed_axes() -> Any:
    """Lets values in a kernel vary over other axes of `jax.shard_map` than its inputs.

    As `plgpu.kernel` does: loop counters and such start as constants.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import config

        return config._check_vma(False)
    return contextlib.nullcontext()
