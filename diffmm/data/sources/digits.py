"""Handwritten digits of 8 x 8 pixels with captions, from scikit-learn's wheel."""

from __future__ import annotations

import numpy as np

from diffmm.data.sources.example import Example, MemorySource, check_split

DIGIT_NAMES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
DIGIT_CAPTIONS = ("a handwritten {}", "{}")
DIGIT_SPLITS = ("train", "validation", "test")


def digits_source(
    split: str = "train", *, captions: tuple[str, ...] = DIGIT_CAPTIONS
) -> MemorySource:
    """The 1,797 digits of scikit-learn, 17 grey levels, with captions.

    The split is fixed: within each class the images are shuffled once, a tenth goes
    to the test split, a tenth to validation and the rest to training (1,439 / 179 /
    179 images). The data set names no writers, so writers are shared between splits.

    Args:
      split: ``"train"``, ``"validation"`` or ``"test"``.
      captions: templates in which ``{}`` becomes the name of the digit; each image
        carries all of them as alternatives.

    Returns:
      Examples with ``image`` float32 ``[8, 8]``, multiples of 1/16 in [0, 1], and
      ``label`` 0 to 9.

    Raises:
      ValueError: unknown split, or a caption without ``{}``.
      ImportError: scikit-learn is missing.

    References:
      Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI Machine
      Learning Repository (1998).
    """
    check_split(split, DIGIT_SPLITS)
    if not captions or not all("{}" in caption for caption in captions):
        raise ValueError(f"captions must each contain '{{}}', got {captions}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'digits_source needs scikit-learn: pip install "diffmm[examples]"'
        ) from error
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    examples = []
    for index in _split_indices(np.asarray(data.target), split):
        label = int(data.target[index])
        examples.append(
            Example(
                texts=tuple(
                    text.replace("{}", DIGIT_NAMES[label]) for text in captions
                ),
                image=images[index],
                label=label,
            )
        )
    return MemorySource(f"digits/{split}", examples)


def _split_indices(labels: np.ndarray, split: str) -> list[int]:
    """Indices of a split, ascending: a tenth of each class for each held-out split."""
    rng = np.random.default_rng(0)
    chosen: list[int] = []
    for label in range(10):
        order = rng.permutation(np.flatnonzero(labels == label))
        tenth = round(len(order) / 10)
        part = {
            "test": order[:tenth],
            "validation": order[tenth : 2 * tenth],
            "train": order[2 * tenth :],
        }[split]
        chosen.extend(int(index) for index in part)
    return sorted(chosen)
