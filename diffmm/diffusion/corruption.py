"""What a masking process is, and the parts that all processes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from diffmm.diffusion.draws import row_uniform
from diffmm.diffusion.schedules import BUILT_IN, Linear, validate_schedule
from diffmm.typing import NUM_MODALITIES, Array, ArrayLike, Batch, Modality, Schedule

Schedules = Schedule | Mapping[Modality, Schedule] | Sequence[Schedule]


class Corruption(NamedTuple):
    """A partly masked batch.

    Attributes:
      tokens: int32 ``[B, L]``, with ``mask_id`` at masked positions and at dropped
        conditions.
      masked: bool ``[B, L]``, the maskable positions that were masked: what the loss
        sums over. A dropped condition is hidden but not masked.
      weight: float32 ``[B, L]``, weight of each masked position; 0 elsewhere.
      t: float32 ``[B, L]``, the diffusion time of each position (constant along a
        row unless segments or modalities have their own times).
      dropped: bool ``[B]``, rows whose condition was hidden.
    """

    tokens: Array
    masked: Array
    weight: Array
    t: Array
    dropped: Array


class MaskingProcess(Protocol):
    """How a batch is corrupted and each masked position weighted."""

    @property
    def metric_name(self) -> str:
        """What the weighted sum of losses is called; ``"elbo"`` for a bound."""
        ...

    @property
    def is_bound(self) -> bool:
        """Whether the weighted sum of losses estimates a likelihood bound."""
        ...

    def corrupt(
        self,
        key: Array,
        batch: Batch,
        *,
        mask_id: int,
        rows: ArrayLike,
        num_rows: int,
    ) -> Corruption:
        """Masks a (micro-)batch.

        Args:
          key: the PRNG key of the step, equal on all devices and micro-batches.
          batch: clean rows ``[B, L]``.
          mask_id: the absorbing symbol.
          rows: int32 ``[B]``, row indices within the global batch.
          num_rows: rows of the global batch.
        """
        ...


def per_modality(schedules: Schedules) -> tuple[Schedule, ...]:
    """Returns one schedule for each of text, image and audio.

    Args:
      schedules: one schedule for all, a mapping (absent modalities are `Linear`), or
        a sequence in the order of `Modality`.

    Raises:
      ValueError: on an unknown modality, a wrong number, or a schedule that
        `validate_schedule` refuses.
    """
    if isinstance(schedules, Mapping):
        for modality in schedules:
            if modality not in range(NUM_MODALITIES):
                raise ValueError(
                    f"schedules must be keyed by Modality.TEXT, IMAGE or AUDIO, got "
                    f"{modality!r}"
                )
        result = tuple(schedules.get(Modality(i), Linear()) for i in range(3))
    elif isinstance(schedules, Sequence):
        result = tuple(schedules)
        if len(result) != NUM_MODALITIES:
            raise ValueError(
                f"schedules must have {NUM_MODALITIES} entries (text, image, audio), "
                f"got {len(result)}"
            )
    else:
        result = (schedules,) * NUM_MODALITIES
    for schedule in result:
        if type(schedule) not in BUILT_IN:
            validate_schedule(schedule)
    return result


def check_call(
    batch: Batch, rows: ArrayLike, num_rows: int, p_uncond: float
) -> tuple[int, int]:
    """Checks what every process is called with; returns ``(B, L)``."""
    shape = jnp.shape(batch.tokens)
    if len(shape) != 2:
        raise ValueError(f"batch must have fields [B, L], got tokens of shape {shape}")
    if jnp.shape(rows) != shape[:1]:
        raise ValueError(
            f"rows must have shape {shape[:1]} like the batch axis of tokens, got "
            f"{jnp.shape(rows)}"
        )
    if isinstance(num_rows, int) and num_rows < shape[0]:
        raise ValueError(
            f"num_rows counts the rows of the global batch and must be at least "
            f"{shape[0]}, got {num_rows}"
        )
    if not 0 <= p_uncond <= 1:
        raise ValueError(f"p_uncond must lie in [0, 1], got {p_uncond!r}")
    return shape


def drop_conditions(
    key: Array, batch: Batch, rows: ArrayLike, p_uncond: float
) -> Array:
    """Draws the rows whose condition is hidden: bool ``[B]``.

    A row without any condition has nothing to drop and is never marked.
    """
    if p_uncond == 0:
        return jnp.zeros(jnp.shape(rows), bool)
    dropped = row_uniform(key, rows, 1)[:, 0] < p_uncond
    return dropped & jnp.any(jnp.asarray(batch.condition), axis=-1)


def hide(
    batch: Batch,
    masked: Array,
    weight: Array,
    t: Array,
    dropped: Array,
    mask_id: int,
) -> Corruption:
    """Writes the mask id and assembles a `Corruption`."""
    tokens = jnp.asarray(batch.tokens)
    hidden = masked | (jnp.asarray(batch.condition) & dropped[:, None])
    return Corruption(
        tokens=jnp.where(hidden, jnp.asarray(mask_id, tokens.dtype), tokens),
        masked=masked,
        weight=jnp.where(masked, weight, 0.0).astype(jnp.float32),
        t=jnp.broadcast_to(t, tokens.shape).astype(jnp.float32),
        dropped=dropped,
    )


def by_modality(
    schedules: Sequence[Schedule], method: str, t: Array, batch: Batch
) -> Array:
    """Evaluates each position's own schedule at time ``t`` ``[B, L]``."""
    modality = jnp.asarray(batch.modality)
    result = getattr(schedules[0], method)(t)
    for index, schedule in enumerate(schedules[1:], start=1):
        if schedule != schedules[0]:
            own = getattr(schedule, method)(t)
            result = jnp.where(modality == index, own, result)
    return result


def repeat_rows(batch: Batch) -> Batch:
    """Repeats each row, as complementary masking wants it: ``[B, ...] -> [2B, ...]``.

    Rows 2j and 2j + 1 of the result are row j. Repeat before `normalise`: the doubled
    denominator is the ½ of the pair's average.
    """
    return Batch(*(field.repeat(2, axis=0) for field in batch))
