"""One id space for text, image codes, audio codes and special tokens.

The layout follows "The Design Space of Tri-Modal Masked Diffusion Models"
(Bethune et al., arXiv 2602.21472): one vocabulary, one embedding table, one output
head. Nothing may rely on the order of the ranges or on the mask being the last id;
ask the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from diffmm.typing import Modality

SPECIALS = (
    "mask",
    "pad",
    "bos",
    "eos",
    "boi",
    "eoi",
    "boa",
    "eoa",
    "task_text",
    "task_t2i",
    "task_i2t",
    "task_t2a",
    "task_a2t",
)

CONTENT = (Modality.TEXT, Modality.IMAGE, Modality.AUDIO)
OPENING_NAMES = {Modality.TEXT: "bos", Modality.IMAGE: "boi", Modality.AUDIO: "boa"}
CLOSING_NAMES = {Modality.TEXT: "eos", Modality.IMAGE: "eoi", Modality.AUDIO: "eoa"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointVocabulary:
    """A joint id space; ids are ``offset(modality) + code`` or specials.

    By default the ranges follow one another as ``[text | image | audio | specials]``.
    ``offsets`` and ``special_ids`` describe any other arrangement (imported models);
    ids that no range covers must then be declared in ``padding``. Specials other than
    ``mask`` and ``pad`` may lie inside a content range when ``special_ids`` says so,
    as they do in many text tokenizers.

    Attributes:
      text: number of text codes; 0 if there are none.
      image: number of image codes.
      audio: number of audio codes.
      specials: names of the special tokens; must contain ``mask`` and ``pad``.
      pad_to_multiple: ``padded_size`` is rounded up to a multiple of this, for
        sharding; the extra ids are never allowed and never counted.
      offsets: first id of text, image and audio; None puts them one after another.
      special_ids: one id per name of ``specials``; None puts them after the content.
      padding: ``(offset, size)`` ranges of ids that mean nothing.

    Raises:
      ValueError: ranges overlap or leave an undeclared gap, ``mask`` or ``pad`` lie
        inside a content range, ``mask == pad``, repeated special names or ids.

    >>> vocabulary = JointVocabulary(text=256, image=64)
    >>> vocabulary.size, vocabulary.span("image"), vocabulary.mask_id
    (333, (256, 64), 320)
    """

    text: int = 0
    image: int = 0
    audio: int = 0
    specials: tuple[str, ...] = SPECIALS
    pad_to_multiple: int = 1
    offsets: tuple[int, int, int] | None = None
    special_ids: tuple[int, ...] | None = None
    padding: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Checks that the ranges tile the id space."""
        sizes = {"text": self.text, "image": self.image, "audio": self.audio}
        for name, size in sizes.items():
            if size < 0:
                raise ValueError(f"vocab: {name}={size} must be at least 0")
        if self.pad_to_multiple < 1:
            raise ValueError(
                f"vocab: pad_to_multiple={self.pad_to_multiple} must be at least 1"
            )
        specials = tuple(self.specials)
        if len(set(specials)) != len(specials):
            raise ValueError(f"vocab: specials repeats a name: {specials}")
        for name in ("mask", "pad"):
            if name not in specials:
                raise ValueError(f"vocab: specials={specials} lacks {name!r}")
        if self.offsets is not None:
            object.__setattr__(self, "offsets", tuple(int(o) for o in self.offsets))
        if self.special_ids is not None:
            ids = tuple(int(i) for i in self.special_ids)
            object.__setattr__(self, "special_ids", ids)
            if len(ids) != len(specials):
                raise ValueError(
                    f"vocab: special_ids has {len(ids)} ids, {len(specials)} needed"
                )
        object.__setattr__(self, "specials", specials)
        padding = tuple((int(o), int(s)) for o, s in self.padding)
        object.__setattr__(self, "padding", padding)
        self._check()

    @functools.cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        sizes = (self.text, self.image, self.audio)
        offsets = self.offsets or (0, self.text, self.text + self.image)
        return tuple(zip(offsets, sizes, strict=True))

    @functools.cached_property
    def _special_table(self) -> dict[str, int]:
        ids = self.special_ids
        if ids is None:
            first = max(map(sum, self._spans))
            ids = tuple(range(first, first + len(self.specials)))
        return dict(zip(self.specials, ids, strict=True))

    def _check(self) -> None:
        ids = self._special_table
        if ids["mask"] == ids["pad"]:
            raise ValueError(f"vocab: mask_id == pad_id == {ids['mask']}")
        if len(set(ids.values())) != len(ids):
            raise ValueError(f"vocab: special_ids repeats an id: {ids}")
        ranges = [(m.name.lower(), *self.span(m)) for m in CONTENT]
        for name, offset, size in ranges:
            for special in ("mask", "pad"):
                if offset <= ids[special] < offset + size:
                    raise ValueError(
                        f"vocab: {special}_id={ids[special]} lies inside the {name} "
                        f"range [{offset}, {offset + size})"
                    )
        inside = {
            name
            for name, i in ids.items()
            if any(offset <= i < offset + size for _, offset, size in ranges)
        }
        ranges += [(name, i, 1) for name, i in ids.items() if name not in inside]
        ranges += [("padding", offset, size) for offset, size in self.padding]
        end, previous = 0, "the start"
        for name, offset, size in sorted(
            (r for r in ranges if r[2]), key=lambda r: r[1]
        ):
            if offset < end:
                raise ValueError(
                    f"vocab: {name} at [{offset}, {offset + size}) overlaps "
                    f"{previous}, which ends at {end}"
                )
            if offset > end:
                raise ValueError(
                    f"vocab: ids [{end}, {offset}) between {previous} and {name} "
                    "belong to no range; declare them in padding"
                )
            end, previous = offset + size, name

    @functools.cached_property
    def size(self) -> int:
        """V: one past the last id that has a meaning or was declared."""
        ends = [*map(sum, self._spans)]
        ends += [i + 1 for i in self._special_table.values()]
        ends += [offset + size for offset, size in self.padding]
        return max(ends)

    @property
    def padded_size(self) -> int:
        """``size`` rounded up to ``pad_to_multiple``: rows of the embedding table."""
        return -(-self.size // self.pad_to_multiple) * self.pad_to_multiple

    @property
    def num_ids(self) -> int:
        """Ids that mean something; the only ones that may enter a log V."""
        return self.size - sum(size for _, size in self.padding)

    @functools.cached_property
    def mask_id(self) -> int:
        """The absorbing symbol: input only, never a target."""
        return self.id("mask")

    @functools.cached_property
    def pad_id(self) -> int:
        """The padding symbol."""
        return self.id("pad")

    def id(self, name: str) -> int:
        """The id of a special token.

        Raises:
          ValueError: there is no special of that name.
        """
        try:
            return self._special_table[name]
        except KeyError:
            raise ValueError(
                f"name={name!r} is no special token; known: {self.specials}"
            ) from None

    def span(self, modality: Modality | str | int) -> tuple[int, int]:
        """``(offset, size)`` of the ids of a modality (text, image or audio)."""
        return self._spans[as_modality(modality)]

    def encode(self, modality: Modality | str | int, codes: Any) -> np.ndarray:
        """Codes of one tokenizer to joint ids.

        Args:
          modality: text, image or audio.
          codes: integers of any shape, each in ``[0, span size)``.

        Returns:
          int32 ids of the same shape.

        Raises:
          ValueError: a code lies outside the range of its modality.
        """
        offset, size = self.span(modality)
        codes = _integers(modality, "codes", codes)
        # Seen as unsigned, negative codes are huge: one reduction checks both ends.
        if codes.size and codes.view(_UNSIGNED[codes.dtype]).max() >= size:
            where = np.flatnonzero((codes < 0) | (codes >= size))[0]
            raise ValueError(
                f"{as_modality(modality).name.lower()} codes: value "
                f"{codes.flat[where]} at index {where} is outside [0, {size})"
            )
        return (codes + offset).astype(np.int32, copy=False)

    def decode(self, modality: Modality | str | int, ids: Any) -> np.ndarray:
        """Joint ids of one modality back to codes.

        Args:
          modality: text, image or audio.
          ids: integers of any shape, each in the span of the modality.

        Returns:
          int32 codes of the same shape.

        Raises:
          ValueError: an id lies outside the span (specials included).
        """
        modality = as_modality(modality)
        offset, size = self.span(modality)
        ids = _integers(modality, "ids", ids)
        bad = np.flatnonzero((ids < offset) | (ids >= offset + size))
        if bad.size:
            value = int(ids.flat[bad[0]])
            names = [n for n, i in self._special_table.items() if i == value]
            hint = f" (the special token {names[0]!r})" if names else ""
            raise ValueError(
                f"{modality.name.lower()} ids: value {value}{hint} at index {bad[0]} "
                f"is outside [{offset}, {offset + size})"
            )
        return (ids - offset).astype(np.int32, copy=False)

    def allowed_ids(
        self, modality: Modality | str | int, *, closing: bool = False
    ) -> np.ndarray:
        """Which ids can be a target at a position of this modality.

        Text allows its range and ``eos``; image and audio their codes. With
        ``closing`` (length is learnt from predicted padding) also the closing token
        of the modality and ``pad``. ``NONE`` allows everything that has a meaning
        except the mask: such positions are never targets.

        Args:
          modality: a `Modality`, or its name.
          closing: whether the closing token and ``pad`` are targets.

        Returns:
          bool ``[padded_size]``; False at ``mask_id`` and at meaningless ids.
        """
        modality = as_modality(modality, none=True)
        allowed = np.zeros(self.padded_size, bool)
        if modality is Modality.NONE:
            allowed[: self.size] = True
            for offset, size in self.padding:
                allowed[offset : offset + size] = False
            allowed[self.mask_id] = False
            return allowed
        offset, size = self.span(modality)
        allowed[offset : offset + size] = True
        if (closing or modality is Modality.TEXT) and size:
            name = CLOSING_NAMES[modality]
            if closing or name in self._special_table:
                allowed[self.id(name)] = True
        if closing and size:
            allowed[self.pad_id] = True
        return allowed

    def allowed_table(
        self, *, closing: bool | Collection[Modality] = False
    ) -> np.ndarray:
        """`allowed_ids` of every modality.

        Args:
          closing: True, False, or the modalities whose length is predicted.

        Returns:
          bool ``[4, padded_size]``, indexed by `Modality`.
        """
        if isinstance(closing, bool):
            closing = CONTENT if closing else ()
        predicted = {as_modality(m) for m in closing}
        return np.stack([self.allowed_ids(m, closing=m in predicted) for m in Modality])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` inverts it."""
        return {key: _listed(v) for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JointVocabulary:
        """The vocabulary that `to_dict` described."""
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = set(data) - fields
        if unknown:
            raise ValueError(f"vocab: unknown keys {sorted(unknown)}; known: {fields}")
        values: dict[str, Any] = {key: _tupled(value) for key, value in data.items()}
        return cls(**values)


def as_modality(value: Modality | str | int, *, none: bool = False) -> Modality:
    """A `Modality` from itself, its name or its number.

    Args:
      value: for example ``Modality.TEXT``, ``"text"`` or ``0``.
      none: whether ``NONE`` is acceptable.

    Raises:
      ValueError: not a modality.
    """
    if type(value) is Modality and (none or value is not Modality.NONE):
        return value
    try:
        out = Modality[value.upper()] if isinstance(value, str) else Modality(value)
    except (KeyError, ValueError):
        out = Modality.NONE
        none = False
    if out is Modality.NONE and not none:
        raise ValueError(f"modality={value!r} must be one of text, image, audio")
    return out


_UNSIGNED = {np.dtype(np.int32): np.uint32, np.dtype(np.int64): np.uint64}


def _integers(modality: Modality | str | int, what: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.int32 or array.dtype == np.int64:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(
            f"{as_modality(modality).name.lower()} {what}: dtype {array.dtype} given, "
            "integers needed"
        )
    # Offsets need a signed type wide enough for any id (codes may be uint8).
    return array.astype(np.int64)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value


TRIMODAL = JointVocabulary(text=100_277, image=16_384, audio=1_024)
"""cl100k_base text, 16,384 image codes, 1,024 audio codes, 13 specials: 117,698 ids.

Sizes are inferred from public figures, not the authors' configuration.
"""
