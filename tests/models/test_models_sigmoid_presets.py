"""Published sigmoid transformers: shapes, parameter counts, recipes."""

import dataclasses

import pytest
from flax import nnx

from diffmm._tree import named_leaves
from diffmm.models import (
    RECIPES,
    Denoiser,
    TransformerConfig,
    attention_function,
    num_parameters,
    preset,
    recipe,
    sigmoid_defaults,
    training_flops_per_token,
)

SOFTMAX = TransformerConfig(
    vocabulary_size=19, width=16, num_layers=2, head_dim=8, length=8
)


@pytest.mark.parametrize(
    ("name", "blocks", "total"),
    [
        # Blocks: 4·D² + 3·D·F a layer, 2·D·F for the example.
        ("sigmoid-1b", 1_233_125_376, 1_367_544_832),
        ("sigmoid-7b", 6_476_005_376, 6_744_977_408),
        ("sigmoid-example", 226_492_416, 423_747_584),
    ],
)
def test_parameter_counts_of_presets(name, blocks, total):
    config = preset(name)
    model = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    params = nnx.split(model)[1]
    leaves = named_leaves(params)
    matrices = sum(
        leaf.size
        for path, leaf in leaves.items()
        if path.startswith("blocks/") and not path.endswith(("gain", "bias"))
    )
    products = 3 if config.mlp == "swiglu" else 2
    width, hidden = config.width, config.mlp_hidden
    block = 4 * width**2 + products * width * hidden
    assert matrices == blocks == config.num_layers * block
    assert num_parameters(params) == total
    # Causal attention halves 12·layers·D·L.
    assert training_flops_per_token(config, 4096) == 6 * (
        blocks + config.vocabulary_size * width + config.num_layers * width * 4096
    )


def test_presets_are_the_published_ones():
    for name, width, heads, layers, hidden in [
        ("sigmoid-1b", 2048, 32, 24, 5632),
        ("sigmoid-7b", 4096, 32, 32, 11008),
    ]:
        config = preset(name)
        shape = (config.width, config.num_heads, config.num_layers, config.mlp_hidden)
        assert shape == (width, heads, layers, hidden)
        # 8/3 of the width, rounded up to a multiple of 256.
        assert hidden == -(-8 * width // 3 // 256) * 256
        assert config.vocabulary_size == 32 * 1024
        assert (config.positions, config.causal, config.hybrid_norm) == (
            "alibi",
            True,
            True,
        )
        assert (config.norm, config.qk_norm, config.norm_epsilon) == (
            "rms",
            "rms",
            1e-5,
        )
        assert config.layer_scale is None
        bias = attention_function(config).constant
        assert bias == pytest.approx(-8.317766, abs=5e-7)
        assert recipe(name).matrix_multiplier == 768 / width
        assert recipe(name).length == config.length == 4096
    assert recipe("sigmoid-1b").tokens == 314_572_800_000
    assert recipe("sigmoid-7b").tokens == 1_048_576_000_000
    assert recipe("sigmoid-1b").matrix_multiplier == 0.375
    assert recipe("sigmoid-7b").matrix_multiplier == 0.1875
    example = preset("sigmoid-example")
    assert (example.width, example.num_heads, example.head_dim) == (3072, 12, 256)
    assert (example.num_layers, example.mlp_hidden, example.mlp) == (2, 12288, "gelu")
    assert attention_function(example).constant == pytest.approx(-7.62, abs=5e-3)
    assert not example.hybrid_norm
    assert recipe("sigmoid-example").steps == 65_536
    # One argument makes the softmax baseline of each.
    for name in RECIPES:
        baseline = preset(name, attention="softmax")
        assert dataclasses.replace(baseline, attention="sigmoid") == preset(name)
    with pytest.raises(ValueError, match="sigmoid-1b"):
        recipe("trimodal-3b")


def test_defaults_of_a_new_sigmoid_transformer():
    config = sigmoid_defaults(SOFTMAX, length=2048)
    assert config == dataclasses.replace(
        SOFTMAX, attention="sigmoid", length=2048, hybrid_norm=True
    )
    assert (config.positions, config.qk_norm, config.layer_scale) == (
        "rope",
        "rms",
        None,
    )
    speech = sigmoid_defaults(SOFTMAX, length=2048, layer_scale=1e-4)
    assert speech.layer_scale == 1e-4
