"""The transfer and the batch experiments with tiny configurations."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.filterwarnings("ignore")
def test_sweep_resumes_and_reports(tmp_path, capsys):
    example = pytest.importorskip("transfer_hyperparameters")
    config = example.Config(
        workdir=str(tmp_path),
        width=16,
        num_layers=1,
        factors="1,2",
        log2_rates="-7,-4",
        seeds=1,
        steps=6,
        rows=4,
        length=16,
        validation_rows=64,
    )
    result = example.run(config)
    assert (
        last_json(capsys)
        == result
        == json.loads((tmp_path / "result.json").read_text())
    )
    figures = result["figures"]
    # The base is one model under either parameterisation.
    losses = figures["losses"]
    np.testing.assert_allclose(
        losses["standard"]["16x1"], losses["completed_p"]["16x1"], rtol=1e-6
    )
    assert losses["standard"]["32x1"] != losses["completed_p"]["32x1"]
    assert np.all(np.isfinite(losses["completed_p"]["16x2"]))
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    assert "m_in^-1" in (tmp_path / "multipliers.txt").read_text()
    trials = (tmp_path / "trials.json").read_text()
    assert example.run(config)["figures"]["losses"] == losses
    assert (tmp_path / "trials.json").read_text() == trials


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_batches_share_one_plan(tmp_path, capsys):
    example = pytest.importorskip("batch_invariance")
    config = example.Config(
        workdir=str(tmp_path),
        kappas="0.5,1",
        seeds=1,
        base_batch=4,
        steps=4,
        width=32,
        points=2,
        validation_rows=64,
    )
    result = example.run(config)
    assert last_json(capsys) == result
    figures = result["figures"]
    assert (
        "κ = 0.5 (2 rows a step for 4 logical ones)"
        in (figures["plans"]["with_rule"]["0.5"])
    )
    assert "κ = 1 (2 rows a step" in figures["plans"]["without_rule"]["0.5"]
    assert figures["with_rule"]["deviation"]["1"] == 0.0
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {
        "rule 0.5 0": 8,
        "rule 1 0": 4,
        "none 0.5 0": 8,
    }
    assert (tmp_path / "batch_invariance.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="kappas"):
        example.run(example.Config(workdir=str(tmp_path), kappas="2,4"))
