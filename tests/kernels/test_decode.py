"""A step of decoding equals rows of the full call, whatever else is in the cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from diffmm_kernels.sigmoid_attention import cache, sigmoid_attention
from diffmm_kernels.sigmoid_attention.decode import sigmoid_decode

B, S, H, K, D, E = 3, 77, 4, 2, 8, 6
T = 3
LENGTHS = np.array([77, 1, 40], np.int32)
SLOPES = (2.0 ** -np.arange(1, H + 1)).astype(np.float32)
BIAS = -math.log(S)

rng = np.random.default_rng(0)
q_full = rng.standard_normal((B, S, H, D)).astype(np.float32)
k = rng.standard_normal((B, S, K, D)).astype(np.float32)
v = rng.standard_normal((B, S, K, E)).astype(np.float32)

ROWS = LENGTHS[:, None] - T + np.arange(T)[None]
q = q_full[np.arange(B)[:, None], ROWS]


@pytest.fixture(autouse=True, scope="module")
def _several_blocks():
    """So short a cache would be one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BLOCK_KV", 16)
        jax.clear_caches()
        yield
    jax.clear_caches()


@functools.cache
def full(window, alibi):
    return np.asarray(
        sigmoid_attention(
            q_full,
            k,
            v,
            bias=BIAS,
            causal=True,
            window=window,
            alibi_slopes=SLOPES if alibi else None,
            implementation="reference",
        )
    )


def rows(o):
    """The last T rows of each sequence; those before its start are 0."""
    picked = o[np.arange(B)[:, None], ROWS]
    return np.where((ROWS >= 0)[:, :, None, None], picked, 0)


def poisoned(x, first=None):
    """NaN where no query looks: from the length on, and before ``first``."""
    index = np.arange(S)[None]
    unseen = index >= LENGTHS[:, None]
    if first is not None:
        unseen = unseen | (index < first[:, None])
    return np.where(unseen[:, :, None, None], np.nan, x)


def paged(x, page_size, seed):
    """The cache in shuffled pages with NaN around, and its table."""
    max_pages = -(-S // page_size)
    num_pages = B * max_pages + 2
    table = np.random.default_rng(seed).permutation(num_pages)[: B * max_pages]
    table = table.reshape(B, max_pages)
    pages = np.full((num_pages, page_size, *x.shape[2:]), np.nan, x.dtype)
    padded = np.pad(
        x,
        ((0, 0), (0, max_pages * page_size - S), (0, 0), (0, 0)),
        constant_values=np.nan,
    )
    pages[table] = padded.reshape(B, max_pages, page_size, *x.shape[2:])
    # Entries for pages past the length are never looked at.
    unused = np.arange(max_pages)[None] * page_size >= LENGTHS[:, None]
    return pages, np.where(unused, 1 << 20, table).astype(np.int32)


@pytest.mark.parametrize(
    ("window", "splits"), [(None, None), (None, 3), (None, 1000), ((20, None), 2)]
)
def test_a_step_is_rows_of_the_full_call(window, splits):
    first = None if window is None else np.maximum(ROWS[:, 0] - 20, 0)
    o = sigmoid_decode(
        q,
        poisoned(k, first),
        poisoned(v, first),
        LENGTHS,
        bias=BIAS,
        window=window,
        alibi_slopes=SLOPES,
        splits=splits,
    )
    np.testing.assert_allclose(o, rows(full(window, True)), atol=1e-6)


@pytest.mark.parametrize(("page_size", "splits"), [(4, 1), (16, 4), (40, 3)])
def test_pages_equal_one_stretch(page_size, splits):
    k_pages, pages = paged(poisoned(k), page_size, seed=1)
    v_pages, _ = paged(poisoned(v), page_size, seed=1)
    o = sigmoid_decode(
        q, k_pages, v_pages, LENGTHS, bias=BIAS, pages=pages, splits=splits
    )
    np.testing.assert_allclose(o, rows(full(None, False)), atol=1e-6)


def test_the_definition_takes_the_same_arguments():
    k_pages, pages = paged(poisoned(k), 16, seed=2)
    v_pages, _ = paged(poisoned(v), 16, seed=2)
    o = sigmoid_decode(
        q,
        k_pages,
        v_pages,
        LENGTHS,
        bias=BIAS,
        pages=pages,
        implementation="reference",
    )
    np.testing.assert_allclose(o, rows(full(None, False)), atol=1e-6)


def test_prefill_and_steps_make_the_full_call():
    prefilled, steps = 66, (3, 8)
    o = [
        sigmoid_attention(
            *(q_full[:, :prefilled], k[:, :prefilled], v[:, :prefilled]),
            bias=BIAS,
            causal=True,
        )
    ]
    length = prefilled
    for t in steps:
        lengths = jnp.full((B,), length + t)
        o.append(
            sigmoid_decode(q_full[:, length : length + t], k, v, lengths, bias=BIAS)
        )
        length += t
    assert length == S
    np.testing.assert_allclose(np.concatenate(o, 1), full(None, False), atol=1e-6)


def test_bias_forms_and_dtypes():
    per_head = rng.standard_normal((B, H)).astype(np.float32) - 3
    want = sigmoid_decode(q, k, v, LENGTHS, bias=per_head, implementation="reference")
    o = sigmoid_decode(q, k, v, LENGTHS, bias=per_head)
    np.testing.assert_allclose(o, want, atol=1e-6)
    halves = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    o = sigmoid_decode(*halves, LENGTHS, bias=BIAS, out_dtype=jnp.float32)
    assert o.dtype == jnp.float32
    error = np.linalg.norm(o - rows(full(None, False)))
    assert error < 1e-2 * np.linalg.norm(rows(full(None, False)))


def test_same_bits_every_time_and_under_traced_and_mapped_lengths():
    call = functools.partial(sigmoid_decode, q, k, v, bias=BIAS, splits=2)
    first = call(LENGTHS)
    np.testing.assert_array_equal(call(LENGTHS), first)
    np.testing.assert_allclose(jax.jit(call)(LENGTHS), first, atol=1e-7)
    both = jax.vmap(call)(np.stack([LENGTHS, LENGTHS // 2]))
    np.testing.assert_allclose(both[0], first, atol=1e-7)
    np.testing.assert_allclose(both[1], call(LENGTHS // 2), atol=1e-7)


def test_inside_shard_map():
    spec = PartitionSpec(None, None, "heads")
    run = jax.shard_map(
        lambda q, k, v, lengths: sigmoid_decode(q, k, v, lengths, bias=BIAS),
        mesh=jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,)),
        in_specs=(spec, spec, spec, PartitionSpec()),
        out_specs=spec,
    )
    np.testing.assert_allclose(
        jax.jit(run)(q, k, v, LENGTHS), rows(full(None, False)), atol=1e-6
    )


def test_empty_sequences_give_zero():
    o = sigmoid_decode(
        q, poisoned(k, LENGTHS), poisoned(v, LENGTHS), np.zeros(B, int), bias=BIAS
    )
    np.testing.assert_array_equal(o, np.zeros((B, T, H, E)))


@pytest.mark.parametrize("with_pages", [False, True])
def test_memory_does_not_follow_the_cache(with_pages):
    """The cache is never copied or gathered whole."""

    def temporary(capacity):
        shape = (capacity // 16, 16, K, D) if with_pages else (B, capacity, K, D)
        cache = jax.ShapeDtypeStruct(shape, jnp.float32)
        table = jax.ShapeDtypeStruct((B, capacity // 16), jnp.int32)
        lengths = jax.ShapeDtypeStruct((B,), jnp.int32)

        def step(q, k, v, lengths, pages):
            pages = pages if with_pages else None
            return sigmoid_decode(q, k, v, lengths, bias=BIAS, pages=pages)

        compiled = jax.jit(step).lower(q, cache, cache, lengths, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= temporary(1024)


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: sigmoid_decode(q, k, v, LENGTHS, bias=BIAS).sum())(q)


PAGES = np.zeros((B, 2), np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": q[0]}, ValueError, "q, k_cache, v_cache must be"),
        ({"q": q_full[:, :9]}, ValueError, "1 to 8 queries"),
        ({"q": q[:, :, :3]}, ValueError, "multiple"),
        ({"q": q[:2]}, ValueError, "agree in B"),
        ({"q": q.astype(np.float16)}, ValueError, "one dtype"),
        ({"v_cache": v[:, :5]}, ValueError, "q, k_cache, v_cache must be"),
        ({"lengths": LENGTHS.astype(np.float32)}, ValueError, "lengths must be int"),
        ({"lengths": LENGTHS[:2]}, ValueError, r"shape \[B\] = \[3\]"),
        ({"lengths": -LENGTHS}, ValueError, "lengths must lie in 0 … 77"),
        ({"lengths": LENGTHS + 1}, ValueError, "lengths must lie in 0 … 77"),
        ({"pages": PAGES}, ValueError, "lengths must lie in 0 … 154"),
        ({"pages": PAGES[:2]}, ValueError, "pages must be integers"),
        ({"pages": PAGES[0]}, ValueError, "pages must be integers"),
        ({"pages": PAGES * 1.0}, ValueError, "pages must be integers"),
        ({"bias": None}, ValueError, "bias must be given"),
        ({"bias": math.nan}, ValueError, "bias must be finite"),
        ({"window": (-1, 0)}, ValueError, "window"),
        ({"splits": 0}, ValueError, "splits"),
        ({"splits": 1.5}, ValueError, "splits"),
        ({"alibi_slopes": SLOPES[:2]}, ValueError, "alibi_slopes"),
        ({"implementation": "cudnn"}, ValueError, "implementation"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "no kernel for dec"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"q": q, "k_cache": k, "v_cache": v, "lengths": LENGTHS, "bias": BIAS}
    if "pages" in change and np.shape(change["pages"]) == (B, 2):
        arguments["lengths"] = LENGTHS + 100
    with pytest.raises(error, match=message):
        sigmoid_decode(**{**arguments, **change})
