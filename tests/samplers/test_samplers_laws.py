"""The laws that samplers draw from, against exact enumeration on a toy joint."""

import jax
import numpy as np
import pytest
import samplers_toy as toy
from scipy import stats

from diffmm.diffusion.schedules import Cosine
from diffmm.samplers import (
    Ancestral,
    Drawn,
    FirstHitting,
    FixedQuota,
    Margin,
    NegativeEntropy,
    Position,
    Random,
    sample,
)

ROWS = 30_000
FIRST_JOINT = toy.JOINT.astype(np.float32)


def run(rule, seed=0, joint=FIRST_JOINT, **options):
    return sample(
        toy.predict,
        joint,
        toy.empty_canvas(ROWS),
        jax.random.key(seed),
        rule=rule,
        mask_id=toy.MASK,
        allowed=toy.ALLOWED,
        **options,
    )


def p_value(observed, law):
    """Chi-square with cells of expectation below 5 pooled."""
    expected = law * observed.sum()
    small = expected < 5
    cells = np.append(observed[~small], observed[small].sum())
    means = np.append(expected[~small], expected[small].sum())
    keep = means > 0
    return stats.chisquare(cells[keep], means[keep], sum_check=False).pvalue


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum()


@pytest.mark.parametrize(
    ("num_steps", "distance", "evaluations"),
    [(1, 0.5333, 1.0), (2, 0.3145, 1.875), (4, 0.1715, 2.7344), (8, 0.0895, 3.3105)],
)
def test_ancestral_has_its_finite_step_law(num_steps, distance, evaluations):
    law = toy.ancestral_law(num_steps)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-9)
    assert abs(total_variation(law, toy.JOINT.ravel()) - distance) < 1e-4
    result = run(Ancestral(num_steps=num_steps), seed=num_steps)
    assert p_value(toy.counts(result.tokens), law) > 1e-3
    nfe = np.asarray(result.nfe)
    assert abs(toy.expected_evaluations(num_steps) - evaluations) < 1e-4
    # 4 standard errors of the mean.
    assert abs(nfe.mean() - evaluations) <= 4 * nfe.std() / np.sqrt(ROWS) + 1e-6


def test_one_step_is_the_product_of_marginals():
    product = np.ones(1)
    for axis in range(4):
        marginal = toy.marginals(toy.JOINT, {}, axis)
        product = np.multiply.outer(product, marginal)
    np.testing.assert_allclose(toy.ancestral_law(1), product.ravel(), atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        FirstHitting(),
        FixedQuota(num_steps=4),
        FixedQuota(num_steps=4, score=Random()),
        *(
            pytest.param(rule, marks=pytest.mark.slow)
            for rule in (
                FirstHitting(schedule=Cosine()),
                FixedQuota(num_steps=4, score=Margin()),
                FixedQuota(num_steps=4, score=NegativeEntropy()),
                FixedQuota(num_steps=4, score=Position()),
                FixedQuota(num_steps=4, choice_temperature=1.0),
            )
        ),
    ],
)
def test_one_token_per_evaluation_is_exact(rule):
    result = run(rule, seed=5)
    assert p_value(toy.counts(result.tokens), toy.JOINT.ravel()) > 1e-3
    np.testing.assert_array_equal(result.nfe, 4)
    assert int(result.forwards) == 4


@pytest.mark.slow
def test_ancestral_on_another_schedule_follows_its_own_grid():
    # With m = sin(πt/2) and two steps a token is revealed in the first one with
    # probability 1 − sin(π/4); 4 standard errors of 4·ROWS draws are .0053.
    result = run(Ancestral(num_steps=2, schedule=Cosine(), lazy=False), seed=9)
    first = np.asarray(result.step_committed) == 0
    assert abs(first.mean() - (1 - np.sin(np.pi / 4))) < 0.0053
    assert p_value(toy.counts(result.tokens), toy.ancestral_law(2)) < 1e-3


@pytest.mark.slow
def test_many_steps_on_any_schedule_approach_the_joint():
    result = run(Ancestral(num_steps=4096, schedule=Cosine()), seed=11)
    # Two of 4 tokens share a step with probability below 6·(π/2)/4096 = .0023.
    law = toy.counts(result.tokens) / ROWS
    exact = run(FirstHitting(), seed=12)
    noise = total_variation(toy.counts(exact.tokens) / ROWS, toy.JOINT.ravel())
    assert total_variation(law, toy.JOINT.ravel()) < 2 * noise
    assert float(np.mean(result.nfe)) > 3.98


def test_scoring_the_drawn_token_is_biased():
    result = run(FixedQuota(num_steps=4, score=Drawn()))
    distance = total_variation(toy.counts(result.tokens) / ROWS, toy.JOINT.ravel())
    # Sampling noise of a total variation over 81 cells: below sqrt(81/ROWS)/2 = .026.
    assert abs(distance - 0.4573) < 0.026


def test_scoring_the_drawn_token_is_biased_even_on_a_product():
    product = toy.ancestral_law(1).reshape(3, 3, 3, 3)
    joint = product.astype(np.float32)
    biased = run(FixedQuota(num_steps=4, score=Drawn()), joint=joint)
    # With all tokens committed the order does not matter on a product joint unless
    # redraws do: every evaluation draws again, so likely draws win.
    assert p_value(toy.counts(biased.tokens), product.ravel()) < 1e-3
    for rule in (Ancestral(num_steps=2), FixedQuota(num_steps=2), FirstHitting()):
        fair = run(rule, joint=joint, seed=2)
        assert p_value(toy.counts(fair.tokens), product.ravel()) > 1e-3


def test_blocks_keep_the_law():
    result = run(FixedQuota(num_steps=4), seed=3, block_length=2)
    assert p_value(toy.counts(result.tokens), toy.JOINT.ravel()) > 1e-3
    order = np.asarray(result.step_committed)
    assert (order[:, :2].max(axis=1) < order[:, 2:].min(axis=1)).all()


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_committing_evaluation():
    result = run(FixedQuota(num_steps=4, score=Position()), seed=4)
    tokens = np.asarray(result.tokens)
    joint = np.log(toy.JOINT[tuple(tokens.T)])
    # One token per evaluation: the chain rule gives the joint, float32.
    np.testing.assert_allclose(result.logprob.sum(axis=1), joint, atol=2e-4)


@pytest.mark.slow
def test_lazy_ancestral_gives_the_same_tokens_for_fewer_evaluations():
    lazy = run(Ancestral(num_steps=8, schedule=Cosine()), seed=6)
    eager = run(Ancestral(num_steps=8, schedule=Cosine(), lazy=False), seed=6)
    np.testing.assert_array_equal(lazy.tokens, eager.tokens)
    assert float(np.mean(eager.nfe)) > float(np.mean(lazy.nfe)) + 2
    assert int(eager.forwards) == 8
    assert int(lazy.forwards) <= 4
