"""Packed sequences equal separate calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm_kernels.sigmoid_attention import sigmoid_attention
from diffmm_kernels.sigmoid_attention.varlen import sigmoid_attention_varlen

H, K, D, E = 4, 2, 8, 6
LENGTHS_Q = (3, 0, 5, 4)
LENGTHS_KV = (6, 2, 5, 0)
TOTAL_Q, TOTAL_KV = 15, 16  # with tokens after the last sequence
SLOPES = 2.0 ** -np.arange(1, H + 1)

rng = np.random.default_rng(0)
q = rng.standard_normal((TOTAL_Q, H, D)).astype(np.float32)
k = rng.standard_normal((TOTAL_KV, K, D)).astype(np.float32)
v = rng.standard_normal((TOTAL_KV, K, E)).astype(np.float32)
do = rng.standard_normal((TOTAL_Q, H, E)).astype(np.float32)


def offsets(lengths):
    return jnp.array([0, *np.cumsum(lengths)], jnp.int32)


CU_Q, CU_KV = offsets(LENGTHS_Q), offsets(LENGTHS_KV)
BOTTOM_RIGHT = np.diff(CU_KV) - np.diff(CU_Q)


def separately(q, k, v, q_offset=0, **arguments):
    """One call of the definition for each sequence."""
    o = np.zeros((TOTAL_Q, H, E), np.float32)
    for n, (start, start_kv) in enumerate(zip(CU_Q[:-1], CU_KV[:-1], strict=True)):
        rows = slice(int(start), int(start) + LENGTHS_Q[n])
        keys = slice(int(start_kv), int(start_kv) + LENGTHS_KV[n])
        if 0 in (LENGTHS_Q[n], LENGTHS_KV[n]):
            continue
        o[rows] = sigmoid_attention(
            q[rows],
            k[keys],
            v[keys],
            q_offset=int(np.broadcast_to(q_offset, len(LENGTHS_Q))[n]),
            implementation="reference",
            **arguments,
        )
    return o


CASES = {
    "full": {},
    "causal, first aligned": {"causal": True},
    "causal, last aligned": {"causal": True, "q_offset": BOTTOM_RIGHT},
    "window": {"window": (2, 1), "q_offset": 1},
    "alibi": {"causal": True, "q_offset": BOTTOM_RIGHT, "alibi_slopes": SLOPES},
}


@pytest.mark.parametrize(
    ("case", "implementation"),
    [*((case, "xla") for case in CASES), ("alibi", "reference")],
)
def test_packing_equals_separate_calls(case, implementation):
    arguments = {"bias": -2.0, **CASES[case]}
    packed = functools.partial(
        sigmoid_attention_varlen, implementation=implementation, **arguments
    )
    o = jax.jit(packed)(q, k, v, CU_Q, CU_KV)
    np.testing.assert_allclose(o, separately(q, k, v, **arguments), atol=1e-6)
    assert (np.asarray(o)[sum(LENGTHS_Q) :] == 0).all(), "tokens of no sequence"


def test_gradients_stay_inside_their_sequence():
    def loss(q, k, v, implementation):
        o = sigmoid_attention_varlen(
            *(q, k, v, CU_Q, CU_KV),
            bias=-2.0,
            causal=True,
            q_offset=BOTTOM_RIGHT,
            implementation=implementation,
        )
        return (o * do).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    for got, want in zip(
        gradient(q, k, v, "xla"), gradient(q, k, v, "reference"), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # The second sequence has keys and no queries, the last queries and no keys.
    dq, dk, _ = gradient(q, k, v, "xla")
    assert (np.asarray(dk)[6:8] == 0).all()
    assert (np.asarray(dq)[8:] == 0).all()


def test_the_same_tokens_packed_otherwise_give_the_same():
    """Order of the sequences, and what lies after them, do not matter."""
    # The third sequence first, then the first; the others are left out.
    swap_q = np.r_[3:8, 0:3, 8:15]
    swap_kv = np.r_[8:13, 0:6, 6:8, 13:16]

    @jax.jit
    def call(*arguments):
        return sigmoid_attention_varlen(*arguments, bias=-2.0, causal=True)

    plain = np.asarray(call(q, k, v, CU_Q, CU_KV))
    cu = offsets((5, 3, 0, 0)), offsets((5, 6, 0, 0))
    swapped = call(q[swap_q], k[swap_kv], v[swap_kv], *cu)
    np.testing.assert_allclose(swapped[:8], plain[swap_q[:8]], atol=1e-6)
    assert (np.asarray(swapped)[8:] == 0).all()
    garbage = np.where(np.arange(TOTAL_KV) >= sum(LENGTHS_KV), 1e9, 0.0)[:, None, None]
    dirty = call(q, k + garbage.astype(k.dtype), v, CU_Q, CU_KV)
    np.testing.assert_array_equal(dirty, plain)


def test_mapped_and_traced_offsets():
    several = jnp.stack([CU_Q, offsets((1, 7, 0, 2))])

    @jax.jit
    def call(cu):
        return sigmoid_attention_varlen(q, k, v, cu, CU_KV, bias=-2.0, causal=True)

    for got, cu in zip(jax.jit(jax.vmap(call))(several), several, strict=True):
        np.testing.assert_allclose(got, call(cu), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": q[None]}, r"q, k, v must be \[total_q"),
        ({"q": q[:, :3]}, "multiple"),
        ({"q": q.astype(np.int32)}, "one dtype"),
        ({"bias": None}, "bias must be given"),
        ({"bias": np.zeros((2, H), np.float32)}, "bias is the offset"),
        ({"cu_seqlens_q": np.array([0.0, 3.0])}, "cu_seqlens_q must be integers"),
        ({"cu_seqlens_q": np.array([0])}, r"cu_seqlens_q must have shape \[N \+ 1\]"),
        ({"cu_seqlens_q": np.array([[0, 1]])}, "cu_seqlens_q must have shape"),
        ({"cu_seqlens_q": np.array([1, 2, 2, 3, 4])}, "cu_seqlens_q must start at 0"),
        ({"cu_seqlens_kv": np.array([0, 5, 4, 6, 7])}, "never decrease"),
        ({"cu_seqlens_kv": np.array([0, 5, 6, 6, 17])}, "end at 16 at most"),
        ({"cu_seqlens_kv": np.array([0, 5])}, "same length"),
        ({"q_offset": np.array([1, 2])}, r"q_offset must be an integer or .*\[4\]"),
        ({"q_offset": 0.5}, "q_offset must be integers"),
        ({"window": -1}, "window"),
        ({"alibi_slopes": np.full(H, np.nan)}, "finite"),
        ({"implementation": "cudnn"}, "implementation"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        **{"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_kv": CU_KV},
        **{"bias": -2.0, **change},
    }
    with pytest.raises(ValueError, match=message):
        sigmoid_attention_varlen(**arguments)


def test_bias_has_no_default():
    with pytest.raises(TypeError, match="bias"):
        sigmoid_attention_varlen(q, k, v, CU_Q, CU_KV)
