"""Factors of leaves as the optimisers want them: checked, and found by name."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import optax

from diffmm._tree import path_name
from diffmm.typing import Factor, Multiplier

# What takes part in an update; a factor of zero freezes a leaf or spares it decay.
MAY_BE_ZERO = ("learning_rate", "weight_decay")


def checked(
    name: str, field: str, factor: Factor, argument: str = "multipliers"
) -> Factor:
    """A factor as a Python float, or as float64 array if layers differ.

    Raises:
      ValueError: naming leaf and field, if it is negative, zero where that has no
        meaning, or not finite.
    """
    values = np.asarray(factor, np.float64)
    zero = field in MAY_BE_ZERO
    if not np.all(np.isfinite(values) & ((values >= 0) if zero else (values > 0))):
        allowed = "not negative" if zero else "positive"
        raise ValueError(
            f"{argument}: {field} of leaf {name!r} must be finite and {allowed}, "
            f"got {factor!r}"
        )
    if values.size and np.all(values == values.flat[0]):
        return float(values.flat[0])
    return values


def check_multiplier(name: str, multiplier: Any) -> Multiplier:
    """Returns the multiplier, or raises a ValueError that names the leaf."""
    if not isinstance(multiplier, Multiplier):
        raise ValueError(
            f"multipliers: leaf {name!r} must have a Multiplier, got {multiplier!r}"
        )
    return multiplier


def check_shape(name: str, field: str, factor: Factor, leaf: Any) -> None:
    """Raises a ValueError unless the factor broadcasts against the leaf."""
    if isinstance(factor, float):
        return
    sizes = zip(factor.shape, leaf.shape, strict=False)
    if factor.ndim != leaf.ndim or any(n not in (1, size) for n, size in sizes):
        raise ValueError(
            f"multipliers: {field} of leaf {name!r} has shape {factor.shape}, which "
            f"must have the rank of the leaf {tuple(leaf.shape)} and its sizes or 1"
        )


def names_of(tree: Any, argument: str, given: Collection[str], *, all_of: bool) -> list:
    """Names of the leaves, in the tree's order, after comparing them with ``given``.

    Places that hold no array here (``optax.masked`` and ``optax.partition`` put a
    ``MaskedNode`` there, Equinox a ``None``) may have names in ``given`` all the same.

    Args:
      tree: parameters or gradients.
      argument: what ``given`` is called, for messages.
      given: names.
      all_of: whether every leaf must be among them.

    Raises:
      ValueError: listing leaves that ``given`` lacks, and names that match no leaf.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [path_name(path) for path, _ in paths]
    missing = [name for name in names if name not in given] if all_of else []
    surplus = [name for name in given if name not in set(names)]
    if surplus:
        places, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty_place)
        empty = [path_name(path) for path, leaf in places if is_empty_place(leaf)]
        surplus = [
            name
            for name in surplus
            if not any(
                place in ("", name) or name.startswith(f"{place}/") for place in empty
            )
        ]
    problems = []
    if missing:
        problems.append(f"no entry for the leaves {missing}")
    if surplus:
        problems.append(f"entries that match no leaf: {sorted(surplus)}")
    if problems:
        raise ValueError(f"{argument}: {'; '.join(problems)}")
    return names


def is_empty_place(leaf: Any) -> bool:
    """Whether a tree has no array here because another part of it is in use."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def has_empty_places(tree: Any) -> bool:
    """Whether the tree is a part of a larger one."""
    leaves = jax.tree.leaves(tree, is_leaf=is_empty_place)
    return any(is_empty_place(leaf) for leaf in leaves)


def in_dtype(value: Factor, dtype: Any) -> Any:
    """Python floats stay weakly typed; arrays take the type, so nothing is promoted."""
    return value if isinstance(value, float) else value.astype(dtype)


def is_one(factor: Factor) -> bool:
    """Whether a checked factor changes nothing."""
    return isinstance(factor, float) and factor == 1.0


def log_of_complement(complement: Factor) -> Factor:
    """The logarithm of β, from 1 − β; finite for β = 0, where β^count must vanish."""
    clipped = np.minimum(complement, 1 - 1e-16)
    return (
        math.log1p(-float(clipped))
        if isinstance(complement, float)
        else np.log1p(-clipped)
    )
