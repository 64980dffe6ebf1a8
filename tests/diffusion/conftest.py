"""Batches and a table of conditionals that the tests of this folder share."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.typing import Batch, Group, Modality

MASK_ID = 99


def make_batch(num_rows, length, *, modality=Modality.TEXT, maskable=None, seed=0):
    shape = (num_rows, length)
    if maskable is None:
        maskable = np.ones(shape, bool)
    maskable = np.broadcast_to(maskable, shape).copy()
    modality = np.broadcast_to(np.asarray(modality, np.int8), shape)
    modality = np.where(maskable, modality, Modality.NONE).astype(np.int8)
    generator = np.random.default_rng(seed)
    return Batch(
        tokens=generator.integers(0, 7, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        modality=modality,
        maskable=maskable,
        condition=np.zeros(shape, bool),
        loss_weight=maskable.astype(np.float32),
        group=np.where(maskable, modality, Group.NONE).astype(np.int8),
        task=np.zeros(num_rows, np.int8),
    )


def table_nll(table, tokens, batch):
    """Cross-entropies that are an arbitrary function of the set of masked positions.

    ``table`` is ``[2**L, L]``, indexed by the masked positions as binary digits.
    """
    del batch
    powers = 2 ** jnp.arange(tokens.shape[1], dtype=jnp.int32)
    masked = (tokens == MASK_ID).astype(jnp.int32)
    return table[jnp.sum(masked * powers[None, :], axis=1)]


@pytest.fixture(scope="session")
def mask_id():
    return MASK_ID


@pytest.fixture(scope="session", name="make_batch")
def _make_batch():
    return make_batch


@pytest.fixture(scope="session", name="table_nll")
def _table_nll():
    return table_nll


@pytest.fixture(scope="session")
def table():
    """Random cross-entropies for L = 5, float32 ``[32, 5]``."""
    return np.random.default_rng(1).uniform(0.1, 3.0, (32, 5)).astype(np.float32)
