"""How parameters of a policy move: AdamW with a clipped gradient."""

from __future__ import annotations

import dataclasses
import functools
import math

import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with a clipped gradient; the defaults are the published ones.

    Attributes:
      learning_rate: at the peak.
      warmup: optimiser steps from 0 to the peak.
      decay_steps: optimiser steps of the run, over which the rate falls to 0 as a
        cosine after the warm-up; ``None`` keeps it.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: AdamW's ε.
      weight_decay: λ, times the learning rate.
      clip_norm: largest norm of the gradient.
    """

    learning_rate: float = 3e-5
    warmup: int = 100
    decay_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.2

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value!r}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie in [0, 1), got {getattr(self, name)!r}"
                )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(
                f"weight_decay must be finite and at least 0, got {self.weight_decay!r}"
            )
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup!r}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ValueError(
                f"decay_steps must exceed warmup, {self.warmup}, got "
                f"{self.decay_steps!r}"
            )


@functools.lru_cache(maxsize=64)
def optimizer_of(recipe: Recipe) -> optax.GradientTransformation:
    """The transformation; the same object for equal recipes, which compiles once."""
    peak, warmup = recipe.learning_rate, recipe.warmup
    rate: float | optax.Schedule = peak
    if recipe.decay_steps is not None:
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, recipe.decay_steps
        )
    elif warmup:
        rate = optax.linear_schedule(0.0, peak, warmup)
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(
            rate,
            b1=recipe.b1,
            b2=recipe.b2,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        ),
    )
