"""Forward processes: which positions are masked, and with what likelihood weight.

The data likelihood of the absorbing process is bounded by

    −log p(x0) <= ∫_0^1 (m'(t)/m(t)) E[Σ_masked CE_i] dt = ∫_0^1 F(m)/m dm,

with CE_i = −log p(x0_i | x_t) and F(m) the expected sum of CE_i at mask probability
m. The processes here are estimators of that integral: a corrupted batch together
with the weight of each masked position. A process is configuration only; all its
randomness is a function of (key, global row index), so a global batch may be cut
into micro-batches or spread over devices without changing a single mask.

`diffmm.diffusion.surrogates` holds the processes that do not estimate a bound.

References:
  Sahoo et al., "Simple and Effective Masked Diffusion Language Models",
  arXiv 2406.07524; Shi et al., "Simplified and Generalized Masked Diffusion for
  Discrete Data", arXiv 2406.04329; Ou et al., arXiv 2406.03736 (equality with the
  any-order autoregressive average).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffmm.diffusion.corruption import (
    Corruption,
    Schedules,
    by_modality,
    check_call,
    drop_conditions,
    hide,
    per_modality,
)
from diffmm.diffusion.draws import (
    row_keys,
    row_uniform,
    stratified_times,
    uniform_subset,
)
from diffmm.diffusion.schedules import Linear
from diffmm.typing import NUM_MODALITIES, Array, ArrayLike, Batch

# Successive multiples of the golden ratio fill the circle evenly at every length.
_GOLDEN = 0.6180339887498949


@dataclasses.dataclass(frozen=True, kw_only=True)
class BernoulliMasking:
    """Masks each maskable position independently with probability m(t).

    The weight of a masked position is m'(t)/m(t) of its own modality's schedule, at
    t = t_min + (1 − t_min)·τ with τ uniform. With ``t_min > 0`` the estimate is the
    average over [t_min, 1]. A row in which nothing is masked contributes nothing:
    no mask is ever forced, which would bias the estimate.

    Schedules that differ by modality and share one time are a path integral through
    the space of mask levels, hence a bound for any set of schedules; its value for an
    imperfect model depends on the schedules.

    Attributes:
      schedules: one schedule, or one for each modality; stored as a tuple in the
        order of `Modality`.
      t_min: lower clip of the time, in [0, 1).
      stratified: low-discrepancy times over the global batch (`stratified_times`)
        instead of independent ones; does not apply to ``times="independent"``.
      times: ``"row"``, one time for the whole row; ``"segment"``, one for each
        segment of a packed row; ``"independent"``, one for each modality of a row,
        which is **not a bound** on the joint likelihood.
      p_uncond: probability of hiding a row's condition, for guidance.
      complementary: rows 2j and 2j + 1 of the global batch, which must hold the same
        data (`repeat_rows`), get complementary masks A = {u < m} and B = {u >= m}
        with weights m'/m and m'/(1 − m), so that each maskable token is predicted
        exactly once per pair. Times are then clipped to [t_min, 1 − t_min].

    References:
      Nie et al., "Large Language Diffusion Models", arXiv 2502.09992.
    """

    schedules: Schedules = dataclasses.field(default_factory=Linear)
    t_min: float = 1e-3
    stratified: bool = True
    times: Literal["row", "segment", "independent"] = "row"
    p_uncond: float = 0.0
    complementary: bool = False

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "schedules", per_modality(self.schedules))
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must lie in [0, 1), got {self.t_min!r}")
        if self.complementary and not self.t_min < 0.5:
            raise ValueError(
                f"t_min must lie in [0, 0.5) when complementary, got {self.t_min!r}"
            )
        if self.times not in ("row", "segment", "independent"):
            raise ValueError(
                f"times must be 'row', 'segment' or 'independent', got {self.times!r}"
            )
        if not 0 <= self.p_uncond <= 1:
            raise ValueError(f"p_uncond must lie in [0, 1], got {self.p_uncond!r}")

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss estimates a bound on the joint likelihood."""
        return self.times != "independent"

    @property
    def metric_name(self) -> str:
        """``"elbo"``, or ``"pseudo_elbo"`` for independent times."""
        return "elbo" if self.is_bound else "pseudo_elbo"

    def _times(
        self, key: Array, batch: Batch, rows: Array, num_rows: int, length: int
    ) -> Array:
        """Uniform times τ: float32 ``[B, L]``, or ``[B, 1]`` shared by the row."""
        if self.times == "independent":
            own = row_uniform(key, rows, NUM_MODALITIES)
            index = jnp.clip(jnp.asarray(batch.modality), 0, NUM_MODALITIES - 1)
            return jnp.take_along_axis(own, index.astype(jnp.int32), axis=1)
        if self.times == "row":
            if self.stratified:
                return stratified_times(key, rows, num_rows)[:, None]
            return row_uniform(key, rows, 1)
        segment = jnp.asarray(batch.segment_ids).astype(jnp.int32)
        if self.stratified:
            tau = stratified_times(key, rows, num_rows)[:, None] + _GOLDEN * segment
            return tau - jnp.floor(tau)
        own = row_uniform(key, rows, length + 1)
        return jnp.take_along_axis(own, jnp.clip(segment, 0, length), axis=1)

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
        rows = jnp.asarray(rows)
        second = jnp.zeros(shape[:1], bool)
        t_max = 1.0
        if self.complementary:
            if isinstance(num_rows, int) and num_rows % 2:
                raise ValueError(
                    f"num_rows must be even for complementary pairs, got {num_rows}"
                )
            # Both rows of a pair draw as one, and differ in the side of u they mask.
            rows, second, num_rows = rows // 2, rows % 2 == 1, num_rows // 2
            t_max = 1.0 - self.t_min
        time_key, mask_key, drop_key = jax.random.split(key, 3)
        tau = self._times(time_key, batch, rows, num_rows, shape[1])
        t = jnp.broadcast_to(self.t_min + (t_max - self.t_min) * tau, shape)
        schedules = per_modality(self.schedules)
        m = by_modality(schedules, "mask_probability", t, batch)
        below = row_uniform(mask_key, rows, shape[1]) < m
        masked = jnp.asarray(batch.maskable) & (below ^ second[:, None])
        # At t = 0 nothing is masked, and the weight there need not be finite.
        safe_t = jnp.where(masked, t, 0.5)
        weight = by_modality(schedules, "weight", safe_t, batch)
        if self.complementary:
            m = by_modality(schedules, "mask_probability", safe_t, batch)
            weight = jnp.where(second[:, None], weight * m / (1.0 - m), weight)
        dropped = drop_conditions(drop_key, batch, rows, self.p_uncond)
        return hide(batch, masked, weight, t, dropped, mask_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountMasking:
    """Masks a uniform subset of k of the row's n maskable positions, k ~ U{1..n}.

    The weight is n/k. This is the bound itself, for any one schedule shared by all
    positions, with no clipping of the time; a uniform predictor gives n·log V on
    every draw. Levels that differ by modality have no count form. The stratified form
    takes k = ceil(n·τ), clipped to [1, n], with the times of `stratified_times`.
    ``Corruption.t`` is k/n.

    Attributes:
      stratified: low-discrepancy counts over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.

    References:
      Ou et al., arXiv 2406.03736, equation for λ(l) = n/l; Hoogeboom et al.,
      "Autoregressive Diffusion Models", arXiv 2110.02037.
    """

    stratified: bool = True
    p_uncond: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 <= self.p_uncond <= 1:
            raise ValueError(f"p_uncond must lie in [0, 1], got {self.p_uncond!r}")

    @property
    def is_bound(self) -> bool:
        """True."""
        return True

    @property
    def metric_name(self) -> str:
        """``"elbo"``."""
        return "elbo"

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
        check_call(batch, rows, num_rows, self.p_uncond)
        time_key, mask_key, drop_key = jax.random.split(key, 3)
        if self.stratified:
            tau = stratified_times(time_key, rows, num_rows)
        else:
            tau = row_uniform(time_key, rows, 1)[:, 0]
        maskable = jnp.asarray(batch.maskable)
        n = jnp.maximum(jnp.sum(maskable, axis=-1, dtype=jnp.int32), 1)
        k = jnp.clip(jnp.ceil(n * tau).astype(jnp.int32), 1, n)
        masked = uniform_subset(row_keys(mask_key, rows), maskable, k)
        dropped = drop_conditions(drop_key, batch, rows, self.p_uncond)
        return hide(batch, masked, (n / k)[:, None], (k / n)[:, None], dropped, mask_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteMasking:
    """The T-step process: t = i/T, i ~ U{1..T}, s = t − 1/T.

    The weight is T·(m(t) − m(s))/m(t): the bound of a sampler that takes exactly T
    steps, which tends to the continuous bound as T grows.

    Attributes:
      num_steps: T >= 1.
      schedules: as in `BernoulliMasking`.
      stratified: low-discrepancy steps over the global batch.
      p_uncond: probability of hiding a row's condition, for guidance.

    References:
      Austin et al., "Structured Denoising Diffusion Models in Discrete State-Spaces",
      arXiv 2107.03006; Sahoo et al., arXiv 2406.07524.
    """

    num_steps: int
    schedules: Schedules = dataclasses.field(default_factory=Linear)
    stratified: bool = True
    p_uncond: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "schedules", per_modality(self.schedules))
        if not self.num_steps >= 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps!r}")
        if not 0 <= self.p_uncond <= 1:
            raise ValueError(f"p_uncond must lie in [0, 1], got {self.p_uncond!r}")

    @property
    def is_bound(self) -> bool:
        """True: the bound of the T-step process."""
        return True

    @property
    def metric_name(self) -> str:
        """``"elbo"``."""
        return "elbo"

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
        step = jnp.minimum(jnp.floor(self.num_steps * tau) + 1, self.num_steps)
        t = jnp.broadcast_to(step / self.num_steps, shape)
        s = jnp.broadcast_to((step - 1) / self.num_steps, shape)
        schedules = per_modality(self.schedules)
        m = by_modality(schedules, "mask_probability", t, batch)
        previous = by_modality(schedules, "mask_probability", s, batch)
        u = row_uniform(mask_key, rows, shape[1])
        masked = jnp.asarray(batch.maskable) & (u < m)
        weight = self.num_steps * (m - previous) / m
        dropped = drop_conditions(drop_key, batch, rows, self.p_uncond)
        return hide(batch, masked, weight, t, dropped, mask_id)
