"""Adaptive rules: their sets against brute force, and what they guarantee."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samplers_rules as rules
import samplers_toy as toy

from diffmm.diffusion.schedules import Cosine
from diffmm.samplers import (
    Ancestral,
    Drawn,
    FixedQuota,
    Margin,
    MaxProb,
    Position,
    Prediction,
    Settings,
    Statistics,
    Window,
    adaptive,
    dinfer,
    klass,
    logit_statistics,
    score_from_name,
)
from diffmm.samplers.adaptive import (
    EntropyBounded,
    Factor,
    Frechet,
    Threshold,
)
from diffmm.samplers.block_ends import AdaptiveEnds
from diffmm.samplers.dinfer import Credit, Hierarchy
from diffmm.samplers.klass import KLASS, kl_divergence
from diffmm.samplers.registry import RULES, rule_from_name
from diffmm.samplers.scores import PCScore
from diffmm.samplers.stochastic import DreamOrigin, StochasticQuota

threshold_set = jax.jit(adaptive.threshold_set)
factor_set = jax.jit(adaptive.factor_set)
frechet_set = jax.jit(adaptive.frechet_set)
entropy_bounded_set = jax.jit(adaptive.entropy_bounded_set)
klass_set = jax.jit(klass.klass_set)
hierarchy_set = jax.jit(dinfer.hierarchy_set)
statistics_of = jax.jit(logit_statistics)
select = jax.jit(
    lambda rule, window, prediction, aux: rule.select(KEY, window, prediction, aux)
)
enter = jax.jit(
    lambda rule, window, size: rule.enter(KEY, window, size), static_argnums=2
)

KEY = jax.random.key(0)
GOLDEN = np.array([0.99, 0.95, 0.91, 0.78], np.float32)
ALL = np.ones((4,), bool)


def window_of(masked, **fields) -> Window:
    """One block of one row, everything in it."""
    masked = np.asarray(masked)
    size = len(masked)
    rank = np.arange(size, dtype=np.int32)
    zero = np.int32(0)
    window = Window(
        masked=masked,
        valid=np.ones((size,), bool),
        exists=np.ones((size,), bool),
        remaining=masked,
        rank=rank,
        positions=rank,
        tokens=np.zeros((size,), np.int32),
        logprob=np.zeros((size,), np.float32),
        block=zero,
        num_blocks=np.int32(1),
        start=zero,
        count=np.int32(size),
        step=zero,
        turn=zero,
    )
    return window._replace(**fields)


def prediction_of(probabilities) -> Prediction:
    logits = np.log(np.asarray(probabilities, np.float32))
    return Prediction(statistics_of(logits), logits)


# The published numbers of the rules.


def test_golden_sets():
    assert factor_set(GOLDEN, ALL, 1.0).tolist() == [True, True, True, False]
    # Values .02 .15 .36 1.10 and .02 .11 .24 .59: just above each, one more.
    for n, (factor, frechet) in enumerate(
        [(0.02, 0.02), (0.15, 0.11), (0.36, 0.24), (1.10, 0.59)], start=1
    ):
        for commit, value in ((factor_set, factor), (frechet_set, frechet)):
            assert int(commit(GOLDEN, ALL, value + 1e-5).sum()) == n
            assert int(commit(GOLDEN, ALL, value - 1e-5).sum()) == max(n - 1, 1)
    assert frechet_set(GOLDEN, ALL, 1.0).all()
    entropy = np.array([0.01, 0.04, 0.2, 0.5])
    for n, excess in enumerate([0.0, 0.01, 0.05, 0.25], start=1):
        commit = entropy_bounded_set(entropy, entropy, ALL, excess + 1e-6)
        assert int(commit.sum()) == n
    assert int(entropy_bounded_set(entropy, entropy, ALL, 0.1).sum()) == 3
    assert threshold_set(GOLDEN, ALL, 0.95).tolist() == [True, True, False, False]


def test_golden_pc_score():
    frequency = np.full((10,), 1e-3, np.float32)
    law = np.full((5, 10), 0.1 / 9)
    law[:, 3] = 0.9
    score = PCScore(frequency=frequency)
    score.check(10)
    value = score(KEY, window_of(np.ones((5,), bool)), prediction_of(law))
    np.testing.assert_allclose(value[4], 2.287099, rtol=1e-5)
    np.testing.assert_allclose(value[0], 0.9 * 6.907754, rtol=1e-5)
    # The position counts from the start of the block.
    moved = window_of(np.ones((5,), bool), rank=np.arange(5) + 8, start=np.int32(8))
    np.testing.assert_allclose(score(KEY, moved, prediction_of(law)), value)
    capped = PCScore(frequency=frequency, cap=2.0, decay=0.0)
    np.testing.assert_allclose(
        capped(KEY, window_of(np.ones((5,), bool)), prediction_of(law)), 2.0
    )


# Every set against a brute-force loop in numpy.


def order_of(score, masked):
    return sorted(np.flatnonzero(masked), key=lambda k: (-score[k], k))


def chosen(size, positions):
    out = np.zeros(size, bool)
    out[list(positions)] = True
    return out


def brute_threshold(c, masked, threshold):
    ready = [k for k in np.flatnonzero(masked) if c[k] >= threshold]
    return chosen(len(c), ready or order_of(c, masked)[:1])


def brute_prefix(c, masked, fits):
    order = order_of(c, masked)
    best = 0
    for n in range(1, len(order) + 1):
        if fits(order[:n]):
            best = n
    return chosen(len(c), order[: max(best, 1)])


def brute_factor(c, masked, factor):
    def fits(prefix):
        n = np.float32(len(prefix) + 1)
        return n * (np.float32(1) - c[prefix[-1]]) < np.float32(factor)

    return brute_prefix(c, masked, fits)


def brute_frechet(c, masked, factor):
    def fits(prefix):
        doubt = 1 - c[prefix].astype(np.float64)
        return doubt.sum() + doubt[-1] < factor - 1e-9

    return brute_prefix(c, masked, fits)


def brute_entropy_bounded(entropy, masked, gamma):
    def fits(prefix):
        values = entropy[prefix].astype(np.float64)
        return values.sum() - values.max() <= gamma + 1e-9

    return brute_prefix(-entropy, masked, fits)


def brute_klass(c, stable, masked, threshold, quota):
    ready = [k for k in np.flatnonzero(masked) if stable[k] and c[k] > threshold]
    return chosen(len(c), ready or order_of(c, masked)[:quota])


def brute_hierarchy(c, masked, positions, high, low):
    runs, last = [], None
    for k in np.flatnonzero(masked):
        if last is not None and k == last + 1 and positions[k] == positions[last] + 1:
            runs[-1].append(k)
        else:
            runs.append([k])
        last = k
    out = {k for k in np.flatnonzero(masked) if c[k] > high}
    for cells in runs:
        best = max(cells, key=lambda k: (c[k], -k))
        if c[best] > low:
            out.add(best)
    return chosen(len(c), out | set(order_of(c, masked)[:1]))


CASES, SIZE = 400, 9


@pytest.fixture(scope="module")
def cases():
    """Confidences with many ties, masks with every number of positions."""
    rng = np.random.default_rng(0)
    # Sixteenths have exact sums, so that float32 and float64 agree on every bound.
    c = (rng.integers(0, 17, (CASES, SIZE)) / 16).astype(np.float32)
    sharp = rng.random(CASES) < 0.5
    c[sharp] = 1 - (1 - c[sharp]) / 8
    masked = rng.random((CASES, SIZE)) < rng.random((CASES, 1))
    masked[:2] = [[False] * SIZE, [True] * SIZE]
    return c, masked, rng


def assert_sets(function, brute, rows):
    got = np.asarray(jax.jit(jax.vmap(function))(*rows))
    for i, row in enumerate(zip(*map(np.asarray, rows), strict=True)):
        np.testing.assert_array_equal(got[i], brute(*row), err_msg=str(row))
        masked = row[1] if row[1].dtype == bool else row[2]
        assert not np.any(got[i] & ~masked)
        assert got[i].any() == masked.any()


def test_sets_equal_brute_force(cases):
    c, masked, rng = cases
    bound = (rng.integers(0, 33, CASES) / 16).astype(np.float32)
    assert_sets(threshold_set, brute_threshold, (c, masked, bound))
    assert_sets(factor_set, brute_factor, (c, masked, bound))
    assert_sets(frechet_set, brute_frechet, (c, masked, bound))
    bound = (rng.integers(0, 33, CASES) / 16).astype(np.float32)

    def bounded(entropy, masked, gamma):
        return entropy_bounded_set(entropy, entropy, masked, gamma)

    assert_sets(bounded, brute_entropy_bounded, (c, masked, bound))
    high, low = 0.5 + bound / 4, bound / 4
    gaps = np.cumsum(rng.integers(1, 3, (CASES, SIZE)), axis=1).astype(np.int32)
    assert_sets(hierarchy_set, brute_hierarchy, (c, masked, gaps, high, low))


def test_klass_set_equals_brute_force_and_never_leaves_the_masks(cases):
    c, masked, rng = cases
    stable = rng.random((CASES, SIZE)) < 0.3
    threshold = rng.random(CASES).astype(np.float32)
    quota = rng.integers(1, 2 * SIZE, CASES).astype(np.int32)

    def permuted(c, masked, stable, threshold, quota):
        return klass_set(c, stable, masked, threshold, quota)

    def brute(c, masked, stable, threshold, quota):
        return brute_klass(c, stable, masked, threshold, quota)

    assert_sets(permuted, brute, (c, masked, stable, threshold, quota))


def test_frechet_never_commits_fewer_and_prefixes_grow(cases):
    c, masked, rng = cases
    noisy = np.clip(c + rng.normal(0, 0.01, c.shape), 0, 1).astype(np.float32)
    factors = np.linspace(0, 3, 7, dtype=np.float32)
    many = jax.jit(
        jax.vmap(
            lambda c, m: [
                jax.vmap(lambda f, rule=rule: rule(c, m, f))(factors)
                for rule in (factor_set, frechet_set)
            ]
        )
    )
    for confidence in (c, noisy):
        factor, frechet = map(np.asarray, many(confidence, masked))
        assert np.all(frechet >= factor)
        for grid in (factor, frechet):
            assert np.all(grid[:, 1:] >= grid[:, :-1])
        assert np.all(factor[:, 0].sum(axis=-1) == masked.any(axis=-1))


# What the bounds guarantee.


@pytest.mark.parametrize("n", [2, 3, 4])
def test_committed_arg_maxes_are_those_of_the_joint(n):
    rng = np.random.default_rng(n)
    joints = rng.dirichlet(np.full(3**n, 0.1), 2000)
    peak = rng.integers(3**n, size=2000)
    weight = rng.uniform(0, 0.9, 2000)
    joints *= 1 - weight[:, None]
    joints[np.arange(2000), peak] += weight
    joints = joints.reshape(2000, *[3] * n)
    marginals = np.stack(
        [joints.sum(tuple(a + 1 for a in range(n) if a != axis)) for axis in range(n)],
        axis=1,
    )
    confidence, best = marginals.max(-1), marginals.argmax(-1)
    masked = np.ones((2000, n), bool)
    tested = 0
    for rule in (factor_set, frechet_set):
        commit = jax.vmap(lambda c, m, rule=rule: rule(c, m, 1 - 1e-5))
        for joint, word, chosen in zip(
            joints, best, np.asarray(commit(confidence, masked)), strict=True
        ):
            law = joint.sum(tuple(np.flatnonzero(~chosen)))
            top = np.unravel_index(law.argmax(), law.shape)
            assert tuple(word[chosen]) == top
            tested += chosen.sum() > 1
    assert tested > 500


def test_the_guarantee_is_sharp():
    # 1/(n+1) − δ on all zeros and 1/(n+1) + δ/n on each one-hot word.
    n, delta = 4, 0.01
    zeros, one_hot = 1 / (n + 1) - delta, 1 / (n + 1) + delta / n
    assert zeros < one_hot
    np.testing.assert_allclose([zeros, one_hot], [0.19, 0.2025])
    epsilon = one_hot  # P(x_k = 1)
    np.testing.assert_allclose((n + 1) * epsilon, 1.0125)
    c = np.full((n,), 1 - epsilon)
    assert not factor_set(c, ALL, 1.0).all()
    assert factor_set(c, ALL, 1.0126).all()
    # "Exactly one 1": the product arg-max has probability 0 under the joint.
    c = np.full((n,), 1 - 1 / n)
    assert not frechet_set(c, ALL, 1.0).all()
    assert factor_set(c, ALL, 1.26).all()


# What the rules are careful about.


def test_a_failing_last_rank_is_not_committed():
    c = np.array([0.99, 0.98, 0.97, 0.2])
    for rule in (factor_set, frechet_set):
        assert rule(c, ALL, 1.0).tolist() == [True, True, True, False]
        assert rule(np.array([0.3]), ALL[:1], 1.0).tolist() == [True]


def test_rows_do_not_look_at_each_other():
    c = np.array([[0.95, 0.2, 0.3, 0.1], [0.1, 0.2, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]])
    h = 1 - c
    masked = np.ones(c.shape, bool)
    for rule in (
        lambda c, h, m: threshold_set(c, m, 0.9),
        lambda c, h, m: factor_set(c, m, 1.0),
        lambda c, h, m: frechet_set(c, m, 1.0),
        lambda c, h, m: entropy_bounded_set(h, h, m, 0.3),
        lambda c, h, m: klass_set(c, c > 0.9, m, 0.9),
        lambda c, h, m: hierarchy_set(c, m, np.arange(4), 0.9, 0.4),
    ):
        batch = jax.vmap(rule)(c, h, masked)
        assert batch.any(axis=1).all()
        for i in range(3):
            np.testing.assert_array_equal(batch[i], rule(c[i], h[i], masked[i]))


def test_ties_go_to_the_lower_position():
    c = np.array([0.5, 0.7, 0.7, 0.7])
    masked = np.array([True, False, True, True])
    third = [False, False, True, False]
    assert threshold_set(c, masked, 0.9).tolist() == third
    assert factor_set(c, masked, 0.0).tolist() == third
    assert frechet_set(c, masked, 0.0).tolist() == third
    assert entropy_bounded_set(1 - c, 1 - c, masked, 0.0).tolist() == third
    # One of each run, the lower position among its equals.
    runs = np.array([True, True, False, True])
    assert hierarchy_set(c, runs, np.arange(4), 0.9, 0.4).tolist() == [
        *(False, True, False, True)
    ]


def test_not_a_number_is_never_sure():
    c = np.array([np.nan, 0.95, 0.2, np.nan])
    assert threshold_set(c, ALL, 0.9).tolist() == [False, True, False, False]
    assert factor_set(c, ALL, 1.0).tolist() == [False, True, False, False]
    assert hierarchy_set(c, ALL, np.arange(4), 0.9, 0.4).tolist() == [
        *(False, True, False, False)
    ]


def test_eb_orders_by_its_proxy():
    law = np.array([[0.6, 0.4, 0.0], [0.5, 0.25, 0.25], [0.62, 0.19, 0.19]])
    law = np.maximum(law, 1e-9)
    window = window_of(np.ones((3,), bool))
    first = {}
    for proxy in ("entropy", "confidence", "margin"):
        rule = EntropyBounded(gamma=0.0, proxy=proxy)
        rule.check(1, 3)
        selection = select(rule, window, prediction_of(law), ())
        first[proxy] = int(np.flatnonzero(selection.commit)[0])
        assert int(np.argmax(selection.score)) == first[proxy]
        everything = EntropyBounded(gamma=math.inf, proxy=proxy)
        assert select(everything, window, prediction_of(law), ()).commit.all()
    assert first == {"entropy": 0, "confidence": 2, "margin": 2}


def test_klass_waits_for_the_law_to_settle():
    rule = KLASS(confidence=0.6, kl=0.01, history=2)
    window = window_of(np.ones((3,), bool))
    aux = enter(rule, window, 3)
    steady = np.array([0.7, 0.2, 0.1])
    laws = [
        np.stack([steady, np.roll(steady, t), np.full((3,), 1 / 3)])
        for t in (0, 0, 1, 1, 1)
    ]
    ready = []
    for law in laws:
        selection = select(rule, window, prediction_of(law), aux)
        aux = selection.aux
        ready.append(selection.commit.tolist())
    # Nothing is ready in evaluations 1 and 2; the best position alone is committed.
    # Position 1 moved before evaluation 3 and is ready in evaluation 5.
    alone = [True, False, False]
    assert ready == [alone, alone, alone, alone, [True, True, False]]
    quota = dataclasses.replace(rule, quota=2)
    selection = select(quota, window, prediction_of(laws[0]), enter(rule, window, 3))
    assert selection.commit.tolist() == [True, True, False]
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.7, 0.1])
    expected = 0.5 * math.log(3.5)
    np.testing.assert_allclose(kl_divergence(np.log(p), np.log(q)), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_klass_in_fewer_bits(dtype):
    exact = KLASS(confidence=0.3, kl=0.02, history=1)
    rule = dataclasses.replace(exact, dtype=dtype)
    rng = np.random.default_rng(1)
    window = window_of(np.ones((64,), bool))
    first = rng.dirichlet(np.full(20, 0.2), 64)
    second = 0.98 * first + 0.02 * rng.dirichlet(np.full(20, 0.2), 64)
    commits = []
    for kind in (exact, rule):
        aux = enter(kind, window, 20)
        assert aux.log_prob.dtype == kind.dtype
        for law in (first, second):
            law = np.maximum(np.asarray(law, jnp.float32), 1e-38)
            selection = select(kind, window, prediction_of(law), aux)
            aux = selection.aux
        assert bool(np.isfinite(aux.log_prob.astype(jnp.float32)).all())
        commits.append(np.asarray(selection.commit))
    assert commits[0].sum() > 10
    assert (commits[0] != commits[1]).sum() <= 3


def test_credit_follows_its_recursion():
    rule = Credit(boost=0.7, gain=0.2, decay=0.8, threshold=0.9)
    rng = np.random.default_rng(2)
    masked = np.array([True, True, False, True])
    window = window_of(masked)
    aux = enter(rule, window, 5)
    credit = np.zeros((4, 5))
    adjust = jax.jit(rule.adjust)
    for _ in range(6):
        logits = rng.normal(0, 2, (4, 5)).astype(np.float32)
        logits[:, 4] = -1e30
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        credit *= 0.8
        for k in np.flatnonzero(masked):
            credit[k, p[k].argmax()] += p[k].max() ** 0.2
        expected = logits + 0.7 * np.log1p(credit)
        raised, aux = adjust(window, np.asarray(logits), aux)
        np.testing.assert_allclose(raised[:, :4], expected[:, :4], atol=1e-5)
        prediction = Prediction(logit_statistics(raised), raised)
        selection = select(rule, window, prediction, aux)
        aux = selection.aux
        np.testing.assert_allclose(aux, credit, atol=1e-5)
        commit = threshold_set(prediction.statistics.max_prob, window.masked, 0.9)
        np.testing.assert_array_equal(selection.commit, commit)


# Block ends.


def test_blocks_end_after_the_surest_delimiter():
    ends = AdaptiveEnds(delimiter_ids=(1, 2), share=0.5, threshold=0.3)
    ends.check(4)
    assert ends.width(2, 12) == 6
    assert ends.width(8, 12) == 8
    assert ends.width(12, 12) == 12
    confidence = np.array([0.9, 0.4, 0.6, 0.6, 0.9, 0.9])
    argmax = np.array([0, 1, 2, 1, 3, 1])
    window = window_of(np.array([True] * 6), start=np.int32(0), count=np.int32(10))

    def end(ends=ends, window=window, confidence=confidence):
        statistics = Statistics(*[confidence] * 3, argmax, confidence)
        return int(ends(window, statistics, np.int32(2)))

    # Within 5 positions the best delimiter is at rank 2, the lower one of two equals.
    assert end() == 3
    assert end(dataclasses.replace(ends, share=0.6)) == 6
    assert end(dataclasses.replace(ends, share=0.01)) == 2
    assert end(dataclasses.replace(ends, threshold=0.61)) == 2
    assert end(dataclasses.replace(ends, threshold=0.6)) == 3
    assert end(dataclasses.replace(ends, delimiter_ids=(0,), share=0.01)) == 1
    # Positions before the block or already known do not count.
    assert end(window=window._replace(start=np.int32(3))) == 6
    remaining = np.array([True, True, False, True, True, True])
    assert end(window=window._replace(remaining=remaining)) == 4


# Names and bad values.


def test_rules_by_name():
    assert rule_from_name("threshold", threshold=0.8) == Threshold(threshold=0.8)
    assert rule_from_name("eb", proxy="margin").proxy == "margin"
    rule = rule_from_name("fixed_quota", num_steps=4, score="margin")
    assert rule.score == Margin()
    rule = rule_from_name("ancestral", num_steps=4, schedule="cosine")
    assert rule.schedule == Cosine()
    for name, kind in RULES.items():
        needed = {"num_steps": 4, "edit_threshold": 0.9}
        fields = {field.name for field in dataclasses.fields(kind)}
        options = {k: v for k, v in needed.items() if k in fields}
        rule = rule_from_name(name, **options)
        assert isinstance(rule, kind)
        rule.check(1, 4)
    assert score_from_name("pc", frequency=np.full(4, 0.25)).cap == 10


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top", {}, r"rule must be one of \['ancestral', .*, got 'top'"),
        ("threshold", {"num_steps": 8}, "takes no num_steps"),
        ("klass", {"num_steps": 8}, "takes no num_steps"),
        ("factor", {"gamma": 1.0}, r"no option 'gamma'; it takes \['factor'\]"),
        ("joint_threshold", {}, "needs the option 'edit_threshold'"),
        ("ancestral", {}, "needs the option 'num_steps'"),
        ("threshold", {"score": "best"}, "score must be one of"),
        ("threshold", {"score": "pc"}, "needs the option 'frequency'"),
        ("fixed_quota", {"num_steps": 4, "remaining": "odd"}, "remaining must be"),
    ],
)
def test_bad_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        rule_from_name(name, **options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Threshold(threshold=math.nan), "threshold must be a number at least 0"),
        (Threshold(threshold=-0.1), "threshold must be"),
        (Threshold(threshold="high"), "threshold must be"),
        (Threshold(score=0.5), "score must be a score"),
        (Threshold(score=PCScore(frequency=np.ones(3) / 3)), r"shape \(4,\)"),
        (Factor(factor=-1.0), "factor must be"),
        (Frechet(factor=math.nan), "factor must be"),
        (EntropyBounded(gamma=-0.1), "gamma must be"),
        (EntropyBounded(proxy="luck"), "proxy must be one of"),
        (KLASS(confidence=math.nan), "confidence must be"),
        (KLASS(kl=-1.0), "kl must be"),
        (KLASS(history=0), "history must be a number at least 1"),
        (KLASS(quota=1.5), "quota must be an integer"),
        (KLASS(dtype="int8"), "dtype must be one of"),
        (Hierarchy(high=0.4, low=0.9), "low must be .* at most 0.4"),
        (Credit(decay=1.1), "decay must be .* at most 1"),
        (Credit(boost=math.nan), "boost must be"),
        (DreamOrigin(num_steps=4, epsilon=1.0), "epsilon must be below 1"),
        (DreamOrigin(num_steps=4, schedule=Cosine()), "schedule must be Linear"),
        (StochasticQuota(num_steps=0), "num_steps must lie"),
        (
            FixedQuota(num_steps=4, score=PCScore(frequency=np.full(4, -1.0))),
            "frequency must lie",
        ),
        (
            FixedQuota(num_steps=4, score=PCScore(frequency=np.ones(4), cap=0.0)),
            "cap must be a number above 0",
        ),
    ],
)
def test_bad_fields(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.check(1, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delimiter_ids": ()}, "delimiter_ids must be a tuple of ids"),
        ({"delimiter_ids": (4,)}, "delimiter_ids"),
        ({"delimiter_ids": [1]}, "delimiter_ids"),
        ({"delimiter_ids": (1,), "share": 0.0}, "share must be a number above 0"),
        ({"delimiter_ids": (1,), "share": 1.5}, "share"),
        ({"delimiter_ids": (1,), "threshold": math.nan}, "threshold"),
    ],
)
def test_bad_block_ends(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEnds(**fields).check(4)


# In the loop: one compilation per rule serves all of these.

FREQUENCY = np.array([0.5, 0.3, 0.2, 0.0], np.float32)
IN_THE_LOOP = {
    "threshold": Threshold(threshold=0.6),
    "factor": Factor(),
    "frechet": Frechet(),
    "eb": EntropyBounded(gamma=0.3),
    "klass": KLASS(confidence=0.5, kl=0.5, history=1),
    "hierarchy": Hierarchy(high=0.7),
    "credit": Credit(threshold=0.7),
}
PRODUCT = rules.product_joint()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "factor" else name
        for name in IN_THE_LOOP
    ],
)
def test_rule_in_the_loop(name):
    rule, canvas = IN_THE_LOOP[name], rules.ragged_canvas()
    result = rules.run(rule)
    rules.assert_complete(result, canvas)
    rules.assert_guarded(result, canvas)
    rules.assert_rows_are_alone(rule, result)
    if name != "credit":  # It raises laws on purpose.
        joint = PRODUCT.astype(np.float32)
        result = rules.run(rule, rules.empty_canvas(), seed=1, joint=joint)
        assert rules.p_value(result.tokens, PRODUCT) > 1e-3


GENERATED = (~rules.GIVEN).sum(axis=1)
BLOCKS = -(-GENERATED // rules.WIDTH)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (Threshold(threshold=1.5), Threshold(threshold=0.0)),
        pytest.param(
            *(Factor(factor=0.0), Factor(factor=math.inf)), marks=pytest.mark.slow
        ),
        (Frechet(factor=0.0), Frechet(factor=math.inf)),
        (EntropyBounded(gamma=0.0), EntropyBounded(gamma=math.inf)),
        (KLASS(kl=0.0), KLASS(quota=9)),
        (Credit(threshold=20.0), Credit(threshold=0.0)),
        (Hierarchy(high=1.5, low=1.5), Hierarchy(high=0.0, low=0.0)),
    ],
)
def test_ends_of_the_range(slow, fast):
    traces = toy.TRACES[0]
    nfe = np.asarray(rules.run(fast).nfe).reshape(-1, len(GENERATED))
    np.testing.assert_array_equal(nfe, np.broadcast_to(BLOCKS, nfe.shape))
    assert toy.TRACES[0] - traces <= 1
    traces = toy.TRACES[0]
    result = rules.run(slow, rules.empty_canvas())
    assert toy.TRACES[0] == traces
    if isinstance(slow, EntropyBounded):
        # Zero entropies come free, and so does the one after them.
        assert np.all(np.asarray(result.nfe) >= 2)
        return
    np.testing.assert_array_equal(result.nfe, rules.LENGTH)
    if not isinstance(slow, Credit):
        # One token per evaluation, chosen by the state alone: the joint itself.
        assert rules.p_value(result.tokens, toy.JOINT) > 1e-3


def test_a_sweep_compiles_once():
    sweeps = (
        [Threshold(threshold=x) for x in (0.0, 0.5, np.float32(0.9), 2.0)],
        [EntropyBounded(gamma=x) for x in (0.0, 1.0, math.inf)],
        [Credit(boost=x, gain=y) for x, y in ((0.0, 1.0), (0.5, 0.2))],
    )
    for sweep in sweeps:
        rules.run(sweep[0])
        traces = toy.TRACES[0]
        nfe = [float(rules.run(rule).nfe.mean()) for rule in sweep]
        assert toy.TRACES[0] == traces
        assert len(set(nfe)) > 1 or isinstance(sweep[0], Credit)


def test_credit_without_a_boost_is_the_threshold():
    greedy = Settings(temperature=0.0)
    plain = rules.run(Threshold(threshold=0.7), settings=greedy)
    credit = rules.run(Credit(boost=0.0, threshold=0.7), settings=greedy)
    np.testing.assert_array_equal(plain.tokens, credit.tokens)
    np.testing.assert_array_equal(plain.nfe, credit.nfe)
    raised = rules.run(Credit(boost=5.0, threshold=0.7), settings=greedy)
    assert float(raised.nfe.mean()) < float(plain.nfe.mean())


def test_a_rule_names_what_is_wrong_through_sample():
    with pytest.raises(ValueError, match="threshold must be a number at least 0"):
        rules.run(Threshold(threshold=math.nan))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THE_LOOP)
def test_a_row_of_a_batch_is_that_of_its_own_run(name):
    rule, canvas = IN_THE_LOOP[name], rules.ragged_canvas()
    batch = rules.run(rule)
    row = jax.tree.map(lambda x: np.asarray(x)[:1], canvas)
    alone = rules.run(rule, row, keys=rules.keys_of(0)[:1])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[0])
    assert int(alone.nfe[0]) == int(batch.nfe[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        Threshold(threshold=0.6, score=Margin()),
        FixedQuota(num_steps=4, score=PCScore(frequency=FREQUENCY)),
        StochasticQuota(num_steps=4),
        StochasticQuota(num_steps=8, score=Position()),
        DreamOrigin(num_steps=8),
        EntropyBounded(gamma=0.3, proxy="margin"),
    ],
)
def test_other_rules_in_the_loop(rule):
    canvas = rules.ragged_canvas()
    result = rules.run(rule)
    rules.assert_complete(result, canvas)
    rules.assert_guarded(result, canvas)
    rules.assert_rows_are_alone(rule, result)
    joint = PRODUCT.astype(np.float32)
    result = rules.run(rule, rules.empty_canvas(), seed=1, joint=joint)
    assert rules.p_value(result.tokens, PRODUCT) > 1e-3


@pytest.mark.slow
def test_thresholds_on_the_drawn_token_are_biased():
    joint = PRODUCT.astype(np.float32)
    rule = Threshold(threshold=0.6, score=Drawn())
    result = rules.run(rule, rules.empty_canvas(), joint=joint)
    assert rules.p_value(result.tokens, PRODUCT) < 1e-6
    result = rules.run(Threshold(threshold=0.6), rules.empty_canvas(), joint=joint)
    assert rules.p_value(result.tokens, PRODUCT) > 1e-3


following = jax.jit(lambda rule, window, aux: rule.advance(KEY, window, aux))


def test_stochastic_relatives_of_the_ancestral_rule():
    # On one block the steps at which something happens are those of `Ancestral`.
    window = window_of(np.ones((6,), bool))
    ancestral = Ancestral(num_steps=5)
    clock = enter(ancestral, window, 3)
    rule = StochasticQuota(num_steps=5, score=MaxProb())
    np.testing.assert_array_equal(enter(rule, window, 3), clock)
    laws = prediction_of(np.random.default_rng(0).dirichlet(np.ones(3), 6))
    step, committed = 0, []
    while window.masked.any():
        advance = following(rule, window._replace(step=np.int32(step)), clock)
        window = window._replace(step=np.asarray(advance.step))
        commit = np.asarray(select(rule, window, laws, clock).commit)
        committed.append((int(advance.step), int(commit.sum())))
        window = window._replace(masked=window.masked & ~commit)
        step = int(advance.step) + 1
    steps, numbers = np.unique(clock, return_counts=True)
    assert committed == list(zip(steps.tolist(), numbers.tolist(), strict=True))
    # Dream's grid ends at ε: the last step has the share 1/n·(1 − ε) + ε.
    many = window_of(np.ones((20_000,), bool))
    rule = DreamOrigin(num_steps=4, epsilon=0.2)
    share = np.bincount(np.asarray(enter(rule, many, 3)), minlength=4) / 20_000
    # 4 standard errors of 20,000 draws are .013.
    np.testing.assert_allclose(share, [0.2, 0.2, 0.2, 0.4], atol=0.013)
    plain = enter(DreamOrigin(num_steps=4, epsilon=0.0), many, 3)
    np.testing.assert_array_equal(plain, enter(Ancestral(num_steps=4), many, 3))


def test_adaptive_ends_in_the_loop():
    # Any token ends a block: blocks of one. None does: the ordinary blocks.
    single = AdaptiveEnds(delimiter_ids=(0, 1, 2), share=0.25, threshold=0.0)
    everything = Threshold(threshold=0.0)
    result = rules.run(everything, block_ends=single)
    nfe = np.asarray(result.nfe).reshape(-1, len(GENERATED))
    np.testing.assert_array_equal(nfe, np.broadcast_to(GENERATED, nfe.shape))
    ordinary = dataclasses.replace(single, threshold=1.5)
    result = rules.run(everything, block_ends=ordinary)
    plain = rules.run(everything)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    np.testing.assert_array_equal(result.nfe, plain.nfe)
