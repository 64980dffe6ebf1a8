"""The Hopper forward kernel lowers for CUDA on every supported JAX, without a GPU.

Lowering proves shapes, layouts, tilings and dtypes; what the assembler makes of it is
shown by benchmarks/sigmoid_aot.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from diffmm_kernels.sigmoid_attention import Config, Tiles, sigmoid_attention
from diffmm_kernels.sigmoid_attention.config import tiles_from_table
from diffmm_kernels.sigmoid_attention.mosaic_gpu.common import SMEM_LIMIT
from diffmm_kernels.sigmoid_attention.mosaic_gpu.forward import TABLE, forward_smem
from diffmm_kernels.sigmoid_attention.mosaic_gpu.work import Grid, Loop

H100 = AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3",
    num_cores=132,
    **({"platform": "gpu"} if "platform" in AbstractDevice.__match_args__ else {}),
)
IDS = np.repeat(np.arange(4, dtype=np.int32), 75)[None]
CASES = {
    "full": (64, 64, "bfloat16", {}),
    "causal": (128, 128, "bfloat16", {"causal": True}),
    "half": (96, 40, "float16", {"causal": True, "precision": "high"}),
    "tanh": (64, 64, "bfloat16", {"precision": "fast"}),
    "float32_out": (128, 128, "bfloat16", {"out_dtype": "float32"}),
    "wide": (192, 128, "bfloat16", {"window": (100, 0)}),
    "widest": (256, 256, "bfloat16", {"causal": True}),
    "packed": (
        *(256, 256, "bfloat16"),
        {"q_segment_ids": IDS, "kv_segment_ids": IDS, "causal": True},
    ),
    "everything": (
        *(64, 64, "bfloat16"),
        {
            "q_segment_ids": IDS,
            "window": (80, 10),
            "alibi_slopes": np.ones(4, np.float32),
            "bias": np.ones((1, 4), np.float32),
            "q_offset": np.ones((1,), np.int32),
            "q_lengths": np.ones((1,), np.int32),
            "kv_lengths": np.ones((1,), np.int32),
        },
    ),
    "ping_pong": (
        *(128, 128, "bfloat16"),
        {
            "causal": True,
            "config": Config(
                forward=Tiles(block_q=64, block_kv=128, stages=3, loop="ping_pong")
            ),
        },
    ),
    "persistent": (
        *(128, 128, "bfloat16"),
        {"config": Config(forward=Tiles(block_q=64, block_kv=64, persistent=True))},
    ),
}


def lower(d, e, dtype, keywords, implementation="mosaic_gpu"):
    """Text of the forward pass of 300 queries, 4 heads on 2, lowered for CUDA."""
    shapes = (1, 300, 4, d), (1, 300, 2, d), (1, 300, 2, e)
    arrays = [jax.ShapeDtypeStruct(x, jnp.dtype(dtype)) for x in shapes]

    def attend(q, k, v):
        return sigmoid_attention(q, k, v, implementation=implementation, **keywords)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(attend).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    d, e, dtype, keywords = CASES[name]
    text = lower(d, e, dtype, keywords)
    assert "mosaic_gpu" in text
    assert "wgmma" in text
    word = "tanh.approx.f32" if name == "tanh" else "ex2.approx"
    assert word in text
    # Everything but the kernel itself: no matrix of queries by keys anywhere.
    assert "300x300" not in text


def test_an_h100_gets_the_kernel_unasked():
    text = lower(128, 128, "bfloat16", {"causal": True}, implementation=None)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("float32", {"dtype": "float32"}),
        ("mask", {"mask": np.ones((1, 1, 1, 300), bool)}),
        ("logit_bias", {"logit_bias": np.ones((1, 1, 1, 300), np.float32)}),
        ("out_dtype", {"out_dtype": "float16"}),
    ],
)
def test_refusals_name_the_argument(word, arguments):
    arguments = dict(arguments)
    dtype = arguments.pop("dtype", "bfloat16")
    with pytest.raises(NotImplementedError, match=word):
        lower(64, 64, dtype, arguments)


@pytest.mark.parametrize(
    ("tiles", "match"),
    [
        (Tiles(block_q=64, block_kv=256), "295,936 bytes.*232,448"),
        (Tiles(block_q=48, block_kv=64), "block_q must be a multiple of 64"),
        (Tiles(block_q=64, block_kv=80), "block_kv must be a multiple of 64"),
        (Tiles(block_q=64, block_kv=64, stages=1), "stages must be at least 2"),
    ],
)
def test_tiles_that_the_kernel_has_not(tiles, match):
    with pytest.raises(ValueError, match=match):
        lower(128, 128, "bfloat16", {"config": Config(forward=tiles)})


def test_every_choice_of_the_table_fits_into_shared_memory():
    sizes = (64, 128, 192, 256)
    flags = ("causal", "masked", "segments", "alibi")
    for d, e, out in itertools.product(sizes, sizes, ("bfloat16", "float32")):
        for values in itertools.product((False, True), repeat=len(flags)):
            facts = dict(zip(flags, values, strict=True))
            tiles = tiles_from_table(
                TABLE,
                head_dim=max(d, e),
                dtype="bfloat16",
                keys=1024,
                **facts,
            )
            needed = forward_smem(tiles, d, e, jnp.bfloat16, out)
            assert needed <= SMEM_LIMIT, (d, e, facts)


@pytest.mark.parametrize("last_first", [False, True])
def test_all_work_is_done_once_and_heads_of_a_group_together(last_first):
    grid = Grid(batch=2, heads=8, kv_heads=4, tiles=3, group=2, last_first=last_first)
    work = [tuple(int(x) for x in grid.work(jnp.int32(i))) for i in range(grid.size)]
    assert {(b, h, t) for b, h, _, t in work} == set(
        itertools.product(range(2), range(8), range(3))
    )
    assert all(kv_head == head // 2 for _, head, kv_head, _ in work)
    # Two key heads of a row, four query heads, three tiles each, before the next.
    first = work[:12]
    assert {(b, kv) for b, _, kv, _ in first} == {(0, 0), (0, 1)}
    assert [t for *_, t in first[::4]] == ([2, 1, 0] if last_first else [0, 1, 2])


@pytest.mark.parametrize(
    ("low", "full_low", "full_high", "high"),
    [(0, 0, 5, 6), (2, 4, 4, 7), (1, 3, 6, 8), (3, 3, 3, 4), (0, 2, 5, 5)],
)
def test_unmasked_tiles_come_first(low, full_low, full_high, high):
    values = (low, full_low, full_high - full_low, high - low)
    loop = Loop(*(jnp.int32(x) for x in values))
    visited = [int(loop.tile(jnp.int32(i))) for i in range(high - low)]
    assert visited[: full_high - full_low] == list(range(full_low, full_high))
    assert sorted(visited) == list(range(low, high))
