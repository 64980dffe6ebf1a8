"""The Hopper backward kernels: gradients in the interpreter, lowering everywhere.

Beyond the contract (one tile, mostly): many tiles that are full, masked and skipped,
heads in groups of 1, 2 and 8, both divisions of the work of dK and dV, and the single
pass. Its dQ, which thread blocks add up in memory, the interpreter can only check for
one tile of keys.
"""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import draw, float64, oracle, relative
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from diffmm_kernels.sigmoid_attention import Config, Tiles, sigmoid_attention
from diffmm_kernels.sigmoid_attention.arguments import Needs, canonical
from diffmm_kernels.sigmoid_attention.mosaic_gpu import common, dkv, dq, single_pass
from diffmm_kernels.sigmoid_attention.mosaic_gpu.score_tiles import (
    call_of,
    padded_arrays,
)

# The function of that name hides the module.
module = importlib.import_module("diffmm_kernels.sigmoid_attention.mosaic_gpu.backward")

SKIP = None
if not hasattr(plgpu, "InterpretGPUParams"):
    SKIP = f"jax {jax.__version__} cannot interpret Hopper kernels; 0.11.2 can"
interpreted = pytest.mark.skipif(SKIP is not None, reason=str(SKIP))

# P and dS are rounded to the dtype for their products and the results once more, each
# by at most 2^-9 (bfloat16) or 2^-12 (float16); σ adds 3.6e-4 in the former.
TOLERANCE = {"bfloat16": 5e-3, "float16": 6e-4}
H100 = AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3",
    num_cores=132,
    **({"platform": "gpu"} if "platform" in AbstractDevice.__match_args__ else {}),
)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    """A kernel that failed must not disturb those after it."""
    yield
    if SKIP is None:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        gpu_callbacks.reset_gpu_interpret_mode_state()


def prepared(q, k, v, **keywords):
    """Operands and options of a call."""
    defaults = dict.fromkeys(
        (
            *("bias", "scale", "window", "q_segment_ids", "kv_segment_ids"),
            *("q_lengths", "kv_lengths", "alibi_slopes", "mask", "logit_bias"),
            *("out_dtype", "config", "interpret"),
        )
    )
    defaults |= {"causal": False, "q_offset": 0, "precision": "default"}
    defaults |= {"deterministic": False}
    return canonical(q, k, v, **(defaults | keywords))[:2]


def check(gradients, arrays, keywords, dtype):
    want = oracle(*float64(arrays), **keywords)
    for name in ("q", "k", "v"):
        got = getattr(gradients, name)
        assert got.dtype == dtype
        assert relative(got, want[name]) < TOLERANCE[dtype], name
    if gradients.bias is not None:
        # Sums over many terms of both signs: of the size that their rounding has.
        size = np.sqrt(np.square(want["ds"]).sum((2, 3)))
        error = np.abs(np.asarray(gradients.bias, np.float64) - want["bias"])
        assert np.all(error <= 1e-2 * size)


_IDS = np.sort(np.random.default_rng(0).integers(0, 4, (1, 200)), axis=1)
SLOPES = np.array([0.5, 0.25], np.float32)
CASES = {
    # name: dtype, (B, T, S, H, K, D, E), tiles, keywords
    "full": ("bfloat16", (1, 150, 260, 2, 2, 64, 64), (64, 64), {}),
    "causal": (
        *("bfloat16", (1, 256, 256, 2, 1, 64, 64), (64, 64)),
        {"causal": True},
    ),
    "window_groups_of_8": (
        *("float16", (1, 140, 200, 8, 1, 32, 64), (64, 64)),
        {"window": (70, 5), "q_offset": 60, "bias": np.full(8, -4.0, np.float32)},
    ),
    "segments": (
        *("bfloat16", (1, 200, 200, 2, 1, 64, 128), (128, 128)),
        {"q_segment_ids": _IDS.astype(np.int32), "alibi_slopes": SLOPES},
    ),
    "lengths_by_roles": (
        *("bfloat16", (2, 130, 150, 2, 1, 192, 256), (64, 64)),
        {
            "q_lengths": np.array([0, 120], np.int32),
            "kv_lengths": np.array([150, 70], np.int32),
            "causal": True,
            "q_offset": 20,
            "bias": np.full(2, -3.0, np.float32),
        },
    ),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_two_kernels(name):
    dtype, shape, (block_q, block_kv), keywords = CASES[name]
    arrays, _ = draw((*shape, {}), dtype)
    operands, options = prepared(*arrays[:3], **keywords)
    tiles = Tiles(block_q=block_q, block_kv=block_kv, stages=2)
    options = dataclasses.replace(
        options, interpret=True, config=Config(backward=tiles)
    )
    needs = Needs(bias=operands.bias is not None, logit_bias=False)
    run = jax.jit(lambda x, do: module.backward(x, options, do, needs))
    gradients = run(operands, arrays[3])
    assert (gradients.bias is not None) == needs.bias
    check(gradients, arrays, keywords, dtype)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "shape", "keywords"),
    [
        ("bfloat16", (1, 200, 128, 2, 1, 128, 128), {"causal": True, "q_offset": -30}),
        ("float16", (1, 150, 100, 2, 2, 64, 64), {"window": (60, None)}),
    ],
)
def test_single_pass_of_one_tile_of_keys(dtype, shape, keywords):
    arrays, _ = draw((*shape, {}), dtype)
    operands, options = prepared(*arrays[:3], **keywords)
    options = dataclasses.replace(options, interpret=True)
    block_q = single_pass.queries_per_step(shape[-2])
    blocks = {"block_q": block_q, "block_kv": single_pass.BLOCK_KV}

    @jax.jit
    def run(operands, do):
        call = call_of(operands, options, **blocks)
        extras = common.extras(
            operands, options, call.activation.fold, axis=1, **blocks
        )
        padded = padded_arrays(call, operands, do)
        dq, dk, dv, sums = single_pass.gradients(
            call, padded, extras, stages=2, column_sums=True
        )
        return module.finished(call, operands, dq, dk, dv, sums)

    # Masks move the rows that see nothing to the first tile: all is written.
    check(run(operands, arrays[3]), arrays, keywords, dtype)


EVERYTHING = {
    "window": (80, 10),
    "alibi_slopes": np.ones(4, np.float32),
    "bias": np.ones((1, 4), np.float32),
    "q_offset": np.ones((1,), np.int32),
    "q_lengths": np.ones((1,), np.int32),
    "kv_lengths": np.ones((1,), np.int32),
    "q_segment_ids": np.repeat(np.arange(4, dtype=np.int32), 75)[None],
}


def lower(d, e, dtype, keywords):
    """Text of the gradients of 300 queries, 4 heads on 2, lowered for CUDA."""
    shapes = (1, 300, 4, d), (1, 300, 2, d), (1, 300, 2, e)
    arrays = [jax.ShapeDtypeStruct(x, jnp.dtype(dtype)) for x in shapes]
    keywords = dict(keywords)
    bias = keywords.pop("bias", None)
    if bias is not None:
        arrays.append(jax.ShapeDtypeStruct(bias.shape, bias.dtype))

    def loss(q, k, v, bias=None):
        o = sigmoid_attention(
            q, k, v, bias=bias, implementation="mosaic_gpu", **keywords
        )
        return o.astype(jnp.float32).sum()

    gradient = jax.grad(loss, tuple(range(len(arrays))))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return (
            jax.jit(gradient)
            .trace(*arrays)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


# Number of kernels; the forward kernel is none of them: nothing of it is needed.
SINGLE_PASS, TWO_KERNELS = 1, 2
LOWERED = {
    "full": (64, 64, "bfloat16", {}, SINGLE_PASS),
    "causal": (128, 128, "bfloat16", {"causal": True}, SINGLE_PASS),
    "everything": (64, 64, "bfloat16", EVERYTHING, SINGLE_PASS),
    "values_wider": (64, 128, "bfloat16", EVERYTHING, TWO_KERNELS),
    "everything_half": (128, 64, "float16", EVERYTHING, SINGLE_PASS),
    "deterministic": (
        *(128, 128, "bfloat16"),
        {"deterministic": True} | EVERYTHING,
        TWO_KERNELS,
    ),
    "padded": (96, 40, "float16", {"deterministic": True}, TWO_KERNELS),
    "wide": (192, 128, "bfloat16", {"causal": True}, TWO_KERNELS),
    "widest": (256, 256, "bfloat16", EVERYTHING, TWO_KERNELS),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    d, e, dtype, keywords, kernels = LOWERED[name]
    text = lower(d, e, dtype, keywords)
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert "wgmma" in text
    # Only the single pass adds to memory.
    assert ("cp.reduce.async.bulk" in text) == (kernels == SINGLE_PASS)
    assert "300x300" not in text


def shapes_of(d, e, **options):
    """Operands of one query and key, as shapes, and options."""
    found = None

    def build(q, k, v):
        nonlocal found
        operands, found = prepared(q, k, v, **options)
        return operands

    sizes = (1, 64, 1, d), (1, 64, 1, d), (1, 64, 1, e)
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in sizes]
    return jax.eval_shape(build, *arrays), found


def test_deterministic_calls_have_no_single_pass():
    tiles = Tiles(block_q=64, block_kv=128, single_pass=True)
    config = Config(backward=tiles)
    for deterministic in (False, True):
        operands, options = shapes_of(
            128, 128, config=config, deterministic=deterministic
        )
        chosen = module.in_single_pass(operands, options, tiles)
        assert chosen == (not deterministic)


def test_every_choice_of_the_table_fits_into_shared_memory():
    sizes = (64, 128, 192, 256)
    for d, e in itertools.product(sizes, sizes):
        for causal, deterministic in itertools.product((False, True), repeat=2):
            operands, options = shapes_of(
                d, e, causal=causal, deterministic=deterministic
            )
            tiles = module.backward_tiles(operands, options)
            needed = module.shared_memory(operands, options, tiles)
            assert needed <= common.SMEM_LIMIT, (d, e, tiles, needed)


@pytest.mark.parametrize(
    ("head", "tiles", "match"),
    [
        (128, Tiles(block_q=128, block_kv=128, stages=4), "bytes.*232,448"),
        (128, Tiles(block_q=32, block_kv=64), "block_q must be 64 or 128"),
        (128, Tiles(block_q=64, block_kv=80), "block_kv must be 64 or 128"),
        (256, Tiles(block_q=64, block_kv=64, single_pass=True), "head sizes up to 128"),
        (64, Tiles(block_q=64, block_kv=64, single_pass=True), "has block_q 128"),
    ],
)
def test_tiles_that_the_kernels_have_not(head, tiles, match):
    with pytest.raises(ValueError, match=match):
        lower(head, head, "bfloat16", {"config": Config(backward=tiles)})


def test_values_get_fewer_buffers_before_memory_runs_out():
    assert dq.stages_that_fit(128, 2, 128, 128) == (2, 2)
    assert dq.stages_that_fit(128, 4, 128, 128) == (3, 2)
    assert dq.stages_that_fit(64, 2, 256, 256) == (2, 1)
    assert dkv.block_keys(128, 128) == 128
    assert dkv.block_keys(128, 192) == 64
