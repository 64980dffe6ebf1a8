"""Rules that take commits back: their rates, their bounds, their laws."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samplers_rules as rules
import samplers_toy as toy

from diffmm.diffusion.schedules import Cosine, Geometric, Linear
from diffmm.samplers import Ancestral, Settings, Window
from diffmm.samplers.adaptive import Threshold
from diffmm.samplers.remasking import (
    WINO,
    JointThreshold,
    draft_limit,
    edit_set,
    wino_sets,
)
from diffmm.samplers.remdm import ReMDM, largest_sigma, unmask_probability

MANY = 40_000
PRODUCT = rules.product_joint()


def window_of(size=MANY, **fields) -> Window:
    """One block of one row, all of it masked."""
    zero, rank = np.int32(0), np.arange(size, dtype=np.int32)
    every = np.ones((size,), bool)
    window = Window(
        masked=every,
        valid=every,
        exists=every,
        remaining=every,
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


@jax.jit
def enter(rule, window, key):
    return rule.enter(key, window, 4)


@jax.jit
def turn(rule, window, aux):
    """One step of the rule on its own: the next window, and what happened."""
    advance = rule.advance(jax.random.key(9), window, aux)
    window = window._replace(step=advance.step)
    selection = rule.select(jax.random.key(9), window, None, aux)
    reveal, remask = selection.commit & window.masked, selection.remask
    masked = (window.masked & ~reveal) | remask
    return window._replace(masked=masked), selection, reveal, remask


def rates(rule, steps, seed=0):
    """Shares over ``steps`` steps: masked after, revealed, masked again."""
    rule = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rule)
    window = window_of()
    aux = enter(rule, window, jax.random.key(seed))
    rows = []
    for step in range(steps):
        before = np.asarray(window.masked)
        at = window._replace(step=np.int32(step))
        window, selection, reveal, remask = turn(rule, at, aux)
        aux = selection.aux
        assert int(window.step) == step
        assert bool(selection.hold) == (step + 1 < steps)
        assert not np.any(remask & before)
        rows.append(
            (
                np.mean(window.masked),
                np.sum(reveal) / max(before.sum(), 1),
                np.sum(remask) / max((~before).sum(), 1),
                before.sum(),
            )
        )
    return np.array(rows)


def test_golden_rates():
    np.testing.assert_allclose(largest_sigma(0.5, 0.6), 0.8, rtol=1e-6)
    assert float(largest_sigma(0.3, 0.4)) == 1.0
    assert float(largest_sigma(0.0, 0.4)) == 1.0
    np.testing.assert_allclose(unmask_probability(0.5, 0.6, 0.24), 0.44, rtol=1e-6)
    # Mask rate .5·.56 + .5·.24 = 1 − α_s.
    np.testing.assert_allclose(0.5 * 0.56 + 0.5 * 0.24, 0.4)
    # At σ_max every mask is revealed.
    np.testing.assert_allclose(unmask_probability(0.5, 0.6, 0.8), 1.0, rtol=1e-6)
    rule = ReMDM(num_steps=10, variant="rescale", eta=0.3)
    np.testing.assert_allclose(rule.sigma(0.5, 0.4), 0.24, rtol=1e-5)
    rule = ReMDM(num_steps=10, variant="cap", eta=0.9)
    np.testing.assert_allclose(rule.sigma(0.5, 0.4), 0.8, rtol=1e-5)
    loop = ReMDM(num_steps=20, variant="loop")
    for t, rate in [(1, 1), (0.775, 0.55), (0.55, 0.1), (0.3, 0.1), (0.025, 0.05)]:
        np.testing.assert_allclose(loop.mask_probability(t), rate, rtol=1e-5)
    assert float(loop.mask_probability(0.0)) == 0
    np.testing.assert_allclose(loop.sigma(0.4, 0.35), 0.02, rtol=1e-6)
    np.testing.assert_allclose(unmask_probability(0.9, 0.9, 0.02), 0.18, rtol=1e-5)
    assert float(loop.sigma(0.6, 0.55)) == float(loop.sigma(0.05, 0.0)) == 0


@pytest.mark.parametrize(
    "rule",
    [
        ReMDM(num_steps=10, variant="cap", eta=0.2, lazy=False),
        ReMDM(num_steps=20, variant="loop", eta=0.1, lazy=False),
    ],
)
def test_the_mask_rate_is_that_of_the_schedule(rule):
    n = rule.num_steps
    rows = rates(rule, n)
    top = 5 * 0.5 / math.sqrt(MANY)  # Five standard errors of a share, at most.
    for i, (masked, revealed, again, before) in enumerate(rows):
        t, s = 1 - i / n, 1 - (i + 1) / n
        m_t, m_s = float(rule.mask_probability(t)), float(rule.mask_probability(s))
        assert abs(masked - m_s) < top
        sigma = float(rule.sigma(t, s)) if i else 0.0
        tokens = max(MANY - before, 1)
        assert abs(again - sigma) < 2.5 / math.sqrt(tokens)
        expected = float(unmask_probability(1 - m_t, 1 - m_s, sigma))
        assert abs(revealed - expected) < 2.5 / math.sqrt(max(before, 1))
    assert rows[-1, 0] == 0
    assert rows[:, 2].max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        ReMDM(num_steps=10, variant="rescale", eta=0.5, schedule=Cosine(), lazy=False),
        ReMDM(num_steps=7, variant="rescale", eta=1.0, lazy=False),
        ReMDM(num_steps=50, variant="loop", lazy=False),
        ReMDM(num_steps=9, variant="cap", eta=0.3, schedule=Geometric(), lazy=False),
    ],
)
def test_mask_rates_at_the_ends_of_the_range(rule):
    n = rule.num_steps
    rows = rates(rule, n, seed=1)
    top = float(rule.mask_probability(1.0))
    for i, (masked, *_) in enumerate(rows[:-1]):
        expected = float(rule.mask_probability(1 - (i + 1) / n)) / top
        assert abs(masked - expected) < 5 * 0.5 / math.sqrt(MANY)
    assert rows[-1, 0] == 0


def test_conf_masks_again_what_was_unsure():
    rule = ReMDM(num_steps=np.int32(10), variant="conf", lazy=False)
    probability = np.array([0.1, 0.9, 0.5, 1.0, 0.3, 0.3], np.float32)
    window = window_of(
        6,
        masked=np.array([False] * 4 + [True] * 2),
        logprob=np.log(probability),
        step=np.int32(5),
    )
    keys = jax.random.split(jax.random.key(3), MANY)

    @jax.jit
    @jax.vmap
    def remasked(key):
        aux = rule.enter(key, window, 4)
        return rule.select(key, window, None, aux).remask

    share = np.mean(remasked(keys), axis=0)
    weight = np.exp(-probability[:4])
    # t = .5, s = .4: σ_max = .8.
    np.testing.assert_allclose(share[:4], 0.8 * weight / weight.sum(), atol=0.013)
    assert not share[4:].any()


@pytest.mark.slow
def test_lazy_steps_are_those_without_events():
    eager = ReMDM(
        num_steps=np.int32(40), variant="cap", eta=np.float32(0.1), lazy=False
    )
    lazy = dataclasses.replace(eager, lazy=True)
    aux = enter(eager, window_of(5), jax.random.key(4))
    runs = []
    for rule in (eager, lazy):
        window, memory, events = window_of(5), aux, []
        for _ in range(40):
            window, selection, reveal, remask = turn(rule, window, memory)
            memory = selection.aux
            if np.any(reveal | remask):
                events.append((int(window.step), reveal.tolist(), remask.tolist()))
            elif rule.lazy:
                raise AssertionError(f"step {int(window.step)} does nothing")
            if not (np.any(window.masked) or bool(selection.hold)):
                break
            window = window._replace(step=window.step + 1)
        runs.append(events)
    assert runs[0] == runs[1]
    assert any(any(event[2]) for event in runs[0])
    assert len(runs[0]) < 39


def test_remdm_without_remasking_is_ancestral():
    plain = rules.run(Ancestral(num_steps=8))
    result = rules.run(ReMDM(num_steps=8, eta=0.0))
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    np.testing.assert_array_equal(result.nfe, plain.nfe)
    np.testing.assert_array_equal(result.step_committed, plain.step_committed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "lazy", "schedule"),
    [
        ("rescale", False, Linear()),
        ("cap", True, Cosine()),
        ("conf", True, Cosine()),
        ("conf", False, Linear()),
    ],
)
def test_every_variant_without_remasking_is_ancestral(variant, lazy, schedule):
    rule = ReMDM(num_steps=8, eta=0.0, variant=variant, lazy=lazy, schedule=schedule)
    result = rules.run(rule)
    plain = rules.run(Ancestral(num_steps=8, schedule=schedule))
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    if not lazy:
        blocks = -(-(~rules.GIVEN).sum(axis=1) // rules.WIDTH)
        nfe = np.asarray(result.nfe).reshape(-1, len(blocks))
        # A row shares 8 steps among its blocks.
        np.testing.assert_array_equal(nfe, np.broadcast_to(8 * (blocks > 0), nfe.shape))


REMDM = [
    ReMDM(num_steps=8, variant="cap", eta=0.4),
    *(
        pytest.param(rule, marks=pytest.mark.slow)
        for rule in (
            ReMDM(num_steps=8, variant="rescale", eta=1.0),
            ReMDM(num_steps=24, variant="loop", eta=0.3),
            ReMDM(num_steps=8, variant="cap", eta=0.4, lazy=False),
        )
    ),
]


@pytest.mark.parametrize("rule", REMDM)
def test_remdm_in_the_loop(rule):
    canvas = rules.ragged_canvas()
    result = rules.run(rule)
    rules.assert_complete(result, canvas)
    rules.assert_block_order(result, canvas)
    rules.assert_rows_are_alone(rule, result)
    assert int(np.max(result.nfe)) <= rule.num_steps
    ancestral = rules.run(Ancestral(num_steps=rule.num_steps))
    assert float(np.mean(result.nfe)) > float(np.mean(ancestral.nfe)) + 0.3
    joint = PRODUCT.astype(np.float32)
    result = rules.run(rule, rules.empty_canvas(), seed=1, joint=joint)
    assert rules.p_value(result.tokens, PRODUCT) > 1e-3


@pytest.mark.slow
def test_lazy_remdm_gives_the_same_tokens_for_fewer_evaluations():
    for variant in ("loop", "conf"):
        lazy = ReMDM(num_steps=20, variant=variant)
        eager = dataclasses.replace(lazy, lazy=False)
        few, many = rules.run(lazy), rules.run(eager)
        np.testing.assert_array_equal(few.tokens, many.tokens)
        assert float(np.mean(few.nfe)) < float(np.mean(many.nfe)) - 1


@pytest.mark.slow
def test_remdm_conf_is_complete():
    rule = ReMDM(num_steps=20, variant="conf")
    result = rules.run(rule)
    rules.assert_complete(result, rules.ragged_canvas())
    rules.assert_rows_are_alone(rule, result)
    ancestral = rules.run(Ancestral(num_steps=20))
    assert float(np.mean(result.nfe)) > float(np.mean(ancestral.nfe)) + 1


# WINO.


def test_draft_limits():
    for n, limit in [(1, 5), (7, 5), (8, 5), (10, 7), (20, 14), (28, 19), (32, 20)]:
        assert int(draft_limit(np.int32(n), 0.7, 5, 20)) == limit


def test_wino_sets_equal_brute_force():
    rng = np.random.default_rng(0)
    cases, size = 300, 9
    c = (rng.integers(0, 17, (cases, size)) / 16).astype(np.float32)
    shadow = (rng.integers(0, 17, (cases, size)) / 16).astype(np.float32)
    masked = rng.random((cases, size)) < rng.random((cases, 1))
    committed = ~masked & (rng.random((cases, size)) < 0.9)
    most = rng.integers(1, 6, cases).astype(np.int32)

    @jax.jit
    @jax.vmap
    def sets(c, shadow, masked, committed, most):
        return wino_sets(c, shadow, masked, committed, draft=0.6, verify=0.8, most=most)

    drafted, again = map(np.asarray, sets(c, shadow, masked, committed, most))
    for i in range(cases):
        order = sorted(np.flatnonzero(masked[i]), key=lambda k: (-c[i, k], k))
        draft = [k for k in order if c[i, k] > 0.6][: most[i]] or order[:1]
        order = sorted(np.flatnonzero(committed[i]), key=lambda k: (shadow[i, k], k))
        doubted = [k for k in order if shadow[i, k] < np.float32(0.8)]
        doubted = doubted[: max(len(draft) - 1, 0)]
        assert set(np.flatnonzero(drafted[i])) == set(draft)
        assert set(np.flatnonzero(again[i])) == set(doubted)
        assert again[i].sum() < drafted[i].sum() or not masked[i].any()


class Others:
    """The law of each position given all others, its own token hidden."""

    def __call__(self, joint, tokens, positions, segment_ids, scored):
        every = jnp.arange(rules.LENGTH)[None]

        def without(axis):
            alone = jnp.where(every == axis, toy.MASK, tokens)
            at = jnp.full((len(tokens), 1), axis, jnp.int32)
            return toy.predict(joint, alone, positions, segment_ids, at)[:, 0]

        logits = jax.vmap(without, out_axes=1)(every[0])
        return jnp.take_along_axis(logits, scored[..., None], axis=1)


class Shadows(Others):
    """The ordinary law; `Others` for the shadows."""

    def __call__(self, *arguments):
        return toy.predict(*arguments)

    def shadow_features(self, params, tokens, positions, segment_ids, scored, mask_id):
        arguments = (params, tokens, positions, segment_ids, scored)
        return self(*arguments), super().__call__(*arguments)


SHADOWS, OTHERS = Shadows(), Others()


def test_wino_in_the_loop():
    rule, canvas = WINO(draft=0.3, verify=1.5, least=2), rules.ragged_canvas()
    result = rules.run(rule, predict=SHADOWS)
    rules.assert_complete(result, canvas)
    rules.assert_block_order(result, canvas)
    rules.assert_rows_are_alone(rule, result, predict=SHADOWS)
    # Every evaluation ends with fewer masks.
    generated = np.asarray(canvas.generate).sum(axis=1)
    assert np.all(np.asarray(result.nfe) <= generated)
    # What is drafted alone is never taken back; all at once takes one evaluation.
    for draft, nfe in ((1.5, generated), (0.0, -(-generated // rules.WIDTH))):
        extreme = dataclasses.replace(rule, draft=draft, verify=0.0)
        result = rules.run(extreme, predict=SHADOWS)
        np.testing.assert_array_equal(result.nfe, nfe)
    with pytest.raises(ValueError, match="max_forwards"):
        rules.run(rule, predict=SHADOWS, max_forwards=None)
    with pytest.raises(ValueError, match="shadow"):
        rules.run(rule)


# Editing.


def test_edits():
    argmax = np.array([1, 2, 0, 1])
    tokens = np.array([1, 1, 1, 3])
    confidence = np.array([0.99, 0.9, 0.7, 0.9], np.float32)
    committed = np.array([True, True, True, False])
    edits = edit_set(argmax, confidence, tokens, committed, 0.8)
    assert edits.tolist() == [False, True, False, False]
    # The comparison is strict.
    edits = edit_set(argmax, confidence, tokens, committed, np.float32(0.9))
    assert not np.any(edits)


@pytest.mark.slow
def test_joint_threshold_in_the_loop():
    canvas = rules.ragged_canvas()
    generated = np.asarray(canvas.generate).sum(axis=1)
    blocks = -(-generated // rules.WIDTH)
    greedy = Settings(temperature=0.0)
    rule = JointThreshold(edit_threshold=0.0, threshold=0.0, max_edits=4)
    result = rules.run(rule, predict=OTHERS, settings=greedy)
    rules.assert_complete(result, canvas)
    rules.assert_rows_are_alone(rule, result, predict=OTHERS, settings=greedy)
    nfe = np.asarray(result.nfe)
    assert np.all(nfe >= 2 * blocks)
    assert np.all(nfe <= 5 * blocks)
    assert np.any(nfe > 2 * blocks)
    # Rows of one block end where each arg-max is the token: nothing changed last.
    single = np.flatnonzero((blocks == 1) & (nfe < 5))
    assert len(single) > 1000
    tokens = jnp.asarray(np.asarray(result.tokens)[single])
    every = jnp.broadcast_to(jnp.arange(4), tokens.shape)
    logits = OTHERS(rules.JOINT, tokens, None, None, every)[..., : toy.MASK]
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    gap = np.where(np.asarray(canvas.generate)[single], logits.max(-1) - own, 0)
    assert gap.max() < 1e-4
    # Without edits a full block is looked at once more, or not at all.
    plain = dataclasses.replace(rule, edit_threshold=1.5)
    result = rules.run(plain, predict=OTHERS, settings=greedy)
    np.testing.assert_array_equal(result.nfe, 2 * blocks)
    never = dataclasses.replace(rule, max_edits=0)
    result = rules.run(never, predict=OTHERS, settings=greedy)
    np.testing.assert_array_equal(result.nfe, blocks)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ReMDM(num_steps=0), "num_steps must lie"),
        (ReMDM(num_steps=8, variant="capa"), r"variant must be one of \['cap'"),
        (ReMDM(num_steps=8, eta=1.5), "eta must be .* at most 1"),
        (ReMDM(num_steps=8, eta=math.nan), "eta must be"),
        (ReMDM(num_steps=8, t_on=0.05, t_off=0.5), "t_off must be below t_on"),
        (ReMDM(num_steps=8, t_on=1.0), "t_on below 1"),
        (ReMDM(num_steps=8, t_off=0.0), "t_off must be a number above 0"),
        (ReMDM(num_steps=8, alpha_on=1.0), "alpha_on must be below 1"),
        (WINO(draft=math.nan), "draft must be"),
        (WINO(share=2.0), "share must be .* at most 1"),
        (WINO(least=0), "least must be"),
        (WINO(least=6, most=5), "most must be a number at least 6"),
        (JointThreshold(edit_threshold=math.nan), "edit_threshold must be"),
        (JointThreshold(edit_threshold=0.9, threshold=-1.0), "threshold must be"),
        (JointThreshold(edit_threshold=0.9, max_edits=-1), "max_edits must be"),
    ],
)
def test_bad_fields(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.check(1, 4)


def test_editing_needs_its_threshold():
    with pytest.raises(TypeError, match="edit_threshold"):
        JointThreshold()
    assert Threshold().remasks is False
