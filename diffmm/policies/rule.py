"""A learned policy as one more selection rule of the samplers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.policies.actions import Mode, act, check_mode, log_prob
from diffmm.policies.network import PolicyConfig, apply, init
from diffmm.samplers import Prediction, Rule, Selection, Window, uniform_per_position
from diffmm.typing import Array, ArrayLike, Params

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyRule(Rule):
    """Commits what a policy decides.

    The policy sees the confidences of all generated positions of its row, which are
    still masked, and the share n/L of forwards used; it acts in the current block. With
    ``config.full_context`` off it sees the current block alone.

    It works with any denoiser, length, block length, cache and guidance. Its parameters
    and numbers are traced: a sweep, or a training run, compiles once.

    Attributes:
      params: of the network.
      config: of the network.
      mode: how actions are drawn. ``"bernoulli"`` may commit nothing and needs
        ``max_forwards``; it is what policies are trained with. ``"bernoulli-argmax"``
        forces the best position then. ``"dpls"`` picks in order.
      policy_temperature: τ > 0 that divides the logits, not that of the tokens. Below
        1, decisions approach those of s > ½.
      beta: β > 0 that multiplies probabilities: speed against accuracy, without
        training again. Bernoulli only.
      stop_logit: of STOP, ``"dpls"`` only.
    """

    params: Params
    config: PolicyConfig = dataclasses.field(metadata=_STATIC)
    mode: Mode = dataclasses.field(default="bernoulli-argmax", metadata=_STATIC)
    policy_temperature: ArrayLike | float = 1.0
    beta: ArrayLike | float = 1.0
    stop_logit: ArrayLike | float = 0.0

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        """Whether every forward commits something."""
        return self.mode != "bernoulli"

    @property
    def sees_canvas(self) -> bool:  # type: ignore[override]
        """Whether the policy looks beyond the block."""
        return self.config.full_context

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        """Whether the policy looks at more than the largest probability."""
        return self.config.num_inputs > 1

    def check(self, num_blocks: int, vocabulary_size: int) -> None:
        """Refuses bad numbers, and parameters of another network."""
        check_mode(self.mode, self.policy_temperature, self.beta, self.stop_logit)
        if not self.config.probabilities:
            raise ValueError(
                "config.probabilities must be True for a rule: the loop hands out "
                "probabilities and no other features"
            )
        if self.config.num_inputs > vocabulary_size:
            raise ValueError(
                f"num_inputs must not exceed the vocabulary, {vocabulary_size}, got "
                f"{self.config.num_inputs}"
            )
        check_params(self.params, self.config)

    def select(
        self, key: Array, window: Window, prediction: Prediction, aux: tuple[()]
    ) -> Selection:
        """Draws an action from the policy's logits."""
        size = window.masked.shape[0]
        confidence = prediction.statistics.max_prob[:, None]
        if self.config.num_inputs > 1:
            assert prediction.logits is not None
            law = jax.nn.softmax(prediction.logits, axis=-1)
            confidence = jax.lax.top_k(law, self.config.num_inputs)[0]
        full = self.config.full_context
        logits = apply(
            self.params,
            self.config,
            window.remaining[None],
            confidence[None],
            policy_time(window.turn, window.count)[None],
            exists=(window.exists if full else window.exists & window.valid)[None],
        )[0]
        first, later, stop = jax.random.split(key, 3)
        uniforms = (
            uniform_per_position(first, window),
            uniform_per_position(later, window)
            if self.mode == "dpls"
            else jnp.zeros((size,)),
            jax.random.uniform(stop, ()),
        )
        numbers: dict[str, Any] = {
            "mode": self.mode,
            "policy_temperature": self.policy_temperature,
            "beta": self.beta,
            "stop_logit": self.stop_logit,
        }
        action = act(uniforms, logits, window.masked, **numbers)
        return Selection(
            commit=action > 0,
            score=logits,
            aux=aux,
            action=action,
            log_likelihood=log_prob(logits, action, window.masked, **numbers),
        )


def policy_time(turn: Array, count: Array) -> Array:
    """n/L: forwards used over generated positions, float32, in [0, 1)."""
    return turn.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)


def check_params(params: Params, config: PolicyConfig) -> None:
    """Raises ``ValueError`` with every parameter that is missing, extra or misshapen.

    Args:
      params: a tree of arrays.
      config: of the network that they should fit.
    """
    expected = jax.eval_shape(lambda: init(jax.random.key(0), config))
    want, have = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (expected, params)
    )
    problems = [f"{name} is missing" for name in want.keys() - have.keys()]
    problems += [f"{name} is unknown" for name in have.keys() - want.keys()]
    problems += [
        f"{name} has shape {have[name]} instead of {want[name]}"
        for name in want.keys() & have.keys()
        if want[name] != have[name]
    ]
    if problems:
        raise ValueError(
            "params must fit the config of the policy: " + "; ".join(sorted(problems))
        )
