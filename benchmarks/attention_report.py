"""Tables and the result of `sigmoid_attention.py`, from the rows it has written."""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import attention_plan as plan

from diffmm.version import __version__

NOT_MEASURED = "not yet measured"
_PASSES = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}

Row = dict[str, Any]


def rate(row: Row) -> float | None:
    """TFLOP/s of a measured row; None if it failed."""
    if "error" in row:
        return None
    return float(row["flops"] / row["figures"]["seconds"]["median"] / 1e12)


def bandwidth(row: Row) -> float | None:
    """TB/s of keys and values of a measured row of decoding."""
    if "error" in row:
        return None
    return float(row["bytes"] / row["figures"]["seconds"]["median"] / 1e12)


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def index(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """The first measurement of every case, pass and side."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in of_kind(rows, "measure"):
        found.setdefault((row["case"], row["direction"], row["side"]), row)
    return found


def find(rows: Sequence[Row], case: str, direction: str, side: str) -> Row | None:
    """The first measurement of a side."""
    return index(rows).get((case, direction, side))


def ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """The greatest that was measured of each."""
    found: dict[str, float] = {}
    for row in of_kind(rows, "ceilings"):
        for name, value in row.get("figures", {}).items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is aimed at beside what was measured."""
    copy = ceilings(rows).get("copy_bytes_per_second", math.nan) / 1e12
    measurements = index(rows)
    found = []
    for goal in plan.GOALS:
        case = plan.case_name(goal.spec)
        row = measurements.get((case, goal.direction, plan.OURS))
        share = goal.spec.q_length == 1
        measured = None
        if row is not None:
            measured = bandwidth(row) if share else rate(row)
            if measured is not None and share:
                measured = measured / copy
        levels = {"must": goal.must, "should": goal.should, "stretch": goal.stretch}
        met = [
            name
            for name, level in levels.items()
            if level is not None and measured is not None and measured >= level
        ]
        found.append(
            {
                "case": case,
                "direction": goal.direction,
                "unit": "of the copy bandwidth" if share else "TFLOP/s",
                **levels,
                "measured": measured,
                "met": met,
            }
        )
    return found


def correct(rows: Sequence[Row]) -> bool:
    """Whether all checks that ran passed, timed outputs included."""
    checked = [row for row in rows if row["kind"] in ("check", "accuracy")]
    timed = of_kind(rows, "measure")
    errors = [
        row["figures"]["error"]
        for row in timed
        if row["side"] == plan.OURS and "error" in row.get("figures", {})
    ]
    return (
        bool(checked)
        and all(row.get("figures", {}).get("ok", False) for row in checked)
        and all(math.isfinite(error) and error <= 1e-2 for error in errors)
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rule = "|".join(["---"] * len(head))
    rows = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", f"|{rule}|", *rows])


def _number(value: float | None, digits: int = 0) -> str:
    return "—" if value is None else f"{value:,.{digits}f}"


def _goal_table(rows: Sequence[Row]) -> str:
    lines = []
    for goal in goals(rows):
        digits = 2 if goal["must"] < 1 else 0
        levels = [_number(goal[name], digits) for name in ("must", "should", "stretch")]
        measured, verdict = NOT_MEASURED, "—"
        if goal["measured"] is not None:
            measured = _number(goal["measured"], digits)
            verdict = ", ".join(goal["met"]) or "none"
        direction = _PASSES[goal["direction"]]
        lines.append([goal["case"], direction, *levels, measured, verdict])
    head = ("case", "pass", "must", "should", "stretch", "measured", "met")
    return _table(head, lines)


def _speed_table(rows: Sequence[Row], decoding: bool) -> str:
    """One line per case and pass, one column per side that appears."""
    value = bandwidth if decoding else rate
    top = ceilings(rows).get(
        "copy_bytes_per_second" if decoding else "matmul_flops_per_second"
    )
    cases: dict[tuple[str, str], None] = {}
    sides: set[str] = set()
    for group in plan.groups():
        if (group.spec.q_length == 1) == decoding:
            cases[group.case, group.direction] = None
            sides.update(group.sides)
    sides.update(row["side"] for row in of_kind(rows, "measure"))
    order = [s for s in (*plan.JAX_SIDES, *plan.TORCH_SIDES) if s in sides]
    measurements = index(rows)
    lines = []
    for case, direction in cases:
        cells, ours = [], None
        peers = []
        for side in order:
            row = measurements.get((case, direction, side))
            if row is None:
                missing = not rows and side == plan.OURS
                cells.append(NOT_MEASURED if missing else "")
                continue
            found = value(row)
            text = _number(found, 2 if decoding else 0)
            cells.append("refused" if row.get("refused") else text)
            if side == plan.OURS:
                ours = found
            elif found is not None and not side.startswith("sigmoid"):
                peers.append(found)
        if rows and not any(cells):
            continue
        share = f"{ours * 1e12 / top:.0%}" if ours and top else "—"
        ratio = f"{ours / max(peers):.2f}" if ours and peers else "—"
        lines.append([case, _PASSES[direction], share, ratio, *cells])
    head = ("case", "pass", "of ceiling", "over the best peer", *order)
    return _table(head, lines)


def _accuracy_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in of_kind(rows, "accuracy"):
        figures = row.get("figures", {})
        if row["name"] == "activations" and "error" not in row:
            for name, bands in figures["forms"].items():
                text = f"{bands['max']:.1e}; {bands['below_-8']:.1e} below -8"
                mean = f"mean {bands['bias_at_-8.3']:+.1e} at p = 1/4096"
                ok = "yes" if bands["ok"] else "no"
                lines.append([f"sigmoid, {name}", f"{text}; {mean}", ok])
        elif "error" in row:
            lines.append([row["name"], row["error"], "no"])
        else:
            text = f"{figures['error']:.1e} by {figures['implementation']}"
            lines.append([row["name"], text, "yes" if figures["ok"] else "no"])
    empty = [["sigmoid on [-20, 10], row mass for n = 1k … 64k", NOT_MEASURED, "—"]]
    return _table(("what", "greatest relative error", "ok"), lines or empty)


def _check_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in of_kind(rows, "check"):
        if "error" in row:
            lines.append([row["name"], "", row["error"], "", "no"])
            continue
        figures = row["figures"]
        errors = ", ".join(f"{k} {e:.1e}" for k, e in figures["errors"].items())
        same = {True: "yes", False: "no"}.get(figures.get("bitwise_equal"), "")
        name = figures.get("implementation", "")
        ok = "yes" if figures["ok"] else "no"
        lines.append([row["name"], name, errors, same, ok])
    empty = [["all cases", "", NOT_MEASURED, "", "—"]]
    head = ("case", "implementation", "relative errors", "twice the same bits", "ok")
    return _table(head, lines or empty)


def _notes(rows: Sequence[Row]) -> str:
    lines = []
    for row in of_kind(rows, "measure"):
        if "error" in row:
            where = f"{row['case']} {_PASSES[row['direction']]}, {row['side']}"
            lines.append(f"- {where}: {row['error']}")
        elif row["side"] == plan.OURS and row["figures"].get("reasons"):
            reasons = "; ".join(row["figures"]["reasons"])
            lines.append(f"- {row['case']}: ran by xla: {reasons}")
    for row in of_kind(rows, "repeat"):
        lines.append(f"- measured again: {row['text']}")
    for row in of_kind(rows, "left out"):
        lines.append(f"- left out for want of time: {row['what']}")
    return "\n".join(lines) or "- none"


def markdown(rows: Sequence[Row], environment: Row | None) -> str:
    """The report; without rows, the form of it."""
    about = NOT_MEASURED.capitalize() + ": needs a Hopper GPU (compute capability 9.0)."
    if rows and environment is not None:
        known = [f"{key} {value}" for key, value in environment.items() if value]
        about = "Measured on " + ", ".join(known) + "."
    top = ceilings(rows)
    lines = [
        f"{name}: {value / 1e12:,.2f}e12" for name, value in sorted(top.items())
    ] or [f"8192³ bfloat16 product and copy: {NOT_MEASURED}"]
    return "\n".join(
        (
            "# Sigmoid attention on a Hopper GPU",
            "",
            f"{about} Written by `benchmarks/sigmoid_attention.py`.",
            "",
            "Forward 4·B·H·T·S·D operations (half if causal; exact under windows and",
            "segments), backward 2.5 times that, bfloat16, medians of 20 samples.",
            "",
            "## Goals",
            "",
            "TFLOP/s; for decoding, keys and values read, as a share of the bandwidth",
            "of a copy. Must: more than every public sigmoid kernel. Should: cuDNN's",
            "softmax. Stretch: FlashAttention-3's softmax.",
            "",
            _goal_table(rows),
            "",
            "## Ceilings",
            "",
            *(f"- {line}" for line in lines),
            "",
            "## Speed (TFLOP/s)",
            "",
            "Softmax peers run the gala cases without ALiBi.",
            "",
            _speed_table(rows, decoding=False),
            "",
            "## Decoding (TB/s of keys and values)",
            "",
            _speed_table(rows, decoding=True),
            "",
            "## Accuracy",
            "",
            _accuracy_table(rows),
            "",
            "## Correctness",
            "",
            _check_table(rows),
            "",
            "## Failures, repetitions, and what was left out",
            "",
            _notes(rows),
            "",
        )
    )


def environment(*found: Row) -> Row:
    """Versions, device, date; the form of the other benchmarks."""
    driver = ""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        driver = done.stdout.strip().splitlines()[0] if done.stdout else ""
    except (OSError, subprocess.SubprocessError):
        pass
    about: Row = {"diffmm": __version__, "python": platform.python_version()}
    for part in found:
        about.update(part)
    return {
        **about,
        "driver": driver,
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _finite(value: Any) -> Any:
    """Strict JSON has no infinities: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def result(rows: Sequence[Row], about: Row, measured: bool) -> dict[str, Any]:
    """Name, figures, expectations, verdict and environment."""
    reached = goals(rows)
    ok = correct(rows)
    if measured:
        ok = ok and all("must" in goal["met"] for goal in reached)
    levels = {
        f"{goal['case']} {goal['direction']}": f">= {goal['must']} {goal['unit']}"
        for goal in reached
    }
    return _finite(
        {
            "name": "sigmoid_attention",
            "figures": {
                "measured": measured,
                "status": "measured"
                if measured
                else f"{NOT_MEASURED}: needs a Hopper GPU",
                "correct": correct(rows),
                "ceilings": ceilings(rows),
                "goals": reached,
                "rows": list(rows),
            },
            "expected": {"correct": True, **levels},
            "ok": bool(ok),
            "environment": about,
        }
    )


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes ``result.json`` and the tables, each at once or not at all."""
    rows = found["figures"]["rows"] if found["figures"]["measured"] else []
    texts = {
        "result.json": json.dumps(found, indent=2, allow_nan=False) + "\n",
        "sigmoid_attention.md": markdown(rows, found["environment"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
