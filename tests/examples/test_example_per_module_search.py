"""The per-module search with a tiny configuration: searches, stops, goes on."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from diffmm.optim import AdamW, adamw, mask_by_name
from diffmm.parameterisation import Card, PerModule

TINY = {
    "width": 8,
    "head_dim": 8,
    "num_layers": 1,
    "length": 8,
    "rows": 4,
    "steps": 6,
    "segments": 2,
    "validation_rows": 64,
    "sweep": 2,
    "weight_decays": "0.1",
    "tuning_generations": 1,
    "generations": 2,
    "generation": 3,
    "top": 1,
    "rescore_seeds": 1,
    "final_seeds": 2,
    "workers": 1,
}


@pytest.fixture(scope="module")
def example():
    return pytest.importorskip("per_module_search")


@pytest.fixture(scope="module")
def config(example, tmp_path_factory):
    return example.Config(workdir=str(tmp_path_factory.mktemp("run")), **TINY)


@pytest.fixture(scope="module")
def trainers(example, config):
    """Trainers by multiple of the size, compiled once for all tests."""
    prose = example.prose_trials.load_prose(
        length=config.length,
        rows=config.rows,
        steps=2 * config.steps,
        validation_rows=config.validation_rows,
    )
    make = example.Trainer
    return functools.cache(lambda multiple: make(config, multiple, prose))


@pytest.fixture(scope="module")
def trainer(trainers):
    return trainers(1)


def test_a_step_is_that_of_the_optimiser(example, trainer):
    """Traced factors do what `diffmm.optim.adamw` does with constants."""
    hyper = AdamW(learning_rate=3e-2, b2=0.95, weight_decay=0.5, eps=1e-3)
    tuned = PerModule(
        type={
            "attn.q": {"learning_rate": 2.0, "b1": 3.0, "b2": 0.5},
            "embed": {"weight_decay": 0.0, "eps": 7.0, "init_std": 2.0},
            "mlp.res": {"residual": 0.5},
        },
        depth={"learning_rate": [0.5]},
    )
    multipliers = tuned.apply(trainer.leaves, trainer.multipliers, absorb_residual=True)
    leafwise = trainer.leafwise(hyper, tuned)
    params = example.prose_trials.fresh(trainer.shape)
    matrices = {name for name, leaf in trainer.leaves.items() if leaf.matrix}
    optimizer = adamw(hyper, multipliers, mask=mask_by_name(matrices))
    state = optimizer.init(params)
    zeros = jax.tree.map(np.zeros_like, params)
    run, theirs = example.Run(params, zeros, zeros, np.int32(0)), params
    for seed in range(3):
        key = jax.random.key(seed)
        grads = jax.tree.map(
            lambda leaf, key=key: jax.random.normal(key, leaf.shape), params
        )
        run = example.adamw_step(leafwise, run, grads, 1.0)
        updates, state = optimizer.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    # float32 rounding of a few operations on parameters of order 1.
    for ours, other in zip(
        jax.tree.leaves(run.params), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(ours, other, atol=3e-6)


def test_a_training_behind_the_incumbent_ends(trainer):
    hyper = AdamW(learning_rate=1e-2)
    loss, curve = trainer.run(hyper, PerModule(), 0)
    again, _ = trainer.run(hyper, PerModule(), 0, incumbent=curve)
    assert loss == again
    stopped, short = trainer.run(hyper, PerModule(), 0, incumbent=[0.0] * len(curve))
    assert (stopped, len(short)) == (float("inf"), len(curve) // 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_search_stops_goes_on_and_reports(
    example, config, trainers, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        example, "Trainer", lambda _, multiple, prose: trainers(multiple)
    )
    whole = example.train(config)
    figures = whole["figures"]
    assert whole["name"] == "per_module_search"
    assert figures["trainings_per_search"] == 2 * (3 + 1)
    for size in ("same size", "twice the width and depth"):
        assert np.isfinite(figures[size]["gain"])
        assert set(figures[size]["mean_loss"]) == {
            "learning rate and decay",
            "global tuning",
            "global search",
            "per-module search",
        }
    folder = pathlib.Path(config.workdir)
    card = Card.load(folder / "card.json")
    assert (card.width, card.depth, card.tokens) == (8, 1, 6 * 4 * 8)

    # Killed before the last search, and started again: the same result.
    saved = json.loads((folder / "search.json").read_text())
    names = ("config", "tuning", "global tuning", "global search")
    (tmp_path / "search.json").write_text(json.dumps({n: saved[n] for n in names}))
    resumed = example.train(dataclasses.replace(config, workdir=str(tmp_path)))
    assert "continuing from" in capsys.readouterr().out
    for size in ("same size", "twice the width and depth"):
        assert resumed["figures"][size] == figures[size]

    # Asked to stop: the search is left after the generation that is running.
    stopping = json.loads((folder / "search.json").read_text())
    partial = {"config": stopping["config"], "tuning": stopping["tuning"]}
    (tmp_path / "search.json").write_text(json.dumps(partial))
    monkeypatch.setattr(example.GracefulShutdown, "requested", True)
    assert example.train(dataclasses.replace(config, workdir=str(tmp_path))) == {}
    monkeypatch.undo()

    with pytest.raises(ValueError, match=r"workdir: .*other options"):
        example.train(dataclasses.replace(config, seed=1))


def test_steps_must_divide(example, config):
    bad = dataclasses.replace(config, steps=7)
    with pytest.raises(ValueError, match="steps must be a multiple of segments=2"):
        example.Trainer(bad, 1, None)
