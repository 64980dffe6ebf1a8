"""Normalisation, rotary embedding, attention and feed-forward layers.

Letters: B rows, L row length, D width, H heads, K head dimension, F hidden width.
Parameters are float32 masters; every layer casts them to the dtype of its input.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from diffmm.models.attention import AttentionStatistics, attention_statistics
from diffmm.models.config import NormKind
from diffmm.typing import Array, AttentionFn
from diffmm_kernels.sigmoid_attention import OUTPUT_NAME

#: Name under which a checkpoint policy finds the output of any attention function; the
#: kernels' own, so that one policy serves both.
MIXED_VALUES = OUTPUT_NAME

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


def rms_norm(x: Array, gain: Array, epsilon: float = _EPSILON) -> Array:
    """``x / rms(x) · gain`` over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    gain = gain.reshape((1,) * (x.ndim - 1) + gain.shape)
    return (x32 * scale * gain).astype(x.dtype)


def layer_norm(x: Array, gain: Array, bias: Array, epsilon: float = _EPSILON) -> Array:
    """``(x - mean(x)) / std(x) · gain + bias`` over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return (rms_norm(centred, gain, epsilon) + bias).astype(x.dtype)


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
    """Normalisation with learned gain: RMS, or mean and variance with a bias too."""

    def __init__(
        self, width: int, kind: NormKind = "rms", epsilon: float = _EPSILON
    ) -> None:
        """Gains start at 1, biases at 0."""
        self.gain = nnx.Param(jnp.ones((width,), jnp.float32))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.kind = kind
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """``[..., width]`` to the same."""
        if self.kind == "layer":
            return layer_norm(x, self.gain[...], self.bias[...], self.epsilon)
        return rms_norm(x, self.gain[...], self.epsilon)


class Attention(nnx.Module):
    """Multi-head attention with normalised queries and keys.

    The gains of the QK normalisation are shared over heads.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        attention: AttentionFn,
        *,
        rngs: nnx.Rngs,
        qk_norm: NormKind | None = "rms",
        epsilon: float = _EPSILON,
        trainable_bias: Literal["layer", "head"] | None = None,
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
        self.query_norm = Norm(head_dim, qk_norm, epsilon) if qk_norm else None
        self.key_norm = Norm(head_dim, qk_norm, epsilon) if qk_norm else None
        # From 0, so that weight decay pulls the bias towards its rule.
        sharing = {"head": (heads,), "layer": ()}
        self.bias_offset = (
            nnx.Param(jnp.zeros(sharing[trainable_bias], jnp.float32))
            if trainable_bias
            else None
        )
        self.attention = attention

    def heads(
        self, x: Array, angles: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values ``[B, L, H, K]`` for the attention function."""
        query_BLHK = linear(x, self.query[...])
        key_BLHK = linear(x, self.key[...])
        if self.query_norm is not None:
            query_BLHK = self.query_norm(query_BLHK)
        if self.key_norm is not None:
            key_BLHK = self.key_norm(key_BLHK)
        if angles is not None:
            query_BLHK, key_BLHK = rotate(query_BLHK, angles), rotate(key_BLHK, angles)
        return query_BLHK, key_BLHK, linear(x, self.value[...])

    def _options(self, segment_ids: Array | None) -> dict[str, Any]:
        options: dict[str, Any] = {"segment_ids": segment_ids}
        if self.bias_offset is not None:
            options["bias_offset"] = self.bias_offset[...]
        return options

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
    ) -> Array:
        """``[B, L, D]`` to the residual update; ``angles`` None rotates nothing."""
        mixed_BLHK = self.attention(
            *self.heads(x, angles), **self._options(segment_ids)
        )
        mixed_BLHK = checkpoint_name(mixed_BLHK, MIXED_VALUES)
        return linear(mixed_BLHK, self.output[...], inputs=2)

    def statistics(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
    ) -> AttentionStatistics:
        """Row mass and norms ``[H]`` of what `__call__` does with its arguments."""
        return attention_statistics(
            self.attention, *self.heads(x, angles), **self._options(segment_ids)
        )


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


class GELU(nnx.Module):
    """Feed-forward layer ``W_down gelu(W_up x)``, exact gelu, no biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        """Kernels are ``[D, F]`` (up) and ``[F, D]`` (down)."""
        self.up = nnx.Param(fan_in_normal(rngs.params(), (width, hidden), width))
        self.down = nnx.Param(fan_in_normal(rngs.params(), (hidden, width), hidden))

    def __call__(self, x: Array) -> Array:
        """``[B, L, D]`` to the residual update ``[B, L, D]``."""
        hidden = jax.nn.gelu(linear(x, self.up[...]), approximate=False)
        return linear(hidden, self.down[...])
