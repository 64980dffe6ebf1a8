"""Named shapes that tests and benchmarks share.

`SPECS` are cases at the size they are timed at; `Spec.reduced` is the same case, with
the same kinds of grouping and restriction, at a size for interpreters.

>>> spec = SPECS["gqa"].reduced()
>>> spec.kv_length, spec.group_size, spec.causal
(256, 4, True)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffmm_kernels.sigmoid_attention.alibi import alibi_slopes

Pass = Literal["forward", "backward", "both"]

#: Work of the two passes in units of the forward pass: 2 and 5 matrix products.
WORK: dict[Pass, float] = {"forward": 1.0, "backward": 2.5, "both": 3.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One case of attention: sizes, dtype and what each query sees.

    Attributes:
      name: key of `SPECS`.
      batch: B.
      q_length: T.
      kv_length: S.
      heads: H.
      kv_heads: K.
      head_dim: D.
      value_dim: E; None is D.
      dtype: of q, k, v and the cotangent of the output.
      bias_length: n of the bias ``-log n``; None is S.
      scale: None is ``D ** -0.5``.
      causal: as in `sigmoid_attention`.
      window: likewise.
      q_offset: likewise.
      alibi: subtract distances with `alibi_slopes`.
      segments: lengths of the packed sequences, the same in every row; what is left of
        the row is padding.
      kv_lengths: valid keys of each row.
      golden: the arrays are ``sin(ω·m)``, m = 1, 2, … in C order, with ω = 1 for q, 2
        for k, 3 for v and 4 for the cotangent; otherwise normal.
    """

    name: str
    batch: int
    q_length: int
    kv_length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    dtype: str = "bfloat16"
    bias_length: int | None = None
    scale: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int = 0
    alibi: bool = False
    segments: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    golden: bool = False

    def __post_init__(self) -> None:
        """Refuses cases that contradict themselves."""
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}"
            )
        if self.segments is not None and (
            self.q_length != self.kv_length or sum(self.segments) > self.q_length
        ):
            raise ValueError(
                f"segments {self.segments} need q_length = kv_length >= their sum, got "
                f"{self.q_length}, {self.kv_length}"
            )
        if self.kv_lengths is not None and len(self.kv_lengths) != self.batch:
            raise ValueError(
                f"kv_lengths must have one entry per row, got {len(self.kv_lengths)} "
                f"for {self.batch}"
            )

    @property
    def group_size(self) -> int:
        """G = H / K."""
        return self.heads // self.kv_heads

    @property
    def bias(self) -> float:
        """``-log n``."""
        return -math.log(self.bias_length or self.kv_length)

    def replace(self, **changes: Any) -> Spec:
        """Another case that differs in the given fields."""
        return dataclasses.replace(self, **changes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of q, k, v and do."""
        b, t, s = self.batch, self.q_length, self.kv_length
        value_dim = self.value_dim or self.head_dim
        return {
            "q": (b, t, self.heads, self.head_dim),
            "k": (b, s, self.kv_heads, self.head_dim),
            "v": (b, s, self.kv_heads, value_dim),
            "do": (b, t, self.heads, value_dim),
        }

    def arrays(
        self, seed: int = 0, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v and do as NumPy arrays.

        Args:
          seed: of normal arrays.
          dtype: instead of that of the case; the numbers are rounded to the dtype of
            the case first, so that a reference in float64 gets what a kernel gets.
            Golden arrays are not rounded.
        """
        rng = np.random.default_rng(seed)
        own = jnp.dtype(self.dtype)
        target = own if dtype is None else jnp.dtype(dtype)
        arrays = []
        for omega, shape in enumerate(self.shapes().values(), start=1):
            if self.golden:
                m = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
                array = np.sin(omega * m).reshape(shape)
            else:
                array = rng.standard_normal(shape, dtype=np.float32).astype(own)
            arrays.append(array.astype(target))
        q, k, v, do = arrays
        return q, k, v, do

    def arguments(self) -> dict[str, Any]:
        """Keywords of `sigmoid_attention`; arrays are NumPy's."""
        found: dict[str, Any] = {"bias": self.bias, "causal": self.causal}
        for name in ("scale", "window"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.q_offset:
            found["q_offset"] = self.q_offset
        if self.alibi:
            found["alibi_slopes"] = alibi_slopes(self.heads)
        if self.segments is not None:
            found["q_segment_ids"] = self.segment_ids()
            found["kv_segment_ids"] = self.segment_ids()
        if self.kv_lengths is not None:
            found["kv_lengths"] = np.asarray(self.kv_lengths, np.int32)
        return found

    def segment_ids(self) -> np.ndarray:
        """int32 ``[B, S]``, ascending from 0; padding is -1."""
        assert self.segments is not None, f"{self.name} has no segments"
        ids = np.full(self.kv_length, -1, np.int32)
        used = np.repeat(np.arange(len(self.segments)), self.segments)
        ids[: used.size] = used
        return np.tile(ids, (self.batch, 1))

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Query i sees the keys ``start[i] <= j < end[i]``, `kv_lengths` left aside.

        Returns:
          Two int64 arrays ``[T]``; padding has ``end <= start``.
        """
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        t, s = self.q_length, self.kv_length
        position = np.arange(t, dtype=np.int64) + self.q_offset
        start = np.zeros(t, np.int64) if left is None else position - left
        end = np.full(t, s) if right is None else position + right + 1
        start, end = np.maximum(start, 0), np.minimum(end, s)
        if self.segments is not None:
            edges = np.cumsum((0, *self.segments))
            segment = np.searchsorted(edges, np.arange(t), side="right") - 1
            padding = segment == len(self.segments)
            segment = np.where(padding, 0, segment)
            start = np.maximum(start, edges[segment])
            end = np.where(padding, 0, np.minimum(end, edges[segment + 1]))
        return start, end

    def visible_pairs(self) -> float:
        """Pairs of query and key that are counted as work, over all rows.

        ``T·S`` a row, half of it for plain causal attention as is usual; exact where
        windows, segments, lengths or offsets restrict.
        """
        b, t, s = self.batch, self.q_length, self.kv_length
        restricted = (self.window, self.segments, self.kv_lengths)
        if all(x is None for x in restricted) and self.q_offset == 0 and t == s:
            return b * t * s / (2 if self.causal else 1)
        start, end = self.intervals()
        lengths = self.kv_lengths or (s,) * b
        return float(
            sum(np.maximum(np.minimum(end, n) - start, 0).sum() for n in lengths)
        )

    def flops(self, direction: Pass = "forward") -> float:
        """Useful operations: 4·H·D per visible pair forward, 2.5 times that backward.

        What a backward pass computes again is not counted.
        """
        width = self.head_dim + (self.value_dim or self.head_dim)
        return 2 * self.heads * width * self.visible_pairs() * WORK[direction]

    def cache_bytes(self) -> int:
        """Bytes of the keys and values that one call must read."""
        keys = sum(self.kv_lengths or (self.kv_length,) * self.batch)
        width = self.head_dim + (self.value_dim or self.head_dim)
        return keys * self.kv_heads * width * jnp.dtype(self.dtype).itemsize

    def reduced(self, length: int = 256, batch: int = 2, kv_heads: int = 2) -> Spec:
        """The same case at a size for interpreters and CPUs.

        Lengths, windows and segments shrink by one factor, so that no length exceeds
        ``length``; groups of heads stay whole up to 4. Cases that are small already
        come back as they are.
        """
        factor = max(self.q_length, self.kv_length) / length
        if factor <= 1:
            return self

        def shrink(n: int) -> int:
            return max(1, round(n / factor)) if n > 1 else n

        batch, kv_heads = min(batch, self.batch), min(kv_heads, self.kv_heads)
        window = None
        if self.window is not None:
            left, right = (None if x is None else shrink(x) for x in self.window)
            window = (left, right)
        q_length, kv_length = shrink(self.q_length), shrink(self.kv_length)
        segments = self.segments
        if segments is not None:
            edges = np.round(np.cumsum((0, *segments)) / factor).astype(int)
            segments = tuple(int(n) for n in np.diff(edges))
        kv_lengths = self.kv_lengths
        if kv_lengths is not None:
            kv_lengths = tuple(shrink(n) for n in kv_lengths[:batch])
        aligned = self.q_offset == self.kv_length - self.q_length
        return self.replace(
            batch=batch,
            q_length=q_length,
            kv_length=kv_length,
            heads=kv_heads * min(self.group_size, 4),
            kv_heads=kv_heads,
            bias_length=None if self.bias_length is None else shrink(self.bias_length),
            window=window,
            q_offset=kv_length - q_length if aligned else shrink(self.q_offset),
            segments=segments,
            kv_lengths=kv_lengths,
        )


def square(
    name: str, length: int, head_dim: int, *, causal: bool, tokens: int = 16_384
) -> Spec:
    """B·S = ``tokens`` and H·D = 2,048: the protocol of published comparisons."""
    heads = 2_048 // head_dim
    return Spec(
        name=name,
        batch=max(1, tokens // length),
        q_length=length,
        kv_length=length,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        causal=causal,
    )


def decode(batch: int, length: int) -> Spec:
    """One new token per row beside caches of ``length`` keys, 32 heads on 8."""
    return Spec(
        name="decode",
        batch=batch,
        q_length=1,
        kv_length=length,
        heads=32,
        kv_heads=8,
        head_dim=128,
        causal=True,
        q_offset=length - 1,
        kv_lengths=(length,) * batch,
    )


def _gala(name: str, head_dim: int) -> Spec:
    """Attention of the released language models with sigmoid attention."""
    return Spec(
        name=name,
        batch=8,
        q_length=4_096,
        kv_length=4_096,
        heads=32,
        kv_heads=32,
        head_dim=head_dim,
        bias_length=4_096,
        causal=True,
        alibi=True,
    )


_LONG = square("causal", 16_384, 128, causal=True)

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            name="tiny",
            batch=1,
            q_length=3,
            kv_length=4,
            heads=2,
            kv_heads=1,
            head_dim=2,
            dtype="float32",
            golden=True,
        ),
        Spec(
            name="odd",
            batch=2,
            q_length=77,
            kv_length=129,
            heads=4,
            kv_heads=2,
            head_dim=64,
            causal=True,
            q_offset=52,
        ),
        _LONG.replace(
            name="gqa", batch=4, q_length=4_096, kv_length=4_096, heads=32, kv_heads=8
        ),
        _gala("gala1b", 64),
        _gala("gala7b", 128),
        _LONG.replace(
            name="packed",
            bias_length=4_096,
            segments=(4_096, 512, 2_048, 1_024, 3_072, 1_536, 512, 2_560, 1_024),
        ),
        _LONG.replace(name="window1024", window=(1_024, 0), bias_length=1_024),
        decode(16, 8_192),
        square("diffusion", 16_384, 128, causal=False),
    )
}
