"""The main example's hyper-parameters: as given at the base, carried over elsewhere."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffmm.models import TransformerConfig

SHAPE = TransformerConfig(vocabulary_size=40, width=32, num_layers=2, head_dim=8)


@pytest.fixture(scope="module")
def examples():
    pytest.importorskip("matplotlib")
    return pytest.importorskip("train_trimodal"), pytest.importorskip(
        "trimodal_optimizer"
    )


def plan_of(examples, shape=SHAPE, **changes):
    main, optimizer = examples
    return optimizer.make_plan(main.Config(ema=0.99, **changes), shape)


def test_at_the_base_nothing_changes(examples, tmp_path):
    plan = plan_of(examples)
    config = examples[0].Config()
    assert (plan.kappa, plan.logical_batch, plan.num_steps) == (1.0, 24, 4000)
    assert plan.hyper.learning_rate == config.learning_rate
    assert plan.hyper.ema == 0.99
    assert plan.shape == SHAPE
    assert {m.learning_rate for m in plan.multipliers.values()} == {1.0}
    plan.save(tmp_path)
    card = json.loads((tmp_path / "scale.json").read_text())
    assert card["hyper"]["learning_rate"] == config.learning_rate
    assert "unembedding" in (tmp_path / "multipliers.txt").read_text()


@pytest.mark.parametrize("kappa", [0.25, 0.5, 2, 4])
def test_any_physical_batch_is_the_same_experiment(examples, kappa):
    base = plan_of(examples)
    plan = plan_of(examples, physical_batch=int(24 * kappa))
    assert plan.kappa == kappa
    assert plan.num_steps * plan.physical_batch == 24 * 4000
    assert plan.schedule == base.schedule
    assert plan.logical_batch == base.logical_batch == 24
    for quantity in (
        lambda p: p.hyper.learning_rate**2 * p.num_steps,
        lambda p: p.hyper.learning_rate * p.hyper.weight_decay * p.num_steps,
        lambda p: np.log(p.hyper.b2) * p.num_steps,
        lambda p: np.log(p.hyper.ema) * p.num_steps,
        lambda p: p.hyper.eps**2 / p.num_steps,
    ):
        np.testing.assert_allclose(quantity(plan), quantity(base), rtol=1e-12)


def test_length_moves_the_logical_batch_and_a_given_one_wins(examples):
    longer = plan_of(examples, steps=40_000)
    np.testing.assert_allclose(longer.logical_batch, 24 * 10**0.44)
    np.testing.assert_allclose(longer.kappa, 10**-0.44)
    assert longer.num_steps == 40_000
    given = plan_of(examples, steps=40_000, logical_batch=24)
    assert given.kappa == 1.0
    assert given.hyper.learning_rate == examples[0].Config().learning_rate


def test_width_and_depth_become_factors(examples):
    shape = dataclasses.replace(SHAPE, width=64, num_layers=8)
    plan = plan_of(examples, shape, base_width=32, base_num_layers=2)
    assert plan.shape.attention_residual == plan.shape.mlp_residual == 0.25
    assert plan.multipliers["blocks/mlp/up"].learning_rate == 0.5
    assert plan.multipliers["embedding"].learning_rate == 1.0
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(lambda: examples[1]._parameters(plan.shape)),
    )
    plan.optimizer().init(params)


def test_gains_decay_only_if_asked(examples):
    everything = set(plan_of(examples).decayed)
    matrices = set(plan_of(examples, decay_gains=False).decayed)
    assert everything - matrices == {
        name for name, leaf in plan_of(examples).leaves.items() if not leaf.matrix
    }
    assert "final_norm/gain" in everything - matrices
