"""Canvases without a layout: prompts of one modality, continued."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffmm.typing import Canvas, Modality


def canvas_from_prompts(
    prompts: Sequence[Sequence[int]],
    num_generated: int | Sequence[int],
    *,
    mask_id: int,
    pad_id: int = 0,
    row_length: int | None = None,
    modality: Modality = Modality.TEXT,
) -> Canvas:
    """Rows ``prompt, masks, padding``, left-aligned.

    Args:
      prompts: token ids of each row; a prompt may be empty.
      num_generated: positions to generate, for all rows or for each.
      mask_id: the mask.
      pad_id: fills what is left of the row.
      row_length: L; the longest row by default.
      modality: of the generated positions.

    Returns:
      `Canvas` of numpy arrays ``[B, L]``, with the prompts as condition.

    Raises:
      ValueError: if a row does not fit into ``row_length``, a count is negative, or a
        prompt holds the mask id (a `Canvas` of your own may: ``generate`` decides).

    >>> print(canvas_from_prompts([[5, 6], [7]], 2, mask_id=9).tokens)
    [[5 6 9 9]
     [7 9 9 0]]
    """
    counts = np.broadcast_to(np.asarray(num_generated, np.int64), (len(prompts),))
    if not len(prompts) or counts.min() < 0:
        raise ValueError(
            f"num_generated must be at least 0 for one or more prompts, got "
            f"{num_generated!r} for {len(prompts)} prompts"
        )
    for row, prompt in enumerate(prompts):
        if mask_id in prompt:
            raise ValueError(
                f"prompts must not hold mask_id={mask_id}, got it in row {row}, "
                f"position {list(prompt).index(mask_id)}"
            )
    ends = [len(prompt) + int(n) for prompt, n in zip(prompts, counts, strict=True)]
    length = max(ends) if row_length is None else row_length
    if length < max(max(ends), 1):
        raise ValueError(
            f"row_length must hold the longest prompt with its generated positions, "
            f"{max(max(ends), 1)}, got {length}"
        )
    shape = (len(prompts), length)
    index = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    given = index < np.array([len(prompt) for prompt in prompts])[:, None]
    inside = index < np.array(ends)[:, None]
    tokens = np.where(inside, mask_id, pad_id).astype(np.int32)
    tokens[given] = [token for prompt in prompts for token in prompt]
    return Canvas(
        tokens=tokens,
        positions=np.where(inside, index, 0).astype(np.int32),
        segment_ids=inside.astype(np.int32),
        modality=np.where(inside & ~given, modality, Modality.NONE).astype(np.int8),
        generate=inside & ~given,
        condition=given,
    )
