"""Plain JAX, tile by tile, and the definition: both keep the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import CASES, SigmoidAttentionContract, draw, relative

from diffmm_kernels.sigmoid_attention import Config, Tiles, sigmoid_attention


class TestReference(SigmoidAttentionContract):
    implementation = "reference"

    # Its weights stay float32: only inputs and outputs are rounded.


class TestXla(SigmoidAttentionContract):
    implementation = "xla"


@pytest.mark.slow
class TestXlaInSmallTiles(SigmoidAttentionContract):
    """Several tiles in both directions, of sizes that do not divide each other."""

    implementation = "xla"
    dtypes = ("float32",)

    def attend(self, q, k, v, **keywords):
        config = Config(
            forward=Tiles(block_q=32, block_kv=48),
            backward=Tiles(block_q=40, block_kv=24),
        )
        return super().attend(q, k, v, **{"config": config, **keywords})

    def test_every_dtype(self):
        """Tested with whole tiles."""


def _temporary_bytes(length, implementation, causal):
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q, k, v):
        o = sigmoid_attention(q, k, v, causal=causal, implementation=implementation)
        return (o * o).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape)
    return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal):
    lengths = (2048, 8192)
    tiled = [_temporary_bytes(n, "xla", causal) for n in lengths]
    # A constant tile and terms linear in the length: at most 4 times for 4 times.
    assert tiled[1] <= 4 * tiled[0]
    dense = _temporary_bytes(2048, "reference", causal)
    assert tiled[0] < dense / 2


def test_invisible_tiles_are_skipped():
    """NaN in a tile that nobody sees would show: 0 · NaN is NaN."""
    arrays, _ = draw((1, 128, 128, 1, 1, 16, 16, {}), "float32")
    q, k, v, _ = arrays
    config = Config(forward=Tiles(block_q=32, block_kv=32))
    v = v.at[:, 64:].set(jnp.nan)
    o = sigmoid_attention(q, k, v, causal=True, config=config, implementation="xla")
    assert bool(jnp.isfinite(o[:, :64]).all())
    assert bool(jnp.isnan(o[:, 64:]).all())


def test_float64_holds_to_rounding():
    with jax.enable_x64(True):
        arrays, keywords = draw(CASES["causal"], "float32")
        arrays = [x.astype(jnp.float64) for x in arrays]

        def run(name):
            def attend(q, k, v):
                return sigmoid_attention(q, k, v, implementation=name, **keywords)

            @jax.jit
            def both(*inputs):
                o, pull = jax.vjp(attend, *inputs)
                return (o, *pull(arrays[3]))

            return both(*arrays[:3])

        for x, y in zip(run("xla"), run("reference"), strict=True):
            assert x.dtype == jnp.float64
            assert relative(x, y) < 1e-12


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        arrays, keywords = draw((1, 5, 7, 2, 1, 4, 4, {"causal": True}), "float32")
        arrays = [x.astype(jnp.float64) for x in arrays]
        q, k, v, do = arrays

        @jax.jit
        def loss(q, k, v, bias):
            o = sigmoid_attention(q, k, v, bias=bias, implementation="xla", **keywords)
            return (o * do).sum()

        point = (q, k, v, jnp.asarray(-1.0))
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*point)
        rng = np.random.default_rng(0)
        for index in range(4):
            direction = jnp.asarray(rng.normal(size=point[index].shape))
            step = 1e-6

            def moved(sign, index=index, direction=direction, step=step):
                moved = list(point)
                moved[index] = point[index] + sign * step * direction
                return loss(*moved)

            slope = (moved(1) - moved(-1)) / (2 * step)
            want = (grads[index] * direction).sum()
            # Error of the central difference: step² · third derivative, plus rounding.
            np.testing.assert_allclose(slope, want, rtol=1e-8, atol=1e-9)
