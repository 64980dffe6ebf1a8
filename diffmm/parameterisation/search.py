r"""Trust-region random search with ask and tell.

    search = TrustRegion(dimensions=len(space), seed=0)
    state = search.init(loss_at_the_start)
    while ...:
        state, trials = search.ask(state, 16)
        losses = [train(space.per_module(trial.point)) for trial in trials]
        state = search.tell(state, trials, losses)
    best = space.per_module(state.center)

Per-module hyper-parameters have cliffs of divergence whose places differ by orders of
magnitude between modules, and hardly any bad local optimum otherwise. Random search in
a box falls off a cliff at almost every point, and Gaussian processes fail because the
landscape is not stationary. A random search in a region around the best point so far,
from the best global hyper-parameters on, works.

References:
  Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width, Depth,
  Batch and Duration", arXiv 2512.22382 (the method; its constants are not published,
  those here are ours).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffmm.typing import ArrayLike

_JSON_VERSION = 1


class Trial(NamedTuple):
    """One point to be evaluated.

    Attributes:
      id: position in ``SearchState.trials``; 0 is the start.
      point: logarithms of multipliers, one per dimension.
      loss: once told; ``inf`` if it diverged, None before.
    """

    id: int
    point: tuple[float, ...]
    loss: float | None = None


class SearchState(NamedTuple):
    """Where a search stands; plain numbers only, hence comparable and hashable.

    Attributes:
      center: the best point so far: logarithms of multipliers.
      loss: its loss.
      radius: standard deviation of the steps from it, nats.
      trials: everything ever asked, in the order of ids.
      settled: trials that have been taken into account, always the first ones.
      stopped: whether the region has shrunk away; there is nothing to ask then.
    """

    center: tuple[float, ...]
    loss: float
    radius: float
    trials: tuple[Trial, ...]
    settled: int
    stopped: bool = False

    @property
    def pending(self) -> tuple[Trial, ...]:
        """Trials asked and not told: to be run again after a restart."""
        return tuple(trial for trial in self.trials if trial.loss is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Random search around an incumbent, in logarithms of multipliers.

    A trial is ``center + radius · u`` with ``u ~ N(0, 1)``, clipped, on a random
    choice of about ``active`` of the coordinates. Whenever a generation of trials has
    been told, the best of them becomes the center if it beats the incumbent by more
    than ``tolerance``, and the radius grows; otherwise the radius shrinks. A region
    that has shrunk to nothing starts again at the center, or ends the search.

    The object is configuration and has no state: `init`, `ask` and `tell` return a new
    `SearchState`. Every random number is a function of the seed and the id of its
    trial, so a search that is saved and restored goes on exactly as it would have.
    Any number of trials may be out at once and be told in any order; generations are
    settled in the order of ids, so one worker that never answers holds the search up:
    tell ``inf`` for a trial that is lost.

    Attributes:
      dimensions: d, length of a point.
      seed: of all draws.
      generation: trials between two decisions about the region. Batches of `ask` may
        have any size; with more workers than this, raise it to their number.
      tolerance: how much lower a loss must be to count as progress, in its units.
      radius: at the start and after a restart, nats: 0.7 is a factor of two.
      min_radius: below it the search restarts or stops.
      max_radius: upper limit.
      grow: factor on the radius after progress.
      shrink: factor on the radius without.
      clip: largest step of a coordinate, in radii.
      active: expected number of coordinates that a trial changes.
      restart: start again with the first radius, instead of stopping.
    """

    dimensions: int
    seed: int = 0
    generation: int = 16
    tolerance: float = 1e-6
    radius: float = 0.7
    min_radius: float = 0.05
    max_radius: float = 1.5
    grow: float = 1.5
    shrink: float = 0.7
    clip: float = 2.0
    active: float = 20.0
    restart: bool = True

    def __post_init__(self) -> None:
        """Checks the constants."""
        checks = {
            "dimensions": (self.dimensions >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
            "generation": (self.generation >= 1, "at least 1"),
            "tolerance": (0 <= self.tolerance < math.inf, "finite and at least 0"),
            "radius": (
                self.min_radius <= self.radius <= self.max_radius,
                f"in [min_radius, max_radius] = [{self.min_radius}, {self.max_radius}]",
            ),
            "min_radius": (self.min_radius > 0, "positive"),
            "max_radius": (self.max_radius < math.inf, "finite"),
            "grow": (1 <= self.grow < math.inf, "finite and at least 1"),
            "shrink": (0 < self.shrink < 1, "in (0, 1)"),
            "clip": (self.clip > 0, "positive"),
            "active": (self.active > 0, "positive"),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")

    def init(self, loss: float, center: ArrayLike | None = None) -> SearchState:
        """The state before the first trial.

        Args:
          loss: of the start, over as many seeds as the user can afford.
          center: ``[dimensions]``, the start; 0 by default, all multipliers 1.

        Raises:
          ValueError: a ``center`` of another shape, or not finite.
        """
        point = np.zeros(self.dimensions) if center is None else np.asarray(center)
        if point.shape != (self.dimensions,) or not np.all(np.isfinite(point)):
            raise ValueError(
                f"center must hold {self.dimensions} finite numbers, got {center!r}"
            )
        start = Trial(0, tuple(point.astype(float).tolist()), _finite_or_inf(loss))
        return SearchState(
            center=start.point,
            loss=start.loss or 0.0,
            radius=self.radius,
            trials=(start,),
            settled=1,
        )

    def ask(self, state: SearchState, n: int) -> tuple[SearchState, tuple[Trial, ...]]:
        """New trials around the center; earlier ones need not have been told.

        Args:
          state: the search.
          n: how many, at least 1.

        Returns:
          The state that remembers them, and the trials; none if the search stopped.

        Raises:
          ValueError: ``n`` below 1, or the state of another number of dimensions.
        """
        self._check_state(state)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if state.stopped:
            return state, ()
        first = len(state.trials)
        center = np.asarray(state.center)
        new = tuple(
            Trial(i, tuple((center + state.radius * self._step(i)).tolist()))
            for i in range(first, first + n)
        )
        return state._replace(trials=state.trials + new), new

    def tell(
        self,
        state: SearchState,
        trials: Sequence[Trial | int],
        losses: Sequence[float] | np.ndarray,
    ) -> SearchState:
        """Takes losses into account, in any order and in parts.

        Args:
          state: the search.
          trials: trials of `ask`, or their ids.
          losses: one each; NaN and infinities count as diverged.

        Returns:
          The new state.

        Raises:
          ValueError: other numbers of trials and losses, an id that was never asked,
            or one that was told before.
        """
        self._check_state(state)
        if len(trials) != len(losses):
            raise ValueError(f"got {len(losses)} losses of {len(trials)} trials")
        all_trials = list(state.trials)
        for trial, loss in zip(trials, losses, strict=True):
            i = trial.id if isinstance(trial, Trial) else int(trial)
            if not 0 <= i < len(all_trials):
                raise ValueError(f"trials: id {i} was not asked")
            if all_trials[i].loss is not None:
                raise ValueError(f"trials: id {i} was told before")
            all_trials[i] = all_trials[i]._replace(loss=_finite_or_inf(loss))
        state = state._replace(trials=tuple(all_trials))
        while not state.stopped:
            block = state.trials[state.settled : state.settled + self.generation]
            if len(block) < self.generation or any(t.loss is None for t in block):
                break
            state = self._settle(state, block)
        return state

    def _settle(self, state: SearchState, block: Sequence[Trial]) -> SearchState:
        settled = state.settled + len(block)
        best = min(block, key=_loss_of)
        if _loss_of(best) < state.loss - self.tolerance:
            return state._replace(
                center=best.point,
                loss=_loss_of(best),
                radius=min(self.grow * state.radius, self.max_radius),
                settled=settled,
            )
        radius = self.shrink * state.radius
        if radius >= self.min_radius:
            return state._replace(radius=radius, settled=settled)
        if self.restart:
            return state._replace(radius=self.radius, settled=settled)
        return state._replace(radius=radius, settled=settled, stopped=True)

    def _step(self, i: int) -> np.ndarray:
        """The step u of trial ``i``: float64 ``[dimensions]``."""
        rng = np.random.default_rng([self.seed, i])
        u = np.clip(rng.standard_normal(self.dimensions), -self.clip, self.clip)
        lottery = rng.random(self.dimensions)
        keep = lottery < self.active / self.dimensions
        keep[np.argmin(lottery)] = True  # a trial that changes nothing tells nothing
        return np.where(keep, u, 0.0)

    def to_json(self, state: SearchState) -> dict[str, Any]:
        """The search and its state, for `json.dump`; infinities become ``"inf"``."""
        return {
            "version": _JSON_VERSION,
            "search": dataclasses.asdict(self),
            "center": list(state.center),
            "loss": _to_json(state.loss),
            "radius": state.radius,
            "settled": state.settled,
            "stopped": state.stopped,
            "trials": [[list(t.point), _to_json(t.loss)] for t in state.trials],
        }

    def from_json(self, data: Mapping[str, Any]) -> SearchState:
        """The state that `to_json` wrote, possibly in another process.

        Raises:
          ValueError: another version, a search with other constants (which would not
            go on as it began), or fields that are missing or malformed.
        """
        try:
            if data["version"] != _JSON_VERSION:
                raise ValueError(
                    f"version must be {_JSON_VERSION}, got {data['version']!r}"
                )
            ours, theirs = dataclasses.asdict(self), dict(data["search"])
            if ours != theirs:
                changed = sorted(
                    key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)
                )
                raise ValueError(f"search differs from the saved one in {changed}")
            state = SearchState(
                center=tuple(map(float, data["center"])),
                loss=float(data["loss"]),
                radius=float(data["radius"]),
                trials=tuple(
                    Trial(
                        i,
                        tuple(map(float, point)),
                        None if loss is None else float(loss),
                    )
                    for i, (point, loss) in enumerate(data["trials"])
                ),
                settled=int(data["settled"]),
                stopped=bool(data["stopped"]),
            )
        except KeyError as error:
            raise ValueError(f"data: the field {error} is missing") from None
        except TypeError as error:
            raise ValueError(f"data is not the state of a search: {error}") from None
        self._check_state(state)
        return state

    def _check_state(self, state: SearchState) -> None:
        if len(state.center) != self.dimensions:
            raise ValueError(
                f"state has {len(state.center)} dimensions, the search "
                f"{self.dimensions}"
            )


def _loss_of(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss


def _finite_or_inf(loss: float) -> float:
    loss = float(loss)
    return loss if math.isfinite(loss) else math.inf


def _to_json(loss: float | None) -> float | str | None:
    return loss if loss is None or math.isfinite(loss) else "inf"
