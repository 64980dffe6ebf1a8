"""What a source yields, what it raises, and how examples are dealt to splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np

from diffmm.data.codes import digest
from diffmm.data.templates import BadExampleError


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One item of a data set, before any tokenizer.

    Attributes:
      texts: alternative descriptions of the same item; a pipeline picks one.
      image: uint8 or float32 in [0, 1], ``[H, W]`` or ``[H, W, C]``.
      audio: float32 ``[T]``, full scale 1.
      sample_rate: of ``audio``, Hz.
      label: class of the item, for judges.
      group: what must not be shared between splits (speaker, document).
    """

    texts: tuple[str, ...] = ()
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate: int | None = None
    label: str | int | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        """Checks that texts is a tuple of str and audio has a rate."""
        if isinstance(self.texts, str) or not all(
            isinstance(text, str) for text in self.texts
        ):
            raise ValueError(f"texts must be a tuple of str, got {self.texts!r}")
        object.__setattr__(self, "texts", tuple(self.texts))
        if (self.audio is None) != (self.sample_rate is None):
            raise ValueError("audio and sample_rate must be given together")


class BadFileError(BadExampleError):
    """A file of a source cannot be used; the message names it.

    A loader skips and counts it, as it does any `BadExampleError`.

    Attributes:
      path: the file.
      reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        """Keeps both, so that the error can be pickled and inspected."""
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """The file, then the reason."""
        return f"{self.path}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """Random access to examples, as grain wants it."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Example number ``index``, from 0."""
        ...


class MemorySource(Sequence[Example]):
    """Examples held in memory.

    Args:
      name: for messages.
      examples: the examples.
    """

    def __init__(self, name: str, examples: Sequence[Example]) -> None:
        """See the class."""
        self.name = name
        self._examples = tuple(examples)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> MemorySource: ...
    def __getitem__(self, index: int | slice) -> Example | MemorySource:
        """One example, or a source of a slice of them."""
        if isinstance(index, slice):
            return MemorySource(self.name, self._examples[index])
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        """The examples in order."""
        return iter(self._examples)

    def __repr__(self) -> str:
        """Name and length."""
        return f"MemorySource({self.name!r}, {len(self)} examples)"


def check_split(split: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if ``split`` is not one of ``allowed``."""
    if split not in allowed:
        raise ValueError(f"split must be one of {tuple(allowed)}, got {split!r}")


def hash_split(name: str, *, validation: float = 0.1, test: float = 0.1) -> str:
    """The split to which a hash of the name sends an item.

    The same name always goes to the same split, whatever else the data set holds;
    with the name of a speaker, picture or document no split shares it with another.

    Args:
      name: what must not be shared between splits.
      validation: expected fraction of names in ``"validation"``.
      test: expected fraction of names in ``"test"``.

    Returns:
      ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
      ValueError: a fraction is negative or they add up to more than 1.

    >>> hash_split("speaker-7"), hash_split("speaker-7", validation=1, test=0)
    ('train', 'validation')
    """
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise ValueError(
            "validation and test must be >= 0 and add up to at most 1, got "
            f"{validation} and {test}"
        )
    place = int(digest("diffmm.hash_split/1", name)[:13], 16) / 16**13
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
