"""The call of a kernel over its list of tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffmm_kernels.sigmoid_attention.arguments import Operands
from diffmm_kernels.sigmoid_attention.mosaic_tpu import schedule as schedules
from diffmm_kernels.sigmoid_attention.mosaic_tpu.layout import (
    Input,
    Output,
    restrictions,
    scalars,
)
from diffmm_kernels.sigmoid_attention.mosaic_tpu.problem import At, Problem, locate
from diffmm_kernels.sigmoid_attention.varying import result_struct, uniformly_varying


def call(
    body: Callable[[dict[str, Any], At], None],
    problem: Problem,
    operands: Operands,
    *,
    inputs: dict[str, Input],
    outputs: dict[str, Output],
    scratch: dict[str, tuple[int, ...]],
    name: str,
) -> dict[str, Any]:
    """Runs a kernel over its list of tiles.

    Args:
      body: one step, given the references by name and where the step is.
      problem: of the kernel.
      operands: of the call.
      inputs: beside those of `restrictions` and `scalars`.
      outputs: by name.
      scratch: shapes of float32 accumulators, by name.
      name: of the kernel in profiles.

    Returns:
      The outputs by name.
    """
    options = problem.options
    walk = schedules.schedule(
        operands, options, problem.block_q, problem.block_kv, 2 - problem.query_axis
    )
    small = scalars(operands)
    inputs = {**inputs, **restrictions(problem, operands)}
    arrays = [walk.entries, *small.values(), *(x.array for x in inputs.values())]
    if isinstance(walk.count, int):
        arrays, count = uniformly_varying(arrays), walk.count
    else:
        arrays, count = uniformly_varying((arrays, walk.count))
    grid: tuple[Any, ...] = (operands.q.shape[0], problem.heads, count)
    semantics: tuple[Any, ...] = ("parallel", "parallel", "arbitrary")
    if problem.query_axis == 1:
        # The heads of a group innermost: they share the entry and the key tile.
        grid = (grid[0], problem.heads // problem.group, count, problem.group)
        semantics = (*semantics, "arbitrary")

    def kernel(entries: Any, *references: Any) -> None:
        names = (*small, *inputs, *outputs, *scratch)
        refs = dict(zip(names, references, strict=True))
        ids = [pl.program_id(i) for i in range(len(grid))]
        body(refs, locate(problem, walk.extent, ids, entries))

    def spec(x: Input | Output) -> pl.BlockSpec:
        def index(*arguments: Any) -> tuple[Any, ...]:
            ids, entries = arguments[: len(grid)], arguments[len(grid)]
            place = x.place(locate(problem, walk.extent, ids, entries))
            return tuple(jnp.int32(i) if isinstance(i, int) else i for i in place)

        return pl.BlockSpec(x.block, index)

    results = pl.pallas_call(
        kernel,
        out_shape=[
            result_struct(x.shape, x.dtype, arrays[0]) for x in outputs.values()
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(small),
            grid=grid,
            in_specs=[spec(x) for x in inputs.values()],
            out_specs=[spec(x) for x in outputs.values()],
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=bool(options.interpret),
        name=name,
    )(*arrays)
    return dict(zip(outputs, results, strict=True))


def flagged(at: At, flag: int) -> Any:
    """Whether a step has a flag of the list."""
    return (at.flags & flag) != 0


def visit(
    problem: Problem, refs: dict[str, Any], at: At, step: Callable[[bool], None]
) -> None:
    """Runs ``step(masked)`` on a visible tile, with masks where it needs them."""
    visited, full = flagged(at, schedules.VISIT), flagged(at, schedules.FULL)
    windowed = (problem.options.left, problem.options.right) != (None, None)
    if not windowed and not {"q_lengths", "kv_lengths", "q_ids", "mask"} & set(refs):
        pl.when(visited)(lambda: step(False))
        return
    pl.when(visited & full)(lambda: step(False))
    pl.when(visited & ~full)(lambda: step(True))
