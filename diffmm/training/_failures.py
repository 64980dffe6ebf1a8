"""What can go wrong with a checkpoint, in one sentence each."""

from __future__ import annotations

import contextlib
import errno
import gc
import sys
from collections.abc import Iterator


class UnreadableCheckpointError(ValueError):
    """A checkpoint is damaged; the message names its path and the older steps."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the earlier ones are intact."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def error_number(error: BaseException) -> int:
    """The ``errno`` behind an exception, ``EIO`` if there is none."""
    for link in _chain(error):
        number = getattr(link, "errno", None)
        if isinstance(number, int):
            return number
        # The array writer reports a full disk as text only.
        if "ENOSPC" in str(link) or "No space left" in str(link):
            return errno.ENOSPC
        if "EDQUOT" in str(link) or "quota exceeded" in str(link):
            return errno.EDQUOT
    return errno.EIO


def reason(error: BaseException) -> str:
    """A short description of a cause."""
    number = error_number(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what the reader's threads print when one of them fails.

    The first failure is raised as usual; the other threads of the same read would
    each print a traceback of their own.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
