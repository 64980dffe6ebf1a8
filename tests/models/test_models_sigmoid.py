"""Transformers with sigmoid attention: recipe, presets, memory, other lengths."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm._tree import named_leaves, path_name
from diffmm.models import (
    MIXED_VALUES,
    Block,
    Denoiser,
    FSQAutoencoder,
    FSQConfig,
    SigmoidAttention,
    TransformerConfig,
    attention_function,
    logical_axes,
    rms_norm,
    sigmoid_defaults,
)
from diffmm_kernels.sigmoid_attention import OUTPUT_NAME, dispatch, reference

SOFTMAX = TransformerConfig(
    vocabulary_size=19, width=16, num_layers=2, head_dim=8, length=8
)
SIGMOID = dataclasses.replace(SOFTMAX, attention="sigmoid")
# Every part that sigmoid attention brought along.
FULL = sigmoid_defaults(
    SOFTMAX,
    length=8,
    positions="alibi",
    causal=True,
    qk_norm="layer",
    norm="layer",
    layer_scale=0.1,
    trainable_bias="head",
    mlp="gelu",
)


@functools.cache
def parameters(config):
    """Random values in place of zeros and ones, so that every leaf matters."""
    rng = np.random.default_rng(0)
    params = nnx.state(Denoiser(config, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(
        lambda x: x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32),
        params,
    )


@functools.cache
def abstract(config, attention=None):
    """Structure of a model, nothing drawn."""
    return nnx.split(
        nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0), attention=attention))
    )


@functools.cache
def compiled(config, attention=None):
    graphdef, _ = abstract(config, attention)
    return jax.jit(lambda params, *arguments: nnx.merge(graphdef, params)(*arguments))


def forward(config, params, *arguments, attention=None):
    return compiled(config, attention)(params, *arguments)


def random_tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, SOFTMAX.vocabulary_size)


def test_one_field_switches_the_attention_and_nothing_else():
    params = {config: parameters(config) for config in (SOFTMAX, SIGMOID)}
    leaves = [named_leaves(tree) for tree in params.values()]
    assert list(leaves[0]) == list(leaves[1])
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaf, leaves[1][name])
    tokens = random_tokens((2, 8))
    softmax, sigmoid = (forward(c, p, tokens) for c, p in params.items())
    assert float(jnp.abs(softmax - sigmoid).max()) > 1e-3
    # The argument of the model wins over its configuration.
    explicit = forward(
        SOFTMAX, params[SOFTMAX], tokens, attention=SigmoidAttention(length=8)
    )
    np.testing.assert_array_equal(explicit, sigmoid)
    assert attention_function(SIGMOID) == SigmoidAttention(length=8)
    dense = attention_function(SIGMOID, implementation="reference")
    out = forward(SIGMOID, params[SIGMOID], tokens, attention=dense)
    np.testing.assert_allclose(out, sigmoid, atol=1e-5)


def test_the_image_autoencoder_switches_too():
    config = FSQConfig(
        levels=(5, 5), image_size=(4, 6), channels=1, patch_size=2, width=8, head_dim=8
    )
    images = jax.random.uniform(jax.random.key(0), (2, 4, 6, 1))

    def reconstruct(config):
        graphdef, params = nnx.split(FSQAutoencoder(config, rngs=nnx.Rngs(0)))
        return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x)[0])(params, images)

    sigmoid = dataclasses.replace(config, attention="sigmoid")
    assert sigmoid.transformer.length == 6
    assert float(jnp.abs(reconstruct(config) - reconstruct(sigmoid)).max()) > 0
    with pytest.raises(ValueError, match="attention must be one of"):
        dataclasses.replace(config, attention="linear")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_block_is_its_formula(kind):
    """``x + γ · m · norm2(branch(norm1(x)))`` by hand, in float64."""
    config = dataclasses.replace(
        FULL, causal=False, norm=kind, qk_norm=kind, trainable_bias="layer"
    )
    model = nnx.merge(abstract(config)[0], parameters(config))
    graphdef, stacked = nnx.split(model.blocks)
    state = jax.tree.map(lambda leaf: leaf[1], stacked)
    block = nnx.merge(graphdef, state)
    assert isinstance(block, Block)
    p = {
        name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(state).items()
    }

    def norm(name, x):
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)
        return x * p[f"{name}/gain"] + (p[f"{name}/bias"] if kind == "layer" else 0.0)

    def gelu(x):
        from scipy.special import ndtr

        return x * ndtr(x)

    residuals = np.array([0.5, 2.0])
    x = np.random.default_rng(0).normal(size=(2, 8, 16))
    inner = norm("attention_norm", x)
    q, k, v = (
        np.einsum("bld,dhk->blhk", inner, p[f"attention/{name}"])
        for name in ("query", "key", "value")
    )
    q, k = norm("attention/query_norm", q), norm("attention/key_norm", k)
    distance = np.abs(np.arange(8)[:, None] - np.arange(8)[None, :])
    slopes = np.array([1 / 16, 1 / 256])
    logits = np.einsum("blhk,bshk->bhls", q, k) / np.sqrt(8)
    logits = logits - slopes[:, None, None] * distance - np.log(8)
    weights = 1 / (1 + np.exp(-(logits + p["attention/bias_offset"])))
    mixed = np.einsum("bhls,bshk->blhk", weights, v)
    branch = np.einsum("blhk,hkd->bld", mixed, p["attention/output"])
    branch = norm("attention_post_norm", branch) * p["attention_scale"]
    middle = x + residuals[0] * branch
    hidden = gelu(norm("mlp_norm", middle) @ p["mlp/up"]) @ p["mlp/down"]
    hidden = norm("mlp_post_norm", hidden) * p["mlp_scale"]
    expected = middle + residuals[1] * hidden
    out = jax.jit(lambda x, r: block(x, None, None, r))(
        jnp.asarray(x, jnp.float32), jnp.asarray(residuals, jnp.float32)
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_a_branch_without_second_norm_and_gain_has_no_leaves_for_them():
    names = set(named_leaves(abstract(SIGMOID)[1]))
    extra = set(named_leaves(abstract(FULL)[1])) - names
    assert extra == {
        *("blocks/attention_scale", "blocks/mlp_scale", "final_norm/bias"),
        "blocks/attention/bias_offset",
        *(f"blocks/attention/{x}_norm/bias" for x in ("query", "key")),
        *(f"blocks/{x}_norm/bias" for x in ("attention", "mlp")),
        *(f"blocks/{x}_post_norm/gain" for x in ("attention", "mlp")),
        *(f"blocks/{x}_post_norm/bias" for x in ("attention", "mlp")),
    }
    bare = dataclasses.replace(SIGMOID, qk_norm=None)
    assert names - set(named_leaves(abstract(bare)[1])) == {
        "blocks/attention/query_norm/gain",
        "blocks/attention/key_norm/gain",
    }
    # Gains per channel start at their value, offsets of the bias at zero.
    params = named_leaves(nnx.state(Denoiser(FULL, rngs=nnx.Rngs(0)), nnx.Param))
    assert np.all(params["blocks/mlp_scale"] == np.float32(0.1))
    assert params["blocks/attention/bias_offset"].shape == (2, 2)
    assert not np.any(params["blocks/attention/bias_offset"])


@pytest.mark.parametrize("sharing", ["layer", "head"])
def test_every_new_leaf_has_named_axes(sharing):
    config = dataclasses.replace(FULL, trainable_bias=sharing)
    params = abstract(config)[1]
    axes, _ = jax.tree_util.tree_flatten_with_path(
        logical_axes(params), is_leaf=lambda x: isinstance(x, tuple)
    )
    axes = {path_name(path): names for path, names in axes}
    for name, leaf in named_leaves(params).items():
        assert len(axes[name]) == leaf.ndim, name


@pytest.mark.parametrize(
    ("config", "change"),
    [(SIGMOID, {"remat": True}), (FULL, {"scan": False})],
    ids=["rematerialised", "unrolled"],
)
def test_scan_unrolled_and_rematerialised_give_the_same_numbers(config, change):
    tokens = random_tokens((2, 7))
    params = parameters(config)

    def loss(params, config):
        return jnp.sum(nnx.merge(abstract(config)[0], params)(tokens) ** 2)

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = step(params, config)
    other_value, other_grads = step(params, dataclasses.replace(config, **change))
    np.testing.assert_allclose(value, other_value, rtol=2e-6)
    for name, leaf in named_leaves(grads).items():
        other = named_leaves(other_grads)[name]
        scale = np.abs(leaf).max() + 1e-30
        assert scale > 1e-12, name  # every leaf has a gradient
        np.testing.assert_allclose(leaf / scale, other / scale, atol=5e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("softmax", "rope"),
        ("softmax", "alibi"),
        ("sigmoid", "rope"),
        ("sigmoid", "none"),
    ],
)
def test_causal_models_do_not_see_the_future(kind, positions):
    config = dataclasses.replace(
        SOFTMAX, attention=kind, positions=positions, causal=True
    )
    params = parameters(config)
    tokens = random_tokens((1, 8))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % SOFTMAX.vocabulary_size)
    first, second = (forward(config, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(first[0, :5], second[0, :5])
    assert float(jnp.abs(first[0, 5:] - second[0, 5:]).min(axis=-1).max()) > 0
    assert float(jnp.abs(first[0, 7] - second[0, 7]).max()) > 1e-5


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_padding_and_packing_do_not_change_logits(positions):
    """Packed rows keep the bias of the configured length, alone or together."""
    config = dataclasses.replace(SIGMOID, positions=positions)
    params = parameters(config)
    first, second = random_tokens((1, 5)), random_tokens((1, 4), seed=1)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    places = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    together = forward(config, params, packed, places, segments)
    np.testing.assert_allclose(
        together[:, :5], forward(config, params, first), atol=1e-5
    )
    np.testing.assert_allclose(
        together[:, 5:9], forward(config, params, second), atol=1e-5
    )
    assert np.all(np.isfinite(together))


def test_rows_of_another_length_keep_the_bias_or_the_mass():
    """Trained at n and read at 2n: b stays -log n; a copy at 2n keeps the mass."""
    n, config = 64, dataclasses.replace(SIGMOID, length=64)
    params = parameters(config)
    tokens = random_tokens((4, 2 * n))

    def mass(config, tokens):
        graphdef = abstract(config)[0]
        return jax.jit(
            lambda params: (
                nnx.merge(graphdef, params).attention_statistics(tokens).row_mass
            )
        )(params)

    trained = mass(config, tokens[:, :n])
    kept = mass(config, tokens)
    rescaled = mass(dataclasses.replace(config, length=2 * n), tokens)
    # In the first layer, whose inputs do not know the length. A mass is a mean over at
    # least 256 tokens and their keys, whose weights vary by about their size: standard
    # error 1/sqrt(256) = 0.06 at most, twice in a ratio.
    np.testing.assert_allclose(kept[0] / trained[0], 2.0, rtol=0.3)
    np.testing.assert_allclose(rescaled[0] / trained[0], 1.0, rtol=0.3)
    # Weights are so small that sigma is an exponential: at the same inputs the two
    # biases differ by a factor of 2, up to terms of order e^s / n.
    np.testing.assert_allclose(kept[0] / rescaled[0], 2.0, rtol=0.1)


def test_causal_mass_grows_along_the_row():
    n = 16
    attention = SigmoidAttention(length=n, causal=True)
    zeros = jnp.zeros((1, n, 1, 4))
    mass = attention(zeros, zeros, jnp.ones_like(zeros))[0, :, 0, 0]
    np.testing.assert_allclose(mass, np.arange(1, n + 1) / (n + 1), rtol=1e-6)


def test_statistics_of_a_model_leave_its_output_alone():
    config = dataclasses.replace(FULL, scan=False)
    params = parameters(config)
    tokens = random_tokens((2, 8))
    segments = jnp.asarray([[1] * 8, [1] * 5 + [0] * 3], jnp.int32)

    def statistics(config):
        graphdef = abstract(config)[0]
        return jax.jit(
            lambda p: nnx.merge(graphdef, p).attention_statistics(
                tokens, None, segments
            )
        )(params)

    unrolled, scanned = statistics(config), statistics(FULL)
    for left, right in zip(unrolled, scanned, strict=True):
        assert left.shape == (2, 2)
        np.testing.assert_allclose(left, right, rtol=1e-5)
    softmax = dataclasses.replace(FULL, attention="softmax", trainable_bias=None)
    kept = set(named_leaves(parameters(softmax)))
    assert set(named_leaves(params)) - kept == {"blocks/attention/bias_offset"}
    model = nnx.merge(abstract(softmax)[0], parameters(softmax))
    found = jax.jit(lambda t: model.attention_statistics(t).row_mass)(tokens)
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)


class Marked:
    """The definition, under a name that can be counted in a jaxpr."""

    def supports(self, operands, options):
        return None

    def forward(self, operands, options):
        def forward_kernel(operands):
            return reference.forward(operands, options)

        return jax.jit(forward_kernel)(operands)

    def backward(self, operands, options, do, needs):
        def attend(q, k, v):
            new = operands._replace(q=q, k=k, v=v)
            return reference.forward(new, options)

        qkv = operands.q, operands.k, operands.v
        dq, dk, dv = jax.vjp(attend, *qkv)[1](do)
        return dispatch.Gradients(dq, dk, dv)


def count(jaxpr, name):
    """Calls of a jitted function; the body of a scan counts once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == name:
            total += 1
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += count(inner, name)
    return total


@pytest.mark.parametrize("scan", [True, False])
def test_the_forward_kernel_runs_once_in_a_training_step(monkeypatch, scan):
    monkeypatch.setattr(dispatch, "implementation", lambda name: Marked())
    layers = 1 if scan else SIGMOID.num_layers  # a scan has one body

    def calls(remat):
        config = dataclasses.replace(SIGMOID, scan=scan, remat=remat)
        graphdef, params = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))
        tokens = random_tokens((2, 8))

        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params)(tokens) ** 2)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
        # As compiled: what nothing uses is gone.
        jaxpr, _ = jax.interpreters.partial_eval.dce_jaxpr(
            jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars)
        )
        return count(jaxpr, "forward_kernel")

    assert calls(remat=False) == layers
    assert calls(remat=True) == 2 * layers  # full rematerialisation runs it again


def test_one_name_serves_policies_for_both_attentions():
    assert MIXED_VALUES == OUTPUT_NAME


def test_embeddings_start_at_their_standard_deviation():
    config = dataclasses.replace(
        SOFTMAX, vocabulary_size=500, embedding_std=0.02, unembedding_std=0.25
    )
    leaves = named_leaves(nnx.state(Denoiser(config, rngs=nnx.Rngs(0)), nnx.Param))
    # 8,000 draws: relative error of a standard deviation 1/sqrt(16,000) = 0.8 %.
    np.testing.assert_allclose(leaves["embedding"].std(), 0.02, rtol=0.04)
    np.testing.assert_allclose(leaves["unembedding"].std(), 0.25, rtol=0.04)


def test_the_epsilon_of_the_norm_is_the_configured_one():
    x = jnp.full((1, 1, 4), 1e-3)
    gain = jnp.ones(4)
    np.testing.assert_allclose(rms_norm(x, gain, 1e-6), 1e-3 / np.sqrt(2e-6), rtol=1e-5)
    np.testing.assert_allclose(
        rms_norm(x, gain, 1e-5), 1e-3 / np.sqrt(11e-6), rtol=1e-5
    )
