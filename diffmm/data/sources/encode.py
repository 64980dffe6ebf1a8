"""From examples to the codes of which rows are made."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np

from diffmm.data.sources.example import Example, Source
from diffmm.data.templates import BadExampleError
from diffmm.data.waveforms import as_waveform, resample
from diffmm.typing import Tokenizer

_LOG = logging.getLogger("diffmm.data")


class Encoded(NamedTuple):
    """Codes of the usable examples of a source, in its order.

    Attributes:
      text: per example, the codes ``[n]`` of each alternative text; empty lists if no
        text tokenizer was given.
      codes: per example, image or audio codes ``[n]``; None if neither was asked for.
      indices: int64 ``[N]``, which examples of the source these are.
      skipped: (index, reason) of the examples that could not be used.
    """

    text: list[list[np.ndarray]]
    codes: list[np.ndarray] | None
    indices: np.ndarray
    skipped: list[tuple[int, str]]


def encode_source(
    source: Source,
    *,
    text: Tokenizer | None = None,
    image: Tokenizer | None = None,
    audio: Tokenizer | None = None,
    skip_bad: bool = True,
) -> Encoded:
    """Runs tokenizers over a source once, before training.

    Audio is resampled to the ``sample_rate`` of its tokenizer, where it has one.

    Args:
      source: the examples.
      text: tokenizer of the texts.
      image: tokenizer of the images; at most one of ``image`` and ``audio``.
      audio: tokenizer of the waveforms.
      skip_bad: whether an example that a file or tokenizer rejects is skipped, with
        one warning in the log that counts them, or raised.

    Returns:
      The codes, as `PairRows` and `TextRows` take them.

    Raises:
      ValueError: no tokenizer or two of image and audio; no usable example.
      BadExampleError: an unusable example, if not ``skip_bad``; names its index.
    """
    if image is not None and audio is not None:
        raise ValueError("give one of image= and audio=, not both")
    if text is None and image is None and audio is None:
        raise ValueError("no tokenizer given; at least one is needed")
    texts: list[list[np.ndarray]] = []
    codes: list[np.ndarray] = []
    indices: list[int] = []
    skipped: list[tuple[int, str]] = []
    for index in range(len(source)):
        try:
            example = source[index]
            text_codes = [text.encode(t) for t in _texts(example)] if text else []
            item_codes = _encode_item(example, image, audio)
        except ValueError as error:
            if not skip_bad:
                raise BadExampleError(f"example {index}: {error}") from error
            skipped.append((index, str(error)))
            continue
        texts.append(text_codes)
        if item_codes is not None:
            codes.append(item_codes)
        indices.append(index)
    if skipped:
        _LOG.warning(
            "%d of %d examples skipped; the first: example %d (%s)",
            len(skipped),
            len(source),
            *skipped[0],
        )
    if not indices:
        reason = skipped[0][1] if skipped else "it is empty"
        raise ValueError(f"source has no usable example: {reason}")
    given = image is not None or audio is not None
    return Encoded(texts, codes if given else None, np.array(indices), skipped)


def _texts(example: Example) -> tuple[str, ...]:
    if not example.texts:
        raise BadExampleError("the example has no text")
    return example.texts


def _encode_item(
    example: Example, image: Tokenizer | None, audio: Tokenizer | None
) -> np.ndarray | None:
    if image is not None:
        if example.image is None:
            raise BadExampleError("the example has no image")
        return image.encode(example.image)
    if audio is None:
        return None
    if example.audio is None or example.sample_rate is None:
        raise BadExampleError("the example has no audio")
    rate: Any = getattr(audio, "sample_rate", None)
    waveform = as_waveform(example.audio)
    if rate is not None:
        waveform = resample(waveform, example.sample_rate, rate)
    return audio.encode(waveform)
