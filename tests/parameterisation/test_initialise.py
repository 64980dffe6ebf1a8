"""Initial values: rms of the target = rms of the base · √(initial variance)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig
from diffmm.parameterisation.absorb import absorbed
from diffmm.parameterisation.infer import infer
from diffmm.parameterisation.initialise import init_std, rescale_init, rms_by_name
from diffmm.parameterisation.rules import CompletedP, Standard, evaluate


def config(width, num_layers):
    return TransformerConfig(
        vocabulary_size=40, width=width, num_layers=num_layers, head_dim=8
    )


def make(shape):
    return nnx.state(Denoiser(shape, rngs=nnx.Rngs(0)), nnx.Param)


BASE, TARGET = config(16, 2), config(64, 8)


@pytest.fixture(scope="module")
def drawn():
    return make(BASE), make(TARGET), infer(make, BASE, TARGET)


def test_same_size_is_the_identity_bit_for_bit(drawn):
    base, _, _ = drawn
    leaves = infer(make, BASE, BASE)
    multipliers = evaluate(CompletedP(), leaves)
    got = rescale_init(base, leaves, multipliers, rms_by_name(base))
    jax.tree.map(np.testing.assert_array_equal, got, base)


def test_variances_follow_the_rule(drawn):
    base, target, leaves = drawn
    base_rms = rms_by_name(base)
    for rule in (CompletedP(alpha=0.5), Standard()):
        multipliers = evaluate(rule, leaves)
        got = rms_by_name(rescale_init(target, leaves, multipliers, base_rms))
        want = init_std(leaves, multipliers, base_rms)
        for name in leaves:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
            variance = multipliers[name].init_variance
            np.testing.assert_allclose(want[name], base_rms[name] * variance**0.5)


def test_the_own_initialiser_of_the_denoiser_is_the_rule(drawn):
    """Fan-in matrices, unit embeddings, N(0, 1/D²) unembedding: nothing is left."""
    base, target, leaves = drawn
    multipliers = evaluate(CompletedP(), leaves)
    got = rms_by_name(rescale_init(target, leaves, multipliers, rms_by_name(base)))
    for name, rms in rms_by_name(target).items():
        # Standard error of a sample's rms: 1/√(2n), at n = 512 of the base's smallest.
        np.testing.assert_allclose(got[name], rms, rtol=4 / np.sqrt(2 * 512))


def test_gains_stay_and_absorbed_leaves_shrink(drawn):
    base, target, leaves = drawn
    multipliers = absorbed(evaluate(CompletedP(), leaves), leaves)
    got = rescale_init(target, leaves, multipliers, rms_by_name(base))
    rms = rms_by_name(got)
    assert rms["blocks/mlp_norm/gain"] == rms["final_norm/gain"] == 1.0
    down = rms_by_name(base)["blocks/mlp/down"]
    np.testing.assert_allclose(rms["blocks/mlp/down"], down * 0.5 * 0.25, rtol=1e-6)


def test_factors_per_layer(drawn):
    base, target, leaves = drawn
    multipliers = evaluate(CompletedP(), leaves)
    per_layer = np.arange(1.0, 9.0).reshape(8, 1, 1)
    name = "blocks/mlp/up"
    multipliers[name] = dataclasses.replace(
        multipliers[name], init_variance=multipliers[name].init_variance * per_layer
    )
    got = rescale_init(target, leaves, multipliers, rms_by_name(base))
    plain = rescale_init(
        target, leaves, evaluate(CompletedP(), leaves), rms_by_name(base)
    )
    layers = np.asarray(got["blocks"]["mlp"]["up"][...])
    np.testing.assert_allclose(
        layers / np.asarray(plain["blocks"]["mlp"]["up"][...]),
        np.broadcast_to(np.sqrt(per_layer), layers.shape),
        rtol=1e-5,
    )


def test_errors_name_the_leaf(drawn):
    base, target, leaves = drawn
    multipliers = evaluate(CompletedP(), leaves)
    rms = rms_by_name(base)
    with pytest.raises(ValueError, match=r"base_rms.*embedding"):
        rescale_init(
            target,
            leaves,
            multipliers,
            {k: v for k, v in rms.items() if k != "embedding"},
        )
    with pytest.raises(ValueError, match=r"multipliers.*embedding"):
        rescale_init(
            target,
            leaves,
            {k: v for k, v in multipliers.items() if k != "embedding"},
            rms,
        )
    zero = jax.tree.map(jnp.zeros_like, target)
    with pytest.raises(ValueError, match="starts at zero"):
        rescale_init(zero, leaves, multipliers, rms)
