"""Sigmoid attention on one Hopper GPU, beside every attention kernel at hand.

    python benchmarks/sigmoid_attention.py                # one H100, 8 minutes
    python benchmarks/sigmoid_attention.py --tune         # tiles, for the tables
    python benchmarks/sigmoid_attention.py --quick        # any machine: correctness

Accuracy and correctness come first. Then, case by case and in turn on the same device:
our kernels, `jax.nn.dot_product_attention` by cuDNN, PyTorch's
`scaled_dot_product_attention` by FlashAttention-2 and cuDNN, FlexAttention as softmax
and as sigmoid, dense and chunked XLA; and as ceilings a matrix product and a copy.
Expected: no error above 5e-3 in bfloat16, and the "must" column of the goals.

JAX and PyTorch run in a process each; one that hangs or crashes is replaced, and the
failure is a row like any other. Rows are written as they come, to ``rows.jsonl``, and
so are ``result.json`` and the tables, ``sigmoid_attention.md``; commit these under
``benchmarks/results``. The work is ordered by importance and stops in time. Needs jax,
and for its peers torch; without a CUDA device, what runs here is checked and nothing is
timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import signal
import sys
import time
from typing import Any

import attention_plan as plan
import attention_report as report
from attention_worker import Worker

from diffmm_kernels.sigmoid_attention.specs import SPECS, Spec

HERE = pathlib.Path(__file__).parent
TEMPLATE = HERE / "results" / "sigmoid_attention_h100.md"
# What is kept back for the last repetitions.
_RESERVE_SECONDS = 15
_TIMEOUT_SECONDS = 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = "runs/sigmoid_attention"
    minutes: float = 8.0
    quick: bool = False
    tune: bool = False
    only: str = ""


class Recorder:
    """Rows, on disk as soon as they are known."""

    def __init__(self, config: Config) -> None:
        """Begins an empty file of rows."""
        self.folder = pathlib.Path(config.workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "rows.jsonl").open("w", encoding="utf-8")
        self.rows: list[report.Row] = []
        self.deadline = time.monotonic() + 60 * config.minutes
        self.measured = False
        self.about: report.Row = report.environment()

    def left(self) -> float:
        """Seconds until everything must be finished."""
        return self.deadline - time.monotonic()

    def add(self, kind: str, reply: dict[str, Any], **facts: Any) -> report.Row:
        """Appends a row: a reply and what it is about."""
        row = {"kind": kind, **facts, **reply}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        return row

    def write(self) -> dict[str, Any]:
        """Result and tables of the rows so far."""
        found = report.result(self.rows, self.about, self.measured)
        report.write(self.folder, found)
        return found


def timeout(recorder: Recorder) -> float:
    """Seconds to wait for a reply; fewer where some have not come before."""
    hung = sum("no answer" in row.get("error", "") for row in recorder.rows)
    patience = max(25.0, _TIMEOUT_SECONDS / (1 + hung))
    return min(patience, max(5.0, recorder.left() + 10))


def accuracy(recorder: Recorder, worker: Worker, quick: bool) -> None:
    """Of the forms of the sigmoid, and of sums of weights."""
    points = 2**16 if quick else 2**20
    reply = worker.ask("activations", timeout(recorder), points=points)
    if "figures" in reply:
        forms = reply["figures"]
        ok = all(form["ok"] for form in forms.values())
        reply = {"figures": {"forms": forms, "ok": ok}}
    show(recorder.add("accuracy", reply, name="activations"))
    for n in (1024,) if quick else (1024, 4096, 16_384, 65_536):
        for precision in ("default",) if quick else ("default", "fast"):
            reply = worker.ask("row_mass", timeout(recorder), n=n, precision=precision)
            name = f"row mass, n = {n}, {precision}"
            show(recorder.add("accuracy", reply, name=name))


def check(recorder: Recorder, worker: Worker, spec: Spec, **options: Any) -> None:
    reply = worker.ask("check", timeout(recorder), spec=fields(spec), **options)
    extra = "".join(f", {key}={value}" for key, value in options.items())
    name = f"{plan.case_name(spec)} {spec.dtype}{extra}"
    show(recorder.add("check", reply, name=name))


def invariants(recorder: Recorder, worker: Worker, spec: Spec) -> None:
    reply = worker.ask("invariants", timeout(recorder), spec=fields(spec))
    show(recorder.add("check", reply, name=f"invariants, {plan.case_name(spec)}"))


def fields(spec: Spec) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def show(row: report.Row) -> None:
    """One line about a row, for whoever waits."""
    facts = [
        str(row[key]) for key in ("case", "direction", "side", "name") if key in row
    ]
    if "error" in row:
        found = row["error"]
    elif row["kind"] == "measure":
        found = f"{report.rate(row):.1f} TFLOP/s, {report.bandwidth(row):.2f} TB/s"
    else:
        found = json.dumps(row["figures"])
    print(f"{', '.join(facts)}: {found}"[:240], flush=True)


def measure(
    recorder: Recorder, worker: Worker, group: plan.Group, side: str
) -> report.Row:
    request = {**_request(group, side), "verify": group.verify}
    reply = worker.ask("measure", timeout(recorder), **request)
    return recorder.add("measure", reply, **_facts(group, side))


def _request(group: plan.Group, side: str) -> dict[str, Any]:
    return {"spec": fields(group.spec), "side": side, "direction": group.direction}


def _facts(group: plan.Group, side: str) -> dict[str, Any]:
    return {
        "case": group.case,
        "direction": group.direction,
        "side": side,
        "flops": group.spec.flops(group.direction),
        "bytes": group.spec.cache_bytes(),
    }


def compare(
    recorder: Recorder, ours: Worker, peers: Worker | None, groups: list[plan.Group]
) -> None:
    """Every side of every group in turn, until the time is over."""
    for index, group in enumerate(groups):
        if recorder.left() < _RESERVE_SECONDS:
            for rest in groups[index:]:
                what = f"{rest.case} {rest.direction}: {', '.join(rest.sides)}"
                recorder.add("left out", {}, what=what)
            return
        for side in group.sides:
            if side in plan.JAX_SIDES:
                show(measure(recorder, ours, group, side))
        theirs = [side for side in group.sides if side in plan.TORCH_SIDES]
        if group.alone:
            ours.close()
        # While PyTorch has the device, JAX compiles what comes next.
        following = _next_of_jax(groups[index + 1 : index + 2])
        if theirs and peers and following and not group.alone:
            ours.post("prepare", **following)
        for side in theirs:
            if peers is None:
                reply = {"error": "torch is not installed", "refused": True}
                show(recorder.add("measure", reply, **_facts(group, side)))
            elif recorder.left() > _RESERVE_SECONDS:
                show(measure(recorder, peers, group, side))
        if theirs and peers and following and not group.alone:
            ours.wait(timeout(recorder))
        if group.alone and peers:
            peers.close()
        recorder.write()


def _next_of_jax(groups: list[plan.Group]) -> dict[str, Any] | None:
    for group in groups:
        for side in group.sides:
            if side in plan.JAX_SIDES:
                return _request(group, side)
    return None


def ceilings(recorder: Recorder, *workers: Worker | None) -> None:
    for worker in workers:
        if worker is not None:
            reply = worker.ask("ceilings", timeout(recorder))
            show(recorder.add("ceilings", reply, name="ceilings"))


def repeat(recorder: Recorder, worker: Worker) -> None:
    """The first measurement once more: differences below this one are noise."""
    goal = plan.GOALS[0]
    group = plan.Group(goal.spec, goal.direction, (plan.OURS,))
    first = report.find(recorder.rows, group.case, group.direction, plan.OURS)
    reply = worker.ask("measure", timeout(recorder), **_request(group, plan.OURS))
    if first is None or "error" in first or "error" in reply:
        return
    now = {**first, **reply}
    text = (
        f"{group.case}: {report.rate(first):.1f}, then {report.rate(now):.1f} TFLOP/s"
    )
    recorder.add("repeat", reply, text=text)


def run_gpu(config: Config, recorder: Recorder, ours: Worker, peers: Worker) -> None:
    wanted = re.compile(config.only)
    reply = peers.ask("environment", 60)
    theirs = peers if "figures" in reply else None
    recorder.about.update(reply.get("figures", {"torch": reply.get("error")}))
    ceilings(recorder, ours, theirs)
    checks = plan.checks()
    first, second = checks[:5], checks[5:]
    accuracy(recorder, ours, quick=False)
    for spec, options in first:
        check(recorder, ours, spec, **options)
    invariants(recorder, ours, SPECS["diffusion"].reduced(length=512))
    recorder.add("check", ours.ask("check_decode", timeout(recorder)), name="decode")
    tokamax = recorder.about.get("tokamax", "") not in ("", "not installed")
    groups = [
        group
        for group in plan.groups(tokamax)
        if wanted.search(f"{group.case} {group.direction}")
    ]
    goals = len(plan.GOALS)
    compare(recorder, ours, theirs, groups[:goals])
    repeat(recorder, ours)
    for spec, options in second:
        if recorder.left() > 0.4 * 60 * config.minutes:
            check(recorder, ours, spec, **options)
        else:
            recorder.add("left out", {}, what=f"check of {plan.case_name(spec)}")
    compare(recorder, ours, theirs, groups[goals:])
    repeat(recorder, ours)


def run_quick(recorder: Recorder, worker: Worker) -> None:
    """Small cases by what runs here."""
    small = {name: spec.reduced(length=64) for name, spec in SPECS.items()}
    accuracy(recorder, worker, quick=True)
    check(recorder, worker, small["tiny"], implementation="xla")
    check(recorder, worker, small["packed"].replace(dtype="float32", head_dim=32))
    invariants(recorder, worker, small["diffusion"].replace(head_dim=16))
    reply = worker.ask("check_decode", timeout(recorder))
    show(recorder.add("check", reply, name="decode"))
    print(f"{report.NOT_MEASURED}: needs a Hopper GPU", flush=True)


def tune(config: Config, recorder: Recorder, worker: Worker) -> None:
    """Prints the fastest tiles of each kind of case as rows for the tables."""
    kinds = [
        (direction, head_dim, causal)
        for direction in ("forward", "backward")
        for head_dim in (128, 64, 256)
        for causal in (False, True)
        if re.search(config.only, f"{direction} D{head_dim} causal={causal}")
    ]
    found: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": []}
    for index, (direction, head_dim, causal) in enumerate(kinds):
        name = "causal" if causal else "full"
        spec = plan.square(name, 8192, head_dim, causal=causal)
        group = plan.Group(spec, direction, (plan.OURS,))
        share = recorder.left() / (len(kinds) - index)
        until = time.monotonic() + share
        tried = []
        for tiles in plan.candidates(direction, head_dim, causal):
            if time.monotonic() > until:
                recorder.add("left out", {}, what=f"{group.case} {direction} {tiles}")
                continue
            request = {**_request(group, plan.OURS), "tiles": tiles, "samples": 5}
            reply = worker.ask("measure", timeout(recorder), **request)
            facts = {**_facts(group, plan.OURS), "tiles": tiles}
            row = recorder.add("tune", reply, **facts)
            error = row.get("figures", {}).get("error", 0.0)
            if "error" not in row and error <= 1e-2:
                tried.append((report.rate(row), tiles))
            fate = row.get("error") or f"{report.rate(row):.1f} TFLOP/s"
            print(f"{group.case} {direction} {tiles}: {fate}"[:240], flush=True)
        tried.sort(key=lambda x: -x[0])
        if tried:
            speed, tiles = tried[0]
            when = {"head_dim": head_dim, "causal": causal}
            best = {"when": when, "tiles": tiles, "tflops": round(speed, 1)}
            found[direction].append(best)
        text = json.dumps({f"mosaic_gpu_{key}": rows for key, rows in found.items()})
        (recorder.folder / "tables.json").write_text(text + "\n", encoding="utf-8")
    print(text if kinds else "{}", flush=True)


def run(config: Config) -> dict[str, Any]:
    """Measures what there is a device for, and writes the result."""
    recorder = Recorder(config)
    log = recorder.folder
    # JAX takes memory as it needs it, and leaves some to PyTorch.
    memory = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.75",
    }
    ours = Worker(HERE / "attention_jax.py", log / "jax.log", memory)
    # It needs jax for the shapes alone.
    peers = Worker(
        HERE / "attention_peers.py", log / "torch.log", {"JAX_PLATFORMS": "cpu"}
    )
    try:
        reply = ours.ask("environment", 120)
        if "error" in reply:
            raise RuntimeError(f"JAX does not start: {reply['error']}; see {log}")
        recorder.about.update(reply["figures"])
        recorder.measured = reply["figures"]["platform"] == "cuda" and not config.quick
        if config.tune:
            tune(config, recorder, ours)
        elif recorder.measured:
            run_gpu(config, recorder, ours, peers)
        else:
            run_quick(recorder, ours)
    finally:
        ours.close()
        peers.close()
        found = recorder.write()
    print(json.dumps(found, allow_nan=False), flush=True)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Config):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument(
        "--template",
        action="store_true",
        help=f"write {TEMPLATE.name} with every row unmeasured, and nothing else",
    )
    options = vars(parser.parse_args(arguments))
    if options.pop("template"):
        TEMPLATE.write_text(report.markdown([], None), encoding="utf-8")
        return 0
    # A polite end still ends the workers and writes the result.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = run(Config(**options))
    return 0 if found["figures"]["correct"] or options["tune"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
