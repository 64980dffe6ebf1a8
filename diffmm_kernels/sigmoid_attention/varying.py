"""Inside `jax.shard_map`: one type for all operands of a call.

There the type of an array says over which axes of the mesh its values vary. What a loop
carries, and what a custom backward pass returns, must have the types of what it stands
for. Both come out right when all operands vary over the same axes; JAX turns the
cotangent of the cast into the sum over devices that an operand common to them needs.
Loops must start from `jnp.zeros_like(operand, shape=..., dtype=...)`, which carries the
type over, rather than from `jnp.zeros`.
"""

from __future__ import annotations

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
    """Names of the mesh axes over which ``x`` varies; none outside of `shard_map`."""
    aval = jax.typeof(x)
    axes = getattr(aval, "manual_axis_type", None)
    return frozenset(aval.vma if axes is None else axes.varying)


def uniformly_varying(tree: Any) -> Any:
    """``tree`` with all arrays varying over the axes that any of them varies over."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def result_struct(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """What a kernel declares of a result that varies over the axes of ``like``."""
    aval = jax.typeof(like)
    axes = getattr(aval, "manual_axis_type", None)
    keyword: dict[str, Any] = (
        {"vma": aval.vma} if axes is None else {"manual_axis_type": axes}
    )
    return jax.ShapeDtypeStruct(shape, dtype, **keyword)
