"""The training loss: an additive sum whose denominator is data, not masks.

    loss = Σ_rows Σ_i loss_weight_i · weight_i · masked_i · CE_i / N,

with N the maskable positions of the whole global batch. `normalise` writes the
division into the batch's ``loss_weight`` before it is cut up, so that the losses and
gradients of micro-batches and devices simply add. Dividing by the number of *masked*
tokens, or averaging each micro-batch, would make gradients depend on how the batch
was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.diffusion.corruption import MaskingProcess
from diffmm.typing import (
    NUM_GROUPS,
    NUM_MODALITIES,
    Array,
    ArrayLike,
    Batch,
    Modality,
    NllFn,
    Params,
)

NUM_TIME_BINS = 10


class Metrics(NamedTuple):
    """Sums to be added over micro-batches, devices and steps before dividing.

    Rows whose condition was dropped count in none of them. The name of the numerator
    is the process's ``metric_name``: only ``"elbo"`` bounds a likelihood.

    Attributes:
      nats: float32 ``[NUM_GROUPS]``, weighted loss with loss weight 1, by `Group`.
      count: float32 ``[NUM_GROUPS]``, maskable positions.
      nats_by_time: float32 ``[10]``, the same by tenths of the diffusion time.
      count_by_time: float32 ``[10]``.
    """

    nats: Array
    count: Array  # type: ignore[assignment]  # tuple.count is not missed
    nats_by_time: Array
    count_by_time: Array


def denominators(batch: Batch) -> ArrayLike:
    """Counts the maskable positions of each modality.

    Args:
      batch: rows of any number of leading axes; NumPy or JAX.

    Returns:
      int32 ``[NUM_MODALITIES]``, of the library that the batch came in.
    """
    xp = jnp if isinstance(batch.maskable, jax.Array) else np
    return xp.stack(
        [
            xp.sum(batch.maskable & (batch.modality == modality), dtype=xp.int32)
            for modality in range(NUM_MODALITIES)
        ]
    )


def normalise(
    batch: Batch,
    *,
    mode: Literal["tokens", "per_modality_mean"] = "tokens",
    modality_weights: Mapping[Modality, float] | Sequence[float] | None = None,
) -> Batch:
    """Divides ``loss_weight`` by the denominators of the batch.

    Call it on the *global* batch (on the host, or on global arrays under `jax.jit`)
    before cutting micro-batches. It reads the data only, never the masks. An empty
    batch has loss 0.

    Args:
      batch: the global batch, ``[B, L]``; NumPy or JAX.
      mode: ``"tokens"`` divides by all maskable positions; ``"per_modality_mean"``
        divides each modality by its own, Σ_mod c_mod·(sum_mod/count_mod).
      modality_weights: c_mod, by `Modality` (absent: 1) or in its order. With weights
        other than 1 the loss is no bound; the metrics stay one.

    Returns:
      The batch with a float32 ``loss_weight``.

    Raises:
      ValueError: on an unknown mode, or weights negative, not finite or of a wrong
        number.
    """
    if mode not in ("tokens", "per_modality_mean"):
        raise ValueError(f"mode must be 'tokens' or 'per_modality_mean', got {mode!r}")
    xp = jnp if isinstance(batch.maskable, jax.Array) else np
    counts = denominators(batch)
    if mode == "tokens":
        counts = xp.broadcast_to(xp.sum(counts), counts.shape)
    weights = np.asarray(_modality_weights(modality_weights), np.float32)
    scale = weights / xp.maximum(counts, 1).astype(xp.float32)
    factor = xp.zeros(xp.shape(batch.maskable), xp.float32)
    for modality in range(NUM_MODALITIES):
        factor = xp.where(batch.modality == modality, scale[modality], factor)
    loss_weight = xp.asarray(batch.loss_weight, xp.float32) * factor
    return batch._replace(loss_weight=loss_weight)


def _modality_weights(
    weights: Mapping[Modality, float] | Sequence[float] | None,
) -> list[float]:
    if weights is None:
        return [1.0] * NUM_MODALITIES
    if isinstance(weights, Mapping):
        if not all(key in range(NUM_MODALITIES) for key in weights):
            raise ValueError(
                f"modality_weights must be keyed by Modality.TEXT, IMAGE or AUDIO, "
                f"got {weights!r}"
            )
        values = [float(weights.get(Modality(i), 1.0)) for i in range(NUM_MODALITIES)]
    else:
        values = [float(value) for value in weights]
    if len(values) != NUM_MODALITIES:
        raise ValueError(
            f"modality_weights must have {NUM_MODALITIES} entries, got {weights!r}"
        )
    if not all(np.isfinite(values)) or min(values) < 0:
        raise ValueError(
            f"modality_weights must be finite and at least 0, got {weights!r}"
        )
    return values


def diffusion_loss(
    nll_fn: NllFn,
    params: Params,
    batch: Batch,
    key: Array,
    *,
    process: MaskingProcess,
    mask_id: int,
    rows: ArrayLike,
    num_rows: int,
) -> tuple[Array, Metrics]:
    """The loss of a (micro-)batch, Σ loss_weight · weight · masked · CE.

    Args:
      nll_fn: scores the clean tokens given the masked ones.
      params: passed to ``nll_fn``.
      batch: rows ``[B, L]`` out of a batch that went through `normalise`.
      key: the PRNG key of the step, the same for all its micro-batches.
      process: the masking process.
      mask_id: the absorbing symbol.
      rows: int32 ``[B]``, row indices within the global batch.
      num_rows: rows of the global batch.

    Returns:
      ``(loss, metrics)``: a float32 scalar, in nats per token once added over the
      micro-batches, and `Metrics`. The gradient with respect to the loss of an
      unmasked position is exactly zero.
    """
    corruption = process.corrupt(
        key, batch, mask_id=mask_id, rows=rows, num_rows=num_rows
    )
    nll = nll_fn(params, corruption.tokens, batch)
    if nll.shape != jnp.shape(batch.tokens):
        raise ValueError(
            f"nll_fn must return shape {jnp.shape(batch.tokens)} like tokens, got "
            f"{nll.shape}"
        )
    # The weight is 0 where nothing is masked; `where` keeps a loss of infinity at
    # such a position from becoming not-a-number.
    nats = jnp.where(corruption.masked, corruption.weight * nll, 0.0)
    loss = jnp.sum(jnp.asarray(batch.loss_weight) * nats)
    nats = jax.lax.stop_gradient(nats)
    counted = jnp.asarray(batch.maskable) & ~corruption.dropped[:, None]
    nats = jnp.where(counted, nats, 0.0)
    count = counted.astype(jnp.float32)
    group = jnp.asarray(batch.group).astype(jnp.int32)
    time_bin = jnp.clip(
        (corruption.t * NUM_TIME_BINS).astype(jnp.int32), 0, NUM_TIME_BINS - 1
    )
    return loss, Metrics(
        nats=_sums_by_class(nats, group, NUM_GROUPS),
        count=_sums_by_class(count, group, NUM_GROUPS),
        nats_by_time=_sums_by_class(nats, time_bin, NUM_TIME_BINS),
        count_by_time=_sums_by_class(count, time_bin, NUM_TIME_BINS),
    )


def _sums_by_class(values: Array, classes: Array, num_classes: int) -> Array:
    """Sums of ``values`` by class, in a fixed order on every device."""
    ids = jax.lax.broadcasted_iota(classes.dtype, (num_classes, 1, 1), 0)
    return jnp.sum(jnp.where(ids == classes[None], values[None], 0.0), axis=(1, 2))


def bits_per_token(nats: ArrayLike, count: ArrayLike) -> np.ndarray:
    """Divides sums of nats by counts, in bits; not-a-number where the count is 0.

    Args:
      nats: any shape; `Metrics` added over whatever is to be reported.
      count: the same shape.

    Returns:
      float64 NumPy array of that shape.
    """
    nats, count = np.asarray(nats, np.float64), np.asarray(count, np.float64)
    empty = np.full(nats.shape, np.nan)
    return np.divide(nats, count * np.log(2.0), out=empty, where=count > 0)
