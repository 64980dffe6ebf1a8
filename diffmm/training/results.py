"""The number an example or benchmark ends with, and where it was measured."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from diffmm.version import __version__


def to_jsonable(value: Any) -> Any:
    """Converts to what strict JSON can hold.

    Arrays become numbers or lists, dataclasses and named tuples dictionaries, paths
    strings, dtypes their names; a float that is not finite becomes ``"nan"``,
    ``"inf"`` or ``"-inf"``, which ``float()`` reads back.

    >>> to_jsonable({"loss": np.float32(0.5), "bound": float("nan")})
    {'loss': 0.5, 'bound': 'nan'}

    Raises:
      ValueError: for any other type.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        value = float(value)
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind not in "biu":
            array = array.astype(np.float64)
        return to_jsonable(array.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.dtype | type) or hasattr(value, "dtype"):
        with contextlib.suppress(TypeError):
            return np.dtype(value).name
    raise ValueError(
        f"cannot be written as JSON: {value!r} of type {type(value).__name__}; allowed "
        "are numbers, strings, arrays, mappings, sequences and dataclasses of these"
    )


def write_atomically(path: os.PathLike[str] | str, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: versions, devices, machine, date."""
    devices = jax.devices()
    return {
        "diffmm": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_result(
    workdir: os.PathLike[str] | str,
    name: str,
    figures: Mapping[str, Any],
    expected: Mapping[str, Any],
    ok: bool,
    *,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes ``workdir/result.json`` and prints the same as one last line.

    Args:
      workdir: folder, made if missing.
      name: of the example or benchmark.
      figures: what was measured, by name.
      expected: what it is compared with, by the same names where they exist.
      ok: whether the figures meet the expectation.
      environment: of the run; `environment` by default.

    Returns:
      The dictionary that was written.

    Raises:
      ValueError: if a value cannot be written as JSON.
    """
    result = to_jsonable(
        {
            "name": name,
            "figures": figures,
            "expected": expected,
            "ok": bool(ok),
            "environment": _environment() if environment is None else environment,
        }
    )
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n"
    )
    print(json.dumps(result, allow_nan=False), flush=True)
    return result


_environment = environment  # `write_result` has an argument of the same name
