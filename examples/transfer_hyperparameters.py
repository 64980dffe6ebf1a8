r"""Does the best learning rate of a small model stay the best of a large one?

Learning-rate sweeps of a byte-level transformer on English prose, at widths ×1, ×2, ×4
and depths ×1, ×2, ×4, under the standard parameterisation (fan-in initialisation, one
learning rate) and under Complete^(d)P. The model's code is the same throughout:
residual multipliers are absorbed into weights.

    python examples/transfer_hyperparameters.py --workdir=runs/transfer
    python examples/transfer_hyperparameters.py --workdir=runs/quick --quick

About 15 minutes on 2 CPU cores. Expected: under Complete^(d)P the best learning rate
stays within one factor of two over all sizes, and larger models are not worse; under
the standard parameterisation it moves by at least two factors of two over a width of
×4. --quick (about 4 minutes) shows the tendency: one seed and fewer steps, in which the
standard rate moves by one factor only. A run that was killed continues: every trial is
saved.

Paper: Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width,
Depth, Batch and Duration", arXiv 2512.22382.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from diffmm.optim import AdamW
from diffmm.parameterisation import (
    CompletedP,
    StandardFanIn,
    absorbed,
    evaluate,
    explain,
    rescale_init,
    rms_by_name,
)
from diffmm.training import (
    option,
    run_from_flags,
    write_atomically,
    write_result,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import prose_trials

RULES = {"standard": StandardFanIn(), "completed_p": CompletedP()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of the experiment; each field is a flag."""

    workdir: str = option("runs/transfer", "where trials, plot and result go")
    quick: bool = option(False, "fewer steps, one seed, two sizes an axis")
    width: int = option(32, "of the base model; heads of 16")
    num_layers: int = option(2, "of the base model")
    factors: str = option("1,2,4", "sizes relative to the base, on either axis")
    log2_rates: str = option("-10,-9,-8,-7,-6,-5,-4,-3", "learning rates")
    seeds: int = option(2, "initialisations per point")
    steps: int = option(200, "optimiser steps per trial")
    rows: int = option(32, "rows per step")
    length: int = option(32, "bytes per row")
    validation_rows: int = option(1024, "windows of held-out prose")


def sizes(config: Config) -> dict[str, list[tuple[int, int]]]:
    """Width and depth of every model, by axis; both start at the base."""
    factors = [int(factor) for factor in config.factors.split(",")]
    return {
        "width": [(config.width * f, config.num_layers) for f in factors],
        "depth": [(config.width, config.num_layers * f) for f in factors],
    }


def run(config: Config) -> dict[str, Any]:
    if config.quick:
        config = dataclasses.replace(
            config, factors="1,4", seeds=1, steps=min(config.steps, 120)
        )
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rates = [2.0 ** float(power) for power in config.log2_rates.split(",")]
    losses = sweep(config, rates, workdir)
    figures = summarise(config, rates, losses)
    figures["minutes"] = (time.perf_counter() - started) / 60
    plot(config, rates, losses, workdir / "transfer.png")
    expected = {
        "completed_p": {"moves_over_width": "<= 1", "moves_over_depth": "<= 1"},
        "completed_p.worse_than_base": "<= noise",
        "standard": {"moves_over_width": ">= 2"},
    }
    ours, theirs = figures["completed_p"], figures["standard"]
    ok = (
        max(ours["moves_over_width"], ours["moves_over_depth"]) <= 1
        and ours["worse_than_base"] <= figures["noise"]
        and theirs["moves_over_width"] >= 2
    )
    return write_result(workdir, "transfer_hyperparameters", figures, expected, ok)


def sweep(config: Config, rates: list[float], workdir: pathlib.Path) -> dict:
    """Validation losses ``{rule: {(width, depth): [rates, seeds]}}``, resumable."""
    prose = prose_trials.load_prose(
        length=config.length,
        rows=config.rows,
        steps=config.steps,
        validation_rows=config.validation_rows,
    )
    base = prose_trials.model_config(config.width, config.num_layers, 16)
    base_rms = rms_by_name(prose_trials.fresh_jitted(base, 0))
    hyper = AdamW(learning_rate=1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    store = workdir / "trials.json"
    identity = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("workdir", "factors", "log2_rates", "seeds", "quick")
    }
    saved = json.loads(store.read_text()) if store.exists() else {}
    if saved.get("config") != identity:
        saved = {"config": identity, "trials": {}}
    trials = saved["trials"]
    shapes = list(
        dict.fromkeys(size for axis in sizes(config).values() for size in axis)
    )
    losses = {}
    for rule_name, rule in RULES.items():
        losses[rule_name] = {}
        for width, depth in shapes:
            shape = prose_trials.model_config(width, depth, 16)
            leaves = prose_trials.leaves_between(base, shape)
            multipliers = absorbed(evaluate(rule, leaves), leaves)
            if rule_name == "completed_p" and (width, depth) == shapes[-1]:
                table = explain(rule, leaves, multipliers)
                (workdir / "multipliers.txt").write_text(table + "\n")
            # The rate stays at its peak: annealing to zero forgives a rate that is too
            # high, and in so short a run it hides where the best one is.
            trial = jax.jit(
                prose_trials.make_trial(
                    shape, leaves, multipliers, hyper, final_ratio=1.0
                )
            )
            grid = np.full((len(rates), config.seeds), np.nan)
            for seed in range(config.seeds):
                params = None
                for row, rate in enumerate(rates):
                    key = f"{rule_name} {width}x{depth} {np.log2(rate):g} {seed}"
                    if key not in trials:
                        if params is None:
                            params = rescale_init(
                                prose_trials.fresh_jitted(shape, seed),
                                leaves,
                                multipliers,
                                base_rms,
                            )
                        trials[key] = float(trial(prose, params, rate)["validation"])
                        write_atomically(store, json.dumps(saved))
                    grid[row, seed] = trials[key]
            losses[rule_name][width, depth] = np.where(np.isfinite(grid), grid, np.inf)
            best = grid.mean(axis=1)
            print(
                f"{rule_name:12s} width {width:4d} depth {depth:2d}  best 2^"
                f"{np.log2(rates[int(np.nanargmin(best))]):g}  "
                + " ".join(f"{value:.3f}" for value in best),
                flush=True,
            )
    return losses


def summarise(config: Config, rates: list[float], losses: dict) -> dict[str, Any]:
    """How far the best rate moves, and whether larger is worse.

    Noise: two standard deviations of the difference of two means over seeds, pooled
    over all sizes at the best rate; with one seed, the change of the loss that a factor
    of √2 in the rate would make near the base's optimum.
    """
    figures: dict[str, Any] = {"log2_rates": np.log2(rates).tolist(), "losses": {}}
    spreads = []
    for rule, by_size in losses.items():
        means = {size: grid.mean(axis=1) for size, grid in by_size.items()}
        figures["losses"][rule] = {
            f"{width}x{depth}": grid.tolist()
            for (width, depth), grid in by_size.items()
        }
        best = {size: int(np.argmin(mean)) for size, mean in means.items()}
        if config.seeds > 1:
            spreads += [
                by_size[size][index].var(ddof=1) for size, index in best.items()
            ]
        base = sizes(config)["width"][0]
        moves = {
            axis: max(
                abs(np.log2(rates[best[size]] / rates[best[base]])) for size in chosen
            )
            for axis, chosen in sizes(config).items()
        }
        figures[rule] = {
            "best_log2_rate": {
                f"{w}x{d}": float(np.log2(rates[best[w, d]])) for w, d in best
            },
            "best_loss": {f"{w}x{d}": float(means[w, d].min()) for w, d in best},
            "moves_over_width": float(moves["width"]),
            "moves_over_depth": float(moves["depth"]),
            "worse_than_base": float(
                max(means[size].min() - means[base].min() for size in best)
            ),
        }
    noise = 2 * np.sqrt(2 * np.mean(spreads) / config.seeds) if spreads else 0.02
    figures["noise"] = float(noise)
    return figures


def plot(config: Config, rates: list[float], losses: dict, path: pathlib.Path) -> None:
    """Loss against learning rate: a row per parameterisation, a column per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"standard": "standard", "completed_p": "Complete$^{(d)}$P"}
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True)
    lowest = min(grid.min() for by_size in losses.values() for grid in by_size.values())
    for row, (rule, by_size) in zip(axes, losses.items(), strict=True):
        for panel, (axis, chosen) in zip(row, sizes(config).items(), strict=True):
            colours = plt.cm.viridis(np.linspace(0, 0.85, len(chosen)))
            for (width, depth), colour in zip(chosen, colours, strict=True):
                grid = by_size[width, depth]
                mean = grid.mean(axis=1)
                label = f"{axis} {width if axis == 'width' else depth}"
                panel.plot(rates, mean, "o-", ms=3, color=colour, label=label)
                panel.plot(rates, grid, ".", ms=2, color=colour, alpha=0.6)
                index = int(np.argmin(mean))
                panel.plot(rates[index], mean[index], "*", ms=12, color=colour)
            panel.set_xscale("log", base=2)
            panel.set_ylim(lowest - 0.05, lowest + 1.3)
            panel.set_title(f"{titles[rule]}, over {axis}")
            panel.legend(fontsize=8)
    for panel in axes[1]:
        panel.set_xlabel("peak learning rate at the base")
    for panel in axes[:, 0]:
        panel.set_ylabel("validation loss, nats per byte")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_from_flags(Config, run)
