"""Stopping well: on a signal, and on a loss that is no longer a number."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np

_LOGGER = logging.getLogger("diffmm")


class GracefulShutdown:
    """Turns SIGTERM and SIGINT into a flag that the training loop reads.

    The first signal sets `requested`; the loop then saves a checkpoint, leaves and
    exits with status 0. A second signal raises: ``KeyboardInterrupt`` for SIGINT,
    ``SystemExit(128 + signal)`` otherwise. Earlier handlers come back on exit.

    Python delivers signals to the main thread only; in any other thread the object
    installs nothing and `request` sets the flag.
    """

    def __init__(
        self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
    ):
        """Chooses the signals; nothing is installed before ``with``."""
        self._signals = signals
        self._previous: dict[signal.Signals, Any] = {}
        self._requested = False

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._requested

    def request(self) -> None:
        """Sets the flag, as a signal would."""
        self._requested = True

    def requested_anywhere(self) -> bool:
        """Whether any process was asked to stop; all processes must call it.

        With several processes the signal arrives at different steps, and a
        checkpoint needs all of them at the same one.
        """
        if jax.process_count() == 1:
            return self._requested
        from jax.experimental import multihost_utils

        flags = multihost_utils.process_allgather(np.asarray(self._requested))
        return bool(np.any(flags))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if self._requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self._requested = True
        _LOGGER.warning("%s: stopping after this step (again to stop at once)", name)

    def __enter__(self) -> GracefulShutdown:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restores the earlier handlers."""
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became NaN or infinite."""


def check_finite(
    metrics: Mapping[str, Any], step: int, last_good: int | None = None
) -> None:
    """Raises when a step met a loss or gradient that is not finite.

    The step itself has not applied the update (see `make_train_step`), so the state
    still holds the last good parameters.

    Args:
      metrics: of the step: ``loss``, ``grad_norm`` and ``nonfinite`` where present.
      step: number of the step, for the message.
      last_good: step of the last saved checkpoint, or ``None``.

    Raises:
      NonFiniteLossError: naming the step, the values and the last good checkpoint.
    """
    values = {
        name: float(metrics[name]) for name in ("loss", "grad_norm") if name in metrics
    }
    if not bool(metrics.get("nonfinite", False)) and np.all(
        np.isfinite(list(values.values()))
    ):
        return
    shown = ", ".join(f"{name}={value}" for name, value in values.items())
    where = (
        f"resume from the checkpoint of step {last_good}"
        if last_good is not None
        else "no checkpoint was saved yet"
    )
    raise NonFiniteLossError(
        f"step {step}: loss or gradient is not finite ({shown}); the update was not "
        f"applied; {where} with a lower learning rate or gradient clipping, or look "
        "at the batch of this step"
    )
