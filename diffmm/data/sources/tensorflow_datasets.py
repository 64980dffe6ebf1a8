"""Data sets of the `tensorflow_datasets` catalogue, without TensorFlow where it can.

Random access needs the array_record (or parquet) file format, in which
`tfds_source` prepares what it downloads. Data sets with audio features, and those with
images until they are prepared, need TensorFlow itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from diffmm.data.sources.example import Example
from diffmm.data.waveforms import check_sample_rate


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which features of a data set make an `Example`.

    A feature inside another is named with a slash, ``captions/text``.

    Attributes:
      texts: features with text; a feature that is a list gives alternatives.
      image: feature with the picture.
      audio: feature with the waveform; integers are taken as 16-bit samples.
      sample_rate: of the audio, Hz; data sets do not say.
      label: feature with the class.
      templates: further texts, made of the name of the class: ``"a photo of a {}"``.
      group: feature with what splits must not share, such as the speaker.
    """

    texts: tuple[str, ...] = ()
    image: str | None = None
    audio: str | None = None
    sample_rate: int | None = None
    label: str | None = None
    templates: tuple[str, ...] = ()
    group: str | None = None

    def __post_init__(self) -> None:
        """Checks that the fields fit together."""
        if not (self.texts or self.image or self.audio or self.label):
            raise ValueError("fields must name at least one feature")
        if (self.audio is None) != (self.sample_rate is None):
            raise ValueError("fields: audio and sample_rate must be given together")
        if self.sample_rate is not None:
            check_sample_rate(self.sample_rate)
        if self.templates and self.label is None:
            raise ValueError("fields: templates need a label")
        if not all("{}" in template for template in self.templates):
            raise ValueError(
                f"fields: templates must contain '{{}}', got {self.templates}"
            )


_DIGIT = ("a handwritten {}", "the digit {}")
KNOWN_FIELDS: Mapping[str, Fields] = {
    "mnist": Fields(image="image", label="label", templates=_DIGIT),
    "fashion_mnist": Fields(
        image="image", label="label", templates=("a picture of a {}",)
    ),
    "cifar10": Fields(image="image", label="label", templates=("a photo of a {}",)),
    "spoken_digit": Fields(
        audio="audio", sample_rate=8_000, label="label", templates=("{}",)
    ),
    "speech_commands": Fields(
        audio="audio", sample_rate=16_000, label="label", templates=("{}",)
    ),
    "ljspeech": Fields(texts=("text_normalized",), audio="speech", sample_rate=22_050),
    "librispeech": Fields(
        texts=("text",), audio="speech", sample_rate=16_000, group="speaker_id"
    ),
    "libritts": Fields(
        texts=("text_normalized",),
        audio="speech",
        sample_rate=24_000,
        group="speaker_id",
    ),
    "coco_captions": Fields(texts=("captions/text",), image="image", group="image/id"),
    "lm1b": Fields(texts=("text",)),
    "tiny_shakespeare": Fields(texts=("text",)),
    "ag_news_subset": Fields(texts=("description",), label="label"),
}


class TfdsSource(Sequence[Example]):
    """A tfds data source as examples; made by `tfds_source`.

    Args:
      name: for messages.
      data: random access to dictionaries of features.
      fields: which features make an example.
      label_names: names of the classes, if the data set has them.
    """

    def __init__(
        self,
        name: str,
        data: Sequence[Mapping[str, Any]],
        fields: Fields,
        label_names: Sequence[str] | None = None,
    ) -> None:
        """See the class."""
        self.name = name
        self.fields = fields
        self.label_names = label_names
        self._data = data

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """Reads one example.

        Raises:
          ValueError: a feature that ``fields`` names is missing.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # Not every data source of tfds checks the range itself.
        return self._example(self._data[range(len(self))[index]])

    def _example(self, features: Mapping[str, Any]) -> Example:
        fields = self.fields
        texts = [
            text for name in fields.texts for text in _texts(self._get(features, name))
        ]
        label: str | int | None = None
        if fields.label is not None:
            label = self._label(self._get(features, fields.label))
            texts += [
                template.replace("{}", str(label)) for template in fields.templates
            ]
        audio = None
        if fields.audio is not None:
            audio = _waveform(self._get(features, fields.audio))
        group = None if fields.group is None else self._get(features, fields.group)
        return Example(
            texts=tuple(texts),
            image=None if fields.image is None else self._get(features, fields.image),
            audio=audio,
            sample_rate=fields.sample_rate,
            label=label,
            group=None if group is None else _text(group),
        )

    def _label(self, value: Any) -> str | int:
        if isinstance(value, (bytes, str)):
            return _text(value)
        number = int(value)
        if self.label_names is not None and 0 <= number < len(self.label_names):
            return self.label_names[number]
        return number

    def _get(self, features: Mapping[str, Any], name: str) -> Any:
        # Some data sets have a slash in a feature's own name.
        if name in features:
            return features[name]
        value: Any = features
        for part in name.split("/"):
            if isinstance(value, (list, tuple)):
                value = [item[part] for item in value]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                raise ValueError(
                    f"fields: {self.name} has no feature {name!r}, "
                    f"found {sorted(features)}"
                )
        return value


def tfds_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    fields: Fields | None = None,
    download: bool = True,
) -> TfdsSource:
    """Opens a split of a data set of the catalogue, or of a prepared folder.

    Args:
      name: ``"mnist"``, ``"librispeech"``, ``"my_data/config:1.0.0"``, or the path of a
        folder in which a data set was prepared (it holds ``dataset_info.json``).
      split: as in tfds: ``"train"``, ``"test"``, ``"train[:80%]"``, …
      data_dir: where data sets are kept; None for tfds's own place.
      fields: which features make an example; None for those of `KNOWN_FIELDS`.
      download: whether to download and prepare what is not there yet.

    Returns:
      The source; features are decoded when asked for.

    Raises:
      ValueError: unknown name or split, no ``fields``, or not prepared.
      ImportError: tfds is missing, or this data set needs TensorFlow.
    """
    directory = Path(name) if (Path(name) / "dataset_info.json").is_file() else None
    if directory is not None and fields is None:
        raise ValueError(f"fields must be given for the data set in {name!r}")
    if fields is None:
        base = name.split("/")[0].split(":")[0]
        if base not in KNOWN_FIELDS:
            raise ValueError(
                f"name: the features of {name!r} are not known here, only those of "
                f"{sorted(KNOWN_FIELDS)}; give fields=Fields(...) for any other"
            )
        fields = KNOWN_FIELDS[base]
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            'tfds_source needs tensorflow-datasets: pip install "diffmm[tfds]"'
        ) from error
    try:
        builder = _builder(tfds, name, directory, data_dir, download)
        data = _open(builder, name, split)
    except ImportError as error:
        raise _missing_library(name, error) from error
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"name: tfds has no data set {name!r}") from error
    names = getattr(_feature(builder.info.features, fields.label), "names", None)
    return TfdsSource(f"{name}/{split}", data, fields, names)


def _builder(
    tfds: Any,
    name: str,
    directory: Path | None,
    data_dir: str | os.PathLike[str] | None,
    download: bool,
) -> Any:
    if directory is not None:
        return tfds.builder_from_directory(directory)
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.is_prepared():
        if not download:
            raise ValueError(
                f"name: {name!r} is not prepared in {builder.data_dir}; use "
                "download=True, or give the data_dir that holds it"
            )
        builder.download_and_prepare()
    return builder


def _open(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"name: {name!r} is prepared in a format without random access; prepare "
            "it again with file_format='array_record', or give another data_dir"
        ) from error
    except ValueError as error:
        splits = sorted(builder.info.splits)
        raise ValueError(
            f"split: {name!r} has no split {split!r}, only {splits} and slices of them"
        ) from error


def _missing_library(name: str, error: ImportError) -> ImportError:
    missing = (error.name or "").split(".")[0]
    if missing in ("", "tensorflow"):
        return ImportError(
            f"{name!r} cannot be opened or prepared without TensorFlow: "
            'pip install "diffmm[tensorflow]"'
        )
    return ImportError(
        f"{name!r} needs the library {missing!r}: pip install {missing}, "
        'and "diffmm[tfds]" if that is incomplete'
    )


def _feature(features: Any, name: str | None) -> Any:
    if name is None:
        return None
    for part in [name] if name in features else name.split("/"):
        if part not in features:
            return None
        features = features[part]
    return features


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0:
        return [_text(item) for item in value]
    return [_text(value)]


def _waveform(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if np.issubdtype(array.dtype, np.integer):
        # Decoders of 16-bit files widen to int64 without scaling.
        return array.astype(np.float32) / 32768
    return array.astype(np.float32)
