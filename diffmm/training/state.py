"""The state of a training run: one pytree, everything a resumed run needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffmm._tree import named_leaves
from diffmm.typing import Array, Params


class TrainState(NamedTuple):
    """What a training step reads and returns.

    Attributes:
      step: int32 scalar, number of steps taken.
      params: any pytree of floating-point arrays.
      opt_state: state of the optax transformation.
      key: typed PRNG key (or uint32 key data) of the whole run. It never changes:
        step ``s`` draws from ``jax.random.fold_in(key, s)``.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """Builds the state at step 0.

    Args:
      params: any pytree whose leaves are floating-point arrays. Of a Flax NNX model
        pass the state of its `nnx.Param` variables only.
      optimizer: an optax transformation.
      key: PRNG key of the run.

    Returns:
      A `TrainState` with ``step`` 0.

    Raises:
      ValueError: if a leaf of ``params`` is not of a floating-point type.
    """
    for name, leaf in named_leaves(params).items():
        dtype = getattr(leaf, "dtype", type(leaf))
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params: leaf {name!r} has type {dtype}; only floating-point arrays "
                "can be trained (keep counters and keys out of params)"
            )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jnp.asarray(key) if not isinstance(key, jax.Array) else key,
    )
