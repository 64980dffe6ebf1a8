"""Types and protocols that every room shares.

Shape letters: B rows, L row length, K scored positions, V joint vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
Params = Any


class Modality(enum.IntEnum):
    """What a position can be a target of; ``NONE`` is never a target."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    NONE = 3


class Group(enum.IntEnum):
    """Metric class of a position.

    Closing tokens and predicted padding carry the modality of their stretch and are
    counted apart, as ``LENGTH``; positions that are never targets are ``NONE``.
    """

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    LENGTH = 3
    NONE = 4


NUM_MODALITIES = 3
NUM_GROUPS = 4


class Batch(NamedTuple):
    """Rows of the stream; every field has a leading batch axis (or none, for one row).

    Attributes:
      tokens: int32 ``[B, L]``, clean tokens; never the mask id.
      positions: int32 ``[B, L]``, restarting at 0 in each segment.
      segment_ids: int32 ``[B, L]``, 0 = padding; attention stays inside a segment.
      modality: int8 ``[B, L]``, a `Modality`.
      maskable: bool ``[B, L]``, content that the process may mask: the denominator.
      condition: bool ``[B, L]``, conditioning content that guidance training drops.
      loss_weight: float32 ``[B, L]``, 1 where maskable unless the caller weights.
      group: int8 ``[B, L]``, a `Group`.
      task: int8 ``[B]``, index of the row template (``diffmm.data.layout.TASKS``).
    """

    tokens: ArrayLike
    positions: ArrayLike
    segment_ids: ArrayLike
    modality: ArrayLike
    maskable: ArrayLike
    condition: ArrayLike
    loss_weight: ArrayLike
    group: ArrayLike
    task: ArrayLike


class Canvas(NamedTuple):
    """A batch of rows to be completed; fields ``[B, L]`` as in `Batch`.

    Attributes:
      tokens: int32, prompt and boundary tokens; ``mask_id`` wherever generated.
      positions: int32, restarting at 0 in each segment.
      segment_ids: int32, 0 = padding.
      modality: int8, decides which ids a generated position may take.
      generate: bool, the positions to generate; the only authority on it.
      condition: bool, the prompt content that an unconditional branch hides.
    """

    tokens: ArrayLike
    positions: ArrayLike
    segment_ids: ArrayLike
    modality: ArrayLike
    generate: ArrayLike
    condition: ArrayLike


@runtime_checkable
class Schedule(Protocol):
    """Mask probability m(t) of diffusion time t in [0, 1], with m(0)=0, m(1)=1."""

    def mask_probability(self, t: ArrayLike) -> Array:
        """m(t), computed directly (never as 1 - alpha)."""
        ...

    def weight(self, t: ArrayLike) -> Array:
        """The ELBO weight w(t) = m'(t) / m(t)."""
        ...

    def inverse(self, m: ArrayLike) -> Array:
        """The time t at which m(t) equals the argument."""
        ...


class NllFn(Protocol):
    """Negative log-likelihood of the clean tokens at every position, in nats."""

    def __call__(self, params: Params, tokens: Array, batch: Batch) -> Array:
        """Scores ``batch.tokens`` given the partly masked ``tokens``.

        Returns float32 ``[B, L]`` of −log p(batch.tokens | tokens).
        """
        ...


class PredictFn(Protocol):
    """A denoiser as the samplers see it: a function, never a module."""

    def __call__(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Array:
        """Logits at the scored positions only.

        Args:
          params: any pytree.
          tokens: int32 ``[B, L]``.
          positions: int32 ``[B, L]``.
          segment_ids: int32 ``[B, L]``.
          scored: int32 ``[B, K]``, indices into the row.

        Returns:
          float32 ``[B, K, V]``.
        """
        ...


@runtime_checkable
class FeatureFn(Protocol):
    """A denoiser that hands out what comes before its unembedding.

    Its other half is a `PredictFn`. Samplers then unembed few positions at a time: the
    float32 logits of all scored positions never exist together.
    """

    def features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
    ) -> Any:
        """Arguments as in `PredictFn`; a pytree of arrays ``[B, K, ...]``."""
        ...

    def logits(self, params: Params, features: Any) -> Array:
        """Features ``[..., D]`` to logits ``[..., V]``, position by position."""
        ...


@runtime_checkable
class CachedFn(Protocol):
    """A denoiser that can keep keys and values of positions and renew some of them.

    Attributes:
      causal_block: 0 if every position sees every other of its segment; else positions
        see their own block ``position // causal_block`` and those before it, and
        finished blocks never change.
      shift: 0 if logits at i predict position i; 1 if they predict i + 1.
    """

    causal_block: int
    shift: int

    def empty_cache(self, params: Params, num_rows: int, row_length: int) -> Any:
        """A pytree of arrays whose second axis are the rows, ``[layers, B, …]``."""
        ...

    def cached_features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
        cache: Any,
        queries: Array | None,
    ) -> tuple[Any, Any]:
        """Renews the given positions, all others as they are in the cache.

        Args:
          params: any pytree.
          tokens: int32 ``[B, L]``.
          positions: int32 ``[B, L]``.
          segment_ids: int32 ``[B, L]``.
          scored: int32 ``[B, K]``, indices into the row.
          cache: of `empty_cache` or an earlier call.
          queries: int32 ``[B, Q]``, indices into the row of the positions to compute;
            L where a place is unused. They hold ``scored − shift`` of every position
            that the caller reads (the position itself where it begins a segment);
            other scored positions get arbitrary finite features. ``None`` computes
            the whole row.

        Returns:
          ``(features, cache)``: as `FeatureFn.features` gives, and the cache with the
          renewed positions.
        """
        ...


@runtime_checkable
class ShadowFn(Protocol):
    """A denoiser that can also ask: what would be here if this token were hidden?"""

    def shadow_features(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        scored: Array,
        mask_id: int,
    ) -> tuple[Any, Any]:
        """Features of the scored positions, and of their shadows.

        A shadow is a mask with the position of a scored one. It sees all real tokens
        but the one at its position; nobody sees shadows. Both in one evaluation of
        L + K positions (L + 2K where logits at i predict i + 1, since what reads the
        mask must not see the token either). Arguments as in `PredictFn`.
        """
        ...


class Places(NamedTuple):
    """Where the queries, or the keys, of a call of attention stand; int32 ``[B, n]``.

    Attributes:
      indices: in the row: distances and causal order are counted along it.
      positions: restarting in each segment.
      segment_ids: 0 = padding.
    """

    indices: Array
    positions: Array
    segment_ids: Array


class View(NamedTuple):
    """What Q queries see of S keys, where these are not the row itself.

    Attributes:
      queries: places ``[B, Q]``.
      keys: places ``[B, S]``; only those of a query's own segment are seen.
      visible: bool ``[B, Q, S]``, a further restriction, or None.
    """

    queries: Places
    keys: Places
    visible: Array | None = None


class AttentionFn(Protocol):
    """Attention as a function of projected heads; an argument of every model.

    A function that serves block-causal models, caches and shadows takes a keyword
    ``view`` too: a `View`, or None. With a view there are Q queries and S keys, and it
    replaces ``segment_ids``; what the function does by itself, such as causality, goes
    by ``indices`` then. It is passed only where it is needed.
    """

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        segment_ids: Array | None = None,
    ) -> Array:
        """Mixes values: three ``[B, L, H, K]`` to one.

        ``segment_ids`` int32 ``[B, L]``: attention stays inside a segment.
        """
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """A reversible map between items (text, images, waveforms) and integer codes."""

    @property
    def name(self) -> str:
        """Short name, for messages."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Codes lie in ``[0, vocabulary_size)``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the codes; saved in checkpoints."""
        ...

    def encode(self, item: Any) -> np.ndarray:
        """Item to int32 codes ``[n]``."""
        ...

    def decode(self, codes: np.ndarray) -> Any:
        """int32 codes ``[n]`` to an item."""
        ...


#: A factor: one number, or one per layer, shaped ``[layers, 1, ...]`` to broadcast
#: against a leaf whose layers are stacked.
Factor = float | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplier:
    """What one parameter leaf's hyper-parameters are multiplied by.

    Parameterisations make them, optimisers apply them; between the two they travel as
    ``{name of the leaf: Multiplier}``. Not a pytree: a mapping of them is static data.

    Attributes:
      init_variance: of the initial values.
      forward: what the product with this leaf is multiplied by in the model.
      learning_rate: of the peak and hence of the whole schedule.
      eps: AdamW's ε, outside the root (``eps_root`` takes the square).
      weight_decay: of λ in the learning-rate-coupled form ``θ −= η λ θ``; decay that
        is independent of the learning rate takes ``learning_rate · weight_decay``.
      b1: of the rate at which the first moment forgets, −ln β₁ or 1 − β₁.
      b2: the same for the second moment.
    """

    init_variance: Factor = 1.0
    forward: Factor = 1.0
    learning_rate: Factor = 1.0
    eps: Factor = 1.0
    weight_decay: Factor = 1.0
    b1: Factor = 1.0
    b2: Factor = 1.0
