"""Forward pass: ``o = Σ_j σ(z_j) v_j``, without maxima, sums or rescaling.

A thread block of the kernel takes ``2 · block_q`` queries of one head, and visits the
tiles of ``block_kv`` keys that any of them sees.
"""

from __future__ import annotations

from typing import Any

from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.config import Tiles, tiles_from_table
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import (
    SMEM_LIMIT,
    activation,
    extras,
    pad_heads,
    padded_head,
    padded_length,
    smem_bytes,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.forward_block import (
    COMPUTE_WARPGROUPS,
    Plan,
    buffers,
    kernel,
)
from diffmm_kernels.sigmoid_attention.mosaic_gpu.work import Grid, group_size
from diffmm_kernels.sigmoid_attention.visibility import unrestricted

TABLE = "mosaic_gpu_forward"


def facts(operands: Operands, options: Options) -> dict[str, Any]:
    """What the rows of the table are chosen by."""
    return {
        "head_dim": padded_head(max(operands.q.shape[-1], operands.v.shape[-1])),
        "causal": options.right is not None,
        "masked": not unrestricted(operands, options),
        "segments": operands.q_segment_ids is not None,
        "alibi": operands.alibi_slopes is not None,
        "dtype": operands.q.dtype.name,
        "keys": operands.k.shape[1],
    }


def forward_tiles(operands: Operands, options: Options) -> Tiles:
    """The tiles that `forward` uses: the user's, or the table's.

    Raises:
      ValueError: the user's tiles need more shared memory than there is, or are not
        multiples of what the tensor cores work on.
    """
    chosen = options.config.forward if options.config is not None else None
    if chosen is None:
        return tiles_from_table(TABLE, **facts(operands, options))
    for name in ("block_q", "block_kv"):
        if getattr(chosen, name) % 64:
            raise ValueError(
                f"config.forward: {name} must be a multiple of 64, got {chosen}"
            )
    if chosen.stages < 2:
        raise ValueError(f"config.forward: stages must be at least 2, got {chosen}")
    d, e = padded_head(operands.q.shape[-1]), padded_head(operands.v.shape[-1])
    needed = forward_smem(chosen, d, e, operands.q.dtype, options.out_dtype)
    if needed > SMEM_LIMIT:
        raise ValueError(
            f"config.forward {chosen} needs {needed:,} bytes of shared memory for "
            f"head sizes {d} and {e}; there are {SMEM_LIMIT:,}"
        )
    return chosen


def forward_smem(tiles: Tiles, d: int, e: int, dtype: Any, out_dtype: Any) -> int:
    """Bytes of shared memory for padded head sizes ``d`` and ``e``."""
    shapes = buffers(tiles, d, e, dtype, out_dtype).values()
    return smem_bytes(*shapes, barriers=4 * tiles.stages + COMPUTE_WARPGROUPS + 1)


def forward(operands: Operands, options: Options) -> Any:
    """``[B, T, H, E]`` in ``options.out_dtype``."""
    tiles = forward_tiles(operands, options)
    sigma = activation(operands, options)
    rows = COMPUTE_WARPGROUPS * tiles.block_q
    b, t, h, _ = operands.q.shape
    s, kv_heads = operands.k.shape[1:3]
    q = pad_heads(operands.q, padded_length(t, rows))
    keys = padded_length(s, tiles.block_kv)
    k, v = pad_heads(operands.k, keys), pad_heads(operands.v, keys)
    d, e = k.shape[-1], v.shape[-1]
    grid = Grid(
        batch=b,
        heads=h,
        kv_heads=kv_heads,
        tiles=q.shape[1] // rows,
        group=group_size(b * kv_heads, keys * (d + e) * k.dtype.itemsize),
        last_first=options.right is not None,
    )
    plan = Plan(
        tiles=tiles,
        grid=grid,
        sigma=sigma,
        options=options,
        extras=extras(
            operands,
            options,
            sigma.fold,
            block_q=rows,
            block_kv=tiles.block_kv,
            axis=2,
        ),
        key_tiles=keys // tiles.block_kv,
        d=d,
        e=e,
        dtype=k.dtype,
    )
    o = kernel(plan)(q, k, v, *plan.extras.arrays)
    return o[:, :t, :, : operands.v.shape[-1]]
