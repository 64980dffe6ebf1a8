"""A problem on which the confidence order is exactly wrong, with its exact denoiser.

Of 16 positions the first n (3 to 8, told by the prompt) hold exactly one 1 and zeros
else, uniform over which; the others are free, uniform on four values. Free positions
look risky, with confidence ¼, and are always safe. Those of the group look safe, with
confidence 1 − 1/n, and all at once are always wrong: every arg-max is 0. Two forwards
suffice: all but one position of the group with everything free, then the last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.typing import Canvas, Modality

LENGTH = 16
VALUES = 4
SMALLEST, LARGEST = 3, 8
MASK = VALUES
#: The prompt is one token, this plus n.
PROMPT = MASK + 1 - SMALLEST
VOCABULARY = PROMPT + LARGEST + 1
#: Generated positions take values only.
ALLOWED = np.broadcast_to(np.arange(VOCABULARY) < VALUES, (4, VOCABULARY))


def predict(params, tokens, positions, segment_ids, scored):
    """Logits of the exact marginals given what is there; a `diffmm.typing.PredictFn`.

    Rows are the prompt and then any number of positions.
    """
    del params, positions, segment_ids
    group_size = tokens[:, :1] - PROMPT
    index = jnp.arange(tokens.shape[1])[None] - 1
    in_group = (index >= 0) & (index < group_size)
    masked = tokens == MASK
    found = jnp.any(in_group & (tokens == 1), axis=1)
    left = jnp.sum((in_group & masked).astype(jnp.float32), axis=1)
    one = jnp.where(found, 0.0, 1.0 / jnp.maximum(left, 1.0))[:, None]
    law_of_group = jnp.stack([1.0 - one, one, 0 * one, 0 * one], axis=-1)

    def at(values):
        return jnp.take_along_axis(values, scored, axis=1)[..., None]

    law = jnp.where(at(in_group), law_of_group, 1.0 / VALUES)
    own = jax.nn.one_hot(at(tokens)[..., 0], VALUES)
    law = jnp.where(at(masked), law, own)
    # Impossible values have probability 0, not a tiny one: rules that add up entropies
    # can tell.
    logits = jnp.where(law > 0, jnp.log(jnp.maximum(law, 1e-30)), -1e9)
    rest = jnp.zeros((*logits.shape[:2], VOCABULARY - VALUES))
    return jnp.concatenate([logits, rest], axis=-1)


def prompts(rng: np.random.Generator, num_rows: int, length: int = LENGTH) -> Canvas:
    """Rows with random n; ``length`` generated positions each."""
    sizes = rng.integers(SMALLEST, LARGEST + 1, num_rows)
    shape = (num_rows, length + 1)
    tokens = np.full(shape, MASK, np.int32)
    tokens[:, 0] = sizes + PROMPT
    generate = np.broadcast_to(np.arange(length + 1) > 0, shape)
    return Canvas(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(length + 1, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        modality=np.where(generate, Modality.TEXT, Modality.NONE).astype(np.int8),
        generate=generate,
        condition=~generate,
    )


def reward(prompts, completions):
    """1 where all is filled and the group holds exactly one 1: ``[B]`` float32."""
    size = prompts[:, :1] - PROMPT
    in_group = jnp.arange(completions.shape[1])[None] < size
    ones = jnp.sum((in_group & (completions == 1)).astype(jnp.int32), axis=1)
    return ((ones == 1) & jnp.all(completions != MASK, axis=1)).astype(jnp.float32)
