"""A folder of pictures or recordings with a manifest.

The manifest is a ``metadata.csv`` or ``metadata.jsonl`` as of Hugging Face's
`imagefolder` and `audiofolder`, or the ``metadata.csv`` of LJSpeech.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from diffmm.data.sources.example import (
    BadFileError,
    Example,
    check_split,
    hash_split,
)
from diffmm.data.sources.manifest import (
    Record,
    check_folder,
    find_manifest,
    inside_folder,
    read_manifest,
    read_text,
)
from diffmm.data.sources.media import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    read_audio,
    read_image,
)
from diffmm.data.waveforms import check_sample_rate

TEXT_COLUMNS = ("text", "caption", "transcription", "sentence")


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderSource(Sequence[Example]):
    """Examples read from files when asked for; made by `folder_source`.

    Attributes:
      folder: where the files are.
      records: lines of the manifest.
      image_size: (height, width) of pictures, or None for the files' own.
      greyscale: pictures with one channel.
      sample_rate: of waveforms, Hz, or None for the files' own.
    """

    folder: Path
    records: tuple[Record, ...]
    image_size: tuple[int, int] | None = None
    greyscale: bool = False
    sample_rate: int | None = None

    def __len__(self) -> int:
        """Number of lines of the manifest."""
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """Reads one example.

        Raises:
          BadFileError: its file is missing, unreadable, silent or without text.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._read(self.records[index])

    def by_name(self, file_name: str) -> Example:
        """Reads the example of a file.

        Args:
          file_name: as in the manifest.

        Raises:
          BadFileError: the file cannot be used.
          ValueError: no such file in the manifest.
        """
        for record in self.records:
            if file_name in record.files:
                return self._read(record)
        raise ValueError(f"file_name: the manifest has no file {file_name!r}")

    def _read(self, record: Record) -> Example:
        image: np.ndarray | None = None
        audio: np.ndarray | None = None
        rate: int | None = None
        if not record.texts:
            raise BadFileError(record.files[0], "the manifest has no text for it")
        for file in record.files:
            path = self.folder / file
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                image = read_image(path, self.image_size, self.greyscale)
            elif suffix in AUDIO_SUFFIXES:
                audio, rate = read_audio(path, self.sample_rate)
            else:
                known = sorted(IMAGE_SUFFIXES | AUDIO_SUFFIXES)
                raise BadFileError(str(path), f"suffix {suffix!r} is none of {known}")
        return Example(
            texts=record.texts,
            image=image,
            audio=audio,
            sample_rate=rate,
            label=record.label,
            group=record.group,
        )


def folder_source(
    folder: str | os.PathLike[str],
    *,
    manifest: str | None = None,
    file_columns: Sequence[str] = ("file_name",),
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    greyscale: bool = False,
    sample_rate: int | None = None,
    split: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> FolderSource:
    """A folder with ``metadata.csv`` or ``metadata.jsonl``.

    Args:
      folder: where the manifest and the files are.
      manifest: its file name; None looks for ``metadata.csv``, ``metadata.jsonl``.
      file_columns: columns with file names, relative to the folder. With two columns
        an example may have both a picture and a recording.
      text_columns: columns with alternative texts (in JSON lines a value may be a
        list); None takes the first of `TEXT_COLUMNS` that exists.
      label_column: column with the class.
      group_column: column with what splits must not share, such as the speaker.
      image_size: height and width of pictures; one number for a square.
      greyscale: pictures with one channel.
      sample_rate: resample recordings to this, Hz.
      split: keep only this part, ``"train"``, ``"validation"`` or ``"test"``, dealt
        by `hash_split` of the group (of the file where there is no group).
      validation: fraction of groups in the validation part.
      test: fraction of groups in the test part.

    Returns:
      The source; files are read, and found bad, when asked for.

    Raises:
      ValueError: no folder, manifest or column; a malformed line; a file name that
        leaves the folder; no line in the split.
    """
    root = check_folder(folder)
    path = find_manifest(root, manifest)
    rows = read_manifest(path)
    if not file_columns:
        raise ValueError("file_columns must name at least one column")
    columns = sorted({column for _, row in rows for column in row})
    if text_columns is None:
        text_columns = [c for c in TEXT_COLUMNS if c in columns][:1]
        if not text_columns:
            raise ValueError(
                f"{path}: none of the columns {TEXT_COLUMNS} exists, found {columns}; "
                "give text_columns=" + _ljspeech_hint(root, columns)
            )
    optional = [c for c in (label_column, group_column) if c is not None]
    missing = [c for c in (*file_columns, *text_columns, *optional) if c not in columns]
    if missing:
        raise ValueError(
            f"{path}: no column {missing}, found {columns}"
            + _ljspeech_hint(root, columns)
        )
    records = []
    for line, row in rows:
        files = tuple(
            inside_folder(row.get(column), f"{path}, line {line}, {column}")
            for column in file_columns
        )
        texts = [text for column in text_columns for text in _as_list(row.get(column))]
        label = row.get(label_column) if label_column else None
        group = row.get(group_column) if group_column else None
        records.append(
            Record(
                files=files,
                texts=tuple(str(t).strip() for t in texts if t and str(t).strip()),
                label=label,
                group=str(group) if group not in (None, "") else files[0],
            )
        )
    return _make(
        root, records, split, validation, test, image_size, greyscale, sample_rate
    )


def ljspeech_source(
    folder: str | os.PathLike[str],
    *,
    normalised: bool = True,
    sample_rate: int | None = None,
    split: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> FolderSource:
    """A folder laid out as LJSpeech: ``metadata.csv`` and ``wavs/<id>.wav``.

    Lines are ``id|transcription|normalised transcription`` without header or quotes.

    Args:
      folder: where ``metadata.csv`` is.
      normalised: numbers and abbreviations spelt out (the third field).
      sample_rate: resample to this, Hz.
      split: as in `folder_source`; clips are dealt one by one, there is one speaker.
      validation: fraction of clips in the validation part.
      test: fraction of clips in the test part.

    Returns:
      The source.

    Raises:
      ValueError: no folder or manifest; a malformed line.

    References:
      Ito, Johnson, "The LJ Speech dataset" (2017).
    """
    root = check_folder(folder)
    path = find_manifest(root, "metadata.csv")
    records = []
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        fields = [field.strip() for field in text.split("|")]
        if len(fields) not in (2, 3) or not fields[0]:
            raise ValueError(
                f"{path}, line {line}: expected id|text or id|text|normalised text"
            )
        file = inside_folder(f"wavs/{fields[0]}.wav", f"{path}, line {line}")
        chosen = fields[-1] if normalised and fields[-1] else fields[1]
        records.append(Record((file,), (chosen,) if chosen else (), None, file))
    if not records:
        raise ValueError(f"{path}: the manifest has no lines")
    return _make(root, records, split, validation, test, None, False, sample_rate)


def _make(
    root: Path,
    records: Iterable[Record],
    split: str | None,
    validation: float,
    test: float,
    image_size: int | tuple[int, int] | None,
    greyscale: bool,
    sample_rate: int | None,
) -> FolderSource:
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be one or two sizes >= 1, got {image_size}")
    if sample_rate is not None:
        check_sample_rate(sample_rate)
    if split is not None:
        check_split(split, ("train", "validation", "test"))
        records = [
            r
            for r in records
            if hash_split(r.group, validation=validation, test=test) == split
        ]
        if not records:
            raise ValueError(f"split: no line of the manifest falls in {split!r}")
    return FolderSource(
        folder=root,
        records=tuple(records),
        image_size=image_size,
        greyscale=greyscale,
        sample_rate=sample_rate,
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _ljspeech_hint(root: Path, columns: Sequence[str]) -> str:
    if (root / "wavs").is_dir() and any("|" in column for column in columns):
        return "; this looks like LJSpeech: use ljspeech_source"
    return ""
