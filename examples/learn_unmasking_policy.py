r"""Learns which positions to unmask when, and compares with all heuristics.

1. A toy on which the order of confidence is exactly wrong, with its exact denoiser:
   groups of positions that look safe and are not, free ones that look risky and are
   not. Two forwards suffice; the quickest heuristic that is always right takes 13. A
   policy is trained from each of four seeds.
2. A transformer is trained to complete equations (``12=_+_;``), then policies around it
   at two prices of a forward. Every sampler of the library is swept over its settings:
   accuracy against forwards, as one picture with the Pareto frontiers. The policies
   then run, as they are, on rows of twice the length and with another denoiser.

    python examples/learn_unmasking_policy.py --workdir=runs/learn_unmasking_policy

About 15 minutes on 2 CPU cores, with `--quick` one or two. Expected: on the toy each
seed's best parameters are right on 98 % of 4,096 prompts or more, in 3 forwards or
fewer; on the equations the policy lies on or above the frontier of the heuristics. A
policy on the toy first treats all positions of a group alike, with a reward of 0.63; it
leaves this plateau when it notices that they differ in place. Large batches, of 96
prompts, and progress that is forced in training as it is in use show it within some 60
batches. With 32 prompts, a rate of 1e-3 and plain Bernoulli actions it took 60 to 160
batches for seeds 0, 1 and 2, and seed 3 had not left after 375. On the equations the
policy starts as an imitation of the entropy-bounded sampler; from scratch it stayed
below that sampler.

Writes `policies.png`, `samplers.json` and a file of 70 kB for each policy.

Paper: Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
2512.09106.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diffmm.policies import (
    Objective,
    Policy,
    PolicyConfig,
    PolicyRule,
    Recipe,
    Training,
    TrainResult,
    imitate,
    init,
    multiplicative_reward,
    prompts_and_completions,
    rollout,
    save_policy,
    train_policy,
)
from diffmm.samplers import (
    KLASS,
    Ancestral,
    EntropyBounded,
    Factor,
    FixedQuota,
    Frechet,
    Rule,
    Settings,
    Threshold,
    sample,
    score_from_name,
)
from diffmm.training import option, run_from_flags, write_atomically, write_result
from diffmm.typing import Canvas

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import unmasking_arithmetic as arithmetic
import unmasking_toy as toy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run; each field is a flag."""

    workdir: str = option("runs/learn_unmasking_policy", "where everything is written")
    quick: bool = option(False, "a short version, to see it work")
    seed: int = option(0, "first of the toy's seeds; also of everything else")
    # Policies: one small transformer block.
    width: int = option(32, "of the policy")
    group_size: int = option(8, "rollouts of each prompt")
    epsilon: float = option(0.5, "ratios are clipped to 1 ± this")
    learning_rate: float = option(2e-3, "Adam")
    # Toy.
    toy_seeds: int = option(4, "policies trained")
    toy_updates: int = option(120, "batches of rollouts")
    toy_prompts: int = option(96, "prompts in a batch")
    toy_test: int = option(4096, "prompts to test on")
    # Equations.
    denoiser_width: int = option(48, "of the first denoiser; the second has 64")
    denoiser_steps: int = option(800, "optimiser steps of each denoiser")
    denoiser_rows: int = option(64, "per step, of six equations each")
    alphas: str = option("1", "prices of a forward, one policy for each")
    imitation_steps: int = option(
        600, "of the warm start, on an entropy-bounded sampler"
    )
    updates: int = option(150, "batches of rollouts")
    prompts: int = option(64, "prompts in a batch")
    test: int = option(512, "prompts to test on")


QUICK = {
    "toy_seeds": 1,
    "toy_updates": 30,
    "toy_prompts": 32,
    "toy_test": 512,
    "denoiser_steps": 60,
    "denoiser_rows": 16,
    "alphas": "1",
    "imitation_steps": 40,
    "updates": 3,
    "prompts": 4,
    "test": 32,
}


def policy_config(config: Config) -> PolicyConfig:
    width = config.width
    return PolicyConfig(width=width, mlp_hidden=2 * width, time_width=width)


def training(config: Config, alpha: float) -> Training:
    """Adam at a constant rate, two steps per batch of rollouts.

    Progress is forced in training as it is in use: policies that start too slow to
    complete a row would wait long for their first reward.
    """
    return Training(
        objective=Objective(
            group_size=config.group_size,
            epsilon=config.epsilon,
            mode="bernoulli-argmax",
        ),
        recipe=Recipe(learning_rate=config.learning_rate, warmup=0, weight_decay=0.0),
        alpha=alpha,
    )


def reporter(name: str, total: int) -> Callable[[dict[str, float]], None]:
    """A callback that prints a line now and then."""
    started = time.perf_counter()

    def report(row: dict[str, float]) -> None:
        done = int(row["batch"]) + 1
        if done % max(total // 8, 1) == 0:
            pace = (time.perf_counter() - started) / done
            print(
                f"{name}  batch {done:4}/{total}  reward {row['running_reward']:.3f}  "
                f"right {row['correct']:.2f}  forwards {row['nfe_mean']:4.1f}  "
                f"{pace:.3f} s each",
                flush=True,
            )

    return report


# Part 1. The toy.


def toy_rows(config: Config, seed: int) -> Iterator[Canvas]:
    rng = np.random.default_rng(seed)
    for _ in range(config.toy_updates):
        yield toy.prompts(rng, config.toy_prompts)


def train_toy(config: Config, seed: int) -> TrainResult:
    return train_policy(
        toy.predict,
        None,
        toy_rows(config, seed),
        toy.reward,
        jax.random.key(seed),
        mask_id=toy.MASK,
        allowed=toy.ALLOWED,
        config=policy_config(config),
        training=training(config, alpha=1.0),
        directory=pathlib.Path(config.workdir) / f"toy_{seed}",
        on_batch=reporter(f"toy, seed {seed}", config.toy_updates),
    )


def run_toy(config: Config) -> tuple[dict[str, Any], list[list[float]]]:
    """Figures of every seed and of the heuristics, and the rewards while training."""
    canvas = toy.prompts(np.random.default_rng(1_000_000), config.toy_test)

    def score(rule: Rule) -> dict[str, float]:
        return measure(toy, None, canvas, rule, jax.random.key(config.seed))

    heuristics = {
        "threshold 0.9": score(Threshold(threshold=0.9)),
        "top-1": score(FixedQuota(num_steps=16)),
        "top-2": score(FixedQuota(num_steps=8)),
        "entropy-bounded 0.69": score(EntropyBounded(gamma=0.69)),
    }
    seeds, curves = {}, []
    for seed in range(config.seed, config.seed + config.toy_seeds):
        started = time.perf_counter()
        result = train_toy(config, seed)
        seconds = (time.perf_counter() - started) / config.toy_updates
        rule = PolicyRule(params=result.best, config=policy_config(config))
        half = dataclasses.replace(rule, policy_temperature=0.5)
        rewards = [row["reward"] for row in result.history]
        seeds[str(seed)] = {
            **score(rule),
            "at_temperature_0.5": score(half),
            "best_reward": result.best_reward,
            "last_reward": float(np.mean(rewards[-10:])),
            "seconds_per_update": seconds,
        }
        curves.append(rewards)
        print(f"toy, seed {seed}: {seeds[str(seed)]}", flush=True)
    return {"seeds": seeds, "heuristics": heuristics}, curves


# Part 2. Equations.


def measure(
    problem: Any, params: Any, canvas: Canvas, rule: Rule, key: jax.Array, predict=None
) -> dict[str, float]:
    """Accuracy and forwards of a rule with greedy tokens."""
    result = sample(
        problem.predict if predict is None else predict,
        params,
        canvas,
        key,
        rule=rule,
        mask_id=problem.MASK,
        allowed=problem.ALLOWED,
        settings=Settings(temperature=0.0),
    )
    right = problem.reward(*prompts_and_completions(canvas, result.tokens))
    return {
        "accuracy": float(np.mean(right)),
        "nfe": float(np.mean(result.nfe)),
    }


def heuristics(length: int, quick: bool) -> dict[str, dict[str, Rule]]:
    """Samplers by name, and each at a sweep of its settings."""
    steps = sorted({1, 2, 3, 4, 5, 6, 8, length // 2, length})
    sweeps: dict[str, dict[str, Rule]] = {
        f"top-k by {name}": {
            f"{n} steps": FixedQuota(num_steps=n, score=score_from_name(name))
            for n in steps
        }
        for name in ("max_prob", "margin", "entropy", "random", "position")
    }
    sweeps["ancestral"] = {f"{n} steps": Ancestral(num_steps=n) for n in steps}
    levels = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    sweeps["threshold"] = {f"{x}": Threshold(threshold=x) for x in levels}
    factors = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    sweeps["factor"] = {f"{x}": Factor(factor=x) for x in factors}
    sweeps["Fréchet"] = {f"{x}": Frechet(factor=x) for x in factors}
    bounds = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 8.0)
    sweeps["entropy-bounded"] = {f"{x}": EntropyBounded(gamma=x) for x in bounds}
    sweeps["KLASS"] = {
        f"{x}, h {h}": KLASS(confidence=x, kl=0.1, history=h)
        for x in (0.1, 0.3, 0.6, 0.9)
        for h in (1, 2)
    }
    kept = ("top-k by max_prob", "threshold")
    return {k: v for k, v in sweeps.items() if not quick or k in kept}


def knobs(policies: dict[str, Policy]) -> dict[str, dict[str, Rule]]:
    """Policies at several temperatures and β."""
    return {
        f"policy, alpha {alpha}": {
            f"temperature {tau}, beta {beta}": policy.rule(
                policy_temperature=tau, beta=beta
            )
            for tau in (0.5, 1.0)
            for beta in (0.25, 0.5, 1.0, 2.0)
        }
        for alpha, policy in policies.items()
    }


def compare(
    predict: Any, params: Any, canvas: Canvas, rules: dict[str, dict[str, Rule]], seed
) -> dict[str, dict[str, dict[str, float]]]:
    """Every rule at every setting; one compilation for each sampler."""
    table = {}
    for name, sweep in rules.items():
        table[name] = {
            label: measure(
                arithmetic, params, canvas, rule, jax.random.key(seed), predict
            )
            for label, rule in sweep.items()
        }
        print(f"  {name}: {summary(table[name])}", flush=True)
    return table


def summary(sweep: dict[str, dict[str, float]]) -> str:
    points = sorted((row["nfe"], row["accuracy"]) for row in sweep.values())
    return "  ".join(f"{nfe:.1f}:{accuracy:.2f}" for nfe, accuracy in points)


def points(table: dict, policies: bool) -> list[tuple[float, float]]:
    """(forwards, accuracy) of all policies, or of all others."""
    return [
        (row["nfe"], row["accuracy"])
        for name, sweep in table.items()
        for row in sweep.values()
        if name.startswith("policy") == policies
    ]


def frontier(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both respects, by rising cost.

    >>> frontier([(2.0, 0.5), (1.0, 0.1), (3.0, 0.4), (4.0, 0.9)])
    [(1.0, 0.1), (2.0, 0.5), (4.0, 0.9)]
    """
    best: list[tuple[float, float]] = []
    for cost, value in sorted(found, key=lambda p: (p[0], -p[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def margins(table: dict) -> dict[str, float]:
    """How the frontier of the policies lies to that of the heuristics.

    At each corner of the policies' frontier, their accuracy minus the best of a
    heuristic that is as quick; and the forwards that heuristics take to be as accurate
    as the most accurate policy, over its own.
    """
    own, others = frontier(points(table, True)), points(table, False)
    gaps = [
        value - max((v for c, v in others if c <= cost + 1e-6), default=0.0)
        for cost, value in own
    ]
    cost, value = own[-1]
    as_good = [c for c, v in others if v >= value - 1e-6]
    return {
        "smallest_margin": float(min(gaps)),
        "largest_margin": float(max(gaps)),
        "best_policy_nfe": cost,
        "best_policy_accuracy": value,
        "best_heuristic_accuracy": max(v for _, v in others),
        "speedup_at_equal_accuracy": min(as_good) / cost if as_good else float("inf"),
    }


def equation_rows(config: Config, seed: int) -> Iterator[Canvas]:
    rng = np.random.default_rng(seed)
    for _ in range(config.updates):
        yield arithmetic.prompts(rng, config.prompts)


def warm_start(config: Config, predict: Any, params: Any, alpha: float) -> Any:
    """Parameters of a policy that imitates the best entropy bound for a price."""
    canvas = arithmetic.prompts(np.random.default_rng(config.seed), config.test)
    length = int(canvas.generate.sum(axis=1).max())

    def reward(rule: Rule) -> float:
        found = measure(
            arithmetic, params, canvas, rule, jax.random.key(config.seed), predict
        )
        return float(
            multiplicative_reward(found["accuracy"], found["nfe"], length, alpha)
        )

    rules = [EntropyBounded(gamma=x) for x in (0.3, 0.5, 1.0, 1.5, 2.0)]
    best = max(rules, key=reward)
    trace = rollout(
        predict,
        params,
        canvas,
        jax.random.key(config.seed),
        rule=best,
        mask_id=arithmetic.MASK,
        allowed=arithmetic.ALLOWED,
    ).trace
    assert trace is not None
    steps = config.imitation_steps
    recipe = Recipe(
        learning_rate=3e-3,
        warmup=steps // 20,
        decay_steps=steps,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    policy = policy_config(config)
    started, losses = imitate(
        init(jax.random.key(config.seed), policy),
        policy,
        trace,
        jax.random.key(config.seed + 1),
        num_steps=steps,
        recipe=recipe,
    )
    print(f"imitating {best}: {float(losses[-20:].mean()):.3f} nats", flush=True)
    return started


def run_equations(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and what is drawn."""
    denoisers = {}
    for name, width, seed in (
        ("first", config.denoiser_width, config.seed),
        ("second", 64, config.seed + 1),
    ):
        started = time.perf_counter()
        predict, params, loss = arithmetic.train_denoiser(
            width=width,
            num_layers=2,
            steps=config.denoiser_steps,
            rows=config.denoiser_rows,
            seed=seed,
        )
        denoisers[name] = predict, params
        seconds = time.perf_counter() - started
        print(f"{name} denoiser: {loss:.4f} nats per token, {seconds:.0f} s")
    predict, params = denoisers["first"]
    policies, curves = {}, {}
    for alpha in config.alphas.split(","):
        result = train_policy(
            predict,
            params,
            equation_rows(config, config.seed),
            arithmetic.reward,
            jax.random.key(config.seed),
            mask_id=arithmetic.MASK,
            allowed=arithmetic.ALLOWED,
            config=policy_config(config),
            training=training(config, float(alpha)),
            params=warm_start(config, predict, params, float(alpha)),
            directory=pathlib.Path(config.workdir) / f"equations_alpha_{alpha}",
            on_batch=reporter(f"equations, alpha {alpha}", config.updates),
        )
        policies[alpha] = Policy(result.best, policy_config(config), {})
        save_policy(
            pathlib.Path(config.workdir) / f"policy_alpha_{alpha}.npz",
            *policies[alpha][:2],
            metadata={"alpha": float(alpha), "task": "equations"},
        )
        curves[f"alpha {alpha}"] = [row["reward"] for row in result.history]
    rng = np.random.default_rng(1_000_000)
    near = arithmetic.prompts(rng, config.test)
    far = arithmetic.prompts(rng, config.test, arithmetic.EQUATIONS)
    tables = {}
    for name, who, canvas in (
        ("as trained", "first", near),
        ("twice the length", "first", far),
        ("another denoiser", "second", near),
    ):
        print(f"{name}: forwards:accuracy")
        length = int(canvas.generate.sum(axis=1).max())
        rules = {**heuristics(length, config.quick), **knobs(policies)}
        tables[name] = compare(*denoisers[who], canvas, rules, config.seed)
    figures = {name: margins(table) for name, table in tables.items()}
    return figures, {"tables": tables, "curves": curves}


def save_picture(path: pathlib.Path, toy_curves: list, drawn: dict) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    tables = drawn["tables"]
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
        for index, (name, sweep) in enumerate(table.items()):
            own = name.startswith("policy")
            where = sorted((row["nfe"], row["accuracy"]) for row in sweep.values())
            axis.plot(
                *zip(*where, strict=True),
                linestyle="none",
                marker="*" if own else "o",
                markersize=11 if own else 4,
                color=f"C{index % 10}" if not own else ["black", "red"][index % 2],
                label=name,
                zorder=3 if own else 2,
            )
        for own, style in ((False, ":"), (True, "-")):
            axis.step(
                *zip(*frontier(points(table, own)), strict=True),
                where="post",
                color="black" if own else "gray",
                linestyle=style,
                linewidth=1,
            )
        axis.set(
            title=f"equations, {title}", xlabel="forwards", ylabel="accuracy",
            xscale="log", ylim=(-0.03, 1.03),
        )  # fmt: skip
    axes[0, 0].legend(fontsize=7)
    axis = axes[1, 1]
    for seed, rewards in enumerate(toy_curves):
        axis.plot(rewards, color="C0", alpha=0.5, label="toy" if not seed else None)
    for index, (name, rewards) in enumerate(drawn["curves"].items()):
        axis.plot(rewards, color=f"C{index + 1}", label=f"equations, {name}")
    axis.set(title="training", xlabel="batch of rollouts", ylabel="reward")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def train(config: Config) -> dict:
    started = time.perf_counter()
    if config.quick:
        config = dataclasses.replace(config, **QUICK)
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    toy_figures, toy_curves = run_toy(config)
    equations, drawn = run_equations(config)
    write_atomically(
        workdir / "samplers.json", json.dumps(drawn["tables"], indent=1) + "\n"
    )
    save_picture(workdir / "policies.png", toy_curves, drawn)
    seeds = toy_figures["seeds"].values()
    noise = 2 * 0.5 * (2 / config.test) ** 0.5
    figures = {
        "toy": toy_figures,
        "toy_worst_accuracy": min(row["accuracy"] for row in seeds),
        "toy_most_nfe": max(row["nfe"] for row in seeds),
        "toy_lowest_reward": min(row["best_reward"] for row in seeds),
        "equations": equations,
        "seconds": time.perf_counter() - started,
    }
    if config.quick:
        expected = {"toy_lowest_reward": "at least 0.45; the best heuristic has 0.281"}
        ok = figures["toy_lowest_reward"] >= 0.45
    else:
        expected = {
            "toy_worst_accuracy": "at least 0.98",
            "toy_most_nfe": "at most 3; heuristics as accurate take 13 or more",
            "equations": f"smallest_margin as trained at least -{noise:.3f}, two "
            "standard deviations of a difference",
        }
        ok = (
            figures["toy_worst_accuracy"] >= 0.98
            and figures["toy_most_nfe"] <= 3
            and equations["as trained"]["smallest_margin"] >= -noise
        )
    return write_result(workdir, "learn_unmasking_policy", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, train)
