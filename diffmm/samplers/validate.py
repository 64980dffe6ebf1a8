"""Checks of a sampling request, on the host, before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffmm.typing import Array, Canvas, Modality


def check_canvas(canvas: Canvas, mask_id: int, allowed: np.ndarray) -> Canvas:
    """A canvas of numpy arrays in the dtypes that the loop takes.

    Args:
      canvas: fields ``[B, L]``.
      mask_id: the mask.
      allowed: bool ``[4, V]``.

    Returns:
      The canvas as numpy arrays.

    Raises:
      ValueError: naming the field, what came and what is allowed.
    """
    size = allowed.shape[1]
    dtypes = (np.int32, np.int32, np.int32, np.int32, np.bool_, np.bool_)
    arrays: list[Any] = []
    shape = np.shape(canvas.tokens)
    if len(shape) != 2:
        raise ValueError(f"canvas.tokens must have shape [B, L], got {shape}")
    for name, value, dtype in zip(Canvas._fields, canvas, dtypes, strict=True):
        if np.shape(value) != shape:
            raise ValueError(
                f"canvas.{name} must have the shape of canvas.tokens, {shape}, "
                f"got {np.shape(value)}"
            )
        arrays.append(np.asarray(value).astype(dtype))
    tokens, _, segment_ids, modality, generate, _ = arrays
    _refuse(
        (tokens < 0) | (tokens >= size), tokens, "canvas.tokens", f"lie in [0, {size})"
    )
    _refuse(
        generate & (tokens != mask_id),
        tokens,
        "canvas.generate",
        f"be True only where canvas.tokens is the mask id {mask_id}",
    )
    _refuse(
        generate & (segment_ids == 0),
        segment_ids,
        "canvas.generate",
        "be False in padding (segment 0)",
    )
    _refuse(
        (modality < 0) | (modality > Modality.NONE),
        modality,
        "canvas.modality",
        f"lie in [0, {int(Modality.NONE)}]",
    )
    possible = np.asarray(allowed.any(axis=1))
    _refuse(
        generate & ~possible[modality],
        modality,
        "allowed",
        "have an id for the modality of every generated position",
    )
    return Canvas(*arrays)


def check_allowed(allowed: Any, mask_id: int) -> np.ndarray:
    """The table of allowed ids without the mask, as numpy.

    Raises:
      ValueError: unless it is bool ``[4, V]`` and ``mask_id`` lies in [0, V).
    """
    allowed = np.array(allowed)
    if allowed.dtype != np.bool_ or allowed.ndim != 2 or len(allowed) != len(Modality):
        raise ValueError(
            f"allowed must be a bool table [{len(Modality)}, V], got {allowed.dtype} "
            f"{allowed.shape}"
        )
    check_id("mask_id", mask_id, allowed.shape[1])
    allowed[:, mask_id] = False
    return allowed


def check_id(name: str, value: int, size: int) -> None:
    """Raises ``ValueError`` unless ``value`` is an id."""
    if not 0 <= int(value) < size:
        raise ValueError(f"{name} must lie in [0, {size}), got {value!r}")


def check_block_length(block_length: int | None, num_generated: int) -> int:
    """The width K of the window.

    Raises:
      ValueError: unless ``block_length`` divides the longest generated stretch.
    """
    if block_length is None:
        return max(num_generated, 1)
    if block_length < 1 or num_generated % block_length:
        raise ValueError(
            f"block_length must divide the number of generated positions, "
            f"{num_generated}, got {block_length!r}"
        )
    return int(block_length)


def row_keys(key: Any, num_rows: int) -> Array:
    """One key per row: given as such, or folded from one key by row index.

    Args:
      key: a typed or raw key, or one per row.
      num_rows: B.

    Returns:
      key array ``[B]``.

    Raises:
      ValueError: if the number of keys is neither one nor B.
    """
    key = jax.numpy.asarray(key)
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != np.uint32 or key.ndim not in (1, 2):
            raise ValueError(
                f"key must be a jax PRNG key or one per row, got {key.dtype} "
                f"{key.shape}"
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        rows = np.arange(num_rows, dtype=np.uint32)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    if key.shape != (num_rows,):
        raise ValueError(
            f"key must be one key or one per row, shape ({num_rows},), got {key.shape}"
        )
    return key


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, allowed: str) -> None:
    if wrong.any():
        row, column = (int(x[0]) for x in np.nonzero(wrong))
        raise ValueError(
            f"{name} must {allowed}, got {values[row, column]} at row {row}, "
            f"position {column}"
        )
