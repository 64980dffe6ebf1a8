"""What every implementation of sigmoid attention must do: one abstract test class.

A subclass names an implementation, and what it refuses. The oracle is NumPy in float64
and shares no code with the package: loops over the definition of visibility.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm_kernels.sigmoid_attention import sigmoid_attention

FORWARD, GRADIENT = "forward", "gradient"
# Relative Frobenius error against float64 on the rounded inputs. A bfloat16 output
# rounds by up to 2^-9 = 2.0e-3, the weights cast for the second product by as much
# again, independently; float16 likewise at 2^-12; float32 sums of some hundred terms.
TOLERANCES = {
    "bfloat16": {FORWARD: 5e-3, GRADIENT: 1e-2},
    "float16": {FORWARD: 1e-3, GRADIENT: 1e-3},
    "float32": {FORWARD: 5e-6, GRADIENT: 5e-6},
}


def oracle(q, k, v, do=None, **arguments):
    """Output, and with ``do`` the gradients, in float64.

    Takes the keywords of `sigmoid_attention`; returns a dict.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, d = q.shape
    s, kv_heads = k.shape[1:3]
    group = h // kv_heads
    scale = arguments.get("scale") or d**-0.5
    bias = arguments.get("bias")
    bias = -math.log(s) if bias is None else np.asarray(bias, np.float64)
    bias = np.broadcast_to(bias, (b, h))
    kk, vv = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    raw = scale * np.einsum("bthd,bshd->bhts", q, kk)
    z = raw + bias[:, :, None, None]
    offset = np.asarray(arguments.get("q_offset", 0))
    offset = offset.reshape(offset.shape + (1,) * (2 - offset.ndim))
    position = np.broadcast_to(np.arange(t)[None] + offset, (b, t))[:, :, None]
    key = np.arange(s)[None, None]
    seen = np.ones((b, t, s), bool)
    if arguments.get("causal"):
        seen &= key <= position
    window = arguments.get("window")
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        seen &= True if left is None else key >= position - left
        seen &= True if right is None else key <= position + right
    if arguments.get("q_segment_ids") is not None:
        ids = np.asarray(arguments["q_segment_ids"])[:, :, None]
        kv_ids = arguments.get("kv_segment_ids")
        kv_ids = ids[:, :, 0] if kv_ids is None else np.asarray(kv_ids)
        seen &= (ids == kv_ids[:, None, :]) & (ids >= 0)
    if arguments.get("q_lengths") is not None:
        row = np.arange(t)[None, :, None]
        seen &= row < np.asarray(arguments["q_lengths"])[:, None, None]
    if arguments.get("kv_lengths") is not None:
        seen &= key < np.asarray(arguments["kv_lengths"])[:, None, None]
    seen = seen[:, None]
    if arguments.get("mask") is not None:
        seen = seen & np.asarray(arguments["mask"])
    if arguments.get("alibi_slopes") is not None:
        slopes = np.asarray(arguments["alibi_slopes"], np.float64)
        slopes = np.broadcast_to(slopes, (b, h))[:, :, None, None]
        z = z - slopes * np.abs(position - key)[:, None]
    if arguments.get("logit_bias") is not None:
        z = z + np.asarray(arguments["logit_bias"], np.float64)
    # e^z for z <= 0 only: no overflow.
    e = np.exp(-np.abs(z))
    p = np.where(z >= 0, 1.0, e) / (1.0 + e)
    p = np.where(seen, p, 0.0)
    result = {"o": np.einsum("bhts,bshe->bthe", p, vv), "p": p, "scores": raw}
    if do is None:
        return result
    do = np.asarray(do, np.float64)
    dp = np.einsum("bthe,bshe->bhts", do, vv)
    ds = dp * p * (1.0 - p)

    def over_group(x):
        return x.reshape(b, s, kv_heads, group, -1).sum(3)

    result["q"] = scale * np.einsum("bhts,bshd->bthd", ds, kk)
    result["k"] = scale * over_group(np.einsum("bhts,bthd->bshd", ds, q))
    result["v"] = over_group(np.einsum("bhts,bthe->bshe", p, do))
    result["bias"] = ds.sum((2, 3))
    result["ds"] = ds
    return result


def relative(got, want):
    """Frobenius norm of the error over that of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    norm = np.linalg.norm(want)
    return np.linalg.norm(got - want) / norm if norm else np.linalg.norm(got)


def _segments(b, length, seed, ordered=True):
    ids = np.random.default_rng(seed).integers(-1, 4, (b, length))
    # Padding last, as packed rows have it.
    key = np.where(ids < 0, 99, ids)
    return (
        np.take_along_axis(ids, np.argsort(key, 1, kind="stable"), 1)
        if ordered
        else ids
    )


def cases():
    """Name to ``(B, T, S, H, K, D, E, keywords)``; odd lengths throughout."""
    rng = np.random.default_rng(3)
    odd = (2, 77, 129)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    packed = _segments(2, 129, 0)
    return {
        "full": (*odd, 4, 2, 64, 64, {}),
        "small_heads": (*odd, 2, 2, 24, 40, {"bias": -1.5}),
        "values_wider": (1, 40, 50, 2, 1, 64, 128, {"scale": 0.2}),
        "causal": (*odd, 4, 2, 64, 64, {"causal": True}),
        "causal_aligned_last": (*odd, 8, 1, 64, 64, {"causal": True, "q_offset": 52}),
        "window": (*odd, 2, 2, 64, 64, {"window": (10, 3), "q_offset": 30}),
        "window_causal": (
            *(2, 129, 129, 2, 1, 64, 64),
            {"window": 20, "causal": True, "bias": -3.0},
        ),
        "offsets_by_row": (
            *(*odd, 2, 2, 64, 64),
            {"causal": True, "q_offset": np.array([3, 52], np.int32)},
        ),
        "segments": (2, 129, 129, 4, 2, 64, 64, {"q_segment_ids": packed}),
        "segments_causal": (
            *(2, 129, 129, 2, 2, 64, 64),
            {"q_segment_ids": packed, "causal": True, "bias": -3.5},
        ),
        "segments_any_order": (
            *(*odd, 2, 1, 64, 64),
            {
                "q_segment_ids": _segments(2, 77, 1, ordered=False),
                "kv_segment_ids": _segments(2, 129, 2, ordered=False),
            },
        ),
        "lengths": (
            *(*odd, 2, 1, 64, 64),
            {
                "q_lengths": np.array([5, 77], np.int32),
                "kv_lengths": np.array([0, 100], np.int32),
            },
        ),
        "alibi": (
            *(*odd, 4, 2, 64, 64),
            {"alibi_slopes": slopes, "causal": True, "q_offset": 52},
        ),
        "alibi_full": (
            *(*odd, 4, 4, 64, 64),
            {"alibi_slopes": np.stack([slopes, 2 * slopes]), "window": (40, None)},
        ),
        "mask": (*odd, 2, 1, 64, 64, {"mask": rng.random((2, 1, 77, 129)) < 0.5}),
        "mask_of_keys": (
            *odd,
            2,
            2,
            64,
            64,
            {"mask": rng.random((2, 1, 1, 129)) < 0.5},
        ),
        "logit_bias": (
            *(*odd, 2, 1, 64, 64),
            {"logit_bias": rng.normal(size=(1, 2, 77, 129)).astype(np.float32)},
        ),
        "logit_bias_of_keys": (
            *(*odd, 2, 2, 64, 64),
            {
                "logit_bias": rng.normal(size=(2, 1, 1, 129)).astype(np.float32),
                "causal": True,
            },
        ),
    }


CASES = cases()


def draw(case, dtype, seed=0):
    """Unit-normal q, k, v, do of a case, rounded to the dtype, and its keywords."""
    b, t, s, h, kv_heads, d, e, keywords = case
    rng = np.random.default_rng(seed)
    shapes = (b, t, h, d), (b, s, kv_heads, d), (b, s, kv_heads, e), (b, t, h, e)
    arrays = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
    return [x.astype(dtype) for x in arrays], dict(keywords)


def float64(arrays):
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


class SigmoidAttentionContract:
    """Inherit, set the attributes, and every test below runs.

    Attributes:
      implementation: name.
      interpret: passed on.
      dtypes: names of the dtypes that are served.
      refused: keywords that raise NotImplementedError, beside dtypes.
      slow_cases: cases left out of the default run.
      tolerances: see `TOLERANCES`.
      skip_reason: why the implementation cannot run here, or None.
    """

    implementation = None
    interpret = None
    dtypes = ("float32", "bfloat16", "float16")
    refused = ()
    case_names = tuple(CASES)
    tolerances = TOLERANCES
    skip_reason = None

    @pytest.fixture(autouse=True)
    def _skip(self):
        if self.skip_reason:
            pytest.skip(self.skip_reason)

    @property
    def dtype(self):
        """The dtype of tests that need one only."""
        return self.dtypes[0]

    def attend(self, q, k, v, **keywords):
        keywords.setdefault("implementation", self.implementation)
        keywords.setdefault("interpret", self.interpret)
        # Compiled whole: operation by operation, each would be compiled alone.
        return jax.jit(functools.partial(sigmoid_attention, **keywords))(q, k, v)

    def gradients(self, arrays, keywords, bias=None):
        """Output and cotangents of q, k, v and, if given, of the bias."""
        *inputs, do = arrays
        if bias is not None:
            inputs.append(bias)

        def attend(q, k, v, *bias):
            words = {**keywords, "bias": bias[0]} if bias else keywords
            return self.attend(q, k, v, **words)

        @jax.jit
        def run(inputs, do):
            o, pull = jax.vjp(attend, *inputs)
            return (o, *pull(do))

        return run(inputs, do)

    def check(self, got, want, dtype, kind):
        error = relative(got, want)
        assert error <= self.tolerances[dtype][kind], (kind, error)

    def pytest_case(self, name):
        keywords = CASES[name][-1]
        if name not in self.case_names:
            pytest.skip("another implementation's case")
        return not any(key in self.refused for key in keywords)

    @pytest.mark.parametrize("name", CASES)
    def test_forward_and_gradients(self, name):
        served = self.pytest_case(name)
        arrays, keywords = draw(CASES[name], self.dtype)
        if not served:
            word = next(key for key in keywords if key in self.refused)
            with pytest.raises(NotImplementedError, match=word):
                self.attend(*arrays[:3], **keywords)
            return
        want = oracle(*float64(arrays[:3]), float64(arrays[3:])[0], **keywords)
        o, dq, dk, dv = self.gradients(arrays, keywords)
        assert o.dtype == dq.dtype == dk.dtype == dv.dtype == jnp.dtype(self.dtype)
        self.check(o, want["o"], self.dtype, FORWARD)
        for name_, x in (("q", dq), ("k", dk), ("v", dv)):
            self.check(x, want[name_], self.dtype, GRADIENT)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_every_dtype(self, dtype):
        """Also the bias as an array by head, with its gradient."""
        arrays, keywords = draw(CASES["causal"], dtype, seed=1)
        if dtype not in self.dtypes:
            with pytest.raises(NotImplementedError, match=dtype):
                self.attend(*arrays[:3], **keywords)
            return
        bias = jnp.asarray([-3.0, -4.0, -5.0, -4.5])
        full = {**keywords, "bias": np.asarray(bias, np.float64)}
        want = oracle(*float64(arrays[:3]), float64(arrays[3:])[0], **full)
        o, dq, dk, dv, db = self.gradients(arrays, keywords, bias)
        self.check(o, want["o"], dtype, FORWARD)
        for name, x in (("q", dq), ("k", dk), ("v", dv)):
            self.check(x, want[name], dtype, GRADIENT)
        # dS keeps float32 in its sum: only the rounding of the inputs' products counts.
        self.check(db, want["bias"].sum(0), dtype, GRADIENT)
        # Float32 results expose the accumulator.
        o32 = self.attend(*arrays[:3], bias=bias, out_dtype=jnp.float32, **keywords)
        assert o32.dtype == jnp.float32
        self.check(o32, want["o"], dtype, FORWARD)

    def test_gradient_of_logit_bias(self):
        if "logit_bias" in self.refused:
            pytest.skip(f"{self.implementation} refuses logit_bias")
        for name in ("logit_bias", "logit_bias_of_keys"):
            arrays, keywords = draw(CASES[name], self.dtype)
            added = jnp.asarray(keywords["logit_bias"])
            want = oracle(*float64(arrays[:3]), float64(arrays[3:])[0], **keywords)

            def attend(added, arrays=arrays, keywords=keywords):
                return self.attend(*arrays[:3], **{**keywords, "logit_bias": added})

            got = jax.vjp(attend, added)[1](arrays[3])[0]
            shared = tuple(a for a in range(4) if added.shape[a] == 1)
            assert got.shape == added.shape
            ds = want["ds"].sum(shared, keepdims=True)
            self.check(got, ds, self.dtype, GRADIENT)

    def test_complement(self):
        """σ(z) + σ(-z) = 1: needs no reference for σ."""
        arrays, keywords = draw(CASES["window"], self.dtype)
        q, k, v, _ = arrays
        bias = -2.0
        one = self.attend(q, k, v, **{**keywords, "bias": bias}, out_dtype=jnp.float32)
        keywords["bias"] = -bias
        two = self.attend(-q, k, v, **keywords, out_dtype=jnp.float32)
        everything = oracle(*float64((q, k, v)), **{**keywords, "bias": 1000.0})
        size = oracle(
            *float64((q, k)), np.abs(float64((v,))[0]), **{**keywords, "bias": 1000.0}
        )
        total = np.asarray(one, np.float64) + np.asarray(two, np.float64)
        # The activation's error and the cast of p, each at most relative to p <= 1.
        slack = {
            "bfloat16": 3.6e-4 + 2**-8,
            "float16": 1.1e-5 + 2**-11,
            "float32": 2e-6,
        }
        assert np.all(
            np.abs(total - everything["o"]) <= slack[self.dtype] * (size["o"] + 1)
        )

    def test_additive_over_keys(self):
        """Attention over A and B is attention over A plus attention over B."""
        arrays, _ = draw(CASES["full"], self.dtype)
        q, k, v, _ = arrays
        whole = self.attend(q, k, v, bias=-3.0, out_dtype=jnp.float32)
        cut = 50
        parts = [
            self.attend(q, k[:, part], v[:, part], bias=-3.0, out_dtype=jnp.float32)
            for part in (slice(cut, None), slice(None, cut))
        ]
        assert relative(parts[0] + parts[1], whole) < 1e-5

    def test_extreme_biases(self):
        arrays, keywords = draw(CASES["causal"], self.dtype)
        q, k, v, _ = arrays
        high = self.attend(q, k, v, **keywords, bias=1000.0)
        want = oracle(*float64((q, k, v)), **keywords, bias=1000.0)["o"]
        self.check(high, want, self.dtype, FORWARD)
        results = self.gradients(arrays, {**keywords, "bias": -1000.0})
        assert all(not np.any(np.asarray(x, np.float32)) for x in results)

    def test_a_query_that_sees_nothing(self):
        """Exactly 0, and exactly 0 back; what it does not see may hold garbage."""
        arrays, keywords = draw(CASES["lengths"], self.dtype)
        got = self.gradients(arrays, keywords)
        o, dq, dk, dv = (np.asarray(x, np.float32) for x in got)
        for invisible in (o[0], dq[0], dk[0], dv[0], dk[1, 100:], dv[1, 100:]):
            assert not np.any(invisible)
        q, k, v, do = arrays
        k = k.at[1, 100:].set(1e4).at[0].set(-1e4)
        v = v.at[1, 100:].set(3e4).at[0].set(1e4)
        q = q.at[0, 5:].set(1e4)
        again = self.gradients((q, k, v, do), keywords)
        for index, (x, y) in enumerate(zip(got, again, strict=True)):
            # dk and dv of invisible keys are 0 as well, so nothing may change.
            np.testing.assert_array_equal(x[1], y[1], err_msg=str(index))
            np.testing.assert_array_equal(x[0], y[0], err_msg=str(index))

    def test_zero_queries(self):
        """q = 0: every weight is 1 / (n + 1) with b = -log n."""
        arrays, _ = draw(CASES["full"], self.dtype)
        q, k, v, _ = arrays
        n = k.shape[1]
        o = self.attend(jnp.zeros_like(q), k, v, out_dtype=jnp.float32)
        mean = np.repeat(float64((v,))[0].mean(1, keepdims=True), 2, axis=2)
        want = np.broadcast_to(n / (n + 1) * mean, o.shape)
        assert relative(o, want) <= self.tolerances[self.dtype][FORWARD]

    def test_linear_in_values_and_blind_to_order(self):
        arrays, _ = draw(CASES["full"], self.dtype)
        q, k, v, do = arrays
        o, dq, dk, dv = self.gradients(arrays, {})
        doubled = self.gradients((q, k, 2 * v, do), {})
        np.testing.assert_array_equal(2 * o, doubled[0])
        np.testing.assert_array_equal(dv, doubled[3])
        order = np.random.default_rng(5).permutation(k.shape[1])
        permuted = self.gradients((q, k[:, order], v[:, order], do), {})
        limit = self.tolerances[self.dtype][GRADIENT]
        assert relative(permuted[0], o) < limit
        assert relative(permuted[1], dq) < limit
        assert relative(permuted[2], np.asarray(dk, np.float32)[:, order]) < limit

    def test_gradient_identities(self):
        """Σ q∘dq = Σ k∘dk = Σ dS·s, and db = Σ dS."""
        arrays, keywords = draw(CASES["causal"], self.dtype)
        bias = jnp.full((4,), -3.0)
        _, dq, dk, _, db = self.gradients(arrays, keywords, bias)
        want = oracle(
            *float64(arrays[:3]), float64(arrays[3:])[0], **keywords, bias=-3.0
        )
        size = np.abs(want["ds"] * want["scores"]).sum()
        q, k = float64(arrays[:2])
        limit = self.tolerances[self.dtype][GRADIENT] * size / 10
        total = (want["ds"] * want["scores"]).sum()
        assert abs((q * np.asarray(dq, np.float64)).sum() - total) < limit
        assert abs((k * np.asarray(dk, np.float64)).sum() - total) < limit
        assert relative(db, want["bias"].sum(0)) < self.tolerances[self.dtype][GRADIENT]

    def test_tends_to_exponential_attention(self):
        """e^-b · attention tends to exp(S)·V as b falls."""
        arrays, keywords = draw(CASES["causal"], self.dtype)
        q, k, v, _ = float64(arrays)
        _, t, _, d = q.shape
        o = self.attend(*arrays[:3], **keywords, bias=-9.0, out_dtype=jnp.float32)
        scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, 2)) / math.sqrt(d)
        weights = np.exp(scores) * np.tri(t, k.shape[1])[None, None]
        want = np.einsum("bhts,bshe->bthe", weights, np.repeat(v, 2, 2))
        # 1/(e^-z + 1) falls short of e^z by the share e^z of it at most.
        error = np.abs(np.asarray(o, np.float64) * math.exp(9.0) - want)
        size = np.einsum("bhts,bshe->bthe", weights, np.abs(np.repeat(v, 2, 2)))
        share = math.exp(scores.max() - 9.0) + 2 * self.tolerances[self.dtype][FORWARD]
        assert np.all(error <= share * size + 1e-6)

    def test_row_mass(self):
        """v = 1 in float32 out: the sum of the weights, most sensitive to σ."""
        arrays, _ = draw((1, 64, 1024, 2, 2, 64, 64, {}), self.dtype, seed=2)
        q, k, v, _ = arrays
        mass = self.attend(q, k, jnp.ones_like(v), out_dtype=jnp.float32)
        want = oracle(*float64((q, k)), np.ones(v.shape))["o"]
        error = np.abs(np.asarray(mass, np.float64) / want - 1).max()
        # Casting p to bfloat16 errs by at most 2^-9 each; over 1,024 keys the errors
        # average out: 2^-9/sqrt(3·1024) = 3.5e-5 per standard deviation.
        assert error < 5e-4

    def test_packing_equals_separate_calls(self):
        case = (1, 60, 60, 2, 2, 64, 64, {})
        arrays, _ = draw(case, self.dtype)
        ids = np.repeat(np.arange(3), (10, 27, 23))[None]
        keywords = {"causal": True, "bias": -3.0}
        packed = self.gradients(arrays, {**keywords, "q_segment_ids": ids})
        edges = (0, 10, 37, 60)
        for start, stop in itertools.pairwise(edges):
            alone = self.gradients([x[:, start:stop] for x in arrays], keywords)
            for x, y in zip(packed, alone, strict=True):
                assert (
                    relative(x[:, start:stop], y)
                    < 2 * self.tolerances[self.dtype][FORWARD]
                )

    def test_window_without_a_left_end_is_causal(self):
        arrays, _ = draw(CASES["causal"], self.dtype)
        one = self.attend(*arrays[:3], causal=True)
        two = self.attend(*arrays[:3], window=(None, 0))
        np.testing.assert_array_equal(one, two)

    def test_same_bits_twice(self):
        arrays, keywords = draw(CASES["causal"], self.dtype)
        keywords["deterministic"] = True
        runs = [self.gradients(arrays, keywords) for _ in range(2)]
        for x, y in zip(*runs, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_vmap_over_some_arguments(self):
        arrays, _ = draw((2, 20, 30, 2, 1, 64, 64, {}), self.dtype)
        q, k, v, _ = arrays
        qs, vs = jnp.stack([q, 2 * q, -q]), jnp.stack([v, -v, v + 1])

        def loss(q, k, v, bias):
            o = self.attend(q, k, v, bias=bias, causal=True)
            return (o.astype(jnp.float32) ** 2).sum()

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
        bias = jnp.asarray(-2.0)
        mapped = jax.jit(jax.vmap(grad, in_axes=(0, None, 0, None)))(qs, k, vs, bias)
        outer = jax.jit(
            jax.grad(
                lambda k: jax.vmap(loss, (0, None, 0, None))(qs, k, vs, bias).sum()
            )
        )(k)
        alone = [grad(qs[i], k, vs[i], bias) for i in range(3)]
        limit = self.tolerances[self.dtype][GRADIENT]
        for index in range(3):
            stacked = np.stack([np.asarray(a[index], np.float64) for a in alone])
            assert relative(mapped[index], stacked) < limit
        assert relative(outer, sum(np.asarray(a[1], np.float64) for a in alone)) < limit

    def test_no_batch_axis(self):
        arrays, keywords = draw(CASES["causal"], self.dtype)
        whole = self.attend(*arrays[:3], **keywords)
        row = self.attend(*(x[1] for x in arrays[:3]), **keywords)
        assert row.shape == whole.shape[1:]
        assert relative(row, whole[1]) < self.tolerances[self.dtype][FORWARD]
