"""Records on disk, progress lines, shutdown by signal, and result files."""

import io
import json
import math
import os
import re
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.training import (
    GracefulShutdown,
    MetricsWriter,
    NonFiniteLossError,
    Progress,
    check_finite,
    environment,
    to_jsonable,
    write_result,
)
from diffmm.training.metrics import format_duration, format_rate, read_metrics


def test_records_are_flushed_and_nested_names_joined(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        metrics = {"loss": jnp.float32(0.5), "text": {"sum": np.float64("nan"), "n": 3}}
        writer.write(1, metrics)
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line) == {
            "step": 1,
            "loss": 0.5,
            "text/sum": "nan",
            "text/n": 3,
        }
    with pytest.raises(ValueError, match="closed"):
        writer.write(2, {})


def test_resuming_drops_what_will_be_written_again(tmp_path):
    with MetricsWriter(tmp_path, start_step=0, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, start_step=3, tensorboard=False) as writer:
        writer.write(4, {"loss": 40})
    losses = [(record["step"], record["loss"]) for record in read_metrics(path)]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {"loss": 50})
    assert len(read_metrics(path)) == 5
    with MetricsWriter(tmp_path, start_step=0, tensorboard=False):
        assert path.read_text() == ""


def test_tensorboard_events_where_installed(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, start_step=0) as writer:
        writer.write(1, {"loss": jnp.float32(1.0), "per_bin": np.ones(3)})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_are_rare_and_the_last_step_is_shown():
    stream = io.StringIO()
    with Progress(100, every_seconds=1e9, every_steps=25, stream=stream) as progress:
        for step in range(1, 101):
            progress.update(step, {"text": jnp.float32(2.3456)}, tokens=512)
    lines = stream.getvalue().splitlines()
    steps = [int(re.match(r" *(\d+)/100  text 2\.346  ", line)[1]) for line in lines]
    assert steps == [1, 25, 50, 75, 100]
    assert all("tokens/s" in line for line in lines)
    assert lines[-1].endswith("0:00 left")


def test_terminal_rewrites_one_line():
    stream = Terminal()
    progress = Progress(4, stream=stream, width=4)
    progress.update(2, {"loss": {"text": 1.0}})
    progress.update(3)  # too soon
    progress.close()
    assert stream.getvalue().startswith("\r[##..]  2/4  loss/text 1  ")
    assert stream.getvalue().count("\n") == 1
    progress.update(4)
    assert stream.getvalue().endswith("[####]  4/4  0:00 left\n")


def test_time_left_counts_from_the_resumed_step(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("diffmm.training.metrics.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(200, start_step=100, stream=stream)
    progress.update(120, tokens=3000)
    # 20 steps in 10 s, 80 steps to go.
    assert stream.getvalue() == "120/200  300 tokens/s  0:40 left\n"


def test_formats():
    assert [format_duration(s) for s in (0, 59.6, 3600, math.inf)] == [
        "0:00",
        "1:00",
        "1:00:00",
        "--:--",
    ]
    assert [format_rate(r) for r in (5, 1500, 2.5e6)] == [
        "5 tokens/s",
        "1.5k tokens/s",
        "2.5M tokens/s",
    ]
    with pytest.raises(ValueError, match="total_steps"):
        Progress(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_second_signal_raises(number, caplog):
    before = signal.getsignal(number)
    with GracefulShutdown() as shutdown:
        assert not shutdown.requested
        os.kill(os.getpid(), number)
        assert shutdown.requested
        assert shutdown.requested_anywhere()
        expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(expected):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert signal.Signals(number).name in caplog.text


def test_shutdown_outside_the_main_thread_installs_nothing():
    def work():
        with GracefulShutdown() as shutdown:
            shutdown.request()
            seen.append(shutdown.requested)

    seen = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_finite_check_names_step_and_checkpoint():
    check_finite({"loss": 1.0, "grad_norm": 2.0, "nonfinite": False}, 3, 2)
    for metrics in (
        {"loss": math.nan},
        {"loss": 1.0, "grad_norm": math.inf},
        {"loss": 1.0, "nonfinite": np.True_},
    ):
        with pytest.raises(NonFiniteLossError, match=r"step 8: .*of step 5"):
            check_finite(metrics, 8, 5)
    with pytest.raises(FloatingPointError, match="no checkpoint"):
        check_finite({"loss": math.nan}, 8)


def test_result_is_one_strict_json_line_and_a_file(tmp_path, capsys):
    figures = {
        "bound": np.float32(0.25),
        "nan": float("nan"),
        "curve": jnp.arange(3.0),
        "count": np.int64(7),
        "ok": np.True_,
    }
    result = write_result(
        tmp_path / "out", "demo", figures, {"bound": (0.2, 0.3)}, True
    )
    (line,) = capsys.readouterr().out.splitlines()
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == stored == json.loads(line)
    assert set(result) == {"name", "figures", "expected", "ok", "environment"}
    assert result["figures"] == {
        "bound": 0.25,
        "nan": "nan",
        "curve": [0.0, 1.0, 2.0],
        "count": 7,
        "ok": True,
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]
    assert {"python", "jax", "flax", "optax", "diffmm", "platform", "device_kind",
            "cpu_count", "date"} <= set(environment())  # fmt: skip


def test_values_that_json_cannot_hold_are_named():
    assert to_jsonable({"a": (1, -math.inf), "t": jnp.bfloat16}) == {
        "a": [1, "-inf"],
        "t": "bfloat16",
    }
    with pytest.raises(ValueError, match="object"):
        to_jsonable({"a": object()})
