"""Meshes and one table from logical axis names to mesh axes.

Data-parallel, fully-sharded and tensor-parallel training differ only in a table:
XLA inserts the communication that the placement of the arrays implies.

References:
  Xu, Lee, Chen et al., "GSPMD: General and Scalable Parallelization for ML
  Computation Graphs", arXiv 2105.04663.
  Rajbhandari, Rasley, Ruwase, He, "ZeRO: Memory Optimizations Toward Training
  Trillion Parameter Models", arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffmm._tree import named_leaves, path_name
from diffmm.training.state import TrainState

Axes = Sequence[str | None]
Table = Mapping[str, str | tuple[str, ...] | None]

LOGICAL_AXES = (
    "batch",
    "sequence",
    "embed",
    "heads",
    "head_dim",
    "mlp",
    "vocab",
    "layers",
)

DATA_PARALLEL: Table = {**dict.fromkeys(LOGICAL_AXES), "batch": "data"}
"""Rows are split over ``data``; every device holds all parameters."""

FULLY_SHARDED: Table = {**DATA_PARALLEL, "embed": "data"}
"""Parameters and optimiser state are split over the same devices as the rows."""

TENSOR_PARALLEL: Table = {
    **DATA_PARALLEL,
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
}
"""Heads, hidden units and vocabulary are split over ``model``, rows over ``data``."""

FULLY_SHARDED_TENSOR_PARALLEL: Table = {**TENSOR_PARALLEL, "embed": "data"}
"""Both, on a two-dimensional mesh."""


def make_mesh(
    *,
    data: int | None = None,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes ``("data", "model")``.

    Args:
      data: devices along ``data``; by default all that ``model`` leaves.
      model: devices along ``model``.
      devices: devices to use, all by default; surplus ones stay idle.

    Raises:
      ValueError: if there are too few devices or a size is below 1.
    """
    available = list(devices) if devices is not None else jax.devices()
    if model < 1 or (data is not None and data < 1):
        raise ValueError(f"mesh sizes must be at least 1: data={data}, model={model}")
    if data is None:
        if len(available) % model:
            raise ValueError(f"model={model} does not divide {len(available)} devices")
        data = len(available) // model
    if data * model > len(available):
        raise ValueError(
            f"data={data} times model={model} needs {data * model} devices, "
            f"there are {len(available)}"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=available[: data * model],
    )


def partition_spec(axes: Axes, table: Table) -> PartitionSpec:
    """Looks logical axes up in a table.

    A mesh axis can split only one axis of an array: the first that asks for it.

    Args:
      axes: one logical name (or ``None``, not split) per array axis.
      table: mesh axis, or axes, or ``None`` for every logical name.

    Returns:
      The partition spec.

    Raises:
      ValueError: if a name is not in the table.

    >>> tuple(partition_spec(("embed", "mlp"), FULLY_SHARDED_TENSOR_PARALLEL))
    ('data', 'model')
    """
    used: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis is not None and axis not in table:
            raise ValueError(
                f"logical axis {axis!r} is not in the table, which knows "
                f"{sorted(table)}; add it, with None for an axis that is not split"
            )
        entry = table[axis] if axis is not None else None
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names = tuple(name for name in names if name not in used)
        used.update(names)
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def _sharding(
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    mesh: Mesh,
    table: Table,
    replicate_indivisible: bool,
) -> NamedSharding:
    if len(axes) != len(shape):
        raise ValueError(
            f"leaf {name!r} of shape {shape} has {len(shape)} axes, but logical axes "
            f"{tuple(axes)}"
        )
    spec = list(partition_spec(axes, table))
    for index, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        for mesh_axis in names:
            if mesh_axis not in mesh.shape:
                raise ValueError(
                    f"the table sends {axes[index]!r} to mesh axis {mesh_axis!r}; the "
                    f"mesh has {tuple(mesh.shape)}"
                )
        parts = int(np.prod([mesh.shape[mesh_axis] for mesh_axis in names]))
        if shape[index] % parts:
            if not replicate_indivisible:
                raise ValueError(
                    f"leaf {name!r}: axis {axes[index]!r} of size {shape[index]} does "
                    f"not divide by mesh axis {'*'.join(names)!r} of size {parts}; "
                    "change a size, or pass replicate_indivisible=True"
                )
            spec[index] = None
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(
    mesh: Mesh,
    tree: Any,
    logical_axes: Any,
    table: Table,
    *,
    replicate_indivisible: bool = False,
) -> Any:
    """Shardings of a tree of arrays, for ``jax.device_put`` and ``jax.jit``.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or ``jax.ShapeDtypeStruct``; scalars are replicated.
      logical_axes: the same tree with a tuple of logical names at each leaf.
      table: `DATA_PARALLEL`, `FULLY_SHARDED`, `TENSOR_PARALLEL` or your own.
      replicate_indivisible: leave an axis unsplit whose size the mesh axis does not
        divide, instead of raising.

    Returns:
      The same tree with a ``NamedSharding`` at each leaf.

    Raises:
      ValueError: if an axis cannot be split; it names leaf, sizes and mesh axis.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    treedef: Any = structure
    axes = treedef.flatten_up_to(logical_axes)
    return treedef.unflatten(
        [
            _sharding(
                path_name(path),
                np.shape(leaf),
                leaf_axes if np.ndim(leaf) else (),
                mesh,
                table,
                replicate_indivisible,
            )
            for (path, leaf), leaf_axes in zip(leaves, axes, strict=True)
        ]
    )


def state_shardings(
    mesh: Mesh,
    state: TrainState,
    logical_axes: Any,
    table: Table,
    *,
    replicate_indivisible: bool = False,
) -> TrainState:
    """Shardings of a whole training state.

    A leaf of the optimiser state that mirrors a parameter (same shape, and a path
    that ends in the parameter's path, as moments and averages have) is placed like
    it; counters and everything else are replicated.

    Args:
      mesh: from `make_mesh`.
      state: arrays or ``jax.ShapeDtypeStruct`` (from ``jax.eval_shape``).
      logical_axes: of ``state.params``, as in `shardings`.
      table: as in `shardings`.
      replicate_indivisible: as in `shardings`.

    Returns:
      A `TrainState` of ``NamedSharding``.
    """
    params = shardings(
        mesh,
        state.params,
        logical_axes,
        table,
        replicate_indivisible=replicate_indivisible,
    )
    placed = {
        tuple(name.split("/")): (np.shape(leaf), sharding)
        for (name, leaf), sharding in zip(
            named_leaves(state.params).items(), jax.tree.leaves(params), strict=True
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def mirror(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = tuple(path_name(path).split("/"))
        for start in range(len(parts)):
            shape, sharding = placed.get(parts[start:], (None, replicated))
            if shape == np.shape(leaf):
                return sharding
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(mirror, state.opt_state)
    placement: Any = replicated  # stands where the state has arrays
    return TrainState(placement, params, opt_state, placement)


def shard_batch(batch: Any, mesh: Mesh, table: Table = DATA_PARALLEL) -> Any:
    """Places this process's rows of a batch on the mesh.

    With several processes each passes its own rows, a contiguous part of the global
    batch in process order; the result is the global batch.

    Args:
      batch: any pytree of arrays ``[B, ...]``; a second axis is the sequence.
      mesh: from `make_mesh`.
      table: where ``batch`` and ``sequence`` go.

    Returns:
      The same tree of global arrays.

    Raises:
      ValueError: if the mesh does not divide the rows, or the row length.
    """
    processes = jax.process_count()

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf) if not isinstance(leaf, jax.Array) else leaf
        if not leaf.ndim:
            raise ValueError(f"batch: leaf {path_name(path)!r} has no axis of rows")
        shape = (leaf.shape[0] * processes, *leaf.shape[1:])
        axes = (("batch", "sequence") + (None,) * leaf.ndim)[: leaf.ndim]
        sharding = _sharding(path_name(path), shape, axes, mesh, table, False)
        if processes == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree_util.tree_map_with_path(place, batch)
