"""Checks and digests that every tokenizer shares."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def check_codes(
    codes: Any, vocabulary_size: int, name: str, length: int | None = None
) -> np.ndarray:
    """Codes as int32 ``[n]`` after checking shape, type and range.

    Args:
      codes: integers ``[n]``.
      vocabulary_size: codes must lie in ``[0, vocabulary_size)``.
      name: name of the tokenizer, for the message.
      length: required n, or None for any.

    Returns:
      int32 ``[n]``.

    Raises:
      ValueError: not one-dimensional, not integer, wrong length, or out of range.
    """
    array = np.asarray(codes)
    if array.ndim != 1:
        raise ValueError(f"{name}: codes must have shape [n], got {array.shape}")
    if array.size == 0:
        array = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: codes must be integers, got dtype {array.dtype}")
    if length is not None and array.size != length:
        raise ValueError(f"{name}: needs exactly {length} codes, got {array.size}")
    if array.size and (array.min() < 0 or array.max() >= vocabulary_size):
        bad = array[(array < 0) | (array >= vocabulary_size)][0]
        raise ValueError(f"{name}: code {bad} is outside [0, {vocabulary_size})")
    return array.astype(np.int32)


def digest(*parts: object) -> str:
    """Hex SHA-256 of the parts; arrays count with dtype, shape and contents.

    >>> digest("bytes", 1) == digest("bytes", 1), digest("a", "b") == digest("ab")
    (True, False)
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part)
            body = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
        elif isinstance(part, bytes):
            body = part
        else:
            body = repr(part).encode()
        # The length keeps neighbouring parts apart.
        sha.update(f"{type(part).__name__}:{len(body)}:".encode())
        sha.update(body)
    return sha.hexdigest()
