"""Sums that can be checked, and a denoiser that learns to write them.

A row is a few equations such as ``12=3+9;``. The sums are given; addends and signs are
generated. The signs are certain at once. One addend of an equation is nearly free, and
the denoiser is not sure of it; the other then follows. All that matters is not to write
both of them at the same time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffmm.diffusion import CountMasking
from diffmm.models import Denoiser, TransformerConfig, predict_fn
from diffmm.typing import Batch, Canvas, Group, Modality

SYMBOLS = "0123456789=+;"
MASK = len(SYMBOLS)
VOCABULARY = MASK + 1
EQUALS, PLUS, END = 10, 11, 12
#: Tokens of an equation, and which of them are generated.
EQUATION = 7
GENERATED = EQUATION - 2
ALLOWED = np.broadcast_to(np.arange(VOCABULARY) < MASK, (4, VOCABULARY))
#: Training rows hold so many equations, in one segment or in two.
EQUATIONS = 6


def equations(addends: jax.Array) -> jax.Array:
    """Addends int32 ``[B, E, 2]`` to tokens int32 ``[B, 7·E]``."""
    total = jnp.sum(addends, axis=-1)
    columns = [
        total // 10, total % 10, jnp.full_like(total, EQUALS), addends[..., 0],
        jnp.full_like(total, PLUS), addends[..., 1], jnp.full_like(total, END),
    ]  # fmt: skip
    return jnp.stack(columns, axis=-1).reshape(len(addends), -1)


def canvas_of(tokens: np.ndarray) -> Canvas:
    """Rows of which the sums are kept and everything else is to be generated."""
    tokens = np.asarray(tokens, np.int32)
    index = np.arange(tokens.shape[1], dtype=np.int32)
    generate = np.broadcast_to(index % EQUATION >= 2, tokens.shape)
    return Canvas(
        tokens=np.where(generate, MASK, tokens).astype(np.int32),
        positions=np.broadcast_to(index, tokens.shape),
        segment_ids=np.ones(tokens.shape, np.int32),
        modality=np.where(generate, Modality.TEXT, Modality.NONE).astype(np.int8),
        generate=generate,
        condition=~generate,
    )


def prompts(
    rng: np.random.Generator, rows: int, num_equations: int = EQUATIONS // 2
) -> Canvas:
    """Rows of random equations to be completed."""
    addends = rng.integers(0, 10, (rows, num_equations, 2))
    return canvas_of(np.asarray(equations(jnp.asarray(addends))))


def reward(prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """1 where every equation of the row is right: float32 ``[B]``."""
    prompts = np.asarray(prompts).reshape(len(prompts), -1, EQUATION - GENERATED)
    rest = np.asarray(completions).reshape(len(prompts), -1, GENERATED)
    total = 10 * prompts[..., 0] + prompts[..., 1]
    addends = rest[..., 1::2]
    right = (rest[..., ::2] == [EQUALS, PLUS, END]).all(-1)
    right &= (addends < 10).all(-1) & (addends.sum(-1) == total)
    return right.all(-1).astype(np.float32)


def training_batch(key: jax.Array, rows: int) -> Batch:
    """Clean rows; in half of them two segments of half the length."""
    tokens = equations(jax.random.randint(key, (rows, EQUATIONS, 2), 0, 10))
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    half = tokens.shape[1] // 2
    split = (jnp.arange(rows) % 2 == 1)[:, None]
    maskable = index % EQUATION >= 2
    return Batch(
        tokens=tokens,
        positions=jnp.where(split, index % half, index),
        segment_ids=jnp.where(split, 1 + index // half, 1),
        modality=jnp.where(maskable, int(Modality.TEXT), int(Modality.NONE)),
        maskable=maskable,
        condition=~maskable,
        loss_weight=maskable.astype(jnp.float32),
        group=jnp.where(maskable, int(Group.TEXT), int(Group.NONE)),
        task=jnp.zeros((rows,), jnp.int32),
    )


def train_denoiser(*, width: int, num_layers: int, steps: int, rows: int, seed: int):
    """Trains a denoiser.

    Returns:
      ``(predict, params, loss)``, the loss in nats per generated token.
    """
    config = TransformerConfig(
        vocabulary_size=VOCABULARY, width=width, num_layers=num_layers, head_dim=16
    )
    graphdef, params = nnx.split(Denoiser(config, rngs=nnx.Rngs(seed)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 20 + 1, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))
    process = CountMasking()

    def loss_of(params, key):
        data_key, mask_key = jax.random.split(key)
        batch = training_batch(data_key, rows)
        corruption = process.corrupt(
            mask_key, batch, mask_id=MASK, rows=jnp.arange(rows), num_rows=rows
        )
        logits = nnx.merge(graphdef, params)(
            corruption.tokens, batch.positions, batch.segment_ids
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
        weight = jnp.where(corruption.masked, corruption.weight, 0.0)
        return jnp.sum(weight * nll) / jnp.sum(batch.loss_weight)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, opt_state, keys):
        def step(carry, key):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, key)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, changes), opt_state), loss

        return jax.lax.scan(step, (params, opt_state), keys)

    opt_state = optimizer.init(params)
    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), losses = run(params, opt_state, keys)
    return predict_fn(graphdef), params, float(jnp.mean(losses[-50:]))
