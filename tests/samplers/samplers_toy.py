"""A joint law over four ternary tokens with its exact denoiser."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from diffmm.samplers import canvas_from_prompts
from diffmm.typing import Canvas

MASK = 3
JOINT = np.random.default_rng(0).dirichlet(0.3 * np.ones(81)).reshape(3, 3, 3, 3)
ALLOWED = np.ones((4, 4), bool)
# Counts traces: one per compilation of the loop (two with guidance).
TRACES = [0]


def predict(joint, tokens, positions, segment_ids, scored):
    """Conditional marginals; the logit of the mask id is made the largest of all."""
    TRACES[0] += 1
    weight = jnp.broadcast_to(joint[None], (len(tokens), 3, 3, 3, 3))
    for axis in range(4):
        token = tokens[:, axis : axis + 1]
        fits = (token == jnp.arange(3)[None]) | (token == MASK)
        shape = [len(tokens), 1, 1, 1, 1]
        shape[axis + 1] = 3
        weight = weight * fits.reshape(shape)
    axes = range(1, 5)
    marginals = jnp.stack(
        [weight.sum(tuple(a for a in axes if a != axis)) for axis in axes], axis=1
    )
    logits = jnp.log(jnp.maximum(marginals, 1e-30))
    logits = jnp.take_along_axis(logits, scored[..., None], axis=1)
    mask_logit = jnp.full((*logits.shape[:2], 1), 1e4)
    return jnp.concatenate([logits, mask_logit], axis=-1)


def empty_canvas(num_rows: int) -> Canvas:
    return canvas_from_prompts([[]] * num_rows, 4, mask_id=MASK)


def counts(tokens) -> np.ndarray:
    code = np.ravel_multi_index(np.asarray(tokens).T, (3,) * 4)
    return np.bincount(code, minlength=81)


def marginals(joint: np.ndarray, given: dict[int, int], axis: int) -> np.ndarray:
    index = tuple(given.get(a, slice(None)) for a in range(4))
    part = joint[index]
    if part.sum() == 0:
        return np.full(3, 1 / 3)
    free = [a for a in range(4) if a not in given]
    law = part.sum(tuple(i for i, a in enumerate(free) if a != axis))
    return law / law.sum()


@functools.cache
def _given_set_law(prefix: frozenset, group: tuple) -> np.ndarray:
    """Probabilities [3^|group|] of a group drawn independently given a prefix."""
    given = dict(prefix)
    law = np.ones(1)
    for axis in group:
        law = np.multiply.outer(law, marginals(JOINT, given, axis))
    return law.reshape(-1)


def ancestral_law(num_steps: int) -> np.ndarray:
    """The law of T-step ancestral sampling, by enumeration, float64 [81].

    Each token's step is uniform on T; tokens that share a step are independent given
    the earlier ones.
    """
    law = np.zeros((3,) * 4)
    partitions: dict[tuple, int] = {}
    for steps in itertools.product(range(num_steps), repeat=4):
        groups = tuple(
            tuple(a for a in range(4) if steps[a] == step)
            for step in sorted(set(steps))
        )
        partitions[groups] = partitions.get(groups, 0) + 1
    for groups, times in partitions.items():
        for x in itertools.product(range(3), repeat=4):
            p, given = 1.0, {}
            for group in groups:
                table = _given_set_law(frozenset(given.items()), group)
                at = np.ravel_multi_index([x[a] for a in group], (3,) * len(group))
                p *= table[at]
                given.update({a: x[a] for a in group})
            law[x] += p * times / num_steps**4
    return law.reshape(-1)


def expected_evaluations(num_steps: int) -> float:
    """T·(1 − (1 − 1/T)^L) for L = 4."""
    return num_steps * (1 - (1 - 1 / num_steps) ** 4)
