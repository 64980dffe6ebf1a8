"""Sigmoid attention over a mesh of devices: batch, heads, and the sequence itself.

The outputs for parts of the keys add, so that devices which hold parts of a sequence
exchange sums and neither maxima nor normalisers.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffmm_kernels.sigmoid_attention.api import OUTPUT_NAME, attend
from diffmm_kernels.sigmoid_attention.arguments import Operands, Options, canonical
from diffmm_kernels.sigmoid_attention.config import Config, Precision
from diffmm_kernels.sigmoid_attention.dispatch import Name

Role = Literal["batch", "heads", "sequence"]
ROLES: tuple[Role, ...] = ("batch", "heads", "sequence")

Exchange = Literal["sums", "keys"]
EXCHANGES: tuple[Exchange, ...] = ("sums", "keys")


def sigmoid_attention_sharded(
    q: Any,
    k: Any,
    v: Any,
    *,
    bias: Any,
    mesh: Mesh,
    axes: Mapping[Role, str | tuple[str, ...]],
    exchange: Exchange = "sums",
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = 0,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    logit_bias: Any = None,
    precision: Precision = "default",
    out_dtype: Any = None,
    implementation: Name | None = None,
    deterministic: bool = False,
    config: Config | None = None,
    interpret: bool | None = None,
) -> Any:
    """`sigmoid_attention` with batch, heads and sequence spread over a mesh.

    All arrays have their global shapes and meanings; the result is that of
    `sigmoid_attention` up to the order of sums, in value and gradient. Batch and heads
    need no communication. Of a sequence over n devices each holds T / n queries and
    S / n keys, and by ``exchange``

    - "sums": every device gathers all queries, computes what its own keys contribute
      to each, and the contributions are summed to where the queries live: traffic of
      q and of the float32 output, memory for all queries on each device.
    - "keys": keys and values travel around the ring of devices, past queries that
      stay: traffic of k and v, less of it where K is small against H, and no memory
      beyond two parts of the keys.

    The backward pass repeats the communication and not the forward kernel, so that
    only the parts of q, k and v that a device owns are kept for it.

    Args:
      q: as in `sigmoid_attention`, as are all arguments that are not listed here.
      k: likewise.
      v: likewise.
      bias: likewise, but without default: usually ``-log`` of the length trained at,
        which is not that of a device's part.
      mesh: the devices. Axes of the mesh that ``axes`` leaves out repeat the work.
      axes: the mesh axis, or axes, over which "batch", "heads" and "sequence" are
        spread. Sizes must divide B, H and both T and S; for heads, K must be a
        multiple or a divisor of the size.
      exchange: "sums" or "keys".
      scale: likewise.
      causal: likewise.
      window: likewise.
      q_offset: likewise.
      q_segment_ids: likewise.
      kv_segment_ids: likewise.
      q_lengths: likewise.
      kv_lengths: likewise.
      alibi_slopes: likewise.
      mask: likewise.
      logit_bias: likewise.
      precision: likewise.
      out_dtype: likewise.
      implementation: likewise; runs on each device.
      deterministic: likewise.
      config: likewise.
      interpret: likewise.

    Returns:
      ``[B, T, H, E]``, sharded as ``axes`` says.

    Raises:
      ValueError: an argument is out of what is allowed; names it and what came.
      NotImplementedError: the named implementation cannot serve this call; says why.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> q = k = v = jnp.ones((1, 4, 2, 8))
      >>> axes = {"sequence": "context"}
      >>> o = sigmoid_attention_sharded(q, k, v, bias=1000.0, mesh=mesh, axes=axes)
      >>> o.sum().item()
      256.0
    """
    if bias is None:
        raise ValueError(
            "bias must be given: usually -log of the length trained at, which is not "
            "that of a device's part"
        )
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}")
    operands, options, unbatched = canonical(
        q,
        k,
        v,
        bias=bias,
        scale=scale,
        causal=causal,
        window=window,
        q_offset=q_offset,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        alibi_slopes=alibi_slopes,
        mask=mask,
        logit_bias=logit_bias,
        precision=precision,
        out_dtype=out_dtype,
        deterministic=deterministic,
        config=config,
        interpret=interpret,
    )
    layout = _layout(mesh, axes, operands)
    o = _sharded(_Call(layout, exchange, options, implementation), operands)
    o = checkpoint_name(o, OUTPUT_NAME)
    return o[0] if unbatched else o


class _Layout(NamedTuple):
    """Names of mesh axes by role; an empty tuple where a role is not sharded."""

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...]

    def size(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)


class _Call(NamedTuple):
    layout: _Layout
    exchange: Exchange
    options: Options
    implementation: Name | None


def _layout(mesh: Mesh, axes: Any, operands: Operands) -> _Layout:
    if not isinstance(mesh, (Mesh, jax.sharding.AbstractMesh)):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if not isinstance(axes, Mapping) or not set(axes) <= set(ROLES):
        raise ValueError(
            f"axes must map some of {ROLES} to names of mesh axes, got {axes!r}"
        )
    names = {
        role: (value,) if isinstance(value, str) else tuple(value)
        for role, value in axes.items()
    }
    used = [name for value in names.values() for name in value]
    if not set(used) <= set(mesh.axis_names) or len(set(used)) < len(used):
        raise ValueError(
            f"axes must name axes of the mesh {dict(mesh.shape)}, each once, got "
            f"{dict(axes)}"
        )
    layout = _Layout(mesh, **{role: names.get(role, ()) for role in ROLES})
    b, t, h, _ = operands.q.shape
    s, kv_heads = operands.k.shape[1:3]
    by_heads = layout.size(layout.heads)
    whole = {
        "batch": (layout.size(layout.batch), {"B": b}),
        "heads": (by_heads, {"H": h}),
        "sequence": (layout.size(layout.sequence), {"T": t, "S": s}),
    }
    for role, (size, lengths) in whole.items():
        if any(length % size for length in lengths.values()):
            came = " and ".join(f"{x}={length}" for x, length in lengths.items())
            raise ValueError(
                f"axes[{role!r}] = {axes[role]!r} has {size} devices, which must "
                f"divide {came}"
            )
    if kv_heads % by_heads and by_heads % kv_heads:
        raise ValueError(
            f"axes['heads'] = {axes['heads']!r} has {by_heads} devices, which must "
            f"divide, or be a multiple of, the {kv_heads} heads of k and v"
        )
    return layout


def _specs(call: _Call, operands: Operands) -> Operands:
    """How each operand is spread over the mesh."""
    layout = call.layout
    batch, heads, sequence = (
        names or None for names in (layout.batch, layout.heads, layout.sequence)
    )
    # The axes of queries stay whole where each device works for all queries.
    rows = sequence if call.exchange == "keys" else None
    columns = sequence if call.exchange == "sums" else None
    split_keys = operands.k.shape[2] % layout.size(layout.heads) == 0
    keys = PartitionSpec(batch, sequence, heads if split_keys else None, None)

    def dense(x: Any) -> PartitionSpec | None:
        if x is None:
            return None
        full = (batch, heads, rows, columns)
        return PartitionSpec(
            *(None if n == 1 else axis for n, axis in zip(x.shape, full, strict=True))
        )

    specs = Operands(
        q=PartitionSpec(batch, sequence, heads, None),
        k=keys,
        v=keys,
        bias=PartitionSpec(batch, heads),
        q_offset=PartitionSpec(batch, rows),
        q_segment_ids=PartitionSpec(batch, rows),
        kv_segment_ids=PartitionSpec(batch, sequence),
        q_lengths=PartitionSpec(batch),
        kv_lengths=PartitionSpec(batch),
        alibi_slopes=PartitionSpec(batch, heads),
        mask=dense(operands.mask),
        logit_bias=dense(operands.logit_bias),
    )
    return Operands(
        *(None if x is None else spec for x, spec in zip(operands, specs, strict=True))
    )


@functools.partial(jax.jit, static_argnums=0)
def _sharded(call: _Call, operands: Operands) -> Any:
    layout = call.layout
    specs = _specs(call, operands)
    if not layout.sequence:
        local = _attend_own
    elif call.exchange == "sums":
        local = _exchange_sums
    else:
        local = _exchange_keys
    # What came from other devices is fetched again in the backward pass rather than
    # kept; the forward kernel does not run again, for nothing of it is used there.
    local = jax.checkpoint(local, static_argnums=0)

    whole_keys = bool(operands.k.shape[2] % layout.size(layout.heads))

    def run(operands: Operands) -> Any:
        return local(call, _own_head(layout, operands) if whole_keys else operands)

    operands = jax.tree.map(
        lambda x, spec: _placed(x, layout.mesh, spec), operands, specs
    )
    return jax.shard_map(run, mesh=layout.mesh, in_specs=(specs,), out_specs=specs.q)(
        operands
    )


def _placed(x: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Moves ``x`` to where it is needed, where the mesh leaves that to the program."""
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.reshard(x, NamedSharding(mesh, spec))
    return x


def _own_head(layout: _Layout, operands: Operands) -> Operands:
    """Where devices outnumber the heads of keys, each takes the one it needs of all."""
    size, kv_heads = layout.size(layout.heads), operands.k.shape[2]
    head = jax.lax.axis_index(layout.heads) * kv_heads // size
    k, v = (
        jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)
        for x in (operands.k, operands.v)
    )
    return operands._replace(k=k, v=v)


def _attend_own(call: _Call, operands: Operands) -> Any:
    return attend(operands, call.options, call.implementation)


def _against(
    call: _Call, operands: Operands, first_query: Any, first_key: Any
) -> tuple[Operands, Options]:
    """Operands that hold a part of the keys, in terms of that part alone.

    Args:
      call: with global options.
      operands: arrays of the part; ``q_offset`` and ``kv_lengths`` are global.
      first_query: global index of the first of the queries.
      first_key: global index of the first of the keys.
    """
    options = call.options
    offset = options.q_offset if operands.q_offset is None else operands.q_offset
    offset = jnp.broadcast_to(
        offset + first_query - first_key, operands.q.shape[:2]
    ).astype(jnp.int32)
    kv_lengths = operands.kv_lengths
    if kv_lengths is not None:
        kv_lengths = jnp.clip(kv_lengths - first_key, 0, operands.k.shape[1])
    real = "float64" if operands.q.dtype == jnp.float64 else "float32"
    options = dataclasses.replace(options, q_offset=0, out_dtype=real)
    return operands._replace(q_offset=offset, kv_lengths=kv_lengths), options


def _exchange_sums(call: _Call, operands: Operands) -> Any:
    """All queries against a device's own keys; the sums go to the owners of queries."""
    axis = call.layout.sequence
    first_key = jax.lax.axis_index(axis) * operands.k.shape[1]
    q = jax.lax.all_gather(operands.q, axis, axis=1, tiled=True)
    part, options = _against(call, operands._replace(q=q), 0, first_key)
    o = attend(part, options, call.implementation)
    o = jax.lax.psum_scatter(o, axis, scatter_dimension=1, tiled=True)
    return o.astype(call.options.out_dtype)


def _exchange_keys(call: _Call, operands: Operands) -> Any:
    """A device's own queries against all keys, which come by part after part."""
    axis, size = call.layout.sequence, call.layout.size(call.layout.sequence)
    rank = jax.lax.axis_index(axis)
    t, s = operands.q.shape[1], operands.k.shape[1]
    to_previous = [(i, (i - 1) % size) for i in range(size)]
    if operands.q_lengths is not None:
        own = jnp.clip(operands.q_lengths - rank * t, 0, t)
        operands = operands._replace(q_lengths=own)
    travelling = operands.k, operands.v, operands.kv_segment_ids
    total: Any = None
    for step in range(size):
        first_key = (rank + step) % size * s
        k, v, ids = travelling
        part = operands._replace(
            k=k,
            v=v,
            kv_segment_ids=ids,
            mask=_columns(operands.mask, first_key, s),
            logit_bias=_columns(operands.logit_bias, first_key, s),
        )
        part, options = _against(call, part, rank * t, first_key)
        if step < size - 1:
            travelling = jax.tree.map(
                lambda x: jax.lax.ppermute(x, axis, to_previous), travelling
            )
        o = attend(part, options, call.implementation)
        total = o if total is None else total + o
    return total.astype(call.options.out_dtype)


def _columns(x: Any, first: Any, size: int) -> Any:
    """The keys of a part out of a mask or logit bias for all keys."""
    if x is None or x.shape[3] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=3)
