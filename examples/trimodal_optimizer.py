"""The optimiser of the main example: hyper-parameters of a base run, carried over.

Everything is given as it was tuned on a base model (width, depth) and run (batch,
duration). Width and depth become factors per leaf, batch and duration one κ for all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig
from diffmm.optim import (
    AdamW,
    Budget,
    TokenSchedule,
    WarmupCosine,
    adamw,
    by_steps,
    ema_params,
    kappa,
    logical_batch,
    mask_by_name,
    reparameterise,
)
from diffmm.parameterisation import Card, CompletedP, Leaf, evaluate, explain, infer
from diffmm.typing import Multiplier


class Plan(NamedTuple):
    """What a run needs beyond its loss.

    Attributes:
      shape: the model, its residual branches multiplied by m_depth^-α.
      leaves: its parameters, seen from the base model.
      multipliers: of their hyper-parameters.
      hyper: global hyper-parameters at the run's batch and duration.
      kappa: physical over logical batch.
      logical_batch: rows at which the base hyper-parameters are right for this run.
      num_steps: optimiser steps.
      decayed: names of the leaves that weight decay acts on.
      schedule: multiplier of the peak, on the clock of rows.
      physical_batch: rows per step.
      card: base and hyper-parameters, to be saved beside checkpoints.
    """

    shape: TransformerConfig
    leaves: Mapping[str, Leaf]
    multipliers: Mapping[str, Multiplier]
    hyper: AdamW
    kappa: float
    logical_batch: float
    num_steps: int
    decayed: tuple[str, ...]
    schedule: TokenSchedule
    physical_batch: int
    card: Card

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, AdamW with per-leaf hyper-parameters, and the average if any."""
        parts: list[Any] = []
        if self.hyper.clip is not None:
            parts.append(optax.clip_by_global_norm(self.hyper.clip))
        parts.append(
            adamw(
                self.hyper,
                self.multipliers,
                schedule=by_steps(self.schedule, self.physical_batch),
                mask=mask_by_name(self.decayed),
            )
        )
        if self.hyper.ema is not None:
            parts.append(ema_params(self.hyper.ema))
        return optax.chain(*parts)

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the card and the table of multipliers."""
        self.card.save(workdir / "scale.json")
        table = explain(CompletedP(), self.leaves, self.multipliers)
        (workdir / "multipliers.txt").write_text(table + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """One line: what became of the hyper-parameters."""
        return (
            f"κ = {self.kappa:.4g} ({self.physical_batch} rows a step for "
            f"{self.logical_batch:.4g} logical ones): learning rate "
            f"{self.hyper.learning_rate:.4g}, betas {self.hyper.b1:.4g} and "
            f"{self.hyper.b2:.4g}, weight decay {self.hyper.weight_decay:.4g}, "
            f"ε {self.hyper.eps:.3g}"
            + (f", EMA {self.hyper.ema:.6g}" if self.hyper.ema is not None else "")
        )


def make_plan(config: Any, shape: TransformerConfig) -> Plan:
    """Carries the hyper-parameters of the base over to a run.

    Args:
      config: fields ``learning_rate weight_decay clip warmup ema`` at the base, and
        ``decay_gains``; ``base_width base_num_layers`` (0 = those of ``shape``);
        ``base_batch`` rows and ``base_steps``; ``steps``, the length of the run in
        steps of ``base_batch`` rows; ``physical_batch`` rows; ``logical_batch`` rows
        (0 = base_batch · (steps / base_steps)^horizon); ``horizon``.
      shape: the model to be trained.

    Returns:
      A `Plan`; at the base itself every hyper-parameter is what ``config`` says.
    """
    small = dataclasses.replace(
        shape,
        width=config.base_width or shape.width,
        num_layers=config.base_num_layers or shape.num_layers,
    )
    rule = CompletedP()
    twice = dataclasses.replace(
        small, width=2 * small.width, num_layers=2 * small.num_layers
    )
    leaves = infer(_parameters, small, shape, family=(small, twice))
    residual = (small.num_layers / shape.num_layers) ** rule.alpha
    shape = dataclasses.replace(
        shape, attention_residual=residual, mlp_residual=residual
    )

    base = Budget(batch=config.base_batch, tokens=config.base_batch * config.base_steps)
    total = config.base_batch * config.steps
    num_steps = max(1, round(total / config.physical_batch))
    hyper = AdamW(
        learning_rate=config.learning_rate,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=config.weight_decay,
        clip=config.clip or None,
        ema=config.ema or None,
    )
    if config.logical_batch:
        # The given batch replaces the rule of the horizon.
        base = Budget(batch=config.logical_batch, tokens=total)
    target = Budget(batch=config.physical_batch, tokens=total)
    horizon = config.horizon
    run = Budget(batch=config.physical_batch, tokens=num_steps * config.physical_batch)
    return Plan(
        shape=shape,
        leaves=leaves,
        multipliers=evaluate(rule, leaves),
        hyper=reparameterise(hyper, base, target, horizon=horizon),
        kappa=kappa(base, target, horizon),
        logical_batch=logical_batch(base, total, horizon),
        num_steps=num_steps,
        decayed=tuple(
            name for name, leaf in leaves.items() if leaf.matrix or config.decay_gains
        ),
        schedule=TokenSchedule(
            shape=WarmupCosine(warmup=config.warmup), tokens=run.tokens
        ),
        physical_batch=config.physical_batch,
        card=Card(
            width=small.width,
            depth=small.num_layers,
            batch=base.batch,
            tokens=base.tokens,
            rule="CompletedP",
            options=dataclasses.asdict(rule),
            hyper=dataclasses.asdict(hyper),
        ),
    )


def _parameters(shape: TransformerConfig) -> Any:
    return nnx.state(Denoiser(shape, rngs=nnx.Rngs(jax.random.key(0))), nnx.Param)
