"""Metrics on disk (JSON lines, TensorBoard) and progress on the terminal."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np

from diffmm.training.results import to_jsonable, write_atomically


def flatten_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Joins nested names with ``/``: ``{"a": {"b": 1}}`` to ``{"a/b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten_metrics(value, f"{full}/"))
        else:
            flat[full] = value
    return flat


def read_metrics(path: pathlib.Path | str) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    records = []
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsWriter:
    """Appends one record per call to ``metrics.jsonl`` and to TensorBoard events.

    Every record reaches the file before `write` returns. A resumed run passes the
    step it resumes from: records beyond it, which the run will write again, are
    dropped, so that no step appears twice.

    Only process 0 writes. TensorBoard events need the package ``tensorboardX``;
    without it only the JSON lines are written.
    """

    def __init__(
        self,
        directory: pathlib.Path | str,
        *,
        start_step: int | None = None,
        tensorboard: bool = True,
    ):
        """Opens the files.

        Args:
          directory: folder, made if missing.
          start_step: keep only earlier records up to and with this step: the
            restored step, or 0 in a new run; ``None`` keeps all.
          tensorboard: also write events, where ``tensorboardX`` is installed.
        """
        self._file: IO[str] | None = None
        self._events: Any = None
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            records = read_metrics(self.path)
            kept = [
                record
                for record in records
                if start_step is None or record["step"] <= start_step
            ]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            if text != self.path.read_text(encoding="utf-8"):
                write_atomically(self.path, text)
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                return
            purge = None if start_step is None else start_step + 1
            self._events = SummaryWriter(str(directory), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a record.

        Args:
          step: number of the step.
          metrics: numbers, arrays and nested mappings of them. Values that are not
            finite are written as strings, see `to_jsonable`.

        Raises:
          ValueError: if the writer is closed or a value is not a number.
        """
        if jax.process_index() != 0:
            return
        if self._file is None:
            raise ValueError(f"metrics writer of {self.path} is closed")
        flat = flatten_metrics(jax.device_get(dict(metrics)))
        record = {"step": int(step), **to_jsonable(flat)}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in flat.items():
                if not isinstance(value, str) and np.ndim(value) == 0:
                    self._events.add_scalar(name, float(value), int(step))
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsWriter:
        """Returns the writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the files."""
        self.close()


def format_duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    >>> format_duration(3725)
    '1:02:05'
    """
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_rate(per_second: float) -> str:
    """Tokens per second with a unit.

    >>> format_rate(12345.0)
    '12.3k tokens/s'
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= scale:
            return f"{per_second / scale:.1f}{unit} tokens/s"
    return f"{per_second:.0f} tokens/s"


class Progress:
    """Says how far a run is: one line that rewrites itself, or plain lines in a log.

    On a terminal::

        [#####...............]  250/1000  text 2.310  image 4.021  81.2k tokens/s  1:05 left

    Anywhere else the same line without the bar, every ``every_seconds`` and at the
    end. Values are fetched from the device only when a line is due.
    """  # noqa: E501

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        every_seconds: float = 10.0,
        every_steps: int | None = None,
        stream: IO[str] | None = None,
        width: int = 20,
    ):
        """Prepares, without printing.

        Args:
          total_steps: last step of the run.
          start_step: step a resumed run starts from; rates count from here.
          every_seconds: least time between plain lines (0.2 s on a terminal).
          every_steps: also print a plain line at every multiple of this.
          stream: standard error by default.
          width: characters of the bar.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1: {total_steps}")
        self._total = total_steps
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._every_seconds = 0.2 if self._terminal else every_seconds
        self._every_steps = every_steps
        self._width = width
        self._printed = -math.inf
        self._shown = 0
        self._silent = jax.process_index() != 0
        # A window, so that compilation and pauses leave the rate after a while.
        self._window: collections.deque[tuple[float, int, float]] = collections.deque(
            [(time.monotonic(), start_step, 0.0)], maxlen=64
        )

    def update(
        self, step: int, metrics: Mapping[str, Any] | None = None, tokens: float = 0
    ) -> None:
        """Reports a finished step.

        Args:
          step: number of steps finished.
          metrics: values to show, for example the loss of each modality.
          tokens: tokens of the steps since the last call, for the rate.
        """
        now = time.monotonic()
        self._window.append((now, step, self._window[-1][2] + tokens))
        last = step >= self._total
        due = now - self._printed >= self._every_seconds or (
            self._every_steps is not None
            and not self._terminal
            and step % self._every_steps == 0
        )
        if self._silent or not (due or last):
            return
        self._printed = now
        self._write(self._line(step, metrics or {}), newline=last or not self._terminal)

    def _line(self, step: int, metrics: Mapping[str, Any]) -> str:
        (start, first_step, first_tokens) = self._window[0]
        (end, last_step, tokens) = self._window[-1]
        elapsed = max(end - start, 1e-9)
        rate = (last_step - first_step) / elapsed
        left = (self._total - step) / rate if rate > 0 else math.inf
        parts = []
        if self._terminal:
            filled = min(self._width, self._width * step // self._total)
            parts.append(f"[{'#' * filled}{'.' * (self._width - filled)}]")
        parts.append(f"{step:>{len(str(self._total))}}/{self._total}")
        for name, value in flatten_metrics(jax.device_get(dict(metrics))).items():
            parts.append(f"{name} {float(value):.4g}")
        if tokens > first_tokens:
            parts.append(format_rate((tokens - first_tokens) / elapsed))
        parts.append(f"{format_duration(left)} left")
        return "  ".join(parts)

    def _write(self, line: str, newline: bool) -> None:
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._shown))
            self._shown = 0 if newline else len(line)
        else:
            self._stream.write(line)
        if newline:
            self._stream.write("\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends an unfinished terminal line."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = 0

    def __enter__(self) -> Progress:
        """Returns the reporter."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends an unfinished terminal line."""
        self.close()
