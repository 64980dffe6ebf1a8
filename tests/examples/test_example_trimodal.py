"""The main example with a tiny configuration: trains, resumes, scores, reports."""

import json

import numpy as np
import pytest

TINY = {
    "width": 64,
    "num_layers": 1,
    "physical_batch": 4,
    "base_batch": 4,
    "base_steps": 8,
    "ema": 0.5,
    "max_examples": 40,
    "audio_units": 16,
    "num_generated": 4,
    "draws": 2,
    "bound_rows": 8,
    "log_every": 2,
    "save_every": 2,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def example():
    return pytest.importorskip("train_trimodal", reason="the examples extra")


@pytest.mark.filterwarnings("ignore")
def test_train_resume_score_and_report(example, tmp_path, capsys):
    config = example.Config(workdir=str(tmp_path / "run"), steps=4, **TINY)
    result = example.train(config)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads(last) == written
    assert written["name"] == "train_trimodal"
    assert set(result["figures"]["accuracy"]) == {"t2i", "t2a", "i2t", "a2t"}
    for score in result["figures"]["accuracy"].values():
        assert 0.0 <= score["value"] <= 1.0
        assert score["chance"] < score["ceiling"] <= 1.0
    for groups in result["figures"]["bits_per_token"].values():
        for entry in groups.values():
            assert np.isfinite(entry["value"])
            # A group of a few tokens can be masked in no draw or in all alike.
            assert entry["monte_carlo_error"] > 0 or entry["tokens"] < 32
    report = (tmp_path / "run" / "report.html").read_text()
    assert "src='http" not in report  # self-contained
    assert report.count("<audio") >= 8
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    assert list((tmp_path / "run" / "samples").glob("*.wav"))
    # The same command again finds everything done and only scores once more.
    again = example.train(config)
    assert again["figures"]["accuracy"] == result["figures"]["accuracy"]


def test_bad_shares_are_named(example):
    with pytest.raises(ValueError, match="shares must read like"):
        example.parse_shares("text:0.5")
