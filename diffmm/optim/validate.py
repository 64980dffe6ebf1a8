"""Checks of numbers at the public boundary; all raise on the host, before tracing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def number(name: str, value: Any) -> float:
    """Returns ``value`` as a Python float.

    Raises:
      ValueError: it is not a finite real number, or it is traced.
    """
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be a number known before tracing, got {value!r}."
        ) from error
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return result


def positive(name: str, value: Any) -> float:
    """Returns ``value`` as a float above 0, or raises a ValueError."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    return result


def non_negative(name: str, value: Any) -> float:
    """Returns ``value`` as a float of at least 0, or raises a ValueError."""
    result = number(name, value)
    if result < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}.")
    return result


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Returns ``value`` as an int of at least ``least``, or raises a ValueError."""
    result = number(name, value)
    if result != int(result) or result < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {value!r}."
        )
    return int(result)


def probability(name: str, value: Any, *, one: bool = False) -> float:
    """Returns ``value`` as a float in [0, 1), or in [0, 1] if ``one``."""
    result = number(name, value)
    if not 0 <= result <= 1 or (result == 1 and not one):
        interval = "[0, 1]" if one else "[0, 1)"
        raise ValueError(f"{name} must lie in {interval}, got {value!r}.")
    return result


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises a ValueError that lists the allowed strings."""
    allowed = tuple(allowed)
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.")
