"""The bidirectional denoiser over one discrete stream.

Letters: B rows, L row length, D width, K scored positions, V joint vocabulary.

No time input: for the absorbing process the optimal denoiser does not depend on the
diffusion time given the masked sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffmm._tree import map_with_name
from diffmm.models.attention import softmax_attention
from diffmm.models.layers import (
    MIXED_VALUES,
    Attention,
    Norm,
    SwiGLU,
    fan_in_normal,
    rotary_angles,
)
from diffmm.typing import Array, AttentionFn, Params, PredictFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and precision of a transformer.

    Attributes:
      vocabulary_size: V, rows of the embedding and columns of the unembedding.
      width: D.
      num_layers: blocks, stacked on a leading axis.
      head_dim: K; ``width / head_dim`` heads.
      mlp_ratio: hidden width of SwiGLU over ``width``; 2 gives 10·D² per block.
      rope_base: base of the rotary frequencies.
      num_positions: learned absolute positions, added to the token embeddings beside
        the rotary ones; 0 = none. Rows may not be longer then.
      attention_residual: what the attention branch is multiplied by before it joins
        the residual stream, for all layers or one number per layer: 1, or
        m_depth^-α under CompleteP.
      mlp_residual: the same of the feed-forward branch.
      compute_dtype: dtype of activations ("float32" or "bfloat16"); parameters are
        always float32 masters, and norms, softmax and logits always float32.
      remat: keep only the input of each block for the backward pass. Otherwise the
        results of its matrix products are kept and the rest is computed again.
      scan: run the blocks by `jax.lax.scan` (compile time independent of depth);
        False unrolls them, for inspection. Both give the same numbers.
    """

    vocabulary_size: int
    width: int
    num_layers: int
    head_dim: int = 128
    mlp_ratio: float = 2.0
    rope_base: float = 10_000.0
    num_positions: int = 0
    attention_residual: float | tuple[float, ...] = 1.0
    mlp_residual: float | tuple[float, ...] = 1.0
    compute_dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    def __post_init__(self) -> None:
        """Refuses shapes that no transformer has."""
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
        if self.head_dim % 2:
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
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def mlp_hidden(self) -> int:
        """F, the hidden width of the feed-forward layer."""
        return round(self.width * self.mlp_ratio)

    def residuals(self) -> Array | None:
        """Multipliers of both branches ``[num_layers, 2]``; None if all are 1."""
        pair = (self.attention_residual, self.mlp_residual)
        if pair == (1.0, 1.0):
            return None
        columns = [jnp.broadcast_to(jnp.asarray(x), self.num_layers) for x in pair]
        return jnp.stack(columns, axis=1).astype(self.compute_dtype)


# What the backward pass keeps of a block: results of products with weights, and the
# mixed values of attention. Norms, rotations, gates and attention weights are cheap to
# compute again and expensive to write and read: without a policy a scan stores every
# intermediate of every layer, which is larger and, on CPU, slower.
_save_matrix_products = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(MIXED_VALUES),
)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(
        self, config: TransformerConfig, attention: AttentionFn, *, rngs: nnx.Rngs
    ) -> None:
        """See `TransformerConfig`."""
        width = config.width
        self.attention_norm = Norm(width)
        self.attention = Attention(width, config.head_dim, attention, rngs=rngs)
        self.mlp_norm = Norm(width)
        self.mlp = SwiGLU(width, config.mlp_hidden, rngs=rngs)

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        segment_ids: Array | None,
        residuals: Array | None = None,
    ) -> Array:
        """``[B, L, D]`` to ``[B, L, D]``; ``residuals [2]`` multiply the branches."""
        mixed = self.attention(self.attention_norm(x), angles, segment_ids)
        x = x + (mixed if residuals is None else residuals[0] * mixed)
        hidden = self.mlp(self.mlp_norm(x))
        return x + (hidden if residuals is None else residuals[1] * hidden)


def _stacked_blocks(
    config: TransformerConfig, attention: AttentionFn, key: Array
) -> Block:
    """One `Block` whose every parameter has a leading axis of ``num_layers``."""

    def state_of(layer_key: Array) -> Any:
        return nnx.split(Block(config, attention, rngs=nnx.Rngs(layer_key)))[1]

    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Block(config, attention, rngs=nnx.Rngs(0)))
    )
    states = jax.vmap(state_of)(jax.random.split(key, config.num_layers))
    return nnx.merge(graphdef, states)


class Denoiser(nnx.Module):
    """Bidirectional transformer that predicts clean tokens from partly masked ones.

    Pre-RMSNorm, per-head QK normalisation, RoPE, SwiGLU, untied embeddings.

    Example:
      >>> config = TransformerConfig(
      ...     vocabulary_size=16, width=8, num_layers=2, head_dim=4)
      >>> model = Denoiser(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), jnp.int32)).shape
      (1, 5, 16)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        attention: AttentionFn = softmax_attention,
    ) -> None:
        """Draws parameters from ``rngs.params``.

        Args:
          config: shape and precision.
          rngs: random streams; only ``params`` is used.
          attention: any function of `diffmm.typing.AttentionFn`.
        """
        self.config = config
        width = config.width
        shape = (config.vocabulary_size, width)
        self.embedding = nnx.Param(fan_in_normal(rngs.params(), shape, 1))
        if config.num_positions:
            self.position_embedding = nnx.Param(
                fan_in_normal(rngs.params(), (config.num_positions, width), 1)
            )
        self.blocks = _stacked_blocks(config, attention, rngs.params())
        self.final_norm = Norm(width)
        # N(0, 1/D²): logits start near 0, hence the loss near log V, at every width.
        self.unembedding = nnx.Param(
            fan_in_normal(rngs.params(), (width, config.vocabulary_size), width**2)
        )

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Final normalised activations ``[B, L, D]`` in the compute dtype.

        Args:
          tokens: int32 ``[B, L]``.
          positions: int32 ``[B, L]``; 0 … L−1 by default.
          segment_ids: int32 ``[B, L]``, 0 = padding; one segment by default.

        Returns:
          ``[B, L, D]``, to be multiplied by ``unembedding [D, V]``.

        Raises:
          ValueError: rows longer than ``num_positions`` of a model that has them.
        """
        config = self.config
        if config.num_positions and tokens.shape[1] > config.num_positions:
            raise ValueError(
                f"tokens: rows of {tokens.shape[1]} given, the model has "
                f"num_positions={config.num_positions}"
            )
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
            )
        angles = rotary_angles(positions, config.head_dim, config.rope_base)
        x = self.embedding[...][tokens]
        if config.num_positions:
            x = x + self.position_embedding[...][positions]
        x = x.astype(config.compute_dtype)
        graphdef, stacked = nnx.split(self.blocks)

        def apply_block(x: Array, layer: Any) -> tuple[Array, None]:
            state, residuals = layer
            return nnx.merge(graphdef, state)(x, angles, segment_ids, residuals), None

        apply_block = jax.checkpoint(
            apply_block, policy=None if config.remat else _save_matrix_products
        )
        layers = (stacked, config.residuals())
        if config.scan:
            x, _ = jax.lax.scan(apply_block, x, layers)
        else:
            for index in range(config.num_layers):
                x, _ = apply_block(
                    x, jax.tree.map(lambda leaf, i=index: leaf[i], layers)
                )
        return self.final_norm(x)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Float32 logits ``[B, L, V]``; arguments as in `hidden`."""
        hidden = self.hidden(tokens, positions, segment_ids)
        return unembed(hidden, self.unembedding[...])


def unembed(hidden: Array, unembedding: Array) -> Array:
    """``hidden [..., D] · unembedding [D, V]`` accumulated and returned in float32."""
    return jnp.einsum(
        "...d,dv->...v",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def predict_fn(graphdef: Any) -> PredictFn:
    """The denoiser as samplers see it: logits of the scored positions only.

    Args:
      graphdef: first result of ``nnx.split(model)`` of a `Denoiser`.

    Returns:
      A `diffmm.typing.PredictFn` of ``(params, tokens, positions, segment_ids,
      scored)``; the unembedding is applied to the K scored positions alone.
    """

    def predict(
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Array:
        model = nnx.merge(graphdef, params)
        hidden_BLD = model.hidden(tokens, positions, segment_ids)
        hidden_BKD = jnp.take_along_axis(hidden_BLD, scored[:, :, None], axis=1)
        return unembed(hidden_BKD, model.unembedding[...])

    return predict


_LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "position_embedding": ("sequence", "embed"),
    "unembedding": ("embed", "vocab"),
    "blocks/attention/query": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/key": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/value": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/output": ("layers", "heads", "head_dim", "embed"),
    "blocks/attention/query_norm/gain": ("layers", "head_dim"),
    "blocks/attention/key_norm/gain": ("layers", "head_dim"),
    "blocks/attention_norm/gain": ("layers", "embed"),
    "blocks/mlp_norm/gain": ("layers", "embed"),
    "blocks/mlp/gate": ("layers", "embed", "mlp"),
    "blocks/mlp/up": ("layers", "embed", "mlp"),
    "blocks/mlp/down": ("layers", "mlp", "embed"),
    "final_norm/gain": ("embed",),
}


def logical_axes(params: Params) -> Params:
    """Names every axis of every parameter of a `Denoiser`, for the sharding table.

    Args:
      params: state of a `Denoiser` (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      The same tree with a tuple of axis names at each leaf.
    """
    return map_with_name(lambda name, _: _LOGICAL_AXES[name], params)


def num_parameters(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def training_flops_per_token(config: TransformerConfig, length: int) -> int:
    """Forward and backward FLOPs per token, logits at every position.

    ``6·N_blocks + 6·V·D + 12·layers·D·L`` (attention bidirectional), matrices only.
    """
    d = config.width
    block = 4 * d * d + 3 * d * config.mlp_hidden
    return (
        6 * config.num_layers * block
        + 6 * config.vocabulary_size * d
        + 12 * config.num_layers * d * length
    )
