"""Images to codes: one code per pixel, or functions of a learned autoencoder.

Pictures are ``uint8`` in [0, 255] or floating point in [0, 1]; codes run in raster
order, row by row from the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmm.data.codes import check_codes, digest


def as_unit_image(image: Any, name: str = "image") -> np.ndarray:
    """An image as float32 in [0, 1].

    Args:
      image: uint8 in [0, 255], or floating point in [0, 1]; any shape.
      name: what to call it in messages.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: another dtype, NaN or infinity, or values outside the range.
    """
    array = np.asarray(image)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name}: image must be uint8 or floating point, got dtype {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: image contains NaN or infinity")
    if array.size and (array.min() < 0 or array.max() > 1):
        raise ValueError(
            f"{name}: floating-point image must lie in [0, 1], got "
            f"[{array.min():g}, {array.max():g}]"
        )
    return array.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class GreyLevelTokenizer:
    """Each pixel is one code, its grey value rounded to ``levels`` steps.

    ``code = round(x (levels - 1))`` and ``x = code / (levels - 1)`` for x in [0, 1];
    the error of a round trip is at most ``0.5 / (levels - 1)``.

    Attributes:
      height: rows of the image, pixels.
      width: columns of the image, pixels.
      levels: number of grey values, at least 2.

    >>> tokenizer = GreyLevelTokenizer(height=1, width=3, levels=5)
    >>> tokenizer.encode(np.array([[0.0, 0.5, 1.0]])).tolist()
    [0, 2, 4]
    """

    height: int
    width: int
    levels: int = 17

    def __post_init__(self) -> None:
        """Checks the settings."""
        for field, least in (("height", 1), ("width", 1), ("levels", 2)):
            value = getattr(self, field)
            if int(value) != value or value < least:
                raise ValueError(f"{field} must be an integer >= {least}, got {value}")

    @property
    def name(self) -> str:
        """Short name, for messages."""
        return f"grey{self.height}x{self.width}"

    @property
    def vocabulary_size(self) -> int:
        """The number of grey levels."""
        return self.levels

    @property
    def num_codes(self) -> int:
        """Codes per image."""
        return self.height * self.width

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the codes."""
        settings = (self.height, self.width, self.levels)
        return digest("diffmm.GreyLevelTokenizer/1", settings)

    def encode(self, item: Any) -> np.ndarray:
        """Image to codes.

        Args:
          item: uint8 or floating point, ``[H, W]`` or ``[H, W, 1]``.

        Returns:
          int32 ``[H * W]``, raster order.

        Raises:
          ValueError: wrong size or dtype, NaN, or values out of range.
        """
        array = np.asarray(item)
        shape = (self.height, self.width)
        if array.shape not in (shape, (*shape, 1)):
            raise ValueError(
                f"{self.name}: image must have shape {shape}, got {array.shape}"
            )
        unit = as_unit_image(array, self.name).reshape(-1)
        return np.rint(unit * (self.levels - 1)).astype(np.int32)

    def decode(self, codes: Any) -> np.ndarray:
        """Codes to an image.

        Args:
          codes: integers ``[H * W]``.

        Returns:
          float32 ``[H, W]`` in [0, 1].
        """
        array = check_codes(codes, self.levels, self.name, length=self.num_codes)
        unit = array.astype(np.float32) / (self.levels - 1)
        return unit.reshape(self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class CallableImageTokenizer:
    """An image tokenizer made of two functions, such as a trained autoencoder's.

    The network stays where it is; the tokenizer sees NumPy arrays only and checks
    what goes in and what comes out.

    Attributes:
      name: short name, for messages.
      encode_fn: float32 ``[H, W, C]`` in [0, 1] to integers ``grid``.
      decode_fn: int32 ``grid`` to floating point ``[H, W, C]``; clipped to [0, 1].
      image_shape: (H, W, C).
      grid: (rows, columns) of codes.
      vocabulary_size: codes lie in ``[0, vocabulary_size)``.
      fingerprint: hex digest of everything that changes the codes, weights included;
        `diffmm.data.codes.digest` makes one from arrays.
    """

    name: str
    encode_fn: Callable[[np.ndarray], Any]
    decode_fn: Callable[[np.ndarray], Any]
    image_shape: tuple[int, int, int]
    grid: tuple[int, int]
    vocabulary_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        """Checks the settings."""
        for field, length in (("image_shape", 3), ("grid", 2)):
            value = tuple(getattr(self, field))
            if len(value) != length or any(size < 1 for size in value):
                raise ValueError(
                    f"{field} must be {length} positive sizes, got {value}"
                )
        if self.vocabulary_size < 1:
            raise ValueError(
                f"vocabulary_size must be >= 1, got {self.vocabulary_size}"
            )
        if not self.fingerprint:
            raise ValueError("fingerprint must not be empty")

    @property
    def num_codes(self) -> int:
        """Codes per image."""
        return self.grid[0] * self.grid[1]

    def encode(self, item: Any) -> np.ndarray:
        """Image to codes.

        Args:
          item: uint8 or floating point ``[H, W, C]``; ``[H, W]`` if C is 1.

        Returns:
          int32 ``[rows * columns]``, raster order.

        Raises:
          ValueError: bad image, or ``encode_fn`` returned something else than codes.
        """
        array = np.asarray(item)
        if self.image_shape[2] == 1 and array.ndim == 2:
            array = array[..., None]
        if array.shape != tuple(self.image_shape):
            raise ValueError(
                f"{self.name}: image must have shape {tuple(self.image_shape)}, "
                f"got {array.shape}"
            )
        codes = np.asarray(self.encode_fn(as_unit_image(array, self.name)))
        if codes.shape != tuple(self.grid):
            raise ValueError(
                f"{self.name}: encode_fn must return shape {tuple(self.grid)}, "
                f"got {codes.shape}"
            )
        return check_codes(codes.reshape(-1), self.vocabulary_size, self.name)

    def decode(self, codes: Any) -> np.ndarray:
        """Codes to an image.

        Args:
          codes: integers ``[rows * columns]``.

        Returns:
          float32 ``[H, W, C]`` in [0, 1].

        Raises:
          ValueError: bad codes, or ``decode_fn`` returned another shape or NaN.
        """
        array = check_codes(codes, self.vocabulary_size, self.name, self.num_codes)
        image = np.asarray(self.decode_fn(array.reshape(self.grid)), dtype=np.float32)
        if image.shape != tuple(self.image_shape) or not np.isfinite(image).all():
            raise ValueError(
                f"{self.name}: decode_fn must return finite values of shape "
                f"{tuple(self.image_shape)}, got shape {image.shape}"
            )
        return np.clip(image, 0, 1)
