"""From codes to rows of the stream.

A row is a task token and the stretches of its template, ``opening content closing``.
What does not depend on the codes, the *geometry*, is built once per shape and shared
by all rows of that shape and by the canvases for generation, so that training and
inference cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffmm.data.templates import TASK_TOKENS, BadExampleError, template_of
from diffmm.data.templates import TASKS as TASKS
from diffmm.data.vocabulary import (
    CLOSING_NAMES,
    CONTENT,
    OPENING_NAMES,
    JointVocabulary,
    as_modality,
)
from diffmm.typing import Batch, Group, Modality

TEXT, IMAGE, AUDIO = CONTENT
_PAD_MODES = ("ignore", "predict")
_CACHE_LIMIT = 8192  # geometries kept; a run meets far fewer


class Geometry(NamedTuple):
    """Everything of a row that does not depend on its content codes.

    Attributes:
      row: the row with ``pad`` in the content slots; its arrays are read-only.
      content: where the codes of each modality go.
    """

    row: Batch
    content: dict[Modality, slice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Builds rows of one length from codes.

    ``pad_mode="ignore"`` leaves padding outside every segment and every denominator;
    a generation length must then be given. ``"predict"`` makes the closing token of a
    target stretch, and the ``pad`` run after it, maskable targets of the segment, so
    that a model learns length; the run ends at ``stretch_length`` tokens after the
    opening token (content, closing token and run together), or at the end of the row.

    Attributes:
      vocabulary: the joint id space.
      length: L, tokens per row.
      pad_mode: "ignore" or "predict", for all modalities or as a mapping.
      stretch_length: per modality, the length of a predicted stretch in tokens
        (pair rows; in packed text rows the last document takes the rest of the row).
      code_count: per modality, the exact number of codes, where it is fixed.
      modality_weight: per modality, a factor on ``loss_weight`` (default 1). With
        weights other than 1 the loss is not a likelihood bound; metrics still are.

    Raises:
      ValueError: an argument is not one of the values above.
    """

    vocabulary: JointVocabulary
    length: int
    pad_mode: str | Mapping[Any, str] = "ignore"
    stretch_length: Mapping[Any, int] = dataclasses.field(default_factory=dict)
    code_count: Mapping[Any, int] = dataclasses.field(default_factory=dict)
    modality_weight: Mapping[Any, float] = dataclasses.field(default_factory=dict)
    _cache: dict = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Normalises the mappings to `Modality` keys and checks all values."""
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")
        mode = self.pad_mode
        modes = dict.fromkeys(CONTENT, mode) if isinstance(mode, str) else mode
        modes = {TEXT: "ignore", IMAGE: "ignore", AUDIO: "ignore"} | _keyed(modes)
        for value in modes.values():
            if value not in _PAD_MODES:
                raise ValueError(f"pad_mode={value!r} must be one of {_PAD_MODES}")
        object.__setattr__(self, "pad_mode", modes)
        for name in ("stretch_length", "code_count", "modality_weight"):
            object.__setattr__(self, name, _keyed(getattr(self, name)))
        for name in ("stretch_length", "code_count"):
            for key, value in getattr(self, name).items():
                if value < 1:
                    raise ValueError(f"{name}[{key.name}]={value} must be at least 1")
        for key, weight in self.modality_weight.items():
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"modality_weight[{key.name}]={weight} must be finite and >= 0"
                )

    def predicts(self, modality: Modality) -> bool:
        """Whether the length of this modality is learnt (``pad_mode="predict"``)."""
        return self.pad_mode[modality] == "predict"  # type: ignore[index]

    def allowed_table(self) -> np.ndarray:
        """`JointVocabulary.allowed_table` of this layout, bool ``[4, padded_size]``."""
        predicted = [m for m in CONTENT if self.predicts(m)]
        return self.vocabulary.allowed_table(closing=predicted)

    def geometry(
        self,
        task: str,
        counts: tuple[int, ...],
        *,
        stretch: Mapping[Modality, int] | None = None,
    ) -> Geometry:
        """The row of a task before its codes are known; cached.

        Args:
          task: one of `TASKS`.
          counts: content tokens of each stretch of the template.
          stretch: overrides ``stretch_length``.

        Raises:
          BadExampleError: an empty stretch, or more tokens than the row has.
        """
        key = (task, counts, tuple(sorted(stretch.items())) if stretch else ())
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            # Text rows are packed: their documents are not padded one by one.
            known = {} if task == "text" else self.stretch_length
            stretch = {**known, **(stretch or {})}
            found = self._cache[key] = self._geometry(task, counts, stretch)
        return found

    def _geometry(
        self, task: str, counts: tuple[int, ...], stretch: Mapping[Modality, int]
    ) -> Geometry:
        template = template_of(task)
        for (modality, _), n in zip(template, counts, strict=True):
            if n < 1:
                raise BadExampleError(
                    f"task {task!r}: {modality.name.lower()} is empty; at least one "
                    "token is needed"
                )
        row = _blank(self.vocabulary, self.length, task)
        needed = 1 + sum(n + 2 for n in counts)
        what = " and ".join(
            f"{n} {m.name.lower()}" for (m, _), n in zip(template, counts, strict=True)
        )
        row.tokens[0] = self.vocabulary.id(TASK_TOKENS[task])
        content, cursor = {}, 1
        for (modality, target), n in zip(template, counts, strict=True):
            last = modality is template[-1][0]
            predicted = target and self.predicts(modality)
            total = n + 1
            if predicted:
                total = self._stretch(task, modality, n, stretch, last, cursor)
                needed += total - n - 1
            if needed > self.length:
                raise BadExampleError(
                    f"task {task!r} needs {needed} positions for {what} tokens and "
                    f"their boundaries; the row has length={self.length}"
                )
            row.tokens[cursor] = self.vocabulary.id(OPENING_NAMES[modality])
            begin, close = cursor + 1, cursor + 1 + n
            cursor = begin + total
            content[modality] = slice(begin, close)
            row.tokens[close] = self.vocabulary.id(CLOSING_NAMES[modality])
            if not target:
                row.condition[begin:close] = True
                continue
            # Text that ends the row always learns its eos; elsewhere only on demand.
            closes = predicted or (modality is TEXT and last)
            end = cursor if closes else close
            row.modality[begin:end] = modality
            row.maskable[begin:end] = True
            row.loss_weight[begin:end] = self.modality_weight.get(modality, 1.0)
            row.group[begin:close] = modality
            row.group[close:end] = Group.LENGTH
        row.segment_ids[:cursor] = 1
        row.positions[:cursor] = np.arange(cursor)
        for array in row:
            np.asarray(array).flags.writeable = False
        return Geometry(row, content)

    def _stretch(
        self,
        task: str,
        modality: Modality,
        n: int,
        stretch: Mapping[Modality, int],
        last: bool,
        cursor: int,
    ) -> int:
        name = modality.name.lower()
        total = stretch.get(modality)
        if total is None and not last:
            raise ValueError(
                f"stretch_length[{name}] is needed: task {task!r} predicts the length "
                "of a stretch that does not end the row"
            )
        if total is None:
            total = max(self.length - cursor - 1, n + 1)
        if n + 1 > total:
            raise BadExampleError(
                f"task {task!r}: {n} {name} tokens and a closing token need {n + 1} "
                f"positions; the stretch has {total}"
            )
        return total

    def row(self, task: str, *, text: Any = None, codes: Any = None) -> Batch:
        """One training row of a task.

        Args:
          task: one of `TASKS`.
          text: text codes ``[n]``, for every task.
          codes: image or audio codes ``[n]``, for every task but "text".

        Returns:
          A `Batch` without batch axis, fields ``[L]``. All fields but ``tokens`` are
          shared and read-only.

        Raises:
          BadExampleError: the example is empty or too long for the row.
          ValueError: a code outside its span, a wrong number of codes, an argument
            missing or not of this task.
        """
        items = _items(task, text, codes)
        arrays = []
        for modality, item in items:
            if item is None:
                raise ValueError(f"task {task!r} needs {_argument(modality)}")
            arrays.append(self.encode(modality, item))
        geometry = self.geometry(task, tuple(len(a) for a in arrays))
        tokens = geometry.row.tokens.copy()
        for (modality, _), array in zip(items, arrays, strict=True):
            tokens[geometry.content[modality]] = array
        return geometry.row._replace(tokens=tokens)

    def encode(self, modality: Modality, codes: Any) -> np.ndarray:
        """Checked ids int32 ``[n]`` of the codes of one stretch."""
        ids = self.vocabulary.encode(modality, codes)
        name = modality.name.lower()
        if ids.ndim != 1:
            raise ValueError(f"{name} codes: shape {ids.shape} given, one axis needed")
        count = self.code_count.get(modality)
        if count is not None and len(ids) != count:
            raise ValueError(
                f"{name} codes: {len(ids)} given, code_count[{name}]={count} needed"
            )
        return ids

    def text_row(
        self, documents: Sequence[Any], *, closed: Sequence[bool] | None = None
    ) -> Batch:
        """A packed text row: one segment ``task_text bos tokens eos`` per document.

        With ``pad_mode="predict"`` the rest of the row belongs to the last document,
        if that one is closed.

        Args:
          documents: text codes ``[n_d]`` of the documents or their pieces.
          closed: whether each piece ends its document and thus ends in ``eos``; all
            do by default. Only such a piece may be empty.

        Returns:
          A `Batch` without batch axis, fields ``[L]``.

        Raises:
          BadExampleError: nothing given, or more tokens than the row has.
          ValueError: a code outside the text span.
        """
        closed = [True] * len(documents) if closed is None else list(closed)
        if len(closed) != len(documents):
            raise ValueError(
                f"closed has {len(closed)} entries for {len(documents)} documents"
            )
        if not len(documents):
            raise BadExampleError("documents is empty; at least one is needed")
        vocabulary = self.vocabulary
        head = np.array([vocabulary.id("task_text"), vocabulary.id("bos")], np.int32)
        tail = np.array([vocabulary.id("eos")], np.int32)
        pieces: list[np.ndarray] = []
        sizes: list[int] = []
        for document, ends_here in zip(documents, closed, strict=True):
            ids = vocabulary.encode(TEXT, document)
            if not ends_here and not len(ids):
                raise BadExampleError("documents: an unclosed piece is empty")
            pieces += [head, ids, tail] if ends_here else [head, ids]
            sizes.append(len(ids) + 2 + bool(ends_here))
        used = sum(sizes)
        if used > self.length:
            raise BadExampleError(
                f"documents need {used} positions with task, bos and eos tokens; the "
                f"row has length={self.length}"
            )
        row = _blank(vocabulary, self.length, "text")
        row.tokens[:used] = np.concatenate(pieces)
        starts = np.cumsum(sizes) - sizes
        closings = (starts + sizes - 1)[np.asarray(closed, bool)]
        end = self.length if self.predicts(TEXT) and closed[-1] else used
        sizes[-1] += end - used
        row.segment_ids[:end] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        row.positions[:end] = np.arange(end) - np.repeat(starts, sizes)
        row.maskable[:end] = row.positions[:end] >= 2
        row.modality[row.maskable] = TEXT
        row.group[row.maskable] = TEXT
        row.group[closings] = Group.LENGTH
        row.group[used:end] = Group.LENGTH
        row.loss_weight[row.maskable] = self.modality_weight.get(TEXT, 1.0)
        return row


def _items(task: str, text: Any, codes: Any) -> list[tuple[Modality, Any]]:
    template = template_of(task)
    if codes is not None and len(template) == 1:
        raise ValueError(f"codes given, but task {task!r} has text only")
    return [(m, text if m is TEXT else codes) for m, _ in template]


def _argument(modality: Modality) -> str:
    return "text" if modality is TEXT else "codes"


def _keyed(mapping: Mapping[Any, Any]) -> dict[Modality, Any]:
    return {as_modality(key): value for key, value in mapping.items()}


def _blank(vocabulary: JointVocabulary, length: int, task: str) -> Batch:
    return Batch(
        tokens=np.full(length, vocabulary.pad_id, np.int32),
        positions=np.zeros(length, np.int32),
        segment_ids=np.zeros(length, np.int32),
        modality=np.full(length, Modality.NONE, np.int8),
        maskable=np.zeros(length, bool),
        condition=np.zeros(length, bool),
        loss_weight=np.zeros(length, np.float32),
        group=np.full(length, Group.NONE, np.int8),
        task=np.asarray(TASKS.index(task), np.int8),
    )
