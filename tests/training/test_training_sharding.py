"""Loss, gradients and parameters do not depend on the placement of anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from diffmm.training import (
    DATA_PARALLEL,
    FULLY_SHARDED,
    FULLY_SHARDED_TENSOR_PARALLEL,
    TENSOR_PARALLEL,
    init_state,
    make_mesh,
    make_train_step,
    partition_spec,
    shard_batch,
    shardings,
    state_shardings,
)

ROWS, LENGTH, VOCAB, WIDTH, HIDDEN = 16, 6, 32, 8, 24
AXES = {
    "embedding": ("vocab", "embed"),
    "mlp": {"up": ("embed", "mlp"), "down": ("mlp", "embed")},
    "gain": ("embed",),
    "scale": (),
}

needs_four_devices = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs four devices"
)


def make_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)

    return {
        "embedding": normal(VOCAB, WIDTH),
        "mlp": {"up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, WIDTH)},
        "gain": jnp.ones(WIDTH),
        "scale": jnp.ones(()),
    }


def make_batch():
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "weight": rng.random((ROWS, LENGTH), dtype=np.float32) / (ROWS * LENGTH),
        "task": np.zeros(ROWS, np.int8),
    }


def loss_fn(params, batch, key, rows, num_rows):
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (LENGTH,)))(keys)
    x = params["embedding"][jnp.where(keep, batch["tokens"], 0)]
    x = x + jax.nn.gelu(x @ params["mlp"]["up"]) @ params["mlp"]["down"]
    x = x * params["gain"][None, None, :] * params["scale"]
    logits = x @ params["embedding"].T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    loss = jnp.sum(batch["weight"] * nll)
    return loss, {"sum": nll.sum(), "masked": jnp.sum(~keep)}


OPTIMIZERS = {"sgd": optax.sgd(0.5, momentum=0.9), "adam": optax.adam(1e-3, eps=1e-3)}


@functools.cache
def reference(name):
    optimizer = OPTIMIZERS[name]
    state = init_state(make_params(), optimizer, jax.random.key(5))
    step = jax.jit(make_train_step(loss_fn, optimizer))
    for _ in range(2):
        state, metrics = step(state, make_batch())
    return jax.device_get((state.params, state.opt_state, metrics))


def close(actual, expected):
    """1e-6 of the largest entry of each array: float32 sums in another order."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.max(np.abs(b))), 1e-6)
        assert np.max(np.abs(np.asarray(a, np.float64) - b)) <= 1e-6 * scale


@needs_four_devices
@pytest.mark.parametrize(
    ("table", "data", "model", "micro_batches", "optimizer"),
    [
        (DATA_PARALLEL, 4, 1, 1, "sgd"),
        (DATA_PARALLEL, 4, 1, 4, "adam"),
        (FULLY_SHARDED, 4, 1, 2, "sgd"),
        (TENSOR_PARALLEL, 1, 4, 1, "sgd"),
        (TENSOR_PARALLEL, 2, 2, 2, "sgd"),
        (FULLY_SHARDED_TENSOR_PARALLEL, 2, 2, 4, "adam"),
    ],
)
def test_placement_changes_nothing(table, data, model, micro_batches, optimizer):
    transformation = OPTIMIZERS[optimizer]
    mesh = make_mesh(data=data, model=model)
    state = init_state(make_params(), transformation, jax.random.key(5))
    placement = state_shardings(mesh, state, AXES, table)
    state = jax.device_put(state, placement)
    step = jax.jit(
        make_train_step(loss_fn, transformation, micro_batches=micro_batches),
        out_shardings=(placement, None),
    )
    batch = shard_batch(make_batch(), mesh, table)
    for _ in range(2):
        state, metrics = step(state, batch)
    close((state.params, state.opt_state, metrics), reference(optimizer))
    assert state.params["mlp"]["up"].sharding.spec == partition_spec(
        ("embed", "mlp"), table
    )


@needs_four_devices
def test_fully_sharded_state_takes_a_quarter_of_the_memory():
    mesh = make_mesh()
    optimizer = optax.adam(1e-3)
    state = init_state(make_params(), optimizer, jax.random.key(0))
    state = jax.device_put(state, state_shardings(mesh, state, AXES, FULLY_SHARDED))
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        shard = tree["mlp"]["up"].addressable_shards[0].data
        assert shard.shape == (WIDTH // 4, HIDDEN)
    assert state.opt_state[0].count.sharding.spec == PartitionSpec()


@needs_four_devices
def test_micro_batches_stay_balanced_over_devices():
    """Rows m::M of a batch in contiguous blocks: no device waits, no row moves."""
    mesh = make_mesh(data=4)
    optimizer = OPTIMIZERS["sgd"]
    state = init_state(make_params(), optimizer, jax.random.key(5))
    state = jax.device_put(state, state_shardings(mesh, state, AXES, DATA_PARALLEL))
    step = make_train_step(loss_fn, optimizer, micro_batches=2)
    batch = shard_batch(make_batch(), mesh)
    text = jax.jit(step).lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_partition_spec_uses_a_mesh_axis_once():
    table = {**DATA_PARALLEL, "embed": "data", "mlp": ("data", "model")}
    assert partition_spec(("embed", "mlp"), table) == PartitionSpec("data", "model")
    assert partition_spec(("mlp", "embed"), table) == PartitionSpec(
        ("data", "model"), None
    )
    assert partition_spec((None, "layers"), table) == PartitionSpec(None, None)


def test_states_of_shapes_and_wrapped_optimizers():
    mesh = make_mesh()
    optimizer = optax.multi_transform(
        {"a": optax.adamw(1e-3), "b": optax.sgd(1e-3)},
        {"embedding": "a", "mlp": {"up": "a", "down": "b"}, "gain": "b", "scale": "b"},
    )
    shapes = jax.eval_shape(
        lambda: init_state(make_params(), optimizer, jax.random.key(0))
    )
    placement = state_shardings(mesh, shapes, AXES, FULLY_SHARDED)
    mu = placement.opt_state.inner_states["a"].inner_state[0].mu
    assert mu["embedding"].spec == PartitionSpec(None, "data")
    assert placement.params["scale"].spec == PartitionSpec()


@needs_four_devices
def test_bad_input_is_named():
    mesh = make_mesh()
    tree = {"a": {"w": jnp.zeros((6, 3))}}
    with pytest.raises(ValueError, match=r"'a/w'.*'embed' of size 6.*'data' of size 4"):
        shardings(mesh, tree, {"a": {"w": ("embed", None)}}, FULLY_SHARDED)
    loose = shardings(
        mesh,
        tree,
        {"a": {"w": ("embed", None)}},
        FULLY_SHARDED,
        replicate_indivisible=True,
    )
    assert loose["a"]["w"].spec == PartitionSpec(None, None)
    with pytest.raises(ValueError, match=r"'a/w'.*2 axes"):
        shardings(mesh, tree, {"a": {"w": ("embed",)}}, FULLY_SHARDED)
    with pytest.raises(ValueError, match="'hed' is not in the table"):
        partition_spec(("hed",), DATA_PARALLEL)
    with pytest.raises(ValueError, match=r"'tokens'.*size 6.*'data'"):
        shard_batch({"tokens": np.zeros((6, 2))}, mesh)
    with pytest.raises(ValueError, match="needs 8 devices"):
        make_mesh(data=4, model=2)
    with pytest.raises(ValueError, match="model=3"):
        make_mesh(model=3)
    other = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh axis 'data'"):
        shard_batch({"tokens": np.zeros((4, 2))}, other)
