"""AdamW with hyper-parameters per leaf, beside ``optax.adamw``.

    python benchmarks/optimizer.py                        # 2 CPU cores, ~3 minutes

One process, interleaved: the update of a 100M-parameter tree (264 leaves in 11 classes,
each class with its own learning rate, ε, weight decay, β₁ and β₂) as one jitted step
with donated buffers; its memory; times to trace (with lowering) and to compile, those
of one optimiser per class (``optax.partition``) included for information. Then the
multipliers of a large model are built from shapes alone. Expected: update time <= 1.05
of optax's, the same memory, trace <= 1.2, compile <= 1.4, multipliers within 2 s and
without any array.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffmm._tree import map_with_name
from diffmm.models import Denoiser, preset
from diffmm.optim.adamw import adamw, mask_by_name
from diffmm.optim.hyperparameters import AdamW
from diffmm.parameterisation import CompletedP, evaluate, infer
from diffmm.training import (
    option,
    run_from_flags,
    write_result,
)
from diffmm.typing import Multiplier

HYPER = AdamW(learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = option("runs/optimizer", "where result.json goes")
    width: int = option(512, "of the tree's matrices")
    layers: int = option(20, "13 leaves each")
    vocabulary: int = option(16_384, "rows of the embedding")
    repeats: int = option(20, "measured updates of each side")
    compile_repeats: int = option(5, "measured traces and compilations")
    partition: bool = option(True, "trace and compile one optimiser per class too")
    base: str = option("trimodal-320m", "preset at which hyper-parameters are tuned")
    target: str = option("trimodal-3b", "preset that multipliers are built for")


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Leaves of an unrolled transformer with gated MLPs, gains and biases."""
    width, hidden = config.width, 4 * config.width
    block = {
        "attention_norm": (width,),
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "query_gain": (64,),
        "key_gain": (64,),
        "out": (width, width),
        "mlp_norm": (width,),
        "up": (width, hidden),
        "gate": (width, hidden),
        "up_bias": (hidden,),
        "down": (hidden, width),
        "down_bias": (width,),
    }
    found: dict[str, tuple[int, ...]] = {
        f"{layer}/{name}": shape
        for layer in range(config.layers)
        for name, shape in block.items()
    }
    return found | {
        "embedding": (config.vocabulary, width),
        "final_norm": (width,),
        "unembedding": (width, config.vocabulary),
        "unembedding_bias": (config.vocabulary,),
    }


def class_of(name: str) -> str:
    """One of 11 classes of leaves."""
    leaf = name.split("/")[-1]
    merged = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "up"}
    if "/" in name:
        for ending in ("norm", "gain", "bias"):
            if leaf.endswith(ending):
                return ending
    return merged.get(leaf, leaf)


def class_multipliers(names: list[str]) -> dict[str, Multiplier]:
    """By class; all five hyper-parameters of any two classes differ."""
    classes = sorted({class_of(name) for name in names})
    return {
        name: Multiplier(
            **{
                field: 0.5 + (classes.index(name) + shift) / len(classes)
                for shift, field in enumerate(
                    ("learning_rate", "eps", "weight_decay", "b1", "b2")
                )
            }
        )
        for name in classes
    }


def schedule(count):
    return optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, 100, 10_000)(count)


def transformations(names: list[str]) -> dict[str, optax.GradientTransformation]:
    """The sides: optax's AdamW, ours per leaf, and one of optax's per class."""

    def plain(m: Multiplier) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: HYPER.learning_rate * m.learning_rate * schedule(count),
            b1=HYPER.b1**m.b1,
            b2=HYPER.b2**m.b2,
            eps=HYPER.eps * m.eps,
            weight_decay=HYPER.weight_decay * m.weight_decay,
        )

    by_class = class_multipliers(names)
    per_leaf = {name: by_class[class_of(name)] for name in names}
    return {
        "optax": plain(Multiplier()),
        "ours": adamw(HYPER, per_leaf, schedule=schedule),
        "partition": optax.partition(
            {name: plain(m) for name, m in by_class.items()},
            lambda tree: map_with_name(lambda name, _: class_of(name), tree),
        ),
    }


def make_step(tx: optax.GradientTransformation) -> Callable:
    """A jitted update that reuses the memory of parameters and state."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def preparation(config: Config, tree: dict) -> dict[str, dict[str, list[float]]]:
    """Seconds to trace and to compile each side, every time from cold caches."""
    sides = transformations(list(tree))
    if not config.partition:
        del sides["partition"]
    seconds = {name: {"trace": [], "compile": []} for name in sides}
    for repeat in range(config.compile_repeats + 1):
        # The order changes, so that no side is always the first.
        order = list(sides) if repeat % 2 else list(reversed(sides))
        for name in order:
            state = jax.eval_shape(sides[name].init, tree)
            jax.clear_caches()
            started = time.perf_counter()
            lowered = make_step(sides[name]).trace(tree, state, tree).lower()
            traced = time.perf_counter()
            lowered.compile()
            compiled = time.perf_counter()
            if repeat:  # the first round warms up
                seconds[name]["trace"].append(traced - started)
                seconds[name]["compile"].append(compiled - traced)
    return seconds


def updates(config: Config, tree: dict) -> tuple[dict[str, list[float]], dict]:
    """Seconds of interleaved updates of each side, and what each allocates."""
    sides = transformations(list(tree))
    key = jax.random.key(0)
    gradients = {
        name: 0.01 * jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
        for index, (name, leaf) in enumerate(tree.items())
    }
    steps, carries, memory = {}, {}, {}
    for name in ("optax", "ours"):
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), tree)
        carries[name] = params, sides[name].init(params)
        lowered = make_step(sides[name]).lower(*carries[name], gradients)
        steps[name] = lowered.compile()
        analysis = steps[name].memory_analysis()
        memory[name] = {
            "temporary_bytes": int(analysis.temp_size_in_bytes),
            "argument_bytes": int(analysis.argument_size_in_bytes),
            "output_bytes": int(analysis.output_size_in_bytes),
            "aliased_bytes": int(analysis.alias_size_in_bytes),
        }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(config.repeats + 2):
        order = list(steps) if repeat % 2 else list(reversed(steps))
        for name in order:
            started = time.perf_counter()
            carries[name] = jax.block_until_ready(
                steps[name](*carries[name], gradients)
            )
            if repeat >= 2:  # two rounds of warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds, memory


def build_multipliers(config: Config) -> dict[str, float]:
    """Seconds from two configurations to an optimiser, and arrays made on the way."""

    def make(name: str):
        return nnx.split(Denoiser(preset(name), rngs=nnx.Rngs(0)))[1]

    before = {id(array) for array in jax.live_arrays()}
    started = time.perf_counter()
    leaves = infer(make, config.base, config.target)
    multipliers = evaluate(CompletedP(), leaves)
    matrices = [name for name, leaf in leaves.items() if leaf.matrix]
    tx = adamw(HYPER, multipliers, mask=mask_by_name(matrices))
    seconds = time.perf_counter() - started
    arrays = [array for array in jax.live_arrays() if id(array) not in before]
    # The optimiser accepts the model's own tree.
    jax.eval_shape(lambda: tx.init(make(config.target)))
    sizes = (math.prod(leaf.shape) for leaf in leaves.values())
    return {
        "seconds": seconds,
        "leaves": len(leaves),
        "parameters": sum(sizes),
        "arrays": len(arrays),
    }


def run(config: Config) -> dict:
    building = build_multipliers(config)
    tree = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes(config).items()
    }
    cold = preparation(config, tree)
    seconds, memory = updates(config, tree)
    allocated = {
        name: sum(m.values()) - 2 * m["aliased_bytes"] for name, m in memory.items()
    }
    figures = {
        "parameters": sum(math.prod(leaf.shape) for leaf in tree.values()),
        "leaves": len(tree),
        "classes": len({class_of(name) for name in tree}),
        "update_seconds": spread(seconds["ours"]),
        "optax_update_seconds": spread(seconds["optax"]),
        "update_over_optax": ratios(seconds["ours"], seconds["optax"]),
        "memory": memory,
        "peak_bytes_over_optax": allocated["ours"] / allocated["optax"],
    }
    for phase in ("trace", "compile"):
        ours = cold["ours"][phase]
        figures[f"{phase}_seconds"] = spread(ours)
        for side in sorted(cold.keys() - {"ours"}):
            theirs = cold[side][phase]
            figures[f"{side}_{phase}_seconds"] = spread(theirs)
            figures[f"{phase}_over_{side}"] = ratios(ours, theirs)
    figures["multipliers"] = {"preset": config.target, **building}
    expected = {
        "update_over_optax": "median <= 1.05",
        "peak_bytes_over_optax": "<= 1.001",
        "trace_over_optax": "median <= 1.2",
        "compile_over_optax": "median <= 1.4",
        "multipliers": "seconds <= 2, arrays 0",
    }
    ok = (
        figures["update_over_optax"]["median"] <= 1.05
        and figures["peak_bytes_over_optax"] <= 1.001
        and figures["trace_over_optax"]["median"] <= 1.2
        and figures["compile_over_optax"]["median"] <= 1.4
        and building["seconds"] <= 2
        and building["arrays"] == 0
    )
    return write_result(config.workdir, "optimizer", figures, expected, bool(ok))


if __name__ == "__main__":
    run_from_flags(Config, run)
