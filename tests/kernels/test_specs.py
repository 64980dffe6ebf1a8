"""The named cases: their arrays, their arguments, and what is counted as work."""

import math

import jax
import numpy as np
import pytest

from diffmm_kernels.sigmoid_attention import sigmoid_attention
from diffmm_kernels.sigmoid_attention.arguments import Operands, Options
from diffmm_kernels.sigmoid_attention.specs import (
    SPECS,
    alibi_slopes,
    decode,
    square,
)
from diffmm_kernels.sigmoid_attention.visibility import visible


def visible_pairs(spec):
    q, k, v, _ = spec.arrays()
    arguments = spec.arguments()
    left, right = spec.window or (None, None)
    if spec.causal:
        right = 0 if right is None else min(right, 0)
    names = ("q_segment_ids", "kv_segment_ids", "kv_lengths")
    operands = Operands(q=q, k=k, v=v, **{name: arguments.get(name) for name in names})
    options = Options(
        scale=1.0, bias=0.0, q_offset=spec.q_offset, left=left, right=right
    )
    return int(visible(operands, options).sum())


@pytest.mark.parametrize("name", SPECS)
def test_work_is_what_is_visible(name):
    spec = SPECS[name].reduced(length=64)
    exact = visible_pairs(spec)
    if name in ("gqa", "gala1b", "gala7b"):  # the usual half, diagonal left aside
        half = spec.batch * spec.kv_length**2 // 2
        assert spec.visible_pairs() == half
        assert exact == half + spec.batch * spec.kv_length // 2
    else:
        assert spec.visible_pairs() == exact
    assert spec.flops() == 4 * spec.heads * spec.head_dim * spec.visible_pairs()
    assert spec.flops("both") == 3.5 * spec.flops()


@pytest.mark.parametrize("name", SPECS)
def test_every_case_is_a_valid_call(name):
    spec = SPECS[name]
    small = spec.reduced(length=64)
    for case in (spec, small):
        shapes = case.shapes()
        structs = [jax.ShapeDtypeStruct(shapes[x], case.dtype) for x in "qkv"]
        o = jax.eval_shape(
            lambda *x, case=case: sigmoid_attention(*x, **case.arguments()), *structs
        )
        assert o.shape == shapes["do"]
        assert o.dtype == case.dtype
    assert max(small.kv_length, small.q_length) <= 129
    assert (small.group_size > 1) == (spec.group_size > 1)
    assert [x.dtype for x in small.arrays()] == [np.dtype(small.dtype)] * 4


def test_golden_arrays():
    spec = SPECS["tiny"]
    firsts = [x.flat[0] for x in spec.arrays(dtype="float64")]
    expected = [0.84147098, 0.90929743, 0.14112001, -0.7568025]
    np.testing.assert_allclose(firsts, expected, atol=1e-8)
    assert spec.bias == -math.log(4)


def test_rounding_precedes_a_wider_dtype():
    spec = SPECS["odd"]
    for narrow, wide in zip(spec.arrays(3), spec.arrays(3, "float64"), strict=True):
        np.testing.assert_array_equal(narrow.astype(np.float64), wide)


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    rest = [0.70710678, 0.35355339, 0.1767767, 0.08838835]
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), *rest], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(32)[[0, -1]], [0.84089642, 1 / 256])
    with pytest.raises(ValueError, match="heads"):
        alibi_slopes(0)


def test_sizes_of_the_protocol():
    spec = square("full", 2048, 64, causal=False)
    assert (spec.batch, spec.heads) == (8, 32)
    assert decode(16, 8192).cache_bytes() == 2 * 16 * 8192 * 8 * 128 * 2
    assert sum(SPECS["packed"].segments) == SPECS["packed"].kv_length


@pytest.mark.parametrize(
    "changes",
    [{"kv_heads": 3}, {"segments": (9_999_999,)}, {"kv_lengths": (1, 2, 3)}],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SPECS["gqa"].replace(**changes)
