"""The bound: its forms agree exactly by enumeration, and the processes estimate it."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from diffmm.diffusion import (
    BernoulliMasking,
    Cosine,
    CosineMDLM,
    CountMasking,
    DiscreteMasking,
    Linear,
    Polynomial,
    repeat_rows,
)
from diffmm.typing import Modality

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def patterns(n):
    """All sets of masked positions: bool ``[2**n, n]``, row i = binary digits of i."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def any_order(table):
    """Mean over all n! orders of Σ −log p(x_π(j) | the ones already revealed)."""
    n = table.shape[1]
    total = 0.0
    for order in itertools.permutations(range(n)):
        masked = 2**n - 1
        for position in order:
            total += table[masked, position]
            masked -= 1 << position
    return total / math.factorial(n)


def level_law(levels, masks):
    """Probability of each pattern given each position's mask level ``[..., n]``."""
    levels = levels[..., None, :]
    return np.prod(np.where(masks, levels, 1 - levels), axis=-1)


def path_integral(table, schedules, t_min=0.0, t_max=1.0, *, second=False):
    """∫ Σ_S P(S at t) Σ_i w_i(t) CE_i(S) dt / (t_max − t_min), exactly.

    Schedules are given for each position; ``second`` is the other row of a
    complementary pair.
    """
    t = t_min + (t_max - t_min) * (NODES + 1) / 2
    with jax.enable_x64(True):
        m = np.stack([np.asarray(s.mask_probability(t)) for s in schedules], -1)
        w = np.stack([np.asarray(s.weight(t)) for s in schedules], -1)
    if second:
        w, m = w * m / (1 - m), 1 - m
    masks = patterns(table.shape[1])
    losses = np.einsum("sn,sn,tn->ts", masks, table, w)
    return float(WEIGHTS / 2 @ np.sum(level_law(m, masks) * losses, axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_estimates(process, table_nll, table, batch, key, mask_id):
    rows = np.arange(batch.tokens.shape[0], dtype=np.int32)
    corruption = process.corrupt(
        key, batch, mask_id=mask_id, rows=rows, num_rows=len(rows)
    )
    nll = table_nll(table, corruption.tokens, batch)
    return (corruption.weight * nll * corruption.masked).sum(axis=1)


def test_count_bernoulli_and_any_order_forms_are_equal():
    n = 7
    table = np.random.default_rng(0).uniform(0.05, 4.0, (2**n, n))
    masks = patterns(n)
    golden = any_order(table)
    size = masks.sum(1)
    subset = np.array([math.comb(n, k) for k in size], float)
    sums = np.sum(masks * table, axis=1)
    count = np.sum(sums[1:] / (size * subset)[1:])
    assert count == pytest.approx(golden, rel=1e-12)
    for schedule in (Linear(), Polynomial(exponent=2), Cosine(), CosineMDLM()):
        bernoulli = path_integral(table, [schedule] * n)
        assert bernoulli == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(exponent=2)], ids=repr)
def test_complementary_pair_is_unbiased(schedule):
    table = np.random.default_rng(2).uniform(0.1, 3.0, (32, 5))
    first = path_integral(table, [schedule] * 5)
    second = path_integral(table, [schedule] * 5, second=True)
    assert (first + second) / 2 == pytest.approx(any_order(table), rel=1e-6)


@pytest.mark.parametrize(
    ("process", "num_rows"),
    [
        (BernoulliMasking(), 20_000),
        (BernoulliMasking(schedules=Cosine(), stratified=False), 20_000),
        (BernoulliMasking(schedules=Polynomial(exponent=2)), 20_000),
        (BernoulliMasking(times="segment", t_min=0.01), 20_000),
        (BernoulliMasking(complementary=True, t_min=0.01), 20_000),
        (CountMasking(), 20_000),
        (CountMasking(stratified=False), 20_000),
        (DiscreteMasking(num_steps=3, schedules=Cosine()), 21_000),
    ],
    ids=repr,
)
def test_processes_estimate_what_they_say(
    process, num_rows, table, table_nll, make_batch, mask_id
):
    batch = make_batch(1, table.shape[1])
    batch = type(batch)(*(np.repeat(field, num_rows, axis=0) for field in batch))
    key = jax.random.key(7)
    estimates = _row_estimates(process, table_nll, table, batch, key, mask_id)
    estimates = np.asarray(estimates, np.float64)
    exact = table.astype(np.float64)
    if isinstance(process, CountMasking):
        golden = any_order(exact)
    elif isinstance(process, DiscreteMasking):
        grid = np.asarray(Cosine().mask_probability(np.arange(4) / 3), np.float64)
        masks = patterns(5)
        law = level_law(np.tile(grid[1:, None], 5), masks)
        sums = np.sum(masks * exact, axis=1)
        golden = np.sum(np.diff(grid) / grid[1:] * (law @ sums))
    else:
        schedules = [process.schedules[0]] * 5
        end = 1 - process.t_min if process.complementary else 1.0
        golden = path_integral(exact, schedules, process.t_min, end)
        if process.complementary:
            other = path_integral(exact, schedules, process.t_min, end, second=True)
            golden = (golden + other) / 2
            estimates = (estimates[::2] + estimates[1::2]) / 2
    # Four standard errors; stratified times only make it more comfortable.
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - golden) < 4 * error


def test_stratified_times_take_noise_out(table_nll, make_batch, mask_id):
    # A loss of the number of masks only: all noise is that of the count.
    table = np.repeat(patterns(5).sum(1, keepdims=True), 5, 1).astype(np.float32)
    batch = make_batch(64, 5)

    def spread(process):
        means = [
            float(
                _row_estimates(
                    process, table_nll, table, batch, jax.random.key(seed), mask_id
                ).mean()
            )
            for seed in range(20)
        ]
        return np.std(means)

    assert spread(CountMasking()) < 0.2 * spread(CountMasking(stratified=False))


def exact_denoiser(law):
    """Cross-entropies in bits of the exact conditionals of a law over 3 bits.

    Returns one table per outcome with its probability.
    """
    outcomes = [x for x in itertools.product((0, 1), repeat=3) if law(x) > 0]
    for outcome in outcomes:
        table = np.zeros((8, 3))
        for code, masked in enumerate(patterns(3)):
            match = [
                x
                for x in outcomes
                if all(masked[i] or x[i] == outcome[i] for i in range(3))
            ]
            total = sum(law(x) for x in match)
            for i in np.flatnonzero(masked):
                same = sum(law(x) for x in match if x[i] == outcome[i])
                table[code, i] = -math.log2(same / total)
        yield law(outcome), table


def all_equal(x):
    return 0.5 * (x[0] == x[1] == x[2])


def exclusive_or(x):
    return 0.25 * (x[2] == x[0] ^ x[1])


def independent_times(table, start):
    """The pseudo-bound of segments {a, b} and {c} under linear schedules."""
    t = start + (1 - start) * (NODES + 1) / 2
    masks = patterns(3)
    levels = np.empty((64, 64, 3))
    levels[..., :2] = t[:, None, None]
    levels[..., 2] = t[None, :]
    losses = np.einsum("sn,sn,uvn->uvs", masks, table, 1 / levels)
    value = np.sum(level_law(levels, masks) * losses, axis=-1)
    return (WEIGHTS / 2) @ value @ (WEIGHTS / 2)


@pytest.mark.parametrize(
    ("law", "entropy", "pseudo"),
    [(all_equal, 1.0, 0.8333333), (exclusive_or, 2.0, 2.1666667)],
)
def test_shared_time_is_a_joint_bound_and_independent_times_are_not(
    law, entropy, pseudo, table_nll, make_batch, mask_id
):
    tables = list(exact_denoiser(law))
    for text, image in (
        (Linear(), Linear()),
        (Linear(), Polynomial(exponent=3)),
        (Cosine(), CosineMDLM()),
    ):
        value = sum(p * path_integral(x, [text, text, image]) for p, x in tables)
        assert value == pytest.approx(entropy, abs=1e-6)
    value = sum(p * independent_times(x, 0.0) for p, x in tables)
    assert value == pytest.approx(pseudo, abs=1e-6)
    # The process draws that pseudo-bound; all outcomes have the same table.
    _, table = tables[0]
    assert all(np.array_equal(table, other) for _, other in tables)
    modality = np.array([Modality.TEXT, Modality.TEXT, Modality.IMAGE])
    batch = make_batch(40_000, 3, modality=modality)
    process = BernoulliMasking(times="independent", t_min=0.01)
    estimates = np.asarray(
        _row_estimates(
            process,
            table_nll,
            table.astype(np.float32),
            batch,
            jax.random.key(1),
            mask_id,
        ),
        np.float64,
    )
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - independent_times(table, 0.01)) < 4 * error
    assert abs(estimates.mean() - entropy) > 4 * error
    assert process.metric_name == "pseudo_elbo"


def test_repeated_rows_are_adjacent(make_batch):
    batch = make_batch(3, 4)
    np.testing.assert_array_equal(
        repeat_rows(batch).tokens, np.repeat(batch.tokens, 2, axis=0)
    )
