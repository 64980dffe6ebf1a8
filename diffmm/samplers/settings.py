"""Sampling settings: temperature, filters, guidance; one set, or one per modality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffmm.samplers.guidance import Constant, GuidanceSchedule
from diffmm.typing import Array, Modality


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are drawn once a position is chosen.

    Numbers are traced inside the loop: changing them does not compile again, while
    switching a filter or guidance on (from ``None``) does.

    Attributes:
      temperature: τ ≥ 0; 0 takes the arg-max.
      top_k: k ≥ 1, or ``None`` for off.
      top_p: p in (0, 1], or ``None`` for off.
      min_p: p in [0, 1], least share of the largest probability, or ``None`` for off.
      guidance_scale: s of l_u + s·(l_c − l_u); 1 is conditional; ``None`` for off.
      cfg_weight: w = s − 1, the other convention; not together with guidance_scale.
      guidance_schedule: how the weight depends on time.
      anneal: multiply the temperature by 1 − r, r = (i + 1)/n, at step i of n. The
        factor applies to the given temperature, it does not compound.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance_scale: float | None = None
    cfg_weight: float | None = None
    guidance_schedule: GuidanceSchedule = dataclasses.field(default_factory=Constant)
    anneal: bool = False

    @property
    def scale(self) -> float | None:
        """The guidance scale s in either convention; ``None`` if guidance is off."""
        if self.cfg_weight is not None:
            return 1.0 + self.cfg_weight
        return self.guidance_scale

    def check(self) -> None:
        """Checks every field, on the host.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be finite and at least 0, got {self.temperature!r}"
            )
        if self.top_k is not None and not (
            self.top_k >= 1 and self.top_k == int(self.top_k)
        ):
            raise ValueError(f"top_k must be an integer ≥ 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p!r}")
        if self.guidance_scale is not None and self.cfg_weight is not None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale!r} and "
                f"cfg_weight={self.cfg_weight!r} are two names of one number, "
                f"s = 1 + w: give only one"
            )
        if self.scale is not None and not math.isfinite(self.scale):
            name = "cfg_weight" if self.guidance_scale is None else "guidance_scale"
            raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")


class Controls(NamedTuple):
    """Settings as the loop takes them: tables indexed by `Modality`, all traced.

    Attributes:
      temperature: float32 ``[4]``.
      anneal: float32 ``[4]``, 1 or 0.
      top_k: int32 ``[4]`` or ``None``.
      top_p: float32 ``[4]`` or ``None``.
      min_p: float32 ``[4]`` or ``None``.
      scale: float32 ``[4]`` or ``None``.
      schedules: four guidance schedules.
    """

    temperature: Any
    anneal: Any
    top_k: Any
    top_p: Any
    min_p: Any
    scale: Any
    schedules: tuple[GuidanceSchedule, ...]

    def temperature_at(self, modality: Array, ratio: Array) -> Array:
        """τ₀·(1 − r) where annealed, else τ₀; ``[B, K]`` and ``[B]`` to ``[B, K]``."""
        factor = 1.0 - self.anneal[modality] * ratio[:, None]
        return self.temperature[modality] * factor

    def scale_at(self, modality: Array, t: Array) -> Array | None:
        """Guidance scale s(t); modality ``[B, K]`` and t ``[B]`` to ``[B, K]``."""
        if self.scale is None:
            return None
        weights = [
            schedule.weight(self.scale[index] - 1.0, t)
            for index, schedule in enumerate(self.schedules)
        ]
        return 1.0 + jnp.take_along_axis(jnp.stack(weights, axis=1), modality, axis=1)


def resolve(
    settings: Settings | Mapping[Modality, Settings],
    present: Iterable[int],
    vocabulary_size: int,
) -> Controls:
    """Checks settings and lays them out by modality.

    Args:
      settings: one for all positions, or one per modality.
      present: modalities that are generated.
      vocabulary_size: V, what an absent top_k means where another modality has one.

    Returns:
      `Controls` of numpy arrays.

    Raises:
      ValueError: for a bad field, or a modality that is generated without settings.
    """
    if isinstance(settings, Settings):
        table = dict.fromkeys(Modality, settings)
    else:
        table = {Modality(key): value for key, value in settings.items()}
        for modality in map(Modality, present):
            if modality not in table:
                raise ValueError(
                    f"settings must cover every generated modality: {modality.name} "
                    f"is missing, got {[key.name for key in table]}"
                )
    rows = [table.get(modality, Settings()) for modality in Modality]
    for row in rows:
        row.check()

    def column(values: list[Any], off: float, dtype: type) -> np.ndarray | None:
        if all(value is None for value in values):
            return None
        return np.asarray([off if value is None else value for value in values], dtype)

    size = vocabulary_size
    top_ks = [None if row.top_k is None else min(row.top_k, size) for row in rows]
    return Controls(
        temperature=np.asarray([row.temperature for row in rows], np.float32),
        anneal=np.asarray([row.anneal for row in rows], np.float32),
        top_k=column(top_ks, size, np.int32),
        top_p=column([row.top_p for row in rows], 1.0, np.float32),
        min_p=column([row.min_p for row in rows], 0.0, np.float32),
        scale=column([row.scale for row in rows], 1.0, np.float32),
        schedules=tuple(row.guidance_schedule for row in rows),
    )
