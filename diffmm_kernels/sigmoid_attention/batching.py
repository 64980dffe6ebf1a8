"""One rule for `jax.vmap`: the mapped axis joins the batch.

Kernels then need no batching rule of their own, and bounds of loops stay scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from diffmm_kernels.sigmoid_attention.arguments import Gradients, Operands

# Their batch axis may be 1 for all rows.
_BROADCAST = ("mask", "logit_bias")


def _join(name: str, x: Any, batched: bool, size: int, b: int, expand: bool) -> Any:
    """``[size, b, ...]`` or ``[b, ...]`` to ``[size · b, ...]``."""
    if x is None or (not batched and x.shape[0] != b and not expand):
        return x
    x = x if batched else x[None]
    inner = x.shape[2:]
    if name in _BROADCAST:
        x = jnp.broadcast_to(x, (x.shape[0], b, *inner))
    return jnp.broadcast_to(x, (size, b, *inner)).reshape(size * b, *inner)


def _join_operands(
    operands: Operands, batched: Operands, size: int, expand: bool
) -> Operands:
    b = operands.k.shape[1] if batched.k else operands.k.shape[0]
    return Operands(
        **{
            name: _join(name, x, bool(getattr(batched, name)), size, b, expand)
            for name, x in operands._asdict().items()
        }
    )


def foldable_forward(forward: Callable[[Operands], Any]) -> Callable[[Operands], Any]:
    """``forward(operands) -> [B, ...]`` with the rule."""
    call = custom_vmap(forward)

    @call.def_vmap
    def rule(size: int, batched: Any, operands: Operands) -> Any:
        o = call(_join_operands(operands, batched[0], size, expand=False))
        return o.reshape(size, -1, *o.shape[1:]), True

    return call


def foldable_backward(
    backward: Callable[[Operands, Any], Gradients],
) -> Callable[[Operands, Any], Gradients]:
    """``backward(operands, do) -> Gradients`` with the rule."""
    call = custom_vmap(backward)

    @call.def_vmap
    def rule(size: int, batched: Any, operands: Operands, do: Any) -> Any:
        # Each element of the mapped axis has its own gradient of a shared logit bias.
        expand = operands.logit_bias is not None
        joined = _join_operands(operands, batched[0], size, expand)
        b = joined.q.shape[0] // size
        gradients = call(joined, _join("do", do, bool(batched[1]), size, b, False))
        split = jax.tree.map(lambda x: x.reshape(size, b, *x.shape[1:]), gradients)
        if split.logit_bias is not None:
            axis = 1 if batched[0].logit_bias else 0
            if operands.logit_bias.shape[axis] == 1 and b > 1:
                summed = split.logit_bias.sum(1, keepdims=True)
                split = split._replace(logit_bias=summed)
        return split, jax.tree.map(lambda _: True, split)

    return call
