"""The EMA example: its table in full, its model with a tiny configuration."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

TINY = {"num_seeds": 1, "kappas": "4", "steps": 160, "batch_size": 4}


@pytest.fixture(scope="module")
def example():
    import scale_ema

    return scale_ema


def test_writes_figures_and_picture(example, tmp_path):
    config = example.Config(
        workdir=str(tmp_path), paths=100, most_paths_kappa=2, **TINY
    )
    result = example.train(config)
    figures = result["figures"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["name"] == "scale_ema"
    assert figures["parabola_worst_deviation"] < 0.005
    assert figures["simulation_worst_standard_errors"] < 4  # of five means
    settings = {"reference", "kappa 4, rule", "kappa 4, no rule"}
    assert set(figures["byol"]) == settings
    decays = [figures["byol"][name]["decay"] for name in sorted(settings)]
    np.testing.assert_allclose(decays, [0.99, 0.99**4, 0.99])
    assert all(row["teacher_accuracy"] > 0.5 for row in figures["byol"].values())
    # Already in these few steps the teacher is further behind without the rule.
    last = {name: figures["byol"][name]["distance"]["100%"] for name in settings}
    assert last["kappa 4, no rule"] > 1.3 * last["kappa 4, rule"]
    with Image.open(tmp_path / "scale_ema.png") as picture:
        assert picture.size == (1320, 480)


def test_parabola_strays_to_first_order_with_the_rule_and_at_once_without(example):
    table = example.parabola_table([1, 2, 4, 8, 16, 32, 64])
    np.testing.assert_allclose(table.pop(1), 0, atol=1e-15)
    for kappa, (rule, _, no_rule, *_) in table.items():
        assert rule / (kappa - 1) == pytest.approx(1.153e-5, rel=0.03)
        assert no_rule > 0.1
        assert no_rule / rule > 500 or kappa > 32


def test_moments_have_their_limits(example):
    """dΘ = −Θ dt, dZ = (Θ − Z) dt from (1, 1): e^−t and (1 + t) e^−t."""
    theta, zeta, _ = example.moments(1, [1 - example.RATE])[-1, :, 0]
    np.testing.assert_allclose([theta, zeta], [0.367861, 0.735759], atol=1e-6)
    np.testing.assert_allclose([theta, zeta], [np.exp(-1), 2 * np.exp(-1)], atol=3e-5)


def test_views_of_a_batch_and_shifts(example):
    images = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    moved = example.shifted(images)
    assert moved.shape == (9, 1, 64)
    np.testing.assert_array_equal(moved[4, 0], images.reshape(-1))
    np.testing.assert_array_equal(
        moved[0, 0].reshape(8, 8)[1:, 1:], images[0, :-1, :-1]
    )
    assert moved[0, 0].reshape(8, 8)[0].max() == 0
