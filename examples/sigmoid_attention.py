r"""Softmax or sigmoid attention: one language model of prose, trained with either.

The same causal byte-level transformer learns the next byte of English prose with

- softmax attention,
- sigmoid attention with the bias b = -log n, n the length trained at,
- the same without a bias, b = 0,
- softmax and sigmoid with a second norm at the end of each branch (hybrid norm),
- if `--variants` names them, both with ALiBi instead of rotary positions,

everything else equal: initial weights, batches, optimiser. Recorded are training and
validation loss, the norm of the gradient before clipping, and in each layer the norm of
the attention output relative to that of the values, ‖O‖/‖V‖, and the row mass, the sum
of the weights of a query. With b = 0 every weight starts near 1/2, so that the output
starts about n/2 times too large; -log n brings it back to order one. Then the models
are evaluated at twice the length, with b kept and with b = -log 2n.

    python examples/sigmoid_attention.py --workdir=runs/sigmoid
    python examples/sigmoid_attention.py --workdir=runs/quick --quick

About 8 minutes on 2 CPU cores, with `--quick` (three variants, one seed, 120 steps)
about one. Expected, with what was measured at n = 256 (± standard deviation of three
seeds):

- before training the row mass is what theory says, 0.81 with b = -log n and 64 = (n +
  1)/4 with b = 0 (causal rows see half of the keys on average), and ‖O‖ is between n/6
  and n/2 times larger with b = 0 (69 times in the first layer, 168 in the second);
- b = 0 ends at least 0.2 nats per byte behind b = -log n (measured 0.35 ± 0.05);
- in so short a run sigmoid attention is still behind softmax: by 0.17 ± 0.02 nats, and
  with hybrid norm on both sides by 0.09 ± 0.05; the latter is level with softmax
  without it (0.03). In the quick run, too short for either, they do not differ;
- on the second half of rows of 2n, b = -log 2n is better than b kept, by 0.10 nats.

What does not show at this size are spikes: gradient norms start twice as large with
b = 0 (1.8 instead of 0.9) and then decay like the others.

Writes `curves.json`, `curves.csv`, `sigmoid_attention.png` and `result.json`. A run
that was killed continues after the last finished training.

Paper: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid
Self-Attention", arXiv 2409.04431. ALiBi: Press et al., arXiv 2108.12409.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffmm.diffusion import cross_entropy
from diffmm.models import Denoiser, TransformerConfig
from diffmm.training import (
    option,
    run_from_flags,
    to_jsonable,
    write_atomically,
    write_result,
)
from diffmm_kernels.sigmoid_attention.theory import row_mass

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import prose_trials

SIGMOID = {"attention": "sigmoid"}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": SIGMOID,
    "sigmoid, b = 0": {**SIGMOID, "attention_bias": 0.0},
    "softmax, hybrid norm": {"hybrid_norm": True},
    "sigmoid, hybrid norm": {**SIGMOID, "hybrid_norm": True},
    "softmax, ALiBi": {"positions": "alibi"},
    "sigmoid, ALiBi": {**SIGMOID, "positions": "alibi"},
}
DEFAULT = [name for name in VARIANTS if "ALiBi" not in name]
RULES = {"kept": "b kept", "-log 2n": "b = -log 2n"}  # at twice the length
POINTS = 12  # evaluations of a training run, beside the one before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of the experiment; each field is a flag."""

    workdir: str = option("runs/sigmoid", "where curves, plot and result go")
    quick: bool = option(False, "the first three variants, one seed, 120 steps")
    length: int = option(256, "bytes per row, n")
    width: int = option(64, "of the model")
    # Normalised queries and keys have logits up to √head_dim, and a sigmoid needs log n
    # for a weight of 1/2: here 5.7 and 5.5, as 8.0 and 8.3 in the published 1B model.
    head_dim: int = option(32, "of the model")
    num_layers: int = option(2, "of the model")
    seeds: int = option(3, "initialisations of each variant")
    steps: int = option(300, "optimiser steps, a multiple of 12")
    rows: int = option(8, "rows per step")
    learning_rate: float = option(3e-3, "peak, after 10 % warm-up; cosine to a tenth")
    clip: float = option(1.0, "largest gradient norm")
    validation_rows: int = option(64, "windows of held-out prose")
    initial_lengths: str = option("16,32,64,128,256", "n of the sizes before training")
    variants: str = option(";".join(DEFAULT), "which to train, separated by ;")


def model_config(config: Config, name: str) -> TransformerConfig:
    return TransformerConfig(
        vocabulary_size=prose_trials.VOCABULARY_SIZE,
        width=config.width,
        num_layers=config.num_layers,
        head_dim=config.head_dim,
        rope_base=1_000.0,
        length=config.length,
        causal=True,
        **VARIANTS[name],
    )


def fresh(shape: TransformerConfig, seed: int) -> Any:
    """Initial parameters: the same for softmax and sigmoid, whatever the length."""
    plain = TransformerConfig(
        vocabulary_size=shape.vocabulary_size,
        width=shape.width,
        num_layers=shape.num_layers,
        head_dim=shape.head_dim,
        hybrid_norm=shape.hybrid_norm,
    )
    return prose_trials.fresh_jitted(plain, seed)


def merged(config: TransformerConfig, params: Any) -> Denoiser:
    """The model with these parameters; the same ones fit every attention and length."""
    graphdef = nnx.split(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graphdef, params)


def losses(config: TransformerConfig, params: Any, windows: Any) -> Any:
    """Nats of every byte ``[rows, length]`` of ``windows [rows, length + 1]``."""
    model = merged(config, params)
    hidden = model.hidden(windows[:, :-1])
    return cross_entropy(hidden, model.unembedding[...], windows[:, 1:])


def loss(config: TransformerConfig, params: Any, windows: Any) -> Any:
    return losses(config, params, windows).mean()


@functools.partial(jax.jit, static_argnums=0)
def attention_sizes(config: TransformerConfig, params: Any, tokens: Any) -> Any:
    """‖O‖/‖V‖ and mean row mass of each layer: two of ``[num_layers]``."""
    statistics = merged(config, params).attention_statistics(tokens)
    output, value = (
        jnp.linalg.norm(leaf, axis=-1)
        for leaf in (statistics.output_norm, statistics.value_norm)
    )
    return output / value, statistics.row_mass.mean(-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    config: Config, shape: TransformerConfig, prose: prose_trials.Prose, params: Any
) -> tuple[Any, dict[str, Any]]:
    """One training run.

    Returns:
      The parameters and the curves: ``loss`` and ``gradient_norm [steps]``, and at
      `POINTS` + 1 moments ``validation``, ``ratio`` and ``mass`` (the latter two with
      an axis of layers).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, config.steps // 10),
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip), optax.adam(schedule, b1=0.9, b2=0.95)
    )

    def step(carry: Any, windows: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss, argnums=1)(shape, params, windows)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, optax.tree.norm(grads))

    def look(params: Any) -> dict[str, Any]:
        windows = prose.validation.reshape(-1, prose.validation.shape[-1])
        ratio, mass = attention_sizes(shape, params, windows[:8, :-1])
        validation = loss(shape, params, windows)
        return {"validation": validation, "ratio": ratio, "mass": mass}

    def stretch(carry: Any, windows: Any) -> Any:
        carry, (value, norm) = jax.lax.scan(step, carry, windows)
        return carry, ({"loss": value, "gradient_norm": norm}, look(carry[0]))

    batches = prose.train.reshape(POINTS, -1, *prose.train.shape[1:])
    start = look(params)
    (params, _), (each_step, later) = jax.lax.scan(
        stretch, (params, optimizer.init(params)), batches
    )
    each_step = jax.tree.map(lambda leaf: leaf.reshape(-1), each_step)
    moments = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), start, later
    )
    return params, {**each_step, **moments}


@functools.partial(jax.jit, static_argnums=0)
def halves(shape: TransformerConfig, params: Any, windows: Any) -> Any:
    """Mean loss of the first and of the second half of the positions: ``[2]``."""
    nll = losses(shape, params, windows)
    return nll.reshape(len(nll), 2, -1).mean((0, 2))


def evaluate_longer(
    config: Config, name: str, params: Any, windows: Any
) -> dict[str, Any]:
    """Losses over the first and the second n positions of rows of 2n.

    A configuration for the length 2n has b = -log 2n and the same parameters.
    """
    shape = model_config(config, name)
    result = {"kept": halves(shape, params, windows)}
    if shape.attention == "sigmoid" and shape.attention_bias is None:
        longer = dataclasses.replace(shape, length=2 * config.length)
        result["-log 2n"] = halves(longer, params, windows)
    return result


def names_of(config: Config) -> list[str]:
    names = [name.strip() for name in config.variants.split(";")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants must be among {list(VARIANTS)}, got {unknown}")
    return names


def train_all(
    config: Config, names: list[str], workdir: pathlib.Path
) -> dict[str, list[dict]]:
    """Curves of every variant, one entry for each seed; resumable."""
    prose, longer = (
        prose_trials.load_prose(
            length=config.length * factor,
            rows=config.rows,
            steps=config.steps,
            validation_rows=config.validation_rows,
        )
        for factor in (1, 2)
    )
    long_windows = longer.validation.reshape(-1, longer.validation.shape[-1])
    store = workdir / "curves.json"
    identity = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("workdir", "quick", "seeds", "initial_lengths", "variants")
    }
    saved = json.loads(store.read_text()) if store.exists() else {}
    if saved.get("config") != identity:
        saved = {"config": identity, "runs": {}}
    for name in names:
        shape = model_config(config, name)
        runs = saved["runs"].setdefault(name, [])
        for seed in range(len(runs), config.seeds):
            started = time.perf_counter()
            params = fresh(shape, seed)
            params, curves = train(config, shape, prose, params)
            curves["longer"] = evaluate_longer(config, name, params, long_windows)
            runs.append(to_jsonable(jax.device_get(curves)))
            write_atomically(store, json.dumps(saved))
            ratio = ", ".join(f"{value:.2f}" for value in runs[-1]["ratio"][0])
            print(
                f"{name:21s} seed {seed}   validation {runs[-1]['validation'][-1]:.3f}"
                f"   ‖O‖/‖V‖ at first {ratio}"
                f"   {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {name: saved["runs"][name][: config.seeds] for name in names}


def sizes_at_initialisation(config: Config) -> dict[str, Any]:
    """‖O‖/‖V‖ of the first layer before training, for several n."""
    lengths = [int(length) for length in config.initial_lengths.split(",")]
    names = ("softmax", "sigmoid", "sigmoid, b = 0")
    result: dict[str, Any] = {"length": lengths, **{name: [] for name in names}}
    config = dataclasses.replace(config, num_layers=1)
    for length in lengths:
        windows = prose_trials.load_prose(
            length=length, rows=8, steps=1, validation_rows=64
        ).validation[0]
        for name in names:
            shape = dataclasses.replace(model_config(config, name), length=length)
            ratio, _ = attention_sizes(shape, fresh(shape, 0), windows[:, :-1])
            result[name].append(float(ratio[0]))
    return result


def steady(values: Any) -> np.ndarray:
    """Mean over the last tenth of the steps, one number for each seed."""
    values = np.asarray(values, float)
    return values[:, -max(1, values.shape[1] // 10) :].mean(1)


def spikes(norms: np.ndarray) -> np.ndarray:
    """Steps whose gradient norm is over twice the median of the 20 before, by seed."""
    before = np.lib.stride_tricks.sliding_window_view(norms, 20, axis=1)[:, :-1]
    return (norms[:, 20:] > 2 * np.median(before, axis=-1)).sum(1)


def summarise(runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Means over seeds, with their standard deviation where it matters."""
    figures: dict[str, Any] = {}
    for name, by_seed in runs.items():
        final = np.array([run["validation"][-1] for run in by_seed], float)
        norms = np.array([run["gradient_norm"] for run in by_seed], float)
        ratio, mass = (
            np.array([run[key] for run in by_seed], float) for key in ("ratio", "mass")
        )
        figures[name] = {
            "validation": final.mean(),
            "validation_by_seed": final,
            "training": steady([run["loss"] for run in by_seed]).mean(),
            "ratio_at_first": ratio[:, 0].mean(0),
            "ratio_at_last": ratio[:, -1].mean(0),
            "row_mass_at_first": mass[:, 0].mean(0),
            "row_mass_at_last": mass[:, -1].mean(0),
            "gradient_norm_at_first": norms[:, 0].mean(),
            "gradient_norm_at_last": steady(norms).mean(),
            "gradient_norm_spikes": spikes(norms).mean(),
            "longer": {
                rule: {
                    part: np.mean([run["longer"][rule][i] for run in by_seed])
                    for i, part in enumerate(("first_half", "second_half"))
                }
                for rule in by_seed[0]["longer"]
            },
        }
    return figures


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean over steps, along the last axis."""
    windows = np.lib.stride_tricks.sliding_window_view(values, width, axis=-1)
    return windows.mean(-1)


def plot(
    config: Config,
    runs: dict[str, list[dict]],
    initial: dict[str, Any],
    path: pathlib.Path,
) -> None:
    """Losses, gradient norms, sizes of the attention output, and twice the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {name: f"C{index}" for index, name in enumerate(VARIANTS)}
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    training, validation, norms, ratios, first, longer = axes.flat
    moments = np.linspace(0, config.steps, POINTS + 1)
    for name, by_seed in runs.items():

        def draw(axis: Any, x: Any, values: np.ndarray, name: str = name) -> None:
            color = colors[name]
            axis.plot(x, values.mean(0), color=color, lw=1.2, label=name)
            axis.fill_between(
                x, values.min(0), values.max(0), color=color, alpha=0.15, lw=0
            )

        curves = {
            key: np.array([run[key] for run in by_seed], float)
            for key in ("loss", "gradient_norm", "validation", "ratio")
        }
        steps = np.arange(config.steps - 8) + 4
        draw(training, steps, smooth(curves["loss"]))
        draw(validation, moments, curves["validation"])
        draw(norms, np.arange(config.steps), curves["gradient_norm"])
        draw(ratios, moments, curves["ratio"].mean(-1))
    lengths = np.array(initial["length"])
    for name in initial.keys() - {"length"}:
        first.plot(lengths, initial[name], "o-", color=colors[name])
    first.plot(lengths, lengths / 2, "k:", lw=0.8, label="n / 2")
    first.set(title="‖O‖/‖V‖ of layer 0 before training", xlabel="length n")
    first.set_xscale("log", base=2)
    first.set_yscale("log")
    first.legend(fontsize=8)
    training.set(title="training loss, nats per byte", xlabel="step")
    validation.set(title="validation loss, nats per byte", xlabel="step")
    validation.legend(fontsize=8, title="everywhere:")
    norms.set(title="gradient norm before clipping", xlabel="step", yscale="log")
    ratios.set(title="‖O‖/‖V‖, mean over layers", xlabel="step", yscale="log")

    labels = []
    for name, by_seed in runs.items():
        for rule in by_seed[0]["longer"]:
            pair = np.mean([run["longer"][rule] for run in by_seed], axis=0)
            longer.plot(pair, 2 * [len(labels)], "-", color=colors[name])
            longer.plot(pair[0], len(labels), "o", mfc="white", color=colors[name])
            longer.plot(pair[1], len(labels), "o", color=colors[name])
            single = len(by_seed[0]["longer"]) == 1
            labels.append(name if single else f"{name}:\n{RULES[rule]}")
    longer.set(
        title="rows of 2n: first half (open), second half",
        xlabel="loss, nats per byte",
        yticks=range(len(labels)),
    )
    longer.set_yticklabels(labels, fontsize=8)
    longer.invert_yaxis()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_csv(runs: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Loss and gradient norm of every step, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "step", "loss", "gradient_norm"])
        for name, by_seed in runs.items():
            for seed, run in enumerate(by_seed):
                pairs = zip(run["loss"], run["gradient_norm"], strict=True)
                for step, pair in enumerate(pairs):
                    writer.writerow([name, seed, step, *(f"{x:.5g}" for x in pair)])


def expectations(config: Config) -> dict[str, tuple[float, float]]:
    """Between what each compared figure must lie; see the header for their source."""
    n = config.length
    # Of rows 1 … n that see as many keys; logits N(0, 1), as normalised queries give.
    visible = (n + 1) / (2 * n)
    with_bias = row_mass(n) * visible
    without = row_mass(n, alpha=0) * visible
    return {
        "initial_row_mass": (0.9 * with_bias, 1.1 * with_bias),
        "initial_row_mass_without_bias": (0.9 * without, 1.1 * without),
        "initial_ratio_without_bias": (n / 6, n / 2),
        # Nats per byte; three standard deviations of seeds away from what was measured.
        "sigmoid_minus_softmax": (-math.inf, 0.25),
        "sigmoid_minus_softmax_with_hybrid_norm": (-math.inf, 0.23),
        "no_bias_minus_sigmoid": (0.2, math.inf),
        "longer_kept_minus_rescaled": (0.0, math.inf),
    }


def in_words(low: float, high: float) -> str:
    if math.isinf(low):
        return f"at most {high:.3g}"
    return f"at least {low:.3g}" if math.isinf(high) else f"{low:.3g} to {high:.3g}"


def compare(figures: dict[str, Any]) -> dict[str, float]:
    """The figures with an expectation; those whose variants were trained."""

    def first_layer(name: str, key: str) -> float:
        return float(figures[name][key][0])

    def difference(name: str, other: str) -> float:
        return float(figures[name]["validation"] - figures[other]["validation"])

    compared = {}
    if "sigmoid" in figures:
        compared["initial_row_mass"] = first_layer("sigmoid", "row_mass_at_first")
        longer = figures["sigmoid"]["longer"]
        compared["longer_kept_minus_rescaled"] = float(
            longer["kept"]["second_half"] - longer["-log 2n"]["second_half"]
        )
    if {"sigmoid", "sigmoid, b = 0"} <= figures.keys():
        compared |= {
            "initial_row_mass_without_bias": first_layer(
                "sigmoid, b = 0", "row_mass_at_first"
            ),
            "initial_ratio_without_bias": first_layer(
                "sigmoid, b = 0", "ratio_at_first"
            )
            / first_layer("sigmoid", "ratio_at_first"),
            "no_bias_minus_sigmoid": difference("sigmoid, b = 0", "sigmoid"),
        }
    for norm in ("", "hybrid norm"):
        pair = [f"{kind}, {norm}" if norm else kind for kind in ("sigmoid", "softmax")]
        if set(pair) <= figures.keys():
            suffix = "_with_hybrid_norm" if norm else ""
            compared[f"sigmoid_minus_softmax{suffix}"] = difference(*pair)
    return compared


def run(config: Config) -> dict[str, Any]:
    names = names_of(config)
    if config.quick:
        names = names[:3]
        config = dataclasses.replace(config, seeds=1, steps=min(config.steps, 120))
    if config.steps % POINTS:
        raise ValueError(f"steps must be a multiple of {POINTS}, got {config.steps}")
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    initial = sizes_at_initialisation(config)
    runs = train_all(config, names, workdir)
    figures = summarise(runs)
    compared = compare(figures)
    figures |= compared
    figures["ratio_over_length"] = initial
    figures["minutes"] = (time.perf_counter() - started) / 60
    write_csv(runs, workdir / "curves.csv")
    plot(config, runs, initial, workdir / "sigmoid_attention.png")
    limits = expectations(config)
    limits = {key: limits[key] for key in compared}
    expected = {key: in_words(*limit) for key, limit in limits.items()}
    ok = all(low <= compared[key] <= high for key, (low, high) in limits.items())
    return write_result(workdir, "sigmoid_attention", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, run)
