"""English prose that every Python carries: the help topics of the language."""

from __future__ import annotations

import re

from diffmm.data.sources.example import (
    Example,
    MemorySource,
    check_split,
    hash_split,
)

PROSE_SPLITS = ("train", "validation")


def prose_source(
    split: str = "train", *, validation: float = 0.1, min_length: int = 40
) -> MemorySource:
    """Paragraphs of the help topics of the running Python (``pydoc_data.topics``).

    Code, grammar, tables and headings are dropped, lines of a paragraph are joined,
    and emphasis marks are removed. Whole topics are held out by a hash of their name,
    and since topics quote each other, a paragraph that occurs in a held-out topic is
    taken out of training. The text belongs to the running Python version, so losses
    compare only within one.

    Args:
      split: ``"train"`` or ``"validation"``.
      validation: expected fraction of topics held out.
      min_length: shorter paragraphs are dropped, characters.

    Returns:
      Examples with ``texts=(paragraph,)`` and ``group=topic``, each paragraph once.

    Raises:
      ValueError: unknown split, a fraction outside (0, 1), or nothing is left.
      ImportError: this Python was built without its help topics.

    References:
      Python Software Foundation, "The Python language reference".
    """
    check_split(split, PROSE_SPLITS)
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie in (0, 1), got {validation}")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "prose_source needs pydoc_data, which this Python lacks: install the "
            "package of your system that holds Python's help topics"
        ) from error
    owner: dict[str, str] = {}
    chosen: list[Example] = []
    # Validation first: it owns what both splits hold.
    for part in ("validation", "train"):
        for topic in sorted(topics):
            if hash_split(topic, validation=validation, test=0) != part:
                continue
            for text in paragraphs(topics[topic]):
                if len(text) < min_length or text in owner:
                    continue
                owner[text] = part
                if part == split:
                    chosen.append(Example(texts=(text,), group=topic))
    if not chosen:
        raise ValueError(f"min_length={min_length} leaves no paragraph in {split!r}")
    return MemorySource(f"prose/{split}", chosen)


def paragraphs(document: str) -> list[str]:
    r"""Prose paragraphs of a plain-text rendering of reStructuredText.

    >>> paragraphs("Title\n*****\n\nThe *first*\nline. [1]\n\n   code = 1\n")
    ['The first line.']
    """
    found = []
    for block in re.split(r"\n[ \t]*\n", document.replace("\t", "    ")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or _is_markup(lines):
            continue
        text = " ".join(line.strip() for line in lines)
        text = re.sub(r"^(\* |[0-9]+\. )", "", text)
        text = re.sub(r"\s*\[[0-9]+\]", "", text)
        text = re.sub(r"(?<![\w*])(\*\*?)([^\s*][^*]*?)\1(?![\w*])", r"\2", text)
        found.append(re.sub(r"\s+", " ", text).strip())
    return found


def _is_markup(lines: list[str]) -> bool:
    """Whether a block is a heading, code, a table, a grammar or a footnote."""
    first = lines[0]
    underline = re.compile(r"([*=\-~^\"'+#])\1{2,}$")
    return (
        first.startswith(("   ", "+--", "|", "[", ".. "))
        or any(underline.fullmatch(line.strip()) for line in lines)
        or any("::=" in line or line.lstrip().startswith("|") for line in lines)
    )
