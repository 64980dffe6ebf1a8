"""The checked entry to the loop, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.loop import Problem, generate
from diffmm.samplers.rule import Rule
from diffmm.samplers.settings import Settings, resolve
from diffmm.samplers.validate import (
    check_allowed,
    check_block_length,
    check_canvas,
    check_id,
    row_keys,
)
from diffmm.typing import Array, ArrayLike, Canvas, Modality, Params, PredictFn
from diffmm.version import __version__


class SampleResult(NamedTuple):
    """Completed rows.

    Attributes:
      tokens: int32 ``[B, L]``.
      nfe: int32 ``[B]``, denoiser evaluations while the row was active; a guided step
        counts 2, a step that commits nothing counts 0.
      forwards: int32 ``[]``, denoiser calls of the batch.
      logprob: float32 ``[B, L]``, nats: log-probability of each committed token under
        the guided, untempered, unfiltered law of the evaluation that committed it.
      step_committed: int32 ``[B, L]``, the row's evaluated step at which each token was
        committed, from 0; −1 where nothing was.
      still_masked: bool ``[B]``, rows that ran out of ``max_forwards``.
      record: how the result was made: rule, settings, key, version; JSON-ready.
    """

    tokens: Array
    nfe: Array
    forwards: Array
    logprob: Array
    step_committed: Array
    still_masked: Array
    record: dict[str, Any]


def sample(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    key: Array,
    *,
    rule: Rule,
    mask_id: int,
    allowed: ArrayLike,
    settings: Settings | Mapping[Modality, Settings] | None = None,
    block_length: int | None = None,
    max_forwards: int | None = None,
    eos_id: int | None = None,
) -> SampleResult:
    """Completes the generated positions of a canvas.

    Per evaluation: guidance on raw logits, suppression of the mask and of ids that the
    position's modality does not allow, scores from that law, then temperature, top-k,
    top-p and an exact draw at the positions that the rule selects. Only generated
    positions are scored. Given tokens are returned untouched, the mask id among them.

    Args:
      predict: the denoiser; pass the same function object again to reuse the compiled
        loop.
      params: its parameters.
      canvas: rows to complete, fields ``[B, L]``.
      key: one key, or one per row ``[B]``. A row with the same key gives the same
        tokens alone, in any batch, at any place in it, with any padding.
      rule: which positions are committed when.
      mask_id: the mask; it is never drawn.
      allowed: bool ``[4, V]``, ids that a position may take, by `Modality`.
      settings: temperature, filters, guidance; one, or one per modality (default:
        temperature 1 and nothing else).
      block_length: generated positions per block, left to right; ``None`` is one block.
        It divides the longest generated stretch; shorter rows end in a shorter block.
      max_forwards: evaluations after which a row stops, finished or not.
      eos_id: stop a row at the end of the block that holds this id and fill what is
        left with it.

    Returns:
      `SampleResult`.

    Raises:
      ValueError: for anything out of range, naming the argument.
    """
    table = check_allowed(allowed, mask_id)
    checked = check_canvas(canvas, mask_id, table)
    generated = np.asarray(checked.generate)
    counts = generated.sum(axis=1).astype(np.int32)
    width = check_block_length(block_length, int(counts.max(initial=0)))
    rule.check(max(-(-int(counts.max(initial=0)) // width), 1))
    settings = Settings() if settings is None else settings
    present = np.unique(np.asarray(checked.modality)[generated])
    controls = resolve(settings, present.tolist(), table.shape[1])
    if controls.scale is not None and not np.any(checked.condition):
        if np.any(controls.scale[present] != 1.0):
            raise ValueError(
                f"guidance_scale (or 1 + cfg_weight) must be 1 on a canvas without "
                f"condition positions, got {controls.scale[present].tolist()}"
            )
        controls = controls._replace(scale=None)
    if max_forwards is not None and max_forwards < 1:
        raise ValueError(f"max_forwards must be at least 1, got {max_forwards!r}")
    if eos_id is not None:
        check_id("eos_id", eos_id, table.shape[1])
        if eos_id == mask_id:
            raise ValueError(f"eos_id must differ from mask_id, got {eos_id!r}")

    num_rows = len(checked.tokens)
    keys = row_keys(key, num_rows)
    state = generate(
        predict,
        params,
        jnp.array(checked.tokens),
        Problem(
            positions=jnp.asarray(checked.positions),
            segment_ids=jnp.asarray(checked.segment_ids),
            modality=jnp.asarray(checked.modality),
            condition=jnp.asarray(checked.condition),
            order=jnp.asarray(_generated_positions(generated, counts)),
            counts=jnp.asarray(counts),
            keys=keys,
            allowed=jnp.asarray(table),
        ),
        _with_arrays(rule),
        _with_arrays(controls),
        np.int32(np.iinfo(np.int32).max if max_forwards is None else max_forwards),
        mask_id=int(mask_id),
        width=width,
        eos_id=None if eos_id is None else int(eos_id),
    )
    return SampleResult(
        tokens=state.tokens,
        nfe=state.nfe,
        forwards=state.forwards,
        logprob=state.logprob,
        step_committed=state.committed_at,
        still_masked=jnp.any(state.remaining, axis=1),
        record={
            "rule": describe(rule),
            "settings": describe(settings),
            "block_length": block_length,
            "max_forwards": max_forwards,
            "mask_id": int(mask_id),
            "eos_id": eos_id,
            "key": np.asarray(jax.random.key_data(keys)).tolist(),
            "version": __version__,
        },
    )


def frames(
    result: SampleResult, canvas: Canvas, mask_id: int, *, row: int = 0
) -> np.ndarray:
    """The states that one row went through, for animation.

    Args:
      result: of `sample`.
      canvas: what it was given.
      mask_id: the mask.
      row: which row.

    Returns:
      int32 ``[T + 1, L]``: the canvas, then the row after each evaluated step.
    """
    order = np.asarray(result.step_committed)[row]
    steps = np.arange(order.max(initial=-1) + 2)[:, None]
    generate = np.asarray(canvas.generate)[row]
    shown = ~generate | ((order >= 0) & (order < steps))
    # Tokens filled in after a stop were never committed: they belong to the last frame.
    shown |= (steps == steps[-1]) & (order < 0)
    return np.where(shown, np.asarray(result.tokens)[row], np.int32(mask_id))


def describe(value: Any) -> Any:
    """Configuration as JSON-ready values: what it was, by name and number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: describe(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {
            getattr(key, "name", str(key)): describe(item)
            for key, item in value.items()
        }
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", repr(value))


def _generated_positions(generate: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Generated positions of each row in order, then filling, int32 ``[B, N]``."""
    order = np.argsort(~generate, axis=1, kind="stable").astype(np.int32)
    return order[:, : max(int(counts.max(initial=0)), 1)]


def _with_arrays(tree: Any) -> Any:
    """Python numbers as arrays, so that no number changes a compiled signature."""

    def convert(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        kind = np.int32 if np.issubdtype(leaf.dtype, np.integer) else np.float32
        return leaf.astype(kind)

    return jax.tree.map(convert, tree)
