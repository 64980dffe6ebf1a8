"""A training state as a flat dictionary of named arrays, and back, bit by bit.

Names instead of containers make a checkpoint independent of the tree's classes
(Flax state, dictionaries, named tuples), and let every mismatch be named.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm._tree import path_name
from diffmm.typing import Array


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"state: several leaves share the name {twice}")
    return named


def flatten(state: Any) -> dict[str, Any]:
    """``{name: array}`` with PRNG keys as their uint32 data."""
    flat = {}
    for name, leaf in _named(state).items():
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if leaf.size:  # the storage format has no empty arrays
            flat[name] = leaf
    return flat


def describe(state: Any) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every leaf, as JSON; works on shapes without arrays too."""
    described: dict[str, dict[str, Any]] = {}
    for name, leaf in _named(state).items():
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if isinstance(leaf, jax.Array) and _is_key(leaf):
            described[name]["impl"] = str(jax.random.key_impl(leaf))
    return described


def check_structure(saved: Mapping[str, Any], like: Any, where: str) -> None:
    """Raises a ValueError that names what differs between a checkpoint and a state."""
    current = describe(like)
    missing = [name for name in current if name not in saved]
    surplus = [name for name in saved if name not in current]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if surplus:
        problems.append(f"it has {_some(surplus)}, unknown to the state")
    for name in current:
        if name in saved:
            ours, theirs = current[name], saved[name]
            if (ours["shape"], ours["dtype"]) != (theirs["shape"], theirs["dtype"]):
                problems.append(
                    f"leaf {name!r} is {theirs['dtype']}{theirs['shape']} there and "
                    f"{ours['dtype']}{ours['shape']} here"
                )
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"checkpoint {where} is of another model or optimiser: {shown}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def _placed(leaf: Any) -> bool:
    """Whether the restored leaf must take over a sharding.

    Arrays that were never put on chosen devices stay free, so that a computation
    over a mesh accepts them after a restore as it did before.
    """
    if isinstance(leaf, jax.Array):
        return leaf.committed
    return getattr(leaf, "sharding", None) is not None


def restore_targets(like: Any) -> dict[str, Any]:
    """What to ask the reader for: sharded arrays, or NumPy for unplaced ones."""
    targets: dict[str, Any] = {}
    for name, leaf in _named(like).items():
        if _placed(leaf) and not _is_key(leaf):
            targets[name] = jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            )
        else:
            shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            if not hasattr(shape, "dtype"):
                shape = np.asarray(shape)
            targets[name] = np.empty(shape.shape, shape.dtype)
    return {name: leaf for name, leaf in targets.items() if np.prod(leaf.shape)}


def unflatten(like: Any, flat: Mapping[str, Any], saved: Mapping[str, Any]) -> Any:
    """Rebuilds the tree of ``like`` with the types and placement of its leaves."""

    def rebuild(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        value: Any = flat.get(name)
        if name not in flat:  # an empty array
            value = np.empty(leaf.shape, leaf.dtype)
        if isinstance(leaf, bool | int | float):
            return type(leaf)(value)
        if isinstance(leaf, np.ndarray | np.generic):
            return np.asarray(value)
        if isinstance(value, jax.Array):
            return value
        if not _is_key(leaf):
            # A copy: an array that shares memory with NumPy could not be donated.
            make = functools.partial(jnp.array, value, copy=True)
        else:
            impl = saved[name]["impl"]
            make = functools.partial(jax.random.wrap_key_data, value, impl=impl)
        # Compiled, because no process can place data on the devices of another.
        return jax.jit(make, out_shardings=leaf.sharding)() if _placed(leaf) else make()

    return jax.tree_util.tree_map_with_path(rebuild, like)


@jax.jit
def _checksum(leaf: Array) -> Array:
    """uint32 hash of the bits of an array; a changed element always changes it.

    The sum over elements of a bijective mix (the finaliser of MurmurHash3) of bits
    and index. Integer sums have no order, so any sharding gives the same value.
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or jnp.issubdtype(leaf.dtype, jnp.integer):
        bits = leaf.astype(jnp.uint32)
    else:
        word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index * jnp.uint32(size % 2**32) + iota
    bits = bits ^ (index * jnp.uint32(0x9E3779B9))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def checksums(flat: Mapping[str, Any]) -> dict[str, int]:
    """uint32 checksum of every array, computed where the array lives.

    The reader of the storage format does not notice every flipped bit; this does.
    """
    sums = {}
    for name, leaf in flat.items():
        # Without 64-bit mode jax would cut 64-bit values of NumPy: hash their words.
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            leaf = np.ascontiguousarray(leaf)[..., None].view(np.uint32)
        elif leaf.dtype.itemsize == 8 and not jnp.iscomplexobj(leaf):
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        sums[name] = _checksum(leaf)
    return {name: int(value) for name, value in jax.device_get(sums).items()}
