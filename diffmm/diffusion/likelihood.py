"""Likelihood bounds of a trained model, with error bars.

For example j with n_j maskable positions and draws d = 1..K,

    k_d  = ceil(n_j · ((u_j + d/K) mod 1)), clipped to [1, n_j],
    est_jd = (n_j/k_d) · Σ_{i in a uniform k_d-subset} −log p(x0_i | the rest),

whose mean over d estimates a bound on −log p(example j) without bias. The masks
depend on (key, example index, draw) only: two models, or two batch sizes, are
compared under the same masks.

References:
  Nie et al., "Scaling up Masked Diffusion Models on Text", arXiv 2410.18514 (128
  draws); Uria et al., "A Deep and Tractable Density Estimator", arXiv 1310.1757
  (the any-order average that the bound equals).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.diffusion.draws import row_keys, uniform_subset
from diffmm.diffusion.estimates import LikelihoodBound, assemble
from diffmm.typing import NUM_GROUPS, Array, Batch, NllFn, Params

MAX_EXACT = 12


def likelihood_bound(
    nll_fn: NllFn,
    params: Params,
    examples: Batch | Iterable[Batch],
    key: Array,
    *,
    mask_id: int,
    draws: int = 128,
    rows_per_call: int = 32,
) -> LikelihoodBound:
    """Monte-Carlo bound on −log p of each row's maskable content given the rest.

    Args:
      nll_fn: scores the clean tokens given the masked ones; compiled once per
        function and shape, so pass the same object again rather than a new lambda.
      params: passed to ``nll_fn``.
      examples: rows ``[J, L]``, one row ``[L]``, or an iterable of batches of equal
        L. Examples are numbered in the order they come.
      key: the PRNG key that fixes all masks.
      mask_id: the absorbing symbol.
      draws: K >= 1, draws per example (2 or more for a Monte-Carlo error).
      rows_per_call: masked rows per call of ``nll_fn``.

    Returns:
      Totals and per-group estimates, in nats per token and derived units.

    Raises:
      ValueError: on ``draws`` or ``rows_per_call`` below 1, examples that hold the
        mask id or are not ``[J, L]``, or maskable positions without a group.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    if rows_per_call < 1:
        raise ValueError(f"rows_per_call must be at least 1, got {rows_per_call!r}")
    sums, counts = [], []
    offset = 0
    for batch in _batches(examples, mask_id):
        n = batch.maskable.sum(axis=-1)
        num_rows = len(n)
        pairs = list(itertools.product(range(num_rows), range(draws)))
        num_pairs = len(pairs)
        scored = []
        for chunk in _chunks(pairs, rows_per_call):
            local, draw = np.asarray(chunk, np.int32).T
            rows = _take(batch, local)
            masked, k = _draw_masks(key, local + offset, draw, rows.maskable, draws)
            group_sums = _score(nll_fn, mask_id, params, rows, masked)
            scored.append((group_sums, k))
        nats = np.concatenate([np.asarray(x, np.float64) for x, _ in scored])
        size = np.concatenate([np.asarray(k, np.float64) for _, k in scored])
        nats = nats[:num_pairs].reshape(num_rows, draws, NUM_GROUPS)
        size = size[:num_pairs].reshape(num_rows, draws, 1)
        sums.append(nats * (n[:, None, None] / size))
        counts.append(_group_counts(batch))
        offset += num_rows
    return assemble(np.concatenate(sums), np.concatenate(counts), exact=False)


def exact_bound(
    nll_fn: NllFn,
    params: Params,
    examples: Batch,
    *,
    mask_id: int,
    rows_per_call: int = 64,
) -> LikelihoodBound:
    """The bound itself, by enumeration of all subsets; no Monte-Carlo error.

    Σ over non-empty subsets S of Σ_{i in S} CE_i(S) / (k·C(n, k)), k = |S|: the
    average over all n! orders of the autoregressive loss, in 2^n − 1 evaluations.

    Args:
      nll_fn: as in `likelihood_bound`.
      params: passed to ``nll_fn``.
      examples: rows ``[J, L]`` or one row ``[L]``, with at most 12 maskable positions
        each.
      mask_id: the absorbing symbol.
      rows_per_call: masked rows per call of ``nll_fn``.

    Raises:
      ValueError: on a row with more than 12 maskable positions, and as in
        `likelihood_bound`.
    """
    if rows_per_call < 1:
        raise ValueError(f"rows_per_call must be at least 1, got {rows_per_call!r}")
    sums, counts = [], []
    for batch in _batches(examples, mask_id):
        counts.append(_group_counts(batch))
        for row, maskable in enumerate(batch.maskable):
            (places,) = np.nonzero(maskable)
            n = len(places)
            if n > MAX_EXACT:
                raise ValueError(
                    f"examples must have at most {MAX_EXACT} maskable positions per "
                    f"row for enumeration, got {n} in row {row}"
                )
            total = np.zeros(NUM_GROUPS)
            for chunk in _chunks(list(range(1, 2**n)), rows_per_call):
                codes = np.asarray(chunk)
                bits = (codes[:, None] >> np.arange(n)) & 1
                masked = np.zeros((rows_per_call, maskable.size), bool)
                masked[:, places] = bits
                k = bits.sum(axis=-1)
                weight = 1.0 / np.array([size * math.comb(n, size) for size in k])
                # Filler rows repeat the last subset and count for nothing.
                weight[np.flatnonzero(np.diff(codes, prepend=0) == 0)] = 0.0
                rows = _take(batch, np.full(rows_per_call, row))
                group_sums = _score(nll_fn, mask_id, params, rows, masked)
                total += weight @ np.asarray(group_sums, np.float64)
            sums.append(total[None, None])
    return assemble(np.concatenate(sums), np.concatenate(counts), exact=True)


@functools.partial(jax.jit, static_argnums=(0,))
def _score(
    nll_fn: NllFn, mask_id: Array, params: Params, batch: Batch, masked: Array
) -> Array:
    """Sums of the masked positions' losses by group, float32 ``[B, NUM_GROUPS]``."""
    tokens = jnp.where(masked, jnp.asarray(mask_id, batch.tokens.dtype), batch.tokens)
    nll = jnp.where(masked, nll_fn(params, tokens, batch), 0.0)
    groups = jnp.arange(NUM_GROUPS, dtype=batch.group.dtype)
    of_group = batch.group[:, None, :] == groups[None, :, None]
    return jnp.sum(jnp.where(of_group, nll[:, None, :], 0.0), axis=-1)


@functools.partial(jax.jit, static_argnums=(4,))
def _draw_masks(
    key: Array, example: Array, draw: Array, maskable: Array, draws: int
) -> tuple[Array, Array]:
    """Masks and their sizes k for pairs (example, draw), in stratified count form."""
    shift_key, mask_key = jax.random.split(key)
    shift = jax.vmap(jax.random.uniform)(row_keys(shift_key, example))
    tau = shift + draw.astype(jnp.float32) / draws
    tau = tau - jnp.floor(tau)
    n = jnp.maximum(jnp.sum(maskable, axis=-1, dtype=jnp.int32), 1)
    k = jnp.clip(jnp.ceil(n * tau).astype(jnp.int32), 1, n)
    keys = jax.vmap(jax.random.fold_in)(row_keys(mask_key, example), draw)
    return uniform_subset(keys, maskable, k), k


def _batches(examples: Batch | Iterable[Batch], mask_id: int) -> Iterator[Batch]:
    """Yields checked NumPy batches ``[J, L]``."""
    # A Batch is itself iterable: it is a tuple of its fields.
    batches = [examples] if isinstance(examples, Batch) else examples
    seen = False
    for batch in batches:
        batch = Batch(*(np.asarray(field) for field in batch))
        if batch.tokens.ndim == 1:
            batch = Batch(*(field[None] for field in batch))
        if batch.tokens.ndim != 2:
            raise ValueError(
                f"examples must have fields [J, L], got tokens {batch.tokens.shape}"
            )
        if np.any(batch.tokens == mask_id):
            raise ValueError(f"examples must be clean, got mask_id {mask_id} in tokens")
        if np.any(batch.maskable & ((batch.group < 0) | (batch.group >= NUM_GROUPS))):
            raise ValueError("examples must give every maskable position a Group")
        if len(batch.tokens):
            seen = True
            yield batch
    if not seen:
        raise ValueError("examples must hold at least one row, got none")


def _chunks(items: list, size: int) -> Iterator[list]:
    """Pieces of exactly ``size`` items; the last is filled up with its last item."""
    for start in range(0, len(items), size):
        piece = items[start : start + size]
        yield piece + piece[-1:] * (size - len(piece))


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return Batch(*(field[rows] for field in batch))


def _group_counts(batch: Batch) -> np.ndarray:
    """int64 ``[J, NUM_GROUPS]``, maskable positions by group."""
    groups = np.arange(NUM_GROUPS)
    of_group = batch.group[:, None, :] == groups[None, :, None]
    return np.sum(of_group & batch.maskable[:, None, :], axis=-1)
