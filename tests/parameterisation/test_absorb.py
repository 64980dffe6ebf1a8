"""A multiplier in the model and the same inside the weight: one trajectory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig
from diffmm.optim.adamw import adamw
from diffmm.optim.hyperparameters import AdamW
from diffmm.parameterisation.absorb import absorbed, absorbed_factors
from diffmm.parameterisation.infer import infer
from diffmm.parameterisation.initialise import scaled_forward
from diffmm.parameterisation.patterns import Blocks, Pattern
from diffmm.parameterisation.rules import CompletedP, CompleteP, evaluate

HYPER = AdamW(
    learning_rate=3e-2, b1=0.9, b2=0.95, eps=1e-4, eps_root=1e-9, weight_decay=0.1
)


def train(loss, params, optimizer, steps):
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def network(size):
    """Residual MLP blocks with an explicit multiplier on branches and logits."""
    width, layers = size
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.zeros(()).dtype

    def draw(key, *shape):
        return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5

    return {
        "embed": draw(keys[0], 5, width),
        "blocks": {
            "up": draw(keys[1], layers, width, 2 * width),
            "down": draw(keys[2], layers, 2 * width, width),
            "bias": jnp.zeros((layers, width), dtype),
        },
        "unembed": draw(keys[3], width, 3),
    }


PATTERNS = (
    Pattern(path="embed", module="embed", kind="embedding"),
    Pattern(path="up", module="mlp.up"),
    Pattern(path="down", module="mlp.down", residual="mlp.res"),
    Pattern(path="bias", module="mlp.down_bias", kind="bias", residual="mlp.res"),
    Pattern(path="unembed", module="unembed"),
)


def apply(params, x, branch=1.0, logits=1.0):
    h = x @ params["embed"]
    for layer in range(params["blocks"]["up"].shape[0]):
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        hidden = jnp.tanh(h @ block["up"]) @ block["down"] + block["bias"][None]
        h = h + branch * hidden
    return logits * (h @ params["unembed"])


@pytest.mark.parametrize("decay", ["coupled", "independent"])
@pytest.mark.parametrize("target", [(16, 8), (24, 6)])
def test_function_space_equality(target, decay):
    """CompleteP with multipliers = absorbed CompleteP, in every step."""
    with jax.enable_x64(True):
        leaves = infer(
            network,
            (8, 2),
            target,
            patterns=PATTERNS,
            blocks=(Blocks(path="blocks", stack_axis=0),),
        )
        multipliers = evaluate(CompleteP(alpha=1.0), leaves)
        m_width, m_depth = target[0] / 8, target[1] / 2
        params = network(target)
        x = jax.random.normal(jax.random.key(1), (16, 5), jnp.float64)
        y = jax.random.normal(jax.random.key(2), (16, 3), jnp.float64)
        hyper = dataclasses.replace(
            HYPER, decay=decay, weight_decay=0.1 if decay == "coupled" else 3e-3
        )

        def explicit(params):
            out = apply(params, x, branch=1 / m_depth, logits=1 / m_width)
            return jnp.mean((out - y) ** 2)

        def plain(params):
            return jnp.mean((apply(params, x) - y) ** 2)

        inside = absorbed(multipliers, leaves)
        first = train(explicit, params, adamw(hyper, multipliers), 40)
        second = train(
            plain, scaled_forward(multipliers, params), adamw(hyper, inside), 40
        )
        difference = apply(second, x) - apply(first, x, 1 / m_depth, 1 / m_width)
        assert float(jnp.max(jnp.abs(difference))) < 1e-12
        assert float(jnp.max(jnp.abs(apply(first, x)))) > 0.1


def test_the_denoiser_with_and_without_multipliers_is_the_same_model():
    """A power of two commutes with rounding: float32 parameters agree exactly."""

    def shape(layers, **more):
        return TransformerConfig(
            vocabulary_size=20, width=16, num_layers=layers, head_dim=8, **more
        )

    def make(config):
        return nnx.state(Denoiser(config, rngs=nnx.Rngs(0)), nnx.Param)

    leaves = infer(make, shape(1), shape(4))
    multipliers = evaluate(CompletedP(), leaves)
    factors = {"blocks/attention/output": 0.25, "blocks/mlp/down": 0.25}
    assert absorbed_factors(multipliers) == factors
    tokens = jax.random.randint(jax.random.key(3), (4, 6), 0, 20)

    def loss_of(config):
        graphdef = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))[0]

        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens)
            return -jnp.mean(
                jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
            )

        return loss

    params = make(shape(4))
    with_multipliers = train(
        loss_of(shape(4, attention_residual=0.25, mlp_residual=(0.25,) * 4)),
        params,
        adamw(HYPER, multipliers),
        5,
    )
    without = train(
        loss_of(shape(4)),
        scaled_forward(multipliers, params),
        adamw(HYPER, absorbed(multipliers, leaves)),
        5,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0),
        scaled_forward(multipliers, with_multipliers),
        without,
    )
