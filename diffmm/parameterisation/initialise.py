"""Initial values of the target from the initialiser of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm._tree import map_with_name, named_leaves
from diffmm.parameterisation.leaf import Leaf
from diffmm.typing import Multiplier, Params


def rms_by_name(params: Params) -> dict[str, float]:
    """Root mean square of every leaf, as Python floats, by name."""
    return {
        name: float(jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(leaf, jnp.float32)))))
        for name, leaf in named_leaves(params).items()
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
    }


def rescale_init(
    params: Params,
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    base_rms: Mapping[str, float],
) -> Params:
    """Rescales freshly drawn parameters so that the initial variance transfers.

    Every leaf w of the target becomes ``w · rms_base · √init_variance / rms(w)``. What
    the target's own initialiser knew of width or depth (fan-in, 1/√(2·layers)) is
    thereby replaced by the rule, once; zeros stay zeros, and constants such as gains
    of one stay what they are unless a residual multiplier was absorbed into them.

    Args:
      params: fresh draw of the target model.
      leaves: of the target.
      multipliers: of the same names.
      base_rms: `rms_by_name` of a fresh draw of the base model, or analytic values.

    Returns:
      The same tree; a leaf whose factor is exactly 1 is returned as it came.

    Raises:
      ValueError: names without a base value; a leaf that starts at zero in the target
        but not in the base.
    """
    own = rms_by_name(params)
    absent = [n for n in own if n not in leaves or n not in multipliers]
    if absent:
        raise ValueError(f"multipliers: none for the leaves {absent}")

    def rescale(name: str, leaf: Any) -> Any:
        if name not in own:
            return leaf
        names = leaves[name].base_names or (name,)
        missing = [n for n in names if n not in base_rms]
        if missing:
            raise ValueError(f"base_rms: no value for {missing}, needed by {name!r}")
        base = float(np.sqrt(np.mean([base_rms[n] ** 2 for n in names])))
        if own[name] == 0.0:
            if base != 0.0:
                raise ValueError(
                    f"params: {name!r} starts at zero, in the base model at rms {base}"
                )
            return leaf
        ratio = base / own[name]
        variance = multipliers[name].init_variance
        if isinstance(variance, np.ndarray):
            return leaf * jnp.asarray(ratio * np.sqrt(variance), leaf.dtype)
        factor = ratio * float(variance) ** 0.5
        return leaf if factor == 1.0 else leaf * factor

    return map_with_name(rescale, params)


def init_std(
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    base_rms: Mapping[str, float],
) -> dict[str, Any]:
    """Standard deviations ``rms_base · √init_variance`` for initialisers of one's own.

    Returns:
      ``{name: float or array [layers, 1, ...]}``.
    """
    return {
        name: np.sqrt(np.mean([base_rms[n] ** 2 for n in leaf.base_names or (name,)]))
        * np.sqrt(multipliers[name].init_variance)
        for name, leaf in leaves.items()
    }


def scaled_forward(multipliers: Mapping[str, Multiplier], params: Params) -> Params:
    """Parameters multiplied by their ``forward`` factors.

    For models that cannot take multipliers, ``apply(scaled_forward(m, params))`` is the
    model with them: the effective weights ``W = a·w``.
    """

    def scale(name: str, leaf: jax.Array) -> jax.Array:
        a = multipliers[name].forward
        if isinstance(a, float) and a == 1.0:
            return leaf
        return leaf * jnp.asarray(a, leaf.dtype)

    return map_with_name(scale, params)
