"""The optimiser benchmark at a tiny size: what it compares is comparable."""

import json

import jax
import numpy as np
import optax
import optimizer
import pytest


@pytest.mark.slow
def test_sides_are_the_same_optimiser_and_the_result_is_written(tmp_path):
    config = optimizer.Config(
        workdir=str(tmp_path),
        width=8,
        layers=1,
        vocabulary=16,
        repeats=2,
        compile_repeats=1,
        partition=False,
    )
    result = optimizer.run(config)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    figures = result["figures"]
    assert figures["classes"] == 11
    assert figures["leaves"] == 17
    assert figures["multipliers"]["arrays"] == 0
    ours, plain = (figures["memory"][side] for side in ("ours", "optax"))
    assert ours.pop("temporary_bytes") < plain.pop("temporary_bytes") + 4096  # scalars
    assert ours == plain

    shapes = optimizer.shapes(config)
    rng = np.random.default_rng(0)
    params = {
        name: jax.numpy.asarray(rng.normal(size=shape), np.float32)
        for name, shape in shapes.items()
    }
    sides = optimizer.transformations(list(shapes))
    found = {}
    for name in ("ours", "partition"):
        state, current = sides[name].init(params), params
        for _ in range(3):
            updates, state = jax.jit(sides[name].update)(params, state, current)
            current = optax.apply_updates(current, updates)
        found[name] = current
    for name, leaf in found["ours"].items():
        np.testing.assert_allclose(leaf, found["partition"][name], rtol=1e-5, atol=1e-6)


def test_the_full_tree_is_the_one_described():
    shapes = optimizer.shapes(optimizer.Config())
    assert len(shapes) == 264
    assert 1.0e8 < sum(np.prod(shape) for shape in shapes.values()) < 1.02e8
