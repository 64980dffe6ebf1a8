r"""Is a run at a quarter or four times the batch the same experiment?

Trains a tiny tri-modal masked diffusion model on the same number of tokens at physical
batches of ¼, 1 and 4 times the base, with the SDE rule for all hyper-parameters and
without it, and lays the loss curves over each other, against tokens.

    python examples/batch_invariance.py --workdir=runs/batch

About 10 minutes on 2 CPU cores (--quick: 2). Expected: with the rule the final
validation loss is within 3 % of the base's at every batch; without it, it is not. A run
that was killed continues: every training run is saved.

Papers: Bethune et al., "The Design Space of Tri-Modal Masked Diffusion Models", arXiv
2602.21472; Malladi et al., arXiv 2205.10287.
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
from flax import nnx

from diffmm.data import make_loader
from diffmm.diffusion import BernoulliMasking, normalise, schedule_by_name
from diffmm.models import Denoiser
from diffmm.optim import averaged_params
from diffmm.training import (
    init_state,
    make_train_step,
    option,
    run_from_flags,
    write_atomically,
    write_result,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import train_trimodal
import trimodal_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of the experiment; each field is a flag."""

    workdir: str = option("runs/batch", "where curves, plot and result go")
    quick: bool = option(False, "one seed and a quarter of the tokens")
    kappas: str = option("0.25,1,4", "batches relative to the base; 1 among them")
    seeds: int = option(3, "initialisations and data orders")
    base_batch: int = option(8, "rows per step of the base")
    steps: int = option(2_000, "steps of the base run")
    width: int = option(64, "of the model: trimodal-tiny, narrower")
    learning_rate: float = option(1e-3, "peak at the base")
    ema: float = option(0.99, "decay of the averaged weights at the base")
    points: int = option(40, "points of a loss curve")
    validation_rows: int = option(256, "of each task")


def run(config: Config) -> dict[str, Any]:
    if config.quick:
        config = dataclasses.replace(config, seeds=1, steps=config.steps // 4)
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    kappas = [float(kappa) for kappa in config.kappas.split(",")]
    if 1.0 not in kappas:
        raise ValueError(f"kappas must contain 1, the base, got {config.kappas!r}")
    runs = train_all(config, kappas, workdir)
    figures = summarise(config, kappas, runs)
    figures["minutes"] = (time.perf_counter() - started) / 60
    plot(config, kappas, runs, workdir / "batch_invariance.png")
    expected = {
        "with_rule": {"largest_deviation": "<= 0.03"},
        "without_rule": {"largest_deviation": "> 0.03"},
    }
    ok = (
        figures["with_rule"]["largest_deviation"] <= 0.03
        and figures["without_rule"]["largest_deviation"] > 0.03
    )
    return write_result(workdir, "batch_invariance", figures, expected, ok)


def train_all(config: Config, kappas: list[float], workdir: pathlib.Path) -> dict:
    """``{(rule, kappa, seed): {"curve": [points], "final": nats, "ema": nats}}``."""
    store = workdir / "runs.json"
    identity = dataclasses.asdict(config) | {"workdir": "", "kappas": "", "seeds": 0}
    saved = json.loads(store.read_text()) if store.exists() else {}
    if saved.get("config") != identity:
        saved = {"config": identity, "runs": {}}
    settings = train_trimodal.Config(
        preset="trimodal-tiny", width=config.width, learning_rate=config.learning_rate
    )
    data = train_trimodal.load_data(settings)
    shape = train_trimodal.model_config(settings, data)
    del settings
    runs = {}
    for rule in (True, False):
        for kappa in kappas:
            if not rule and kappa == 1.0:
                continue  # the rule is the identity there
            for seed in range(config.seeds):
                name = f"{'rule' if rule else 'none'} {kappa:g} {seed}"
                if name not in saved["runs"]:
                    found = train(config, data, shape, kappa, rule, seed)
                    saved["runs"][name] = found
                    write_atomically(store, json.dumps(saved))
                runs[rule, kappa, seed] = saved["runs"][name]
                print(f"{name}: {saved['runs'][name]['final']:.4f}", flush=True)
    for seed in range(config.seeds):
        runs[False, 1.0, seed] = runs[True, 1.0, seed]
    return runs


def train(
    config: Config, data: Any, shape: Any, kappa: float, rule: bool, seed: int
) -> dict[str, Any]:
    """One run; without the rule, base hyper-parameters serve at every batch."""
    batch = round(config.base_batch * kappa)
    settings = dataclasses.replace(
        train_trimodal.Config(),
        learning_rate=config.learning_rate,
        # A threshold would cut off more of the noisier gradients of small batches.
        clip=0.0,
        decay_gains=False,
        ema=config.ema,
        steps=config.steps,
        base_batch=config.base_batch,
        base_steps=config.steps,
        physical_batch=batch,
        # A logical batch equal to the physical one leaves everything as it is.
        logical_batch=0 if rule else batch,
        seed=seed,
    )
    plan = trimodal_optimizer.make_plan(settings, shape)
    model = Denoiser(plan.shape, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    process = BernoulliMasking(schedules=schedule_by_name("linear"), times="segment")
    mask_id = data.vocabulary.mask_id
    nll = train_trimodal.make_nll(graphdef, mask_id)
    loss_fn = train_trimodal.make_loss(nll, process, mask_id)
    optimizer = plan.optimizer()
    state = init_state(params, optimizer, jax.random.key(seed))
    step = jax.jit(
        make_train_step(loss_fn, optimizer, prepare=normalise), donate_argnums=0
    )
    shares = train_trimodal.parse_shares(settings.shares)
    loader = make_loader(data.rows("train"), shares, batch_size=batch, seed=seed)
    sums = []
    for _ in range(plan.num_steps):
        state, metrics = step(state, next(loader))
        sums.append((metrics["nats"].sum(), metrics["count"].sum()))
    loader.close()
    # Nats over tokens of many steps. A mean of the steps' losses would weigh rows of
    # few tokens more in small batches, because each step divides by its own tokens.
    window = max(1, plan.num_steps // config.points)
    sums = np.array(jax.device_get(sums))[: plan.num_steps // window * window]
    nats, count = sums.reshape(-1, window, 2).sum(axis=1).T
    curve = nats / count
    score = make_score(config, data, loss_fn)
    return {
        "curve": curve.tolist(),
        "final": score(state.params),
        "ema": score(averaged_params(state.opt_state, like=state.params)),
        "steps": plan.num_steps,
        "plan": str(plan),
    }


def make_score(config: Config, data: Any, loss_fn: Any) -> Any:
    """Validation bound, nats per maskable token, the same masks for every model."""
    shares = train_trimodal.parse_shares(train_trimodal.Config().shares)
    loader = make_loader(data.rows("validation"), shares, batch_size=64, seed=0)
    batches = [
        normalise(next(loader)) for _ in range(max(1, config.validation_rows // 64))
    ]
    loader.close()

    @jax.jit
    def loss_of(params: Any, batch: Any, key: Any) -> Any:
        return loss_fn(params, batch, key, np.arange(64, dtype=np.int32), 64)[0]

    def score(params: Any) -> float:
        keys = jax.random.split(jax.random.key(11), len(batches))
        return float(
            np.mean([loss_of(params, b, k) for b, k in zip(batches, keys, strict=True)])
        )

    return score


def summarise(config: Config, kappas: list[float], runs: dict) -> dict[str, Any]:
    """Final losses, means over seeds, and their deviation from the base."""
    figures: dict[str, Any] = {"plans": {}}
    for rule, name in ((True, "with_rule"), (False, "without_rule")):
        values = {
            kind: {
                kappa: [runs[rule, kappa, seed][kind] for seed in range(config.seeds)]
                for kappa in kappas
            }
            for kind in ("final", "ema")
        }
        base = np.mean(values["final"][1.0])
        deviation = {
            f"{kappa:g}": float(np.mean(found) / base - 1)
            for kappa, found in values["final"].items()
        }
        ema_base = np.mean(values["ema"][1.0])
        figures[name] = {
            "final": {f"{k:g}": v for k, v in values["final"].items()},
            "averaged_weights": {f"{k:g}": v for k, v in values["ema"].items()},
            "deviation": deviation,
            "largest_deviation": max(map(abs, deviation.values())),
            "deviation_of_averaged_weights": {
                f"{k:g}": float(np.mean(v) / ema_base - 1)
                for k, v in values["ema"].items()
            },
        }
        figures["plans"][name] = {f"{k:g}": runs[rule, k, 0]["plan"] for k in kappas}
    figures["seed_spread"] = float(
        np.std([runs[True, 1.0, seed]["final"] for seed in range(config.seeds)])
    )
    return figures


def plot(config: Config, kappas: list[float], runs: dict, path: pathlib.Path) -> None:
    """Loss curves against tokens, with the rule and without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, rule in zip(axes, (True, False), strict=True):
        colours = plt.cm.viridis(np.linspace(0, 0.85, len(kappas)))
        for kappa, colour in zip(kappas, colours, strict=True):
            for seed in range(config.seeds):
                curve = np.array(runs[rule, kappa, seed]["curve"])
                share = (np.arange(len(curve)) + 0.5) / len(curve)
                label = f"{kappa:g} of the base batch" if seed == 0 else None
                panel.plot(share, curve, color=colour, label=label, lw=1, alpha=0.8)
        panel.set_title("with the rule" if rule else "base hyper-parameters everywhere")
        panel.set_xlabel("share of the tokens")
        panel.legend()
    axes[0].set_ylabel("training loss, nats per token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_from_flags(Config, run)
