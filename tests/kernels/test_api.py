"""The public function: golden values, bad input, dispatch, transformations."""

import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import CASES, draw, float64, oracle, relative

from diffmm_kernels.sigmoid_attention import (
    Config,
    Tiles,
    explain_dispatch,
    save_attention_output,
    sigmoid_attention,
)
from diffmm_kernels.sigmoid_attention.specs import SPECS

# ----------------------------------------------------------------- golden values

# B=1, T=3, S=4, H=2, K=1, D=E=2, scale 1/√2, b = -log 4, arrays sin(ω·m).
_O = {
    "full": """0.4490367062 -0.5436907771 0.4524200548 -0.5491904049 0.387228292
        -0.4678159689 0.4327511213 -0.524779108 0.4612108856 -0.5597698969 0.3959573109
        -0.4777491342""",
    "causal": """0.0294732929 -0.0583566776 0.0410650286 -0.0813081404 0.1011472309
        -0.1446552367 0.1515493437 -0.2148651577 0.2340329458 -0.3138773012 0.2942336512
        -0.367645597""",
    "causal_last": """0.1472104513 -0.2116489295 0.0926830799 -0.1485141731 0.2875934746
        -0.3599733506 0.2280876668 -0.3032557149 0.4612108856 -0.5597698969 0.3959573109
        -0.4777491342""",
    "window": """0.1472104513 -0.2116489295 0.0926830799 -0.1485141731 0.2684741623
        -0.322117399 0.2022028115 -0.2520040899 0.3622883463 -0.4019253336 0.3036031122
        -0.3432447476""",
    "alibi": """0.1457795966 -0.2088158587 0.0925694409 -0.1482891696 0.281590631
        -0.3508196121 0.2275820058 -0.3024856682 0.4434773579 -0.5339994294 0.3947454624
        -0.4761096487""",
}
_SUMS = {  # dq, dk, dv, db, Σ q∘dq
    "full": (-0.2988554205, -1.7308009618, -0.6246619788, -0.6257264692, -0.2679376963),
    "causal": (0.0783210675, -0.5017973686, -0.4217643554, -0.0899480257, 0.0023349456),
    "causal_last": (
        *(-0.3020092508, -1.0230851764, -0.5179244417),
        *(-0.2551626341, -0.0989109223),
    ),
    "window": (
        *(-0.2824178219, -0.8842946527, -0.3195490901),
        *(-0.2014590024, -0.0623822999),
    ),
    "alibi": (
        *(-0.3054565593, -1.0132877178, -0.5034999679),
        *(-0.2411867285, -0.0972158536),
    ),
}
_KEYWORDS = {
    "full": {},
    "causal": {"causal": True},
    "causal_last": {"causal": True, "q_offset": 1},
    "window": {"window": (1, 0), "q_offset": 1},
    "alibi": {
        "alibi_slopes": np.array([1 / 16, 1 / 256]),
        "causal": True,
        "q_offset": 1,
    },
}


def golden_arrays():
    shapes = (1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2), (1, 3, 2, 2)
    return [
        np.sin(omega * np.arange(1, math.prod(shape) + 1.0)).reshape(shape)
        for omega, shape in enumerate(shapes, start=1)
    ]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", _O)
def test_golden_values(name, implementation):
    with jax.enable_x64(True):
        q, k, v, do = (jnp.asarray(x) for x in golden_arrays())

        def attend(q, k, v, bias):
            return sigmoid_attention(
                q, k, v, bias=bias, implementation=implementation, **_KEYWORDS[name]
            )

        bias = jnp.asarray(-math.log(4))

        @jax.jit
        def run(*inputs):
            o, pull = jax.vjp(attend, *inputs)
            return (o, *pull(do))

        o, dq, dk, dv, db = run(q, k, v, bias)
        want = np.array(_O[name].split(), np.float64)
        np.testing.assert_allclose(o.ravel(), want, atol=6e-11, rtol=0)
        sums = (dq.sum(), dk.sum(), dv.sum(), db, (q * dq).sum())
        np.testing.assert_allclose(sums, _SUMS[name], atol=6e-11, rtol=0)


def test_golden_row_mass():
    with jax.enable_x64(True):
        q, k, v, _ = (jnp.asarray(x) for x in golden_arrays())
        mass = sigmoid_attention(q, k, jnp.ones_like(v))[..., 0]
    want = [0.88058698, 0.8996443, 0.74032271, 0.85066766, 0.91897856, 0.75413386]
    np.testing.assert_allclose(mass.ravel(), want, atol=6e-9)


@pytest.mark.parametrize("name", SPECS)
def test_named_shapes_agree_with_the_oracle(name):
    spec = SPECS[name].reduced()
    q, k, v, do = spec.arrays(dtype="float32")
    keywords = spec.arguments()
    o, pull = jax.vjp(lambda q, k, v: sigmoid_attention(q, k, v, **keywords), q, k, v)
    want = oracle(q, k, v, do, **keywords)
    assert relative(o, want["o"]) < 5e-6
    for got, which in zip(pull(jnp.asarray(do)), "qkv", strict=True):
        assert relative(got, want[which]) < 5e-6


# Everything that may be an array; switched off, it holds what changes nothing.
_LENGTH = 20
_RESTRICTIONS = {
    "kv_lengths": (np.array([_LENGTH]), np.array([17])),
    "q_lengths": (np.array([_LENGTH]), np.array([16])),
    "q_segment_ids": (
        np.zeros((1, _LENGTH), int),
        np.repeat([0, 1, 2, -1], [5, 9, 4, 2])[None],
    ),
    "alibi_slopes": (
        np.zeros(8, np.float32),
        np.linspace(0.1, 0.8, 8, dtype=np.float32),
    ),
    "q_offset": (np.array([0]), np.array([3])),
}


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (4, 2)])
def test_every_combination_of_restrictions(window, causal, kv_heads):
    """In several tiles, against an oracle that shares no code."""
    rng = np.random.default_rng(0)
    shape = (1, _LENGTH, 8, 4)
    q, do = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    shape = (1, _LENGTH, kv_heads, 4)
    k, v = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    tiles = Tiles(block_q=8, block_kv=6)
    fixed = {"window": window, "causal": causal}

    @jax.jit
    def run(q, k, v, do, arrays):
        def attend(q, k, v):
            return sigmoid_attention(
                *(q, k, v),
                implementation="xla",
                config=Config(forward=tiles, backward=tiles),
                **fixed,
                **arrays,
            )

        o, pull = jax.vjp(attend, q, k, v)
        return (o, *pull(do))

    for chosen in itertools.product(*_RESTRICTIONS.values()):
        arrays = dict(zip(_RESTRICTIONS, chosen, strict=True))
        want = oracle(q, k, v, do, **fixed, **arrays)
        got = run(q, k, v, do, arrays)
        for x, name in zip(got, ("o", "q", "k", "v"), strict=True):
            assert relative(x, want[name]) < 5e-6, (arrays, name)


# ---------------------------------------------------------------- bad arguments

F = jnp.zeros


def _call(q=(1, 4, 2, 8), k=(1, 6, 2, 8), v=None, dtype=jnp.float32, **keywords):
    v = k if v is None else v
    return sigmoid_attention(F(q, dtype), F(k, dtype), F(v, dtype), **keywords)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"q": (1, 4, 3, 8)}, r"heads of q must be a multiple.*\[1, 4, 3, 8\]"),
        ({"q": (4, 8)}, "must be .B, T, H, D."),
        ({"q": (2, 4, 2, 8)}, "agree in B"),
        ({"v": (1, 5, 2, 8)}, "agree in B"),
        ({"q": (1, 4, 2, 16)}, "same head size"),
        ({"k": (1, 0, 2, 8)}, r"must not be empty.*\[1, 0, 2, 8\]"),
        ({"q": (1, 0, 2, 8)}, "must not be empty"),
        ({"q": (1, 4, 2, 257), "k": (1, 6, 2, 257)}, "at most 256"),
        ({"dtype": jnp.int32}, "one dtype of"),
        ({"bias": F((1, 2, 4, 6))}, "additive logits as logit_bias"),
        ({"bias": F((3,))}, r"\[H\] = \[2\]"),
        ({"bias": math.nan}, "bias must be finite"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"window": -1}, "window must be"),
        ({"window": (1, -2)}, "window must be"),
        ({"window": 1.5}, "window must be"),
        ({"q_offset": 0.5}, "q_offset must be integers"),
        ({"q_offset": np.zeros((3,), int)}, r"q_offset must be.*\[3\]"),
        ({"q_lengths": np.array([1.0])}, "q_lengths must be integers"),
        ({"kv_lengths": np.array([-1])}, "kv_lengths must lie in 0 … 6"),
        ({"kv_lengths": np.array([7])}, "kv_lengths must lie in 0 … 6"),
        ({"kv_lengths": np.array([1, 2])}, "kv_lengths must have shape"),
        ({"q_segment_ids": np.zeros((1, 4), int)}, "kv_segment_ids"),
        (
            {
                "q_segment_ids": np.zeros((1, 5), int),
                "kv_segment_ids": np.zeros((1, 6), int),
            },
            "q_segment_ids must have shape",
        ),
        (
            {
                "q_segment_ids": np.zeros((1, 4)),
                "kv_segment_ids": np.zeros((1, 6), int),
            },
            "q_segment_ids must be integers",
        ),
        ({"alibi_slopes": F((3,))}, "alibi_slopes must be floats of shape"),
        ({"alibi_slopes": np.array([1.0, np.nan])}, "alibi_slopes must be finite"),
        ({"alibi_slopes": np.array([1.0, np.inf])}, "alibi_slopes must be finite"),
        ({"mask": F((4, 6))}, "mask must be boolean"),
        ({"mask": np.ones((4, 5), bool)}, "mask must broadcast"),
        ({"logit_bias": F((2, 1, 1, 1))}, "logit_bias must broadcast"),
        ({"logit_bias": np.zeros((4, 6), int)}, "logit_bias must be floats"),
        ({"precision": "highest"}, "precision must be one of"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
        ({"config": {"block_q": 64}}, "config must be a Config"),
        ({"out_dtype": jnp.int32}, "out_dtype must be one of"),
    ],
)
def test_bad_arguments_are_named(keywords, match):
    with pytest.raises(ValueError, match=match):
        _call(**keywords)


def test_mixed_dtypes_and_unknown_words():
    q = F((1, 4, 2, 8))
    with pytest.raises(ValueError, match="share one dtype"):
        sigmoid_attention(q, q.astype(jnp.bfloat16), q)
    with pytest.raises(TypeError, match="dropout"):
        sigmoid_attention(q, q, q, dropout=0.1)
    with pytest.raises(ValueError, match="block_q must be at least 1"):
        Tiles(block_q=0, block_kv=64)


def test_slopes_are_constants_outside_the_reference():
    arrays, keywords = draw(CASES["alibi"], "float32")
    slopes = jnp.asarray(keywords.pop("alibi_slopes"))

    def loss(slopes, name):
        o = sigmoid_attention(
            *arrays[:3], alibi_slopes=slopes, implementation=name, **keywords
        )
        return o.sum()

    with pytest.raises(NotImplementedError, match="alibi_slopes are constants"):
        jax.grad(loss)(slopes, "xla")
    assert bool(jnp.any(jax.grad(loss)(slopes, "reference")))


# ------------------------------------------------------------------- the bias


def test_the_default_bias_is_minus_log_of_the_keys():
    arrays, _ = draw(CASES["full"], "float32")
    default = sigmoid_attention(*arrays[:3])
    np.testing.assert_array_equal(
        default, sigmoid_attention(*arrays[:3], bias=-math.log(129))
    )


def test_a_bias_of_every_shape_and_its_gradient():
    arrays, keywords = draw(CASES["causal"], "float32")
    do = arrays[3]
    values = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) - 3
    for bias in (values, values[0], values[0, 0]):
        want = oracle(
            *float64(arrays[:3]), float64(arrays[3:])[0], bias=bias, **keywords
        )

        def attend(bias):
            return sigmoid_attention(*arrays[:3], bias=bias, **keywords)

        o, pull = jax.vjp(attend, jnp.asarray(bias))
        assert relative(o, want["o"]) < 5e-6
        (db,) = pull(do)
        assert db.shape == np.shape(bias)
        reduced = want["bias"].sum(tuple(range(2 - np.ndim(bias))))
        assert relative(db, reduced) < 5e-6


# ------------------------------------------------------------ transformations


def _count(jaxpr, name):
    """Occurrences of a primitive in a jaxpr and all jaxprs inside it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += _count(inner, name)
    return count


def test_forward_runs_once_under_the_checkpoint_policy():
    """`logistic` marks a run of σ: 1 forward + 1 backward, not 2 + 1."""
    x = jnp.ones((1, 16, 8))
    weights = jnp.ones((8, 8))

    def layer(weights, x):
        q = (x @ weights).reshape(1, 16, 2, 4)
        o = sigmoid_attention(q, q, q, implementation="xla")
        return jnp.tanh(o.reshape(1, 16, 8) @ weights).sum()

    def runs(policy):
        remat = jax.checkpoint(layer, policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(remat))(weights, x)
        return _count(jaxpr.jaxpr, "logistic")

    assert runs(save_attention_output) == 2
    assert runs(None) == 3


def test_integer_arguments_have_no_gradient():
    arrays, keywords = draw(CASES["lengths"], "float32")

    def loss(q, lengths):
        return sigmoid_attention(q, *arrays[1:3], kv_lengths=lengths).sum()

    lengths = jnp.asarray(keywords["kv_lengths"])
    dq, none = jax.grad(loss, argnums=(0, 1), allow_int=True)(arrays[0], lengths)
    assert dq.shape == arrays[0].shape
    assert none.dtype == jax.dtypes.float0


def test_traced_lengths_offsets_and_ids():
    arrays, keywords = draw(CASES["segments_any_order"], "float32")
    keywords = {**keywords, **CASES["lengths"][-1], "q_offset": np.array([1, 2])}

    @jax.jit
    def attend(arrays, keywords):
        return sigmoid_attention(*arrays, **keywords, causal=True)

    got = attend(arrays[:3], keywords)
    want = oracle(*float64(arrays[:3]), **keywords, causal=True)
    assert relative(got, want["o"]) < 5e-6


def test_the_reference_serves_forward_mode():
    arrays, keywords = draw((1, 5, 7, 2, 1, 4, 4, {"causal": True}), "float32")

    def attend(q):
        return sigmoid_attention(
            q, *arrays[1:3], implementation="reference", **keywords
        )

    forward = jax.jit(jax.jacfwd(attend))(arrays[0])
    reverse = jax.jit(jax.jacrev(attend))(arrays[0])
    np.testing.assert_allclose(forward, reverse, atol=1e-6)


def test_gradient_inside_scan_and_under_x64():
    arrays, _ = draw((1, 5, 7, 2, 1, 4, 4, {}), "float32")
    q, k, v, _ = arrays

    def loss(q):
        def body(x, _):
            return sigmoid_attention(x, k, v, causal=True), None

        return jax.lax.scan(body, q, length=3)[0].sum()

    plain = jax.jit(jax.grad(loss))(q)
    with jax.enable_x64(True):
        wide = jax.jit(jax.grad(loss))(q)
    assert plain.dtype == wide.dtype == jnp.float32
    np.testing.assert_allclose(plain, wide, rtol=1e-6)


def test_export_round_trip():
    export = pytest.importorskip("jax.export")
    arrays, keywords = draw(CASES["causal"], "float32")

    @jax.jit
    def attend(q, k, v):
        return sigmoid_attention(q, k, v, **keywords)

    exported = export.export(attend)(*arrays[:3])
    np.testing.assert_array_equal(exported.call(*arrays[:3]), attend(*arrays[:3]))


# -------------------------------------------------------------------- dispatch


def _h100():
    from jax.sharding import AbstractDevice, AbstractMesh

    return AbstractMesh(
        (),
        (),
        abstract_device=AbstractDevice(
            device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
        ),
    )


def test_dispatch_is_told_without_running():
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    assert explain_dispatch(q, q, q).name == "xla"
    with jax.sharding.use_abstract_mesh(_h100()):
        choice = explain_dispatch(q, q, q, causal=True)
        assert (choice.name, choice.platform) == ("mosaic_gpu", "cuda")
        single = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        refused = explain_dispatch(single, single, single)
        assert refused.name == "xla"
        assert "mosaic_gpu" in refused.reasons[0]
        assert "float32" in refused.reasons[0]


def test_what_ran_is_logged_once(caplog):
    q = jnp.ones((1, 13, 1, 4))
    with caplog.at_level(logging.INFO, logger="diffmm_kernels"):
        sigmoid_attention(q, q, q)
        sigmoid_attention(q, q, q)
    lines = [r.getMessage() for r in caplog.records if "13" in r.getMessage()]
    assert len(lines) == 1
    assert "xla" in lines[0]
