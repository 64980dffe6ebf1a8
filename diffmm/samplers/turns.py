"""Plans per modality: untuned defaults, and generating modalities in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.samplers.quota import remaining_cosine
from diffmm.samplers.rule import Rule
from diffmm.samplers.rules import FixedQuota
from diffmm.samplers.sampling import SampleResult, sample
from diffmm.samplers.scores import NegativeEntropy
from diffmm.samplers.settings import Settings
from diffmm.samplers.validate import row_keys
from diffmm.typing import Array, ArrayLike, Canvas, Modality, Params, PredictFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one modality is generated.

    Attributes:
      rule: which positions are committed when.
      settings: temperature, filters, guidance.
      block_length: generated positions per block, or ``None`` for one block.
    """

    rule: Rule
    settings: Settings = dataclasses.field(default_factory=Settings)
    block_length: int | None = None


def defaults_for(modality: Modality, length: int) -> Plan:
    """UNTUNED starting points, taken from what open systems do.

    | modality | steps | order | temperature | guidance scale |
    |---|---|---|---|---|
    | text | length, blocks of 32 where 32 divides it | max-prob | 0 | off |
    | image | 32 | max-prob, cosine quota | 1 | 4 |
    | audio | half the length | entropy | 1 | off |

    Args:
      modality: what is generated.
      length: positions to generate per row, ≥ 1.

    Returns:
      The plan.

    Raises:
      ValueError: for a length below 1 or a modality that is never generated.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}")
    if modality == Modality.TEXT:
        return Plan(
            rule=FixedQuota(num_steps=length),
            settings=Settings(temperature=0.0),
            block_length=32 if length % 32 == 0 else None,
        )
    if modality == Modality.IMAGE:
        return Plan(
            rule=FixedQuota(num_steps=32, remaining=remaining_cosine),
            settings=Settings(temperature=1.0, guidance_scale=4.0),
        )
    if modality == Modality.AUDIO:
        steps = max(length // 2, 1)
        return Plan(rule=FixedQuota(num_steps=steps, score=NegativeEntropy()))
    raise ValueError(f"modality must be TEXT, IMAGE or AUDIO, got {modality!r}")


def sample_in_turn(
    predict: PredictFn,
    params: Params,
    canvas: Canvas,
    key: Array,
    *,
    plans: Sequence[tuple[Modality, Plan]],
    mask_id: int,
    allowed: ArrayLike,
) -> SampleResult:
    """Generates the modalities of a canvas one after the other.

    Each turn generates the positions of its modality and leaves those of later turns
    masked. Positions whose modality is in no plan stay masked.

    Args:
      predict: the denoiser.
      params: its parameters.
      canvas: rows to complete.
      key: one key, or one per row.
      plans: modalities in their order, with how to generate each.
      mask_id: the mask.
      allowed: bool ``[4, V]``, ids by modality.

    Returns:
      `SampleResult` with evaluations added up; steps count on from turn to turn.

    Raises:
      ValueError: as `sample` does, or if ``plans`` is empty or repeats a modality.
    """
    order = [modality for modality, _ in plans]
    if not order or len(set(order)) != len(order):
        raise ValueError(f"plans must name every modality once, got {order}")
    generate = np.asarray(canvas.generate, bool)
    modality_of = np.asarray(canvas.modality)
    keys = row_keys(key, len(generate))
    results: list[SampleResult] = []
    records: dict[str, Any] = {}
    tokens: ArrayLike = canvas.tokens
    offset = jnp.zeros((len(generate), 1), jnp.int32)
    step_committed = jnp.full(generate.shape, -1, jnp.int32)
    for turn, (modality, plan) in enumerate(plans):
        result = sample(
            predict,
            params,
            canvas._replace(
                tokens=tokens, generate=generate & (modality_of == modality)
            ),
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, turn),
            rule=plan.rule,
            settings=plan.settings,
            mask_id=mask_id,
            allowed=allowed,
            block_length=plan.block_length,
        )
        own = result.step_committed
        step_committed = jnp.where(own >= 0, own + offset, step_committed)
        offset = jnp.maximum(offset, jnp.max(step_committed, axis=1, keepdims=True) + 1)
        tokens = result.tokens
        results.append(result)
        records[modality.name] = result.record
    masked = jnp.asarray(generate & ~np.isin(modality_of, order))
    last = results[-1]

    def total(field: str) -> Any:
        return jax.tree.map(
            lambda *x: sum(x[1:], x[0]), *(getattr(r, field) for r in results)
        )

    return SampleResult(
        tokens=last.tokens,
        nfe=total("nfe"),
        forwards=total("forwards"),
        logprob=total("logprob"),
        step_committed=step_committed,
        still_masked=jnp.any(masked, axis=1),
        counts=total("counts"),
        trace=None,
        record=records,
    )
