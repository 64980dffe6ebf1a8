"""Inside a kernel: products, the sigmoid, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffmm_kernels.sigmoid_attention import activation
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import At, Problem

# It moved in jax 0.11.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal


def multiply(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Product of two matrices, accumulated in float32."""
    # Explicit, since the process-wide default may ask of bfloat16 what it cannot.
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def probabilities(problem: Problem, refs: dict[str, Any], at: At, masked: bool) -> Any:
    """A tile of ``p``, float32, 0 where invisible."""
    axis, options = problem.query_axis, problem.options
    q, k = refs["q"][...], refs["k"][...]
    s = multiply(q, k, (1, 1)) if axis == 0 else multiply(k, q, (1, 1))
    sigma, unit = _activation(problem)
    head = at.b * problem.heads + at.h
    bias = refs["bias"][head] * unit if "bias" in refs else options.bias * unit
    z = s * (options.scale * unit) + bias
    if "slopes" in refs:
        distance = _position(problem, refs, at) - _key(problem, at)
        if options.right != 0:
            distance = jnp.maximum(distance, -distance)
        z = z - (refs["slopes"][head] * unit) * distance.astype(jnp.float32)
    if "logit_bias" in refs:
        z = z + refs["logit_bias"][...] * unit
    p = sigma(z)
    seen = _visible(problem, refs, at) if masked else None
    return p if seen is None else jnp.where(seen, p, 0.0)


def _activation(problem: Problem) -> tuple[Callable[[Any], Any], float]:
    """σ, and what its argument is multiplied by."""
    precision = problem.options.precision
    if precision == "fast":
        return activation.tanh_sigmoid, 0.5
    if precision == "default" and problem.dtype == jnp.bfloat16:
        return _newton_sigmoid, -activation.LOG2_E
    # Accurate to rounding, small p included.
    return lambda z: 1.0 / (1.0 + jnp.exp2(z)), -activation.LOG2_E


def _newton_sigmoid(z: Any) -> Any:
    """``1 / (1 + 2^z)`` by the unit's own reciprocal and one step of Newton's.

    The error of the reciprocal is squared: 8 bits become 16. The compiler's reciprocal
    takes the same step and then sorts out cases that do not occur here. The two
    transcendental operations have a slot of their own in an instruction; with one, and
    `POLYNOMIAL_4`, the slots of the additions are what limits the kernel.
    """
    # Finite, since infinity times the reciprocal 0 is not a number.
    x = jnp.minimum(1.0 + jnp.exp2(z), jnp.finfo(jnp.float32).max)
    r = _reciprocal(x, approx=True)
    return r * (2.0 - x * r)


def _iota(problem: Problem, side: int) -> Any:
    axis = side if problem.query_axis == 0 else 1 - side
    shape = [1, 1]
    shape[axis] = problem.shape[axis]
    return jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis)


def _row(problem: Problem, at: At) -> Any:
    return _iota(problem, 0) + at.q_tile * problem.block_q


def _key(problem: Problem, at: At) -> Any:
    return _iota(problem, 1) + at.kv_tile * problem.block_kv


def _position(problem: Problem, refs: dict[str, Any], at: At) -> Any:
    if "positions" in refs:
        return refs["positions"][...]
    return _row(problem, at) + problem.options.q_offset


def _visible(problem: Problem, refs: dict[str, Any], at: At) -> Any:
    """bool, of the shape of the tile; None where all is visible."""
    options = problem.options
    conditions = []
    if (options.left, options.right) != (None, None):
        distance = _position(problem, refs, at) - _key(problem, at)
        if options.left is not None:
            conditions.append(distance <= options.left)
        if options.right is not None:
            conditions.append(distance >= -options.right)
    if "q_lengths" in refs:
        conditions.append(_row(problem, at) < refs["q_lengths"][at.b])
    if "kv_lengths" in refs:
        conditions.append(_key(problem, at) < refs["kv_lengths"][at.b])
    if "q_ids" in refs:
        conditions.append(refs["q_ids"][...] == refs["kv_ids"][...])
    if "mask" in refs:
        conditions.append(refs["mask"][...].astype(jnp.int32) != 0)
    seen = None
    for condition in conditions:
        condition = jnp.broadcast_to(condition, problem.shape)
        seen = condition if seen is None else seen & condition
    return seen
