"""What a call of sigmoid attention consists of, checked and brought to one form.

Letters, in the whole folder: B batch, T query length, S key length, H query heads,
K key/value heads, G = H / K, D head size of q and k, E head size of v.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm_kernels.sigmoid_attention.config import PRECISIONS, Config, Precision

MAX_HEAD_DIM = 256

_FLOATS = ("bfloat16", "float16", "float32", "float64")


class Operands(NamedTuple):
    """The arrays of a call; every one has its batch axis, absent ones are None.

    Attributes:
      q: ``[B, T, H, D]``.
      k: ``[B, S, K, D]``.
      v: ``[B, S, K, E]``.
      bias: float32 ``[B, H]``, or None: the constant ``Options.bias``.
      q_offset: int32 ``[B, T]``: query i sits at position ``i + q_offset[b, i]`` of
        the keys; or None: the constant ``Options.q_offset``.
      q_segment_ids: int32 ``[B, T]``; comes with …
      kv_segment_ids: int32 ``[B, S]``.
      q_lengths: int32 ``[B]``.
      kv_lengths: int32 ``[B]``.
      alibi_slopes: float32 ``[B, H]``.
      mask: bool, every axis of ``[B, H, T, S]`` whole or 1.
      logit_bias: float, every axis of ``[B, H, T, S]`` whole or 1.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    q_offset: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    alibi_slopes: Any = None
    mask: Any = None
    logit_bias: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What of a call is known when it is traced.

    Attributes:
      scale: multiplies q·k.
      bias: offset of the sigmoid where ``Operands.bias`` is None.
      q_offset: see ``Operands.q_offset``.
      left: keys before ``position - left`` are invisible; None = all are visible.
      right: keys after ``position + right`` are invisible; causal attention is 0.
      precision: which activation the kernels evaluate.
      out_dtype: name of the dtype of the output.
      deterministic: the gradients' bits must not depend on the order of threads.
      config: tiles chosen by the user, or None.
      interpret: run kernels in Pallas' interpreter; None means no.
    """

    scale: float
    bias: float
    q_offset: int = 0
    left: int | None = None
    right: int | None = None
    precision: Precision = "default"
    out_dtype: str = "float32"
    deterministic: bool = False
    config: Config | None = None
    interpret: bool | None = None


class Needs(NamedTuple):
    """Which gradients beside dq, dk, dv the backward pass must compute."""

    bias: bool
    logit_bias: bool


class Gradients(NamedTuple):
    """Cotangents in the dtype of what they belong to.

    Attributes:
      q: ``[B, T, H, D]``.
      k: ``[B, S, K, D]``.
      v: ``[B, S, K, E]``.
      bias: float32 ``[B, H]``, or None where it was not needed.
      logit_bias: of the shape of ``Operands.logit_bias``, or None.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    logit_bias: Any = None


def canonical(
    q: Any,
    k: Any,
    v: Any,
    *,
    bias: Any,
    scale: float | None,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    q_offset: Any,
    q_segment_ids: Any,
    kv_segment_ids: Any,
    q_lengths: Any,
    kv_lengths: Any,
    alibi_slopes: Any,
    mask: Any,
    logit_bias: Any,
    precision: Precision,
    out_dtype: Any,
    deterministic: bool,
    config: Config | None,
    interpret: bool | None,
) -> tuple[Operands, Options, bool]:
    """Checks the arguments of `sigmoid_attention` and brings them to one form.

    Returns:
      Operands, options, and whether q, k and v came without a batch axis.

    Raises:
      ValueError: naming the argument, what came and what is allowed.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check_qkv(q, k, v)
    unbatched = q.ndim == 3
    if unbatched:
        q, k, v = (x[None] for x in (q, k, v))
    b, t, h, d = q.shape
    s = k.shape[1]
    real = jnp.float64 if q.dtype == jnp.float64 else jnp.float32

    scale = d**-0.5 if scale is None else _finite("scale", scale)
    constant_bias, bias = _bias(bias, b, h, s, real)
    left, right = _window(causal, window)
    constant_offset, q_offset = _offset(q_offset, b, t, unbatched)
    if (q_segment_ids is None) != (kv_segment_ids is None):
        if t != s:
            given = "kv" if q_segment_ids is None else "q"
            raise ValueError(
                f"{given}_segment_ids alone serves only T = S, got T={t} and S={s}: "
                "give both q_segment_ids and kv_segment_ids"
            )
        q_segment_ids = kv_segment_ids if q_segment_ids is None else q_segment_ids
        kv_segment_ids = q_segment_ids
    per_row = {
        "q_segment_ids": (q_segment_ids, t),
        "kv_segment_ids": (kv_segment_ids, s),
    }
    ids = {
        name: _integers(name, value, (b, length), unbatched)
        for name, (value, length) in per_row.items()
    }
    lengths = {
        "q_lengths": _lengths("q_lengths", q_lengths, b, t, unbatched),
        "kv_lengths": _lengths("kv_lengths", kv_lengths, b, s, unbatched),
    }
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config must be a Config or None, got {config!r}")
    out = jnp.dtype(q.dtype if out_dtype is None else out_dtype).name
    if out not in _FLOATS:
        raise ValueError(f"out_dtype must be one of {_FLOATS}, got {out!r}")
    operands = Operands(
        q=q,
        k=k,
        v=v,
        bias=bias,
        q_offset=q_offset,
        alibi_slopes=_slopes(alibi_slopes, b, h, real),
        mask=_broadcastable("mask", mask, (b, h, t, s)),
        logit_bias=_broadcastable("logit_bias", logit_bias, (b, h, t, s)),
        **ids,
        **lengths,
    )
    options = Options(
        scale=scale,
        bias=constant_bias,
        q_offset=constant_offset,
        left=left,
        right=right,
        precision=precision,
        out_dtype=out,
        deterministic=bool(deterministic),
        config=config,
        interpret=interpret,
    )
    return operands, options, unbatched


def _shapes(q: Any, k: Any, v: Any) -> str:
    return ", ".join(
        f"{name} {x.dtype}{list(x.shape)}"
        for name, x in zip("qkv", (q, k, v), strict=True)
    )


def _check_qkv(q: Any, k: Any, v: Any) -> None:
    came = f"got {_shapes(q, k, v)}"
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)):
        raise ValueError(
            "q, k, v must be [B, T, H, D], [B, S, K, D] and [B, S, K, E], or all "
            f"without B; {came}"
        )
    if any(x.dtype.name not in _FLOATS for x in (q, k, v)) or not (
        q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(f"q, k, v must share one dtype of {_FLOATS}; {came}")
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"q, k, v must agree in B, and k and v in S and K; {came}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head size D; {came}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q, k, v must not be empty; {came}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(f"head sizes D and E must be at most {MAX_HEAD_DIM}; {came}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the {q.shape[-2]} heads of q must be a multiple of the {k.shape[-2]} "
            f"heads of k and v; {came}"
        )


def concrete(x: Any) -> bool:
    """Whether the values of ``x`` can be looked at now."""
    return not isinstance(x, jax.core.Tracer)


def _between(x: np.ndarray, low: int, high: int) -> bool:
    # With numpy: inside jit, jax.numpy would make a tracer even of a constant.
    return bool(((x >= low) & (x <= high)).all())


def _finite(name: str, value: Any) -> float:
    if not concrete(value):
        raise ValueError(f"{name} must be a number known when tracing, got a tracer")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _bias(bias: Any, b: int, h: int, s: int, real: Any) -> tuple[float, Any]:
    if bias is None:
        return -math.log(s), None
    if isinstance(bias, (int, float, np.integer, np.floating)):
        return _finite("bias", bias), None
    bias = jnp.asarray(bias)
    if bias.shape not in ((), (h,), (b, h)) or not jnp.issubdtype(
        bias.dtype, jnp.floating
    ):
        raise ValueError(
            "bias is the offset of the sigmoid: None, a number, or a float array of "
            f"shape [], [H] = [{h}] or [B, H] = [{b}, {h}]; got {bias.dtype}"
            f"{list(bias.shape)}. Pass additive logits as logit_bias "
            "(jax.nn.dot_product_attention calls those `bias`)"
        )
    shape = (1,) * (2 - bias.ndim) + bias.shape
    return 0.0, jnp.broadcast_to(bias.reshape(shape).astype(real), (b, h))


def _window(causal: bool, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        left, right = None, None
    elif isinstance(window, tuple) and len(window) == 2:
        left, right = window
    else:
        left, right = window, window
    for side in (left, right):
        if side is not None and (
            isinstance(side, bool)
            or not isinstance(side, (int, np.integer))
            or side < 0
        ):
            raise ValueError(
                "window must be None, an integer >= 0, or a pair (left, right) of such "
                f"or None, got {window!r}"
            )
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def _integer_array(name: str, value: Any) -> Any:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {value.dtype}")
    return value.astype(jnp.int32)


def _offset(offset: Any, b: int, t: int, unbatched: bool) -> tuple[int, Any]:
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool):
        return int(offset), None
    offset = _integer_array("q_offset", offset)
    shape = offset.shape
    if unbatched and offset.ndim < 2:
        offset = offset.reshape(1, *(shape or (1,)))
    elif offset.ndim == 0:
        offset = jnp.broadcast_to(offset.reshape(1, 1), (b, 1))
    elif offset.ndim == 1:
        offset = offset[:, None]
    if offset.ndim != 2 or offset.shape[0] != b or offset.shape[1] not in (1, t):
        raise ValueError(
            f"q_offset must be an integer or integers of shape [B] = [{b}] or [B, T] = "
            f"[{b}, {t}], got shape {list(shape)}"
        )
    return 0, jnp.broadcast_to(offset, (b, t))


def _integers(name: str, value: Any, shape: tuple[int, int], unbatched: bool) -> Any:
    if value is None:
        return None
    value = _integer_array(name, value)
    came = value.shape
    if unbatched and value.ndim == 1:
        value = value[None]
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape [B, length] = {list(shape)}, got {list(came)}"
        )
    return value


def _lengths(name: str, value: Any, b: int, limit: int, unbatched: bool) -> Any:
    if value is None:
        return None
    value = _integer_array(name, value)
    came = value.shape
    if unbatched and value.ndim == 0:
        value = value[None]
    if value.shape != (b,):
        raise ValueError(f"{name} must have shape [B] = [{b}], got {list(came)}")
    if concrete(value) and not _between(np.asarray(value), 0, limit):
        raise ValueError(
            f"{name} must lie in 0 … {limit}, got {np.asarray(value).tolist()}"
        )
    return value


def _slopes(slopes: Any, b: int, h: int, real: Any) -> Any:
    if slopes is None:
        return None
    slopes = jnp.asarray(slopes)
    if slopes.shape not in ((h,), (b, h)) or not jnp.issubdtype(
        slopes.dtype, jnp.floating
    ):
        raise ValueError(
            f"alibi_slopes must be floats of shape [H] = [{h}] or [B, H] = [{b}, {h}], "
            f"got {slopes.dtype}{list(slopes.shape)}"
        )
    if concrete(slopes) and not np.isfinite(np.asarray(slopes, np.float64)).all():
        raise ValueError(
            f"alibi_slopes must be finite, got {np.asarray(slopes).tolist()}"
        )
    shape = (1,) * (2 - slopes.ndim) + slopes.shape
    return jnp.broadcast_to(slopes.reshape(shape).astype(real), (b, h))


def _broadcastable(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    if value is None:
        return None
    value = jnp.asarray(value)
    came = f"{value.dtype}{list(value.shape)}"
    if name == "mask" and value.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean (True = visible), got {came}")
    if name == "logit_bias" and not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"logit_bias must be floats, got {came}")
    padded = (1,) * (4 - value.ndim) + value.shape
    if len(padded) != 4 or any(
        n not in (1, full) for n, full in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"{name} must broadcast to [B, H, T, S] = {list(shape)}, got {came}"
        )
    return value.reshape(padded)
