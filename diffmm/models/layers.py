"""Normalisation, rotary embedding, attention and feed-forward layers.

Letters: B rows, L row length, D width, H heads, K head dimension, F hidden width,
G heads of keys and values.
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
from diffmm.typing import Array, AttentionFn, View
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


def repeat_heads(x: Array, num_heads: int) -> Array:
    """Gives every head of queries its keys or values.

    Args:
      x: ``[B, L, G, K]``; head g serves the queries ``g·H/G … (g+1)·H/G − 1``.
      num_heads: H, a multiple of G.

    Returns:
      ``[B, L, H, K]``; ``x`` itself if G is H.

    References:
      Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from
      Multi-Head Checkpoints", arXiv 2305.13245.
    """
    groups = x.shape[2]
    return x if groups == num_heads else jnp.repeat(x, num_heads // groups, axis=2)


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

    The gains of the QK normalisation are shared over heads. With ``num_kv_heads`` below
    the number of heads, neighbouring heads of queries share keys and values.
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
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
    ) -> None:
        """Kernels ``[D, H, K]``, ``[D, G, K]`` for key and value; ``[H, K, D]`` out."""
        heads = width // head_dim
        groups = heads if num_kv_heads is None else num_kv_heads

        def kernel(*shape: int) -> nnx.Param:
            return nnx.Param(fan_in_normal(rngs.params(), shape, width))

        def bias(heads: int) -> nnx.Param | None:
            if not qkv_bias:
                return None
            return nnx.Param(jnp.zeros((heads, head_dim), jnp.float32))

        self.query = kernel(width, heads, head_dim)
        self.key = kernel(width, groups, head_dim)
        self.value = kernel(width, groups, head_dim)
        self.output = kernel(heads, head_dim, width)
        self.query_bias = bias(heads)
        self.key_bias = bias(groups)
        self.value_bias = bias(groups)
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
        """Queries ``[B, L, H, K]``, keys and values ``[B, L, G, K]``.

        `repeat_heads` makes keys and values as many as the attention function expects.
        """
        query_BLHK = _projection(x, self.query, self.query_bias)
        key_BLGK = _projection(x, self.key, self.key_bias)
        if self.query_norm is not None:
            query_BLHK = self.query_norm(query_BLHK)
        if self.key_norm is not None:
            key_BLGK = self.key_norm(key_BLGK)
        if angles is not None:
            query_BLHK, key_BLGK = rotate(query_BLHK, angles), rotate(key_BLGK, angles)
        return query_BLHK, key_BLGK, _projection(x, self.value, self.value_bias)

    def _options(self, segment_ids: Array | None, view: View | None) -> dict[str, Any]:
        options: dict[str, Any] = {"segment_ids": segment_ids}
        if view is not None:
            options["view"] = view
        if self.bias_offset is not None:
            options["bias_offset"] = self.bias_offset[...]
        return options

    def mix(
        self,
        query: Array,
        key: Array,
        value: Array,
        segment_ids: Array | None,
        view: View | None = None,
    ) -> Array:
        """Calls the attention function.

        Args:
          query: ``[B, L, H, K]``; with a view ``[B, Q, H, K]``.
          key: ``[B, L, G, K]``; with a view ``[B, S, G, K]``.
          value: as ``key``.
          segment_ids: int32 ``[B, L]`` or None.
          view: what queries see, if it is not the row by its segments.

        Returns:
          Mixed values, of the shape of ``query``.
        """
        num_heads = query.shape[2]
        mixed = self.attention(
            query,
            repeat_heads(key, num_heads),
            repeat_heads(value, num_heads),
            **self._options(segment_ids, view),
        )
        return checkpoint_name(mixed, MIXED_VALUES)

    def project(self, mixed: Array) -> Array:
        """Mixed values ``[B, L, H, K]`` to the residual update ``[B, L, D]``."""
        return linear(mixed, self.output[...], inputs=2)

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
        view: View | None = None,
    ) -> Array:
        """``[B, L, D]`` to the residual update; ``angles`` None rotates nothing."""
        return self.project(self.mix(*self.heads(x, angles), segment_ids, view))

    def statistics(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
        view: View | None = None,
    ) -> AttentionStatistics:
        """Row mass and norms ``[H]`` of what `__call__` does with its arguments."""
        query, key, value = self.heads(x, angles)
        num_heads = query.shape[2]
        return attention_statistics(
            self.attention,
            query,
            repeat_heads(key, num_heads),
            repeat_heads(value, num_heads),
            **self._options(segment_ids, view),
        )


def _projection(x: Array, kernel: nnx.Param, bias: nnx.Param | None) -> Array:
    """``[B, L, D]`` to ``[B, L, heads, K]``."""
    product = linear(x, kernel[...])
    return product if bias is None else product + bias[...].astype(x.dtype)[None, None]


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
