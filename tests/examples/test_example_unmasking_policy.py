"""The example of unmasking policies: its problems, its frontiers, a quick run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    import learn_unmasking_policy

    return learn_unmasking_policy


@pytest.fixture(scope="module")
def arithmetic(example):
    return example.arithmetic


def test_equations_are_checked(arithmetic):
    from diffmm.policies import prompts_and_completions

    addends = jnp.array([[[3, 9], [0, 0]], [[9, 9], [1, 2]]])
    tokens = np.asarray(arithmetic.equations(addends))
    text = ["".join(arithmetic.SYMBOLS[i] for i in row) for row in tokens]
    assert text == ["12=3+9;00=0+0;", "18=9+9;03=1+2;"]
    canvas = arithmetic.canvas_of(tokens)
    assert canvas.generate.sum() == 2 * 2 * arithmetic.GENERATED

    def right(tokens):
        return arithmetic.reward(*prompts_and_completions(canvas, tokens)).tolist()

    assert right(tokens) == [1, 1]
    assert right(canvas.tokens) == [0, 0]
    other = tokens.copy()
    other[0, [3, 5]] = [4, 8]  # 12 = 4 + 8 is as good
    other[1, 3] = 8
    assert right(other) == [1, 0]
    other[0, 4] = arithmetic.EQUALS
    assert right(other) == [0, 0]


def test_training_rows_hold_one_or_two_segments(arithmetic):
    import jax

    batch = arithmetic.training_batch(jax.random.key(0), 4)
    assert np.asarray(batch.segment_ids).max(axis=1).tolist() == [1, 2, 1, 2]
    length = batch.tokens.shape[1]
    assert np.asarray(batch.positions).max(axis=1).tolist() == [
        length - 1, length // 2 - 1, length - 1, length // 2 - 1,
    ]  # fmt: skip


def test_margins_compare_frontiers(example):
    table = {
        "threshold": {
            "a": {"nfe": 2.0, "accuracy": 0.2},
            "b": {"nfe": 6.0, "accuracy": 0.9},
        },
        "policy, alpha 1": {
            "a": {"nfe": 2.0, "accuracy": 0.5},
            "b": {"nfe": 3.0, "accuracy": 0.9},
            "c": {"nfe": 5.0, "accuracy": 0.4},
        },
    }  # fmt: skip
    found = example.margins(table)
    assert found["smallest_margin"] == pytest.approx(0.3)
    assert found["largest_margin"] == pytest.approx(0.7)
    assert found["speedup_at_equal_accuracy"] == pytest.approx(2.0)


@pytest.mark.slow
def test_quick_run_writes_everything(example, tmp_path):
    config = example.Config(workdir=str(tmp_path), quick=True)
    result = example.train(dataclasses.replace(config))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["ok"]
    tables = json.loads((tmp_path / "samplers.json").read_text())
    assert set(tables) == {"as trained", "twice the length", "another denoiser"}
    for name in ("policies.png", "policy_alpha_1.npz", "toy_0/best.npz"):
        assert (tmp_path / name).stat().st_size > 0
