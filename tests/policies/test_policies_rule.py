"""The policy as a rule of the samplers: records, budgets, blocks, batches, transfer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies_toy import TINY, params_of, run, toy

from diffmm.policies import (
    PolicyConfig,
    PolicyRule,
    load_policy,
    log_prob,
    prompts_and_completions,
    repeat_rows,
    replay,
    save_policy,
    steps_of,
)
from diffmm.samplers import Settings, canvas_from_prompts, sample

MODES = ["bernoulli", "bernoulli-argmax", "dpls"]
RNG = np.random.default_rng(0)
CANVAS = toy.prompts(RNG, 6)


def rule_of(mode="bernoulli", config=TINY, **fields):
    return PolicyRule(params=params_of(config), config=config, mode=mode, **fields)


@pytest.mark.parametrize("mode", MODES)
def test_recorded_and_recomputed_likelihoods_agree(mode):
    """With a temperature of the policy other than 1: ratios are 1 before an update."""
    result = run(CANVAS, rule_of(mode, policy_temperature=0.6), block_length=8)
    trace = result.trace
    steps, active = steps_of(trace, TINY)
    logits = replay(params_of(), TINY, steps)
    new = log_prob(
        logits, steps.action, steps.allowed, mode=mode, policy_temperature=0.6
    )
    ratio = np.exp(np.asarray(new - steps.log_likelihood))[np.asarray(active)]
    np.testing.assert_allclose(ratio, 1, atol=1e-6 * 16)  # 16 terms in float32
    other = log_prob(logits, steps.action, steps.allowed, mode=mode)
    assert np.abs(other - steps.log_likelihood)[np.asarray(active)].max() > 0.1
    # Bookkeeping: one active turn per evaluation, actions are what was committed.
    np.testing.assert_array_equal(np.asarray(trace.active).sum(1), result.nfe)
    action, allowed = np.asarray(trace.action), np.asarray(trace.allowed)
    assert not (action[~allowed]).any()
    committed = (action > 0).sum(1)
    masked = np.asarray(result.tokens)[:, 1:] == toy.MASK
    np.testing.assert_array_equal(committed, ~masked)
    if mode != "bernoulli":
        assert (action > 0).any(-1)[np.asarray(trace.active)].all()
        assert not masked.any()


def test_a_row_of_a_ragged_batch_equals_its_single_run():
    prompts = [[3 + toy.PROMPT], [5 + toy.PROMPT], [8 + toy.PROMPT]]
    lengths = [16, 8, 12]
    together = canvas_from_prompts(prompts, lengths, mask_id=toy.MASK)
    keys = jax.random.split(jax.random.key(7), 3)
    rule = rule_of("bernoulli-argmax")
    batch = run(together, rule, keys)
    order = np.array([2, 0, 1])
    moved = run(type(together)(*(x[order] for x in together)), rule, keys[order])
    np.testing.assert_array_equal(np.asarray(batch.tokens)[order], moved.tokens)
    for row in (1,):
        alone = canvas_from_prompts([prompts[row]], lengths[row], mask_id=toy.MASK)
        single = run(alone, rule, keys[row : row + 1])
        end = 1 + lengths[row]
        np.testing.assert_array_equal(batch.tokens[row, :end], single.tokens[0])
        assert int(batch.nfe[row]) == int(single.nfe[0])
        np.testing.assert_array_equal(
            batch.step_committed[row, :end], single.step_committed[0]
        )


def test_a_row_that_unmasks_nothing_ends_with_its_budget():
    params = jax.tree.map(jnp.zeros_like, params_of())
    params["logit"]["bias"] = jnp.full((1,), -60.0)
    rule = PolicyRule(params=params, config=TINY, mode="bernoulli")
    result = run(CANVAS, rule)
    np.testing.assert_array_equal(result.nfe, 16)
    assert np.asarray(result.still_masked).all()
    blocks = run(CANVAS, rule, block_length=8, max_forwards=16, block_forwards=3)
    np.testing.assert_array_equal(blocks.nfe, 6)  # 3 in each of 2 blocks
    first = np.asarray(blocks.trace.allowed)[0].argmax(-1)[:6]
    np.testing.assert_array_equal(first, np.repeat([0, 8], 3))
    # The same policy in use makes progress, one position at a time.
    forced = run(CANVAS, dataclasses.replace(rule, mode="bernoulli-argmax"))
    np.testing.assert_array_equal(forced.nfe, 16)
    assert not np.asarray(forced.still_masked).any()
    # A β of e^60 turns s to 1, and all is unmasked at once.
    quick = dataclasses.replace(rule, beta=np.exp(60.0))
    np.testing.assert_array_equal(run(CANVAS, quick).nfe, 1)


def test_only_mask_confidence_and_time_matter():
    """Other ids with the same confidences: the same decisions."""

    swap = np.array([2, 3, 0, 1, *range(4, toy.VOCABULARY)])

    def renamed(params, tokens, positions, segment_ids, scored):
        names = jnp.asarray(swap)
        logits = toy.predict(params, names[tokens], positions, segment_ids, scored)
        return logits[..., names]

    rule = rule_of("bernoulli-argmax")
    one, two = run(CANVAS, rule), run(CANVAS, rule, predict=renamed)
    np.testing.assert_array_equal(one.step_committed, two.step_committed)
    np.testing.assert_array_equal(one.trace.action, two.trace.action)
    assert (np.asarray(one.tokens) != np.asarray(two.tokens)).any()


@pytest.mark.slow
def test_block_context_sees_the_block_alone():
    config = dataclasses.replace(TINY, full_context=False)
    rule = rule_of(config=config)
    assert not rule.sees_canvas
    # With a trace the window is the canvas, without one it is the block.
    recorded = run(CANVAS, rule, block_length=4)
    plain = sample(
        toy.predict, None, CANVAS, jax.random.key(0), rule=rule,
        mask_id=toy.MASK, allowed=toy.ALLOWED, settings=Settings(temperature=0.0),
        block_length=4, max_forwards=16, block_forwards=4,
    )  # fmt: skip
    np.testing.assert_array_equal(recorded.step_committed, plain.step_committed)
    steps, active = steps_of(recorded.trace, config, block_length=4)
    assert np.asarray(steps.seen).sum(-1).max() == 4
    new = log_prob(
        replay(params_of(config), config, steps), steps.action, steps.allowed
    )
    at = np.asarray(active)
    np.testing.assert_allclose(new[at], steps.log_likelihood[at], atol=1e-5)
    with pytest.raises(ValueError, match="block_length"):
        steps_of(recorded.trace, config)


@pytest.mark.slow
def test_more_than_one_probability_per_position():
    config = dataclasses.replace(TINY, num_inputs=3)
    rule = rule_of("bernoulli-argmax", config)
    assert rule.needs_logits
    result = run(CANVAS, rule)
    assert not np.asarray(result.still_masked).any()


@pytest.mark.slow
def test_a_sweep_compiles_once():
    traces = [0]

    def counted(*arguments):
        traces[0] += 1
        return toy.predict(*arguments)

    def nfe(**fields):
        result = run(CANVAS, rule_of("bernoulli-argmax", **fields), predict=counted)
        return float(np.mean(result.nfe))

    slow = nfe(beta=0.1)
    once = traces[0]
    fast = [nfe(beta=0.5), nfe(beta=4.0), nfe(policy_temperature=0.3)]
    assert traces[0] == once
    assert slow > fast[0] > fast[1]


def test_saved_policies_run_elsewhere(tmp_path):
    """Another length, another block length, another process: a file is all it takes."""
    path = tmp_path / "deep" / "policy.npz"
    save_policy(path, params_of(), TINY, metadata={"alpha": 1.0})
    policy = load_policy(path)
    assert policy.config == TINY
    assert policy.metadata == {"alpha": 1.0}
    jax.tree.map(np.testing.assert_array_equal, policy.params, params_of())
    assert path.stat().st_size < 4 * 2_000 + 8_000
    assert [p.name for p in path.parent.iterdir()] == ["policy.npz"]
    rule = policy.rule(mode="bernoulli-argmax")
    same = run(CANVAS, rule)
    expected = run(CANVAS, rule_of("bernoulli-argmax"))
    np.testing.assert_array_equal(same.tokens, expected.tokens)
    longer = run(toy.prompts(RNG, 4, length=24), rule, block_length=6)
    assert not np.asarray(longer.still_masked).any()


def test_refuses_files_that_are_no_policies(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match="save_policy"):
        load_policy(tmp_path / "text.npz")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="save_policy"):
        load_policy(tmp_path / "arrays.npz")
    broken = dict(params_of())
    broken["extra"] = broken.pop("mask")
    broken["logit"] = {"weight": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}
    with pytest.raises(ValueError, match=r"extra.*logit/weight.*mask"):
        save_policy(tmp_path / "policy.npz", broken, TINY)


def test_refuses_bad_rules():
    for fields, name in [
        ({"policy_temperature": 0.0}, "policy_temperature"),
        ({"beta": -1.0}, "beta"),
        ({"mode": "greedy"}, "mode"),
        ({"mode": "dpls", "beta": 2.0}, "beta"),
        ({"config": PolicyConfig()}, "params"),
    ]:
        rule = dataclasses.replace(rule_of(), **fields)
        with pytest.raises(ValueError, match=name):
            run(CANVAS, rule)
    with pytest.raises(ValueError, match="block_length"):
        run(CANVAS, rule_of(), block_length=5)


def test_prompts_and_completions_of_ragged_rows():
    canvas = canvas_from_prompts([[5, 6], [7]], [1, 3], mask_id=9)
    tokens = np.where(canvas.generate, 8, canvas.tokens)
    prompts, completions = prompts_and_completions(canvas, tokens)
    np.testing.assert_array_equal(prompts, [[5, 6], [7, -1]])
    np.testing.assert_array_equal(completions, [[8, -1, -1], [8, 8, 8]])
    assert repeat_rows(canvas, 2).tokens[:, 0].tolist() == [5, 5, 7, 7]
