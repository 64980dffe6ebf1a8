"""Correctness on the device at hand, before anything is timed.

Errors are relative: the Frobenius norm of the difference over that of the definition,
which is evaluated in float32 on the rounded inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_worker import spec_of

from diffmm_kernels.sigmoid_attention import explain_dispatch, sigmoid_attention
from diffmm_kernels.sigmoid_attention.activation import (
    LOG2_E,
    POLYNOMIAL_4,
    POLYNOMIAL_6,
    exact_sigmoid,
    polynomial_sigmoid,
    tanh_sigmoid,
)
from diffmm_kernels.sigmoid_attention.decode import sigmoid_decode
from diffmm_kernels.sigmoid_attention.specs import Spec

#: Greatest errors of the output and of the gradients.
LIMITS = {
    "bfloat16": (5e-3, 1e-2),
    "float16": (1e-3, 1e-3),
    "float32": (5e-6, 5e-6),
}

#: Greatest relative errors of the sigmoid for z in [-20, 10]; None: for information.
ACTIVATION_LIMITS = {
    "degree 4": 5e-4,
    "degree 6": 3e-5,
    "exact": 1e-4,
    "tanh": None,
}

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "degree 4": lambda z: polynomial_sigmoid(z * LOG2_E, POLYNOMIAL_4),
    "degree 6": lambda z: polynomial_sigmoid(z * LOG2_E, POLYNOMIAL_6),
    "exact": exact_sigmoid,
    "tanh": lambda z: tanh_sigmoid(0.5 * z),
}


def relative_error(found: Any, wanted: Any) -> float:
    """‖found - wanted‖ / ‖wanted‖ in float32; infinite where found is not finite."""
    found, wanted = (jnp.asarray(x).astype(jnp.float32) for x in (found, wanted))
    if not bool(jnp.isfinite(found).all()):
        return float("inf")
    norm = float(jnp.linalg.norm(wanted.ravel()))
    return float(jnp.linalg.norm((found - wanted).ravel())) / max(norm, 1e-30)


def _inside_a_kernel(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``f`` of a long vector as the GPU kernels' instructions compute it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, width = 64, 128

    def kernel(z_ref: Any, p_ref: Any, tile: Any) -> None:
        here = pl.ds(jax.lax.axis_index("tile") * rows, rows)

        def load(barrier: Any) -> None:
            plgpu.copy_gmem_to_smem(z_ref.at[here], tile, barrier)
            plgpu.barrier_wait(barrier)

        pl.run_scoped(load, plgpu.Barrier())
        tile[...] = f(tile[...])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, p_ref.at[here])
        plgpu.wait_smem_to_gmem(0)

    def call(z: Any) -> Any:
        shape = (z.size // width, width)
        evaluate = plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct(shape, z.dtype),
            scratch_types=[plgpu.SMEM((rows, width), z.dtype)],
            grid=(shape[0] // rows,),
            grid_names=("tile",),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )
        return evaluate(z.reshape(shape)).reshape(-1)

    return call


def activations(points: int = 2**20) -> dict[str, Any]:
    """Greatest relative error of every form of the sigmoid, against float64.

    On a GPU the forms run inside a kernel, with its approximate instructions.
    """
    z = np.linspace(-20.0, 10.0, points, dtype=np.float32)
    exact = 1.0 / (1.0 + np.exp(-z.astype(np.float64)))
    cuda = jax.default_backend() == "gpu"
    figures: dict[str, Any] = {}
    for name, f in _ACTIVATIONS.items():
        found = jax.jit(_inside_a_kernel(f) if cuda else f)(jnp.asarray(z))
        signed = np.asarray(found, np.float64) / exact - 1
        bands = {
            "max": np.abs(signed).max(),
            "below_-8": np.abs(signed[z < -8]).max(),
            # What a whole row is off by at p = 1 / 4096, if nothing cancels.
            "bias_at_-8.3": signed[np.abs(z + 8.318) < 0.5].mean(),
        }
        limit = ACTIVATION_LIMITS[name]
        figures[name] = {key: float(value) for key, value in bands.items()}
        figures[name]["ok"] = limit is None or float(bands["max"]) <= limit
    return figures


def row_mass(n: int, precision: str = "default") -> dict[str, Any]:
    """Error of the sums of weights, n keys of normal logits: v = 1, output float32."""
    rows, heads, size = 128, 2, 64
    rng = np.random.default_rng(n)
    q, k = (
        rng.standard_normal((1, m, heads, size), np.float32).astype(jnp.bfloat16)
        for m in (rows, n)
    )
    v = np.ones((1, n, heads, size), jnp.bfloat16)
    keywords = {"out_dtype": "float32", "precision": precision}
    found = np.asarray(sigmoid_attention(q, k, v, **keywords))[0, :, :, 0]
    wanted = np.zeros((rows, heads))
    for h in range(heads):
        s = q[0, :, h].astype(np.float64) @ k[0, :, h].astype(np.float64).T
        wanted[:, h] = (1.0 / (1.0 + np.exp(-(s * size**-0.5 - np.log(n))))).sum(1)
    error = float(np.abs(found / wanted - 1).max())
    return {
        "error": error,
        "implementation": explain_dispatch(q, k, v, **keywords).name,
        "ok": error <= 5e-4 if precision == "default" else True,
    }


def _poisoned(like: Any) -> None:
    """Leaves NaN in memory that the allocator hands out next."""
    poison = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(like)]
    jax.block_until_ready(poison)
    for array in poison:
        array.delete()


def check(
    spec: dict[str, Any],
    implementation: str | None = None,
    precision: str = "default",
    deterministic: bool = False,
    gradients: bool = True,
) -> dict[str, Any]:
    """Output and gradients of one case against the definition, each twice."""
    case = spec_of(spec)
    q, k, v, do = (jnp.asarray(x) for x in case.arrays())
    keywords = {
        **case.arguments(),
        "precision": precision,
        "deterministic": deterministic,
        "implementation": implementation,
    }

    def both(q: Any, k: Any, v: Any, do: Any, **changes: Any) -> tuple[Any, ...]:
        def f(*x: Any) -> Any:
            return sigmoid_attention(*x, **{**keywords, **changes})

        if not gradients:
            return (f(q, k, v),)
        o, pull = jax.vjp(f, q, k, v)
        return (o, *pull(do))

    run = jax.jit(both)
    first = run(q, k, v, do)
    _poisoned(first)
    second = run(q, k, v, do)
    exact = {
        "implementation": "reference",
        "precision": "default",
        "deterministic": False,
    }
    wanted = jax.jit(lambda *x: both(*x, **exact))(
        *(x.astype(jnp.float32) for x in (q, k, v, do))
    )
    names = ("o", "dq", "dk", "dv")
    errors = {
        name: max(relative_error(a, c), relative_error(b, c))
        for name, a, b, c in zip(names, first, second, wanted, strict=False)
    }
    same = [bool(jnp.array_equal(a, b)) for a, b in zip(first, second, strict=True)]
    limits = LIMITS[case.dtype]
    ok = all(e <= limits[name != "o"] for name, e in errors.items())
    if precision == "fast":
        ok = all(np.isfinite(list(errors.values())))  # a matter of measurement
    if deterministic:
        ok &= all(same)
    choice = explain_dispatch(q, k, v, **keywords)
    return {
        "errors": errors,
        "bitwise_equal": all(same),
        "implementation": choice.name,
        "reasons": list(choice.reasons),
        "ok": bool(ok and same[0]),
    }


def invariants(
    spec: dict[str, Any], implementation: str | None = None
) -> dict[str, Any]:
    """What holds for sigmoid attention without any reference.

    The weights of q with bias b and of -q with -b add up to one; keys add; a bias of
    ±1000 keeps all or nothing; equal logits average; the order of keys is free.
    """
    case = spec_of(spec)
    q, k, v, _ = (jnp.asarray(x) for x in case.arrays())
    limit = LIMITS[case.dtype][0]
    bias = case.bias

    def f(q: Any, k: Any, v: Any, b: float, **keywords: Any) -> Any:
        options = {"implementation": implementation, "out_dtype": "float32"}
        return sigmoid_attention(q, k, v, bias=b, **options, **keywords)

    def total(v: Any) -> Any:
        summed = v.astype(jnp.float32).sum(1, keepdims=True)
        summed = jnp.repeat(summed, case.group_size, axis=2)
        return jnp.broadcast_to(summed, (*q.shape[:3], v.shape[-1]))

    order = np.random.default_rng(0).permutation(case.kv_length)
    half = case.kv_length // 2
    plain = f(q, k, v, bias)
    parts = f(q, k[:, :half], v[:, :half], bias) + f(q, k[:, half:], v[:, half:], bias)
    n = case.kv_length
    errors = {
        "complement": relative_error(plain + f(-q, k, v, -bias), total(v)),
        "additivity": relative_error(parts, plain),
        "all": relative_error(f(q, k, v, 1000.0), total(v)),
        "nothing": float(jnp.abs(f(q, k, v, -1000.0)).max()),
        "average": relative_error(
            f(jnp.zeros_like(q), k, v, -np.log(n)), total(v) / (n + 1)
        ),
        "permutation": relative_error(f(q, k[:, order], v[:, order], bias), plain),
        "window": relative_error(
            f(q, k, v, bias, window=(None, 0)), f(q, k, v, bias, causal=True)
        ),
    }
    return {"errors": errors, "ok": all(e <= limit for e in errors.values())}


def check_decode(batch: int = 2, length: int = 300) -> dict[str, Any]:
    """A step of generation equals the last row of the whole call."""
    from diffmm_kernels.sigmoid_attention.specs import decode

    case = decode(batch, length).replace(heads=8, kv_heads=2)
    q, k, v, _ = (jnp.asarray(x) for x in case.arrays())
    lengths = jnp.asarray([length - 7 * i for i in range(batch)], jnp.int32)
    found = sigmoid_decode(q, k, v, lengths, bias=case.bias)
    wanted = sigmoid_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)),
        bias=case.bias,
        kv_lengths=lengths,
        implementation="reference",
    )
    error = relative_error(found, wanted)
    return {"errors": {"o": error}, "ok": error <= LIMITS[case.dtype][0]}


def _scores(spec: Spec, q: Any, k: Any, slopes: Any, distance: Any) -> Any:
    """float32 ``[H, t, s]`` for some queries ``[t, H, D]`` and keys ``[s, H, D]``."""
    s = _product("thd,shd->hts", q, k) * spec.head_dim**-0.5
    if slopes is not None:
        s = s - slopes[:, None, None] * distance[None].astype(np.float32)
    return s


def _seen(spec: Spec) -> Callable[[Any, Any], np.ndarray]:
    """Which of some keys each of some queries of the first batch row sees."""
    start, end = spec.intervals()
    if spec.kv_lengths is not None:
        end = np.minimum(end, spec.kv_lengths[0])
    return lambda rows, keys: (start[rows, None] <= keys) & (keys < end[rows, None])


def row_error(spec: Spec, q: Any, k: Any, v: Any, o: Any, *, softmax: bool) -> float:
    """Error of the last rows of the first batch row, at the size that is timed."""
    rows = np.arange(spec.q_length)[-4:]
    keys = np.arange(spec.kv_length)
    seen = _seen(spec)(rows, keys)
    slopes = None if softmax else spec.arguments().get("alibi_slopes")
    distance = np.abs(rows[:, None] + spec.q_offset - keys)

    @jax.jit
    def wanted(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        k, v = (jnp.repeat(x, spec.group_size, axis=1) for x in (k, v))
        s = _scores(spec, q, k, slopes, distance)
        if softmax:
            p = jax.nn.softmax(jnp.where(seen[None], s, -1e30), axis=-1)
        else:
            p = jnp.where(seen[None], jax.nn.sigmoid(s + spec.bias), 0.0)
        return _product("hts,she->the", p, v)

    return relative_error(o[0, rows], wanted(q[0, rows], k[0], v[0]))


def gradient_row_error(
    spec: Spec, q: Any, k: Any, v: Any, do: Any, dq: Any, dk: Any, dv: Any
) -> float:
    """Greatest error of the last rows of dq and of the last keys of dk and dv."""
    slopes = spec.arguments().get("alibi_slopes")
    group = spec.group_size

    @functools.partial(jax.jit, static_argnames="which")
    def wanted(q: Any, k: Any, v: Any, do: Any, which: str) -> Any:
        rows, keys = np.arange(spec.q_length), np.arange(spec.kv_length)
        if which == "dq":
            rows = rows[-4:]
            q, do = q[rows], do[rows]
        else:
            keys = keys[-4:]
            k, v = k[keys], v[keys]
        q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
        k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
        distance = np.abs(rows[:, None] + spec.q_offset - keys)
        s = _scores(spec, q, k, slopes, distance)
        seen = _seen(spec)(rows, keys)[None]
        p = jnp.where(seen, jax.nn.sigmoid(s + spec.bias), 0.0)
        dp = _product("the,she->hts", do, v)
        ds = dp * p * (1 - p) * spec.head_dim**-0.5
        if which == "dq":
            return _product("hts,shd->thd", ds, k)
        found = (
            _product("hts,thd->shd", ds, q)
            if which == "dk"
            else _product("hts,the->she", p, do)
        )
        return found.reshape(len(keys), spec.kv_heads, group, -1).sum(2)

    arrays = [x[0] for x in (q, k, v, do)]
    found = {"dq": dq, "dk": dk, "dv": dv}
    return max(
        relative_error(x[0, -4:], wanted(*arrays, which=name))
        for name, x in found.items()
    )


def _product(subscripts: str, a: Any, b: Any) -> Any:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
