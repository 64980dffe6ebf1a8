"""The folder of checkpoints: one orbax manager, which may fail and be replaced."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffmm.training._failures import (
    CheckpointWriteError,
    UnreadableCheckpointError,
    error_number,
    quiet,
    reason,
)

_LOGGER = logging.getLogger("diffmm")
_SET_ASIDE = "set_aside"
_FOLDERS = 32  # about as many folders and files as the writer makes


class KeepLastAndBest:
    """Preserves the newest steps, and those of lowest cost (NaN: never the best)."""

    def __init__(self, last: int, best: int, cost: Callable[[int], float]):
        """Keeps numbers and the function that gives the cost of a step."""
        self._last, self._best, self._cost = last, best, cost

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """One flag per checkpoint, in the order given."""
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self._last :])
        ranked = [(self._cost(step), -step) for step in steps]
        finite = sorted(pair for pair in ranked if math.isfinite(pair[0]))
        kept.update(-negative for _, negative in finite[: self._best])
        return [step in kept for step in steps]


class Store:
    """Reads and writes items of checkpoints; translates every failure."""

    def __init__(
        self, directory: epath.Path, preservation: KeepLastAndBest, asynchronous: bool
    ):
        """Touches nothing on disk."""
        self.directory = directory
        self._preservation = preservation
        self._asynchronous = asynchronous
        self._manager: ocp.CheckpointManager | None = None
        self._writing = False
        self._pending: int | None = None
        self._before: int | None = None
        # Newest step that was written or restored here; a run goes on from there.
        self.current: int | None = None

    def _open(self, write: bool = False) -> ocp.CheckpointManager:
        """The manager; one that only reads leaves the files of a live writer alone."""
        if self._manager is None or (write and not self._writing):
            self._discard()
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    create=write,
                    cleanup_tmp_directories=write,
                    save_root_metadata=False,
                    lightweight_initialize=True,
                    enable_async_checkpointing=self._asynchronous,
                    preservation_policy=self._preservation,
                ),
            )
            self._writing = write
        return self._manager

    def _discard(self) -> None:
        manager, self._manager, self._writing = self._manager, None, False
        if manager is not None:
            # After a failed save, closing raises the error that was reported already.
            with contextlib.suppress(Exception):
                manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.directory.exists():
            return []
        self.wait()
        manager = self._open()
        manager.reload()
        return sorted(manager.all_steps())

    def read(self, step: int, item: str, args: Any) -> Any:
        """One item of a checkpoint."""
        try:
            with quiet():
                composite = ocp.args.Composite(**{item: args})
                return self._open().restore(step, args=composite)[item]
        except Exception as error:
            raise self.unreadable(step, f"{item}: {reason(error)}") from error

    def unreadable(self, step: int, why: str) -> UnreadableCheckpointError:
        """The error that says what is damaged and what to resume from instead."""
        older = [other for other in self.steps() if other < step]
        advice = (
            f"older checkpoints are at steps {older}: restore one with step=..."
            if older
            else "there is no older checkpoint"
        )
        return UnreadableCheckpointError(
            f"checkpoint {self.directory / str(step)} is damaged ({why}); {advice}"
        )

    def write(self, step: int, items: Mapping[str, Any]) -> None:
        """Writes a checkpoint; those beyond the current step are set aside first."""
        current = self.current
        superseded = [s for s in self.steps() if current is not None and s > current]
        with self._write_errors():
            self._pending, self._before, self.current = step, current, step
            self._probe()
            self._set_aside(superseded)
            self._open(write=True).save(
                step, args=ocp.args.Composite(**items), force=True
            )

    def wait(self) -> None:
        """Blocks until the last save is on disk, and raises if it is not."""
        if self._manager is not None and self._pending is not None:
            with self._write_errors():
                self._manager.wait_until_finished()
            self._pending = None

    def close(self) -> None:
        """Waits and frees the threads."""
        try:
            self.wait()
        finally:
            self._discard()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed, self._pending = self._pending, None
            self.current = self._before
            self._discard()
            steps = [other for other in self.steps() if other != failed]
            raise CheckpointWriteError(
                error_number(error),
                f"could not save the checkpoint of step {failed} in {self.directory}: "
                f"{reason(error)}; the earlier checkpoints (steps {steps}) are intact",
            ) from error

    def _probe(self) -> None:
        """Fails at once where no folder can be made: a full disk, or no permission.

        The writer makes the folders of a checkpoint in the background, and if that
        fails its other threads wait for them until a time-out of minutes.
        """
        if jax.process_index() != 0 or "://" in str(self.directory):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".probe-", dir=str(self.directory), ignore_cleanup_errors=True
        ) as folder:
            for number in range(_FOLDERS):
                os.mkdir(os.path.join(folder, str(number)))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves superseded checkpoints away, so that the run can write their steps."""
        if not steps:
            return
        self._discard()
        if jax.process_index() == 0:
            folder = self.directory / _SET_ASIDE
            folder.mkdir(exist_ok=True)
            for step in steps:
                number = 0
                while (folder / f"{step}-{number}").exists():
                    number += 1
                target = folder / f"{step}-{number}"
                (self.directory / str(step)).rename(target)
                _LOGGER.warning("moved the checkpoint of step %d to %s", step, target)
        ocp.multihost.sync_global_processes("diffmm:set_aside")
