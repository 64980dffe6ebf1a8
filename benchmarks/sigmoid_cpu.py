"""Sigmoid attention on a CPU, beside the dense form and PyTorch's softmax attention.

    python benchmarks/sigmoid_cpu.py                      # 2 CPU cores, ~6 minutes
    python benchmarks/sigmoid_cpu.py --quick              # seconds, checks alone

One process, interleaved, float32, one row of four heads of size 64: the chunked form,
``implementation="xla"``; the dense form under jit; `jax.nn.dot_product_attention`; and
PyTorch's `scaled_dot_product_attention`, the last two softmax. Forward and forward with
backward, full and causal. Temporary memory is what the compiler reports. Expected:
faster than dense from 1,024 keys, at least as fast as PyTorch's softmax from 2,048,
memory at most linear in the length and, with gradients, a tenth of dense at 2,048.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_jax import dense_sigmoid

from diffmm.training import option, run_from_flags, write_result
from diffmm_kernels.sigmoid_attention import sigmoid_attention
from diffmm_kernels.sigmoid_attention.specs import Spec

OURS = "xla"
JAX_SIDES = (OURS, "dense", "jax softmax")
TORCH = "torch softmax"
_MOST_BYTES = 4e9
_TOLERANCE = 5e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = option("runs/sigmoid_cpu", "where result.json goes")
    lengths: str = option("512,1024,2048,4096,8192", "S, ascending")
    heads: int = option(4, "H")
    head_dim: int = option(64, "D")
    threads: int = option(2, "CPU cores used; 0 = all")
    minutes: float = option(5.5, "fewer rounds are run than would take longer")
    torch: bool = option(True, "measure PyTorch too")
    quick: bool = option(False, "one tiny length: that all sides run and agree")


Call = Callable[[], Any]


def functions(spec: Spec) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The sides in JAX."""
    return {
        OURS: lambda q, k, v: sigmoid_attention(
            q, k, v, bias=spec.bias, causal=spec.causal, implementation="xla"
        ),
        "dense": lambda q, k, v: dense_sigmoid(q, k, v, spec),
        "jax softmax": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=spec.causal, implementation="xla"
        ),
    }


def jax_calls(
    spec: Spec, arrays: list[Any], direction: str
) -> tuple[dict[str, Call], dict[str, int]]:
    """Compiled sides that fit in memory, and temporary bytes of all of them."""
    q, k, v, do = (jnp.asarray(x) for x in arrays)
    calls: dict[str, Call] = {}
    memory: dict[str, int] = {}
    for name, f in functions(spec).items():

        def both(q: Any, k: Any, v: Any, do: Any, f: Any = f) -> Any:
            o, pull = jax.vjp(f, q, k, v)
            return o, *pull(do)

        if direction == "forward":
            compiled = jax.jit(lambda q, k, v, do, f=f: (f(q, k, v),))
        else:
            compiled = jax.jit(both)
        compiled = compiled.lower(q, k, v, do).compile()
        memory[name] = int(compiled.memory_analysis().temp_size_in_bytes)
        if memory[name] <= _MOST_BYTES:
            calls[name] = lambda compiled=compiled: jax.block_until_ready(
                compiled(q, k, v, do)
            )
    return calls, memory


def torch_call(spec: Spec, arrays: list[Any], direction: str) -> Call:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    backward = direction == "both"
    q, k, v, do = (torch.tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in arrays)
    for x in (q, k, v):
        x.requires_grad_(backward)

    def call() -> Any:
        o = scaled_dot_product_attention(q, k, v, is_causal=spec.causal)
        return torch.autograd.grad(o, (q, k, v), do) if backward else o

    return call


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def race(calls: dict[str, Call], until: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in rounds; whoever began the last round ends the next."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    while len(seconds[OURS]) < rounds and (
        len(seconds[OURS]) < 3 or time.monotonic() < until
    ):
        order = list(calls)
        if len(seconds[OURS]) % 2:
            order.reverse()
        for name in order:
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def difference(found: Any, wanted: Any) -> float:
    """Greatest relative Frobenius error of the arrays of two results."""
    norm = np.linalg.norm
    pairs = zip(found, wanted, strict=True)
    return max(
        float(norm(np.asarray(a) - b) / norm(b))
        for a, b in ((a, np.asarray(b)) for a, b in pairs)
    )


def exponent(lengths: list[int], values: list[int]) -> float:
    """Slope of log(values) over log(lengths)."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def measure(config: Config, spec: Spec, direction: str, until: float) -> dict[str, Any]:
    arrays = list(spec.arrays(spec.kv_length))
    calls, memory = jax_calls(spec, arrays, direction)
    row: dict[str, Any] = {
        "length": spec.kv_length,
        "causal": spec.causal,
        "direction": direction,
        "temporary_bytes": memory,
        "too_large": sorted(memory.keys() - calls.keys()),
    }
    if "dense" in calls:
        row["error_over_dense"] = difference(calls[OURS](), calls["dense"]())
    if config.torch:
        calls[TORCH] = torch_call(spec, arrays, direction)
    seconds = race(calls, until, rounds=3 if config.quick else 25)
    row["rounds"] = len(seconds[OURS])
    row["seconds"] = {name: spread(found) for name, found in seconds.items()}
    row["speed_over"] = {
        name: spread([b / a for a, b in zip(seconds[OURS], found, strict=True)])
        for name, found in seconds.items()
        if name != OURS
    }
    return row


def show(row: dict[str, Any]) -> None:
    ratios = ", ".join(
        f"{ratio['median']:.2f} x {name}" for name, ratio in row["speed_over"].items()
    )
    kind = "causal" if row["causal"] else "full"
    ours = row["seconds"][OURS]["median"]
    print(
        f"S={row['length']} {kind} {row['direction']}: {ours * 1e3:.1f} ms, {ratios}, "
        f"{row['temporary_bytes'][OURS] / 1e6:.1f} MB, {row['rounds']} rounds",
        flush=True,
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that expectations are about: the least over all cases."""

    def least(name: str, length: int) -> float | None:
        found = [
            row["speed_over"][name]["median"]
            for row in rows
            if row["length"] >= length and name in row["speed_over"]
        ]
        return min(found, default=None)

    exponents = {}
    for direction in ("forward", "both"):
        for causal in (False, True):
            chosen = [
                (row["length"], row["temporary_bytes"][OURS])
                for row in rows
                if row["direction"] == direction
                and row["causal"] == causal
                and row["length"] >= 1024  # shorter ones are a tile or two
            ]
            if len(chosen) > 1:
                kind = "causal" if causal else "full"
                name = f"{direction} {kind}"
                exponents[name] = exponent(*map(list, zip(*chosen, strict=True)))
    shares = {
        f"{row['direction']} {'causal' if row['causal'] else 'full'}": (
            row["temporary_bytes"][OURS] / row["temporary_bytes"]["dense"]
        )
        for row in rows
        if row["length"] == 2048
    }
    errors = [row["error_over_dense"] for row in rows if "error_over_dense" in row]
    return {
        "least_speed_over_dense_from_1024": least("dense", 1024),
        "least_speed_over_torch_from_2048": least(TORCH, 2048),
        "memory_exponent": exponents,
        "memory_over_dense_at_2048": shares,
        "greatest_error_over_dense": max(errors, default=None),
    }


def verdict(found: dict[str, Any]) -> bool:
    """Whether every number that was measured is as expected."""
    at_least = {
        "least_speed_over_dense_from_1024": 1.0,
        "least_speed_over_torch_from_2048": 1.0,
    }
    error = found["greatest_error_over_dense"]
    shares = found["memory_over_dense_at_2048"]
    return (
        all(found[name] is None or found[name] >= x for name, x in at_least.items())
        and (error is None or error <= _TOLERANCE)
        and all(x <= 1.1 for x in found["memory_exponent"].values())
        and all(x <= 0.1 for name, x in shares.items() if name.startswith("both"))
    )


def cost(spec: Spec, direction: str) -> float:
    """Share of the time that a case may take; short ones need some too."""
    return spec.flops(direction) + 2e9


def run(config: Config) -> dict[str, Any]:
    started = time.monotonic()
    threads = config.threads or os.cpu_count() or 1
    if hasattr(os, "sched_setaffinity"):
        # Before JAX counts cores; PyTorch is told.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    if config.torch:
        import torch

        torch.set_num_threads(threads)
    text = "64" if config.quick else config.lengths
    cases = [
        (
            Spec(
                name="cpu",
                batch=1,
                q_length=length,
                kv_length=length,
                heads=config.heads,
                kv_heads=config.heads,
                head_dim=config.head_dim,
                dtype="float32",
                causal=causal,
            ),
            direction,
        )
        for length in map(int, text.split(","))
        for causal in (False, True)
        for direction in ("forward", "both")
        if not config.quick or causal == (direction == "both")
    ]
    rows: list[dict[str, Any]] = []
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for index, (spec, direction) in enumerate(cases):
            left = 60 * config.minutes - (time.monotonic() - started)
            rest = math.fsum(cost(*case) for case in cases[index:])
            share = max(left, 0.0) * cost(spec, direction) / rest
            until = time.monotonic() + share
            rows.append(measure(config, spec, direction, until))
            show(rows[-1])
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    found = summary(rows)
    figures = {"threads": threads, **found, "cases": rows}
    if config.torch:
        figures["torch"] = torch.__version__
    expected = {
        "least_speed_over_dense_from_1024": ">= 1.0",
        "least_speed_over_torch_from_2048": ">= 1.0",
        "memory_exponent": "<= 1.1",
        "memory_over_dense_at_2048": "<= 0.1 with gradients",
        "greatest_error_over_dense": f"<= {_TOLERANCE}",
    }
    return write_result(
        config.workdir, "sigmoid_cpu", figures, expected, verdict(found)
    )


if __name__ == "__main__":
    run_from_flags(Config, run)
