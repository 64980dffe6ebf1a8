"""The card beside a checkpoint: what was tuned, at which size, by which rule.

It is a JSON file that a person can read and edit:

    {"version": 1,
     "width": 256, "depth": 8, "batch": 131072, "tokens": 1600000000.0,
     "rule": "CompletedP", "options": {"alpha": 1.0},
     "hyper": {"learning_rate": 0.003, "b1": 0.9},
     "per_module": {"type": {"embed": {"learning_rate": 4.0}},
                    "depth": {"learning_rate": [1.2, 0.8]}, "interpolation": "log"}}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffmm.parameterisation.per_module import PerModule

CARD_VERSION = 1

#: What a value of ``options`` and ``hyper`` may be.
Value = bool | int | float | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Hyper-parameters with all that is needed to carry them to another size.

    Attributes:
      width: of the base model.
      depth: residual layers of the base model.
      batch: of the base run, in the same unit as ``tokens``.
      tokens: training tokens (or samples) of the base run.
      rule: name of the parameterisation, ``"CompletedP"`` for example.
      options: its options, by name.
      hyper: global hyper-parameters tuned at the base size, by name
        (`dataclasses.asdict` of `diffmm.optim.AdamW` for example).
      per_module: factors by module and layer.

    Example:
      >>> card = Card(width=256, depth=8, batch=2**17, tokens=1.6e9,
      ...             hyper={"learning_rate": 3e-3})
      >>> Card.from_json(card.to_json()) == card
      True
    """

    width: float
    depth: float
    batch: float
    tokens: float
    rule: str = "CompletedP"
    options: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    hyper: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    per_module: PerModule = dataclasses.field(default_factory=PerModule)

    def __post_init__(self) -> None:
        """Checks every field; scalars of NumPy become Python's."""
        for name in ("width", "depth", "batch", "tokens"):
            value = _value(name, getattr(self, name))
            if not isinstance(value, int | float) or value is True or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
            object.__setattr__(self, name, value)
        if not isinstance(self.rule, str) or not self.rule:
            raise ValueError(f"rule must be the name of a rule, got {self.rule!r}")
        for name in ("options", "hyper"):
            mapping = getattr(self, name)
            if not isinstance(mapping, Mapping) or not all(
                isinstance(key, str) for key in mapping
            ):
                raise ValueError(f"{name} must be a mapping by name, got {mapping!r}")
            plain = {key: _value(f"{name}[{key!r}]", v) for key, v in mapping.items()}
            object.__setattr__(self, name, plain)
        if not isinstance(self.per_module, PerModule):
            raise ValueError(
                f"per_module must be a PerModule, got {type(self.per_module).__name__}"
            )

    def to_json(self) -> str:
        """Text of the card; the same card gives the same text."""
        fields = {"version": CARD_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The card that `to_json` wrote; exact, floats included.

        Raises:
          ValueError: text that is not JSON, another version, or a field that is
            missing, unknown or malformed; names the field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"card: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"card: must be a JSON object, got {data!r:.40}")
        version = data.pop("version", None)
        if version != CARD_VERSION:
            raise ValueError(f"card: version must be {CARD_VERSION}, got {version!r}")
        _check_fields("card", data, cls)
        per_module = data["per_module"]
        if not isinstance(per_module, dict):
            raise ValueError(f"card: per_module must be an object, got {per_module!r}")
        _check_fields("card: per_module", per_module, PerModule)
        try:
            data["per_module"] = PerModule(**per_module)
        except ValueError as error:
            raise ValueError(f"card: per_module: {error}") from None
        try:
            return cls(**data)
        except ValueError as error:
            raise ValueError(f"card: {error}") from None

    def save(self, path: os.PathLike[str] | str) -> None:
        """Writes the card; a reader sees the old file or the new, never a part."""
        path = pathlib.Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: os.PathLike[str] | str) -> Card:
        """Reads what `save` wrote.

        Raises:
          ValueError: as `from_json`, with the path; or a file that is no text.
          OSError: no such file, or it cannot be read.
        """
        try:
            return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # also UnicodeDecodeError
            raise ValueError(f"{os.fspath(path)}: {error}") from None


def _value(where: str, value: Any) -> Value:
    """A JSON scalar, exactly; NumPy's scalars as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        with contextlib.suppress(TypeError):
            value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(
        f"{where} must be a finite number, a string, a bool or None, got {value!r}"
    )


def _check_fields(where: str, data: Mapping[str, Any], cls: type) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    missing, unknown = sorted(names - set(data)), sorted(set(data) - names)
    if missing or unknown:
        raise ValueError(f"{where}: fields missing {missing}, unknown {unknown}")
