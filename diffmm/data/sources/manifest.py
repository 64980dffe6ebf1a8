"""Reading the manifest of a folder: CSV, JSON lines."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

_MANIFESTS = ("metadata.csv", "metadata.jsonl")


class Record(NamedTuple):
    """One line of a manifest.

    Attributes:
      files: paths relative to the folder.
      texts: alternative texts.
      label: class, if the manifest has one.
      group: what splits must not share; the first file where the manifest has none.
    """

    files: tuple[str, ...]
    texts: tuple[str, ...]
    label: str | int | None
    group: str


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path; ValueError if it is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder: {str(root)!r} is not a folder")
    return root


def find_manifest(root: Path, name: str | None) -> Path:
    """The manifest of a folder; ValueError if there is none."""
    names = _MANIFESTS if name is None else (name,)
    for candidate in names:
        if (root / candidate).is_file():
            return root / candidate
    raise ValueError(f"folder: {str(root)!r} has no manifest {' or '.join(names)}")


def read_text(path: Path) -> str:
    """A UTF-8 text file; ValueError if it is not UTF-8."""
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None


def read_manifest(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Lines of a manifest.

    Args:
      path: a ``.jsonl`` file, or a CSV file with a header.

    Returns:
      (line number, column to value) of each line.

    Raises:
      ValueError: malformed line, or no lines.
    """
    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    if not rows:
        raise ValueError(f"{path}: the manifest has no lines")
    return rows


def _read_csv(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(read_text(path).splitlines(keepends=True))
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} "
                "fields expected as in the header"
            )
        yield reader.line_num, row


def _read_jsonl(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: a JSON object is expected")
        yield line, row


def inside_folder(name: Any, where: str) -> str:
    """The file name, if it stays inside the folder (symbolic links are the user's)."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: no file name")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise ValueError(f"{where}: {name!r} leaves the folder")
    return name
