"""The Hopper kernels keep the contract, in Pallas' interpreter.

The interpreter runs each of a thread block's three warpgroups in a thread that may
block, and XLA's pool has at least one thread per host device: the four that
tests/conftest.py asks for are enough on a machine of any size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import (
    CASES,
    FORWARD,
    SigmoidAttentionContract,
    draw,
    float64,
    oracle,
)
from jax.experimental.pallas import mosaic_gpu as plgpu

from diffmm_kernels.sigmoid_attention import Config, Tiles, sigmoid_attention

SKIP = None
if not hasattr(plgpu, "InterpretGPUParams"):
    SKIP = f"jax {jax.__version__} cannot interpret Hopper kernels; 0.11.2 can"


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    """A kernel that failed must not disturb those after it."""
    yield
    if SKIP is None:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        gpu_callbacks.reset_gpu_interpret_mode_state()


class TestMosaicGpu(SigmoidAttentionContract):
    implementation = "mosaic_gpu"
    interpret = True
    dtypes = ("bfloat16", "float16")
    refused = ("mask", "logit_bias")
    skip_reason = SKIP


TILES = {
    "pairs": Tiles(block_q=64, block_kv=64, stages=4),
    "tall": Tiles(block_q=128, block_kv=64, stages=3),
    "ping_pong": Tiles(block_q=64, block_kv=64, stages=2, loop="ping_pong"),
    "persistent": Tiles(block_q=64, block_kv=64, stages=3, persistent=True),
}


@pytest.mark.skipif(SKIP is not None, reason=str(SKIP))
@pytest.mark.parametrize("keywords", [{}, {"causal": True, "window": (150, 9)}])
@pytest.mark.parametrize("name", TILES)
def test_every_loop_over_many_tiles(name, keywords, monkeypatch):
    """Tiles full, masked and skipped; persistent blocks take several in turn."""
    from diffmm_kernels.sigmoid_attention.mosaic_gpu import forward_block

    monkeypatch.setattr(forward_block, "multiprocessors", lambda: 3)
    (q, k, v, _), _ = draw((1, 300, 420, 4, 2, 64, 64, {}), "bfloat16")
    keywords = {**keywords, "q_offset": 120}
    o = sigmoid_attention(
        *(q, k, v),
        **keywords,
        implementation="mosaic_gpu",
        interpret=True,
        config=Config(forward=TILES[name]),
    )
    want = oracle(*float64((q, k, v)), **keywords)["o"]
    error = np.linalg.norm(np.asarray(o, np.float64) - want) / np.linalg.norm(want)
    assert error < SigmoidAttentionContract.tolerances["bfloat16"][FORWARD]


@pytest.mark.skipif(SKIP is None, reason="this JAX can interpret Hopper kernels")
def test_an_older_jax_says_why_it_cannot_interpret():
    arrays, keywords = draw(CASES["causal"], jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.11\.2"):
        sigmoid_attention(
            *arrays[:3], **keywords, implementation="mosaic_gpu", interpret=True
        )
