"""Roles and ratios from the constructors of models that know nothing of them."""

import dataclasses
import gc
import json
import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig, preset
from diffmm.parameterisation.infer import infer
from diffmm.parameterisation.initialise import scaled_forward
from diffmm.parameterisation.leaf import Role
from diffmm.parameterisation.patterns import (
    EXPERTS,
    FLAX_ATTENTION,
    Blocks,
    Pattern,
    linear,
    norm,
    torch_linear,
)
from diffmm.parameterisation.rules import CompletedP, evaluate, role_table

LAYER = r"(?P<layer>\d+)"


def denoiser(config):
    return nnx.state(Denoiser(config, rngs=nnx.Rngs(0)), nnx.Param)


def small(width=32, num_layers=2, **more):
    return TransformerConfig(
        vocabulary_size=50, width=width, num_layers=num_layers, head_dim=8, **more
    )


def check_against_roles(leaves, m_width, m_depth):
    """Every leaf whose widths scale alike has the numbers of the role table."""
    multipliers = evaluate(CompletedP(alpha=0.75), leaves)
    for name, leaf in leaves.items():
        want = role_table(leaf.role, m_width=m_width, m_depth=m_depth, alpha=0.75)
        got = dataclasses.replace(multipliers[name], forward=want.forward)
        for field in ("init_variance", "learning_rate", "eps", "weight_decay"):
            np.testing.assert_allclose(
                getattr(got, field), getattr(want, field), rtol=1e-14, err_msg=name
            )
        assert multipliers[name].forward == (m_depth**-0.75 if leaf.residual else 1.0)


def test_the_denoiser_and_no_array_is_allocated():
    gc.collect()
    before = len(jax.live_arrays())
    leaves = infer(denoiser, preset("trimodal-320m"), preset("trimodal-3b"))
    assert len(jax.live_arrays()) == before
    check_against_roles(leaves, 3.0, 3.0)
    roles = {name: leaf.role for name, leaf in leaves.items()}
    assert roles["embedding"] is Role.EMBEDDING
    assert roles["unembedding"] is Role.UNEMBEDDING
    assert roles["final_norm/gain"] is Role.FINAL_GAIN
    assert roles["blocks/attention/query_norm/gain"] is Role.QK_GAIN
    query = leaves["blocks/attention/query"]
    assert (query.m_in, query.m_out, query.stack_axis, query.num_layers) == (
        3,
        3,
        0,
        24,
    )
    ends = {name for name, leaf in leaves.items() if leaf.residual}
    assert ends == {"blocks/attention/output", "blocks/mlp/down"}


SIGMOID = {
    "attention": "sigmoid",
    "length": 16,
    "trainable_bias": "head",
    "qk_norm": "layer",
    "norm": "layer",
}


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, {"attention/output", "mlp/down"}),
        (
            {"hybrid_norm": True},
            {
                f"{b}_post_norm/{x}"
                for b in ("attention", "mlp")
                for x in ("gain", "bias")
            },
        ),
        ({"layer_scale": 1e-4}, {"attention_scale", "mlp_scale"}),
        (
            {"hybrid_norm": True, "layer_scale": 1e-4, "mlp": "gelu"},
            {"attention_scale", "mlp_scale"},
        ),
    ],
    ids=["bare", "hybrid norm", "layer scale", "both"],
)
def test_what_sigmoid_attention_brings_along(more, ends):
    """New leaves have roles, and one place of each branch takes m_depth^-alpha."""
    base, target = small(32, 2, **SIGMOID, **more), small(64, 6, **SIGMOID, **more)
    leaves = infer(denoiser, base, target)
    hidden = {name: leaf for name, leaf in leaves.items() if name != "final_norm/bias"}
    # Gains of q and k are [head_dim], their biases too: finite, unlike hidden biases.
    finite = {name for name in hidden if re.search("(query|key)_norm/bias", name)}
    check_against_roles(
        {name: leaf for name, leaf in hidden.items() if name not in finite}, 2.0, 3.0
    )
    assert {name for name, leaf in leaves.items() if leaf.residual} == {
        f"blocks/{end}" for end in ends
    }
    roles = {name: leaf.role for name, leaf in leaves.items()}
    assert roles["blocks/attention/bias_offset"] is Role.HIDDEN_BIAS
    assert roles["blocks/attention_norm/bias"] is Role.HIDDEN_BIAS
    assert all(leaves[name].m_out == 1.0 for name in finite)
    for name in ends - {"attention/output", "mlp/down"}:
        bias = name.endswith("bias")
        assert roles[f"blocks/{name}"] is (Role.HIDDEN_BIAS if bias else Role.GAIN)
        assert not leaves[f"blocks/{name}"].matrix  # weight decay leaves it alone


def test_an_absorbed_multiplier_goes_to_the_end_of_the_branch():
    """A factor absorbed into the last gain is the one that the model multiplies by."""
    more = {"hybrid_norm": True, "layer_scale": 0.5}
    leaves = infer(denoiser, small(32, 2, **more), small(32, 4, **more))
    multipliers = evaluate(CompletedP(), leaves)
    params = denoiser(small(32, 4, **more))
    explicit = small(32, 4, **more, attention_residual=0.5, mlp_residual=0.5)
    outputs = []
    for config, values in [
        (small(32, 4, **more), scaled_forward(multipliers, params)),
        (explicit, params),
    ]:
        graphdef = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))[0]
        outputs.append(nnx.merge(graphdef, values)(jnp.arange(6)[None]))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_widths_that_scale_apart_get_their_own_ratios():
    leaves = infer(denoiser, small(32), small(64, mlp_ratio=6.0))
    up, down = leaves["blocks/mlp/up"], leaves["blocks/mlp/down"]
    assert (up.m_in, up.m_out) == (2.0, 6.0)
    assert (down.m_in, down.m_out) == (6.0, 2.0)


def test_kind_is_of_the_family_not_of_the_pair():
    """Where base and target agree, a family tells what is infinite."""
    family = (small(32), small(64, mlp_ratio=6.0))
    steps = [small(32), small(32, mlp_ratio=4.0), small(64, mlp_ratio=2.0)]
    first, second, both = (
        infer(denoiser, a, b, family=family)
        for a, b in ((steps[0], steps[1]), (steps[1], steps[2]), (steps[0], steps[2]))
    )
    for name in both:
        product = [
            evaluate(CompletedP(), leaves)[name].init_variance
            for leaves in (first, second)
        ]
        np.testing.assert_allclose(
            np.prod(product),
            evaluate(CompletedP(), both)[name].init_variance,
            rtol=1e-12,
            err_msg=name,
        )


class Attention(nnx.Module):
    """A stack of stock attention, written by somebody who never heard of roles."""

    def __init__(self, width, layers, rngs):
        self.embed = nnx.Embed(50, width, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(
                    num_heads=width // 8,
                    in_features=width,
                    qkv_features=width,
                    normalize_qk=True,
                    decode=False,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, 50, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer, normalise in zip(self.layers, self.norms, strict=True):
            x = x + layer(normalise(x))
        return self.head(x)


NNX_STACK = {
    "patterns": (
        *FLAX_ATTENTION,
        *norm(r"norms/\d+", "attn.pre_norm"),
        *linear("head", "unembed"),
    ),
    "blocks": (Blocks(path=rf"layers/{LAYER}"), Blocks(path=rf"norms/{LAYER}")),
}


def test_stock_nnx_attention_unrolled():
    def make(size):
        return nnx.state(Attention(*size, nnx.Rngs(0)), nnx.Param)

    leaves = infer(make, (32, 2), (64, 6), **NNX_STACK)
    check_against_roles(leaves, 2.0, 3.0)
    assert len(leaves) == len(jax.tree.leaves(jax.eval_shape(lambda: make((64, 6)))))
    kernel = leaves["layers/5/out/kernel"]
    assert (kernel.residual, kernel.layer, kernel.num_layers) == ("attn.res", 5, 6)
    assert kernel.base_names == ("layers/0/out/kernel", "layers/1/out/kernel")
    assert leaves["layers/0/query_ln/scale"].role is Role.QK_GAIN
    assert leaves["head/bias"].role is Role.UNEMBEDDING_BIAS


LM1B = {
    "patterns": (
        *FLAX_ATTENTION,
        *norm("LayerNorm_0", "attn.pre_norm"),
        *norm("LayerNorm_1", "mlp.pre_norm"),
        *norm("encoderdecoder_norm", "final_norm", role=Role.FINAL_GAIN),
        *linear("MlpBlock_0/Dense_0", "mlp.up"),
        *linear("MlpBlock_0/Dense_1", "mlp.down", residual="mlp.res"),
        *linear("logitdense", "unembed"),
    ),
    "blocks": (Blocks(path=f"encoderdecoderblock_{LAYER}"),),
}


def test_flax_own_language_model():
    """Names and shapes of flax's lm1b example, whose parameters are boxed."""
    file = pathlib.Path(__file__).parent / "lm1b_shapes.json"
    shapes = json.loads(file.read_text())["shapes"]

    def make(size):
        tree = {}
        for name, shape in shapes[size].items():
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = nn.Partitioned(jnp.zeros(shape), (None,) * len(shape))
        return tree

    leaves = infer(make, "64x2", "128x4", **LM1B)
    final = leaves["decoder/encoderdecoder_norm/bias"]
    assert final.role is Role.HIDDEN_BIAS
    assert not final.in_block
    # A bias of the final norm has no row of its own: it follows the shape rule.
    del leaves["decoder/encoderdecoder_norm/bias"]
    check_against_roles(leaves, 2.0, 2.0)
    assert set(leaves) <= set(shapes["128x4"])


class LinenStack(nn.Module):
    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        body = nn.scan(
            LinenBlock,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=self.layers,
        )
        x = nn.Dense(self.width, kernel_init=init, name="patch")(x)
        x, _ = body(self.width, name="stack")(x, None)
        return nn.Dense(10, name="head")(nn.RMSNorm(name="last_norm")(x))


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(4 * self.width, name="up")(nn.RMSNorm(name="norm")(x))
        return x + nn.Dense(self.width, name="down")(jax.nn.gelu(y)), None


def test_linen_scanned_on_the_second_axis_and_boxed():
    def make(size):
        return LinenStack(*size).init(jax.random.key(0), jnp.zeros((1, 12)))["params"]

    leaves = infer(
        make,
        (16, 2),
        (64, 8),
        patterns=(
            *linear("patch", "embed"),
            *norm("stack/norm", "mlp.pre_norm"),
            *linear("stack/up", "mlp.up"),
            *linear("stack/down", "mlp.down", residual="mlp.res"),
            *norm("last_norm", "final_norm", role=Role.FINAL_GAIN),
            *linear("head", "unembed"),
        ),
        blocks=(Blocks(path="stack", stack_axis=1),),
    )
    assert leaves["patch/kernel"].role is Role.EMBEDDING
    up = leaves["stack/up/kernel"]
    assert (up.shape, up.stack_axis, up.num_layers) == ((64, 8, 256), 1, 8)
    assert (up.m_in, up.m_out, up.m_depth) == (4, 4, 4)
    assert leaves["stack/down/bias"].residual == "mlp.res"
    del leaves["patch/bias"]
    check_against_roles(leaves, 4.0, 4.0)


def test_equinox_modules_with_weights_out_by_in():
    def make(width):
        keys = jax.random.split(jax.random.key(0), 3)
        model = {
            "embed": eqx.nn.Embedding(50, width, key=keys[0]),
            "attention": eqx.nn.MultiheadAttention(
                width // 8, width, qk_size=8, vo_size=8, key=keys[1]
            ),
            "head": eqx.nn.Linear(width, 50, key=keys[2]),
        }
        return eqx.filter(model, eqx.is_inexact_array)

    attention = tuple(
        pattern
        for path, module in (
            ("query", "attn.q"),
            ("key", "attn.k"),
            ("value", "attn.v"),
        )
        for pattern in torch_linear(f"{path}_proj", module)
    )
    leaves = infer(
        make,
        16,
        48,
        patterns=(
            Pattern(path="embed/weight", module="embed", kind="embedding"),
            *attention,
            *torch_linear("output_proj", "attn.o"),
            *torch_linear("head", "unembed"),
        ),
        blocks=(),
    )
    assert leaves["embed/weight"].m_out == 3
    assert leaves["head/weight"].role is Role.UNEMBEDDING
    assert leaves["attention/output_proj/weight"].role is Role.HIDDEN


def test_plain_dictionaries_and_single_tensors():
    def make(size):
        n, heads = size
        return {
            "blocks": {
                "key": {"kernel": jnp.zeros((n, 2, 8))},  # two KV heads, always
                "router": jnp.zeros((n, 4)),
                "experts": {"up": jnp.zeros((4, n, 2 * n))},
                "conv": {"kernel": jnp.zeros((3, 1, n))},
                "image": jnp.zeros((3, 3, n, n)),
                "heads": jnp.zeros((heads, 8)),
                "gate": jnp.zeros(()),
            },
            "tied": jnp.zeros((50, n)),
        }

    leaves = infer(
        make,
        (16, 2),
        (64, 8),
        patterns=(
            *FLAX_ATTENTION,
            *EXPERTS,
            Pattern(path="conv/kernel", module="conv"),
            Pattern(path="image", module="conv", in_axes=(-2,), out_axes=(-1,)),
            Pattern(path="heads", module="attn.q_norm", kind="gain"),
            Pattern(path="gate", module="gate", kind="gain", role=Role.SCALAR),
            Pattern(
                path="tied", module="embed", kind="embedding", role=Role.TIED_EMBEDDING
            ),
        ),
        blocks=(),
    )
    sides = {
        name.removeprefix("blocks/"): (leaf.m_in, leaf.m_out)
        for name, leaf in leaves.items()
    }
    assert sides == {
        "key/kernel": (4, 1),
        "router": (4, 1),
        "experts/up": (4, 4),
        "conv/kernel": (1, 4),
        "image": (4, 4),
        "heads": (1, 4),
        "gate": (1, 1),
        "tied": (1, 4),
    }
    assert leaves["tied"].role is Role.TIED_EMBEDDING


def make_pair(size):
    return {"a": {"kernel": jnp.zeros((size, size))}, "b": jnp.zeros((4, size, size))}


A = Pattern(path="a/kernel", module="x")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (make_pair, {"patterns": (A,)}, r"b \(4, 8, 8\): no pattern"),
        (
            make_pair,
            {
                "patterns": (
                    A,
                    Pattern(path="kernel", module="y"),
                    Pattern(path="b", module="x"),
                )
            },
            r"a/kernel \(8, 8\): matches \['a/kernel', 'kernel'\]",
        ),
        (
            lambda n: {"c": jnp.zeros((n, n, n))},
            {"patterns": (Pattern(path="c", module="x"),)},
            "declare in_axes",
        ),
        (
            lambda n: {"c": jnp.zeros((3, n, 5))},
            {"patterns": (Pattern(path="c", module="x"),)},
            "declare in_axes",
        ),
        (
            lambda n: {"c": jnp.zeros((n, n))},
            {"patterns": (Pattern(path="c", module="x", kind="embedding"),)},
            "more than its last",
        ),
        (
            lambda n: {f"c{n}": jnp.zeros((n,))},
            {"patterns": ()},
            "'c4' has 1 axes in one and no",
        ),
        (
            make_pair,
            {
                "patterns": (A, Pattern(path="b", module="x")),
                "overrides": (Pattern(path="nowhere", module="x"),),
            },
            "overrides: 'nowhere' matches no leaf",
        ),
        (
            make_pair,
            {"patterns": (), "blocks": (Blocks(path="nowhere", stack_axis=0),)},
            "blocks: 'nowhere' matches no leaf",
        ),
        (lambda n: {"c": jnp.zeros((n,), int)}, {"patterns": ()}, "no floating-point"),
    ],
)
def test_errors_list_the_leaves(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        infer(make, 4, 8, **{"blocks": (), **arguments})


def test_blocks_need_an_index_or_an_axis():
    for bad in ({"path": "blocks"}, {"path": f"b{LAYER}", "stack_axis": 0}):
        with pytest.raises(ValueError, match="stack_axis"):
            Blocks(**bad)


def test_an_override_wins():
    leaves = infer(
        denoiser,
        small(32),
        small(64),
        overrides=(Pattern(path="mlp/gate", module="mlp.other"),),
    )
    assert leaves["blocks/mlp/gate"].module == "mlp.other"


def test_a_thousand_leaves_in_under_a_second():
    import time

    def make(size):
        layer = {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros((size,))}
        return {f"block_{i}": layer for i in range(500)}

    shapes = [jax.eval_shape(lambda n=n: make(n)) for n in (8, 16)]
    started = time.perf_counter()
    leaves = infer(
        lambda i: jax.tree.map(lambda s: jnp.zeros(s.shape), shapes[i]),
        0,
        1,
        patterns=linear(r"block_\d+", "mlp.up"),
        blocks=(Blocks(path=f"block_{LAYER}"),),
    )
    assert len(leaves) == 1000
    assert time.perf_counter() - started < 5.0  # about 0.5 s alone on one core
