"""The TPU kernels keep the contract, in Pallas' interpreter, and lower for TPUs."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import (
    CASES,
    FORWARD,
    GRADIENT,
    TOLERANCES,
    SigmoidAttentionContract,
    draw,
    float64,
    oracle,
    relative,
)
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from diffmm_kernels.sigmoid_attention import (
    Config,
    Tiles,
    mosaic_tpu,
    sigmoid_attention,
)
from diffmm_kernels.sigmoid_attention.arguments import (
    Needs,
    Operands,
    Options,
    canonical,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu import schedule as schedules
from diffmm_kernels.sigmoid_attention.visibility import visible

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(sigmoid_attention).parameters.items()
    if name not in ("q", "k", "v", "implementation")
}
SMALL = Tiles(block_q=128, block_kv=128)
IN_SMALL_TILES = Config(forward=SMALL, backward=SMALL)


# The tests over many tiles below have the like.
SLOW_CASES = (
    *("small_heads", "causal", "causal_aligned_last", "window", "window_causal"),
    *("segments", "segments_causal", "lengths", "alibi", "mask", "mask_of_keys"),
    *("full", "logit_bias"),
)


class TestMosaicTpu(SigmoidAttentionContract):
    implementation = "mosaic_tpu"
    interpret = True
    dtypes = ("bfloat16", "float16", "float32")

    @pytest.mark.parametrize(
        "name",
        [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW_CASES)) for x in CASES],
    )
    def test_forward_and_gradients(self, name):
        super().test_forward_and_gradients(name)

    # Compiled for several shapes each.
    @pytest.mark.slow
    def test_packing_equals_separate_calls(self):
        super().test_packing_equals_separate_calls()

    @pytest.mark.slow
    def test_additive_over_keys(self):
        super().test_additive_over_keys()

    @pytest.mark.slow
    def test_linear_in_values_and_blind_to_order(self):
        super().test_linear_in_values_and_blind_to_order()

    @pytest.mark.slow
    def test_vmap_over_some_arguments(self):
        super().test_vmap_over_some_arguments()


RNG = np.random.default_rng(7)
PACKED = np.sort(RNG.integers(0, 5, (2, 300)), axis=1).astype(np.int32)
PACKED[1, 200:] = -1
# Three by three or more tiles: some unmasked, some masked, some skipped.
MANY_TILES = {
    "full": ((300, 400), {}),
    "causal": ((400, 300), {"causal": True}),
    "window": ((500, 400), {"window": (150, 40), "q_offset": -60}),
    "packed": ((300, 300), {"q_segment_ids": PACKED, "causal": True}),
    "lengths": (
        *((300, 400),),
        {
            "q_lengths": np.array([300, 100], np.int32),
            "kv_lengths": np.array([130, 399], np.int32),
            "q_offset": np.array([0, 250], np.int32),
            "window": (None, 5),
        },
    ),
    "dense": (
        *((300, 400),),
        {
            "mask": RNG.random((2, 1, 300, 400)) < 0.3,
            "logit_bias": RNG.normal(size=(1, 4, 1, 400)).astype(np.float32),
            "alibi_slopes": np.array([0.5, 0.1, 0.02, 0.0], np.float32),
            "q_offset": 20,
        },
    ),
}
# Of these the others hold all.
SLOW = ("full", "causal", "packed")


def gradients(keywords, interpret=True):
    """Output and cotangents of q, k, v and the bias, from the kernels themselves."""
    words = {**DEFAULTS, **keywords, "config": IN_SMALL_TILES, "interpret": interpret}

    def run(q, k, v, do):
        bias = jnp.full((4,), -4.0)
        operands, options, _ = canonical(q, k, v, **{**words, "bias": bias})
        o = mosaic_tpu.forward(operands, options)
        needs = Needs(bias=True, logit_bias=False)
        pulled = mosaic_tpu.backward(operands, options, do, needs)
        return o, pulled.q, pulled.k, pulled.v, pulled.bias.sum(0)

    return jax.jit(run)


@functools.cache
def over_many_tiles(name):
    """Compiled once for all tests."""
    return gradients(MANY_TILES[name][1])


def check(got, arrays, keywords, dtype="bfloat16"):
    words = {**keywords, "bias": -4.0}
    want = oracle(*float64(arrays[:3]), float64(arrays[3:])[0], **words)
    want["bias"] = want["bias"].sum(0)
    for name, x in zip(("o", "q", "k", "v", "bias"), got, strict=True):
        limit = TOLERANCES[dtype][FORWARD if name == "o" else GRADIENT]
        assert relative(x, want[name]) < limit, name


def many(name, dtype="bfloat16"):
    (t, s), keywords = MANY_TILES[name]
    return draw((2, t, s, 4, 2, 24, 40, keywords), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in MANY_TILES],
)
def test_over_many_tiles(name):
    arrays, keywords = many(name)
    check(over_many_tiles(name)(*arrays), arrays, keywords)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lengths"])
def test_memory_that_nobody_wrote_is_not_read(name):
    """In the interpreter that models a TPU's memories, which start as NaN."""
    arrays, keywords = many(name)
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        got = jax.block_until_ready(gradients(keywords, interpret=None)(*arrays))
    check(got, arrays, keywords)


def test_garbage_past_the_lengths_changes_nothing():
    arrays, _ = many("lengths")
    q, k, v, do = arrays
    garbage = jnp.nan
    changed = [
        q.at[1, 100:].set(garbage),
        k.at[0, 130:].set(garbage),
        v.at[0, 130:].set(garbage),
        do.at[1, 100:].set(garbage),
    ]
    one = over_many_tiles("lengths")(*arrays)
    two = over_many_tiles("lengths")(*changed)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


def operands_and_options(t, s, b=2, left=None, right=None, q_offset=0, **arrays):
    q, k = (jnp.zeros((b, n, 1, 8)) for n in (t, s))
    options = Options(scale=1.0, bias=0.0, left=left, right=right, q_offset=q_offset)
    return Operands(q=q, k=k, v=k, **arrays), options


def visited(walk, axis):
    """Per row of the batch, the tiles (q, kv) in order, and their flags."""
    entries = np.asarray(walk.entries).reshape(walk.extent.rows, -1)
    lists = []
    for row in entries[:, : int(walk.count)]:
        tiles = [(int(schedules.outer(e)), int(schedules.inner(e))) for e in row]
        tiles = [x if axis == 2 else x[::-1] for x in tiles]
        seen = [bool(e & schedules.VISIT) for e in row]
        lists.append(list(zip(tiles, row, seen, strict=True)))
    return lists


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"right": 0},
        {"left": 200, "right": 100},
        {"left": 70, "right": 0, "q_offset": -300},
        {"right": 0, "q_lengths": [300, 0], "kv_lengths": [1000, 10]},
        {"ids": True, "right": 0},
    ],
)
def test_visible_tiles_are_visited_once_and_no_other(arguments, axis):
    arguments = dict(arguments)
    for name in ("q_lengths", "kv_lengths"):
        if name in arguments:
            arguments[name] = jnp.asarray(arguments[name], jnp.int32)
    t = s = 1000
    if arguments.pop("ids", False):
        ids = np.sort(np.random.default_rng(2).integers(0, 6, (2, t)), axis=1)
        arguments["q_segment_ids"] = arguments["kv_segment_ids"] = jnp.asarray(
            ids, jnp.int32
        )
    operands, options = operands_and_options(t, s, **arguments)
    block = 128
    walk = jax.jit(lambda x: schedules.schedule(x, options, block, block, axis)[::2])(
        operands
    )
    extent = schedules.extent(operands, options, block, block, axis)
    walk = schedules.Schedule(walk[0], extent, walk[1])
    assert walk.count <= extent.steps
    dense = np.asarray(visible(operands, options))[:, 0]
    dense = np.pad(dense, ((0, 0), (0, 24), (0, 24)))
    tiled = dense.reshape(2, 8, block, 8, block)
    some, every = tiled.any((2, 4)), tiled.all((2, 4))
    for row, entries in enumerate(visited(walk, axis) * (2 // extent.rows)):
        real = [(tile, flags) for tile, flags, seen in entries if seen]
        assert sorted(tile for tile, _ in real) == list(
            zip(*map(np.ndarray.tolist, np.nonzero(some[row])), strict=True)
        )
        for tile, flags in real:
            assert bool(flags & schedules.FULL) <= every[row][tile]
        # Every outer tile is opened once and closed once, also one that sees nothing.
        used = [
            tile[axis == 1] for tile, flags, _ in entries if flags & schedules.FIRST
        ]
        assert used == list(range(8))
        used = [tile[axis == 1] for tile, flags, _ in entries if flags & schedules.LAST]
        assert used == list(range(8))
        # What a row does not need comes last, does nothing and stays in place.
        length = max(i for i, x in enumerate(entries) if x[1] & schedules.LAST)
        assert not any(flags & 15 for _, flags, _ in entries[length + 1 :])
        assert len({tile for tile, _, _ in entries[length:]}) == 1


@pytest.mark.slow
def test_a_causal_grid_has_the_steps_of_its_triangle():
    """Counted in the interpreter: nothing is spent on invisible tiles."""
    steps = []

    def record(token, *step):
        steps.append(step)
        return token

    params = pltpu.InterpretParams(grid_point_recorder=record)
    operands, options = operands_and_options(512, 512, b=1)
    options = dataclasses.replace(options, config=IN_SMALL_TILES)
    for right, tiles in ((0, 10), (None, 16)):
        steps.clear()
        options = dataclasses.replace(options, right=right)
        with pltpu.force_tpu_interpret_mode(params):
            jax.block_until_ready(mosaic_tpu.forward(operands, options))
        assert len(steps) == tiles


def test_refuses_with_a_reason():
    with jax.enable_x64(True):
        q = jnp.zeros((1, 4, 1, 8), jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            sigmoid_attention(q, q, q, implementation="mosaic_tpu", interpret=True)
    q = jnp.zeros((1, 4, 1, 8))
    for size in (96, 2048):
        config = Config(forward=Tiles(block_q=size, block_kv=128))
        with pytest.raises(ValueError, match=f"block_q must be .* got {size}"):
            sigmoid_attention(q, q, q, implementation="mosaic_tpu", config=config)
    long = jax.ShapeDtypeStruct((1, 1 << 18, 1, 8), jnp.bfloat16)
    operands = Operands(q=long, k=long, v=long)
    reason = mosaic_tpu.supports(operands, Options(scale=1.0, bias=0.0, right=0))
    assert reason.startswith("lengths T, S = (262144, 262144) need a list of 262144")
    window = Options(scale=1.0, bias=0.0, left=1024, right=0)
    assert mosaic_tpu.supports(operands, window) is None


KINDS = ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6 lite")
LOWERED = {
    "full": ("bfloat16", 128, {}),
    "float16_window": ("float16", 96, {"window": (300, 9)}),
    "float32": ("float32", 256, {"causal": True}),
    "tanh": ("bfloat16", 64, {"precision": "fast", "out_dtype": "float32"}),
    "everything": (
        *("bfloat16", 192),
        {
            "q_segment_ids": np.repeat(np.arange(4, dtype=np.int32), 150)[None],
            "window": (80, 10),
            "alibi_slopes": np.ones(4, np.float32),
            "bias": np.ones((1, 4), np.float32),
            "q_offset": np.ones((1,), np.int32),
            "q_lengths": np.ones((1,), np.int32),
            "kv_lengths": np.ones((1,), np.int32),
            "mask": np.ones((1, 1, 600, 600), bool),
            "logit_bias": np.ones((1, 4, 1, 600), np.float32),
        },
    ),
}


def device(kind):
    known = "platform" in AbstractDevice.__match_args__
    platform = {"platform": "tpu"} if known else {}
    return AbstractDevice(device_kind=kind, num_cores=1, **platform)


def lower(kind, dtype, d, keywords, implementation="mosaic_tpu"):
    """Text of the forward and backward passes lowered for a TPU."""
    shapes = (1, 600, 4, d), (1, 600, 2, d), (1, 600, 2, 64)
    arrays = [jax.ShapeDtypeStruct(x, jnp.dtype(dtype)) for x in shapes]
    differentiated = {n: keywords[n] for n in ("bias", "logit_bias") if n in keywords}

    def loss(qkv, differentiated):
        words = {**keywords, **differentiated, "implementation": implementation}
        return sigmoid_attention(*qkv, **words).astype(jnp.float32).sum()

    mesh = AbstractMesh((), (), abstract_device=device(kind))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(arrays, differentiated)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(KINDS[1], name) for name in LOWERED] + [(kind, "everything") for kind in KINDS],
)
def test_lowers_for_tpu(kind, name):
    text = lower(kind, *LOWERED[name])
    # Forward, dq, and dk with dv.
    assert text.count("@tpu_custom_call") == 3
    if name == "full":
        assert "600x600" not in text


def test_a_tpu_gets_the_kernels_unasked():
    text = lower(KINDS[3], "bfloat16", 128, {"causal": True}, implementation=None)
    assert text.count("@tpu_custom_call") == 3


def test_lowers_in_64_bit_mode():
    with jax.enable_x64(True):
        assert "@tpu_custom_call" in lower(KINDS[1], "bfloat16", 64, {"window": (9, 9)})


def test_lowers_inside_shard_map():
    """Every device runs the kernels on its rows and heads; types of variation agree."""
    mesh = AbstractMesh(
        *((2, 2), ("b", "h"), (AxisType.Auto,) * 2),
        abstract_device=device(KINDS[1]),
    )
    spec = jax.sharding.PartitionSpec("b", None, "h")
    shapes = [(4, 600, 8, 64), *[(4, 600, 4, 64)] * 2]
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]
    attend = functools.partial(
        sigmoid_attention, causal=True, bias=-4.0, implementation="mosaic_tpu"
    )
    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec)

        def loss(*arrays):
            return mapped(*arrays).astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # The output of the forward pass is not asked for.
    assert text.count("@tpu_custom_call") == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_other_dtypes(name, dtype):
    arrays, keywords = draw(CASES[name], dtype)
    want = oracle(*float64(arrays[:3]), float64(arrays[3:])[0], **keywords)

    @jax.jit
    def run(inputs, do):
        attend = functools.partial(
            sigmoid_attention, implementation="mosaic_tpu", interpret=True, **keywords
        )
        o, pull = jax.vjp(attend, *inputs)
        return (o, *pull(do))

    got = run(arrays[:3], arrays[3])
    for kind, x in zip(("o", "q", "k", "v"), got, strict=True):
        limit = TOLERANCES[dtype][FORWARD if kind == "o" else GRADIENT]
        assert relative(x, want[kind]) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("causal", "windowed", "lengths", "ids", "alibi", "group"),
    itertools.product((False, True), (False, True), (0, 1), (0, 1), (0, 1), (1, 2, 4)),
)
def test_every_combination(causal, windowed, lengths, ids, alibi, group):
    rng = np.random.default_rng(11)
    keywords = {"causal": causal, "q_offset": 21}
    if windowed:
        keywords["window"] = (30, 4)
    if lengths:
        keywords["q_lengths"] = np.array([0, 33], np.int32)
        keywords["kv_lengths"] = np.array([50, 40], np.int32)
    if ids:
        keywords["q_segment_ids"] = np.sort(rng.integers(-1, 3, (2, 37)), axis=1)
        keywords["kv_segment_ids"] = np.sort(rng.integers(-1, 3, (2, 61)), axis=1)
    if alibi:
        keywords["alibi_slopes"] = np.array([0.5, 0.1, 0.02, 0.0], np.float32)
    arrays, _ = draw((2, 37, 61, 4, 4 // group, 8, 8, {}), "bfloat16")
    check(gradients(keywords)(*arrays), arrays, keywords)
