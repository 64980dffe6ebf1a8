"""The loss: additive over any cut, exact denominators, metrics that add up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.diffusion import (
    BernoulliMasking,
    Cosine,
    CountMasking,
    MaskGITMasking,
    Polynomial,
    bits_per_token,
    cross_entropy,
    denominators,
    diffusion_loss,
    normalise,
)
from diffmm.typing import Group, Modality

VOCABULARY, WIDTH, LENGTH = 12, 6, 10
MASK = 11
PROCESSES = [
    BernoulliMasking(
        schedules={Modality.IMAGE: Cosine(), Modality.AUDIO: Polynomial(exponent=2)},
        p_uncond=0.4,
    ),
    CountMasking(),
    MaskGITMasking(),
]


def nll_fn(params, tokens, batch):
    """A denoiser with a bag of the row's tokens as context."""
    hidden = params["embedding"][tokens]
    hidden = hidden + jnp.mean(hidden, axis=1, keepdims=True)
    return cross_entropy(
        hidden, params["unembedding"], batch.tokens, excluded=jnp.arange(12) == MASK
    )


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "unembedding": jax.random.normal(keys[1], (WIDTH, VOCABULARY)),
    }


@pytest.fixture
def batch(make_batch):
    """Eight rows of text, image and audio with unequal numbers of targets."""
    modality = np.repeat([0, 0, 1, 2], [2, 2, 4, 2])
    batch = make_batch(8, LENGTH, modality=modality)
    batch.condition[:, :2] = True
    batch.maskable[:, :2] = False
    for row in range(8):
        batch.maskable[row, LENGTH - row :] = False
    batch.modality[~batch.maskable] = Modality.NONE
    batch.group[:, 6] = Group.LENGTH
    batch.group[~batch.maskable] = Group.NONE
    return batch._replace(loss_weight=batch.maskable.astype(np.float32))


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("num_rows",))
def step(process, params, batch, key, rows, num_rows=8):
    return jax.value_and_grad(
        lambda params: diffusion_loss(
            nll_fn,
            params,
            batch,
            key,
            process=process,
            mask_id=MASK,
            rows=rows,
            num_rows=num_rows,
        ),
        has_aux=True,
    )(params)


@functools.partial(jax.jit, static_argnums=(0,))
def corrupt(process, batch, key, rows):
    return process.corrupt(key, batch, mask_id=MASK, rows=rows, num_rows=8)


def take(batch, rows):
    return type(batch)(*(field[rows] for field in batch))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_any_micro_batching_gives_the_same_loss_and_gradients(process, params, batch):
    batch = normalise(batch)
    key, rows = jax.random.key(1), np.arange(8, dtype=np.int32)
    whole = step(process, params, batch, key, rows)
    assert float(whole[0][0]) > 0
    for size in (4, 1):
        cuts = [rows[i :: 8 // size] for i in range(8 // size)]
        parts = [step(process, params, take(batch, cut), key, cut) for cut in cuts]
        total = jax.tree.map(lambda *x: sum(x), *parts)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                x, y, rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(y)))
            ),
            total,
            whole,
        )


def test_devices_give_the_same_loss_and_gradients(params, batch):
    process = PROCESSES[0]
    batch = normalise(batch)
    key, rows = jax.random.key(1), np.arange(8, dtype=np.int32)
    whole = step(process, params, batch, key, rows)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()
    )
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = step(
        process, params, jax.device_put(batch, split), key, jax.device_put(rows, split)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(y)))
        ),
        spread,
        whole,
    )


def test_the_sum_is_the_formula(params, batch):
    process = PROCESSES[0]
    key, rows = jax.random.key(2), np.arange(8, dtype=np.int32)
    (loss, metrics), _ = step(process, params, normalise(batch), key, rows)
    corruption = jax.device_get(corrupt(process, batch, key, rows))
    nll = np.asarray(nll_fn(params, corruption.tokens, batch), np.float64)
    nats = corruption.weight * corruption.masked * nll
    assert float(loss) == pytest.approx(nats.sum() / batch.maskable.sum(), rel=1e-5)
    kept = batch.maskable & ~corruption.dropped[:, None]
    assert 0 < corruption.dropped.sum() < 8
    for group in range(4):
        own = kept & (batch.group == group)
        assert float(metrics.count[group]) == own.sum()
        assert float(metrics.nats[group]) == pytest.approx(nats[own].sum(), rel=1e-5)
    for tenth in range(10):
        own = kept & (np.floor(corruption.t * 10) == tenth)
        assert float(metrics.count_by_time[tenth]) == own.sum()
        assert float(metrics.nats_by_time[tenth]) == pytest.approx(
            nats[own].sum(), rel=1e-5, abs=1e-6
        )


def test_metrics_add_up_to_the_loss(params, batch):
    key, rows = jax.random.key(3), np.arange(8, dtype=np.int32)
    (loss, metrics), _ = step(CountMasking(), params, normalise(batch), key, rows)
    assert float(metrics.count.sum()) == batch.maskable.sum()
    total = float(metrics.nats.sum() / metrics.count.sum())
    assert total == pytest.approx(float(loss), rel=1e-6)
    by_time = float(metrics.nats_by_time.sum() / metrics.count_by_time.sum())
    assert by_time == pytest.approx(float(loss), rel=1e-6)
    # Loss weights move the loss but not the metrics.
    weighted = normalise(batch, modality_weights={Modality.IMAGE: 0.5})
    (other, same), _ = step(CountMasking(), params, weighted, key, rows)
    assert float(other) < float(loss)
    jax.tree.map(np.testing.assert_array_equal, metrics, same)


def test_gradient_is_zero_at_unmasked_positions(batch):
    key, rows = jax.random.key(4), np.arange(8, dtype=np.int32)
    process = BernoulliMasking(p_uncond=0.5)
    masked = np.asarray(corrupt(process, batch, key, rows).masked)

    def loss(logits):
        def nll_fn(logits, tokens, batch):
            log_p = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_p, batch.tokens[..., None], -1)[..., 0]

        return diffusion_loss(
            nll_fn,
            logits,
            normalise(batch),
            key,
            process=process,
            mask_id=MASK,
            rows=rows,
            num_rows=8,
        )[0]

    logits = jax.random.normal(key, (8, LENGTH, VOCABULARY))
    gradient = np.asarray(jax.jit(jax.grad(loss))(logits))
    assert np.all(gradient[~masked] == 0)
    assert np.all(np.any(gradient[masked] != 0, axis=-1))


def test_infinite_losses_elsewhere_do_no_harm(batch):
    rows = np.arange(8, dtype=np.int32)
    loss, metrics = diffusion_loss(
        lambda params, tokens, batch: jnp.where(tokens == MASK, params, jnp.inf),
        1.0,
        normalise(batch),
        jax.random.key(0),
        process=CountMasking(),
        mask_id=MASK,
        rows=rows,
        num_rows=8,
    )
    # The uniform predictor again: one nat per token, whatever was drawn.
    has_targets = batch.maskable.any(1)
    assert float(loss) == pytest.approx(1.0, rel=1e-6)
    assert has_targets.sum() == 8
    assert np.all(np.isfinite(metrics.nats))


def test_no_targets_give_loss_zero_and_zero_gradients(params, batch):
    batch = batch._replace(maskable=np.zeros_like(batch.maskable))
    batch = normalise(batch)
    (loss, metrics), gradients = step(
        CountMasking(), params, batch, jax.random.key(0), np.arange(8, dtype=np.int32)
    )
    assert float(loss) == 0
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(gradients))
    assert float(metrics.count.sum()) == 0
    assert np.all(np.isnan(bits_per_token(metrics.nats, metrics.count)))


def test_normalisation(batch):
    counts = denominators(batch)
    for modality in range(3):
        own = batch.maskable & (batch.modality == modality)
        assert counts[modality] == own.sum()
    tokens = normalise(batch)
    assert isinstance(tokens.loss_weight, np.ndarray)
    assert tokens.loss_weight.dtype == np.float32
    np.testing.assert_allclose(
        tokens.loss_weight, batch.maskable / counts.sum(), rtol=1e-6
    )
    mean = normalise(batch, mode="per_modality_mean", modality_weights=[2.0, 1.0, 0.5])
    for modality, weight in enumerate((2.0, 1.0, 0.5)):
        own = batch.modality == modality
        assert mean.loss_weight[own].sum() == pytest.approx(weight, rel=1e-6)
    on_device = jax.jit(normalise)(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(on_device.loss_weight, tokens.loss_weight, rtol=1e-6)
    twice = normalise(batch._replace(loss_weight=2 * batch.loss_weight))
    np.testing.assert_allclose(twice.loss_weight, 2 * tokens.loss_weight)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "masked"}, "mode"),
        ({"modality_weights": [1.0, 2.0]}, "modality_weights"),
        ({"modality_weights": [1.0, -2.0, 1.0]}, "modality_weights"),
        ({"modality_weights": [1.0, math.nan, 1.0]}, "modality_weights"),
        ({"modality_weights": {Modality.NONE: 1.0}}, "modality_weights"),
    ],
)
def test_bad_normalisation(batch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        normalise(batch, **kwargs)


def test_bad_nll_shape(batch):
    with pytest.raises(ValueError, match="nll_fn"):
        diffusion_loss(
            lambda params, tokens, batch: jnp.zeros(8),
            None,
            batch,
            jax.random.key(0),
            process=CountMasking(),
            mask_id=MASK,
            rows=np.arange(8),
            num_rows=8,
        )


def test_bits_per_token():
    bits = bits_per_token(np.array([2 * math.log(2), 0.0, 1.0]), np.array([4, 2, 0]))
    np.testing.assert_allclose(bits[:2], [0.5, 0.0])
    assert np.isnan(bits[2])
