"""Directories of safetensors files: named tensors, read slice by slice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: Stored dtypes that can be read as weights.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """What the header of a file says about a tensor.

    Attributes:
      shape: as stored.
      dtype: as safetensors spells it, such as ``"BF16"``.
    """

    shape: tuple[int, ...]
    dtype: str


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "checkpoints of other libraries need safetensors: "
            'pip install "diffmm[pretrained]"'
        ) from error
    return safetensors


class TensorFiles:
    """The tensors of a directory; only headers are read until somebody asks for more.

    Files are those of ``model.safetensors.index.json`` if there is one, else
    ``model.safetensors``, else every ``*.safetensors``.

    Attributes:
      stored: shape and dtype of every tensor by name.

    Raises:
      ValueError: no such files, files of the index that are missing, files that are cut
        short or no safetensors, or a tensor in two files.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the headers of all files of the directory ``path``."""
        self._directory = Path(path)
        self._file_of: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name in self.stored:
                    raise ValueError(f"{path}: tensor {name!r} is in two files")
                tensor = handle.get_slice(name)
                self._file_of[name] = handle
                self.stored[name] = Stored(
                    tuple(tensor.get_shape()), tensor.get_dtype()
                )

    def _files(self) -> list[Path]:
        index = self._directory / INDEX_NAME
        if index.exists():
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(entries.values()))
            absent = [name for name in names if not (self._directory / name).exists()]
            if absent:
                raise ValueError(
                    f"{self._directory}: {INDEX_NAME} names files that are not there: "
                    f"{', '.join(absent)}; download them again"
                )
            return [self._directory / name for name in names]
        single = self._directory / SINGLE_NAME
        files = [single] if single.exists() else []
        files = files or sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self._directory}: no *.safetensors files (other formats, such as "
                "pytorch_model.bin, are not read)"
            )
        return files

    @staticmethod
    def _open(file: Path) -> Any:
        library = _safetensors()
        try:
            return library.safe_open(file, framework="np")
        except (library.SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: no whole safetensors file ({error}); a download that stopped "
                "early, or a Git LFS pointer, looks like this"
            ) from error

    def read(self, name: str, index: Sequence[tuple[int, int]]) -> np.ndarray:
        """One block of a tensor, from disk.

        Args:
          name: of the tensor.
          index: start and stop along each axis.

        Returns:
          The block in the stored dtype.
        """
        blocks = tuple(slice(start, stop) for start, stop in index)
        return self._file_of[name].get_slice(name)[blocks]


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    item_bytes: int,
    max_shard_bytes: int,
) -> None:
    """Writes tensors, and an index if they need several files.

    Args:
      path: a directory.
      tensors: shape of each tensor, and a function that makes it; it is called when
        its file is written, so that one file is in memory at a time.
      item_bytes: bytes per number.
      max_shard_bytes: a file is not larger unless it holds a single tensor.
    """
    sizes = {
        name: item_bytes * math.prod(shape) for name, (shape, _) in tensors.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    save = _safetensors().numpy.save_file
    count = len(shards)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_NAME
        if count > 1:
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
        values = {name: np.ascontiguousarray(tensors[name][1]()) for name in names}
        save(values, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (path / INDEX_NAME).write_text(text, encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def compare(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    *,
    ignore: Iterable[str] = (),
) -> list[str]:
    """Everything in which a checkpoint is not what its configuration says.

    Args:
      expected: shape of every tensor that must be there.
      stored: what is there.
      ignore: names that may be there as well.

    Returns:
      One line for each kind of difference, which names all tensors concerned.
    """
    spare = set(stored) - set(expected) - set(ignore)
    both = [name for name in expected if name in stored]
    kinds = {
        "missing": [name for name in expected if name not in stored],
        "extra": sorted(spare),
        "misshapen": [
            f"{name} {list(stored[name].shape)} instead of {list(expected[name])}"
            for name in both
            if stored[name].shape != tuple(expected[name])
        ],
        f"of a dtype other than {'/'.join(FLOAT_DTYPES)}": [
            f"{name} {stored[name].dtype}"
            for name in both
            if stored[name].dtype not in FLOAT_DTYPES
        ],
    }
    return [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in kinds.items()
        if names
    ]
