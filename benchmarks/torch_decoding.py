"""Parallel decoding of masked tokens as a PyTorch user would write it from the papers.

For side-by-side measurement: float64 confidences, one Python loop over the rows of a
batch, one over what a row ranks, and device scalars read where a decision needs them,
as released decoders do.

References:
  Nie et al., "Large Language Diffusion Models", arXiv 2502.09992 (fixed quota); Wu et
  al., "Fast-dLLM", arXiv 2505.22618 (threshold).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def quota(masked: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Tokens per row and step int64 ``[B, n]``: even shares, the first get the rest."""
    totals = masked.sum(dim=1)
    table = torch.zeros(len(masked), num_steps, dtype=torch.int64)
    for row in range(len(masked)):
        share, rest = divmod(int(totals[row]), num_steps)
        table[row] = share
        table[row, :rest] += 1
    return table


def choose(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    masked: torch.Tensor,
    counts: torch.Tensor | None,
    threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates ``[B, K]`` and which of them are committed, bool ``[B, K]``.

    Without a threshold the ``counts [B]`` most confident masks are; with one all masks
    that reach it, and the most confident one in any case.
    """
    candidates = logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.to(torch.float64), dim=-1)
    confidence = probabilities.gather(-1, candidates[..., None]).squeeze(-1)
    candidates = torch.where(masked, candidates, tokens)
    confidence = torch.where(masked, confidence, -torch.inf)
    chosen = torch.zeros_like(masked)
    left = masked.sum(dim=1)
    for row in range(len(tokens)):
        many = left[row] if threshold is not None else counts[row]
        if not many:
            continue
        values, order = torch.topk(confidence[row], k=int(many))
        chosen[row, order] = True
        if threshold is not None:
            for rank in range(1, int(many)):
                if values[rank] < threshold:
                    chosen[row, order[rank]] = False
    return candidates, chosen


@torch.no_grad()
def decode(
    model: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    mask_id: int,
    *,
    num_steps: int | None = None,
    threshold: float | None = None,
) -> tuple[torch.Tensor, int]:
    """Fills one block greedily.

    Args:
      model: tokens ``[B, K]`` to logits ``[B, K, V]``.
      tokens: int64 ``[B, K]``.
      mask_id: what is to be filled.
      num_steps: of the fixed quota.
      threshold: of the confidence, instead of ``num_steps``.

    Returns:
      The tokens and the number of model calls.
    """
    tokens, calls = tokens.clone(), 0
    table = None if num_steps is None else quota(tokens == mask_id, num_steps)
    while True:
        masked = tokens == mask_id
        if not masked.any():
            return tokens, calls
        logits = model(tokens)
        counts = None if table is None else table[:, calls]
        calls += 1
        candidates, chosen = choose(logits, tokens, masked, counts, threshold)
        tokens[chosen] = candidates[chosen]
