"""Canvases for generation, built from the geometry of the training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from diffmm.data.layout import RowLayout
from diffmm.data.templates import template_of
from diffmm.data.vocabulary import CLOSING_NAMES, JointVocabulary, as_modality
from diffmm.typing import Batch, Canvas, Modality

Row = TypeVar("Row", Batch, Canvas)


def canvas(
    layout: RowLayout,
    task: str,
    *,
    text: Any = None,
    codes: Any = None,
    target_length: int | Mapping[Any, int] | None = None,
) -> Canvas:
    """A row to complete, with the geometry of the training row of the task.

    With ``pad_mode="ignore"``, ``target_length`` counts content tokens (a closing
    token comes on top); it may be left out where ``layout.code_count`` fixes it. With
    ``"predict"`` it is the length of the whole stretch (content, closing token and
    padding); left out, it is the one of training.

    Args:
      layout: the layout that built the training rows.
      task: one of `diffmm.data.layout.TASKS`.
      text: text codes ``[n]``: the condition of t2i and t2a, the prompt that a "text"
        canvas continues.
      codes: image or audio codes ``[n]``, the condition of i2t and a2t.
      target_length: tokens to generate; joint tasks take a mapping by modality.

    Returns:
      A `Canvas` without batch axis: ``mask_id`` wherever ``generate`` is True.

    Raises:
      ValueError: the condition is missing or is what the task generates, a length is
        missing or below 1, or the canvas needs more than ``layout.length`` tokens.
    """
    given = {"text": text, "codes": codes}
    counts: list[int] = []
    stretch: dict[Modality, int] = {}
    kept: dict[Modality, np.ndarray] = {}
    for modality, target in template_of(task):
        name = "text" if modality is Modality.TEXT else "codes"
        item = given.pop(name)
        if not target:
            if item is None:
                raise ValueError(f"task {task!r} needs the condition {name}")
            kept[modality] = layout.encode(modality, item)
            counts.append(len(kept[modality]))
            continue
        prompt = 0
        if item is not None:
            if task != "text":
                raise ValueError(
                    f"{name}: task {task!r} generates it; use infill to keep a part"
                )
            kept[modality] = layout.encode(modality, item)
            prompt = len(kept[modality])
        length = _target_length(layout, modality, target_length)
        if not layout.predicts(modality):
            counts.append(prompt + length)
            continue
        # Content, closing token and padding are generated alike: the split between
        # them, which the count would set, does not show in a canvas.
        counts.append(max(prompt, 1))
        if length:
            stretch[modality] = prompt + length
    for name, item in given.items():
        if item is not None:
            raise ValueError(f"{name} given, but task {task!r} has no place for it")
    geometry = layout.geometry(task, tuple(counts), stretch=stretch)
    row = geometry.row
    generate, condition = row.maskable.copy(), row.condition.copy()
    tokens = np.where(generate, np.int32(layout.vocabulary.mask_id), row.tokens)
    for modality, ids in kept.items():
        begin = geometry.content[modality].start
        tokens[begin : begin + len(ids)] = ids
        generate[begin : begin + len(ids)] = False
        condition[begin : begin + len(ids)] = True
    return Canvas(
        tokens, row.positions, row.segment_ids, row.modality, generate, condition
    )


def _target_length(layout: RowLayout, modality: Modality, target_length: Any) -> int:
    """The requested length; 0 stands for the stretch length of training."""
    name = modality.name.lower()
    length = target_length
    if isinstance(target_length, Mapping):
        length = {as_modality(k): v for k, v in target_length.items()}.get(modality)
    predicted = layout.predicts(modality)
    fixed = None if predicted else layout.code_count.get(modality)
    if length is None and predicted:
        return 0
    if length is None and fixed is None:
        raise ValueError(
            f'target_length of {name} is needed where its pad_mode is "ignore"'
        )
    if length is None:
        length = fixed
    if isinstance(length, bool) or int(length) != length or length < 1:
        raise ValueError(f"target_length={length} of {name} must be an integer >= 1")
    if fixed is not None and length != fixed:
        raise ValueError(
            f"target_length={length} of {name} differs from code_count[{name}]={fixed}"
        )
    return int(length)


def infill(
    row: Batch,
    generate: np.ndarray | tuple[int, int],
    *,
    mask_id: int,
) -> Canvas:
    """A canvas that keeps a row except for some of its maskable positions.

    Args:
      row: a row without batch axis, for example from ``layout.row``.
      generate: bool ``[L]``, the positions to generate; or a span ``(start, stop)``
        counted over the maskable positions of the row in order.
      mask_id: the absorbing symbol.

    Returns:
      A `Canvas` without batch axis.

    Raises:
      ValueError: nothing to generate, a span outside the row, or a position that is
        not maskable.
    """
    maskable = np.asarray(row.maskable)
    if isinstance(generate, tuple):
        start, stop = generate
        places = np.flatnonzero(maskable)
        if not 0 <= start < stop <= len(places):
            raise ValueError(
                f"generate=({start}, {stop}) must lie in [0, {len(places)}], the "
                "maskable positions of the row, and not be empty"
            )
        generate = np.zeros(maskable.shape, bool)
        generate[places[start:stop]] = True
    generate = np.asarray(generate)
    if generate.dtype != bool or generate.shape != maskable.shape:
        raise ValueError(
            f"generate: {generate.dtype}{list(generate.shape)} given, "
            f"bool{list(maskable.shape)} needed"
        )
    if not generate.any():
        raise ValueError("generate selects no position")
    if (generate & ~maskable).any():
        where = int(np.flatnonzero(generate & ~maskable)[0])
        raise ValueError(f"generate[{where}] is True, but the row fixes that position")
    return Canvas(
        np.where(generate, np.int32(mask_id), row.tokens),
        row.positions,
        row.segment_ids,
        row.modality,
        generate,
        row.condition,
    )


def read_target(
    tokens: np.ndarray,
    canvas: Canvas,
    vocabulary: JointVocabulary,
    *,
    modality: Modality | str | None = None,
) -> np.ndarray:
    """The generated codes of a completed canvas, up to the closing token or padding.

    Args:
      tokens: int32 ``[L]``, a completed row.
      canvas: the row's canvas, without batch axis.
      vocabulary: the joint id space.
      modality: which modality to read, needed if the canvas generates two.

    Returns:
      int32 codes ``[n]``, for the decoder of the modality's tokenizer. A prompt that
      the canvas kept is not part of it.

    Raises:
      ValueError: the modality is missing or not generated here, or a token is no
        content (a mask left over, an id of another modality).
    """
    generate, kinds = np.asarray(canvas.generate), np.asarray(canvas.modality)
    tokens = np.asarray(tokens)
    if tokens.shape != generate.shape or generate.ndim != 1:
        raise ValueError(
            f"tokens: shape {tokens.shape} given, one row as in the canvas needed, "
            f"{generate.shape}"
        )
    present = [Modality(int(m)) for m in np.unique(kinds[generate])]
    if modality is None and len(present) != 1:
        names = [m.name.lower() for m in present]
        raise ValueError(f"modality must be one of {names}, which the canvas generates")
    chosen = present[0] if modality is None else as_modality(modality)
    if chosen not in present:
        raise ValueError(f"modality={modality!r} is not generated by the canvas")
    ids = tokens[generate & (kinds == chosen)]
    ends = [vocabulary.pad_id]
    if CLOSING_NAMES[chosen] in vocabulary.specials:
        ends.append(vocabulary.id(CLOSING_NAMES[chosen]))
    stops = np.flatnonzero(np.isin(ids, ends))
    return vocabulary.decode(chosen, ids[: stops[0]] if len(stops) else ids)


def stack(rows: Sequence[Row]) -> Row:
    """Joins rows ``[L]`` into a `Batch` or `Canvas` of fields ``[B, L]``.

    Raises:
      ValueError: no rows, or rows of different kinds or lengths.
    """
    if not rows:
        raise ValueError("rows is empty; at least one row is needed")
    kinds = {type(row) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"rows mixes {sorted(k.__name__ for k in kinds)}")
    lengths = {np.shape(row.tokens) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"rows have different shapes {sorted(lengths)}")
    return type(rows[0])(*(np.array(field) for field in zip(*rows, strict=True)))
