"""Captioned images, captioned speech and prose as the five tasks of one stream.

`TrimodalData` is what a tri-modal run needs: one joint vocabulary, one row length, the
row sources of every split and the encoded examples to score against; `tokenise` builds
it from any three sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffmm.data.canvases import canvas, stack
from diffmm.data.joined import JoinedRows
from diffmm.data.layout import RowLayout
from diffmm.data.rows import PairRows, RowSource, TextRows
from diffmm.data.sources.encode import encode_source
from diffmm.data.sources.example import Source
from diffmm.data.vocabulary import JointVocabulary
from diffmm.typing import Canvas, Tokenizer

SPLITS = ("train", "validation", "test")
MODALITIES = ("text", "image", "audio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Captioned codes of one modality and one split.

    Attributes:
      captions: per example, its alternative captions as strings.
      text: the same as text codes.
      codes: int32 ``[N, n]``.
      labels: per example, its class (the caption where a source has no classes).
      skipped: examples left out because they could not be read.
    """

    captions: list[tuple[str, ...]]
    text: list[list[np.ndarray]]
    codes: np.ndarray
    labels: list[str]
    skipped: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimodalData:
    """Everything that a tri-modal run reads.

    Attributes:
      vocabulary: the joint id space.
      tokenizers: of "text", "image" and "audio".
      length: L of every row.
      pairs: per split, the `Pairs` of "image" and "audio".
      documents: per split, text codes of every document.
    """

    vocabulary: JointVocabulary
    tokenizers: Mapping[str, Tokenizer]
    length: int
    pairs: Mapping[str, Mapping[str, Pairs]]
    documents: Mapping[str, Sequence[np.ndarray]]

    def layout(self, modality: str, *, length: int | None = None) -> RowLayout:
        """The layout of text rows, or of the pairs of a modality.

        In pairs, text is followed by predicted padding up to the longest caption, so
        that a model learns where a caption ends and a canvas does not tell it.

        Args:
          modality: "text", "image" or "audio".
          length: row length, the data's own by default.
        """
        length = length or self.length
        if modality == "text":
            return RowLayout(vocabulary=self.vocabulary, length=length)
        longest = max(_longest(split[modality]) for split in self.pairs.values())
        return RowLayout(
            vocabulary=self.vocabulary,
            length=length,
            pad_mode={"text": "predict"},
            stretch_length={"text": longest + 1},
            code_count={modality: self.pairs["train"][modality].codes.shape[1]},
        )

    def rows(self, split: str) -> dict[str, RowSource]:
        """Row sources of the tasks text, t2i, i2t, t2a and a2t.

        Pairs that fill at most half a row share it, each in its own segment.
        """
        sources: dict[str, RowSource] = {
            "text": TextRows(self.layout("text"), self.documents[split])
        }
        for modality, tasks in (("image", ("t2i", "i2t")), ("audio", ("t2a", "a2t"))):
            layout, pairs = self.layout(modality), self.pairs[split][modality]
            per_row = self.length // _pair_length(self.pairs, modality)
            for task in tasks:
                rows = PairRows(layout, task, text=pairs.text, codes=list(pairs.codes))
                sources[task] = JoinedRows(
                    rows,
                    per_row=per_row,
                    length=self.length,
                    pad_id=self.vocabulary.pad_id,
                )
        return sources

    def canvases(self, task: str, conditions: Sequence[np.ndarray]) -> Canvas:
        """A batch of canvases for a task, as short as the task allows.

        Args:
          task: "t2i", "i2t", "t2a" or "a2t".
          conditions: text codes, or image or audio codes, one array each.
        """
        modality = "image" if "i" in task else "audio"
        layout = self.layout(modality, length=_pair_length(self.pairs, modality))
        if task.startswith("t"):
            return stack([canvas(layout, task, text=item) for item in conditions])
        return stack([canvas(layout, task, codes=item) for item in conditions])

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the tokenizers, to be saved in checkpoints."""
        return {name: t.fingerprint for name, t in self.tokenizers.items()}


def tokenise(
    sources: Mapping[str, Mapping[str, Source]],
    tokenizers: Mapping[str, Tokenizer],
) -> TrimodalData:
    """Encodes three sources into one stream.

    Args:
      sources: for "text", "image" and "audio", a source per split of `SPLITS`
        (text needs no test split).
      tokenizers: for the same names.

    Returns:
      The encoded data; unreadable examples are left out and counted.

    Raises:
      ValueError: a modality or a split is missing, or a split ends up empty.
    """
    for name in MODALITIES:
        for mapping, what in ((sources, "sources"), (tokenizers, "tokenizers")):
            if name not in mapping:
                raise ValueError(f"{what} lacks {name!r}, got {sorted(mapping)}")
        needed = SPLITS[:2] if name == "text" else SPLITS
        missing = [split for split in needed if split not in sources[name]]
        if missing:
            raise ValueError(f"sources[{name!r}] lacks the splits {missing}")
    text = tokenizers["text"]
    pairs = {
        split: {
            name: _encode_pairs(sources[name][split], text, **{name: tokenizers[name]})
            for name in ("image", "audio")
        }
        for split in SPLITS
    }
    documents = {
        split: [
            codes
            for item in encode_source(sources["text"][split], text=text).text
            for codes in item
        ]
        for split in sources["text"]
    }
    text_size, image_size, audio_size = (
        tokenizers[n].vocabulary_size for n in MODALITIES
    )
    return TrimodalData(
        vocabulary=JointVocabulary(text=text_size, image=image_size, audio=audio_size),
        tokenizers=tokenizers,
        length=max(_pair_length(pairs, name) for name in ("image", "audio")),
        pairs=pairs,
        documents=documents,
    )


def _encode_pairs(source: Source, text: Tokenizer, **tokenizer: Any) -> Pairs:
    encoded = encode_source(source, text=text, **tokenizer)
    examples = [source[int(index)] for index in encoded.indices]
    return Pairs(
        captions=[example.texts for example in examples],
        text=encoded.text,
        codes=np.stack(encoded.codes or []),
        labels=[str(e.texts[0] if e.label is None else e.label) for e in examples],
        skipped=len(encoded.skipped),
    )


def _longest(pairs: Pairs) -> int:
    return max(len(caption) for item in pairs.text for caption in item)


def _pair_length(pairs: Mapping[str, Mapping[str, Pairs]], modality: str) -> int:
    """Positions of the longest pair: task, codes and caption, two brackets each."""
    longest = max(_longest(split[modality]) for split in pairs.values())
    return 1 + (pairs["train"][modality].codes.shape[1] + 2) + (longest + 2)
