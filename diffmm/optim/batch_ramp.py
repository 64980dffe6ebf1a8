"""Batches that change during a run: the clock, the hyper-parameters, the state.

A ramp is a sequence of phases with one batch size each. At a switch, hyper-parameters
move by κ = new batch / old batch, and so must the optimiser's memory of the gradients:
`change_batch` turns its state into that of a run which had the new batch all along. So
a run is, phase by phase::

    hyper = ramp.hyperparameters(tuned, base, phase)
    schedule = ramp.phase_schedule(warmup_cosine(base, ramp.budget(phase)), phase)
    optimizer = adamw(hyper, multipliers, schedule=schedule)
    opt_state = change_batch(opt_state, ramp.batch_ratio(phase))
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.optim import validate
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.remap import change_batch as change_batch
from diffmm.optim.remap import remap_count as remap_count
from diffmm.optim.schedules import OFFSETS, TokenSchedule, require_token_schedule
from diffmm.optim.sde import Budget, reparameterise


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A run whose batch is constant within each phase.

    Two counts must not be confused. The *step* of the run (of the training state, the
    data and the logs) counts all steps. The *count* in the optimiser's state is
    remapped by `change_batch` at every switch, and reads as if the present batch had
    been used throughout. `by_steps` takes the first, `phase_schedule` the second. Both
    work on the fraction of the tokens, so that no count of tokens has to fit an int32.

    >>> stages = ramp(batches=(256, 1024), tokens=(25_600, 102_400))
    >>> stages.steps, stages.tokens, stages.counts
    ((100, 100), 128000.0, (0, 25))

    Attributes:
      batches: of the phases, in tokens (or samples), at least 1.
      steps: optimiser steps of the phases, at least 1.

    Raises:
      ValueError: no phase, lengths that differ, a value below 1.
    """

    batches: tuple[float, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks the phases."""
        if not self.batches or len(self.batches) != len(self.steps):
            raise ValueError(
                "batches and steps must have one entry per phase, got "
                f"{len(self.batches)} and {len(self.steps)}."
            )
        for batch in self.batches:
            _check_batch(batch)
        for count in self.steps:
            validate.whole("steps", count)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return sum(self.steps)

    @property
    def tokens(self) -> float:
        """Tokens of the whole run."""
        return math.fsum(b * n for b, n in zip(self.batches, self.steps, strict=True))

    @property
    def first_steps(self) -> tuple[int, ...]:
        """The step at which each phase begins."""
        return tuple(itertools.accumulate(self.steps[:-1], initial=0))

    @property
    def first_tokens(self) -> tuple[float, ...]:
        """The tokens seen when each phase begins."""
        products = [b * n for b, n in zip(self.batches, self.steps, strict=True)]
        return tuple(itertools.accumulate(products[:-1], initial=0.0))

    @property
    def counts(self) -> tuple[int, ...]:
        """The optimiser's count when each phase begins, after `change_batch`."""
        counts = [0]
        for phase in range(1, len(self.steps)):
            end = counts[-1] + self.steps[phase - 1]
            counts.append(remap_count(end, self.batch_ratio(phase)))
        return tuple(counts)

    def phase(self, step: int) -> int:
        """Index of the phase that a step (counted from 0) belongs to."""
        return bisect.bisect_right(self.first_steps, step) - 1

    def batch_ratio(self, phase: int) -> float:
        """κ for `change_batch` on entering a phase; 1 for the first."""
        if phase == 0:
            return 1.0
        return self.batches[phase] / self.batches[phase - 1]

    def budget(self, phase: int) -> Budget:
        """Batch of a phase, and tokens of the whole run: its place in the rules."""
        return Budget(batch=self.batches[phase], tokens=self.tokens)

    def hyperparameters(
        self, hyper: AdamW, base: Budget, phase: int, **options: Any
    ) -> AdamW:
        """The hyper-parameters of a phase.

        Args:
          hyper: tuned at ``base``.
          base: its batch and duration, in the units of the ramp.
          phase: index.
          **options: of `diffmm.optim.sde.reparameterise`.

        Returns:
          ``hyper`` at the phase's batch and the duration of the whole run.
        """
        return reparameterise(hyper, base, self.budget(phase), **options)

    def fraction(
        self, step: Any, *, at: Literal["start", "middle", "end"] = "start"
    ) -> Any:
        """Share of the run's tokens seen at a step of the run.

        Counts are subtracted as integers before they become floats, so that a float32
        result errs by rounding of the share only, about 1e-7.

        Args:
          step: a number or numpy array (float64 result), or an integer jax array
            (float32).
          at: place within the step.

        Returns:
          The share, above 1 after the end of the run.
        """
        validate.one_of("at", at, OFFSETS)
        traced = isinstance(step, jax.Array)
        total = self.tokens
        result: Any = None
        phases = zip(self.first_steps, self.first_tokens, self.batches, strict=True)
        for first, seen, batch in phases:
            inside = step - first
            if traced:
                inside = inside.astype(jnp.float32)
            share = (inside + OFFSETS[at]) * (batch / total) + seen / total
            if result is None:
                result = share
            else:
                result = (jnp if traced else np).where(step >= first, share, result)
        return result

    def by_steps(
        self,
        schedule: TokenSchedule,
        *,
        at: Literal["start", "middle", "end"] = "middle",
    ) -> Callable[[Any], Any]:
        """The schedule as a function of the *step* of the run, through all phases.

        For optimisers whose state is never remapped, for logs and plots.

        Raises:
          ValueError: not a `TokenSchedule`, or unknown ``at``.
        """
        schedule = require_token_schedule(schedule)
        validate.one_of("at", at, OFFSETS)
        scale = self.tokens / schedule.tokens
        return lambda step: schedule.at(self.fraction(step, at=at) * scale)

    def phase_schedule(
        self,
        schedule: TokenSchedule,
        phase: int,
        *,
        at: Literal["start", "middle", "end"] = "middle",
    ) -> Callable[[Any], Any]:
        """The schedule as a function of the optimiser's *count* within a phase.

        Right for a state that went through `change_batch` at every switch so far: it
        knows to which whole count each was rounded, so no tokens are gained or lost.

        Raises:
          ValueError: not a `TokenSchedule`, or unknown ``at``.
        """
        schedule = require_token_schedule(schedule)
        validate.one_of("at", at, OFFSETS)
        first = self.counts[phase]
        seen = self.first_tokens[phase] / schedule.tokens
        scale = self.batches[phase] / schedule.tokens

        def multiplier(count: Any) -> Any:
            inside = count - first
            if isinstance(count, jax.Array):
                inside = inside.astype(jnp.float32)
            return schedule.at((inside + OFFSETS[at]) * scale + seen)

        return multiplier


def ramp(batches: Sequence[float], tokens: Sequence[float]) -> BatchRamp:
    """A ramp of phases that last about so many tokens.

    Every phase ends at the whole step nearest to the sum of tokens so far, and has at
    least one step.

    Args:
      batches: of the phases.
      tokens: of the phases, in the same unit.

    Returns:
      A `BatchRamp`.

    Raises:
      ValueError: no phase, lengths that differ, a batch below 1, tokens not positive.
    """
    if not len(batches) or len(batches) != len(tokens):
        raise ValueError(
            "batches and tokens must have one entry per phase, got "
            f"{len(batches)} and {len(tokens)}."
        )
    steps = []
    due = seen = 0.0
    for batch, length in zip(batches, tokens, strict=True):
        batch = _check_batch(batch)
        due += validate.positive("tokens", length)
        steps.append(max(1, round((due - seen) / batch)))
        seen += steps[-1] * batch
    return BatchRamp(batches=tuple(map(float, batches)), steps=tuple(steps))


def _check_batch(batch: float) -> float:
    batch = validate.number("batch", batch)
    if batch < 1:
        raise ValueError(f"batch must be at least 1 token or sample, got {batch!r}.")
    return batch
