"""What tests of rules share: one shape of canvas, hence one compilation per rule."""

import functools

import jax
import numpy as np
import samplers_toy as toy
from scipy import stats

from diffmm.samplers import sample

# Rows of eight kinds, from nothing given to everything given.
ROWS = 8_000
WIDTH = 2
LENGTH = 4
BUDGET = 60
JOINT = toy.JOINT.astype(np.float32)
GIVEN = np.array(
    [
        *([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]),
        *([0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1]),
    ],
    bool,
)


def product_joint() -> np.ndarray:
    law = np.ones(1)
    for axis in range(LENGTH):
        law = np.multiply.outer(law, toy.marginals(toy.JOINT, {}, axis))
    return law.reshape((3,) * LENGTH)


@functools.cache
def ragged_canvas():
    canvas = toy.empty_canvas(ROWS)
    given = np.tile(GIVEN, (ROWS // len(GIVEN), 1))
    words = np.random.default_rng(1).choice(81, ROWS, p=toy.JOINT.ravel())
    tokens = np.stack(np.unravel_index(words, (3,) * LENGTH), axis=1)
    return canvas._replace(
        tokens=np.where(given, tokens, toy.MASK).astype(np.int32), generate=~given
    )


def empty_canvas():
    return toy.empty_canvas(ROWS)


@functools.cache
def keys_of(seed: int):
    return jax.random.split(jax.random.key(seed), ROWS)


def run(rule, canvas=None, *, seed=0, joint=JOINT, predict=toy.predict, **options):
    """All rows in blocks of two."""
    options.setdefault("max_forwards", BUDGET)
    options.setdefault("block_length", WIDTH)
    return sample(
        predict,
        joint,
        ragged_canvas() if canvas is None else canvas,
        options.pop("keys", keys_of(seed)),
        rule=rule,
        mask_id=toy.MASK,
        allowed=toy.ALLOWED,
        **options,
    )


def p_value(tokens, law) -> float:
    """Chi-square with cells of expectation below 5 pooled."""
    observed, expected = toy.counts(tokens), law.ravel() * len(tokens)
    small = expected < 5
    cells = np.append(observed[~small], observed[small].sum())
    means = np.append(expected[~small], expected[small].sum())
    keep = means > 0
    return stats.chisquare(cells[keep], means[keep], sum_check=False).pvalue


def assert_complete(result, canvas) -> None:
    """Given tokens untouched, no mask left, nothing run that had nothing to do."""
    tokens, generate = np.asarray(result.tokens), np.asarray(canvas.generate)
    np.testing.assert_array_equal(
        tokens[~generate], np.asarray(canvas.tokens)[~generate]
    )
    assert not np.any(tokens == toy.MASK)
    assert not np.any(result.still_masked)
    nfe = np.asarray(result.nfe)
    np.testing.assert_array_equal(nfe == 0, ~generate.any(axis=1))
    assert nfe.max() == int(result.forwards) <= BUDGET


def assert_guarded(result, canvas) -> None:
    """Every evaluation commits; blocks are filled in order."""
    generate = np.asarray(canvas.generate)
    at = np.asarray(result.step_committed)
    nfe = np.asarray(result.nfe)
    assert np.all(nfe <= generate.sum(axis=1))
    for turn in range(LENGTH):
        np.testing.assert_array_equal((at == turn).any(axis=1), turn < nfe)
    assert_block_order(result, canvas)


def assert_block_order(result, canvas) -> None:
    generate = np.asarray(canvas.generate)
    block = (np.cumsum(generate, axis=1) - 1) // WIDTH
    at = np.asarray(result.step_committed)
    first = np.where(generate & (block == 0), at, -1).max(axis=1)
    second = np.where(generate & (block == 1), at, LENGTH * BUDGET).min(axis=1)
    assert np.all(first < second)


def assert_rows_are_alone(rule, result, **options) -> None:
    """Other neighbours, other places in the batch: the same rows."""
    order = np.random.default_rng(2).permutation(ROWS)
    canvas = ragged_canvas()._replace(
        **{
            name: np.asarray(getattr(ragged_canvas(), name))[order]
            for name in ("tokens", "generate")
        }
    )
    moved = run(rule, canvas, keys=keys_of(0)[order], **options)
    for name in ("tokens", "nfe", "step_committed"):
        np.testing.assert_array_equal(
            getattr(moved, name), np.asarray(getattr(result, name))[order]
        )
