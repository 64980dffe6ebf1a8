"""One step: additive over micro-batches, reproducible keys, no update on NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmm.training import check_finite, init_state, make_train_step
from diffmm.training.interrupts import NonFiniteLossError

ROWS, LENGTH, WIDTH = 12, 5, 8


def loss_fn(params, batch, key, rows, num_rows):
    """Noisy regression whose noise depends on the global row only."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    noise = jax.vmap(lambda k: jax.random.uniform(k, (LENGTH,)))(keys)
    shift = (rows / num_rows)[:, None]
    hidden = jnp.tanh(batch["x"][..., None] * params["w"][None, None, :])
    error = hidden @ params["v"] + params["b"] - batch["y"] - 0.1 * noise - shift
    loss = jnp.sum(batch["weight"] * error**2)
    metrics = {"text": (jnp.sum(error**2), jnp.float32(error.size)), "rows": rows.sum()}
    return loss, metrics


def prepare(batch):
    return batch | {"weight": batch["weight"] / jnp.sum(batch["weight"])}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=WIDTH), dtype),
        "v": jnp.asarray(rng.normal(size=WIDTH), dtype),
        "b": jnp.zeros((), dtype),
    }


def make_batch(rows=ROWS):
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(rows, LENGTH)).astype(np.float32),
        "y": rng.normal(size=(rows, LENGTH)).astype(np.float32),
        "weight": rng.integers(0, 3, size=(rows, LENGTH)).astype(np.float32),
    }


def run_step(micro_batches, optimizer=None, batch=None):
    optimizer = optimizer or optax.sgd(0.1)
    state = init_state(make_params(), optimizer, jax.random.key(3))
    step = jax.jit(
        make_train_step(
            loss_fn, optimizer, prepare=prepare, micro_batches=micro_batches
        )
    )
    return step(state, make_batch() if batch is None else batch)


run_whole = functools.cache(lambda: run_step(1))


@pytest.mark.parametrize("micro_batches", [2, 3, 12])
def test_micro_batches_change_nothing(micro_batches):
    state_1, metrics_1 = run_whole()
    state_m, metrics_m = run_step(micro_batches)
    # float32 sums in another order: about sqrt(60) roundings of 6e-8 each.
    for a, b in zip(
        jax.tree.leaves((state_1.params, metrics_1)),
        jax.tree.leaves((state_m.params, metrics_m)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert int(metrics_m["rows"]) == ROWS * (ROWS - 1) // 2


def test_grad_norm_is_that_of_the_whole_batch_before_the_optimizer():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    _, metrics = run_step(3, optimizer)
    key = jax.random.fold_in(jax.random.key(3), 0)
    grads = jax.jit(
        jax.grad(lambda p: loss_fn(p, prepared, key, jnp.arange(ROWS), ROWS)[0])
    )
    prepared = jax.tree.map(jnp.asarray, prepare(make_batch()))
    expected = optax.tree.norm(grads(make_params()))
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)


def test_key_of_a_step_is_folded_from_the_key_of_the_run():
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(loss_fn, optimizer, prepare=prepare))
    state = init_state(make_params(), optimizer, jax.random.key(3))
    after, first = step(state, make_batch())
    _, second = step(after, make_batch())
    _, again = step(state, make_batch())
    assert float(first["loss"]) == float(again["loss"])
    assert float(first["loss"]) != float(second["loss"])
    assert int(after.step) == 1
    assert jnp.array_equal(
        jax.random.key_data(after.key), jax.random.key_data(state.key)
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_non_finite_step_leaves_the_state(micro_batches):
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(loss_fn, optimizer, micro_batches=micro_batches))
    state = init_state(make_params(), optimizer, jax.random.key(3))
    state, metrics = step(state, make_batch())
    assert not bool(metrics["nonfinite"])
    check_finite(metrics, 1, None)
    batch = make_batch()
    batch["y"][7, 2] = np.nan
    after, metrics = step(state, batch)
    assert bool(metrics["nonfinite"])
    for old, new in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*nan.*step 1"):
        check_finite(metrics, 2, 1)
    recovered, metrics = step(after, make_batch())
    assert not bool(metrics["nonfinite"])
    assert int(recovered.step) == 3


def test_bfloat16_parameters_accumulate_in_float32():
    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer, prepare=prepare, micro_batches=4)
    state = init_state(make_params(jnp.bfloat16), optimizer, jax.random.key(3))
    after, metrics = jax.jit(step)(state, make_batch())
    assert after.params["w"].dtype == jnp.bfloat16
    assert metrics["loss"].dtype == jnp.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="micro_batches=5"):
        run_step(5)
    with pytest.raises(ValueError, match="micro_batches"):
        make_train_step(loss_fn, optax.sgd(0.1), micro_batches=0)
    with pytest.raises(ValueError, match="leading axis"):
        run_step(2, batch=make_batch() | {"weight": np.ones((4, LENGTH), np.float32)})
    with pytest.raises(ValueError, match=r"'n'.*int32"):
        init_state({"n": jnp.arange(3)}, optax.sgd(0.1), jax.random.key(0))

    def reserved(params, batch, key, rows, num_rows):
        return jnp.sum(params["w"]), {"loss": 0.0}

    state = init_state(make_params(), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match=r"\['loss'\]"):
        make_train_step(reserved, optax.sgd(0.1))(state, make_batch())
