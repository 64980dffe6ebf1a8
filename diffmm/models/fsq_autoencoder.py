"""A small image autoencoder with a finite scalar quantiser: images to codes and back.

Letters: B images, H x W pixels, C channels, P patch side, h x w patches, N = h·w,
D width, d quantised dimensions (one per entry of ``levels``).

References:
  Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made
  Simple", arXiv 2309.15505.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffmm._tree import named_leaves
from diffmm.models.attention import attention_function
from diffmm.models.config import AttentionKind, TransformerConfig
from diffmm.models.fsq import (
    check_indices,
    check_levels,
    codes_to_indices,
    indices_to_codes,
    quantize,
)
from diffmm.models.layers import Norm, fan_in_normal, linear, rotary_angles
from diffmm.models.transformer import Block
from diffmm.typing import Array, ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """Shape of an autoencoder with a finite scalar quantiser in the middle.

    Attributes:
      levels: L of each quantised dimension; ``prod(levels)`` codes. (8, 5, 5, 5) is
        the paper's recommendation for about 2^10 codes.
      image_size: (H, W), pixels.
      channels: C.
      patch_size: P, pixels; one code per patch.
      width: D, of encoder and decoder.
      num_layers: blocks in the encoder, and as many in the decoder.
      head_dim: of the attention that mixes patches; ``width / head_dim`` heads.
      mlp_ratio: hidden width of the feed-forward layers over ``width``.
      attention: ``"softmax"`` or ``"sigmoid"``, whose n is the number of patches.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    image_size: tuple[int, int]
    channels: int
    patch_size: int
    width: int = 64
    num_layers: int = 2
    head_dim: int = 32
    mlp_ratio: float = 2.0
    attention: AttentionKind = "softmax"

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be."""
        check_levels(self.levels)
        for name in ("levels", "image_size"):  # lists too, as JSON reads them back
            value = tuple(int(number) for number in getattr(self, name))
            object.__setattr__(self, name, value)
        for name in ("channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(
                f"image_size must be (height, width), got {self.image_size}"
            )
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                "image_size must be a multiple of patch_size, got "
                f"image_size={self.image_size} and patch_size={self.patch_size}"
            )
        self.transformer  # noqa: B018 (checks width, head_dim and mlp_ratio)

    @property
    def vocabulary_size(self) -> int:
        """Number of codes, ``prod(levels)``."""
        return math.prod(self.levels)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), rows and columns of codes."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.image_size, self.channels)

    @property
    def transformer(self) -> TransformerConfig:
        """Shape of the blocks of encoder and decoder."""
        return TransformerConfig(
            vocabulary_size=self.vocabulary_size,
            width=self.width,
            num_layers=self.num_layers,
            head_dim=self.head_dim,
            mlp_ratio=self.mlp_ratio,
            attention=self.attention,
            length=math.prod(self.grid),
        )


def _checked_images(images: ArrayLike, config: FSQConfig) -> Array:
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[1:] != config.image_shape:
        raise ValueError(
            f"images must have shape [B, {', '.join(map(str, config.image_shape))}], "
            f"got {images.shape}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point in [0, 1], got dtype {images.dtype}"
        )
    if not isinstance(images, jax.core.Tracer) and images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(
                f"images must lie in [0, 1] without NaN, got values in [{low}, {high}]"
            )
    return images.astype(jnp.float32)


def _checked_indices(indices: ArrayLike, config: FSQConfig) -> Array:
    indices = jnp.asarray(indices)
    if indices.ndim != 3 or indices.shape[1:] != config.grid:
        raise ValueError(
            f"indices must have shape [B, {config.grid[0]}, {config.grid[1]}], got "
            f"{indices.shape}"
        )
    return check_indices(indices, config.levels)


class _Trunk(nnx.Module):
    """Linear map, transformer over the grid of patches, linear map."""

    def __init__(
        self, config: FSQConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        width, num_patches = config.width, math.prod(config.grid)
        self.project_in = nnx.Param(
            fan_in_normal(rngs.params(), (inputs, width), inputs)
        )
        self.positions = nnx.Param(
            fan_in_normal(rngs.params(), (num_patches, width), width)
        )
        attention = attention_function(config.transformer)
        self.blocks = nnx.List(
            [
                Block(config.transformer, attention, rngs=rngs)
                for _ in range(config.num_layers)
            ]
        )
        self.norm = Norm(width)
        self.project_out = nnx.Param(
            fan_in_normal(rngs.params(), (width, outputs), width)
        )

    def __call__(self, x: Array) -> Array:
        """``[B, N, inputs]`` to ``[B, N, outputs]``."""
        # Where a patch lies is learned: the rotation of position 0 changes nothing.
        origin = jnp.zeros((1, x.shape[1]), jnp.int32)
        angles = rotary_angles(origin, self.config.head_dim, 1.0)
        x = linear(x, self.project_in[...]) + self.positions[...][None]
        for block in self.blocks:
            x = block(x, angles, None)
        return linear(self.norm(x), self.project_out[...])


class FSQAutoencoder(nnx.Module):
    """Patches, residual encoder, finite scalar quantiser, mirrored decoder.

    Patches are mixed by attention with learned positions. No auxiliary loss: the
    reconstruction error alone trains encoder and decoder.

    Example:
      >>> config = FSQConfig(
      ...     levels=(5, 5), image_size=(4, 6), channels=1, patch_size=2,
      ...     width=8, num_layers=1, head_dim=8)
      >>> model = FSQAutoencoder(config, rngs=nnx.Rngs(0))
      >>> indices = model.encode(jnp.zeros((7, 4, 6, 1)))
      >>> indices.shape, model.decode(indices).shape
      ((7, 2, 3), (7, 4, 6, 1))
    """

    def __init__(self, config: FSQConfig, *, rngs: nnx.Rngs) -> None:
        """Draws parameters from ``rngs.params``."""
        self.config = config
        pixels = config.patch_size**2 * config.channels
        dimensions = len(config.levels)
        self.encoder = _Trunk(config, pixels, dimensions, rngs=rngs)
        self.decoder = _Trunk(config, dimensions, pixels, rngs=rngs)

    def quantized(self, images: ArrayLike) -> Array:
        """Points of the grid, ``[B, H, W, C]`` to float32 ``[B, h, w, d]``."""
        images = _checked_images(images, self.config)
        (h, w), p = self.config.grid, self.config.patch_size
        patches = images.reshape(-1, h, p, w, p, self.config.channels)
        patches = patches.swapaxes(2, 3).reshape(images.shape[0], h * w, -1)
        z = self.encoder(patches).reshape(images.shape[0], h, w, -1)
        return quantize(z, self.config.levels)

    def render(self, codes: Array) -> Array:
        """Images of points of the grid, ``[B, h, w, d]`` to ``[B, H, W, C]``."""
        (h, w), p = self.config.grid, self.config.patch_size
        patches = self.decoder(codes.reshape(codes.shape[0], h * w, -1))
        patches = patches.reshape(-1, h, w, p, p, self.config.channels)
        # Grey at initialisation, and never outside the range of a picture.
        return jax.nn.sigmoid(
            patches.swapaxes(2, 3).reshape(-1, *self.config.image_shape)
        )

    def encode(self, images: ArrayLike) -> Array:
        """Images to codes.

        Args:
          images: floating point ``[B, H, W, C]`` in [0, 1].

        Returns:
          int32 ``[B, H/P, W/P]`` in ``[0, vocabulary_size)``.

        Raises:
          ValueError: another shape or dtype, or (outside of jit) NaN or values
            outside [0, 1].
        """
        return codes_to_indices(self.quantized(images), self.config.levels)

    def decode(self, indices: ArrayLike) -> Array:
        """Codes to images.

        Args:
          indices: integers ``[B, H/P, W/P]`` in ``[0, vocabulary_size)``.

        Returns:
          float32 ``[B, H, W, C]`` in [0, 1].

        Raises:
          ValueError: another shape or dtype, or (outside of jit) values out of range.
        """
        indices = _checked_indices(indices, self.config)
        return self.render(indices_to_codes(indices, self.config.levels))

    def __call__(self, images: ArrayLike) -> tuple[Array, Array]:
        """Reconstruction ``[B, H, W, C]`` and codes ``[B, H/P, W/P]`` of images."""
        codes = self.quantized(images)
        return self.render(codes), codes_to_indices(codes, self.config.levels)


def reconstruction_loss(images: Array, reconstruction: Array) -> Array:
    """Mean squared error over images, pixels and channels; float32 scalar."""
    difference = images.astype(jnp.float32) - reconstruction.astype(jnp.float32)
    return jnp.mean(difference * difference)


class NumpyCodec(NamedTuple):
    """A trained autoencoder as NumPy functions, for an image tokenizer.

    Both functions take one item or a batch of any size, and run the network on
    batches of one fixed size: it is compiled once or twice in all.

    Attributes:
      encode_fn: float ``[H, W, C]`` or ``[B, H, W, C]`` in [0, 1] to int32 ``[h, w]``
        or ``[B, h, w]``.
      decode_fn: the way back, to float32 in [0, 1].
      fingerprint: SHA-256 hex digest of configuration and parameters.
    """

    encode_fn: Callable[[np.ndarray], np.ndarray]
    decode_fn: Callable[[np.ndarray], np.ndarray]
    fingerprint: str


def numpy_codec(model: FSQAutoencoder, batch_size: int = 64) -> NumpyCodec:
    """Freezes a trained autoencoder into NumPy functions and a fingerprint.

    Args:
      model: the autoencoder; later changes of its parameters have no effect.
      batch_size: images per call of the network when a batch comes in.

    Returns:
      A `NumpyCodec`, whose functions raise as `FSQAutoencoder.encode` and ``decode``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    config = model.config
    graphdef, params = nnx.split(model)
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))
    decode = jax.jit(lambda params, x: nnx.merge(graphdef, params).decode(x))

    def convert(function: Callable[..., Array], items: np.ndarray) -> np.ndarray:
        chunks = []
        for start in range(0, max(len(items), 1), batch_size):
            chunk = items[start : start + batch_size]
            padding = [(0, batch_size - len(chunk))] + [(0, 0)] * (items.ndim - 1)
            result = function(params, np.pad(chunk, padding))
            chunks.append(np.asarray(result)[: len(chunk)])
        return np.concatenate(chunks)

    def encode_fn(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim == 3:
            images = np.asarray(_checked_images(images[None], config))
            return np.asarray(encode(params, images)[0])
        return convert(encode, np.asarray(_checked_images(images, config)))

    def decode_fn(indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim == 2:
            indices = np.asarray(_checked_indices(indices[None], config))
            return np.asarray(decode(params, indices)[0])
        return convert(decode, np.asarray(_checked_indices(indices, config)))

    # Without the default attention, which older fingerprints did not know.
    described = repr(config).replace(", attention='softmax'", "")
    sha = hashlib.sha256(described.encode())
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.asarray(leaf)
        sha.update(f"{name}:{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return NumpyCodec(encode_fn, decode_fn, sha.hexdigest())
