"""Ancestral sampling that masks tokens again.

A row may need any number of evaluations up to its steps, and `max_forwards` must be
given.

References:
  Wang et al., "Remasking Discrete Diffusion Models with Inference-Time Scaling", arXiv
  2503.00307.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffmm.diffusion.schedules import Linear
from diffmm.samplers.checks import check_choice, check_number
from diffmm.samplers.rule import (
    Advance,
    Prediction,
    Rule,
    Selection,
    Window,
    check_num_steps,
    steps_of_block,
    uniform_per_position,
)
from diffmm.typing import Array, ArrayLike, Schedule

_STATIC = {"static": True}
_NO_RANK = 0x7FFFFFFF
_DEFAULT_ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}


def largest_sigma(alpha_t: ArrayLike | float, alpha_s: ArrayLike | float) -> Array:
    """σ_max = min(1, (1 − α_s)/α_t), float32.

    At σ_max every masked token is unmasked.

    >>> print(f"{largest_sigma(0.5, 0.6):.1f}")
    0.8
    """
    alpha_t = jnp.asarray(alpha_t, jnp.float32)
    left = 1.0 - jnp.asarray(alpha_s, jnp.float32)
    return jnp.where(
        left < alpha_t, left / jnp.where(left < alpha_t, alpha_t, 1.0), 1.0
    )


def unmask_probability(
    alpha_t: ArrayLike | float,
    alpha_s: ArrayLike | float,
    sigma: ArrayLike | float,
) -> Array:
    """(α_s − (1 − σ)·α_t)/(1 − α_t): a masked token is drawn between t and s, float32.

    Together with remasking at rate σ it leaves a share of 1 − α_s masked, whatever σ.

    >>> print(f"{unmask_probability(0.5, 0.6, 0.24):.2f}")
    0.44
    """
    alpha_t = jnp.asarray(alpha_t, jnp.float32)
    return jnp.asarray((alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t))


class ReMDMMemory(NamedTuple):
    """What `ReMDM` remembers.

    Attributes:
      clock: int32 ``[K]``, the step at which a masked position is revealed at latest.
      seed: uint32 ``[2]``, of the block's other random numbers.
    """

    clock: Array
    seed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMDM(Rule):
    """Ancestral sampling in which tokens become masks again.

    From t to s a token is masked again with probability σ, and a mask is revealed with
    probability (α_s − (1 − σ)α_t)/(1 − α_t), α = 1 − m. A share m(s) is masked after
    the step, for every σ (but not with ``"conf"``). Kept tokens are kept: they are not
    drawn again. With σ_max = min(1, (1 − α_s)/α_t):

    | variant | σ |
    |---|---|
    | ``cap`` | min(η, σ_max) |
    | ``rescale`` | η·σ_max |
    | ``conf`` | η·σ_max·softmax(−p) over the block's tokens |
    | ``loop`` | min(η, σ_max) for t in (t_off, t_on], else 0 |

    with p the probability at which a token was committed. In the last step σ = 0.
    ``loop`` has its own mask probability: it falls linearly from 1 at t = 1 to
    1 − α_on at t_on, stays there until t_off, and falls linearly to 0.

    Every masked position has a level below the present m, at which `Ancestral` would
    reveal it; remasking needs some of the others to be revealed early, and gives a new
    level. So η = 0 gives the tokens of `Ancestral`, with the same key.

    Attributes:
      num_steps: n ≥ 1, over all blocks of a row.
      variant: see the table.
      eta: η in [0, 1]; ``None`` is .008, .015, 1, .02 for the four variants.
      t_on: of ``loop``.
      t_off: of ``loop``; 0 < t_off < t_on < 1.
      alpha_on: of ``loop``, in (0, 1).
      schedule: the mask probability m(t) of the other variants.
      lazy: skip steps in which nothing is revealed or masked again; the tokens are the
        same.
    """

    num_steps: ArrayLike | int
    variant: str = dataclasses.field(default="cap", metadata=_STATIC)
    eta: ArrayLike | float | None = None
    t_on: ArrayLike | float = 0.55
    t_off: ArrayLike | float = 0.05
    alpha_on: ArrayLike | float = 0.9
    schedule: Schedule = dataclasses.field(default=Linear(), metadata=_STATIC)
    lazy: bool = dataclasses.field(default=True, metadata=_STATIC)

    guarded: ClassVar[bool] = False
    remasks: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses fields out of range."""
        check_num_steps(self.num_steps, num_blocks)
        check_choice("variant", self.variant, tuple(_DEFAULT_ETA))
        if self.eta is not None:
            check_number("eta", self.eta, high=1.0)
        t_on = check_number("t_on", self.t_on, high=1.0, above_low=True)
        t_off = check_number("t_off", self.t_off, high=1.0, above_low=True)
        alpha_on = check_number("alpha_on", self.alpha_on, high=1.0, above_low=True)
        if not t_off < t_on < 1:
            raise ValueError(
                f"t_off must be below t_on and t_on below 1, got t_off = {t_off!r} and "
                f"t_on = {t_on!r}"
            )
        if alpha_on == 1:
            raise ValueError(f"alpha_on must be below 1, got {self.alpha_on!r}")

    def mask_probability(self, t: ArrayLike | float) -> Array:
        """m(t) that this variant keeps to, float32."""
        t = jnp.asarray(t, jnp.float32)
        if self.variant != "loop":
            return self.schedule.mask_probability(t)
        rising = 1.0 - (1.0 - t) * self.alpha_on / (1.0 - self.t_on)
        flat = jnp.float32(1.0 - self.alpha_on)
        falling = t * (1.0 - self.alpha_on) / self.t_off
        return jnp.where(t > self.t_on, rising, jnp.minimum(flat, falling))

    def sigma(self, t: ArrayLike, s: ArrayLike) -> Array:
        """σ of the step from t to s, float32; the sum over tokens with ``"conf"``."""
        top = self.mask_probability(1.0)
        alpha_t = 1.0 - self.mask_probability(t) / top
        alpha_s = 1.0 - self.mask_probability(s) / top
        most = largest_sigma(alpha_t, alpha_s)
        eta = _DEFAULT_ETA[self.variant] if self.eta is None else self.eta
        if self.variant in ("rescale", "conf"):
            return jnp.asarray(eta * most)
        sigma = jnp.minimum(eta, most)
        if self.variant == "loop":
            t = jnp.asarray(t, jnp.float32)
            sigma = jnp.where((t > self.t_off) & (t <= self.t_on), sigma, 0.0)
        return sigma

    def enter(self, key: Array, window: Window, vocabulary_size: int) -> ReMDMMemory:
        """The steps at which `Ancestral` reveals, and a seed."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        level = uniform_per_position(key, window) * self.mask_probability(1.0)
        clock = self._step_of(level, num_steps, jnp.int32(0))
        # Ranks are folded into the key too; none is as large as this.
        seed = jax.random.bits(jax.random.fold_in(key, _NO_RANK), (2,), jnp.uint32)
        return ReMDMMemory(clock, seed)

    def advance(self, key: Array, window: Window, aux: ReMDMMemory) -> Advance:
        """The next step in which something happens, or the last one."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        step = window.step
        if self.lazy:
            step = self._next_event(window, window.masked, aux, step, num_steps - 1)
        step = jnp.minimum(step, num_steps - 1).astype(jnp.int32)
        t = 1.0 - step.astype(jnp.float32) / num_steps
        s = 1.0 - (step + 1).astype(jnp.float32) / num_steps
        return Advance(step, t, s, jnp.bool_(False), aux)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: ReMDMMemory
    ) -> Selection:
        """What this step reveals and masks again."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)
        step = window.step
        event = self._events(window, window.masked, aux, step, num_steps)
        reveal, remask = event & window.masked, event & ~window.masked
        s = 1.0 - (step + 1).astype(jnp.float32) / num_steps
        key = jax.random.fold_in(_key_of(aux, step), _NO_RANK)
        level = uniform_per_position(key, window) * self.mask_probability(s)
        again = self._step_of(level, num_steps, step + 1)
        aux = aux._replace(clock=jnp.where(remask, again, aux.clock))
        hold = step + 1 < num_steps
        if self.lazy and self.variant != "conf":
            # Where nothing is left to happen the block is left.
            masked = window.masked ^ event
            after = self._next_event(window, masked, aux, step + 1, num_steps)
            hold = hold & (after < num_steps)
        score = jnp.zeros(reveal.shape, jnp.float32)
        return Selection(reveal, score, aux, remask=remask, hold=hold)

    def _step_of(self, level: Array, num_steps: Array, first: Array) -> Array:
        """The step, at least ``first``, whose interval of m holds the level."""
        if self.variant == "loop":
            flat = 1.0 - self.alpha_on
            rising = 1.0 - (1.0 - level) * (1.0 - self.t_on) / self.alpha_on
            time = jnp.where(level > flat, rising, level * self.t_off / flat)
        else:
            time = self.schedule.inverse(level)
        step = jnp.floor(num_steps * (1.0 - time)).astype(jnp.int32)
        return jnp.clip(step, jnp.minimum(first, num_steps - 1), num_steps - 1)

    def _events(
        self,
        window: Window,
        masked: Array,
        aux: ReMDMMemory,
        step: Array,
        num_steps: Array,
    ) -> Array:
        """Masks that are revealed and tokens that are masked again, bool ``[K]``.

        Every step has random numbers of its own.
        """
        t = 1.0 - step.astype(jnp.float32) / num_steps
        s = 1.0 - (step + 1).astype(jnp.float32) / num_steps
        sigma = jnp.where(step + 1 < num_steps, self.sigma(t, s), 0.0)
        early = jnp.float32(0.0)
        committed = window.valid & ~masked
        if self.variant == "conf":
            share = jnp.where(committed, jnp.exp(-jnp.exp(window.logprob)), 0.0)
            again = sigma * share / jnp.maximum(jnp.sum(share), 1e-30)
        else:
            # What is masked at t and due after s, a share m(s)/m(t), must make up for
            # the σ·α_t that is masked again: σ·α_t/m(s) of it is revealed early.
            top = self.mask_probability(1.0)
            alpha_t = 1.0 - self.mask_probability(t) / top
            left = self.mask_probability(s) / top
            early = sigma * alpha_t / jnp.maximum(left, 1e-30)
            again = jnp.full(masked.shape, sigma)
        u = uniform_per_position(_key_of(aux, step), window)
        reveal = masked & ((aux.clock <= step) | (u < early))
        return reveal | (committed & (u < again))

    def _next_event(
        self,
        window: Window,
        masked: Array,
        aux: ReMDMMemory,
        step: Array,
        stop: Array,
    ) -> Array:
        """The first step from ``step`` on in which something happens, or ``stop``."""
        num_steps = steps_of_block(jnp.asarray(self.num_steps), window)

        def nothing(step: Array) -> Array:
            event = self._events(window, masked, aux, step, num_steps)
            return (step < stop) & ~jnp.any(event)

        return jax.lax.while_loop(nothing, lambda step: step + 1, step)


def _key_of(aux: ReMDMMemory, step: Array) -> Array:
    key = jax.random.wrap_key_data(aux.seed, impl="threefry2x32")
    return jax.random.fold_in(key, step)
