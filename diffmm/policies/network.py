"""The policy network: confidences, mask bits and time in, one logit per position out.

Letters: B rows, L positions, H width, P inputs per position.

A pre-norm transformer without absolute positions, so that one set of parameters serves
any length. It sees how sure the denoiser is, what is still masked and how much of the
budget is spent, and never a token: parameters carry over to other vocabularies.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106; adaptive layer norm: Peebles and Xie, "Scalable Diffusion Models with
  Transformers", arXiv 2212.09748.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Array, ArrayLike, Params

# Of affine layer norms, as in the published network.
_EPSILON = 1e-5
_ROPE_BASE = 10_000.0
# What a logit of attention becomes where nothing may be seen.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape of the network; the defaults are those of the published experiments.

    Attributes:
      width: H.
      num_heads: attention heads; H / num_heads is even.
      mlp_hidden: width of the feed-forward layer.
      num_blocks: transformer blocks.
      time_width: features of the time, even.
      num_inputs: P, the largest probabilities of each position, descending; 1 takes
        the confidence alone.
      time_period: slowest period of the time features. The published 1 makes all
        frequencies equal; 10000 gives a range of them.
      smart_init: initial value of the output's bias. −2 starts with σ(−2) = 0.12 of
        the positions per step: slow, hence often right, hence with some reward.
        ``None`` draws it like other biases and AdaLN too.
      full_context: the policy sees all generated positions, and not those of the
        current block alone.
      exact_time: time features stay float32; the published code rounds them to
        bfloat16.
      probabilities: the inputs are probabilities, and are checked to be. ``False``
        accepts any features of the denoiser, such as its last hidden state.
    """

    width: int = 128
    num_heads: int = 2
    mlp_hidden: int = 512
    num_blocks: int = 1
    time_width: int = 128
    num_inputs: int = 1
    time_period: float = 1.0
    smart_init: float | None = -2.0
    full_context: bool = True
    exact_time: bool = True
    probabilities: bool = True

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        for name in ("width", "num_heads", "mlp_hidden", "num_blocks", "num_inputs"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ValueError(
                f"num_heads must divide the width, {self.width}, into heads of even "
                f"size, got {self.num_heads!r}"
            )
        if self.time_width < 2 or self.time_width % 2:
            raise ValueError(
                f"time_width must be even and at least 2, got {self.time_width!r}"
            )
        if not (math.isfinite(self.time_period) and self.time_period > 0):
            raise ValueError(
                f"time_period must be finite and above 0, got {self.time_period!r}"
            )
        if self.smart_init is not None and not math.isfinite(self.smart_init):
            raise ValueError(
                f"smart_init must be finite or None, got {self.smart_init!r}"
            )


@functools.partial(jax.jit, static_argnames=("config",))
def init(key: Array, config: PolicyConfig) -> Params:
    """Draws parameters.

    Linear layers have weights and biases uniform in ±1/√fan_in, the mask embedding is
    N(0, 1), layer norms start at (1, 0). With ``smart_init`` the AdaLN layer is zero
    and the output's bias constant: at first the logits depend on neither mask nor time.

    Args:
      key: of randomness.
      config: the shape.

    Returns:
      A tree of dictionaries with float32 leaves, 331,265 numbers by default.

    >>> params = init(jax.random.key(0), PolicyConfig())
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    331265
    """
    width, hidden = config.width, config.mlp_hidden
    uniform_key, mask_key = jax.random.split(key)
    # One draw for all leaves: dozens of small ones would take seconds to compile.
    uniform = jax.random.uniform(
        uniform_key, (_num_linear(config),), minval=-1.0, maxval=1.0
    )
    used = 0

    def take(shape: tuple[int, ...], bound: float) -> Array:
        nonlocal used
        used += math.prod(shape)
        return bound * uniform[used - math.prod(shape) : used].reshape(shape)

    def linear(fan_in: int, fan_out: int) -> dict[str, Array]:
        bound = fan_in**-0.5
        return {
            "weight": take((fan_in, fan_out), bound),
            "bias": take((fan_out,), bound),
        }

    def norm() -> dict[str, Array]:
        return {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}

    def block() -> dict[str, Any]:
        adaln = linear(width, 6 * width)
        if config.smart_init is not None:
            adaln = jax.tree.map(jnp.zeros_like, adaln)
        return {
            "adaln": adaln,
            "norm1": norm(),
            "query": linear(width, width),
            "key": linear(width, width),
            "value": linear(width, width),
            "out": linear(width, width),
            "norm2": norm(),
            "mlp_in": linear(width, hidden),
            "mlp_out": linear(hidden, width),
        }

    params: dict[str, Any] = {
        "time_in": linear(config.time_width, width),
        "time_out": linear(width, width),
        "inputs": linear(config.num_inputs, width),
        "mask": jax.random.normal(mask_key, (2, width)),
        "final_norm": norm(),
        "logit": linear(width, 1),
    }
    if config.smart_init is not None:
        params["logit"]["bias"] = jnp.full((1,), config.smart_init, jnp.float32)
    blocks = {f"block_{index}": block() for index in range(config.num_blocks)}
    return {**params, **blocks}


def _num_linear(config: PolicyConfig) -> int:
    """Numbers in all linear layers."""
    width, hidden = config.width, config.mlp_hidden
    ends = width * (config.time_width + 1 + width + 1 + config.num_inputs + 1 + 1) + 1
    mixing = 10 * width * (width + 1)  # adaln 6, query, key, value, out
    return ends + config.num_blocks * (mixing + width * (2 * hidden + 1) + hidden)


def apply(
    params: Params,
    config: PolicyConfig,
    masked: Array,
    confidence: Array,
    time: Array,
    *,
    exists: Array | None = None,
) -> Array:
    """Logits of unmasking each position now.

    With condition g = Emb(m) + MLP(cos t, sin t) per position, and shifts, scales and
    gates (1 + a) that are linear in g, per block:
    ``x += (1 + a₁)·Attention(LN(x)·(1 + g₁) + b₁)``,
    ``x += (1 + a₂)·MLP(LN(x)·(1 + g₂) + b₂)``.

    Args:
      params: of `init`.
      config: the same as there.
      masked: bool ``[B, L]``, still masked.
      confidence: float32 ``[B, L]``, or ``[B, L, P]``: the P largest probabilities.
      time: float32 ``[B]`` or ``[B, 1]``, forwards used / length, in [0, 1).
      exists: bool ``[B, L]``, positions that others may see; filling is false and
        changes nothing. All by default.

    Returns:
      float32 ``[B, L]``.

    Raises:
      ValueError: if shapes disagree; outside ``jit`` also for probabilities that are
        none.
    """
    masked, confidence, time = _checked_inputs(config, masked, confidence, time)
    rows, length = masked.shape
    if exists is None:
        exists = jnp.ones((rows, length), bool)
    elif exists.shape != masked.shape:
        raise ValueError(
            f"exists must have the shape of masked, {masked.shape}, got {exists.shape}"
        )
    embedded = _linear(params["time_in"], _time_features(config, time))
    embedded = _linear(params["time_out"], jax.nn.silu(embedded))
    # Per row the condition takes two values only, for masked positions and for others:
    # AdaLN, a third of the arithmetic if done per position, is done per value.
    condition = params["mask"][None] + embedded[:, None]
    angles = _rotary_angles(length, config.width // config.num_heads)
    x = _linear(params["inputs"], confidence)
    for index in range(config.num_blocks):
        block = params[f"block_{index}"]
        adaln = _linear(block["adaln"], condition)
        x = _block(config, block, x, masked, adaln, angles, exists)
    x = _layer_norm(params["final_norm"], x)
    return _linear(params["logit"], x)[..., 0]


def _block(
    config: PolicyConfig,
    block: Params,
    x: Array,
    masked: Array,
    adaln: Array,
    angles: tuple[Array, Array],
    exists: Array,
) -> Array:
    def modulation(index: int) -> Array:
        part = adaln[..., index * config.width : (index + 1) * config.width]
        return jnp.where(masked[..., None], part[:, None, 1], part[:, None, 0])

    def modulated(name: str, first: int) -> Array:
        normed = _layer_norm(block[name], x)
        return normed * (1 + modulation(first)) + modulation(first + 1)

    x = x + (1 + modulation(2)) * _attention(
        config, block, modulated("norm1", 0), angles, exists
    )
    hidden = _linear(block["mlp_in"], modulated("norm2", 3))
    hidden = 0.5 * hidden * (1 + jax.lax.erf(hidden * math.sqrt(0.5)))
    return x + (1 + modulation(5)) * _linear(block["mlp_out"], hidden)


def _attention(
    config: PolicyConfig,
    block: Params,
    x: Array,
    angles: tuple[Array, Array],
    exists: Array,
) -> Array:
    rows, length, width = x.shape
    size = width // config.num_heads

    def heads(name: str) -> Array:
        return _linear(block[name], x).reshape(rows, length, -1, size)

    query, key = _rotate(heads("query"), angles), _rotate(heads("key"), angles)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest")
    scores = jnp.where(exists[:, None, None], scores * size**-0.5, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, heads("value"), precision="highest")
    return _linear(block["out"], mixed.reshape(rows, length, width))


def _linear(layer: Params, x: Array) -> Array:
    # Full float32 on accelerators too: a rollout and its replay, which differ in shape,
    # must agree on the likelihood.
    fan_in, fan_out = layer["weight"].shape
    # Two axes: products over more, in gradients, are slower on CPUs.
    y = jnp.matmul(x.reshape(-1, fan_in), layer["weight"], precision="highest")
    y = y + jnp.broadcast_to(layer["bias"], y.shape)
    return y.reshape(*x.shape[:-1], fan_out)


def _layer_norm(layer: Params, x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + _EPSILON)
    scale = jnp.broadcast_to(layer["scale"], x.shape)
    return normed * scale + jnp.broadcast_to(layer["bias"], x.shape)


def _time_features(config: PolicyConfig, time: Array) -> Array:
    half = config.time_width // 2
    exponents = -np.arange(half) / half
    frequencies = np.asarray(config.time_period**exponents, np.float32)
    angles = time[:, None] * frequencies[None]
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    if config.exact_time:
        return features
    return features.astype(jnp.bfloat16).astype(jnp.float32)


def _rotary_angles(length: int, size: int) -> tuple[Array, Array]:
    """Cosine and sine ``[1, L, 1, size/2]`` of positions 0 … L−1."""
    frequencies = _ROPE_BASE ** (-np.arange(0, size, 2) / size)
    angles = np.arange(length)[:, None] * frequencies[None]
    angles = angles[None, :, None].astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates pairs of features; which ones are pairs does not matter to products."""
    cos, sin = angles
    even, odd = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1)


def _checked_inputs(
    config: PolicyConfig, masked: ArrayLike, confidence: ArrayLike, time: ArrayLike
) -> tuple[Array, Array, Array]:
    if np.ndim(masked) != 2:
        raise ValueError(f"masked must have shape [B, L], got {np.shape(masked)}")
    rows, length = np.shape(masked)
    shape = (rows, length, config.num_inputs)
    if np.shape(confidence) == (rows, length) and config.num_inputs == 1:
        confidence = confidence[..., None]
    if np.shape(confidence) != shape:
        raise ValueError(
            f"confidence must have shape {shape} next to masked {(rows, length)}, got "
            f"{np.shape(confidence)}"
        )
    if np.shape(time) not in ((rows,), (rows, 1)):
        raise ValueError(
            f"time must have shape {(rows,)} or {(rows, 1)}, got {np.shape(time)}"
        )
    if not isinstance(confidence, jax.core.Tracer):
        values = np.asarray(confidence)
        low, high = (0.0, 1.0) if config.probabilities else (-np.inf, np.inf)
        # A softmax in float32 may exceed 1 by rounding.
        inside = (values >= low) & (values <= high + 1e-5) & np.isfinite(values)
        if not inside.all():
            raise ValueError(
                f"confidence must be finite and lie in [{low}, {high}], got "
                f"{values[~inside].ravel()[0]!r}"
            )
    return (
        jnp.asarray(masked, bool),
        jnp.asarray(confidence, jnp.float32),
        jnp.asarray(time, jnp.float32).reshape(rows),
    )
