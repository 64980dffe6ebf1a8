"""The comparison of samplers with a tiny model; what its parts compute."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib", reason="the examples extra")
    return pytest.importorskip("compare_samplers", reason="the examples extra")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quick_run_writes_table_figure_and_animation(example, tmp_path, capsys):
    from PIL import Image

    result = example.run(example.Config(workdir=str(tmp_path), quick=True))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last) == result
    assert json.loads((tmp_path / "result.json").read_text()) == result
    figures = result["figures"]
    assert result["ok"]
    assert figures["masks_left"] == 0
    assert figures["lazy_tokens_equal"] is figures["lazy_saves_forwards"] is True
    for row in figures["samplers"].values():
        assert 0.0 <= row["score"] <= 1.0
        assert np.isfinite(row["bits"])
        assert row["bits"] > 0
        assert 0.0 <= row["entropy"] <= np.log2(figures["positions"])
        assert 1 <= row["forwards"] <= row["most_forwards"]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 3 + len(figures["samplers"])
    assert (tmp_path / "samplers.png").stat().st_size > 10_000
    with Image.open(tmp_path / "unmasking.gif") as animation:
        shown = ("ancestral, 32 steps", "ReMDM cap, 32 steps")
        most = max(figures["samplers"][name]["most_forwards"] for name in shown)
        # Of the rows that are shown, none may take as long as the slowest of all.
        assert 2 <= animation.n_frames <= most + 1


def test_every_sampler_is_compared(example):
    entries = example.entries(64, np.full(8, 1 / 8, np.float32))
    kinds = {type(entry.rule).__name__ for entry in entries.values()}
    assert kinds >= {
        *("Ancestral", "FirstHitting", "FixedQuota", "Threshold", "Factor"),
        *("Frechet", "EntropyBounded", "KLASS", "Hierarchy", "Credit", "ReMDM"),
        *("WINO", "JointThreshold", "NoneType"),
    }
    scores = {
        type(entry.rule.score).__name__
        for entry in entries.values()
        if type(entry.rule).__name__ == "FixedQuota"
    }
    assert scores == {
        *("MaxProb", "Margin", "NegativeEntropy", "Random", "Position"),
        *("Drawn", "PCScore"),
    }
    caches = {type(entry.options.get("cache")).__name__ for entry in entries.values()}
    assert caches == {"NoneType", "Prefix", "Dual", "Delayed"}
    families = {entry.family for entry in entries.values()}
    assert families == set(example.samplers_report.COLOURS)
    assert set(example.SHOWN) <= set(entries)
    for entry in entries.values():
        if entry.rule is not None:
            entry.rule.check(1, 8)
            assert not entry.rule.remasks or "max_forwards" in entry.options


def test_entropy_and_frontier(example):
    assert example.entropy(np.zeros(64, int)) == 0.0
    assert example.entropy(np.arange(64)) == pytest.approx(6.0)
    points = {"a": (8, 0.5), "b": (16, 0.4), "c": (16, 0.9), "d": (64, 0.9)}
    assert example.samplers_report.frontier(points) == ["a", "c"]


def test_a_folder_without_a_run_is_named(example, tmp_path):
    with pytest.raises(ValueError, match="run_dir must be the workdir of a run"):
        example.run(example.Config(workdir=str(tmp_path), run_dir=str(tmp_path)))
