"""Attention functions: the argument ``attention`` of every transformer.

Letters: B rows, L row length, H heads, K head dimension, Q query and S key position.
Queries and keys are those of one row, Q = S = L, unless a `diffmm.typing.View` says
what they are: block-causal rows, queries against cached keys, shadows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.models.config import TransformerConfig
from diffmm.typing import Array, AttentionFn, View
from diffmm_kernels.sigmoid_attention import alibi_slopes, sigmoid_attention

# Finite, so that a row of the softmax that is wholly masked yields no NaN.
_MASKED_SCORE = -1e30


def segment_mask(segment_ids: Array, key_segment_ids: Array | None = None) -> Array:
    """Which pairs may attend: ``allow(i, j) = (segment_i == segment_j)``.

    Padding (segment 0) attends to padding only: real positions never see it, and its
    own (discarded) outputs stay finite.

    Args:
      segment_ids: int32 ``[B, L]``, of the queries.
      key_segment_ids: int32 ``[B, S]``; the same by default.

    Returns:
      bool ``[B, 1, L, S]``, the second axis stands for heads.
    """
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    return segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :]


def softmax_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    segment_ids: Array | None = None,
    causal: bool = False,
    slopes: Any = None,
    view: View | None = None,
) -> Array:
    """Softmax attention, ``softmax(q kᵀ / sqrt(K)) v`` per segment.

    Scores and softmax are float32 whatever the compute dtype. Heads lead the batched
    products, so that each is over contiguous matrices.

    Args:
      query: ``[B, L, H, K]``; with a view ``[B, Q, H, K]``.
      key: ``[B, L, H, K]``; with a view ``[B, S, H, K]``.
      value: as ``key``.
      segment_ids: int32 ``[B, L]`` or None (every position sees every other).
      causal: position i sees ``j <= i`` only.
      slopes: float ``[H]``, subtracts ``slope · |i - j|`` from the scores, or None.
      view: what is seen, instead of ``segment_ids``. A query that sees nothing gets
        the mean of all values.

    Returns:
      Of the shape of ``query``, in the dtype of ``value``.
    """
    query_BHQK, key_BHSK, value_BHSK = (x.swapaxes(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    scores_BHQS = jnp.einsum(
        "bhqk,bhsk->bhqs",
        query_BHQK * jnp.asarray(scale, query.dtype),
        key_BHSK,
        preferred_element_type=jnp.float32,
    )
    if view is None:
        query_index = key_index = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    else:
        query_index, key_index = view.queries.indices, view.keys.indices
    if slopes is not None:
        scores_BHQS = scores_BHQS - _alibi(slopes, query_index, key_index)
    for seen_BHQS in _restrictions(segment_ids, view):
        scores_BHQS = jnp.where(seen_BHQS, scores_BHQS, _MASKED_SCORE)
    if causal:
        seen_BHQS = _before(query_index, key_index)[:, None]
        scores_BHQS = jnp.where(seen_BHQS, scores_BHQS, _MASKED_SCORE)
    # Mixed first and divided last: K numbers to divide per query instead of S. The
    # result does not depend on the maximum, hence neither does the gradient.
    peak_BHQ1 = jax.lax.stop_gradient(scores_BHQS.max(axis=-1, keepdims=True))
    weights_BHQS = jnp.exp(scores_BHQS - peak_BHQ1)
    total_BHQ1 = weights_BHQS.sum(axis=-1, keepdims=True)
    mixed_BHQK = jnp.einsum(
        "bhqs,bhsk->bhqk",
        weights_BHQS.astype(value.dtype),
        value_BHSK,
        preferred_element_type=jnp.float32,
    )
    return (mixed_BHQK / total_BHQ1).astype(value.dtype).swapaxes(1, 2)


def _restrictions(segment_ids: Array | None, view: View | None) -> list[Array]:
    """Bool, each of a shape that broadcasts to ``[B, H, Q, S]``."""
    if view is None:
        return [] if segment_ids is None else [segment_mask(segment_ids)]
    same = segment_mask(view.queries.segment_ids, view.keys.segment_ids)
    return [same] if view.visible is None else [same & view.visible[:, None]]


def _before(query_index: Array, key_index: Array) -> Array:
    """Causal order, bool ``[B, Q, S]``."""
    return key_index[:, None, :] <= query_index[:, :, None]


def _alibi(slopes: Any, query_index: Array, key_index: Array) -> Array:
    """Slope times distance, float32 ``[B, H, Q, S]``."""
    distance_BQS = jnp.abs(query_index[:, :, None] - key_index[:, None, :])
    slopes_1H11 = jnp.asarray(slopes, jnp.float32)[None, :, None, None]
    return slopes_1H11 * distance_BQS.astype(jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttention:
    """`softmax_attention` with its options.

    Attributes:
      causal: position i sees ``j <= i`` only.
      alibi: subtract `alibi_slopes` times distance from the scores.
    """

    causal: bool = False
    alibi: bool = False

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        segment_ids: Array | None = None,
        view: View | None = None,
    ) -> Array:
        """A `diffmm.typing.AttentionFn`."""
        return softmax_attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            causal=self.causal,
            slopes=alibi_slopes(query.shape[2]) if self.alibi else None,
            view=view,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidAttention:
    """``o_i = Σ_j σ(q_i·k_j / √K + b) v_j``, without normalisation over keys.

    With ``b = -log n`` a weight is about ``e^s / n``: a softmax whose denominator is
    replaced by the constant n, so that the sum of the weights of a row, its mass, is of
    order one. Padding (segment 0) sees nothing and its outputs are exactly 0.

    Attributes:
      length: n, the row length trained for, not that of the batch at hand. At other
        lengths the same n keeps b, and their own length keeps the mass.
      causal: position i sees ``j <= i`` only; its mass is about ``(i + 1) / n``.
      alibi: subtract `alibi_slopes` times distance from the logits: the full distance,
        since a sigmoid, unlike a softmax, feels what is constant in a row.
      bias: b, if it is not to be ``-log n``.
      precision: of the kernels' activation: "default", "fast" or "high".
      implementation: one of `diffmm_kernels.sigmoid_attention.IMPLEMENTATIONS`; None
        chooses by device.

    References:
      Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid
      Self-Attention", arXiv 2409.04431.

    Example:
      >>> round(SigmoidAttention(length=2048).constant, 6)
      -7.624619
    """

    length: int
    causal: bool = False
    alibi: bool = False
    bias: float | None = None
    precision: Any = "default"
    implementation: Any = None

    def __post_init__(self) -> None:
        """Refuses a length that has no logarithm."""
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    @property
    def constant(self) -> float:
        """The bias b without what is learned, a Python number."""
        return -math.log(self.length) if self.bias is None else self.bias

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        segment_ids: Array | None = None,
        bias_offset: Array | None = None,
        view: View | None = None,
    ) -> Array:
        """A `diffmm.typing.AttentionFn`; ``bias_offset [] or [H]`` is added to b."""
        bias: Any = self.constant
        if bias_offset is not None:
            bias = bias + bias_offset.astype(jnp.float32)
        slopes = alibi_slopes(query.shape[2]) if self.alibi else None
        if view is None:
            ids = None if segment_ids is None else _hide_padding(segment_ids)
            seen: dict[str, Any] = {
                "causal": self.causal,
                "q_segment_ids": ids,
                "kv_segment_ids": ids,
                "alibi_slopes": slopes,
            }
        else:
            seen = self._through(view, slopes)
        return sigmoid_attention(
            query,
            key,
            value,
            bias=bias,
            precision=self.precision,
            implementation=self.implementation,
            **seen,
        )

    def _through(self, view: View, slopes: Any) -> dict[str, Any]:
        """A view in the words of the kernels, which count along the keys given."""
        indices = view.queries.indices, view.keys.indices
        mask = view.visible
        if self.causal:
            before = _before(*indices)
            mask = before if mask is None else mask & before
        return {
            "q_segment_ids": _hide_padding(view.queries.segment_ids),
            "kv_segment_ids": _hide_padding(view.keys.segment_ids),
            "mask": None if mask is None else mask[:, None],
            "logit_bias": None if slopes is None else -_alibi(slopes, *indices),
        }


def _hide_padding(segment_ids: Array) -> Array:
    """Negative ids neither see nor are seen."""
    return jnp.where(segment_ids == 0, -1, segment_ids)


def attention_function(config: TransformerConfig, **options: Any) -> AttentionFn:
    """The attention function that a configuration asks for.

    Args:
      config: fields ``attention length attention_bias causal positions``.
      **options: further fields of `SigmoidAttention` or `SoftmaxAttention`, such as
        ``implementation``.

    Returns:
      A hashable function.
    """
    options = {
        "causal": config.causal,
        "alibi": config.positions == "alibi",
        **options,
    }
    if config.attention == "softmax":
        return SoftmaxAttention(**options)
    assert config.length is not None  # checked by the configuration
    return SigmoidAttention(
        **{"length": config.length, "bias": config.attention_bias, **options}
    )


class AttentionStatistics(NamedTuple):
    """What attention does to the size of values; float32 ``[..., H]`` each.

    Attributes:
      row_mass: mean over real positions of the sum of their weights: 1 for softmax;
        about ``E[e^s]`` for sigmoid with b = -log n, and n/2 with b = 0.
      output_norm: Frobenius norm of the outputs O of real positions.
      value_norm: the same of the values V.
    """

    row_mass: Array
    output_norm: Array
    value_norm: Array

    @property
    def ratio(self) -> Array:
        """``‖O‖ / ‖V‖``; where it is far above 1 early on, training spikes."""
        return self.output_norm / jnp.maximum(self.value_norm, 1e-30)


def attention_statistics(
    attention: AttentionFn,
    query: Array,
    key: Array,
    value: Array,
    *,
    segment_ids: Array | None = None,
    **options: Any,
) -> AttentionStatistics:
    """Row mass and norms of one call of an attention function.

    The mass is the output for values that are all 1: no weights are stored, whatever
    the attention function needs in memory is enough.

    Args:
      attention: any attention function.
      query: ``[B, L, H, K]``.
      key: ``[B, L, H, K]``.
      value: ``[B, L, H, K]``.
      segment_ids: int32 ``[B, L]``, 0 = padding, which is left out of all means.
      **options: passed on to ``attention``, such as ``bias_offset``.

    Returns:
      `AttentionStatistics` of ``[H]``.
    """

    def call(value: Array) -> Array:
        mixed = attention(query, key, value, segment_ids=segment_ids, **options)
        return mixed.astype(jnp.float32)

    real_BL11 = jnp.ones(query.shape[:2], jnp.float32)[:, :, None, None]
    if segment_ids is not None:
        real_BL11 = (segment_ids != 0).astype(jnp.float32)[:, :, None, None]
    mass_BLH1 = call(jnp.ones_like(value[..., :1]))

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(real_BL11 * x * x, axis=(0, 1, 3)))

    return AttentionStatistics(
        row_mass=jnp.sum(real_BL11 * mass_BLH1, axis=(0, 1, 3))
        / jnp.maximum(real_BL11.sum(), 1.0),
        output_norm=norm(call(value)),
        value_norm=norm(value.astype(jnp.float32)),
    )
