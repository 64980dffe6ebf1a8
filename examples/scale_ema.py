r"""The EMA scaling rule: multiply the batch by κ, raise the decay to the power κ.

1. A noisy parabola whose moments are known exactly. SGD with an average runs at κ times
   the batch and κ times the learning rate; the table shows how far the average strays
   from that of the run at κ = 1 with the rule, with its linear form, and without. A
   Monte-Carlo run of the library's own optimiser chain must agree with the moments.
2. BYOL on scikit-learn's digits: a student learns to predict what its own average, the
   teacher, sees in another view of the same image. The distance between teacher and
   student over the run is compared with that of the run at κ = 1. Everything else,
   Adam's hyper-parameters included, is scaled in either case.

    python examples/scale_ema.py --workdir=runs/scale_ema

About 1½ minutes on 2 CPU cores, with `--quick` half a minute. Expected: the table
agrees to three digits with one that was computed independently. From a quarter of the
samples on, the distance stays within 15 % of the reference at 4 and 8 times the batch
(measured: 6 % and 9 %, where seeds differ by 4 %); without the rule it is at least 1.7
times as large (measured: 2.2 and 2.8 times). In the first quarter, where the distance
swings, it runs late at the larger batches even with the rule: up to 13 % and 29 % off.
The accuracy of a classifier does not tell the runs apart. Writes `scale_ema.png`.

Paper: Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813. BYOL: Grill et al.,
"Bootstrap Your Own Latent", arXiv 2006.07733.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from diffmm.optim import (
    averaged_params,
    ema_params,
    scale_decay,
    scale_hyperparameters,
)
from diffmm.training import option, run_from_flags, write_result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run; each field is a flag."""

    workdir: str = option("runs/scale_ema", "where everything is written")
    quick: bool = option(False, "one seed and the first factor only")
    seed: int = option(0, "of the first run; the others count on from it")
    # Noisy parabola.
    paths: int = option(2_000, "of the Monte-Carlo run")
    most_paths_kappa: int = option(32, "largest factor of the Monte-Carlo run")
    # BYOL; the reference run.
    num_seeds: int = option(3, "runs for each setting")
    kappas: str = option("4,8", "factors of the batch that are compared with 1")
    batch_size: int = option(32, "images per step")
    steps: int = option(3_200, "optimiser steps")
    learning_rate: float = option(1e-3, "Adam")
    b1: float = option(0.95, "Adam")
    b2: float = option(0.995, "Adam")
    rho: float = option(0.99, "decay of the teacher per step")


# Part 1. θ ← θ − κη(θ + ε), ε ~ N(0, θ²/2κ), from θ = ζ = 1 over one unit of time.

RATE, NOISE, STEPS = 1e-4, 0.5, 10_000

#: κ: largest error of E[ζ] with ρ^κ, with 1 − κ(1−ρ) and with ρ; of E[ζ²] with ρ^κ and
#: with ρ; of E[θ]. Computed independently of this library, to three digits or more.
TABLE = {
    2: (1.153e-5, 8.06e-6, 0.1094, 2.07e-5, 0.173, 1.84e-5),
    4: (3.460e-5, 2.42e-5, 0.1800, 6.21e-5, 0.297, 5.52e-5),
    8: (8.076e-5, 5.65e-5, 0.2203, 1.45e-4, 0.373, 1.29e-4),
    16: (1.732e-4, 1.21e-4, 0.2418, 3.11e-4, 0.414, 2.76e-4),
    32: (3.583e-4, 2.51e-4, 0.2523, 6.43e-4, 0.435, 5.71e-4),
    64: (7.298e-4, 5.12e-4, 0.2580, 1.31e-3, 0.447, 1.16e-3),
    128: (1.478e-3, 1.04e-3, 0.2608, 2.66e-3, 0.452, 2.35e-3),
    256: (2.996e-3, 2.13e-3, 0.2622, 5.39e-3, 0.455, 4.74e-3),
    512: (6.118e-3, 4.40e-3, 0.2536, 1.10e-2, 0.443, 9.61e-3),
    1024: (1.273e-2, 9.48e-3, 0.2351, 2.31e-2, 0.415, 1.96e-2),
}
COLUMNS = (
    "zeta_rule",
    "zeta_linear",
    "zeta_no_rule",
    "zeta2_rule",
    "zeta2_no_rule",
    "theta",
)


def moments(kappa: int, rhos: list[float]) -> np.ndarray:
    """E[θ], E[ζ] and E[ζ²] after every step, for several decays: ``[k, 3, decays]``.

    Exact: the first and second moments of (θ, ζ) obey a linear recursion, here for the
    average of the parameters *before* each step.
    """
    step = kappa * RATE
    p = 1 - step
    q = p**2 + step**2 * NOISE / kappa
    r = np.asarray(rhos, np.float64)
    theta = zeta = theta2 = cross = zeta2 = np.ones_like(r)
    path = [(theta, zeta, zeta2)]
    for _ in range(STEPS // kappa):
        w = 1 - r
        zeta2 = r**2 * zeta2 + 2 * r * w * cross + w**2 * theta2
        cross = p * (r * cross + w * theta2)
        zeta = r * zeta + w * theta
        theta, theta2 = p * theta, q * theta2
        path.append((theta, zeta, zeta2))
    return np.asarray(path)


def parabola_table(kappas: list[int]) -> dict[int, tuple[float, ...]]:
    """The columns of ``TABLE`` for other factors, from the library's decays."""
    rho = 1 - RATE
    base = moments(1, [rho])
    table = {}
    for kappa in kappas:
        rhos = [
            scale_decay(rho, kappa),
            scale_decay(rho, kappa, "linear"),
            rho,
        ]
        path = moments(kappa, rhos)
        theta, zeta, zeta2 = np.abs(path - base[::kappa][: len(path)]).max(0)
        table[kappa] = (*zeta, zeta2[0], zeta2[2], theta[0])
    return {k: tuple(float(v) for v in row) for k, row in table.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def simulate(
    key: jax.Array, kappa: int, paths: int, power: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the final ζ, by the library's optimiser chain."""
    optimizer = optax.chain(
        optax.sgd(kappa * RATE), ema_params(1 - RATE, kappa=power, order="pre")
    )

    def step(carry, key):
        theta, state = carry
        noise = jax.random.normal(key, theta.shape)
        gradient = theta + jnp.sqrt(NOISE / kappa) * theta * noise
        updates, state = optimizer.update(gradient, state, theta)
        return (optax.apply_updates(theta, updates), state), None

    theta = jnp.ones(paths)
    keys = jax.random.split(key, STEPS // kappa)
    (theta, state), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), keys)
    average = averaged_params(state)
    return average.mean(), average.std()


def check_simulation(config: Config, kappas: list[int]) -> dict[str, dict]:
    """Final ζ of `simulate` against exact moments, in standard errors of the mean."""
    rows = {}
    for kappa in kappas:
        for rule in (True, False) if kappa > 1 else (True,):
            power = kappa if rule else 1
            key = jax.random.fold_in(jax.random.key(config.seed), kappa)
            mean, deviation = simulate(key, kappa, config.paths, jnp.float32(power))
            exact = float(moments(kappa, [(1 - RATE) ** power])[-1, 1, 0])
            rows[f"kappa {kappa}, {'rule' if rule else 'no rule'}"] = {
                "mean": float(mean),
                "exact": exact,
                "standard_errors": float(
                    abs(mean - exact) / deviation * config.paths**0.5
                ),
            }
    return rows


# Part 2. BYOL on digits.


def load_data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images float32 ``[n, 8, 8]`` in [0, 1] and labels; 500 of them to test on."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images = (data.images[order] / 16).astype(np.float32)
    labels = data.target[order]
    return (images[:-500], labels[:-500]), (images[-500:], labels[-500:])


def shifted(images: np.ndarray) -> np.ndarray:
    """Every image moved by −1, 0, 1 pixels along each axis: ``[9, n, 64]``."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    views = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return np.stack(views).reshape(9, len(images), 64)


def augment(key: jax.Array, images: jax.Array, indices: jax.Array) -> jax.Array:
    """Random shift, brightness, noise and missing pixels, twice: ``[2, n, 64]``."""
    shift, scale, noise, keep = jax.random.split(key, 4)
    n = len(indices)
    views = images[jax.random.randint(shift, (2, n), 0, 9), indices[None]]
    views = views * jax.random.uniform(scale, (2, n, 1), minval=0.6, maxval=1.2)
    views = views + 0.15 * jax.random.normal(noise, views.shape)
    return views * jax.random.bernoulli(keep, 0.75, views.shape)


def init_params(rng: np.random.Generator) -> dict:
    """Encoder 64-256-64, projector 64-128-32, predictor 32-64-32."""
    sizes = {
        "encoder": (64, 256, 64),
        "projector": (64, 128, 32),
        "predictor": (32, 64, 32),
    }
    params = {}
    for name, (inputs, hidden, outputs) in sizes.items():
        params[name] = {
            "w1": rng.normal(0, (2 / inputs) ** 0.5, (inputs, hidden)),
            "b1": np.zeros((1, 1, hidden)),  # next to [views, n, hidden]
            "w2": rng.normal(0, (1 / hidden) ** 0.5, (hidden, outputs)),
            "b2": np.zeros((1, 1, outputs)),
        }
        if name != "encoder":  # the scale of the batch norm, whose shift is b1
            params[name]["scale"] = np.ones((1, 1, hidden))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def encode(params: dict, x: jax.Array) -> jax.Array:
    """Views ``[views, n, 64]`` to features of the same shape."""
    layer = params["encoder"]
    hidden = jax.nn.relu(x @ layer["w1"] + layer["b1"])
    return jax.nn.relu(hidden @ layer["w2"] + layer["b2"])


def head(layer: dict, x: jax.Array) -> jax.Array:
    """Two layers; between them batch norm by the statistics of each view's batch."""
    hidden = x @ layer["w1"]
    mean, variance = (f(hidden, 1, keepdims=True) for f in (jnp.mean, jnp.var))
    hidden = (hidden - mean) * jax.lax.rsqrt(variance + 1e-5)
    return (
        jax.nn.relu(hidden * layer["scale"] + layer["b1"]) @ layer["w2"] + layer["b2"]
    )


def byol_loss(params: dict, teacher: dict, views: jax.Array) -> jax.Array:
    """Squared distance of unit vectors, both directions of ``views [2, n, 64]``."""
    guess = head(params["predictor"], head(params["projector"], encode(params, views)))
    goal = head(teacher["projector"], encode(teacher, views))[::-1]
    guess, goal = (
        x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12) for x in (guess, goal)
    )
    return ((guess - jax.lax.stop_gradient(goal)) ** 2).sum((0, 2)).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_byol(
    config: Config, kappa: int, power: jax.Array, params, images, order, key
):
    """Trains at κ times the batch, with a teacher that decays by ρ^power per step.

    Returns:
      ``(params, teacher, distance)``; ``distance [steps]`` is the Euclidean one between
      the encoders of teacher and student after each step.
    """
    adam = {
        "learning_rate": config.learning_rate,
        "b1": config.b1,
        "b2": config.b2,
        "eps": 1e-8,
    }
    optimizer = optax.chain(
        optax.adam(**scale_hyperparameters(adam, kappa, "adam")),
        ema_params(config.rho, kappa=power),
    )

    def step(carry, inputs):
        params, state = carry
        key, indices = inputs
        views = augment(key, images, indices)
        grads = jax.grad(byol_loss)(params, averaged_params(state), views)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        teacher = averaged_params(state)
        difference = optax.tree.sub(teacher["encoder"], params["encoder"])
        return (params, state), optax.tree.norm(difference)

    carry = params, optimizer.init(params)
    inputs = jax.random.split(key, len(order)), order
    (params, state), distance = jax.lax.scan(step, carry, inputs)
    return params, averaged_params(state), distance


def run_byol(config: Config, images: np.ndarray, kappa: int, rule: bool) -> list:
    """What `train_byol` returns, for each seed."""
    moved = jnp.asarray(shifted(images))
    shape = config.steps // kappa, config.batch_size * kappa
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        # Every setting starts alike and sees the same images in the same order.
        rng = np.random.default_rng(seed)
        params = init_params(rng)
        passes = -(-shape[0] * shape[1] // len(images))
        order = np.concatenate([rng.permutation(len(images)) for _ in range(passes)])
        order = order[: shape[0] * shape[1]].reshape(shape)
        power = jnp.float32(kappa if rule else 1)
        key = jax.random.key(seed)
        run = train_byol(config, kappa, power, params, moved, order, key)
        runs.append(jax.device_get(run))
    return runs


def accuracy(params: dict, train: tuple, test: tuple) -> float:
    """Of the five nearest neighbours in the encoder's output."""
    features = [
        np.asarray(encode(params, x.reshape(1, -1, 64))[0]) for x, _ in (train, test)
    ]
    classifier = KNeighborsClassifier(5).fit(features[0], train[1])
    return classifier.score(features[1], test[1])


POINTS = 40  # of the curves


def curve(distance: np.ndarray) -> np.ndarray:
    """Means over 40 equal stretches of the samples, whatever the number of steps."""
    steps = (np.arange(len(distance)) + 0.5) / len(distance)
    groups = np.minimum((steps * POINTS).astype(int), POINTS - 1)
    return np.array([distance[groups == i].mean() for i in range(POINTS)])


def compare_byol(config: Config) -> tuple[dict, dict[str, np.ndarray]]:
    """Figures of every setting, and the curves ``[seeds, points]`` behind them."""
    train, test = load_data()
    kappas = [int(kappa) for kappa in config.kappas.split(",")]
    settings = [(1, True), *((k, rule) for k in kappas for rule in (True, False))]
    figures, curves = {}, {}
    base = np.empty(0)
    for kappa, rule in settings:
        runs = run_byol(config, train[0], kappa, rule)
        name = f"kappa {kappa}, {'rule' if rule else 'no rule'}"
        name = "reference" if kappa == 1 else name
        curves[name] = np.stack([curve(distance) for _, _, distance in runs])
        mean = curves[name].mean(0)
        base = mean if kappa == 1 else base
        early, ratio = np.split(mean / base, [POINTS // 4])
        scores = [
            [accuracy(p, train, test) for p in (student, teacher)]
            for student, teacher, _ in runs
        ]
        figures[name] = {
            "decay": scale_decay(config.rho, kappa if rule else 1),
            "distance": {
                f"{100 * at // POINTS}%": float(mean[at - 1])
                for at in (POINTS // 4, POINTS // 2, POINTS)
            },
            "seed_deviation": float(curves[name].std(0).mean()),
            "ratio_lowest": float(ratio.min()),
            "ratio_highest": float(ratio.max()),
            "ratio_in_first_quarter": [float(early.min()), float(early.max())],
            "student_accuracy": float(np.mean(scores, 0)[0]),
            "teacher_accuracy": float(np.mean(scores, 0)[1]),
        }
        shown = figures[name]
        print(
            f"{name:18} decay {shown['decay']:.4f}   distance "
            + " ".join(f"{v:.3f}" for v in shown["distance"].values())
            + f"   relative {shown['ratio_lowest']:.2f} to {shown['ratio_highest']:.2f}"
            f"   accuracy {shown['student_accuracy']:.3f}, "
            f"{shown['teacher_accuracy']:.3f}",
            flush=True,
        )
    return figures, curves


def save_picture(path: pathlib.Path, table: dict, curves: dict) -> None:
    """Errors of the parabola, and teacher-student distances against samples."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = np.array(list(table.values()))
    for column, label in ((0, "rule"), (1, "linear form"), (2, "no rule")):
        left.loglog(list(table), rows[:, column], "o-", label=label)
    left.set(
        title="noisy parabola", xlabel="batch / reference batch", ylabel="error of E[ζ]"
    )
    left.legend()
    samples = (np.arange(POINTS) + 0.5) / POINTS
    for index, (name, seeds) in enumerate(curves.items()):
        style = "--" if "no rule" in name else "-"
        color = f"C{(index + 1) // 2}"
        right.plot(samples, seeds.mean(0), style, color=color, label=name)
        right.fill_between(
            samples, seeds.min(0), seeds.max(0), color=color, alpha=0.15, lw=0
        )
    right.set(
        title="BYOL on digits",
        xlabel="share of the samples",
        ylabel="distance of teacher and student",
        ylim=(0, 1.4 * max(seeds.max() for seeds in curves.values())),
    )
    right.legend(ncols=2, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def train(config: Config) -> dict:
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if config.quick:
        config = dataclasses.replace(
            config,
            num_seeds=1,
            kappas=config.kappas.split(",")[0],
            most_paths_kappa=min(config.most_paths_kappa, 4),
        )

    # The parabola, exactly and by simulation.
    table = parabola_table(list(TABLE))
    print("largest error of a moment over the run, against κ = 1")
    print(f"{'κ':>5}  " + "  ".join(f"{name:>13}" for name in COLUMNS))
    for kappa, row in table.items():
        print(f"{kappa:5}  " + "  ".join(f"{value:13.3e}" for value in row))
    off = np.abs(np.array(list(table.values())) / np.array(list(TABLE.values())) - 1)
    kappas = [1, *(k for k in TABLE if k <= config.most_paths_kappa)]
    simulation = check_simulation(config, kappas)
    worst = max(row["standard_errors"] for row in simulation.values())
    print(f"simulated means of ζ within {worst:.1f} standard errors of the exact ones")

    # A real model.
    byol, curves = compare_byol(config)
    save_picture(workdir / "scale_ema.png", table, curves)

    with_rule = [row for name, row in byol.items() if name.endswith(", rule")]
    without = [row for name, row in byol.items() if name.endswith("no rule")]
    figures = {
        "parabola": {
            str(k): dict(zip(COLUMNS, r, strict=True)) for k, r in table.items()
        },
        "parabola_worst_deviation": float(off.max()),
        "simulation": simulation,
        "simulation_worst_standard_errors": worst,
        "byol": byol,
        "byol_rule_worst_deviation": max(
            max(row["ratio_highest"] - 1, 1 - row["ratio_lowest"]) for row in with_rule
        ),
        "byol_no_rule_smallest_ratio": min(row["ratio_lowest"] for row in without),
        "seconds": time.perf_counter() - started,
    }
    expected = {
        "parabola_worst_deviation": "at most 0.005: three digits",
        "simulation_worst_standard_errors": "at most 4",
        "byol_rule_worst_deviation": "at most 0.15, from a quarter of the samples on",
        "byol_no_rule_smallest_ratio": "at least 1.7, likewise",
    }
    ok = (
        figures["parabola_worst_deviation"] <= 0.005
        and worst <= 4
        and figures["byol_rule_worst_deviation"] <= 0.15
        and figures["byol_no_rule_smallest_ratio"] >= 1.7
    )
    return write_result(workdir, "scale_ema", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, train)
