"""The JAX side of `sigmoid_attention.py`: what is timed, and how.

Times are of whole calls, the small operations before a kernel included: many calls are
queued on the device over rotating inputs and waited for once, so that starting them
costs nothing that is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import attention_checks
import jax
import jax.numpy as jnp
import numpy as np
from attention_worker import serve, spec_of

from diffmm_kernels.sigmoid_attention import (
    Config,
    Tiles,
    explain_dispatch,
    sigmoid_attention,
)
from diffmm_kernels.sigmoid_attention.decode import sigmoid_decode
from diffmm_kernels.sigmoid_attention.specs import Spec

ROTATED_SETS = 3
SAMPLE_SECONDS = 0.02
_MOST_SECONDS = 3.0
# Calls shorter than this are started several at a time.
_SHORT_SECONDS = 80e-6
_LIMIT_BYTES = 16e9

_KEYWORDS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid deterministic": {"deterministic": True},
    "sigmoid fast": {"precision": "fast"},
    "sigmoid high": {"precision": "high"},
    "sigmoid xla": {"implementation": "xla"},
}

Attention = Callable[[Any, Any, Any, dict[str, Any]], Any]


def split_arguments(spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords known when tracing, and those that are arrays."""
    static, arrays = {}, {}
    for name, value in spec.arguments().items():
        (arrays if isinstance(value, np.ndarray) else static)[name] = value
    return static, arrays


def dense_sigmoid(q: Any, k: Any, v: Any, spec: Spec) -> Any:
    """As one writes it in plain JAX: products in the input dtype, logits in float32."""
    b, t, h, d = q.shape
    grouped = q.reshape(b, t, spec.kv_heads, spec.group_size, d)
    s_BKGTS = jnp.einsum(
        "btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32
    )
    p = jax.nn.sigmoid(s_BKGTS * d**-0.5 + spec.bias)
    if spec.causal:
        key = jnp.arange(spec.kv_length)[None, :]
        seen = key <= jnp.arange(t)[:, None] + spec.q_offset
        p = jnp.where(seen[None, None, None], p, 0.0)
    o = jnp.einsum("bkgts,bske->btkge", p.astype(v.dtype), v)
    return o.reshape(b, t, h, -1)


def cudnn_softmax(q: Any, k: Any, v: Any, spec: Spec) -> Any:
    if spec.segments is not None:
        raise NotImplementedError("jax.nn.dot_product_attention has no segments")
    lengths = None if spec.kv_lengths is None else jnp.asarray(spec.kv_lengths)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=spec.causal and spec.q_length > 1,
        local_window_size=spec.window,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def tokamax_softmax(q: Any, k: Any, v: Any, spec: Spec) -> Any:
    import tokamax

    if spec.segments is not None or spec.window is not None or spec.q_length == 1:
        raise NotImplementedError("measured for full and causal attention only")
    return tokamax.dot_product_attention(
        q, k, v, is_causal=spec.causal, implementation="mosaic"
    )


def attention(side: str, spec: Spec, config: Config | None = None) -> Attention:
    """``f(q, k, v, arrays)`` of one side."""
    static, _ = split_arguments(spec)
    if side in _KEYWORDS:
        keywords = {**static, **_KEYWORDS[side], "config": config}
        if spec.q_length == 1 and side == "sigmoid":
            return lambda q, k, v, arrays: sigmoid_decode(
                q, k, v, arrays["kv_lengths"], bias=spec.bias
            )
        return lambda q, k, v, arrays: sigmoid_attention(q, k, v, **keywords, **arrays)
    plain = {
        "xla dense sigmoid": dense_sigmoid,
        "jax cudnn softmax": cudnn_softmax,
        "tokamax softmax": tokamax_softmax,
    }[side]
    return lambda q, k, v, arrays: plain(q, k, v, spec)


@functools.partial(jax.jit, static_argnums=0)
def _random(spec: Spec, seed: Any) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    shapes = spec.shapes().values()
    return tuple(
        jax.random.normal(key, shape, jnp.dtype(spec.dtype))
        for key, shape in zip(keys, shapes, strict=True)
    )


@dataclasses.dataclass
class Timed:
    """A compiled measurement: ``run(batch)`` calls attention for ``inner`` inputs."""

    run: Callable[[Any], Any]
    operands: Callable[[tuple[Any, ...]], Any]
    inner: int
    sets: int


_prepared: dict[str, Timed] = {}


def _name(spec: Spec, side: str, direction: str, tiles: Any) -> str:
    return repr((spec, side, direction, tiles))


def _build(
    spec: Spec, side: str, direction: str, tiles: dict[str, Any] | None
) -> Timed:
    config = None
    if tiles is not None:
        place = "forward" if direction == "forward" else "backward"
        config = Config(**{place: Tiles(**tiles)})
    f = attention(side, spec, config)
    arrays = jax.tree.map(jnp.asarray, split_arguments(spec)[1])

    @jax.jit
    def pull_of(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        return jax.vjp(lambda *x: f(*x, arrays), q, k, v)[1]

    def call(operands: Any) -> Any:
        if direction == "forward":
            return f(*operands)
        if direction == "backward":
            pull, do = operands
            return pull(do)
        (q, k, v, do), extra = operands
        o, pull = jax.vjp(lambda *x: f(*x, extra), q, k, v)
        return o, pull(do)

    def operands(inputs: tuple[Any, ...]) -> Any:
        q, k, v, do = inputs
        if direction == "forward":
            return q, k, v, arrays
        if direction == "backward":
            return pull_of(q, k, v, arrays), do
        return inputs, arrays

    expected = max(spec.flops(direction) / 400e12, spec.cache_bytes() / 3e12)
    inner = min(16, math.ceil(_SHORT_SECONDS / expected))
    if jax.default_backend() == "cpu":
        inner = 1
    struct = [jax.ShapeDtypeStruct(x, spec.dtype) for x in spec.shapes().values()]
    one = jax.eval_shape(operands, tuple(struct))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    sets = ROTATED_SETS if ROTATED_SETS * inner * size < _LIMIT_BYTES else 1
    compiled = jax.jit(lambda batch: [call(x) for x in batch])
    return Timed(compiled.lower([one] * inner).compile(), operands, inner, sets)


def prepare(
    spec: dict[str, Any], side: str, direction: str, tiles: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compiles what `measure` will time, while another process uses the device."""
    case = spec_of(spec)
    started = time.perf_counter()
    _prepared.clear()
    _prepared[_name(case, side, direction, tiles)] = _build(
        case, side, direction, tiles
    )
    return {"compile_seconds": time.perf_counter() - started}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def timed(call: Callable[[int], Any], samples: int) -> dict[str, float]:
    """Seconds of ``call(i)``, i counting up, when many are queued at once."""
    for i in range(ROTATED_SETS):
        jax.block_until_ready(call(i))
    started = time.perf_counter()
    jax.block_until_ready([call(i) for i in range(2)])
    estimate = (time.perf_counter() - started) / 2
    repeats = max(1, math.ceil(SAMPLE_SECONDS / estimate))
    found = []
    affordable = int(_MOST_SECONDS / (estimate * repeats))
    for _ in range(min(samples, max(3, affordable))):
        started = time.perf_counter()
        for i in range(repeats):
            last = call(i)
        jax.block_until_ready(last)
        found.append((time.perf_counter() - started) / repeats)
    return spread(found)


def _error(
    case: Spec, side: str, direction: str, inputs: tuple[Any, ...], found: Any
) -> float | None:
    """Of some rows of what was computed; None where nothing is known about them."""
    softmax = side.endswith("softmax")
    if direction == "forward":
        return attention_checks.row_error(case, *inputs[:3], found, softmax=softmax)
    if softmax:
        return None
    gradients = found if direction == "backward" else found[1]
    return attention_checks.gradient_row_error(case, *inputs, *gradients)


def measure(
    spec: dict[str, Any],
    side: str,
    direction: str,
    samples: int = 20,
    tiles: dict[str, Any] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Times one side on one case, and checks some rows of what it computes."""
    case = spec_of(spec)
    job = _prepared.pop(_name(case, side, direction, tiles), None)
    job = job or _build(case, side, direction, tiles)
    inputs = [
        [_random(case, 100 * i + j) for j in range(job.inner)] for i in range(job.sets)
    ]
    batches = [[job.operands(x) for x in batch] for batch in inputs]
    figures: dict[str, Any] = {"sets": job.sets * job.inner}
    if verify:
        error = _error(case, side, direction, inputs[0][0], job.run(batches[0])[0])
        figures.update({} if error is None else {"error": error})
    if side in _KEYWORDS and (case.q_length > 1 or side != "sigmoid"):
        choice = explain_dispatch(
            *inputs[0][0][:3], **case.arguments(), **_KEYWORDS[side]
        )
        figures["implementation"] = choice.name
        figures["reasons"] = list(choice.reasons)
    del inputs
    seconds = timed(lambda i: job.run(batches[i % job.sets]), samples)
    figures["seconds"] = {name: x / job.inner for name, x in seconds.items()}
    return figures


def ceilings(size: int = 8192, copied: int = 2**31) -> dict[str, Any]:
    """FLOP/s of a square bfloat16 product and bytes/s of a copy, read and written."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), ROTATED_SETS)
    matrices = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
    product = jax.jit(lambda a, b: a @ b)
    seconds = timed(
        lambda i: product(matrices[i % 3], matrices[(i + 1) % 3]), samples=20
    )["median"]
    source = jax.random.bits(keys[0], (copied // 4,), jnp.uint32)
    copy = jax.jit(lambda x: x ^ jnp.uint32(1))
    copy_seconds = timed(lambda i: copy(source), samples=20)["median"]
    return {
        "matmul_flops_per_second": 2 * size**3 / seconds,
        "copy_bytes_per_second": 2 * copied / copy_seconds,
    }


def environment() -> dict[str, Any]:
    """Versions and device of this process."""
    device = jax.devices()[0]
    found = {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "platform": "cuda" if device.platform == "gpu" else device.platform,
        "device_kind": device.device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    try:
        import tokamax

        found["tokamax"] = getattr(tokamax, "__version__", "unknown")
    except ImportError:
        found["tokamax"] = "not installed"
    return found


if __name__ == "__main__":
    serve(
        {
            "environment": environment,
            "ceilings": ceilings,
            "prepare": prepare,
            "measure": measure,
            "activations": attention_checks.activations,
            "row_mass": attention_checks.row_mass,
            "check": attention_checks.check,
            "check_decode": attention_checks.check_decode,
            "invariants": attention_checks.invariants,
        }
    )
