"""Hyper-parameters without a batch size: rates per token instead of per step."""

from __future__ import annotations

import dataclasses
import math

from diffmm.optim import validate
from diffmm.optim.hyperparameters import DECAYS, AdamW, Decay
from diffmm.optim.rates import beta_from_half_life, half_life
from diffmm.optim.sde import CLIP_FORMS, ClipForm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuous:
    """AdamW in continuous time; `at` gives the numbers for a batch of b tokens.

    ::

        learning_rate(b) = l·√b           eps(b) = e/√b
        β(b)             = 2^(−b/h)       ema(b) = 2^(−b/h_ema)
        shrink(b)        = 1 − exp(−b/τ)  (or b/τ), per step, of a weight
        weight_decay(b)  = shrink(b)/learning_rate(b) if coupled, else shrink(b)

    The unit is that of the batch: tokens, or samples.

    >>> hyper = AdamW(learning_rate=3e-3, b2=0.95, weight_decay=0.1)
    >>> continuous = Continuous.from_adamw(hyper, batch=2**17)
    >>> new = continuous.at(2**15)
    >>> round(new.learning_rate, 10), round(new.b1, 10), round(new.weight_decay, 10)
    (0.0015, 0.9740037464, 0.050005626)

    Attributes:
      learning_rate: l, peak, per √token.
      half_life_b1: tokens; 0 for no average.
      half_life_b2: tokens.
      eps: e.
      eps_root: ε inside the root times the batch.
      decay_rate: 1/τ, share of a weight that a token removes.
      decay: which form of ``weight_decay`` `at` returns.
      exact_decay: whether shrinks compose exactly, or are linear in the batch.
      clip: threshold, times √batch if ``clip_form`` is ``"batch"``; None: no clipping.
      clip_form: ``"keep"`` or ``"batch"``.
      half_life_ema: tokens, may be infinite; None: no average of weights.

    Raises:
      ValueError: a field out of range.
    """

    learning_rate: float
    half_life_b1: float
    half_life_b2: float
    eps: float = 0.0
    eps_root: float = 0.0
    decay_rate: float = 0.0
    decay: Decay = "coupled"
    exact_decay: bool = True
    clip: float | None = None
    clip_form: ClipForm = "keep"
    half_life_ema: float | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        validate.positive("learning_rate", self.learning_rate)
        for name in ("half_life_b1", "half_life_b2", "eps", "eps_root", "decay_rate"):
            validate.non_negative(name, getattr(self, name))
        if self.half_life_ema not in (None, math.inf):
            validate.non_negative("half_life_ema", self.half_life_ema)
        if self.clip is not None:
            validate.positive("clip", self.clip)
        validate.one_of("decay", self.decay, DECAYS)
        validate.one_of("clip_form", self.clip_form, CLIP_FORMS)

    @classmethod
    def from_adamw(
        cls,
        hyper: AdamW,
        batch: float,
        *,
        exact_decay: bool = True,
        clip: ClipForm = "keep",
    ) -> Continuous:
        """The rates of hyper-parameters that were tuned at one batch.

        Args:
          hyper: tuned at ``batch``.
          batch: tokens per step.
          exact_decay: compose the shrink per step exactly; False for the first-order
            rule that `diffmm.optim.sde.reparameterise` has as its default.
          clip: ``"keep"`` or ``"batch"``, as in `diffmm.optim.sde.reparameterise`.

        Returns:
          The rates.

        Raises:
          ValueError: learning_rate 0, which leaves weight decay without a value.
        """
        batch = validate.positive("batch", batch)
        validate.one_of("clip", clip, CLIP_FORMS)
        if hyper.learning_rate == 0:
            raise ValueError(
                "learning_rate must be positive, got 0.0: weight_decay divides by it."
            )
        root = math.sqrt(batch)
        shrink = -math.log1p(-hyper.shrink) if exact_decay else hyper.shrink
        threshold = hyper.clip
        if threshold is not None and clip == "batch":
            threshold *= root
        return cls(
            learning_rate=hyper.learning_rate / root,
            half_life_b1=half_life(hyper.b1, batch),
            half_life_b2=half_life(hyper.b2, batch),
            eps=hyper.eps * root,
            eps_root=hyper.eps_root * batch,
            decay_rate=shrink / batch,
            decay=hyper.decay,
            exact_decay=exact_decay,
            clip=threshold,
            clip_form=clip,
            half_life_ema=None if hyper.ema is None else half_life(hyper.ema, batch),
        )

    @property
    def decay_time(self) -> float:
        """τ, tokens in which a weight left alone falls to 1/e; infinite for none."""
        return 1 / self.decay_rate if self.decay_rate else math.inf

    def stretch(self, tokens_ratio: float, horizon: float = 1.0) -> Continuous:
        """The rates for a run of another duration.

        Half-lives and τ are multiplied by m_D^γ, l by m_D^(−γ/2), e by m_D^(γ/2).

        Args:
          tokens_ratio: m_D, target tokens over base tokens.
          horizon: γ, see `diffmm.optim.sde.kappa`.

        Returns:
          New rates.

        Raises:
          ValueError: an argument out of range.
        """
        tokens_ratio = validate.positive("tokens_ratio", tokens_ratio)
        factor = tokens_ratio ** validate.non_negative("horizon", horizon)
        root = math.sqrt(factor)
        ema = self.half_life_ema
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate / root,
            half_life_b1=self.half_life_b1 * factor,
            half_life_b2=self.half_life_b2 * factor,
            eps=self.eps * root,
            eps_root=self.eps_root * factor,
            decay_rate=self.decay_rate / factor,
            half_life_ema=None if ema is None else ema * factor,
        )

    def at(self, batch: float) -> AdamW:
        """The hyper-parameters of steps of ``batch`` tokens.

        Args:
          batch: in the unit of `from_adamw`.

        Returns:
          Numbers for an optimiser.

        Raises:
          ValueError: ``batch`` out of range, or so large that a step of first-order
            decay would remove a whole weight.
        """
        batch = validate.positive("batch", batch)
        root = math.sqrt(batch)
        learning_rate = self.learning_rate * root
        shrink = batch * self.decay_rate
        if self.exact_decay:
            shrink = -math.expm1(-shrink)
        coupled = self.decay == "coupled"
        threshold = self.clip
        if threshold is not None and self.clip_form == "batch":
            threshold /= root
        return AdamW(
            learning_rate=learning_rate,
            b1=_beta(self.half_life_b1, batch),
            b2=_beta(self.half_life_b2, batch),
            eps=self.eps / root,
            eps_root=self.eps_root / batch,
            weight_decay=shrink / learning_rate if coupled else shrink,
            decay=self.decay,
            clip=threshold,
            ema=None
            if self.half_life_ema is None
            else _beta(self.half_life_ema, batch),
        )


def _beta(half_life: float, batch: float) -> float:
    """A half-life of 0 is an average that keeps nothing."""
    return beta_from_half_life(half_life, batch) if half_life else 0.0
