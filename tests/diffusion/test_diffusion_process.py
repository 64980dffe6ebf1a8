"""Masking processes: the law of the masks, invariance to how a batch is cut."""

import functools
import math

import jax
import numpy as np
import pytest

from diffmm.diffusion import (
    BernoulliMasking,
    CARTMasking,
    Cosine,
    CosineMDLM,
    CountMasking,
    DiscreteMasking,
    Linear,
    MaskGITMasking,
    Polynomial,
    SoftminSNRMasking,
    process_by_name,
    repeat_rows,
    row_uniform,
    stratified_times,
    uniform_subset,
)
from diffmm.typing import Modality

MIXED = {Modality.TEXT: Polynomial(exponent=2), Modality.IMAGE: Cosine()}
PROCESSES = [
    BernoulliMasking(p_uncond=0.3),
    BernoulliMasking(schedules=MIXED, stratified=False, t_min=0.0),
    BernoulliMasking(times="segment"),
    BernoulliMasking(times="independent"),
    BernoulliMasking(complementary=True, p_uncond=0.5),
    CountMasking(p_uncond=0.3),
    DiscreteMasking(num_steps=3, schedules=MIXED),
    MaskGITMasking(),
    SoftminSNRMasking(stratified=False),
    CARTMasking(),
]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _corrupt(process, key, batch, num_rows, rows, mask_id):
    return process.corrupt(key, batch, mask_id=mask_id, rows=rows, num_rows=num_rows)


def corrupt(process, batch, *, rows=None, num_rows=None, seed=0, mask_id=99):
    size = batch.tokens.shape[0]
    rows = np.arange(size, dtype=np.int32) if rows is None else rows
    key = jax.random.key(seed)
    return jax.device_get(
        _corrupt(process, key, batch, num_rows or size, rows, mask_id)
    )


def mixed_batch(make_batch, num_rows=8, length=12):
    """Condition, text, image, padding; two segments."""
    maskable = np.r_[False, False, np.ones(length - 4, bool), False, False]
    modality = np.where(np.arange(length) < length // 2, Modality.TEXT, Modality.IMAGE)
    batch = make_batch(num_rows, length, maskable=maskable, modality=modality)
    batch.condition[:, :2] = True
    batch.segment_ids[:, length // 2 :] = 2
    batch.segment_ids[:, -2:] = 0
    return batch


def take(batch, rows):
    return type(batch)(*(field[rows] for field in batch))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_cutting_the_batch_changes_nothing(process, make_batch):
    batch = mixed_batch(make_batch, num_rows=16)

    def parts(*cuts):
        for rows in cuts:
            rows = np.asarray(rows, np.int32)
            yield rows, corrupt(process, take(batch, rows), rows=rows, num_rows=16)

    halves = parts(np.arange(8), np.arange(8, 16))
    whole = jax.tree.map(lambda *x: np.concatenate(x), *(part for _, part in halves))
    shuffled = np.random.default_rng(0).permutation(16)
    for rows, part in parts(shuffled[:8], shuffled[8:]):
        jax.tree.map(np.testing.assert_array_equal, part, take(whole, rows))
    assert hash(process) == hash(type(process)(**vars(process)))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_only_maskable_positions_are_masked_and_weights_are_safe(process, make_batch):
    batch = mixed_batch(make_batch)
    batch.maskable[5] = False  # n = 0
    result = corrupt(process, batch, num_rows=16)
    assert result.tokens.dtype == np.int32
    assert result.weight.dtype == result.t.dtype == np.float32
    assert not np.any(result.masked & ~batch.maskable)
    assert np.all(np.isfinite(result.weight))
    assert np.all(result.weight[~result.masked] == 0)
    # CART gives no weight to a token that sees nothing of its segment.
    least = -1 if isinstance(process, CARTMasking) else 0
    assert np.all(result.weight[result.masked] > least)
    hidden = result.tokens == 99
    dropped = batch.condition & result.dropped[:, None]
    np.testing.assert_array_equal(hidden, result.masked | dropped)
    np.testing.assert_array_equal(result.tokens[~hidden], batch.tokens[~hidden])
    assert result.masked.any()
    assert not result.masked[5].any()
    assert process.is_bound == (process.metric_name == "elbo")


@pytest.mark.parametrize(
    ("schedule", "stratified"),
    [(Linear(), True), (Linear(), False), (Cosine(), True), (CosineMDLM(), False)],
    ids=repr,
)
def test_mask_rate_follows_the_schedule(schedule, stratified, make_batch):
    process = BernoulliMasking(schedules=schedule, stratified=stratified, t_min=0.0)
    maskable = np.arange(128) % 4 != 0
    batch = make_batch(1024, 128, maskable=maskable)
    result = corrupt(process, batch, seed=3)
    m = np.asarray(schedule.mask_probability(result.t), np.float64)[:, maskable]
    residual = result.masked[:, maskable] - m
    variance = m * (1 - m)
    # Standard errors from the Bernoulli variances at the times drawn.
    assert abs(residual.sum()) < 4 * math.sqrt(variance.sum())
    assert np.all(np.abs(residual.sum(0)) < 5 * np.sqrt(variance.sum(0)))
    assert np.all(np.abs(residual.sum(1)) < 5.5 * np.sqrt(variance.sum(1)) + 0.5)
    for pair, spread in (
        (residual[:, 1:] * residual[:, :-1], variance[:, 1:] * variance[:, :-1]),
        (residual[1:] * residual[:-1], variance[1:] * variance[:-1]),
        (residual[:, 48:] * residual[:, :-48], variance[:, 48:] * variance[:, :-48]),
    ):
        assert abs(pair.sum()) < 4 * math.sqrt(spread.sum())
    assert not result.masked[:, ~maskable].any()


def test_hosts_differ(make_batch):
    batch = make_batch(8, 64)
    hosts = [
        corrupt(
            BernoulliMasking(),
            batch,
            rows=np.arange(8, dtype=np.int32) + 8 * host,
            num_rows=16,
        )
        for host in range(2)
    ]
    assert not np.array_equal(hosts[0].masked, hosts[1].masked)
    assert len(np.unique(np.concatenate([host.t[:, 0] for host in hosts]))) == 16


def test_times_are_evenly_spaced_over_the_global_batch_and_over_devices():
    key, num_rows = jax.random.key(5), 48
    rows = np.arange(num_rows, dtype=np.int32)
    times = np.asarray(stratified_times(key, rows, num_rows))
    assert np.all((times >= 0) & (times < 1))
    # float32 spacing of numbers below 2 is 1.2e-7.
    np.testing.assert_allclose(np.diff(np.sort(times)), 1 / num_rows, atol=5e-7)
    for device in range(4):
        own = np.asarray(stratified_times(key, rows[device::4], num_rows))
        np.testing.assert_array_equal(own, times[device::4])
        np.testing.assert_allclose(np.diff(np.sort(own)), 4 / num_rows, atol=5e-7)


def test_uniform_draws_resolve_tiny_probabilities():
    draws = np.asarray(row_uniform(jax.random.key(0), np.arange(64), 1 << 14))
    assert draws.min() >= 0
    assert draws.max() < 1
    # Multiples of 2^-23 would leave one in 128 distinct below 2^-16.
    small = draws[draws < 2.0**-14]
    assert len(np.unique(small)) == len(small)
    # Mean of 2^20 draws: standard error 0.2887/1024.
    assert abs(draws.mean() - 0.5) < 4 * 0.2887 / 1024


def test_subsets_are_uniform():
    maskable = np.array([True, True, False, True, True])
    keys = jax.random.split(jax.random.key(0), 6000)
    subsets = np.asarray(
        uniform_subset(keys, np.tile(maskable, (6000, 1)), np.full(6000, 2))
    )
    assert np.all(subsets.sum(1) == 2)
    assert not subsets[:, 2].any()
    codes = subsets @ (2 ** np.arange(5))
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom: 20.5 at p = 1e-3.
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5


def test_count_form_draws_every_count_once_per_n_rows(make_batch):
    batch = make_batch(24, 8)
    result = corrupt(CountMasking(), batch)
    k = result.masked.sum(1)
    np.testing.assert_array_equal(np.bincount(k, minlength=9)[1:], 3)
    np.testing.assert_allclose(result.weight.sum(1), 8.0, rtol=1e-6)
    np.testing.assert_allclose(result.t[:, 0], k / 8)


def test_rows_without_masks_happen_and_realised_ratios_are_short(make_batch):
    # Weight n/k on Bernoulli masks estimates P(k > 0) = n/(n + 1) of a uniform
    # predictor's bound. Standard error of the mean of 20,000 indicators.
    for n, golden in ((4, 0.8), (16, 0.94118)):
        process = BernoulliMasking(t_min=0.0, stratified=False)
        batch = make_batch(20_000, 16, maskable=np.arange(16) < n)
        k = corrupt(process, batch, seed=n).masked.sum(1)
        estimate = np.mean(np.where(k > 0, n / np.maximum(k, 1) * k, 0)) / n
        assert golden == pytest.approx(n / (n + 1), abs=1e-5)
        error = math.sqrt(golden * (1 - golden) / 20_000)
        assert abs(estimate - golden) < 3 * error


def test_uniform_predictor_variance_law(make_batch):
    n, num_rows, eps = 512, 8192, 1e-3
    batch = make_batch(num_rows, n)
    process = BernoulliMasking(stratified=False, t_min=eps)
    estimates = corrupt(process, batch).weight.sum(1, dtype=np.float64) / n
    law = math.sqrt((math.log(1 / eps) / (1 - eps) - 1) / n)
    assert law == pytest.approx(math.sqrt(5.9147 / n), rel=1e-4)
    assert abs(estimates.mean() - 1) < 3 * law / math.sqrt(num_rows)
    assert estimates.std() == pytest.approx(law, rel=0.1)
    few = take(batch, slice(128))
    count = corrupt(CountMasking(stratified=False), few).weight.sum(1)
    np.testing.assert_allclose(count / n, 1.0, rtol=1e-5)


def test_complementary_pairs_cover_every_maskable_token_once(make_batch):
    single = mixed_batch(make_batch, num_rows=16)
    for field in repeat_rows(single):
        np.testing.assert_array_equal(field[::2], field[1::2])
    batch = repeat_rows(single)
    for times in ("row", "segment"):
        process = BernoulliMasking(complementary=True, times=times, p_uncond=0.5)
        result = corrupt(process, batch)
        first, second = result.masked[::2], result.masked[1::2]
        assert not np.any(first & second)
        np.testing.assert_array_equal(first | second, single.maskable)
        np.testing.assert_array_equal(result.t[::2], result.t[1::2])
        np.testing.assert_array_equal(result.dropped[::2], result.dropped[1::2])
        weight = np.where(first, 1 / result.t[::2], 0)
        np.testing.assert_allclose(result.weight[::2], weight, rtol=1e-5)
        weight = np.where(second, 1 / (1 - result.t[1::2]), 0)
        np.testing.assert_allclose(result.weight[1::2], weight, rtol=1e-5)


def test_times_by_segment_and_by_modality(make_batch):
    batch = mixed_batch(make_batch, num_rows=4096)
    for stratified in (True, False):
        t = corrupt(BernoulliMasking(times="segment", stratified=stratified), batch).t
        first, second = t[:, 2], t[:, 7]
        np.testing.assert_array_equal(t[:, :6], np.repeat(first[:, None], 6, 1))
        assert not np.any(first == second)
        for time in (first, second):
            # Kolmogorov distance of 4,096 uniform draws: 1.95/sqrt(n) at p = 1e-3.
            grid = (np.arange(4096) + 0.5) / 4096
            assert np.max(np.abs(np.sort(time) - grid)) < 1.95 / 64 + 1e-3
    result = corrupt(BernoulliMasking(times="independent"), batch)
    text, image = result.t[:, 2], result.t[:, 7]
    # Correlation of independent draws has standard error 1/sqrt(4096).
    assert abs(np.corrcoef(text, image)[0, 1]) < 4 / 64


def test_each_modality_follows_its_own_schedule(make_batch):
    batch = mixed_batch(make_batch, num_rows=256)
    schedules = {Modality.TEXT: Polynomial(exponent=2), Modality.IMAGE: CosineMDLM()}
    result = corrupt(BernoulliMasking(schedules=schedules, t_min=0.0), batch)
    for modality, schedule in schedules.items():
        own = result.masked & (batch.modality == modality)
        np.testing.assert_allclose(
            result.weight[own], schedule.weight(result.t[own]), rtol=1e-5
        )
        m = np.asarray(schedule.mask_probability(result.t), np.float64)
        where = batch.maskable & (batch.modality == modality)
        error = math.sqrt((m * (1 - m))[where].sum())
        assert abs((own - m)[where].sum()) < 4 * error


def test_discrete_times_lie_on_the_grid(make_batch):
    process = DiscreteMasking(num_steps=4, schedules=Polynomial(exponent=2))
    result = corrupt(process, make_batch(64, 16))
    steps, counts = np.unique(result.t[:, 0] * 4, return_counts=True)
    np.testing.assert_array_equal(steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(counts, 16)
    t = result.t[result.masked]
    weight = 4 * (t**2 - (t - 0.25) ** 2) / t**2
    np.testing.assert_allclose(result.weight[result.masked], weight, rtol=1e-5)


def test_conditions_are_dropped_at_the_rate_asked_for(make_batch):
    batch = mixed_batch(make_batch, num_rows=4096)
    batch.condition[1::2] = False
    result = corrupt(BernoulliMasking(p_uncond=0.1), batch)
    assert not result.dropped[1::2].any()
    rate = result.dropped[::2].mean()
    assert abs(rate - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2048)


def test_surrogate_weights(make_batch):
    batch = mixed_batch(make_batch)
    result = corrupt(MaskGITMasking(), batch, num_rows=16)
    np.testing.assert_allclose(result.weight[result.masked], math.pi / 2, rtol=1e-6)
    result = corrupt(SoftminSNRMasking(stratified=False), batch, num_rows=16)
    t = result.t[result.masked]
    np.testing.assert_allclose(
        result.weight[result.masked], 1 / (t + (1 - t) / 5), rtol=1e-5
    )
    result = corrupt(CARTMasking(), batch, num_rows=16)
    for row in range(8):
        visible = ~result.masked[row] & (batch.segment_ids[row] != 0)
        for i in np.flatnonzero(result.masked[row]):
            near = visible & (batch.segment_ids[row] == batch.segment_ids[row, i])
            distance = np.abs(np.flatnonzero(near) - i)
            weight = np.sum(0.5 * 0.3 * 0.7 ** (distance - 1.0))
            assert result.weight[row, i] == pytest.approx(weight, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BernoulliMasking(t_min=1.0), "t_min"),
        (lambda: BernoulliMasking(t_min=0.5, complementary=True), "t_min"),
        (lambda: BernoulliMasking(times="token"), "times"),
        (lambda: BernoulliMasking(p_uncond=1.5), "p_uncond"),
        (lambda: BernoulliMasking(schedules={Modality.NONE: Linear()}), "schedules"),
        (lambda: BernoulliMasking(schedules=[Linear()]), "schedules"),
        (lambda: BernoulliMasking(schedules="linear"), "schedule"),
        (lambda: CountMasking(p_uncond=-0.1), "p_uncond"),
        (lambda: DiscreteMasking(num_steps=0), "num_steps"),
        (lambda: SoftminSNRMasking(gamma=0.0), "gamma"),
        (lambda: SoftminSNRMasking(schedule=Cosine()), "schedule"),
        (lambda: MaskGITMasking(t_min=-1.0), "t_min"),
        (lambda: CARTMasking(p=1.0), "p must"),
        (lambda: process_by_name("llada"), "bernoulli"),
        (lambda: process_by_name("count", times="independent"), "times"),
        (lambda: process_by_name("count", schedules=MIXED), "schedules"),
        (lambda: process_by_name("maskgit", schedules=MIXED), "schedules"),
        (lambda: process_by_name("count", t_min=0.1), "t_min"),
    ],
)
def test_bad_configuration(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls(make_batch):
    batch = make_batch(4, 6)
    with pytest.raises(ValueError, match="rows"):
        corrupt(BernoulliMasking(), batch, rows=np.arange(3))
    with pytest.raises(ValueError, match="num_rows"):
        corrupt(CountMasking(), batch, num_rows=3)
    with pytest.raises(ValueError, match="num_rows must be even"):
        corrupt(BernoulliMasking(complementary=True), batch, num_rows=5)
    with pytest.raises(ValueError, match="batch"):
        corrupt(BernoulliMasking(), take(batch, 0), rows=np.arange(1))


def test_processes_by_name():
    assert process_by_name("bernoulli", times="segment") == BernoulliMasking(
        times="segment"
    )
    assert process_by_name("count", schedules=Cosine()) == CountMasking()
    assert process_by_name("maskgit", p_uncond=0.1) == MaskGITMasking(p_uncond=0.1)
    assert process_by_name("discrete", num_steps=8).num_steps == 8
