"""Training objectives that are not likelihood bounds.

They have the interface of the processes in `diffmm.diffusion.process`, and a
``metric_name`` of their own: their numbers compare with no likelihood and no
perplexity. With F(m) the expected sum of cross-entropies at mask probability m, each
takes the place of the bound ∫ F(m)/m dm.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.diffusion.corruption import (
    Corruption,
    check_call,
    drop_conditions,
    hide,
    per_modality,
)
from diffmm.diffusion.draws import row_uniform, stratified_times
from diffmm.diffusion.schedules import Cosine, Linear
from diffmm.typing import Array, ArrayLike, Batch, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Surrogate:
    """Bernoulli masks under one schedule and one time per row.

    Attributes:
      schedule: the mask probability of all positions.
      t_min: lower clip of the time, in [0, 1).
      stratified: low-discrepancy times over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.
    """

    schedule: Schedule = dataclasses.field(default_factory=Linear)
    t_min: float = 1e-3
    stratified: bool = True
    p_uncond: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        per_modality(self.schedule)
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must lie in [0, 1), got {self.t_min!r}")
        if not 0 <= self.p_uncond <= 1:
            raise ValueError(f"p_uncond must lie in [0, 1], got {self.p_uncond!r}")

    @property
    def is_bound(self) -> bool:
        """False."""
        return False

    def _weight(self, batch: Batch, masked: Array, hidden: Array, t: Array) -> Array:
        """Weight of masked positions, ``[B, L]`` or broadcastable to it."""
        raise NotImplementedError

    def corrupt(
        self,
        key: Array,
        batch: Batch,
        *,
        mask_id: int,
        rows: ArrayLike,
        num_rows: int,
    ) -> Corruption:
        """Masks a (micro-)batch; see `MaskingProcess.corrupt`."""
        shape = check_call(batch, rows, num_rows, self.p_uncond)
        time_key, mask_key, drop_key = jax.random.split(key, 3)
        if self.stratified:
            tau = stratified_times(time_key, rows, num_rows)[:, None]
        else:
            tau = row_uniform(time_key, rows, 1)
        t = self.t_min + (1.0 - self.t_min) * tau
        u = row_uniform(mask_key, rows, shape[1])
        masked = jnp.asarray(batch.maskable) & (u < self.schedule.mask_probability(t))
        dropped = drop_conditions(drop_key, batch, rows, self.p_uncond)
        hidden = masked | (jnp.asarray(batch.condition) & dropped[:, None])
        weight = jnp.broadcast_to(self._weight(batch, masked, hidden, t), shape)
        return hide(batch, masked, weight, t, dropped, mask_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITMasking(_Surrogate):
    """Cross-entropy pooled over masked tokens: ∫ F(m(t)) dt / ∫ m(t) dt.

    All masked tokens count alike. The reference divides by the number of masked
    tokens in the batch, which makes the gradient depend on how the batch is cut and
    sharded; here the *expected* number, N·∫ m(t) dt, takes its place (the weight is
    the constant 1/∫ m dt: π/2 for the cosine), so that the loss is additive.

    Attributes:
      schedule: `Cosine` unless given.
      t_min: lower clip of the time; 0, for nothing diverges.
      stratified: low-discrepancy times over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.

    References:
      Chang et al., "MaskGIT: Masked Generative Image Transformer", arXiv 2202.04200.
    """

    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    t_min: float = 0.0

    @property
    def metric_name(self) -> str:
        """``"maskgit"``."""
        return "maskgit"

    def _weight(self, batch: Batch, masked: Array, hidden: Array, t: Array) -> Array:
        del batch, masked, hidden, t
        # Midpoint rule: its error, h²/24 times a slope difference, is below 1e-7.
        tau = (np.arange(4096) + 0.5) / 4096
        times = self.t_min + (1.0 - self.t_min) * tau
        with jax.ensure_compile_time_eval():
            m = self.schedule.mask_probability(times.astype(np.float32))
            mean = np.mean(np.asarray(m, np.float64))
        return jnp.full((1, 1), 1.0 / mean, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftminSNRMasking(_Surrogate):
    """Linear masking with the capped weight 1/(t + (1 − t)/γ).

    γ = ∞ is the likelihood weight 1/t.

    Attributes:
      schedule: the weight is written in m(t), which is t for `Linear`.
      gamma: γ > 0, the cap of the weight.
      t_min: lower clip of the time; 0, for the weight is bounded.
      stratified: low-discrepancy times over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.

    References:
      Swerdlow et al., "Unified Multimodal Discrete Diffusion", arXiv 2503.20853.
    """

    gamma: float = 5.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if not self.gamma > 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma!r}")
        if not isinstance(self.schedule, Linear):
            raise ValueError(
                f"schedule must be Linear() for the softmin-SNR weight, got "
                f"{self.schedule!r}"
            )

    @property
    def metric_name(self) -> str:
        """``"softmin_snr"``."""
        return "softmin_snr"

    def _weight(self, batch: Batch, masked: Array, hidden: Array, t: Array) -> Array:
        del batch, masked, hidden
        return softmin_snr_weight(t, gamma=self.gamma)


def softmin_snr_weight(t: ArrayLike, *, gamma: float) -> Array:
    """1/(t + (1 − t)/γ), which is at most γ where the bound has 1/t."""
    t = jnp.asarray(t)
    return 1.0 / (t + (1.0 - t) / gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CARTMasking(_Surrogate):
    """Weights a masked token by the visible tokens near it, whatever the time.

    The weight of position i is Σ ½·p·(1 − p)^(|i − j| − 1) over the visible positions
    j of its segment: at most 1, reached with every neighbour in sight.

    Attributes:
      p: parameter of the geometric law, in (0, 1).
      schedule: the mask probability of all positions.
      t_min: lower clip of the time.
      stratified: low-discrepancy times over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.

    References:
      Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487
      (context-adaptive noise rescheduling at token level).
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if not 0 < self.p < 1:
            raise ValueError(f"p must lie in (0, 1), got {self.p!r}")

    @property
    def metric_name(self) -> str:
        """``"cart"``."""
        return "cart"

    def _weight(self, batch: Batch, masked: Array, hidden: Array, t: Array) -> Array:
        del masked, t
        segment = jnp.asarray(batch.segment_ids)
        visible = (~hidden & (segment != 0)).astype(jnp.float32)
        near = _geometric_sum(visible, segment, 1.0 - self.p)
        flipped = _geometric_sum(visible[:, ::-1], segment[:, ::-1], 1.0 - self.p)
        return 0.5 * self.p * (near + flipped[:, ::-1])


def _geometric_sum(visible: Array, segment: Array, ratio: float) -> Array:
    """Σ_{j<i} ratio^(i−j−1)·visible_j within each (contiguous) segment."""
    same = (segment[:, 1:] == segment[:, :-1]).astype(jnp.float32)
    same = jnp.pad(same, ((0, 0), (1, 0)))
    before = jnp.pad(visible[:, :-1], ((0, 0), (1, 0)))

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, total = jax.lax.associative_scan(combine, (ratio * same, before * same), axis=1)
    return total
