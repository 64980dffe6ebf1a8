"""The definition, dense: what every other implementation is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
)
from diffmm_kernels.sigmoid_attention.visibility import positions, visible


def probabilities(operands: Operands, options: Options) -> Any:
    """``p = σ(scale·q·k + bias - ALiBi + logit_bias)`` where visible, 0 elsewhere.

    Returns:
      ``[B, H, T, S]`` in float32, or float64 for float64 inputs.
    """
    q, k = operands.q, operands.k
    real = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    q, k = q.astype(real), k.astype(real)
    b, t, h, d = q.shape
    s, kv_heads = k.shape[1:3]
    q_BTKGD = q.reshape(b, t, kv_heads, h // kv_heads, d)
    z = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k, precision=jax.lax.Precision.HIGHEST)
    z = z.reshape(b, h, t, s) * options.scale
    if operands.bias is None:
        z = z + options.bias
    else:
        z = z + operands.bias[:, :, None, None]
    if operands.alibi_slopes is not None:
        key = jnp.arange(s, dtype=jnp.int32)[None, None, :]
        distance = jnp.abs(positions(operands, options)[:, :, None] - key)
        slopes = operands.alibi_slopes[:, :, None, None]
        z = z - slopes * distance[:, None].astype(real)
    if operands.logit_bias is not None:
        z = z + operands.logit_bias.astype(real)
    # The mask falls on p, not on z: no infinities, and masked gradients are exactly 0.
    return jnp.where(visible(operands, options), jax.nn.sigmoid(z), 0.0)


def forward(operands: Operands, options: Options) -> Any:
    """``o = Σ_j p_j v_j``: memory quadratic in the length, differentiable in all modes.

    Returns:
      ``[B, T, H, E]`` in ``options.out_dtype``.
    """
    p_BHTS = probabilities(operands, options)
    b, h, t, s = p_BHTS.shape
    kv_heads = operands.k.shape[2]
    p_BKGTS = p_BHTS.reshape(b, kv_heads, h // kv_heads, t, s)
    o_BTKGE = jnp.einsum(
        "bkgts,bske->btkge",
        p_BKGTS,
        operands.v.astype(p_BHTS.dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return o_BTKGE.reshape(b, t, h, -1).astype(options.out_dtype)


def supports(operands: Operands, options: Options) -> str | None:
    """Everything is supported."""
    del operands, options
    return None


def backward(operands: Operands, options: Options, do: Any, needs: Needs) -> Gradients:
    """The gradients by automatic differentiation of `forward`."""
    names = ["q", "k", "v"]
    names += [name for name in ("bias", "logit_bias") if getattr(needs, name)]

    def of(*values: Any) -> Any:
        return forward(
            operands._replace(**dict(zip(names, values, strict=True))), options
        )

    _, pullback = jax.vjp(of, *(getattr(operands, name) for name in names))
    return Gradients(**dict(zip(names, pullback(do), strict=True)))
