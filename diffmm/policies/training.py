"""Reinforcement learning of a policy around a frozen denoiser.

References:
  Jazbec et al., "Learning Unmasking Policies for Diffusion Language Models", arXiv
  2512.09106.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.policies.checkpoint import save_policy, write_atomically
from diffmm.policies.grpo import Experience, PolicyState, update
from diffmm.policies.network import PolicyConfig, init
from diffmm.policies.objective import Objective, advantages
from diffmm.policies.optimizers import Recipe, optimizer_of
from diffmm.policies.replay import concatenate_traces
from diffmm.policies.rewards import REWARDS, RewardFn, check_alpha
from diffmm.policies.rollouts import prompts_and_completions, repeat_rows, rollout
from diffmm.policies.rule import PolicyRule, check_params
from diffmm.samplers import Rule, SampleResult, Threshold
from diffmm.typing import Array, Canvas, Params, PredictFn

# A reward varies within a group if it differs by more than rounding.
_SAME = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is rewarded, and how it is learned.

    Attributes:
      objective: groups, ratios, the law of actions.
      recipe: of the optimiser.
      alpha: α ≥ 0, weight of speed. The result does not follow it smoothly: try 0.3
        and 1 before larger ones, and scale by β or the policy's temperature
        afterwards.
      reward: ``"multiplicative"`` or ``"additive"`` (for comparison only).
      expert: sampler of the expert rollouts, if the objective has any.
      expert_block_length: positions per block of the expert.
      window: batches over whose mean reward the best parameters are chosen.
      save_every: batches between two savings.
    """

    objective: Objective = dataclasses.field(default_factory=Objective)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    alpha: float = 0.3
    reward: str = "multiplicative"
    expert: Rule = dataclasses.field(default_factory=Threshold)
    expert_block_length: int | None = None
    window: int = 10
    save_every: int = 25

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        check_alpha(self.alpha)
        if self.reward not in REWARDS:
            raise ValueError(
                f"reward must be one of {sorted(REWARDS)}, got {self.reward!r}"
            )
        for name in ("window", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)!r}"
                )


class TrainResult(NamedTuple):
    """Outcome of `train_policy`.

    Attributes:
      best: parameters with the best mean reward over the last ``window`` batches.
      final: parameters after the last update; often worse.
      best_reward: that mean.
      best_batch: index of the last batch in it.
      history: metrics of every batch.
    """

    best: Params
    final: Params
    best_reward: float
    best_batch: int
    history: list[dict[str, float]]


def train_policy(
    predict: PredictFn,
    denoiser_params: Params,
    prompts: Iterable[Canvas],
    reward: RewardFn,
    key: Array,
    *,
    mask_id: int,
    config: PolicyConfig | None = None,
    training: Training | None = None,
    params: Params | None = None,
    block_length: int | None = None,
    directory: os.PathLike[str] | str | None = None,
    on_batch: Callable[[dict[str, float]], None] | None = None,
    **options: Any,
) -> TrainResult:
    """Trains a policy by group-relative policy optimisation.

    Each batch of prompts is completed G times by the policy (and E times by the
    expert), rewarded, and learned from in μ optimiser steps that never run the
    denoiser. The reward often falls again late in training: use ``best``.

    Args:
      predict: the denoiser.
      denoiser_params: its parameters; they stay as they are.
      prompts: batches to learn from, one per update; all of one shape compile once.
        Training ends with them.
      reward: how right completions are; see `diffmm.policies.RewardFn`. Positions that
        were left masked hold the mask id.
      key: of the initial parameters and of all rollouts.
      mask_id: the mask.
      config: of the network.
      training: what is rewarded, and how it is learned.
      params: to start from, such as those of `diffmm.policies.imitate`.
      block_length: positions per block of the policy; one block by default.
      directory: keeps ``best.npz``, ``last.npz`` and ``history.jsonl``, renewed every
        ``training.save_every`` batches, and also when training is cut short.
      on_batch: called with the metrics of every batch.
      **options: others of `diffmm.policies.rollout`.

    Returns:
      `TrainResult`. Metrics of a batch, of the policy's rollouts as they came: reward,
      correct, nfe_mean, nfe_min, nfe_max, still_masked, zero_variance (share of groups
      whose rewards are equal), expert_reward and expert_advantage (with experts),
      running_reward, num_updates (optimiser steps so far), and those of `update`.

    Raises:
      ValueError: for anything out of range, naming the argument.
    """
    config = PolicyConfig() if config is None else config
    training = Training() if training is None else training
    if config.num_inputs != 1:
        raise ValueError(
            f"num_inputs must be 1 in training: a trace keeps the largest probability "
            f"of each position alone, got {config.num_inputs}"
        )
    objective = training.objective
    if objective.num_experts:
        if not config.full_context:
            raise ValueError(
                "num_experts must be 0 for a policy without full_context: experts are "
                f"imitated on the whole canvas, got {objective.num_experts}"
            )
        training.expert.check(1, 1 << 30)
    init_key, key = jax.random.split(key)
    if params is None:
        params = init(init_key, config)
    check_params(params, config)
    params = jax.tree.map(jnp.array, params)  # updates give their arrays away
    optimizer = optimizer_of(training.recipe)
    state = PolicyState(params, optimizer.init(params), jnp.int32(0))
    history: list[dict[str, float]] = []
    recent: collections.deque[float] = collections.deque(maxlen=training.window)
    keeper = _Keeper(directory, config, training)
    try:
        for index, canvas in enumerate(prompts):
            rollout_key, expert_key = jax.random.split(jax.random.fold_in(key, index))
            rule = PolicyRule(
                params=state.params,
                config=config,
                mode=objective.mode,  # type: ignore[arg-type]
                policy_temperature=objective.policy_temperature,
            )
            everyone = repeat_rows(canvas, objective.group_size)
            result = rollout(
                predict,
                denoiser_params,
                everyone,
                rollout_key,
                rule=rule,
                mask_id=mask_id,
                block_length=block_length,
                **options,
            )
            own = _Scored(everyone, result, reward, training)
            rewards = own.rewards.reshape(-1, objective.group_size)
            metrics = own.metrics()
            metrics["zero_variance"] = float((np.ptp(rewards, axis=1) < _SAME).mean())
            trace = result.trace
            assert trace is not None
            if objective.num_experts:
                copies = repeat_rows(canvas, objective.num_experts)
                expert = rollout(
                    predict,
                    denoiser_params,
                    copies,
                    expert_key,
                    rule=training.expert,
                    mask_id=mask_id,
                    block_length=training.expert_block_length,
                    **options,
                )
                assert expert.trace is not None
                trace = concatenate_traces(trace, expert.trace)
                theirs = _Scored(copies, expert, reward, training).rewards
                theirs = theirs.reshape(-1, objective.num_experts)
                gap = theirs - np.concatenate([rewards, theirs], axis=1).mean(
                    axis=1, keepdims=True
                )
                metrics["expert_reward"] = float(theirs.mean())
                metrics["expert_advantage"] = float(gap.mean())
                rewards = np.concatenate([rewards, theirs], axis=1)
            recent.append(metrics["reward"])
            running = float(np.mean(recent))
            # These parameters are the ones that earned the newest of the rewards.
            keeper.see(index, running, len(recent) == training.window, state.params)
            state, learned = _learn(
                state,
                config,
                objective,
                training.recipe,
                block_length,
                trace,
                rewards,
            )
            metrics |= {name: float(value) for name, value in learned.items()}
            metrics["running_reward"] = running
            metrics["num_updates"] = float(state.num_updates)
            metrics["batch"] = float(index)
            history.append(metrics)
            if (index + 1) % training.save_every == 0:
                keeper.save(state.params, history)
            if on_batch is not None:
                on_batch(metrics)
    finally:
        keeper.save(None, history)
    if not history:
        raise ValueError("prompts must hold at least one batch, got none")
    keeper.save(state.params, history)
    return TrainResult(keeper.best, state.params, keeper.reward, keeper.batch, history)


@functools.partial(
    jax.jit,
    static_argnames=("config", "objective", "recipe", "block_length"),
    donate_argnames=("state",),
)
def _learn(
    state: PolicyState,
    config: PolicyConfig,
    objective: Objective,
    recipe: Recipe,
    block_length: int | None,
    trace: Any,
    rewards: Array,
) -> tuple[PolicyState, dict[str, Array]]:
    gain = advantages(rewards)
    split = objective.group_size
    rows = [gain[:, :split].reshape(-1), gain[:, split:].reshape(-1)]
    experience = Experience(
        trace=trace,
        advantage=jnp.concatenate(rows),
        is_expert=jnp.arange(gain.size) >= rows[0].size,
    )
    optimizer = optimizer_of(recipe)
    return update(
        state, config, experience, objective, optimizer, block_length=block_length
    )


class _Scored:
    """Rollouts and what they earned."""

    def __init__(
        self, canvas: Canvas, result: SampleResult, reward: RewardFn, training: Training
    ) -> None:
        correct = reward(*prompts_and_completions(canvas, result.tokens))
        self.correct = np.asarray(correct, np.float32)
        self.nfe = np.asarray(result.nfe)
        self.still_masked = np.asarray(result.still_masked)
        if self.correct.shape != self.nfe.shape:
            raise ValueError(
                f"reward must return shape {self.nfe.shape}, one number per row, got "
                f"{self.correct.shape}"
            )
        if not np.isfinite(self.correct).all():
            row = int(np.argmin(np.isfinite(self.correct)))
            raise ValueError(
                f"reward must be finite, got {self.correct[row]} at row {row}"
            )
        length = np.maximum(np.asarray(canvas.generate).sum(axis=1), 1)
        combine = REWARDS[training.reward]
        self.rewards = np.asarray(
            combine(self.correct, self.nfe, length, training.alpha)
        )

    def metrics(self) -> dict[str, float]:
        return {
            "reward": float(self.rewards.mean()),
            "correct": float(self.correct.mean()),
            "nfe_mean": float(self.nfe.mean()),
            "nfe_min": float(self.nfe.min()),
            "nfe_max": float(self.nfe.max()),
            "still_masked": float(self.still_masked.mean()),
        }


class _Keeper:
    """Remembers the best parameters and writes everything down."""

    def __init__(
        self,
        directory: os.PathLike[str] | str | None,
        config: PolicyConfig,
        training: Training,
    ) -> None:
        self.folder = None if directory is None else pathlib.Path(directory)
        self.config, self.training = config, training
        self.best: Params = None
        self.reward, self.batch = -np.inf, -1
        self.full = False

    def see(self, index: int, running: float, full: bool, params: Params) -> None:
        # A mean of fewer batches is as good as there is until the window fills.
        if running > self.reward or (full and not self.full):
            self.best = jax.tree.map(jnp.copy, params)
            self.reward, self.batch = running, index
        self.full = full

    def save(
        self, params: Params | None, history: Sequence[Mapping[str, float]]
    ) -> None:
        if self.folder is None or self.best is None:
            return
        found = {"reward": self.reward, "batch": self.batch}
        metadata = {"alpha": self.training.alpha, "length": len(history)}
        for name, tree in (("best", self.best), ("last", params)):
            if tree is not None:
                extra = found if name == "best" else {}
                save_policy(
                    self.folder / f"{name}.npz",
                    tree,
                    self.config,
                    metadata={**metadata, **extra},
                )
        lines = "".join(json.dumps(dict(row)) + "\n" for row in history)
        write_atomically(self.folder / "history.jsonl", lines.encode())
