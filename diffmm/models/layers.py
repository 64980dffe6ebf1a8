"""Normalisation, rotary embedding, attention and feed-forward layers.

Letters: B rows, L row length, D width, H heads, K head dimension, F hidden width.
Parameters are float32 masters; every layer casts them to the dtype of its input.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from diffmm.typing import Array, AttentionFn

#: Name under which a checkpoint policy finds the output of an attention function.
MIXED_VALUES = "mixed_values"

_EPSILON = 1e-6


def fan_in_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Draws N(0, 1/fan_in), the standard parameterisation of a linear map."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def linear(x: Array, kernel: Array, *, inputs: int = 1) -> Array:
    """Contracts the last ``inputs`` axes of ``x`` with the first of ``kernel``.

    The product is taken between two matrices, all other axes flattened: XLA's CPU
    backend is markedly slower at the weight gradient of a product with several row
    axes.

    Args:
      x: ``[..., *inputs]``.
      kernel: ``[*inputs, *outputs]``, cast to the dtype of ``x``.
      inputs: number of contracted axes.

    Returns:
      ``[..., *outputs]``.
    """
    leading = x.shape[: x.ndim - inputs]
    outputs = kernel.shape[inputs:]
    fan_in = math.prod(kernel.shape[:inputs])
    product = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1).astype(x.dtype)
    return product.reshape(*leading, *outputs)


def rms_norm(x: Array, gain: Array) -> Array:
    """``x / rms(x) · gain`` over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + _EPSILON)
    gain = gain.reshape((1,) * (x.ndim - 1) + gain.shape)
    return (x32 * scale * gain).astype(x.dtype)


def rotary_angles(positions: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary embedding.

    Angle of position p and frequency i is ``p · base^(-2i / head_dim)``.

    Args:
      positions: int32 ``[B, L]``.
      head_dim: K, even.
      base: 10,000 in RoFormer.

    Returns:
      Two float32 arrays ``[B, L, 1, K/2]``; the third axis stands for heads.

    References:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
      arXiv 2104.09864, equation 15.
    """
    exponent = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim)
    frequency = (base**-exponent)[None, None, :]
    angle = positions.astype(jnp.float32)[:, :, None] * frequency
    return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + K/2) of ``x [B, L, H, K]`` by their angles."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Norm(nnx.Module):
    """RMS normalisation with a learned gain."""

    def __init__(self, width: int) -> None:
        """Gains start at 1."""
        self.gain = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """``[..., width]`` to the same."""
        return rms_norm(x, self.gain[...])


class Attention(nnx.Module):
    """Multi-head attention with rotary positions and QK normalisation.

    The gains of the QK normalisation are shared over heads.
    """

    def __init__(
        self, width: int, head_dim: int, attention: AttentionFn, *, rngs: nnx.Rngs
    ) -> None:
        """Kernels are ``[D, H, K]`` (query, key, value) and ``[H, K, D]`` (output)."""
        heads = width // head_dim
        shape = (width, heads, head_dim)
        self.query = nnx.Param(fan_in_normal(rngs.params(), shape, width))
        self.key = nnx.Param(fan_in_normal(rngs.params(), shape, width))
        self.value = nnx.Param(fan_in_normal(rngs.params(), shape, width))
        self.output = nnx.Param(
            fan_in_normal(rngs.params(), (heads, head_dim, width), width)
        )
        self.query_norm = Norm(head_dim)
        self.key_norm = Norm(head_dim)
        self.attention = attention

    def __call__(
        self, x: Array, angles: tuple[Array, Array], segment_ids: Array | None
    ) -> Array:
        """``[B, L, D]`` to the residual update ``[B, L, D]``."""
        query_BLHK = self.query_norm(linear(x, self.query[...]))
        key_BLHK = self.key_norm(linear(x, self.key[...]))
        mixed_BLHK = self.attention(
            rotate(query_BLHK, angles),
            rotate(key_BLHK, angles),
            linear(x, self.value[...]),
            segment_ids=segment_ids,
        )
        mixed_BLHK = checkpoint_name(mixed_BLHK, MIXED_VALUES)
        return linear(mixed_BLHK, self.output[...], inputs=2)


class SwiGLU(nnx.Module):
    """Feed-forward layer ``W_down (silu(W_gate x) · W_up x)``, no biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        """Kernels are ``[D, F]`` (gate, up) and ``[F, D]`` (down)."""
        self.gate = nnx.Param(fan_in_normal(rngs.params(), (width, hidden), width))
        self.up = nnx.Param(fan_in_normal(rngs.params(), (width, hidden), width))
        self.down = nnx.Param(fan_in_normal(rngs.params(), (hidden, width), hidden))

    def __call__(self, x: Array) -> Array:
        """``[B, L, D]`` to the residual update ``[B, L, D]``."""
        gate = jax.nn.silu(linear(x, self.gate[...]))
        return linear(gate * linear(x, self.up[...]), self.down[...])
