"""The transformer over one discrete stream: denoiser, or causal decoder.

Letters: B rows, L row length, D width, K scored positions, V joint vocabulary.

No time input: for the absorbing process the optimal denoiser does not depend on the
diffusion time given the masked sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffmm.models.attention import AttentionStatistics, attention_function
from diffmm.models.config import TransformerConfig
from diffmm.models.layers import (
    GELU,
    MIXED_VALUES,
    Attention,
    Norm,
    SwiGLU,
    fan_in_normal,
    rotary_angles,
)
from diffmm.typing import Array, AttentionFn, Params, PredictFn

# What the backward pass keeps of a block: results of products with weights, and the
# mixed values of attention. Norms, rotations, gates and attention weights are cheap to
# compute again and expensive to write and read: without a policy a scan stores every
# intermediate of every layer, which is larger and, on CPU, slower. Sigmoid attention
# needs only its inputs to go back, so that its forward pass is not run again.
_save_matrix_products = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(MIXED_VALUES),
)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then the feed-forward layer.

    ``x + m · γ · norm2(branch(norm1(x)))`` twice: the second norm with ``hybrid_norm``,
    the gain γ per channel with ``layer_scale``, the multiplier m from outside.
    """

    def __init__(
        self, config: TransformerConfig, attention: AttentionFn, *, rngs: nnx.Rngs
    ) -> None:
        """See `TransformerConfig`."""
        width, hidden = config.width, config.mlp_hidden

        def norm() -> Norm:
            return Norm(width, config.norm, config.norm_epsilon)

        def gain() -> nnx.Param | None:
            if config.layer_scale is None:
                return None
            return nnx.Param(jnp.full((width,), config.layer_scale, jnp.float32))

        self.attention_norm = norm()
        self.attention = Attention(
            width,
            config.head_dim,
            attention,
            rngs=rngs,
            qk_norm=config.qk_norm,
            epsilon=config.norm_epsilon,
            trainable_bias=config.trainable_bias,
        )
        self.attention_post_norm = norm() if config.hybrid_norm else None
        self.attention_scale = gain()
        self.mlp_norm = norm()
        feed_forward = SwiGLU if config.mlp == "swiglu" else GELU
        self.mlp = feed_forward(width, hidden, rngs=rngs)
        self.mlp_post_norm = norm() if config.hybrid_norm else None
        self.mlp_scale = gain()

    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
        residuals: Array | None = None,
    ) -> Array:
        """``[B, L, D]`` to ``[B, L, D]``; ``residuals [2]`` multiply the branches."""
        mixed = self.attention(self.attention_norm(x), angles, segment_ids)
        mixed = _end_of_branch(mixed, self.attention_post_norm, self.attention_scale)
        x = x + (mixed if residuals is None else residuals[0] * mixed)
        hidden = self.mlp(self.mlp_norm(x))
        hidden = _end_of_branch(hidden, self.mlp_post_norm, self.mlp_scale)
        return x + (hidden if residuals is None else residuals[1] * hidden)

    def attention_statistics(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        segment_ids: Array | None,
    ) -> AttentionStatistics:
        """What attention does to the size of values in this block; ``[H]`` each."""
        return self.attention.statistics(self.attention_norm(x), angles, segment_ids)


def _end_of_branch(x: Array, norm: Norm | None, gain: nnx.Param | None) -> Array:
    if norm is not None:
        x = norm(x)
    return x if gain is None else x * gain[...].astype(x.dtype)[None, None]


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
    """Transformer over tokens; without ``causal`` it predicts clean from masked ones.

    Pre-norm, QK normalisation per head, RoPE or ALiBi, untied embeddings; attention by
    softmax or sigmoid.

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
        attention: AttentionFn | None = None,
    ) -> None:
        """Draws parameters from ``rngs.params``.

        Args:
          config: shape, precision and recipe.
          rngs: random streams; only ``params`` is used.
          attention: any function of `diffmm.typing.AttentionFn`, instead of the one
            that ``config`` asks for.
        """
        self.config = config
        if attention is None:
            attention = attention_function(config)
        width = config.width
        shape = (config.vocabulary_size, width)
        self.embedding = nnx.Param(
            fan_in_normal(rngs.params(), shape, 1) * config.embedding_std
        )
        if config.num_positions:
            self.position_embedding = nnx.Param(
                fan_in_normal(rngs.params(), (config.num_positions, width), 1)
                * config.embedding_std
            )
        self.blocks = _stacked_blocks(config, attention, rngs.params())
        self.final_norm = Norm(width, config.norm, config.norm_epsilon)
        # N(0, 1/D²): logits start near 0, hence the loss near log V, at every width.
        shape = (width, config.vocabulary_size)
        std = config.unembedding_std
        self.unembedding = nnx.Param(
            fan_in_normal(rngs.params(), shape, width**2)
            if std is None
            else fan_in_normal(rngs.params(), shape, 1) * std
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

        def apply_block(
            block: Block, x: Array, angles: Any, residuals: Array | None
        ) -> tuple[Array, None]:
            return block(x, angles, segment_ids, residuals), None

        x, _ = self._run(apply_block, tokens, positions)
        return self.final_norm(x)

    def attention_statistics(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> AttentionStatistics:
        """Row mass and norms of attention, ``[num_layers, H]`` each.

        A forward pass of its own, in memory linear in L with sigmoid attention;
        arguments as in `hidden`.
        """

        def observe_block(
            block: Block, x: Array, angles: Any, residuals: Array | None
        ) -> tuple[Array, AttentionStatistics]:
            statistics = block.attention_statistics(x, angles, segment_ids)
            return block(x, angles, segment_ids, residuals), statistics

        return self._run(observe_block, tokens, positions)[1]

    def _run(
        self, apply: Callable[..., Any], tokens: Array, positions: Array | None
    ) -> tuple[Array, Any]:
        """Embeds, and applies ``apply(block, x, angles, residuals)`` layer by layer."""
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
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(positions, config.head_dim, config.rope_base)
        x = self.embedding[...][tokens]
        if config.num_positions:
            x = x + self.position_embedding[...][positions]
        x = x.astype(config.compute_dtype)
        graphdef, stacked = nnx.split(self.blocks)

        def step(x: Array, layer: Any) -> tuple[Array, Any]:
            state, residuals = layer
            return apply(nnx.merge(graphdef, state), x, angles, residuals)

        step = jax.checkpoint(
            step, policy=None if config.remat else _save_matrix_products
        )
        layers = (stacked, config.residuals())
        if config.scan:
            return jax.lax.scan(step, x, layers)
        outputs = []
        for index in range(config.num_layers):
            x, output = step(x, jax.tree.map(lambda leaf, i=index: leaf[i], layers))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

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
