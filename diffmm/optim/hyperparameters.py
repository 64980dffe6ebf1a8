"""The global hyper-parameters of AdamW: plain numbers, checked once."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from diffmm.optim import validate

Decay = Literal["coupled", "independent"]
DECAYS: tuple[str, ...] = get_args(Decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Hyper-parameters of AdamW at one batch size and duration.

    With u the bias-corrected Adam direction m̂/(√(v̂ + eps_root) + eps) and η_t the
    scheduled learning rate, whose peak is η::

        coupled:      θ ← θ − η_t · (u + λ·θ)        as in optax and PyTorch
        independent:  θ ← θ − η_t · u − (η_t/η)·λ·θ

    All fields become Python floats, so that they stay weakly typed under tracing.

    >>> AdamW(learning_rate=1e-3, weight_decay=0.1).shrink
    0.0001

    Attributes:
      learning_rate: η, peak of the schedule; not negative.
      b1: coefficient of the first moment, in [0, 1).
      b2: coefficient of the second moment, in [0, 1).
      eps: ε outside the root, after bias correction; not negative.
      eps_root: ε inside the root, a variance; not negative.
      weight_decay: λ, in the form that ``decay`` names; not negative.
      decay: ``"coupled"`` or ``"independent"``.
      clip: threshold of the global gradient norm; positive, None for no clipping.
      ema: decay ρ of the averaged weights per step, in [0, 1]; None for no average.

    Raises:
      ValueError: a field out of its range, or a decay that removes a whole weight in
        one step.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    decay: Decay = "coupled"
    clip: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        """Checks every field and turns numbers into Python floats."""
        checked: dict[str, float] = {
            name: validate.non_negative(name, getattr(self, name))
            for name in ("learning_rate", "eps", "eps_root", "weight_decay")
        }
        for name in ("b1", "b2"):
            checked[name] = validate.probability(name, getattr(self, name))
        if self.clip is not None:
            checked["clip"] = validate.positive("clip", self.clip)
        if self.ema is not None:
            checked["ema"] = validate.probability("ema", self.ema, one=True)
        validate.one_of("decay", self.decay, DECAYS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.shrink >= 1:
            product = (
                "learning_rate * weight_decay"
                if self.decay == "coupled"
                else "weight_decay"
            )
            raise ValueError(
                f"{product} must be below 1: a step would remove the whole weight; "
                f"got learning_rate={self.learning_rate!r}, "
                f"weight_decay={self.weight_decay!r} ({self.decay})."
            )

    @property
    def shrink(self) -> float:
        """What a step at the peak removes of a weight: ηλ, or λ if independent."""
        if self.decay == "independent":
            return self.weight_decay
        return self.learning_rate * self.weight_decay
