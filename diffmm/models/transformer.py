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
from diffmm.models.views import row_places, view_of
from diffmm.typing import Array, AttentionFn, View

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
            num_kv_heads=config.num_kv_heads,
            qkv_bias=config.qkv_bias,
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
        view: View | None = None,
    ) -> Array:
        """``[B, L, D]`` to ``[B, L, D]``; ``residuals [2]`` multiply the branches."""
        heads = self.heads(x, angles)
        return self.finish(x, self.attention.mix(*heads, segment_ids, view), residuals)

    def heads(
        self, x: Array, angles: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array]:
        """Queries ``[B, L, H, K]``, keys and values ``[B, L, G, K]`` of this block."""
        return self.attention.heads(self.attention_norm(x), angles)

    def finish(self, x: Array, mixed: Array, residuals: Array | None) -> Array:
        """All that comes after heads were mixed, ``mixed [B, L, H, K]``."""
        mixed = self.attention.project(mixed)
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
        view: View | None = None,
    ) -> AttentionStatistics:
        """What attention does to the size of values in this block; ``[H]`` each."""
        return self.attention.statistics(
            self.attention_norm(x), angles, segment_ids, view
        )


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
        if config.tied:
            return
        # N(0, 1/D²): logits start near 0, hence the loss near log V, at every width.
        shape = (width, config.vocabulary_size)
        std = config.unembedding_std
        self.unembedding = nnx.Param(
            fan_in_normal(rngs.params(), shape, width**2)
            if std is None
            else fan_in_normal(rngs.params(), shape, 1) * std
        )

    @property
    def output_matrix(self) -> Array:
        """The unembedding ``[D, V]``; of a tied model its embedding, transposed."""
        if self.config.tied:
            return self.embedding[...].T
        return self.unembedding[...]

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
          ``[B, L, D]``, to be multiplied by `output_matrix`.

        Raises:
          ValueError: rows longer than ``num_positions`` of a model that has them.
        """
        positions = self._positions(tokens, positions)
        view = self.row_view(positions, segment_ids)
        return self.hidden_in_view(tokens, positions, segment_ids, view)

    def hidden_in_view(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array | None,
        view: View | None,
    ) -> Array:
        """`hidden` of queries that see each other as a view says; Q = S = L."""

        def apply_block(
            block: Block, x: Array, angles: Any, residuals: Array | None, _: Any
        ) -> Any:
            return block(x, angles, segment_ids, residuals, view), None, None

        return self.final_norm(self.run(apply_block, tokens, positions)[0])

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
        positions = self._positions(tokens, positions)
        view = self.row_view(positions, segment_ids)

        def observe_block(
            block: Block, x: Array, angles: Any, residuals: Array | None, _: Any
        ) -> Any:
            statistics = block.attention_statistics(x, angles, segment_ids, view)
            return block(x, angles, segment_ids, residuals, view), None, statistics

        return self.run(observe_block, tokens, positions)[2]

    def check_length(self, length: int) -> None:
        """Refuses rows that are longer than the learned positions reach."""
        most = self.config.num_positions
        if most and length > most:
            raise ValueError(
                f"tokens: rows of {length} given, the model has num_positions={most}"
            )

    def _positions(self, tokens: Array, positions: Array | None) -> Array:
        self.check_length(tokens.shape[1])
        if positions is not None:
            return positions
        return jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )

    def row_view(self, positions: Array, segment_ids: Array | None) -> View | None:
        """What a row sees of itself; None where its segments say it all."""
        if not self.config.causal_block:
            return None
        if segment_ids is None:
            segment_ids = jnp.ones_like(positions)
        row = row_places(positions, segment_ids)
        return view_of(row, row, causal_block=self.config.causal_block)

    def run(
        self,
        apply: Callable[..., Any],
        tokens: Array,
        positions: Array,
        memory: Any = None,
    ) -> tuple[Array, Any, Any]:
        """Embeds, and goes through the blocks.

        Args:
          apply: ``(block, x, angles, residuals, memory) -> (x, memory, output)``.
          tokens: int32 ``[B, Q]``, of any positions of the rows.
          positions: int32 ``[B, Q]``.
          memory: a pytree of arrays that is handed from block to block, such as a
            cache.

        Returns:
          ``x [B, Q, D]`` before the final norm, the memory after the last block, and
          the outputs of all blocks, stacked.
        """
        config = self.config
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(positions, config.head_dim, config.rope_base)
        x = self.embedding[...][tokens]
        if config.num_positions:
            x = x + self.position_embedding[...][positions]
        x = x.astype(config.compute_dtype)
        graphdef, stacked = nnx.split(self.blocks)

        def step(carry: Any, layer: Any) -> tuple[Any, Any]:
            x, memory = carry
            state, residuals = layer
            block = nnx.merge(graphdef, state)
            x, memory, output = apply(block, x, angles, residuals, memory)
            return (x, memory), output

        step = jax.checkpoint(
            step, policy=None if config.remat else _save_matrix_products
        )
        layers = (stacked, config.residuals())
        carry: Any = (x, memory)
        if config.scan:
            (x, memory), outputs = jax.lax.scan(step, carry, layers)
            return x, memory, outputs
        collected = []
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
            carry, output = step(carry, layer)
            collected.append(output)
        return *carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Float32 logits ``[B, L, V]``; arguments as in `hidden`."""
        hidden = self.hidden(tokens, positions, segment_ids)
        return unembed(hidden, self.output_matrix)


def unembed(hidden: Array, unembedding: Array) -> Array:
    """``hidden [..., D] · unembedding [D, V]`` accumulated and returned in float32."""
    return jnp.einsum(
        "...d,dv->...v",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
