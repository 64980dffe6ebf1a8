"""Host-side checks of a batch, outside traced code."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffmm.data.templates import TASKS
from diffmm.data.vocabulary import CLOSING_NAMES, CONTENT, JointVocabulary
from diffmm.typing import Batch, Group, Modality

_KINDS = {
    "tokens": "i",
    "positions": "i",
    "segment_ids": "i",
    "modality": "i",
    "maskable": "b",
    "condition": "b",
    "loss_weight": "f",
    "group": "i",
    "task": "i",
}


def validate_batch(batch: Batch, vocabulary: JointVocabulary) -> None:
    """Checks that a batch is what the losses and models assume.

    Shapes and kinds of all fields; ids inside the vocabulary and without the mask;
    maskable ids legal for their modality and group; padding neither maskable nor
    condition; positions counting from 0 in each segment; finite loss weights.

    Args:
      batch: fields ``[B, L]``, NumPy or JAX arrays.
      vocabulary: the joint id space of the tokens.

    Raises:
      ValueError: names the field, the place, the value found and what is allowed.
    """
    fields = {name: np.asarray(value) for name, value in batch._asdict().items()}
    shape = fields["tokens"].shape
    if len(shape) != 2:
        raise ValueError(f"tokens: shape {shape} given, [B, L] needed")
    for name, array in fields.items():
        needed: tuple[int, ...] = shape[:1] if name == "task" else shape
        if array.shape != needed:
            raise ValueError(f"{name}: shape {array.shape} given, {needed} needed")
        if array.dtype.kind != _KINDS[name]:
            kind = {"i": "signed integer", "b": "bool", "f": "float"}[_KINDS[name]]
            raise ValueError(f"{name}: dtype {array.dtype} given, {kind} needed")
    tokens, maskable = fields["tokens"], fields["maskable"]
    modality, group = fields["modality"], fields["group"]
    segments, positions = fields["segment_ids"], fields["positions"]

    _all(
        (tokens >= 0) & (tokens < vocabulary.size),
        "tokens",
        tokens,
        f"ids in [0, {vocabulary.size})",
    )
    _all(
        tokens != vocabulary.mask_id,
        "tokens",
        tokens,
        "clean data, which never holds the mask id",
    )
    _range("modality", modality, len(Modality))
    _range("group", group, len(Group))
    _range("task", fields["task"], len(TASKS))
    _all(segments >= 0, "segment_ids", segments, "values >= 0")

    _all(
        ~maskable | (modality != Modality.NONE),
        "modality",
        modality,
        "text, image or audio where maskable",
    )
    allowed = vocabulary.allowed_table(closing=_with_closing(vocabulary))
    legal = allowed[modality, tokens] | ~maskable
    if not legal.all():
        place = _first(~legal)
        kind = Modality(int(modality[place])).name.lower()
        offset, size = vocabulary.span(kind)
        raise ValueError(
            f"tokens{list(place)}={tokens[place]} is not an id of its modality {kind}: "
            f"[{offset}, {offset + size}), closing tokens and pad are allowed"
        )
    ends = np.array(
        [vocabulary.pad_id]
        + [vocabulary.id(n) for n in CLOSING_NAMES.values() if n in vocabulary.specials]
    )
    wanted = np.where(np.isin(tokens, ends), np.int64(Group.LENGTH), modality)
    wanted = np.where(maskable, wanted, np.int64(Group.NONE))
    _all(
        group == wanted,
        "group",
        group,
        "LENGTH for maskable closing tokens and padding, else the modality where "
        "maskable, else NONE",
    )
    condition = fields["condition"]
    _all(~(maskable & condition), "condition", condition, "False where maskable")
    outside = segments == 0
    _all(~(outside & maskable), "maskable", maskable, "False where segment_ids is 0")
    _all(~(outside & condition), "condition", condition, "False where segment_ids is 0")
    starts = np.ones(shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    before = np.zeros_like(positions)
    before[:, 1:] = positions[:, :-1] + 1
    _all(
        outside | (positions == np.where(starts, 0, before)),
        "positions",
        positions,
        "0, 1, 2, ... in each segment",
    )
    weight = fields["loss_weight"]
    _all(np.isfinite(weight) & (weight >= 0), "loss_weight", weight, "finite, >= 0")


def _with_closing(vocabulary: JointVocabulary) -> list[Modality]:
    return [m for m in CONTENT if CLOSING_NAMES[m] in vocabulary.specials]


def _range(name: str, array: np.ndarray, count: int) -> None:
    _all((array >= 0) & (array < count), name, array, f"values in [0, {count})")


def _all(holds: np.ndarray, name: str, array: np.ndarray, allowed: str) -> None:
    if not holds.all():
        place = _first(~holds)
        raise ValueError(f"{name}{list(place)}={array[place]}; allowed: {allowed}")


def _first(bad: np.ndarray) -> tuple[Any, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])
