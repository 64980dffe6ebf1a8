r"""Searches hyper-parameters of every module, and compares with the best global ones.

A small causal language model of English prose, by bytes, is tuned in the usual way:
learning rate, weight decay, then all seven global factors at once (learning rate,
weight decay, b1, b2, eps, initial scale, residual multiplier). From that point two
searches spend the same number of trainings: one goes on with the global factors, one
also has factors for each module type and layer. Fresh seeds say which is better, and
whether what was found still helps a model of twice the width and depth, to which
Complete^(d)P carries it.

    python examples/per_module_search.py --workdir=runs/per_module_search

About 15 minutes on 2 CPU cores, 2 with `--quick`. Expected: the per-module setting
beats the best global one by more than the standard deviation over seeds, and still
helps at twice the size; `--quick` spends too little for the first. A run that was
killed continues after its last generation of trials. Writes `card.json`, the setting
that was found, and `search.png`.

Paper: Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width,
Depth, Batch and Duration", arXiv 2512.22382.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.optim import AdamW, complement
from diffmm.parameterisation import (
    Card,
    CompletedP,
    PerModule,
    Space,
    TrustRegion,
    absorbed,
    evaluate,
    init_std,
    rescore,
    rms_by_name,
    should_stop,
)
from diffmm.training import (
    GracefulShutdown,
    Progress,
    option,
    run_from_flags,
    write_result,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import prose_trials

#: Global factors.
EVERY = ("learning_rate", "weight_decay", "b1", "b2", "eps", "init_std", "residual")

QUICK = {"steps": 80, "tuning_generations": 5, "generations": 8, "final_seeds": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run; each field is a flag."""

    workdir: str = option("runs/per_module_search", "where everything is written")
    seed: int = option(0, "of the searches")
    quick: bool = option(False, "a short version, to see it work")
    # Model and run.
    width: int = option(32, "of the model that is tuned")
    num_layers: int = option(2, "of the model that is tuned")
    head_dim: int = option(16, "heads are added with width")
    length: int = option(16, "bytes in a row")
    rows: int = option(16, "per step")
    steps: int = option(200, "per training")
    validation_rows: int = option(512, "the same for every training")
    # Tuning.
    learning_rate: float = option(4e-3, "lowest of the sweep, which goes by factors 2")
    sweep: int = option(5, "learning rates in it")
    weight_decays: str = option("0.1,1.0,3.0", "tried at the best learning rate")
    tuning_generations: int = option(20, "of the search for the start of both")
    generations: int = option(35, "of each search that is compared")
    generation: int = option(16, "trainings in one")
    by_type: str = option("learning_rate,init_std,residual", "factors by module type")
    by_depth: str = option("learning_rate", "factors by layer")
    top: int = option(2, "of each generation are trained again with new seeds")
    rescore_seeds: int = option(2, "how many new seeds")
    margin: float = option(0.3, "nats above the incumbent at which a training ends")
    segments: int = option(4, "parts of a training, after which it may end")
    # Comparison.
    final_seeds: int = option(8, "fresh seeds of each setting at each size")
    workers: int = option(0, "trainings at a time; 0 = processors")


class Leafwise(NamedTuple):
    """Hyper-parameters of every leaf as trees of arrays: inputs of the compiled run.

    Each array broadcasts against its leaf. `diffmm.optim.adamw` holds them as constants
    of the program, which is faster for one long run, and would compile for every trial.
    """

    init_std: Any
    learning_rate: Any
    eps: Any
    weight_decay: Any
    forget1: Any  # 1 − β₁
    forget2: Any


class Run(NamedTuple):
    """State of one training."""

    params: Any
    mu: Any
    nu: Any
    step: jax.Array


def adamw_step(leafwise: Leafwise, run: Run, grads: Any, scale: Any) -> Run:
    """AdamW with per-leaf hyper-parameters; ``scale`` is the schedule."""
    count = run.step + 1

    def corrected(moment, forget):
        return moment / -jnp.expm1(count * jnp.log1p(-forget))

    def move(p, m, v, rate, eps, decay, forget1, forget2):
        direction = corrected(m, forget1) / (jnp.sqrt(corrected(v, forget2)) + eps)
        return p - scale * rate * (direction + decay * p)

    def average(old, new, forget):
        return old + forget * (new - old)

    squares = jax.tree.map(jnp.square, grads)
    mu = jax.tree.map(average, run.mu, grads, leafwise.forget1)
    nu = jax.tree.map(average, run.nu, squares, leafwise.forget2)
    params = jax.tree.map(move, run.params, mu, nu, *leafwise[1:])
    return Run(params, mu, nu, count)


class Trainer:
    """Trainings of one model size, compiled once for all settings and seeds."""

    def __init__(self, config: Config, multiple: int, prose: prose_trials.Prose):
        """Derives leaves and multipliers of the base model ``multiple`` times as large.

        Args:
          config: of the experiment.
          multiple: of width and depth.
          prose: batches; each seed takes its own ``config.steps`` of them.
        """
        base = prose_trials.model_config(
            config.width, config.num_layers, config.head_dim
        )
        self.shape = dataclasses.replace(
            base,
            width=multiple * base.width,
            num_layers=multiple * base.num_layers,
        )
        self.leaves = prose_trials.leaves_between(base, self.shape)
        # The model's code has no multipliers: those of the branches go into weights.
        self.multipliers = absorbed(evaluate(CompletedP(), self.leaves), self.leaves)
        self.base_rms = rms_by_name(prose_trials.fresh(base, seed=0))
        self.segments = config.segments
        self.margin = config.margin
        self.prose = prose
        loss = prose_trials.make_loss(self.shape)
        per_segment, rest = divmod(config.steps, config.segments)
        if rest:
            raise ValueError(
                f"steps must be a multiple of segments={config.segments}, got "
                f"{config.steps}"
            )
        warmup = max(1, round(0.1 * config.steps))

        def start(leafwise: Leafwise, key: Any) -> Run:
            params = prose_trials.fresh(self.shape, jax.random.fold_in(key, 0))

            def rescale(leaf, std):
                return leaf * std * jax.lax.rsqrt(jnp.mean(leaf * leaf))

            params = jax.tree.map(rescale, params, leafwise.init_std)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return Run(params, zeros, zeros, jnp.zeros((), jnp.int32))

        def segment(leafwise: Leafwise, run: Run, key: Any, windows: Any) -> Any:
            order = jax.random.permutation(jax.random.fold_in(key, 1), len(windows))

            def step(run: Run, _: Any) -> Any:
                batch = windows[order[run.step]]
                value, grads = jax.value_and_grad(loss)(run.params, batch)
                done = run.step / config.steps
                cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
                scale = jnp.minimum((run.step + 1) / warmup, cosine)
                return adamw_step(leafwise, run, grads, scale), value

            return jax.lax.scan(step, run, length=per_segment)

        def score(params: Any, windows: Any) -> Any:
            return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), windows))

        self._start = jax.jit(start)
        self._segment = jax.jit(segment)
        self._score = jax.jit(score)

    def leafwise(self, hyper: AdamW, per_module: PerModule) -> Leafwise:
        """Every leaf's hyper-parameters: global · width and depth · per module."""
        multipliers = per_module.apply(
            self.leaves, self.multipliers, absorb_residual=True
        )
        std = init_std(self.leaves, multipliers, self.base_rms)
        columns = []
        for name, leaf in self.leaves.items():
            m = multipliers[name]
            values = (
                std[name],
                hyper.learning_rate * m.learning_rate,
                hyper.eps * m.eps,
                hyper.weight_decay * m.weight_decay * leaf.matrix,
                complement(hyper.b1, m.b1),
                complement(hyper.b2, m.b2),
            )
            ones = (1,) * len(leaf.shape)
            columns.append(
                [np.float32(value).reshape(np.shape(value) or ones) for value in values]
            )
        # Leaves come in the order of the tree.
        structure = jax.tree.structure(
            jax.eval_shape(lambda: prose_trials.fresh(self.shape, seed=0))
        )
        return Leafwise(
            *(structure.unflatten(column) for column in zip(*columns, strict=True))
        )

    def run(
        self,
        hyper: AdamW,
        per_module: PerModule,
        seed: int,
        incumbent: Sequence[float] | None = None,
    ) -> tuple[float, list[float]]:
        """Trains once.

        Args:
          hyper: global hyper-parameters at the base size.
          per_module: factors on top.
          seed: of initialisation and batches.
          incumbent: training losses of the best setting so far; the training ends
            early if it falls behind them.

        Returns:
          The validation loss, nats per byte (``inf`` if it ended early or diverged),
          and the training losses of the steps that were made.
        """
        key = jax.random.key(seed)
        leafwise = self.leafwise(hyper, per_module)
        run, losses = self._start(leafwise, key), []
        for _ in range(self.segments):
            run, values = self._segment(leafwise, run, key, self.prose.train)
            losses += np.asarray(values).tolist()
            if incumbent and should_stop(losses, incumbent, margin=self.margin):
                return math.inf, losses
        loss = float(self._score(run.params, self.prose.validation))
        return (loss if math.isfinite(loss) else math.inf), losses


class Record:
    """What a run knows so far, on disk after every change."""

    def __init__(self, path: pathlib.Path, config: Config):
        """Reads the file of an earlier run with the same configuration."""
        self._path = path
        fixed = dataclasses.asdict(config)
        del fixed["workdir"], fixed["workers"]
        self.data: dict[str, Any] = {"config": fixed}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if self.data["config"] != fixed:
                raise ValueError(
                    f"workdir: {path} belongs to a run with other options; choose "
                    "another workdir, or remove the file"
                )
            print(f"continuing from {path}")

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored value, or the computed one, stored."""
        if name not in self.data:
            self.put(name, compute())
        return self.data[name]

    def put(self, name: str, value: Any) -> None:
        """Stores a value, on disk too."""
        self.data[name] = value
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data), encoding="utf-8")
        temporary.replace(self._path)


def tune(config: Config, trainer: Trainer, parallel: Callable) -> dict[str, Any]:
    """Learning rate, then weight decay, each on two seeds."""

    def sweep(settings: list[AdamW]) -> tuple[AdamW, list[float]]:
        jobs = [(hyper, PerModule(), seed) for hyper in settings for seed in (0, 1)]
        losses = [loss for loss, _ in parallel(trainer.run, jobs)]
        means = np.reshape(losses, (-1, 2)).mean(axis=1)
        return settings[int(np.argmin(means))], means.tolist()

    decays = [float(x) for x in config.weight_decays.split(",")]
    first = AdamW(learning_rate=config.learning_rate, b2=0.95, weight_decay=decays[0])
    rates = [config.learning_rate * 2.0**i for i in range(config.sweep)]
    hyper, by_rate = sweep([dataclasses.replace(first, learning_rate=r) for r in rates])
    hyper, by_decay = sweep(
        [dataclasses.replace(hyper, weight_decay=d) for d in decays]
    )
    print(f"best learning rate {hyper.learning_rate:g}, decay {hyper.weight_decay:g}")
    return {
        "hyper": dataclasses.asdict(hyper),
        "by_learning_rate": dict(zip(map(str, rates), by_rate, strict=True)),
        "by_weight_decay": dict(zip(map(str, decays), by_decay, strict=True)),
    }


def search(
    config: Config,
    name: str,
    space: Space,
    start: PerModule,
    generations: int,
    trainer: Trainer,
    hyper: AdamW,
    parallel: Callable,
    record: Record,
    shutdown: GracefulShutdown,
) -> PerModule | None:
    """One search, saved after every generation; None if it was asked to stop."""
    region = TrustRegion(
        dimensions=len(space), seed=config.seed, generation=config.generation
    )
    new_seeds = range(1, 1 + config.rescore_seeds)

    def means(settings: Sequence[PerModule]) -> np.ndarray:
        jobs = [(hyper, setting, seed) for setting in settings for seed in new_seeds]
        losses = [loss for loss, _ in parallel(trainer.run, jobs)]
        return np.reshape(losses, (len(settings), -1)).mean(axis=1)

    if name not in record.data:
        _, curve = trainer.run(hyper, start, seed=0)
        state = region.init(means([start])[0], center=space.point(start))
        entry = {"losses": [state.loss], "curve": curve, "stopped_early": 0}
        record.put(name, {**entry, "state": region.to_json(state)})
    entry = dict(record.data[name])
    state = region.from_json(entry["state"])
    print(f"{name}: {len(space)} dimensions, from {entry['losses'][0]:.3f} nats")
    progress = Progress(generations, start_step=len(entry["losses"]) - 1)
    while len(entry["losses"]) <= generations:
        if shutdown.requested:
            return None
        state, trials = region.ask(state, config.generation)
        settings = [space.per_module(trial.point) for trial in trials]
        jobs = [(hyper, setting, 0, entry["curve"]) for setting in settings]
        first, curves = zip(*parallel(trainer.run, jobs), strict=True)
        told = rescore(
            first, config.top, lambda chosen, s=settings: means([s[i] for i in chosen])
        )
        before = state.loss
        state = region.tell(state, trials, told)
        if state.loss < before:
            entry["curve"] = curves[int(np.argmin(told))]
        entry["stopped_early"] += sum(
            len(curve) < config.steps or not math.isfinite(loss)
            for loss, curve in zip(first, curves, strict=True)
        )
        entry["losses"] = [*entry["losses"], state.loss]
        record.put(name, {**entry, "state": region.to_json(state)})
        progress.update(
            len(entry["losses"]) - 1, {name: state.loss, "radius": state.radius}
        )
    progress.close()
    return space.per_module(state.center)


def compare(
    trainer: Trainer,
    hyper: AdamW,
    settings: dict[str, PerModule],
    num_seeds: int,
    parallel: Callable,
) -> dict[str, list[float]]:
    """Validation losses by setting, over seeds that no search has seen."""
    jobs = [
        (hyper, setting, 1_000 + seed)
        for setting in settings.values()
        for seed in range(num_seeds)
    ]
    losses = np.reshape(
        [loss for loss, _ in parallel(trainer.run, jobs)], (-1, num_seeds)
    )
    return dict(zip(settings, losses.tolist(), strict=True))


def summarise(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Means, seed noise, and the paired gain of the per-module setting.

    The gain is over the better of the two global settings: a search that finds nothing
    new fits the seeds it is scored by, and may end a little worse than it began.
    """
    best = min(("global tuning", "global search"), key=lambda k: np.mean(losses[k]))
    gain = np.subtract(losses[best], losses["per-module search"])
    return {
        "mean_loss": {name: float(np.mean(values)) for name, values in losses.items()},
        "seed_noise": float(np.std(losses[best], ddof=1)),
        "best_global": best,
        "gain": float(np.mean(gain)),
        "gain_standard_error": float(np.std(gain, ddof=1) / math.sqrt(len(gain))),
    }


def save_picture(path: pathlib.Path, data: dict[str, Any], found: PerModule) -> None:
    """Incumbents over trainings, and the learning-rate factors that were found."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in ("global search", "per-module search"):
        left.plot(data[name]["losses"], drawstyle="steps-post", label=name)
    left.set_xlabel("generation")
    left.set_ylabel("loss of the incumbent, nats per byte")
    left.legend()
    factors = {
        module: named["learning_rate"]
        for module, named in found.type.items()
        if "learning_rate" in named
    }
    right.barh(list(factors), np.log2(list(factors.values())))
    right.invert_yaxis()
    right.set_xlabel("log2 of the factor on the learning rate")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def train(config: Config) -> dict:
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    record = Record(workdir / "search.json", config)
    prose = prose_trials.load_prose(
        length=config.length,
        rows=config.rows,
        steps=2 * config.steps,
        validation_rows=config.validation_rows,
    )
    trainer = Trainer(config, 1, prose)
    workers = config.workers or os.cpu_count() or 1
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        GracefulShutdown() as shutdown,
    ):

        def parallel(function: Callable, jobs: Sequence[tuple]) -> list:
            return list(pool.map(lambda job: function(*job), jobs))

        # The usual way, then two searches from there at equal budgets.
        tuned = record.once("tuning", lambda: tune(config, trainer, parallel))
        hyper = AdamW(**tuned["hyper"])
        by_global = Space.of(trainer.leaves, type=(), every=EVERY)
        by_module = Space.of(
            trainer.leaves,
            type=[name for name in config.by_type.split(",") if name],
            depth=[name for name in config.by_depth.split(",") if name],
            every=EVERY,
        )
        settings = {"learning rate and decay": PerModule()}
        for name, space, generations in (
            ("global tuning", by_global, config.tuning_generations),
            ("global search", by_global, config.generations),
            ("per-module search", by_module, config.generations),
        ):
            found = search(
                config,
                name,
                space,
                settings.get("global tuning", PerModule()),
                generations,
                trainer,
                hyper,
                parallel,
                record,
                shutdown,
            )
            if found is None:
                print("stopped; the same command continues")
                return {}
            settings[name] = found

        # What was found goes onto a card, and from the card to the larger model.
        tokens = config.rows * config.length
        Card(
            width=config.width,
            depth=config.num_layers,
            batch=tokens,
            tokens=tokens * config.steps,
            rule="CompletedP",
            options=dataclasses.asdict(CompletedP()),
            hyper=dataclasses.asdict(hyper),
            per_module=settings["per-module search"],
        ).save(workdir / "card.json")
        settings["per-module search"] = Card.load(workdir / "card.json").per_module
        sizes = {}
        for multiple, size in ((1, "same size"), (2, "twice the width and depth")):
            larger = trainer if multiple == 1 else Trainer(config, multiple, prose)
            sizes[size] = record.once(
                size,
                lambda larger=larger: compare(
                    larger, hyper, settings, config.final_seeds, parallel
                ),
            )
    save_picture(workdir / "search.png", record.data, settings["per-module search"])
    figures: dict[str, Any] = {name: summarise(x) for name, x in sizes.items()}
    here, there = figures.values()
    figures |= {
        "hyper": tuned["hyper"],
        "trainings_per_search": config.generations
        * (config.generation + config.top * config.rescore_seeds),
        "dimensions": {"global": len(by_global), "per module": len(by_module)},
        "stopped_early": {
            name: record.data[name]["stopped_early"]
            for name in ("global search", "per-module search")
        },
        "seconds": time.perf_counter() - started,
    }
    expected = {
        "same size": {"gain": "above seed_noise"},
        "twice the width and depth": {"gain": "above 2 gain_standard_error"},
    }
    ok = (
        here["gain"] > here["seed_noise"]
        and there["gain"] > 2 * there["gain_standard_error"]
    )
    return write_result(workdir, "per_module_search", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, train)
