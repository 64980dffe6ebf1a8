"""Checks of the fields of rules, on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    above_low: bool = False,
) -> float:
    """Raises ``ValueError`` unless a field is one number in a range.

    Args:
      name: of the field.
      value: what came; a number or an array of shape ``[]``.
      low: smallest allowed value.
      high: largest allowed value; infinity is allowed where it is infinite.
      above_low: ``low`` itself is not allowed.

    Returns:
      The number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    fits = low < number <= high if above_low else low <= number <= high
    if not fits:
        least = f"above {low:g}" if above_low else f"at least {low:g}"
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number {least}{most}, got {value!r}")
    return number


def check_integer(name: str, value: Any, *, low: int) -> int:
    """Raises ``ValueError`` unless a field is an integer of at least ``low``."""
    number = check_number(name, value, low=low)
    if not number.is_integer():
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return int(number)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ``ValueError`` unless a field is one of the names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_score(score: Any, vocabulary_size: int) -> None:
    """Raises ``ValueError`` unless the field is a score that fits the vocabulary."""
    if not callable(score) or not hasattr(score, "needs_drawn"):
        raise ValueError(f"score must be a score such as MaxProb(), got {score!r}")
    if hasattr(score, "check"):
        score.check(vocabulary_size)


def check_options(what: str, kind: type, options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` unless a dataclass takes exactly these options.

    Args:
      what: its name, for the message.
      kind: the dataclass.
      options: by name; those without a default must be there.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        takes = f"takes {sorted(fields)}" if fields else "takes no options"
        raise ValueError(f"{what} has no option {unknown[0]!r}; it {takes}")
    missing = [
        name
        for name, field in fields.items()
        if name not in options
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{what} needs the option {missing[0]!r}")
