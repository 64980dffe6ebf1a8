"""The abc-symmetry: a multiplier in the model, or inside the weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.typing import Factor, Multiplier


def _is_one(factor: Factor) -> bool:
    return isinstance(factor, (int, float)) and factor == 1.0


def absorb(
    multiplier: Multiplier, a: Factor, *, gradient_degree: int = 0
) -> Multiplier:
    """Moves a factor a of the model's forward pass into the weight itself.

    With W = a·w, training w and training W are the same function trajectory if::

        init_variance · a²,  learning_rate · a,  eps / a,  weight_decay / a (coupled)

    because the gradient of w is a times that of W. ``learning_rate · weight_decay``,
    the factor of independent decay, does not change.

    Args:
      multiplier: of w.
      a: positive; a number, or one per layer, shaped to broadcast against the leaf.
      gradient_degree: how the optimiser's update scales with the gradient: 0 for
        Adam, Lion, Muon; 1 for SGD, whose learning rate takes a² and decay a^-2.

    Returns:
      The multiplier of W, with ``forward`` divided by a.

    Raises:
      ValueError: if ``a`` is not positive and finite.
    """
    if not np.all(np.isfinite(a) & (np.asarray(a) > 0)):
        raise ValueError(f"a must be positive and finite, got {a!r}")
    if _is_one(a):
        return multiplier
    rate = a ** (1 + gradient_degree)
    return dataclasses.replace(
        multiplier,
        init_variance=multiplier.init_variance * a * a,
        forward=multiplier.forward / a,
        learning_rate=multiplier.learning_rate * rate,
        eps=multiplier.eps / a,
        weight_decay=multiplier.weight_decay / rate,
    )


def absorbed(
    multipliers: Mapping[str, Multiplier],
    leaves: Mapping[str, Leaf],
    *,
    gradient_degree: int = 0,
) -> dict[str, Multiplier]:
    """Absorbs every forward and residual multiplier: the model's code stays as it is.

    Residual branches are homogeneous in their last map, so that ``m_depth^-α`` goes
    into it, and a multiplier on the logits goes into the unembedding.

    Args:
      multipliers: of a rule.
      leaves: of the same names.
      gradient_degree: see `absorb`.

    Returns:
      Multipliers whose ``forward`` is 1 everywhere.

    Raises:
      ValueError: if an embedding is tied (one tensor with two roles cannot absorb the
        factor of one of them); names the leaf.
    """
    tied = [
        name
        for name, multiplier in multipliers.items()
        if leaves[name].role is Role.TIED_EMBEDDING and not _is_one(multiplier.forward)
    ]
    if tied:
        raise ValueError(
            f"multipliers: {tied} are tied embeddings; their factor on the logits "
            "cannot be absorbed, multiply the logits in the model"
        )
    return {
        name: dataclasses.replace(
            absorb(multiplier, multiplier.forward, gradient_degree=gradient_degree),
            forward=1.0,
        )
        for name, multiplier in multipliers.items()
    }


def absorbed_factors(
    multipliers: Mapping[str, Multiplier],
) -> dict[str, Any]:
    """The factors a that `absorbed` would absorb, for clipping by global norm.

    Clipping is not invariant under absorption: the gradient of W = a·w is that of w
    divided by a. Multiply it by a before the norm is taken.
    """
    factors = {name: multiplier.forward for name, multiplier in multipliers.items()}
    return {name: a for name, a in factors.items() if not _is_one(a)}
