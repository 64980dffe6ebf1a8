"""Attention over a mesh equals attention on one device, gradients included."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffmm_kernels.sigmoid_attention import save_attention_output, sigmoid_attention
from diffmm_kernels.sigmoid_attention.sharded import sigmoid_attention_sharded

B, T, S, H, K, D, E = 2, 16, 24, 4, 2, 8, 6

rng = np.random.default_rng(0)
q = rng.standard_normal((B, T, H, D)).astype(np.float32)
k = rng.standard_normal((B, S, K, D)).astype(np.float32)
v = rng.standard_normal((B, S, K, E)).astype(np.float32)
do = rng.standard_normal((B, T, H, E)).astype(np.float32)
bias = (rng.standard_normal(H) - 3).astype(np.float32)
logit_bias = rng.standard_normal((1, H, 1, S)).astype(np.float32)
ids = np.sort(rng.integers(0, 3, (B, S)), axis=1)

CASES = {
    "full": {},
    "causal": {
        "causal": True,
        "q_offset": S - T,
        "alibi_slopes": (2.0 ** -np.arange(1, H + 1)).astype(np.float32),
    },
    "everything": {
        "window": (9, 2),
        "q_offset": np.array([3, 5]),
        "q_segment_ids": ids[:, -T:],
        "kv_segment_ids": ids,
        "q_lengths": np.array([T, 9]),
        "kv_lengths": np.array([S, 13]),
        "mask": rng.random((B, 1, T, S)) < 0.8,
    },
}


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes)
    )


@functools.cache
def on_one_device(case):
    return value_and_gradients(sigmoid_attention, "reference", case)


def value_and_gradients(f, implementation, case, **arguments):
    def loss(q, k, v, bias, logit_bias):
        o = f(
            *(q, k, v),
            bias=bias,
            logit_bias=logit_bias,
            implementation=implementation,
            **CASES[case],
            **arguments,
        )
        return (o * do).sum(), o

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
    gradients, o = gradient(q, k, v, bias, logit_bias)
    return o, *gradients


@pytest.mark.parametrize(
    ("case", "axes", "sizes", "exchange", "implementation"),
    [
        ("everything", {"sequence": "x"}, {"x": 4}, "sums", "xla"),
        ("everything", {"sequence": "x"}, {"x": 4}, "keys", "reference"),
        # An axis of the mesh that nothing is spread over.
        ("causal", {"batch": "x"}, {"x": 2, "y": 2}, "sums", "xla"),
        ("full", {"sequence": ("x", "y")}, {"x": 2, "y": 2}, "keys", "reference"),
        # More devices than heads of keys.
        ("everything", {"heads": "x"}, {"x": 4}, "sums", "reference"),
        ("causal", {"heads": "y", "sequence": "x"}, {"x": 2, "y": 2}, "keys", "xla"),
    ],
)
def test_equals_one_device(case, axes, sizes, exchange, implementation):
    spread = value_and_gradients(
        sigmoid_attention_sharded,
        implementation,
        case,
        mesh=mesh_of(**sizes),
        axes=axes,
        exchange=exchange,
    )
    for got, want in zip(spread, on_one_device(case), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_bias_means_the_global_length():
    o = sigmoid_attention_sharded(
        *(q, k, v), bias=-math.log(S), mesh=mesh_of(x=4), axes={"sequence": "x"}
    )
    want = sigmoid_attention(q, k, v, implementation="reference")
    np.testing.assert_allclose(o, want, atol=1e-6)
    assert o.sharding.shard_shape(o.shape) == (B, T // 4, H, E)


def passes(jaxpr):
    """How often an implementation is called, forward or backward."""
    return sum(
        equation.primitive.name == "custom_vmap_call"
        or sum(passes(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


@pytest.mark.parametrize("exchange", ["sums", "keys"])
def test_backward_repeats_communication_and_not_the_forward_kernel(exchange):
    def loss(q):
        o = sigmoid_attention_sharded(
            *(q, k, v),
            bias=-2.0,
            mesh=mesh_of(x=4),
            axes={"sequence": "x"},
            exchange=exchange,
            implementation="xla",
        )
        return (o * do).sum()

    # Forward and backward: each once for each part of the keys that a device meets.
    expected = 2 * (1 if exchange == "sums" else 4)
    assert passes(jax.make_jaxpr(jax.grad(loss))(q).jaxpr) == expected
    saved = jax.checkpoint(loss, policy=save_attention_output)
    assert passes(jax.make_jaxpr(jax.grad(saved))(q).jaxpr) == expected


def test_explicit_meshes_and_bfloat16():
    mesh = mesh_of(AxisType.Explicit, x=2, y=2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("x"))
        halves = (jax.device_put(jnp.asarray(x, jnp.bfloat16), rows) for x in (q, k, v))
        o = jax.jit(
            lambda *x: sigmoid_attention_sharded(
                *x, bias=-2.0, mesh=mesh, axes={"batch": "x", "sequence": "y"}
            )
        )(*halves)
    assert o.dtype == jnp.bfloat16
    want = sigmoid_attention(q, k, v, bias=-2.0, implementation="reference")
    error = np.linalg.norm(np.asarray(o, np.float32) - want)
    assert error < 5e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "bias must be given"),
        ({"exchange": "ring"}, "exchange must be one of"),
        ({"mesh": None}, "mesh must be"),
        ({"axes": {"tokens": "x"}}, "axes must map some of"),
        ({"axes": "x"}, "axes must map some of"),
        ({"axes": {"heads": "z"}}, "axes must name axes of the mesh"),
        ({"axes": {"heads": "x", "batch": "x"}}, "each once"),
        ({"axes": {"batch": "x"}}, "4 devices, which must divide B=2"),
        ({"q": q[:, :14], "axes": {"sequence": "x"}}, "must divide T=14 and S=24"),
        ({"q": q[:, :, :2], "axes": {"heads": "x"}}, "must divide H=2"),
        (
            {
                **dict(zip("qkv", (np.ones((1, 4, 12, 8)),) * 3, strict=True)),
                **{x: np.ones((1, 4, 6, 8)) for x in "kv"},
                "axes": {"heads": "x"},
            },
            "the 6 heads of k and v",
        ),
        ({"window": -1}, "window"),
        ({"kv_lengths": np.array([-1, 2])}, "kv_lengths"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        **{"q": q, "k": k, "v": v, "bias": -2.0, "mesh": mesh_of(x=4)},
        **{"axes": {"sequence": "x"}, **change},
    }
    with pytest.raises(ValueError, match=message):
        sigmoid_attention_sharded(**arguments)


def test_what_an_implementation_refuses_stays_refused():
    with pytest.raises(NotImplementedError, match="interpret"):
        sigmoid_attention_sharded(
            *(q, k, v),
            bias=-2.0,
            mesh=mesh_of(x=4),
            axes={"sequence": "x"},
            implementation="xla",
            interpret=True,
        )
