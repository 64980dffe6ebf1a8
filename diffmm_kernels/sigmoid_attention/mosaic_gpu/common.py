"""What the forward and the backward kernels for Hopper share.

Inside a kernel, tiles of scores lie in registers in the layout of wgmma accumulators.
A vector over one axis of such a tile, one number per query for example, has that layout
reduced along the other axis. Which axis of the tile holds the queries is an argument,
because backward kernels also work on transposed tiles.

Rows and keys that only exist because lengths are padded to whole tiles need no mask
where all else is visible: their q, k, v and dO are zero, and so is all they add.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention.activation import (
    LOG2_E,
    POLYNOMIAL_4,
    POLYNOMIAL_6,
    polynomial_sigmoid,
    tanh_sigmoid,
)
from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.visibility import (
    positions,
    ranges,
    row_intervals,
    tile_plan,
    unrestricted,
)

#: Shared memory that one thread block of a Hopper GPU can have, in bytes.
SMEM_LIMIT = 232_448
#: Head sizes are padded to multiples of this: one swizzled line of 128 bytes.
HEAD_MULTIPLE = 64
#: Positions are handled as 2**23 + position, exact in float32.
MAX_LENGTH = 2**23

_TWO_23_BITS = 0x4B000000  # of float32 2**23; adding an integer n < 2**23 adds n


def padded_head(size: int) -> int:
    """A head size rounded up to what kernels work on."""
    return -(-size // HEAD_MULTIPLE) * HEAD_MULTIPLE


def padded_length(length: int, block: int) -> int:
    """A length rounded up to whole tiles."""
    return -(-length // block) * block


def pad_heads(x: Any, length: int) -> Any:
    """``[B, n, heads, size]`` filled with zeros to ``length`` rows and whole heads."""
    _, n, _, size = x.shape
    more = (0, 0), (0, length - n), (0, 0), (0, padded_head(size) - size)
    return jnp.pad(x, more) if any(high for _, high in more) else x


def pad_rows(x: Any, length: int, fill: int | float = 0) -> Any:
    """``[B, n]`` filled up to ``length``."""
    more = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, more)), constant_values=fill) if more else x


def refusal(operands: Operands, options: Options) -> str | None:
    """Why neither kernel can serve a call, or None; looks at shapes and dtypes."""
    dtype = operands.q.dtype.name
    if dtype not in ("bfloat16", "float16"):
        return f"q, k, v are {dtype}; the tensor cores take bfloat16 and float16"
    if options.out_dtype not in (dtype, "float32"):
        return f"out_dtype {options.out_dtype} is neither that of q nor float32"
    if operands.mask is not None:
        return "mask: dense masks have no tiles here; use windows, lengths, segment ids"
    if operands.logit_bias is not None:
        return "logit_bias has no tiles here"
    longest = max(operands.q.shape[1], operands.k.shape[1])
    if longest >= MAX_LENGTH:
        return f"q, k: lengths must be below {MAX_LENGTH}, got {longest}"
    if options.interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return f"interpret=True needs jax 0.11.2 or newer, this is {jax.__version__}"
    if not unrestricted(operands, options) and _miscompiles():
        return (
            "CUDA 12.8.0 to 12.9.0 compile masked kernels wrongly; "
            "install CUDA 12.9.1 or newer"
        )
    return None


def _miscompiles() -> bool:
    """Whether the CUDA in use is one whose assembler breaks masked wgmma loops."""
    with contextlib.suppress(Exception):  # no CUDA, or a JAX that hides its version
        from jax._src.lib import cuda_versions

        if cuda_versions is not None:
            return 12080 <= cuda_versions.cuda_runtime_get_version() < 12091
    return False


def interpreter(options: Options) -> Any:
    """What `plgpu.kernel` takes as ``interpret``: False or interpreter parameters.

    The interpreter runs the three warpgroups of a block in threads of XLA's pool, which
    wait for each other: on less than four CPU cores it needs
    ``--xla_force_host_platform_device_count=4`` in ``XLA_FLAGS``, or it may hang.

    Raises:
      NotImplementedError: this JAX cannot interpret Hopper kernels.
    """
    if not options.interpret:
        return False
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            "interpreting Mosaic GPU kernels needs jax 0.11.2 or newer, this is "
            f"{jax.__version__}"
        )
    return plgpu.InterpretGPUParams()


def compiler_params() -> Any:
    """Of both kernels: one-instruction exponentials and hyperbolic tangents."""
    return plgpu.CompilerParams(approx_math=True)


def tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Scratch for wgmma and TMA: tiles of 8 rows by 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def smem_bytes(*buffers: tuple[tuple[int, ...], Any], barriers: int) -> int:
    """Shared memory of buffers ``(shape, dtype)`` and a number of barriers."""
    size = 8 * barriers
    for shape, dtype in buffers:
        size += math.prod(shape) * jnp.dtype(dtype).itemsize
        size = -(-size // 1024) * 1024  # swizzled buffers start at multiples of 1024
    return size


@dataclasses.dataclass(frozen=True)
class Activation:
    """How a kernel evaluates p = σ(z).

    Attributes:
      coefficients: of the polynomial, or None for the tanh form.
      exponent: with `scaled`, the result is ``2**exponent · p``: float16 would lose
        the small p of long sequences.
    """

    coefficients: tuple[float, ...] | None
    exponent: int = 0

    @property
    def fold(self) -> float:
        """What logits are multiplied by before `__call__`."""
        return 0.5 if self.coefficients is None else LOG2_E

    def __call__(self, z: Any, *, scaled: bool = False) -> Any:
        """Weights in float32 for ``z = fold · logits``."""
        factor = 2.0**self.exponent if scaled else 1.0
        if self.coefficients is None:
            p = tanh_sigmoid(z)
            return p * factor if factor != 1.0 else p
        return polynomial_sigmoid(z, tuple(factor * c for c in self.coefficients))


def activation(operands: Operands, options: Options) -> Activation:
    """The activation that dtype and precision ask for."""
    half = operands.q.dtype == jnp.float16
    exponent = min(15, round(math.log2(operands.k.shape[1]))) if half else 0
    if options.precision == "fast":
        return Activation(None, exponent)
    accurate = half or options.precision == "high"
    return Activation(POLYNOMIAL_6 if accurate else POLYNOMIAL_4, exponent)


class Extras(NamedTuple):
    """Operands of a kernel beside q, k, v (and dO); absent ones are None.

    All are padded to whole tiles.

    Attributes:
      bias: float32 ``[B, H]``, run-time bias times `Activation.fold`.
      slopes: float32 ``[B, H]``, ALiBi slopes times the same.
      position: float32 ``[B, Tp]``, position of each query plus 2**23; with slopes.
      bounds: int32 ``[B, tiles, 4]``: low, full_low, full_high, high of the loop of
        each tile, see `visibility.Ranges`; None where everything is visible.
      start: int32 ``[B, Tp]``, with left windows.
      end: int32 ``[B, Tp]``, with bounds.
      q_ids: int32 ``[B, Tp]``.
      kv_ids: int32 ``[B, Sp]``.
    """

    bias: Any = None
    slopes: Any = None
    position: Any = None
    bounds: Any = None
    start: Any = None
    end: Any = None
    q_ids: Any = None
    kv_ids: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Those that are there, in order."""
        return tuple(x for x in self if x is not None)

    def bind(self, refs: Any) -> Extras:
        """The same with each array replaced by the next of ``refs``."""
        refs = iter(refs)
        return Extras(*(None if x is None else next(refs) for x in self))


def extras(
    operands: Operands,
    options: Options,
    fold: float,
    *,
    block_q: int,
    block_kv: int,
    axis: int,
    at_least_one: bool = True,
) -> Extras:
    """Prepares the further operands of a kernel.

    Args:
      operands: of the call.
      options: of the call.
      fold: of the activation.
      block_q: rows of queries per tile of the plan (of a whole thread block, where its
        warpgroups share one loop).
      block_kv: keys per tile of the plan.
      axis: what the kernel loops over, as in `visibility.ranges`.
      at_least_one: tiles with nothing to visit visit their first one, masked, so that
        the kernel's loop never is empty.
    """
    t, s = operands.q.shape[1], operands.k.shape[1]
    tp, sp = padded_length(t, block_q), padded_length(s, block_kv)
    bias = slopes = position = None
    if operands.bias is not None:
        bias = operands.bias.astype(jnp.float32) * fold
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.astype(jnp.float32) * fold
        position = positions(operands, options).astype(jnp.float32) + 2.0**23
        position = pad_rows(position, tp, 2.0**23)
    if unrestricted(operands, options):
        return Extras(bias=bias, slopes=slopes, position=position)
    bounds = ranges(tile_plan(operands, options, block_q, block_kv), axis)
    if at_least_one:
        bounds = bounds._replace(high=jnp.maximum(bounds.high, 1))
    start, end = row_intervals(operands, options)
    ids = operands.q_segment_ids, operands.kv_segment_ids
    return Extras(
        bias=bias,
        slopes=slopes,
        position=position,
        bounds=jnp.stack(bounds, -1),
        # Without windows to the left every interval starts at 0.
        start=None if options.left is None else pad_rows(start, tp),
        end=pad_rows(end, tp),
        q_ids=None if ids[0] is None else pad_rows(ids[0], tp, -1),
        kv_ids=None if ids[1] is None else pad_rows(ids[1], sp, -2),
    )


_LOAD_TAKES_INDEX = (
    inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
)


def load_vector(ref: Any, axis: int) -> Any:
    """A vector in GMEM or SMEM to registers, to lie along ``axis`` of score tiles."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def along(vector: Any, shape: tuple[int, int], axis: int) -> Any:
    """Repeats a vector that lies along ``axis`` to a tile."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def key_index(first: Any, shape: tuple[int, int], query_axis: int) -> Any:
    """int32 tile: index of each score's key; ``first`` is that of the tile's first."""
    index = plgpu.broadcasted_iota(
        jnp.int32, shape, 1 - query_axis, layout=plgpu.Layout.WGMMA
    )
    return index + first


class Rows(NamedTuple):
    """What masking needs of the queries of a tile, vectors in registers or None."""

    start: Any
    end: Any
    ids: Any


def load_rows(refs: Extras, batch: Any, rows: Any, query_axis: int) -> Rows:
    """Loads the mask's vectors of the queries ``rows`` (a `pl.ds`)."""

    def load(ref: Any) -> Any:
        return None if ref is None else load_vector(ref.at[batch, rows], query_axis)

    return Rows(load(refs.start), load(refs.end), load(refs.q_ids))


def masked(p: Any, rows: Rows, key_ids: Any, first_key: Any, query_axis: int) -> Any:
    """``p`` where visible, 0 elsewhere.

    Args:
      p: tile of float32.
      rows: from `load_rows`.
      key_ids: vector of the segment ids of the tile's keys, or None.
      first_key: index of the tile's first key.
      query_axis: which axis of the tile holds the queries.
    """
    shape = p.shape
    key = key_index(first_key, shape, query_axis)
    seen = key < along(rows.end, shape, query_axis)
    if rows.start is not None:
        seen = seen & (key >= along(rows.start, shape, query_axis))
    if rows.ids is not None:
        ids = along(rows.ids, shape, query_axis)
        seen = seen & (ids == along(key_ids, shape, 1 - query_axis))
    return jnp.where(seen, p, 0.0)


def subtract_alibi(
    z: Any, slope: Any, position: Any, first_key: Any, query_axis: int
) -> Any:
    """``z - slope·|position - key|``: three instructions per score.

    Args:
      z: tile of float32.
      slope: scalar.
      position: vector of `Extras.position` for the tile's queries.
      first_key: index of the tile's first key.
      query_axis: which axis of the tile holds the queries.
    """
    # An integer conversion would cost as much as an exponential; the bits of the float
    # 2**23 + n are those of 2**23 plus n.
    bits = key_index(first_key + _TWO_23_BITS, z.shape, query_axis)
    key = lax.bitcast_convert_type(bits, jnp.float32)
    return z - slope * jnp.abs(along(position, z.shape, query_axis) - key)
