"""The sigmoid benchmarks at a tiny size, and what they do where something fails."""

import importlib.util
import json
import math
import pathlib
import sys
import time

import attention_plan as plan
import attention_report as report
import pytest
from attention_worker import Worker, spec_of

from diffmm_kernels.sigmoid_attention.specs import SPECS

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"


def load(name):
    """By path: an example has the same name as a benchmark."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_benchmark():
    return load("sigmoid_attention")


class Canned:
    """Stands for a worker: plausible figures, and failures where told."""

    def __init__(self, seconds=1e-3, failing=()):
        self.seconds, self.failing, self.asked = seconds, failing, []
        self.closed = 0

    def ask(self, task, timeout, **arguments):
        assert timeout > 0
        json.dumps(arguments)
        self.asked.append((task, arguments))
        if arguments.get("side") in self.failing:
            return {"error": "RuntimeError: out of order"}
        if task == "activations":
            bands = {"max": 1e-4, "below_-8": 1e-5, "bias_at_-8.3": 1e-6, "ok": True}
            return {"figures": {"degree 4": bands}}
        if task == "ceilings":
            rates = {"matmul_flops_per_second": 8e14, "copy_bytes_per_second": 3e12}
            return {"figures": rates}
        if task == "measure":
            keys = ("median", "min", "max")
            return {"figures": {"seconds": dict.fromkeys(keys, self.seconds)}}
        if task in ("check", "check_decode", "invariants"):
            return {"figures": {"errors": {"o": 1e-3}, "ok": True}}
        if task == "environment":
            return {"figures": {"torch": "2"}}
        return {"figures": {"error": 1e-4, "ok": True, "implementation": "canned"}}

    def post(self, task, **arguments):
        self.asked.append((task, arguments))

    def wait(self, timeout):
        return {"figures": {}}

    def close(self):
        self.closed += 1


def test_the_quick_run_is_correct_and_measures_nothing(tmp_path, gpu_benchmark):
    config = gpu_benchmark.Config(workdir=str(tmp_path), quick=True)
    result = gpu_benchmark.run(config)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result) == {"name", "figures", "expected", "ok", "environment"}
    assert result["ok"], result["figures"]["rows"]
    assert not result["figures"]["measured"]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(result["figures"]["rows"]) >= 5
    assert report.NOT_MEASURED in (tmp_path / "sigmoid_attention.md").read_text()


def test_a_whole_run_orders_its_work_and_fills_the_tables(tmp_path, gpu_benchmark):
    config = gpu_benchmark.Config(workdir=str(tmp_path))
    recorder = gpu_benchmark.Recorder(config)
    recorder.measured = True
    ours, peers = Canned(), Canned(failing=("flex sigmoid",))
    gpu_benchmark.run_gpu(config, recorder, ours, peers)
    tasks = [task for task, _ in ours.asked]
    assert tasks.index("activations") < tasks.index("check") < tasks.index("measure")
    result = recorder.write()
    assert result["figures"]["correct"]
    goals = result["figures"]["goals"]
    # A millisecond is enough for every goal here: 2.2e12 and more operations.
    assert all("must" in goal["met"] for goal in goals if goal["unit"] == "TFLOP/s")
    text = (tmp_path / "sigmoid_attention.md").read_text()
    assert "RuntimeError: out of order" in text
    assert "measured again" in text
    assert "left out for want" not in text
    first = plan.GOALS[0]
    row = report.find(
        recorder.rows, plan.case_name(first.spec), first.direction, plan.OURS
    )
    assert report.rate(row) == pytest.approx(4 * 16 * 16_384**2 * 128 / 1e-3 / 1e12)


def test_a_run_that_is_out_of_time_says_what_it_left_out(tmp_path, gpu_benchmark):
    config = gpu_benchmark.Config(workdir=str(tmp_path), minutes=0.0)
    recorder = gpu_benchmark.Recorder(config)
    recorder.measured = True
    gpu_benchmark.run_gpu(config, recorder, Canned(), Canned())
    left = report.of_kind(recorder.rows, "left out")
    assert len(left) >= len(list(plan.groups()))
    assert not recorder.write()["ok"]


def test_tuning_prints_rows_for_the_tables(tmp_path, gpu_benchmark):
    config = gpu_benchmark.Config(workdir=str(tmp_path), tune=True, only="D128")
    recorder = gpu_benchmark.Recorder(config)
    gpu_benchmark.tune(config, recorder, Canned())
    tables = json.loads((tmp_path / "tables.json").read_text())
    for name in ("mosaic_gpu_forward", "mosaic_gpu_backward"):
        assert [row["when"]["causal"] for row in tables[name]] == [False, True]
        assert all(row["tiles"]["block_q"] % 64 == 0 for row in tables[name])


def test_the_committed_table_has_a_row_for_every_case():
    committed = BENCHMARKS / "results" / "sigmoid_attention_h100.md"
    text = committed.read_text()
    for goal in plan.GOALS:
        assert f"| {plan.case_name(goal.spec)} |" in text
    if report.NOT_MEASURED.capitalize() in text:
        assert text == report.markdown([], None)


def test_cases_survive_the_way_to_a_worker(gpu_benchmark):
    for spec in SPECS.values():
        assert spec_of(json.loads(json.dumps(gpu_benchmark.fields(spec)))) == spec


def test_no_side_is_measured_twice():
    groups = list(plan.groups())
    named = [(g.case, g.direction, side) for g in groups for side in g.sides]
    assert len(set(named)) == len(named)
    assert {side for *_, side in named} <= {*plan.JAX_SIDES, *plan.TORCH_SIDES}
    cases = {(goal.spec, goal.direction) for goal in plan.GOALS}
    assert cases == {(g.spec, g.direction) for g in groups[: len(plan.GOALS)]}


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path[:0] = {[str(BENCHMARKS), str(BENCHMARKS.parent)]!r}\n"
        "from attention_worker import serve\n"
        "def refuse(): raise NotImplementedError('not this')\n"
        "serve({'hang': lambda: time.sleep(60), 'die': lambda: os._exit(3),\n"
        "       'refuse': refuse, 'add': lambda x: print('noise') or {'sum': x + 1}})\n"
    )
    worker = Worker(script, tmp_path / "log", {})
    try:
        assert worker.ask("add", 60, x=1) == {"figures": {"sum": 2}}
        reply = worker.ask("refuse", 60)
        assert reply == {"error": "NotImplementedError: not this", "refused": True}
        assert "code 3" in worker.ask("die", 60)["error"]
        started = time.monotonic()
        assert "no answer" in worker.ask("hang", 0.2)["error"]
        assert time.monotonic() - started < 10
        assert worker.ask("add", 60, x=2) == {"figures": {"sum": 3}}
    finally:
        worker.close()
    assert "noise" in (tmp_path / "log").read_text()


def test_the_cpu_benchmark_runs_all_sides(tmp_path):
    cpu = load("sigmoid_cpu")
    torch = importlib.util.find_spec("torch") is not None
    result = cpu.run(
        cpu.Config(workdir=str(tmp_path), quick=True, threads=0, torch=torch)
    )
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["ok"]
    cases = result["figures"]["cases"]
    kinds = {(row["causal"], row["direction"]) for row in cases}
    assert kinds == {(False, "forward"), (True, "both")}
    sides = {"dense", "jax softmax"} | ({"torch softmax"} if torch else set())
    assert all(set(row["speed_over"]) == sides for row in cases)


def test_expectations_of_the_cpu_benchmark():
    cpu = load("sigmoid_cpu")
    lengths = [1024, 2048, 4096]
    assert math.isclose(cpu.exponent(lengths, [3 * n**2 for n in lengths]), 2.0)

    def row(length, over_dense, over_torch):
        speed = {
            "dense": {"median": over_dense},
            "torch softmax": {"median": over_torch},
        }
        return {
            "length": length,
            "causal": True,
            "direction": "both",
            "speed_over": speed,
            "temporary_bytes": {"xla": 10 * length, "dense": length**2},
            "error_over_dense": 1e-7,
        }

    good = [row(512, 0.5, 0.5), row(1024, 1.1, 0.8), row(2048, 2.0, 1.2)]
    assert cpu.verdict(cpu.summary(good))
    assert cpu.summary(good)["memory_exponent"]["both causal"] == pytest.approx(1.0)
    assert not cpu.verdict(cpu.summary([*good, row(4096, 0.9, 1.2)]))
    assert not cpu.verdict(cpu.summary([*good, row(4096, 2.0, 0.9)]))
