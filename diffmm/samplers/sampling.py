"""The checked entry to the loop, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.caches import CacheStrategy
from diffmm.samplers.loop import CHECKED, generate
from diffmm.samplers.rule import BlockEnds, Rule
from diffmm.samplers.settings import Settings, resolve
from diffmm.samplers.state import (
    Counts,
    Limits,
    Problem,
    Program,
    Spec,
    State,
    Trace,
)
from diffmm.samplers.validate import (
    check_allowed,
    check_block_length,
    check_budgets,
    check_canvas,
    check_guidance,
    check_longest,
    check_rule,
    check_stop,
    row_keys,
)
from diffmm.typing import Array, ArrayLike, Canvas, Modality, Params, PredictFn
from diffmm.version import __version__

# Arrays with more numbers are described by their shape alone.
_LARGE = 64


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
      still_masked: bool ``[B]``, rows that ran out of ``max_forwards``, or of
        ``block_forwards`` in some block.
      counts: evaluations by kind.
      trace: what happened turn by turn, or ``None``.
      record: how the result was made: rule, settings, key, version; JSON-ready.
    """

    tokens: Array
    nfe: Array
    forwards: Array
    logprob: Array
    step_committed: Array
    still_masked: Array
    counts: Counts
    trace: Trace | None
    record: dict[str, Any]


class Request(NamedTuple):
    """A checked request: the arguments of `diffmm.samplers.generate`.

    Attributes:
      predict: the denoiser.
      tokens: int32 ``[B, L]``, numpy.
      problem: the rest of the canvas.
      program: rule, settings, bounds.
      spec: what to compile for.
      record: as in `SampleResult`.
    """

    predict: PredictFn
    tokens: ArrayLike
    problem: Problem
    program: Program
    spec: Spec
    record: dict[str, Any]


def prepare(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    key: Array,
    *,
    rule: Rule,
    mask_id: int,
    allowed: ArrayLike | None = None,
    suppressed: Sequence[int] = (),
    settings: Settings | Mapping[Modality, Settings] | None = None,
    block_length: int | None = None,
    block_ends: BlockEnds | None = None,
    cache: CacheStrategy | None = None,
    max_forwards: int | None = None,
    block_forwards: int | None = None,
    eos_id: int | None = None,
    min_tokens: int = 0,
    trace: int | None = None,
    num_generated: int | None = None,
) -> Request:
    """Checks a request on the host, before anything is compiled.

    Args:
      predict: as in `sample`, like all other arguments but the last.
      params: its parameters; only shapes are looked at.
      canvas: rows to complete.
      key: one key, or one per row.
      rule: which positions are committed when.
      mask_id: the mask.
      allowed: ids by modality.
      suppressed: ids that are never drawn.
      settings: temperature, filters, guidance.
      block_length: generated positions per block.
      block_ends: where blocks end.
      cache: how keys and values are kept.
      max_forwards: evaluations after which a row stops.
      block_forwards: turns after which a row leaves its block.
      eos_id: the stop id.
      min_tokens: positions that may not hold it.
      trace: turns to record.
      num_generated: N to compile for, at least that of the longest row.

    Returns:
      `Request`.

    Raises:
      ValueError: for anything out of range, naming the argument.
    """
    if allowed is None:
        allowed = np.ones((len(Modality), _vocabulary_size(predict, params)), bool)
    table = check_allowed(allowed, mask_id, suppressed)
    size = table.shape[1]
    checked = check_canvas(canvas, mask_id, table)
    generated = np.asarray(checked.generate)
    counts = generated.sum(axis=1).astype(np.int32)
    longest = check_longest(int(counts.max(initial=0)), num_generated)
    order = _generated_positions(generated, longest)
    aligned = cache is not None and cache.aligned
    length = check_block_length(
        block_length, longest, divides=not aligned and block_ends is None
    )
    offset = 0
    if aligned:
        first = np.take_along_axis(checked.positions, order[:, :1], axis=1)
        offset = int((first % length).max())
    num_blocks = -(-(longest + offset) // length)
    check_rule(rule, num_blocks, size, predict, block_ends is not None)
    if cache is not None:
        cache.check(predict, block_length)
    settings = Settings() if settings is None else settings
    present = np.unique(np.asarray(checked.modality)[generated])
    controls = resolve(settings, present.tolist(), size)
    controls = check_guidance(controls, present, checked, predict, rule)
    check_budgets(rule, max_forwards, block_forwards, num_blocks, trace)
    check_stop(eos_id, min_tokens, mask_id, size)
    width = min(length, longest)
    if block_ends is not None:
        block_ends.check(size)
        width = min(max(block_ends.width(length, longest), length), longest)
    if rule.sees_canvas or trace is not None:
        width = longest
    num_rows, row_length = checked.tokens.shape
    sizes: tuple[int, ...] = ()
    if cache is not None:
        shift = predict.shift  # type: ignore[attr-defined]
        contiguous = _contiguous(order, counts)
        extra = (1 if contiguous else length) * shift
        sizes = cache.sizes(min(length + extra, row_length), row_length, contiguous)
    keys = row_keys(key, num_rows)
    unbounded = np.iinfo(np.int32).max
    return Request(
        predict=predict,
        tokens=checked.tokens,
        problem=Problem(
            positions=checked.positions,
            segment_ids=checked.segment_ids,
            modality=checked.modality,
            condition=checked.condition,
            order=order,
            counts=counts,
            keys=keys,
            allowed=table,
        ),
        program=Program(
            rule=_with_arrays(rule),
            controls=_with_arrays(controls),
            limits=Limits(
                forwards=np.int32(max_forwards or unbounded),
                block_turns=np.int32(block_forwards or unbounded),
                min_tokens=np.int32(min_tokens),
                until=np.int32(num_rows),
            ),
            cache=_with_arrays(cache),
            block_ends=_with_arrays(block_ends),
        ),
        spec=Spec(
            mask_id=int(mask_id),
            block_length=length,
            width=width,
            aligned=aligned,
            stop_id=None if eos_id is None else int(eos_id),
            trace_length=0 if trace is None else int(trace),
            sizes=sizes,
        ),
        record={
            "rule": describe(rule),
            "settings": describe(settings),
            "block_length": block_length,
            "block_ends": describe(block_ends),
            "cache": describe(cache),
            "max_forwards": max_forwards,
            "block_forwards": block_forwards,
            "mask_id": int(mask_id),
            "suppressed": [int(i) for i in suppressed],
            "eos_id": eos_id,
            "min_tokens": min_tokens,
            "key": np.asarray(jax.random.key_data(keys)).tolist(),
            "version": __version__,
        },
    )


def sample(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    key: Array,
    *,
    rule: Rule,
    mask_id: int,
    allowed: ArrayLike | None = None,
    suppressed: Sequence[int] = (),
    settings: Settings | Mapping[Modality, Settings] | None = None,
    block_length: int | None = None,
    block_ends: BlockEnds | None = None,
    cache: CacheStrategy | None = None,
    max_forwards: int | None = None,
    block_forwards: int | None = None,
    eos_id: int | None = None,
    min_tokens: int = 0,
    trace: int | None = None,
) -> SampleResult:
    """Completes the generated positions of a canvas.

    Per evaluation: guidance on raw logits, suppression of the mask and of ids that the
    position's modality does not allow, scores from that law, then temperature, top-k,
    top-p, min-p and an exact draw at the positions that the rule selects. Only the
    positions of the block are scored. Given tokens are returned untouched, the mask id
    among them.

    Args:
      predict: the denoiser; pass the same function object again to reuse the compiled
        loop.
      params: its parameters.
      canvas: rows to complete, fields ``[B, L]``.
      key: one key, or one per row ``[B]``. A row with the same key gives the same
        tokens alone, in any batch, at any place in it, with any padding.
      rule: which positions are committed when.
      mask_id: the mask; it is never drawn.
      allowed: bool ``[4, V]``, ids that a position may take, by `Modality`; all by
        default.
      suppressed: ids that are never drawn, whatever ``allowed`` says.
      settings: temperature, filters, guidance; one, or one per modality (default:
        temperature 1 and nothing else).
      block_length: generated positions per block, left to right; ``None`` is one block.
        It divides the longest generated stretch; shorter rows end in a shorter block.
      block_ends: ends blocks where what is predicted at their entry says so;
        ``block_length`` is then the default length.
      cache: which keys and values are kept between evaluations; ``None`` for none. The
        denoiser must be a `diffmm.typing.CachedFn`.
      max_forwards: evaluations after which a row stops, finished or not. Rules that
        take commits back require it.
      block_forwards: turns after which a row leaves its block, full or not.
      eos_id: stop a row at the end of the block that holds this id and fill what is
        left with it.
      min_tokens: the first so many generated positions of a row are never ``eos_id``.
      trace: turns per row to record in ``SampleResult.trace``; all generated positions
        are scored then. Turns beyond are not recorded.

    Returns:
      `SampleResult`.

    Raises:
      ValueError: for anything out of range, naming the argument; and if the denoiser
        returns laws that are not finite, naming row, turn, position and statistic.
    """
    request = prepare(
        predict,
        params,
        canvas,
        key,
        rule=rule,
        mask_id=mask_id,
        allowed=allowed,
        suppressed=suppressed,
        settings=settings,
        block_length=block_length,
        block_ends=block_ends,
        cache=cache,
        max_forwards=max_forwards,
        block_forwards=block_forwards,
        eos_id=eos_id,
        min_tokens=min_tokens,
        trace=trace,
    )
    state = generate(
        predict,
        params,
        jnp.array(request.tokens),
        request.problem,
        request.program,
        spec=request.spec,
    )
    check_faults(state)
    return result_of(state, request.record)


def check_faults(state: State) -> None:
    """Raises ``ValueError`` if the denoiser returned a law that is not finite."""
    fault = np.asarray(state.fault)
    if (fault >= 0).any():
        row = int(np.argmax(fault >= 0))
        name = CHECKED[int(state.fault_field[row])]
        raise ValueError(
            f"predict must return finite laws: {name} is not finite at row {row}, turn "
            f"{int(state.turns[row])}, position {fault[row]}"
        )


def result_of(state: State, record: dict[str, Any]) -> SampleResult:
    """What a final state means; ``record`` is that of the request."""
    counts = state.counts
    return SampleResult(
        tokens=state.tokens,
        nfe=state.nfe,
        forwards=counts.whole_calls + counts.partial_calls,
        logprob=state.logprob,
        step_committed=state.committed_at,
        still_masked=jnp.any(state.remaining, axis=1),
        counts=counts,
        trace=state.trace,
        record=record,
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
        if value.size > _LARGE:
            return f"{value.dtype} {value.shape}"
        return np.asarray(value).tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", repr(value))


def _generated_positions(generate: np.ndarray, longest: int) -> np.ndarray:
    """Generated positions of each row in order, then filling, int32 ``[B, N]``."""
    order = np.argsort(~generate, axis=1, kind="stable").astype(np.int32)
    return order[:, :longest]


def _contiguous(order: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the generated positions of every row are adjacent."""
    return all(
        (np.diff(row[:count]) == 1).all()
        for row, count in zip(order, counts, strict=True)
    )


def _vocabulary_size(predict: PredictFn, params: Params) -> int:
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(predict, params, one, one, one, one).shape[-1]


def _with_arrays(tree: Any) -> Any:
    """Python numbers as arrays, so that no number changes a compiled signature."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        leaf = np.asarray(leaf)
        kind = np.int32 if np.issubdtype(leaf.dtype, np.integer) else np.float32
        return leaf.astype(kind)

    return jax.tree.map(convert, _with_floats(tree))


def _with_floats(rule: Any) -> Any:
    """Integers in fields that are declared ``float`` become floats."""
    if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
        return rule
    whole = {
        field.name: float(value)
        for field in dataclasses.fields(rule)
        if isinstance(value := getattr(rule, field.name), int)
        and not isinstance(value, bool)
        and "float" in str(field.type)
    }
    return dataclasses.replace(rule, **whole) if whole else rule
