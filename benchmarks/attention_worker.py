"""A process that measures, and the process that asks it to.

A kernel that hangs, crashes or breaks the CUDA context ends its worker alone: the
asking side notes the failure, starts another worker and goes on. Requests and replies
are lines of JSON; whatever libraries print goes to a log.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from diffmm_kernels.sigmoid_attention.specs import Spec

# After these a CUDA context answers nothing any more.
_BROKEN = re.compile(
    r"illegal|misaligned|CUDA_ERROR|CUDA error|launch fail|device-side assert", re.I
)


# A side that does not serve a case says so with one of these.
_REFUSALS = ("NotImplementedError", "ModuleNotFoundError")


def spec_of(fields: Mapping[str, Any]) -> Spec:
    """The case with these fields; JSON has made lists of its tuples."""
    return Spec(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )


def serve(handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until the asking process ends; never returns before.

    Args:
      handlers: by the name of what is asked; they take keywords and return figures.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)  # also while a kernel hangs

    threading.Thread(target=read, daemon=True).start()
    while True:
        request = requests.get()
        print(f"-- {request}", file=sys.stderr, flush=True)
        try:
            figures = handlers[request["task"]](**request["arguments"])
            reply = {"figures": figures}
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            name = type(error).__name__
            reply = {"error": f"{name}: {text}"[:400], "refused": name in _REFUSALS}
        replies.write(json.dumps(reply, default=float) + "\n")
        replies.flush()


class Worker:
    """The asking side."""

    def __init__(
        self, script: pathlib.Path, log: pathlib.Path, environment: Mapping[str, str]
    ) -> None:
        """Starts nothing yet: the process begins when it is first asked.

        Args:
          script: Python file that calls `serve`.
          log: where the process's own output goes.
          environment: variables on top of this process's.
        """
        self._command = [sys.executable, "-u", str(script)]
        self._log = log
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._posted: collections.deque[str] = collections.deque()

    def post(self, task: str, **arguments: Any) -> None:
        """Sends a request; `wait` returns the replies in order."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._posted.append(task)
        with contextlib.suppress(OSError):  # a dead process is seen by `wait`
            line = json.dumps({"task": task, "arguments": arguments})
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def wait(self, timeout: float) -> dict[str, Any]:
        """The reply to the oldest request: ``{"figures": …}`` or ``{"error": …}``."""
        task = self._posted.popleft()
        started = time.monotonic()
        try:
            line = self._replies.get(timeout=max(timeout, 0.1))
        except queue.Empty:
            self.close()
            seconds = time.monotonic() - started
            return {"error": f"no answer to {task!r} within {seconds:.0f} s: ended"}
        if line is None:
            code = self._process.wait() if self._process else None
            self.close()
            return {"error": f"the process ended with code {code} during {task!r}"}
        reply: dict[str, Any] = json.loads(line)
        if _BROKEN.search(reply.get("error", "")):
            self.close()
        return reply

    def ask(self, task: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """`post` and `wait`."""
        self.post(task, **arguments)
        return self.wait(timeout)

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._posted.clear()
        self._replies = queue.SimpleQueue()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        replies = self._replies

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                replies.put(line)
            replies.put(None)

        threading.Thread(target=read, daemon=True).start()
        self._process = process
