"""Checks of a sampling request, on the host, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffmm.samplers.rule import Rule
from diffmm.samplers.settings import Controls
from diffmm.typing import Array, Canvas, Modality, ShadowFn


def check_canvas(canvas: Canvas, mask_id: int, allowed: np.ndarray) -> Canvas:
    """A canvas of numpy arrays in the dtypes that the loop takes.

    Args:
      canvas: fields ``[B, L]``.
      mask_id: the mask.
      allowed: bool ``[4, V]``.

    Returns:
      The canvas as numpy arrays.

    Raises:
      ValueError: naming the field, what came and what is allowed.
    """
    size = allowed.shape[1]
    dtypes = (np.int32, np.int32, np.int32, np.int32, np.bool_, np.bool_)
    arrays: list[Any] = []
    shape = np.shape(canvas.tokens)
    if len(shape) != 2:
        raise ValueError(f"canvas.tokens must have shape [B, L], got {shape}")
    for name, value, dtype in zip(Canvas._fields, canvas, dtypes, strict=True):
        if np.shape(value) != shape:
            raise ValueError(
                f"canvas.{name} must have the shape of canvas.tokens, {shape}, "
                f"got {np.shape(value)}"
            )
        arrays.append(np.asarray(value).astype(dtype))
    tokens, _, segment_ids, modality, generate, _ = arrays
    _refuse(
        (tokens < 0) | (tokens >= size), tokens, "canvas.tokens", f"lie in [0, {size})"
    )
    _refuse(
        generate & (tokens != mask_id),
        tokens,
        "canvas.generate",
        f"be True only where canvas.tokens is the mask id {mask_id}",
    )
    _refuse(
        generate & (segment_ids == 0),
        segment_ids,
        "canvas.generate",
        "be False in padding (segment 0)",
    )
    _refuse(
        (modality < 0) | (modality > Modality.NONE),
        modality,
        "canvas.modality",
        f"lie in [0, {int(Modality.NONE)}]",
    )
    possible = np.asarray(allowed.any(axis=1))
    _refuse(
        generate & ~possible[modality],
        modality,
        "allowed",
        "have an id for the modality of every generated position",
    )
    return Canvas(*arrays)


def check_allowed(
    allowed: Any, mask_id: int, suppressed: Sequence[int] = ()
) -> np.ndarray:
    """The table of allowed ids without the mask and what is suppressed, as numpy.

    Raises:
      ValueError: unless it is bool ``[4, V]`` and all ids lie in [0, V).
    """
    allowed = np.array(allowed)
    if allowed.dtype != np.bool_ or allowed.ndim != 2 or len(allowed) != len(Modality):
        raise ValueError(
            f"allowed must be a bool table [{len(Modality)}, V], got {allowed.dtype} "
            f"{allowed.shape}"
        )
    check_id("mask_id", mask_id, allowed.shape[1])
    for token in suppressed:
        check_id("suppressed", token, allowed.shape[1])
    allowed[:, [mask_id, *suppressed]] = False
    return allowed


def check_id(name: str, value: int, size: int) -> None:
    """Raises ``ValueError`` unless ``value`` is an id."""
    if not 0 <= int(value) < size:
        raise ValueError(f"{name} must lie in [0, {size}), got {value!r}")


def check_longest(longest: int, num_generated: int | None) -> int:
    """N, the generated positions to compile for.

    Raises:
      ValueError: if nothing is to be generated, or more than ``num_generated``.
    """
    if longest < 1 and num_generated is None:
        raise ValueError(
            "canvas.generate must be True somewhere, got a canvas without positions "
            "to generate"
        )
    if num_generated is None:
        return longest
    if num_generated < max(longest, 1):
        raise ValueError(
            f"num_generated must be at least that of the longest row, "
            f"{max(longest, 1)}, got {num_generated!r}"
        )
    return int(num_generated)


def check_block_length(
    block_length: int | None, num_generated: int, *, divides: bool = True
) -> int:
    """The positions per block.

    Args:
      block_length: what was asked for, ``None`` for one block.
      num_generated: the longest generated stretch.
      divides: whether blocks must fill it.

    Raises:
      ValueError: unless ``block_length`` is at least 1 and divides the stretch.
    """
    if block_length is None:
        return max(num_generated, 1)
    if block_length < 1 or (divides and num_generated % block_length):
        raise ValueError(
            f"block_length must divide the number of generated positions, "
            f"{num_generated}, got {block_length!r}"
        )
    return int(block_length)


def check_rule(
    rule: Rule, num_blocks: int, size: int, predict: Any, adaptive: bool
) -> None:
    """Checks a rule's own fields, and that denoiser and blocks suit it.

    Raises:
      ValueError: naming the field or the argument.
    """
    if not isinstance(rule, Rule):
        raise ValueError(f"rule must be a diffmm.samplers.Rule, got {rule!r}")
    rule.check(num_blocks, size)
    name = type(rule).__name__
    if rule.counts_steps and adaptive:
        raise ValueError(
            f"block_ends must be None with rule={name}, which shares num_steps among a "
            f"known number of blocks"
        )
    if rule.needs_shadow and not isinstance(predict, ShadowFn):
        raise ValueError(
            f"rule={name} needs a denoiser with shadow_features (see "
            f"diffmm.typing.ShadowFn), got {predict!r}"
        )


def check_guidance(
    controls: Controls, present: np.ndarray, canvas: Canvas, predict: Any, rule: Rule
) -> Controls:
    """Drops guidance where it has no effect; refuses it where it has no meaning.

    Raises:
      ValueError: for a scale other than 1 without a condition to hide, with a denoiser
        that has no unconditional branch, or with a rule that needs shadows.
    """
    if controls.scale is None:
        return controls
    scales = controls.scale[present]
    if np.all(scales == 1.0):
        return controls._replace(scale=None) if not canvas.condition.any() else controls
    if not np.any(canvas.condition):
        raise ValueError(
            f"guidance_scale (or 1 + cfg_weight) must be 1 on a canvas without "
            f"condition positions, got {scales.tolist()}"
        )
    if not getattr(predict, "unconditional", True):
        raise ValueError(
            f"guidance_scale (or 1 + cfg_weight) must be 1 for a denoiser without an "
            f"unconditional branch (unconditional=False), got {scales.tolist()}"
        )
    if rule.needs_shadow:
        raise ValueError(
            f"guidance_scale (or 1 + cfg_weight) must be 1 with "
            f"rule={type(rule).__name__}, got {scales.tolist()}"
        )
    return controls


def check_budgets(
    rule: Rule,
    max_forwards: int | None,
    block_forwards: int | None,
    num_blocks: int,
    trace: int | None,
) -> None:
    """Checks bounds of evaluations.

    Raises:
      ValueError: for less than one evaluation per block, or a rule that takes commits
        back and has no bound.
    """
    if max_forwards is None and rule.remasks:
        raise ValueError(
            f"max_forwards must be given with rule={type(rule).__name__}, which takes "
            f"commits back"
        )
    if max_forwards is not None and max_forwards < num_blocks:
        raise ValueError(
            f"max_forwards must be at least one per block, {num_blocks}, got "
            f"{max_forwards!r}"
        )
    for name, value in (("block_forwards", block_forwards), ("trace", trace)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_stop(eos_id: int | None, min_tokens: int, mask_id: int, size: int) -> None:
    """Checks the stop id.

    Raises:
      ValueError: if it is no id, is the mask, or is missing where it is needed.
    """
    if eos_id is not None:
        check_id("eos_id", eos_id, size)
        if eos_id == mask_id:
            raise ValueError(f"eos_id must differ from mask_id, got {eos_id!r}")
    if min_tokens < 0 or (min_tokens and eos_id is None):
        raise ValueError(
            f"min_tokens must be at least 0, and 0 without eos_id, got {min_tokens!r}"
        )


def row_keys(key: Any, num_rows: int) -> Array:
    """One key per row: given as such, or folded from one key by row index.

    Args:
      key: a typed or raw key, or one per row.
      num_rows: B.

    Returns:
      key array ``[B]``.

    Raises:
      ValueError: if the number of keys is neither one nor B.
    """
    key = jax.numpy.asarray(key)
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != np.uint32 or key.ndim not in (1, 2):
            raise ValueError(
                f"key must be a jax PRNG key or one per row, got {key.dtype} "
                f"{key.shape}"
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        rows = np.arange(num_rows, dtype=np.uint32)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    if key.shape != (num_rows,):
        raise ValueError(
            f"key must be one key or one per row, shape ({num_rows},), got {key.shape}"
        )
    return key


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, allowed: str) -> None:
    if wrong.any():
        row, column = (int(x[0]) for x in np.nonzero(wrong))
        raise ValueError(
            f"{name} must {allowed}, got {values[row, column]} at row {row}, "
            f"position {column}"
        )
