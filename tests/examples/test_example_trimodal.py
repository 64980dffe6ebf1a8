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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_attention_is_one_flag(example, tmp_path, monkeypatch):
    """Training, bounds and samplers all go through sigmoid attention then."""
    from diffmm.models import attention

    calls = {}

    def traced(query, *arguments, **options):
        rows, length = query.shape[:2]
        calls[rows, length] = options["bias"]
        return real(query, *arguments, **options)

    real = attention.sigmoid_attention
    monkeypatch.setattr(attention, "sigmoid_attention", traced)
    # One sampler is enough here, and no report.
    monkeypatch.setattr(example.trimodal_evaluation, "TASKS", ("a2t",))
    monkeypatch.setattr(example.trimodal_evaluation, "fill_gaps", lambda *_: {})
    monkeypatch.setattr(example.trimodal_report, "write", lambda *_: None)
    config = example.Config(
        workdir=str(tmp_path / "run"), steps=2, attention="sigmoid", **TINY
    )
    figures = example.train(config)["figures"]
    # Whatever is traced, also the shorter rows of a sampler, b is that of training.
    length = max(length for _, length in calls)
    assert min(length for _, length in calls) < length
    np.testing.assert_allclose(list(calls.values()), -np.log(length), rtol=1e-12)
    assert figures["attention"] == "sigmoid"
    assert figures["final"]["records"] >= 1
    assert np.isfinite(figures["final"]["loss"])
    bits = figures["validation_bits"]
    assert set(bits) == {"all", "text", "image", "audio", "length"}
    tokens = [
        (entry["value"] * entry["tokens"], entry["tokens"])
        for groups in figures["bits_per_token"].values()
        for entry in groups.values()
    ]
    np.testing.assert_allclose(bits["all"], np.divide(*np.sum(tokens, axis=0)))


def test_switching_attention_changes_one_field(example):
    class Data:
        length = 96

        class vocabulary:  # noqa: N801
            padded_size = 512

    shapes = [
        vars(example.model_config(example.Config(attention=kind), Data))
        for kind in ("softmax", "sigmoid")
    ]
    differing = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert differing == {"attention"}
    with pytest.raises(ValueError, match="attention must be one of"):
        example.model_config(example.Config(attention="linear"), Data)
