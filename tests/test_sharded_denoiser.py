"""The denoiser's loss and update do not depend on devices, tables or micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from diffmm._tree import named_leaves
from diffmm.diffusion import BernoulliMasking, cross_entropy, diffusion_loss, normalise
from diffmm.models import Denoiser, TransformerConfig, logical_axes
from diffmm.training import (
    DATA_PARALLEL,
    FULLY_SHARDED,
    TENSOR_PARALLEL,
    init_state,
    make_mesh,
    make_train_step,
    shard_batch,
    state_shardings,
)
from diffmm.typing import Batch

ROWS, LENGTH, VOCABULARY = 8, 6, 12
MASK_ID = VOCABULARY - 1


@pytest.fixture(scope="module")
def problem():
    return make_problem()


@pytest.fixture(scope="module")
def sigmoid_problem():
    return make_problem(
        attention="sigmoid",
        length=LENGTH,
        hybrid_norm=True,
        layer_scale=0.5,
        trainable_bias="head",
    )


def make_problem(**recipe):
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    lengths = rng.integers(2, LENGTH + 1, (ROWS, 1))
    # Rows differ in how much they hold: means of means would show.
    maskable = np.arange(LENGTH)[None, :] < lengths
    batch = Batch(
        tokens=rng.integers(0, MASK_ID, shape).astype(np.int32),
        positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        segment_ids=maskable.astype(np.int32),
        modality=np.zeros(shape, np.int8),
        maskable=maskable,
        condition=np.zeros(shape, bool),
        loss_weight=maskable.astype(np.float32),
        group=np.zeros(shape, np.int8),
        task=np.zeros(ROWS, np.int8),
    )
    config = TransformerConfig(
        vocabulary_size=VOCABULARY, width=16, num_layers=2, head_dim=8, **recipe
    )
    graphdef, params = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))

    def nll(params, tokens, batch):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(tokens, batch.positions, batch.segment_ids)
        excluded = np.arange(VOCABULARY) == MASK_ID
        return cross_entropy(
            hidden, model.unembedding[...], batch.tokens, excluded=excluded
        )

    def loss_fn(params, batch, key, rows, num_rows):
        loss, metrics = diffusion_loss(
            nll,
            params,
            batch,
            key,
            process=BernoulliMasking(p_uncond=0.1),
            mask_id=MASK_ID,
            rows=rows,
            num_rows=num_rows,
        )
        return loss, metrics._asdict()

    return batch, params, loss_fn


def run(problem, mesh=None, table=DATA_PARALLEL, micro_batches=1):
    batch, params, loss_fn = problem
    # SGD: the update is the gradient, so comparing parameters compares gradients.
    optimizer = optax.sgd(1.0)
    state = init_state(params, optimizer, jax.random.key(1))
    if mesh is not None:
        placed = state_shardings(mesh, state, logical_axes(params), table)
        state = jax.device_put(state, placed)
        batch = shard_batch(batch, mesh, table)
    step = jax.jit(
        make_train_step(
            loss_fn, optimizer, prepare=normalise, micro_batches=micro_batches
        )
    )
    new, metrics = step(state, batch)
    gradients = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), state.params, new.params
    )
    return jax.device_get(metrics), named_leaves(gradients)


@pytest.fixture(scope="module")
def reference(problem):
    return run(problem)


@pytest.mark.parametrize(
    ("mesh", "table", "micro_batches"),
    [
        (None, None, 4),
        ({"data": 4}, DATA_PARALLEL, 2),
        ({"data": 4}, FULLY_SHARDED, 1),
        ({"data": 2, "model": 2}, TENSOR_PARALLEL, 1),
    ],
    ids=["micro", "data+micro", "fsdp", "tensor"],
)
def test_same_loss_and_gradients(problem, reference, mesh, table, micro_batches):
    if mesh is not None:
        mesh = make_mesh(**mesh)
    check_same(run(problem, mesh, table, micro_batches), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "table"),
    [({"data": 4}, FULLY_SHARDED), ({"data": 2, "model": 2}, TENSOR_PARALLEL)],
    ids=["fsdp", "tensor"],
)
def test_same_loss_and_gradients_with_sigmoid_attention(sigmoid_problem, mesh, table):
    check_same(
        run(sigmoid_problem, make_mesh(**mesh), table),
        run(sigmoid_problem, micro_batches=2),
    )


def check_same(found, reference):
    metrics, gradients = found
    expected_metrics, expected = reference
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    for name in ("nats", "count", "nats_by_time", "count_by_time"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=2e-6)
    for name, leaf in expected.items():
        # 1e-6 of the largest entry, and the rounding of params − update in float32.
        atol = 1e-6 * np.abs(leaf).max() + 2.0**-22
        np.testing.assert_allclose(gradients[name], leaf, atol=atol, err_msg=name)
    assert jnp.isfinite(metrics["grad_norm"])
