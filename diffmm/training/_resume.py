"""Checks that a checkpoint belongs to the run that asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
from etils import epath


class FrozenIterator:
    """The state an iterator had, in the form that the handler of grain writes."""

    def __init__(self, state: bytes):
        """Keeps the state."""
        self._state = state

    def get_state(self) -> bytes:
        """The state as bytes."""
        return self._state


class SettableIterator:
    """Lets the handler of grain set any object with ``get_state``/``set_state``."""

    def __init__(self, iterator: Any):
        """Wraps an iterator."""
        self._iterator = iterator

    def set_state(self, state: bytes) -> None:
        """Goes to a state."""
        loaded = json.loads(state)
        if isinstance(loaded, dict) and set(loaded) == {_BYTES}:
            loaded = bytes.fromhex(loaded[_BYTES])
        self._iterator.set_state(loaded)

    def start_prefetch(self) -> None:
        """Part of the interface of grain."""
        start = getattr(self._iterator, "start_prefetch", None)
        if start is not None:
            start()


_BYTES = "bytes"


def freeze(iterator: Any) -> FrozenIterator:
    """Takes the state of an iterator now, before anything is written."""
    _check_iterator(iterator)
    state = iterator.get_state()
    if isinstance(state, bytes):
        state = {_BYTES: state.hex()}
    return FrozenIterator(json.dumps(state, indent=4).encode())


def settable(iterator: Any) -> Any:
    """Any iterator with a state, as the handler of grain expects it."""
    _check_iterator(iterator)
    if isinstance(iterator, grain.DatasetIterator):
        return iterator
    return SettableIterator(iterator)


def _check_iterator(iterator: Any) -> None:
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise ValueError(
            "data_iterator needs get_state() and set_state(), as grain iterators have; "
            f"got {type(iterator).__name__}"
        )


def check_fingerprints(
    saved: Mapping[str, str], current: Mapping[str, str] | None, path: str
) -> None:
    """Raises a ValueError that names the tokenizer that changed."""
    for name in sorted(set(saved) | set(current)) if current is not None else ():
        if saved.get(name) != (current or {}).get(name):
            raise ValueError(
                f"fingerprints: tokenizer {name!r} differs from that of {path}: saved "
                f"{saved.get(name)}, current {(current or {}).get(name)}; its codes "
                "would not mean the same"
            )


def check_config(saved: Any, current: Any, keys: Sequence[str], path: str) -> None:
    """Raises a ValueError that names the values that changed."""
    if not isinstance(saved, Mapping) or not isinstance(current, Mapping):
        return
    for key in keys:
        before, now = saved.get(key), current.get(key)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
            shown = ", ".join(
                f"{n}: saved {before.get(n)!r}, current {now.get(n)!r}" for n in names
            )
        else:
            shown = f"saved {before!r}, current {now!r}"
        raise ValueError(f"config: {key!r} differs from that of {path}: {shown}")


def check_data(path: epath.Path) -> None:
    """Raises a ValueError unless the iterator position of these processes is there."""
    names = [file.name for file in (path / "data").glob("process_*")]
    if not names:
        raise ValueError(
            f"data_iterator: checkpoint {path} was saved without a data iterator"
        )
    count = jax.process_count()
    if not any(name.endswith(f"-of-{count}.json") for name in names):
        raise ValueError(
            f"data_iterator: checkpoint {path} was saved by another number of "
            f"processes ({sorted(names)}) than the current {count}"
        )
