"""Likelihood evaluation: exact on toys, error bars honest, masks common."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.diffusion import exact_bound, likelihood_bound
from diffmm.typing import Batch, Group, Modality


def uniform_nll(params, tokens, batch):
    del batch
    return jnp.full(tokens.shape, params, jnp.float32)


def crowd_nll(params, tokens, batch):
    """A loss that grows with the number of masks, and with the position."""
    del batch
    masked = jnp.mean(tokens == 99, axis=1, keepdims=True)
    return params * masked + 0.1 * jnp.arange(tokens.shape[1])[None, :]


def mixed_examples(make_batch, num_rows=6, length=8):
    modality = np.where(np.arange(length) < 3, Modality.TEXT, Modality.IMAGE)
    batch = make_batch(num_rows, length, modality=modality)
    batch.maskable[:, 0] = False
    batch.group[:, 0] = Group.NONE
    batch.group[:, -1] = Group.LENGTH
    for row in range(num_rows):
        batch.maskable[row, 1 : 1 + row] = False
    return batch


def test_enumeration_is_the_any_order_average(table_nll, make_batch, mask_id):
    n = 5
    table = np.random.default_rng(0).uniform(0.05, 4.0, (2**n, n))
    total = 0.0
    for order in itertools.permutations(range(n)):
        masked = 2**n - 1
        for position in order:
            total += table[masked, position]
            masked -= 1 << position
    golden = total / math.factorial(n)
    row = Batch(*(field[0] for field in make_batch(1, n)))
    with jax.enable_x64(True):
        result = exact_bound(table_nll, table, row, mask_id=mask_id, rows_per_call=8)
    assert result.total.nats == pytest.approx(golden, rel=1e-9)
    assert result.exact
    assert result.total.monte_carlo_error == 0
    assert result.total.nats_per_token == pytest.approx(golden / n, rel=1e-9)


def test_estimate_agrees_with_enumeration_within_its_error(make_batch, mask_id):
    examples = mixed_examples(make_batch)
    exact = exact_bound(crowd_nll, 3.0, examples, mask_id=mask_id)
    for seed in range(3):
        result = likelihood_bound(
            crowd_nll,
            3.0,
            examples,
            jax.random.key(seed),
            mask_id=mask_id,
            draws=64,
            rows_per_call=64,
        )
        assert result.draws == 64
        assert set(result.groups) == {Group.TEXT, Group.IMAGE, Group.LENGTH}
        for ours, golden in (
            (result.total, exact.total),
            *((result.groups[g], exact.groups[g]) for g in result.groups),
        ):
            assert ours.count == golden.count
            assert ours.monte_carlo_error > 0
            difference = ours.nats_per_token - golden.nats_per_token
            assert abs(difference) < 4 * ours.monte_carlo_error
            assert ours.bits_per_token == pytest.approx(
                ours.nats_per_token / math.log(2)
            )
            assert ours.perplexity_bound == pytest.approx(math.exp(ours.nats_per_token))


def test_groups_add_up_to_the_total(make_batch, mask_id):
    examples = mixed_examples(make_batch)
    result = likelihood_bound(
        crowd_nll, 2.0, examples, jax.random.key(0), mask_id=mask_id, draws=8
    )
    assert sum(g.nats for g in result.groups.values()) == result.total.nats
    assert sum(g.count for g in result.groups.values()) == result.total.count
    assert result.total.count == examples.maskable.sum()
    assert result.example_nats.sum() == pytest.approx(result.total.nats, rel=1e-12)
    np.testing.assert_array_equal(result.example_count, examples.maskable.sum(1))


def test_uniform_predictor_has_no_variance(make_batch, mask_id):
    examples = mixed_examples(make_batch)
    loss = math.log(50)
    result = likelihood_bound(
        uniform_nll, loss, examples, jax.random.key(0), mask_id=mask_id, draws=16
    )
    # float32 sums: the total of every draw is n·log V to 1e-6.
    assert result.total.nats_per_token == pytest.approx(loss, rel=1e-6)
    assert result.total.monte_carlo_error < 1e-6
    assert result.total.example_error < 1e-6
    assert result.total.perplexity_bound == pytest.approx(50, rel=1e-5)


def test_monte_carlo_error_is_that_of_independent_draws_at_least(make_batch, mask_id):
    examples = mixed_examples(make_batch)
    results = [
        likelihood_bound(
            crowd_nll,
            3.0,
            examples,
            jax.random.key(seed),
            mask_id=mask_id,
            draws=4,
            rows_per_call=24,
        ).total
        for seed in range(60)
    ]
    spread = np.std([result.nats_per_token for result in results], ddof=1)
    stated = np.sqrt(np.mean([result.monte_carlo_error**2 for result in results]))
    # A standard deviation of 60 values is known to 9 %; stratification only lowers it.
    assert 0 < spread < 1.3 * stated


def test_masks_depend_on_key_example_and_draw_only(make_batch, mask_id):
    examples = mixed_examples(make_batch, num_rows=5)
    key = jax.random.key(4)

    def evaluate(examples, **kwargs):
        return likelihood_bound(
            crowd_nll, 3.0, examples, key, mask_id=mask_id, draws=6, **kwargs
        )

    whole = evaluate(examples, rows_per_call=32)
    pieces = [Batch(*(x[a:b] for x in examples)) for a, b in ((0, 2), (2, 3), (3, 5))]
    cut = evaluate(iter(pieces), rows_per_call=7)
    np.testing.assert_allclose(cut.example_nats, whole.example_nats, rtol=1e-6)
    other = likelihood_bound(
        crowd_nll, 3.0, examples, jax.random.key(5), mask_id=mask_id, draws=6
    )
    assert not np.allclose(other.example_nats, whole.example_nats)


def test_model_is_compiled_once(make_batch, mask_id):
    traces = []

    def counting_nll(params, tokens, batch):
        traces.append(tokens.shape)
        return uniform_nll(params, tokens, batch)

    for seed, num_rows in ((0, 3), (1, 5)):
        likelihood_bound(
            counting_nll,
            1.0 + seed,
            mixed_examples(make_batch, num_rows),
            jax.random.key(seed),
            mask_id=mask_id,
            draws=3,
            rows_per_call=4,
        )
    assert traces == [(4, 8)]


def test_rows_without_targets_count_nothing(make_batch, mask_id):
    examples = mixed_examples(make_batch, num_rows=3)
    examples.maskable[1] = False
    for result in (
        likelihood_bound(
            crowd_nll, 1.0, examples, jax.random.key(0), mask_id=mask_id, draws=2
        ),
        exact_bound(crowd_nll, 1.0, examples, mask_id=mask_id),
    ):
        assert result.example_nats[1] == 0
        assert np.isfinite(result.total.nats)
    examples.maskable[:] = False
    result = likelihood_bound(
        crowd_nll, 1.0, examples, jax.random.key(0), mask_id=mask_id, draws=2
    )
    assert result.total.nats == 0
    assert math.isnan(result.total.nats_per_token)
    assert result.groups == {}


def test_bad_input(make_batch, mask_id):
    examples = mixed_examples(make_batch)
    key = jax.random.key(0)

    def call(batch, **kwargs):
        return likelihood_bound(
            crowd_nll, 1.0, batch, key, **{"mask_id": mask_id, **kwargs}
        )

    with pytest.raises(ValueError, match="draws"):
        call(examples, draws=0)
    with pytest.raises(ValueError, match="rows_per_call"):
        call(examples, rows_per_call=0)
    with pytest.raises(ValueError, match="mask_id"):
        call(examples, mask_id=int(examples.tokens[0, 0]))
    with pytest.raises(ValueError, match="Group"):
        call(examples._replace(group=np.full_like(examples.group, Group.NONE)))
    with pytest.raises(ValueError, match="at least one row"):
        call([])
    with pytest.raises(ValueError, match="at most 12"):
        exact_bound(crowd_nll, 1.0, make_batch(1, 13), mask_id=mask_id)
