"""Gradient clipping that a parameterisation does not change."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from diffmm._tree import map_with_name
from diffmm.optim import _leaves, validate
from diffmm.typing import Array, Factor


def clip_by_absorbed_norm(
    max_norm: float, absorbed: Mapping[str, Factor]
) -> optax.GradientTransformation:
    """Clips by the global norm that gradients had before factors were absorbed.

    A forward multiplier a may live inside the weight, W = a·w. The gradient of w was a
    times that of W, so that clipping by the norm of what the optimiser sees would
    change the training. This takes the norm over a·∂W and scales all gradients alike;
    it equals ``optax.clip_by_global_norm`` of the model with explicit multipliers.

    Args:
      max_norm: threshold, positive.
      absorbed: ``{name of the leaf: a}``, of the leaves that absorbed a factor; a
        number, or an array over stacked layers that broadcasts against the leaf.

    Returns:
      A transformation without state, to be chained before `adamw`.

    Raises:
      ValueError: at once if an argument is not positive and finite; in ``update`` if
        names match no leaf or an array does not broadcast.
    """
    max_norm = validate.positive("max_norm", max_norm)
    factors = {
        name: _leaves.checked(name, "absorbed", factor, argument="absorbed")
        for name, factor in absorbed.items()
    }

    def update(updates, state, params=None):
        del params
        _leaves.names_of(updates, "absorbed", factors, all_of=False)

        def unabsorbed(name: str, gradient: Array) -> Array:
            factor = factors.get(name, 1.0)
            _leaves.check_shape(name, "absorbed", factor, gradient)
            if _leaves.is_one(factor):
                return gradient
            return jnp.asarray(_leaves.in_dtype(factor, gradient.dtype) * gradient)

        norm = optax.tree.norm(map_with_name(unabsorbed, updates))

        def clip(gradient: Array) -> Array:
            scaled = (gradient / norm.astype(gradient.dtype)) * max_norm
            return jax.lax.select(norm < max_norm, gradient, scaled)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
