"""Sources by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from diffmm.data.sources.digits import digits_source
from diffmm.data.sources.example import Source
from diffmm.data.sources.folder import folder_source, ljspeech_source
from diffmm.data.sources.prose import prose_source
from diffmm.data.sources.speech import speech_source
from diffmm.data.sources.tensorflow_datasets import tfds_source

SOURCE_NAMES = (
    "digits",
    "speech",
    "prose",
    "folder:PATH",
    "ljspeech:PATH",
    "tfds:NAME",
)
# Splits of a tfds data set that has none of its own names for them.
_TFDS_SPLITS = {
    "train": "train[:90%]",
    "validation": "train[90%:95%]",
    "test": "train[95%:]",
}


def source_by_name(name: str, split: str, *, image_size: int | None = None) -> Source:
    """A source from what a user writes on the command line.

    Args:
      name: one of `SOURCE_NAMES`; a folder is split by the hash of its file names, a
        tfds data set by slices of its training split.
      split: "train", "validation" or "test".
      image_size: folder images are resized to this many pixels a side, grey.

    Raises:
      ValueError: unknown name (the message lists the known ones).
    """
    kind, _, rest = name.partition(":")
    plain: dict[str, Callable[[str], Source]] = {
        "digits": digits_source,
        "speech": speech_source,
        "prose": prose_source,
    }
    if kind in plain and not rest:
        return plain[kind](split)
    if kind == "folder" and rest:
        return folder_source(rest, split=split, greyscale=True, image_size=image_size)
    if kind == "ljspeech" and rest:
        return ljspeech_source(rest, split=split)
    if kind == "tfds" and rest:
        return tfds_source(rest, _TFDS_SPLITS[split])
    raise ValueError(f"source {name!r} must be one of {SOURCE_NAMES}")


def limited(source: Source, limit: int) -> Source:
    """The first ``limit`` examples of a source; all of them for 0."""
    return source if not limit else source[: min(limit, len(source))]  # type: ignore[index, return-value]
