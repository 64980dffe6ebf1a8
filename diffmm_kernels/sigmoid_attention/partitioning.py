"""Automatic partitioning: each device runs its own part of batch and heads.

The compiler would gather the operands of a sharded call on every device: it sees
nothing of a kernel, and of the loops of "xla" that their steps take turns at parts of
the batch. Told how axes of operands and results belong together it passes shards
through instead. Sequences stay whole: see `sigmoid_attention_sharded` for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
)
from diffmm_kernels.sigmoid_attention.dispatch import Implementation

# What the axes of an array are: B batch, H heads of queries, K heads of keys, and
# what no shard divides: T, S, D, E.
_OPERAND_AXES = Operands(
    q="BTHD",
    k="BSKD",
    v="BSKE",
    bias="BH",
    q_offset="BT",
    q_segment_ids="BT",
    kv_segment_ids="BS",
    q_lengths="B",
    kv_lengths="B",
    alibi_slopes="BH",
    mask="BHTS",
    logit_bias="BHTS",
)
_GRADIENT_AXES = Gradients(q="BTHD", k="BSKD", v="BSKE", bias="BH", logit_bias="BHTS")
_OUTPUT_AXES = "BTHE"


def on_shards(f: Callable[[Operands], Any], operands: Operands) -> Any:
    """``f(operands)``; of a mesh with explicit axes, on each device's own part.

    There the types of the operands say how they are sharded, and the output must come
    out sharded as q is, but for the head size.
    """
    sharding = jax.typeof(operands.q).sharding
    mesh, kinds = sharding.mesh, sharding.mesh.axis_types
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, kinds, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        return f(operands)
    inputs = _Present(Operands, operands)
    split = _split(mesh, jax.typeof(operands.q), _sizes(operands))
    specs = tuple(split.spec(axes) for axes in inputs.axes(_OPERAND_AXES, operands))
    arrays = (
        jax.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip(inputs.arrays(operands), specs, strict=True)
    )
    o = jax.shard_map(
        lambda *arrays: f(split.own_heads(inputs.tree(arrays))),
        mesh=mesh,
        axis_names=explicit,
        in_specs=specs,
        out_specs=split.spec(_OUTPUT_AXES),
    )(*arrays)
    return jax.reshard(o, NamedSharding(mesh, PartitionSpec(*sharding.spec[:3], None)))


def forward(module: Implementation, operands: Operands, options: Options) -> Any:
    """``module.forward`` on each device's own part of batch and heads."""

    def run(*arrays: Any) -> Any:
        return module.forward(inputs.tree(arrays), options)

    inputs = _Present(Operands, operands)
    operand_axes = inputs.axes(_OPERAND_AXES, operands)
    sizes = _sizes(operands)

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        split = _split(mesh, arguments[0], sizes)

        def run_part(*arrays: Any) -> Any:
            return module.forward(split.own_heads(inputs.tree(arrays)), options)

        shardings = tuple(split.sharding(axes) for axes in operand_axes)
        return mesh, run_part, split.sharding(_OUTPUT_AXES), shardings

    def infer(mesh: Mesh, arguments: Any, result: Any) -> Any:
        return _split(mesh, arguments[0], sizes).sharding(_OUTPUT_AXES)

    call = custom_partitioning(run)
    call.def_partition(
        partition, infer, sharding_rule=_rule(operand_axes, [_OUTPUT_AXES], sizes)
    )
    return call(*inputs.arrays(operands))


def backward(
    module: Implementation,
    operands: Operands,
    options: Options,
    do: Any,
    needs: Needs,
) -> Gradients:
    """``module.backward`` on each device's own part of batch and heads."""

    def run(do: Any, *arrays: Any) -> tuple[Any, ...]:
        gradients = module.backward(inputs.tree(arrays), options, do, needs)
        return outputs.arrays(gradients)

    inputs = _Present(Operands, operands)
    # Flags stand for the gradients that there will be.
    outputs = _Present(
        Gradients,
        Gradients(
            *(True, True, True),
            bias=needs.bias or None,
            logit_bias=needs.logit_bias or None,
        ),
    )
    operand_axes = [_OUTPUT_AXES, *inputs.axes(_OPERAND_AXES, operands)]
    # A gradient has the shape of what it belongs to.
    result_axes = outputs.axes(_GRADIENT_AXES, operands)
    sizes = _sizes(operands)

    def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
        split = _split(mesh, arguments[1], sizes)

        def run_part(do: Any, *arrays: Any) -> tuple[Any, ...]:
            own = split.own_heads(inputs.tree(arrays))
            gradients = split.all_heads(module.backward(own, options, do, needs))
            return tuple(
                _sum_over(x, split.missing(axes))
                for x, axes in zip(outputs.arrays(gradients), result_axes, strict=True)
            )

        arguments = tuple(split.sharding(axes) for axes in operand_axes)
        results = tuple(split.sharding(axes) for axes in result_axes)
        return mesh, run_part, results, arguments

    def infer(mesh: Mesh, arguments: Any, results: Any) -> Any:
        split = _split(mesh, arguments[1], sizes)
        return tuple(split.sharding(axes) for axes in result_axes)

    call = custom_partitioning(run)
    call.def_partition(
        partition, infer, sharding_rule=_rule(operand_axes, result_axes, sizes)
    )
    return outputs.tree(call(do, *inputs.arrays(operands)))


class _Present:
    """The fields of a NamedTuple that are not None, as a flat tuple."""

    def __init__(self, kind: Any, example: Any) -> None:
        self.kind = kind
        self.names = [x for x in kind._fields if getattr(example, x) is not None]

    def arrays(self, tree: Any) -> tuple[Any, ...]:
        return tuple(getattr(tree, name) for name in self.names)

    def tree(self, arrays: Sequence[Any]) -> Any:
        return self.kind(**dict(zip(self.names, arrays, strict=True)))

    def axes(self, axes: Any, shaped: Any) -> list[str]:
        """Axes of each field; "1" where a mask or logit bias is broadcast."""
        found = []
        for name in self.names:
            shape = getattr(shaped, name).shape
            letters = getattr(axes, name)
            if len(letters) == 4 and letters[-1] == "S":
                letters = "".join(
                    "1" if n == 1 else letter
                    for n, letter in zip(shape, letters, strict=True)
                )
            found.append(letters)
        return found


class _Sizes(NamedTuple):
    batch: int
    kv_heads: int
    group: int


def _sizes(operands: Operands) -> _Sizes:
    b, _, h, _ = operands.q.shape
    kv_heads = operands.k.shape[2]
    return _Sizes(b, kv_heads, h // kv_heads)


def _rule(operands: list[str], results: list[str], sizes: _Sizes) -> Any:
    """Which axes belong together, as Shardy has it: "b t h d, b s k d, … -> b t h e".

    Heads of queries and of keys are one factor where they are the same; one that is a
    multiple of the other would have Shardy cut axes of the mesh, which `NamedSharding`
    cannot express.
    """
    fresh = iter(range(1000))

    def factors(axes: str) -> str:
        names = []
        for letter in axes:
            if letter == "K" and sizes.group == 1:
                letter = "H"
            names.append(f"u{next(fresh)}" if letter == "1" else letter.lower())
        return " ".join(names)

    left, right = (", ".join(map(factors, side)) for side in (operands, results))
    return f"{left} -> {right}"


class _Split(NamedTuple):
    """Axes of the mesh by what they divide.

    Attributes:
      mesh: of the computation.
      batch: of the batch.
      kv: of the heads of keys, and the heads of queries that read them.
      group: of the heads of queries alone.
      kv_heads: heads of keys on a device. Where ``group`` has more devices than they
        are, each device has queries for one of them alone.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    kv_heads: int = 1

    def of(self, axis: str) -> tuple[str, ...]:
        return {"B": self.batch, "K": self.kv, "H": self.kv + self.group}.get(axis, ())

    def spec(self, axes: str) -> PartitionSpec:
        return PartitionSpec(*(self.of(axis) or None for axis in axes))

    def sharding(self, axes: str) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def _own_head(self) -> Any:
        size = _product(self.mesh, self.group)
        return jax.lax.axis_index(self.group) * self.kv_heads // size

    def own_heads(self, operands: Operands) -> Operands:
        """Leaves those heads of keys that the queries of the device read."""
        if not self.group or self.kv_heads == 1:
            return operands
        k, v = (
            jax.lax.dynamic_slice_in_dim(x, self._own_head(), 1, axis=2)
            for x in (operands.k, operands.v)
        )
        return operands._replace(k=k, v=v)

    def all_heads(self, gradients: Gradients) -> Gradients:
        """Gradients of what `own_heads` took, 0 for the other heads."""
        if not self.group or self.kv_heads == 1:
            return gradients
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(
                jnp.zeros((*x.shape[:2], self.kv_heads, x.shape[3]), x.dtype),
                x,
                self._own_head(),
                axis=2,
            )
            for x in (gradients.k, gradients.v)
        )
        return gradients._replace(k=k, v=v)

    def missing(self, axes: str) -> tuple[str, ...]:
        """Axes over which a result without some of the axes is a sum of parts."""
        present = {name for axis in axes for name in self.of(axis)}
        every = self.batch + self.kv + self.group
        return tuple(name for name in every if name not in present)


def _split(mesh: Mesh, q: Any, sizes: _Sizes) -> _Split:
    """As q is sharded, as far as shards are even and hold whole groups of heads."""
    spec = getattr(q.sharding, "spec", None)
    if spec is None:
        # Inside shard_map over some axes of a mesh JAX does not name the others.
        return _Split(mesh)
    batch, _ = _dividing(mesh, _names(spec[0]), sizes.batch)
    kv, rest = _dividing(mesh, _names(spec[2]), sizes.kv_heads)
    kv_heads = sizes.kv_heads // _product(mesh, kv)
    devices = _product(mesh, rest)
    if devices % kv_heads or kv_heads * sizes.group % devices:
        rest = ()
    return _Split(mesh, batch, kv, rest, kv_heads)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _product(mesh: Mesh, names: Sequence[str]) -> int:
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def _dividing(
    mesh: Mesh, names: tuple[str, ...], length: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The longest prefix of ``names`` that divides ``length``, and the rest."""
    for n in range(len(names), 0, -1):
        if length % _product(mesh, names[:n]) == 0:
            return names[:n], names[n:]
    return (), names


def _sum_over(x: Any, names: tuple[str, ...]) -> Any:
    if not names:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.psum(x.astype(wide), names).astype(x.dtype)
