"""Shape, precision and recipe of a transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp

from diffmm.typing import Array

AttentionKind = Literal["softmax", "sigmoid"]
Positions = Literal["rope", "alibi", "none"]
NormKind = Literal["rms", "layer"]
MLPKind = Literal["swiglu", "gelu"]
BiasSharing = Literal["layer", "head"]


def check_choice(name: str, value: Any, kind: Any, *, optional: bool = False) -> None:
    """Refuses what is not a member of a ``Literal``."""
    allowed = (*get_args(kind), None) if optional else get_args(kind)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape, precision and recipe of a transformer.

    Attributes:
      vocabulary_size: V, rows of the embedding and columns of the unembedding.
      width: D.
      num_layers: blocks, stacked on a leading axis.
      head_dim: K; ``width / head_dim`` heads.
      num_kv_heads: G, heads of keys and values; each serves H / G neighbouring heads of
        queries (grouped-query attention). None is as many as heads of queries.
      qkv_bias: queries, keys and values have a bias, from 0.
      mlp_ratio: hidden width of the feed-forward layer over ``width``; 2 gives 10·D²
        per block with SwiGLU.
      mlp_width: the hidden width itself, instead of ``mlp_ratio``.
      mlp: ``"swiglu"``, or ``"gelu"`` with two matrices instead of three.
      attention: ``"softmax"``, or ``"sigmoid"``: weights ``σ(q·k/√K + b)`` that are not
        normalised over keys. Nothing else changes with it.
      length: n, the row length that the model is trained for; sigmoid attention needs
        it for its bias ``b = -log n`` and never looks at a batch. Rows of another
        length keep b; a copy of the configuration with their length keeps the mass of
        the weights instead. Parameters are the same.
      attention_bias: another b of sigmoid attention; None is ``-log(length)``.
      trainable_bias: a learned offset of b, from 0, for each ``"layer"`` or each
        ``"head"``; None = b is fixed.
      causal: positions see themselves and those before only.
      causal_block: positions see their own block ``position // causal_block`` and those
        before it (block diffusion); 0 = off.
      positions: ``"rope"`` rotates queries and keys; ``"alibi"`` subtracts
        ``slope · distance`` from the logits, distances counted along the row;
        ``"none"``.
      rope_base: base of the rotary frequencies.
      num_positions: learned absolute positions, added to the token embeddings beside
        ``positions``; 0 = none. Rows may not be longer then.
      norm: of the residual stream, ``"rms"``, or ``"layer"`` with bias.
      norm_epsilon: added to the mean square, or the variance, in every norm.
      qk_norm: norm of queries and keys over the head dimension, or None.
      hybrid_norm: a second norm at the end of both branches,
        ``x + norm2(attention(norm1(x)))``; with sigmoid attention it keeps gradients
        from spiking at long rows.
      layer_scale: initial value of a learned gain per channel at the end of both
        branches (1e-4 for vision and speech); None = no gain.
      attention_residual: what the attention branch is multiplied by before it joins
        the residual stream, for all layers or one number per layer: 1, or
        m_depth^-α under CompleteP.
      mlp_residual: the same of the feed-forward branch.
      tied: the unembedding is the embedding, transposed; there is no parameter of that
        name then. An embedding of `embedding_std` 1 gives logits of order √D.
      embedding_std: standard deviation of the embeddings at initialisation.
      unembedding_std: of the unembedding; None is 1/D, logits near 0 at every width.
      compute_dtype: dtype of activations ("float32" or "bfloat16"); parameters are
        always float32 masters, and norms, attention weights and logits always float32.
      remat: keep only the input of each block for the backward pass. Otherwise the
        results of its matrix products and of attention are kept and the rest is
        computed again.
      scan: run the blocks by `jax.lax.scan` (compile time independent of depth);
        False unrolls them, for inspection. Both give the same numbers.

    References:
      Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid
      Self-Attention", arXiv 2409.04431.
    """

    vocabulary_size: int
    width: int
    num_layers: int
    head_dim: int = 128
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    mlp_ratio: float = 2.0
    mlp_width: int | None = None
    mlp: MLPKind = "swiglu"
    attention: AttentionKind = "softmax"
    length: int | None = None
    attention_bias: float | None = None
    trainable_bias: BiasSharing | None = None
    causal: bool = False
    causal_block: int = 0
    positions: Positions = "rope"
    rope_base: float = 10_000.0
    num_positions: int = 0
    norm: NormKind = "rms"
    norm_epsilon: float = 1e-6
    qk_norm: NormKind | None = "rms"
    hybrid_norm: bool = False
    layer_scale: float | None = None
    attention_residual: float | tuple[float, ...] = 1.0
    mlp_residual: float | tuple[float, ...] = 1.0
    tied: bool = False
    embedding_std: float = 1.0
    unembedding_std: float | None = None
    compute_dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    def __post_init__(self) -> None:
        """Refuses shapes and combinations that no transformer has."""
        for name in ("vocabulary_size", "width", "num_layers", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.num_positions < 0:
            raise ValueError(
                f"num_positions must not be negative, got {self.num_positions}"
            )
        if self.width % self.head_dim:
            raise ValueError(
                f"width must be a multiple of head_dim, got width={self.width} and "
                f"head_dim={self.head_dim}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary pairs, got {self.head_dim}"
            )
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                "compute_dtype must be 'float32', 'bfloat16' or 'float16', got "
                f"{self.compute_dtype!r}"
            )
        for name in ("attention_residual", "mlp_residual"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)) and len(value) != self.num_layers:
                raise ValueError(
                    f"{name} needs one number for each of num_layers="
                    f"{self.num_layers}, got {len(value)}"
                )
        if self.mlp_hidden < 1:
            if self.mlp_width is not None:
                raise ValueError(f"mlp_width must be at least 1, got {self.mlp_width}")
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        check_choice("mlp", self.mlp, MLPKind)
        check_choice("positions", self.positions, Positions)
        check_choice("norm", self.norm, NormKind)
        check_choice("qk_norm", self.qk_norm, NormKind, optional=True)
        for name in ("norm_epsilon", "embedding_std", "unembedding_std", "layer_scale"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive, got {value}")
        self._check_attention()

    def _check_attention(self) -> None:
        if self.causal_block < 0 or (self.causal and self.causal_block):
            raise ValueError(
                "causal_block must not be negative, and 0 where causal is on, got "
                f"{self.causal_block} with causal={self.causal}"
            )
        if self.key_heads < 1 or self.num_heads % self.key_heads:
            raise ValueError(
                f"num_kv_heads must divide the {self.num_heads} heads of width / "
                f"head_dim, got {self.num_kv_heads}"
            )
        check_choice("attention", self.attention, AttentionKind)
        check_choice("trainable_bias", self.trainable_bias, BiasSharing, optional=True)
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.attention == "sigmoid":
            if self.length is None:
                raise ValueError(
                    "length must be given for attention='sigmoid': the row length "
                    "trained for, whose bias is -log(length)"
                )
            if self.attention_bias is not None and not math.isfinite(
                self.attention_bias
            ):
                raise ValueError(
                    f"attention_bias must be finite, got {self.attention_bias}"
                )
            return
        for name in ("attention_bias", "trainable_bias"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for attention='sigmoid': softmax does not feel a "
                    f"constant, got {getattr(self, name)!r}"
                )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    @property
    def key_heads(self) -> int:
        """G, heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_hidden(self) -> int:
        """F, the hidden width of the feed-forward layer."""
        if self.mlp_width is not None:
            return self.mlp_width
        return round(self.width * self.mlp_ratio)

    def residuals(self) -> Array | None:
        """Multipliers of both branches ``[num_layers, 2]``; None if all are 1."""
        pair = (self.attention_residual, self.mlp_residual)
        if pair == (1.0, 1.0):
            return None
        columns = [jnp.broadcast_to(jnp.asarray(x), self.num_layers) for x in pair]
        return jnp.stack(columns, axis=1).astype(self.compute_dtype)


def training_flops_per_token(config: TransformerConfig, length: int) -> int:
    """Forward and backward FLOPs per token, logits at every position.

    ``6·N_blocks + 6·V·D + 12·layers·D·L``, matrices only; half of the last term if
    attention is causal.
    """
    d = config.width
    products = 3 if config.mlp == "swiglu" else 2
    heads = 2 * (config.num_heads + config.key_heads)
    block = heads * config.head_dim * d + products * d * config.mlp_hidden
    attention = 12 * config.num_layers * d * length
    return (
        6 * config.num_layers * block
        + 6 * config.vocabulary_size * d
        + (attention // 2 if config.causal else attention)
    )
