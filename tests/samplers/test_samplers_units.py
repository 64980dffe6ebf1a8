"""Statistics, filters, draws, guidance, quotas: one function at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.diffusion.schedules import Cosine, Linear, Polynomial
from diffmm.samplers import (
    FILL,
    Ancestral,
    Constant,
    Interval,
    LinearRamp,
    Settings,
    Window,
    categorical,
    combine,
    draw,
    ensure_progress,
    filter_logits,
    first_hitting_time,
    logit_statistics,
    quota_table,
    remaining_cosine,
    remaining_even,
    remaining_linear,
    resolve,
    suppress,
    temper,
    top_k,
    top_p,
    top_ranked,
)
from diffmm.samplers.statistics import map_positions
from diffmm.typing import Modality


def random_logits(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * 3


def test_statistics_golden():
    statistics = logit_statistics(jnp.log(jnp.array([1.0, 2.0, 5.0])))
    np.testing.assert_allclose(statistics.max_prob, 0.625, rtol=1e-6)
    np.testing.assert_allclose(statistics.margin, 0.375, rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, 0.900256, rtol=1e-6)
    assert statistics.argmax == 2


def test_statistics_match_the_softmax():
    logits = random_logits((5, 7, 50))
    p = np.sort(np.asarray(jax.nn.softmax(logits), np.float64), axis=-1)
    statistics = jax.jit(logit_statistics)(logits)
    np.testing.assert_allclose(statistics.max_prob, p[..., -1], rtol=1e-5)
    np.testing.assert_allclose(statistics.margin, p[..., -1] - p[..., -2], atol=1e-6)
    np.testing.assert_allclose(statistics.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(statistics.argmax, jnp.argmax(logits, -1))
    np.testing.assert_allclose(
        statistics.log_normalizer, jax.nn.logsumexp(logits, -1), rtol=1e-6
    )


def test_statistics_of_ties_suppression_and_huge_logits():
    tied = logit_statistics(jnp.array([2.0, 2.0, 0.0]))
    assert tied.margin == 0
    assert tied.argmax == 0
    logits = suppress(jnp.array([1e4, 3.0, 1e4]), jnp.array([False, True, False]))
    alone = logit_statistics(logits)
    assert (alone.max_prob, alone.margin, alone.entropy) == (1.0, 1.0, 0.0)
    assert all(np.isfinite(x) for x in logit_statistics(jnp.array([3e4, -3e4])))


@pytest.mark.parametrize("given", [True, False])
def test_groups_of_positions_change_nothing(given):
    # Large enough to be split: 15 = 3·4 + 3 positions, or 45 = 32 + 13.
    shape = (3, 5) if given else (9, 5)
    logits, shift = random_logits((*shape, 4100)), random_logits(shape)
    grouped = map_positions(
        lambda pair: logit_statistics(pair[0]).entropy + pair[1],
        (logits, shift),
        4100,
        given=given,
    )
    plain = logit_statistics(logits).entropy + shift
    np.testing.assert_allclose(grouped, plain, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_the_defined_sets(seed):
    # Rounded logits make ties; the definition is by sorting, ties by index.
    logits = jnp.round(random_logits((6, 40), seed))
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")
    k = np.array([1, 2, 3, 10, 39, 40])
    kept = np.asarray(top_k(logits, k) > FILL / 2)
    for row in range(6):
        np.testing.assert_array_equal(
            np.flatnonzero(kept[row]), np.sort(order[row][: k[row]])
        )
    p = np.array([0.05, 0.3, 0.5, 0.9, 0.99, 1.0])
    mass = np.asarray(jax.nn.softmax(logits), np.float64)
    kept = np.asarray(top_p(logits, p) > FILL / 2)
    for row in range(5):
        cumulative = np.cumsum(mass[row][order[row]])
        size = int(np.searchsorted(cumulative, p[row] - 1e-7)) + 1
        np.testing.assert_array_equal(
            np.flatnonzero(kept[row]), np.sort(order[row][:size])
        )
    assert kept[5].all()


def test_top_p_keeps_the_crossing_id_and_breaks_ties_by_index():
    logits = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
    np.testing.assert_array_equal(top_p(logits, 0.5) > FILL, [1, 1, 0, 0])
    np.testing.assert_array_equal(top_p(logits, 0.51) > FILL, [1, 1, 1, 0])
    zeros = jnp.array([-0.0, 0.0, -0.0])
    np.testing.assert_array_equal(top_k(zeros, 2) > FILL, [1, 1, 0])


def test_filter_identities_are_bit_exact():
    logits = random_logits((4, 33))
    for same in (
        top_p(logits, 1.0),
        top_k(logits, 33),
        top_k(logits, 99),
        temper(logits, 1.0),
        filter_logits(logits, temperature=1.0, top_k=33, top_p=1.0),
    ):
        np.testing.assert_array_equal(same, logits)


def test_temperature_never_overflows():
    logits = suppress(jnp.array([-500.0, 300.0, 299.0]), jnp.array([False, True, True]))
    for tau in (1e-30, 1e-6, 1e-3, 50.0):
        law = jax.nn.softmax(temper(logits, tau))
        assert np.isfinite(law).all()
        assert law[0] == 0
    np.testing.assert_allclose(
        jax.nn.softmax(temper(logits, 0.5)), jax.nn.softmax(logits / 0.5), rtol=1e-5
    )


def test_draw_is_the_high_resolution_categorical():
    keys = jax.random.split(jax.random.key(0), 6)
    logits = random_logits((6, 50))
    expected = jax.jit(jax.vmap(partial(jax.random.categorical, mode="high")))(
        keys, logits
    )
    np.testing.assert_array_equal(categorical(keys, logits), expected)
    np.testing.assert_array_equal(draw(keys, logits), expected)
    np.testing.assert_array_equal(draw(keys, logits, top_k=50, top_p=1.0), expected)


def test_temperature_zero_is_argmax_and_mixes_with_draws():
    keys = jax.random.split(jax.random.key(0), 64)
    logits = random_logits((64, 5), 1) * 0.1
    tau = jnp.where(jnp.arange(64) % 2 == 0, 0.0, 1.0)
    tokens = draw(keys, logits, temperature=tau, top_p=0.999)
    greedy = jnp.argmax(logits, -1)
    np.testing.assert_array_equal(tokens[::2], greedy[::2])
    assert (tokens != greedy)[1::2].any()


@partial(jax.jit, static_argnames=("chunks", "size"))
def surprise_and_rare(key, log_z, chunks, size):
    """Mean of −log z, and how many ids but the first, of chunks·size draws."""

    def chunk(key):
        keys = jax.random.split(key, size)
        rows = jnp.broadcast_to(log_z[None], (size, len(log_z)))
        ids = categorical(keys, rows)
        return -log_z[ids].mean(), (ids > 0).sum()

    mean, rare = jax.lax.map(chunk, jax.random.split(key, chunks))
    return mean.mean(), rare.sum()


@pytest.mark.slow
def test_rare_ids_are_drawn_as_often_as_they_should():
    # 64 ids of mass z = 3e-8 beside one dominating id, 2^23 draws: 16.1 rare draws are
    # due. Noise of default resolution, c = 2^-23, gives each rare id c/(exp(c/z) − 1)
    # instead, hence 1.2 draws. Poisson: below 5 with probability 4e-4 when right, at
    # least 5 with probability .008 when wrong.
    p = np.full(65, 3e-8)
    p[0] = 1 - p[1:].sum()
    log_z = jnp.asarray(np.log(p), jnp.float32)
    _, rare = surprise_and_rare(jax.random.key(3), log_z, 2**9, 2**14)
    assert 5 <= int(rare) <= 32


@pytest.mark.gpu
def test_zipf_surprise_is_the_entropy():
    # A million draws over 117,698 ids; noise of default resolution gives 7.9937.
    log_z = -np.log(np.arange(1, 117_699))
    log_z -= np.log(np.exp(log_z).sum())
    entropy = -(np.exp(log_z) * log_z).sum()
    np.testing.assert_allclose(entropy, 8.06276, atol=1e-5)
    mean, _ = surprise_and_rare(
        jax.random.key(0), jnp.asarray(log_z, jnp.float32), 10**6 // 500, 500
    )
    assert abs(float(mean) - entropy) < 0.0141  # 4 standard errors


def test_guidance_identities_are_bit_exact_and_never_nan():
    conditional, unconditional = (
        random_logits((2, 3, 9), 0),
        random_logits((2, 3, 9), 1),
    )
    np.testing.assert_array_equal(combine(conditional, unconditional, 1.0), conditional)
    np.testing.assert_array_equal(
        combine(conditional, unconditional, 0.0), unconditional
    )
    w = 1.5
    np.testing.assert_allclose(
        combine(conditional, unconditional, 1 + w),
        (1 + w) * conditional - w * unconditional,
        rtol=1e-4,
        atol=1e-4,
    )
    huge = conditional.at[..., 0].set(1e4)
    guided = suppress(combine(huge, huge, 3.0), jnp.arange(9) > 0)
    assert np.isfinite(guided).all()
    assert (guided[..., 0] == FILL).all()


def test_guidance_conventions_and_schedules():
    by_scale = resolve(Settings(guidance_scale=3.5), [0], 10)
    by_weight = resolve(Settings(cfg_weight=2.5), [0], 10)
    np.testing.assert_array_equal(by_scale.scale, by_weight.scale)
    w, t = jnp.float32(5.0), jnp.array([1.0, 0.5, 0.0])
    np.testing.assert_allclose(Constant().weight(w, t), [5, 5, 5])
    np.testing.assert_allclose(LinearRamp().weight(w, t), [0, 2.5, 5])
    np.testing.assert_allclose(Interval(low=0.3, high=0.8).weight(w, t), [0, 5, 0])


def test_settings_per_modality():
    controls = resolve(
        {
            Modality.TEXT: Settings(temperature=0.0, top_k=3),
            Modality.IMAGE: Settings(
                temperature=0.9, guidance_scale=4.0, guidance_schedule=LinearRamp()
            ),
        },
        [0, 1],
        50,
    )
    np.testing.assert_array_equal(controls.top_k[:2], [3, 50])
    controls = jax.tree.map(jnp.asarray, controls)
    modality = jnp.array([[0, 1], [1, 0]])
    scale = controls.scale_at(modality, jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(scale, [[1, 1], [2.5, 1]])
    temperature = controls.temperature_at(modality, jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(temperature, [[0, 0.9], [0.9, 0]])


def test_annealed_temperature_does_not_compound():
    controls = resolve(Settings(temperature=1.0, anneal=True), [0], 10)
    controls = jax.tree.map(jnp.asarray, controls)
    ratio = (jnp.arange(12) + 1) / 12
    tau = controls.temperature_at(jnp.zeros((12, 1), jnp.int32), ratio)[:, 0]
    np.testing.assert_allclose(tau, 1 - np.arange(1, 13) / 12, atol=1e-6)
    np.testing.assert_allclose(tau[:3], [0.9167, 0.8333, 0.75], atol=1e-4)


@pytest.mark.parametrize(
    "remaining", [remaining_even, remaining_linear, remaining_cosine]
)
def test_quotas_sum_to_the_masks(remaining):
    masks = np.append(
        [0, 1, 2, 3, 4096], np.random.default_rng(0).integers(4, 4096, 200)
    )
    table_of = jax.jit(quota_table, static_argnums=(1, 2))
    for steps in (1, 2, 7, 64, 1000, 4099):
        table = np.asarray(table_of(masks, steps, remaining))
        assert table.min() >= 0
        np.testing.assert_array_equal(table.sum(axis=1), masks)


def test_quota_goldens():
    np.testing.assert_array_equal(quota_table(10, 4, remaining_even), [3, 3, 2, 2])
    for size, zeros in ((256, 54), (1024, 216)):
        table = jax.jit(quota_table, static_argnums=(0, 1))(size, size)
        assert int((table == 0).sum()) == zeros
    per_row = quota_table(jnp.array([10, 3]), 4, remaining_even)
    np.testing.assert_array_equal(per_row, [[3, 3, 2, 2], [1, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"num_steps.*0"):
        quota_table(3, 0)


def test_ranking_breaks_ties_by_position_and_survives_bad_scores():
    masked = jnp.array([False, True, True, True, True])
    score = jnp.array([9.0, 1.0, 2.0, 2.0, 1.0])
    np.testing.assert_array_equal(top_ranked(score, masked, 1), [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(top_ranked(score, masked, 3), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(top_ranked(score, masked, 99), masked)
    bad = jnp.array([9.0, jnp.nan, -jnp.inf, jnp.nan, -jnp.inf])
    assert int(top_ranked(bad, masked, 2).sum()) == 2
    none = jnp.zeros(5, bool)
    np.testing.assert_array_equal(ensure_progress(none, score, masked), [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(ensure_progress(none, score, none), none)
    np.testing.assert_array_equal(ensure_progress(masked, score, masked), masked)


def test_first_hitting_time():
    np.testing.assert_allclose(
        first_hitting_time(1.0, 4, 0.5, Linear()), 0.840896, rtol=1e-6
    )
    for schedule in (Cosine(), Polynomial(exponent=3.0)):
        t = first_hitting_time(0.8, 5, 0.3, schedule)
        np.testing.assert_allclose(
            schedule.mask_probability(t),
            schedule.mask_probability(jnp.float32(0.8)) * 0.3**0.2,
            rtol=1e-5,
        )


def test_two_stage_unmask_count():
    # 2^20 position-steps at T = 1024: 1024 ± 130 reveals per step index (4 s.e.); the
    # one-categorical construction of default resolution gives about 643.
    rule = Ancestral(num_steps=1024)
    size = 2**20
    line, everywhere, zero = jnp.arange(size), jnp.ones(size, bool), jnp.int32(0)
    window = Window(
        masked=everywhere,
        valid=everywhere,
        exists=everywhere,
        remaining=everywhere,
        rank=line,
        positions=line,
        tokens=line,
        logprob=jnp.zeros(size),
        block=zero,
        num_blocks=jnp.int32(1),
        start=zero,
        count=jnp.int32(size),
        step=zero,
        turn=zero,
    )
    steps = jax.jit(rule.enter, static_argnums=2)(jax.random.key(0), window, 2)
    table = np.bincount(np.asarray(steps), minlength=1024)
    assert abs(table[0] - 1024) < 130
    # chi-square over 1024 cells: mean 1023, standard deviation 45.
    chi_square = ((table - 1024.0) ** 2 / 1024).sum()
    assert abs(chi_square - 1023) < 4 * 45.2
