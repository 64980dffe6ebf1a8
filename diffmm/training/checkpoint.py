"""Checkpoints that resume a run bit by bit, and that no crash can spoil.

A checkpoint holds the training state, the position of the data iterator, the
configuration, the fingerprints of the tokenizers and a checksum of every array. It
is written to a temporary folder and renamed when complete, so that a killed process
leaves whole checkpoints only.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from diffmm.training import _saved
from diffmm.training._failures import (
    CheckpointWriteError as CheckpointWriteError,
)
from diffmm.training._failures import (
    UnreadableCheckpointError as UnreadableCheckpointError,
)
from diffmm.training._resume import (
    check_config,
    check_data,
    check_fingerprints,
    freeze,
    settable,
)
from diffmm.training._store import KeepLastAndBest, Store
from diffmm.training.results import to_jsonable
from diffmm.version import __version__

_LOGGER = logging.getLogger("diffmm")
_FORMAT = 1


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
      state: with the tree, types and placement of the ``state_like`` argument.
      step: the step under which it was saved.
      config: the saved configuration (JSON types), or ``None``.
      fingerprints: of the tokenizers, ``{name: hex}``.
      metrics: the metrics given to `Checkpointer.save`.
      version: version of diffmm that wrote it.
    """

    state: Any
    step: int
    config: dict[str, Any] | None
    fingerprints: dict[str, str]
    metrics: dict[str, Any]
    version: str


class Checkpointer:
    """Saves and restores training runs in one folder.

    Nothing is touched on disk before the first `save`, so a reader may look at the
    folder of a run in progress.
    """

    def __init__(
        self,
        directory: os.PathLike[str] | str,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str = "loss",
        best_mode: str = "min",
        asynchronous: bool = True,
    ):
        """Describes the folder.

        Args:
          directory: local path or ``gs://`` address.
          keep_last: number of newest checkpoints to keep.
          keep_best: number of best ones to keep besides.
          best_metric: which of the metrics given to `save` ranks them.
          best_mode: ``"min"`` or ``"max"``.
          asynchronous: return from `save` once the arrays are copied, and write in
            the background; errors then surface in the next call, or in `wait`.

        Raises:
          ValueError: if a number of checkpoints or the mode is not allowed.
        """
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                "keep_last must be at least 1 and keep_best at least 0: "
                f"keep_last={keep_last}, keep_best={keep_best}"
            )
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {best_mode!r}")
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self._best = (best_metric, best_mode)
        self._store = Store(
            self.directory,
            KeepLastAndBest(keep_last, keep_best, self._cost),
            asynchronous,
        )
        self._costs: dict[int, float] = {}

    def _cost(self, step: int) -> float:
        """The best metric of a step, sign turned for ``"max"``; NaN if it has none."""
        if step not in self._costs:
            try:
                self._costs[step] = self._cost_of(self._meta(step)["metrics"])
            except UnreadableCheckpointError:
                self._costs[step] = math.nan
        return self._costs[step]

    def _cost_of(self, metrics: Mapping[str, Any]) -> float:
        name, mode = self._best
        value = metrics.get(name)
        if isinstance(value, str) or value is None or not math.isfinite(value):
            return math.nan
        return value if mode == "min" else -value

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return self._store.steps()

    @property
    def last_saved(self) -> int | None:
        """Newest step this object saved or restored; neither waits nor reads."""
        return self._store.current

    def latest_step(self) -> int | None:
        """The newest step in the folder, or ``None`` in a new run."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best_step(self) -> int | None:
        """The step with the best metric, or ``None`` if none has one."""
        costs = [(self._cost(step), -step) for step in self.steps()]
        finite = [pair for pair in costs if math.isfinite(pair[0])]
        return -min(finite)[1] if finite else None

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        *,
        config: Any = None,
        fingerprints: Mapping[str, str] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Saves one checkpoint; every process of a run must call it.

        Checkpoints later than the one this object restored (a damaged one, or those
        after an explicit older step) are never overwritten: they move to the folder
        ``set_aside``.

        Args:
          step: steps taken so far.
          state: any pytree, typed PRNG keys included.
          data_iterator: grain iterator, or any object with ``get_state`` and
            ``set_state`` (JSON types or bytes).
          config: what JSON can hold, or a dataclass.
          fingerprints: of the tokenizers, ``{name: hex}``.
          metrics: numbers; the one called ``best_metric`` ranks the checkpoint.

        Returns:
          False if this step was saved or restored already, otherwise True.

        Raises:
          ValueError: if the folder holds checkpoints of a run that was not restored,
            a step before the current one is saved, or a value is not JSON.
          CheckpointWriteError: if the disk is full or writing fails, in this save
            or the one before; the earlier checkpoints are intact.
        """
        step = int(step)
        existing = self.steps()  # waits for the save before, and raises if it failed
        current = self._store.current
        if step == current:
            return False
        if current is not None and step < current:
            raise ValueError(
                f"step: {step} is before {current}, the newest step of this run"
            )
        if current is None and existing:
            raise ValueError(
                f"{self.directory} already holds checkpoints (steps {existing}) and "
                "none was restored: restore one, or choose an empty folder"
            )
        metrics = to_jsonable(dict(jax.device_get(dict(metrics or {}))))
        flat = _saved.flatten(state)
        items = {
            "state": ocp.args.StandardSave(flat),
            "config": ocp.args.JsonSave({"config": to_jsonable(config)}),
            "meta": ocp.args.JsonSave(
                {
                    "format": _FORMAT,
                    "version": __version__,
                    "fingerprints": dict(fingerprints or {}),
                    "metrics": metrics,
                    "leaves": _saved.describe(state),
                    "checksums": _saved.checksums(flat),
                }
            ),
        }
        if data_iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(freeze(data_iterator))
        # All costs are known before writing, which decides what to keep.
        self._costs[step] = self._cost_of(metrics)
        for other in existing:
            self._cost(other)
        self._store.write(step, items)
        return True

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointWriteError: if it could not be written.
        """
        self._store.wait()

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        self._store.close()

    def __enter__(self) -> Checkpointer:
        """Returns the checkpointer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes."""
        self.close()

    def restore(
        self,
        state_like: Any,
        data_iterator: Any = None,
        *,
        fingerprints: Mapping[str, str] | None = None,
        config: Any = None,
        must_match: Sequence[str] = ("model",),
        step: int | None = None,
    ) -> Restored:
        """Restores a checkpoint, bit by bit as it was saved.

        Without ``step`` the newest checkpoint is taken; if it is damaged, a warning
        says so and the next older one is tried. A checkpoint of another model or
        tokenizer is an error, never skipped.

        Args:
          state_like: a state of the same structure, arrays or
            ``jax.ShapeDtypeStruct``; arrays are placed by its shardings.
          data_iterator: set to the saved position, in place.
          fingerprints: of the current tokenizers, compared with the saved ones.
          config: the current configuration.
          must_match: keys of ``config`` whose values must be the saved ones.
          step: a certain step.

        Returns:
          A `Restored`.

        Raises:
          FileNotFoundError: if there is no checkpoint (of that step).
          UnreadableCheckpointError: if the one asked for, or every one, is damaged.
          ValueError: if structure, tokenizers or configuration differ.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"no {wanted} in {self.directory}; steps: {steps}")
        candidates = steps[::-1] if step is None else [step]
        for candidate in candidates:
            try:
                restored = self._restore(
                    candidate,
                    state_like,
                    data_iterator,
                    fingerprints,
                    config,
                    must_match,
                )
            except UnreadableCheckpointError as error:
                if candidate == candidates[-1]:
                    raise
                _LOGGER.warning("%s; trying the next older checkpoint", error)
            else:
                self._store.current = candidate
                return restored
        raise AssertionError("unreachable")

    def _restore(
        self,
        step: int,
        like: Any,
        data_iterator: Any,
        fingerprints: Mapping[str, str] | None,
        config: Any,
        must_match: Sequence[str],
    ) -> Restored:
        path = self.directory / str(step)
        meta = self._meta(step)
        saved_config = self._store.read(step, "config", ocp.args.JsonRestore())[
            "config"
        ]
        check_fingerprints(meta["fingerprints"], fingerprints, str(path))
        check_config(saved_config, to_jsonable(config), must_match, str(path))
        _saved.check_structure(meta["leaves"], like, str(path))
        if data_iterator is not None:
            check_data(path)
        flat = self._store.read(
            step, "state", ocp.args.StandardRestore(_saved.restore_targets(like))
        )
        sums = _saved.checksums(flat)
        changed = [
            name for name, value in sums.items() if value != meta["checksums"][name]
        ]
        if changed:
            raise self._store.unreadable(
                step, f"the checksum of {changed[:5]} is wrong"
            )
        if data_iterator is not None:
            target = settable(data_iterator)
            self._store.read(step, "data", grain.checkpoint.CheckpointRestore(target))
        return Restored(
            state=_saved.unflatten(like, flat, meta["leaves"]),
            step=step,
            config=saved_config,
            fingerprints=meta["fingerprints"],
            metrics=meta["metrics"],
            version=meta["version"],
        )

    def _meta(self, step: int) -> dict[str, Any]:
        meta = self._store.read(step, "meta", ocp.args.JsonRestore())
        wanted = {"format", "version", "fingerprints", "metrics", "leaves", "checksums"}
        if not isinstance(meta, dict) or not wanted <= set(meta):
            raise self._store.unreadable(step, "its description is incomplete")
        if meta["format"] > _FORMAT:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} was written by diffmm "
                f"{meta['version']} in a newer format; install that version"
            )
        return meta
