"""The sigmoid attention example with a tiny configuration."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def example():
    """By its path: a benchmark has the same name."""
    path = ROOT / "examples" / "sigmoid_attention.py"
    spec = importlib.util.spec_from_file_location("sigmoid_attention_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_trains_resumes_and_reports(example, tmp_path, capsys):
    names = ["sigmoid", "sigmoid, b = 0"]
    config = example.Config(
        workdir=str(tmp_path),
        length=32,
        width=16,
        head_dim=8,
        num_layers=1,
        seeds=1,
        steps=24,
        rows=2,
        validation_rows=64,
        initial_lengths="32",
        variants=";".join(names),
    )
    result = example.run(config)
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1]) == result
    assert json.loads((tmp_path / "result.json").read_text()) == result
    figures = result["figures"]
    for name in names:
        assert np.isfinite(figures[name]["validation"])
        assert figures[name]["validation"] < np.log(256)
    # Causal: a row sees 33/2 keys on average; the mass of a key is 1/2 with b = 0.
    mass = figures["sigmoid, b = 0"]["row_mass_at_first"][0]
    assert mass == pytest.approx(33 / 4, rel=0.05)
    assert 32 / 6 < figures["initial_ratio_without_bias"] < 32 / 2
    assert set(figures["sigmoid"]["longer"]) == {"kept", "-log 2n"}
    assert set(figures["sigmoid, b = 0"]["longer"]) == {"kept"}
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 24
    assert (tmp_path / "sigmoid_attention.png").stat().st_size > 10_000
    curves = (tmp_path / "curves.json").read_text()
    again = example.train_all(config, names, tmp_path)
    assert (tmp_path / "curves.json").read_text() == curves
    assert again == json.loads(curves)["runs"]


def test_variants_are_checked(example, tmp_path):
    with pytest.raises(ValueError, match=r"variants must be among .* got \['relu'\]"):
        example.run(example.Config(workdir=str(tmp_path), variants="softmax;relu"))
    with pytest.raises(ValueError, match="steps must be a multiple of 12, got 10"):
        example.run(example.Config(workdir=str(tmp_path), steps=10))


def test_spikes_are_counted(example):
    norms = np.ones((2, 60))
    norms[1, [5, 30, 45]] = 3  # the first is before the window is full
    np.testing.assert_array_equal(example.spikes(norms), [0, 2])
