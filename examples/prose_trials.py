"""Short trials of one small language model of prose, compiled once per shape.

What experiments about hyper-parameters share: data, model, loss, and a training run
that is one compiled function of the learning rate. The model is the library's
transformer with causal attention, predicting the next byte: unlike a masked model it
learns bigrams at once, so that a few hundred steps already tell hyper-parameters apart.
Not an example of its own: see `transfer_hyperparameters.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffmm.data.sources import source_by_name
from diffmm.diffusion import cross_entropy
from diffmm.models import Denoiser, TransformerConfig
from diffmm.optim import AdamW, adamw, mask_by_name
from diffmm.parameterisation import Leaf, infer
from diffmm.typing import Multiplier

VOCABULARY_SIZE = 256


class Prose(NamedTuple):
    """Batches of one experiment, as device arrays.

    Attributes:
      train: int32 ``[steps, rows, length + 1]``: windows of bytes.
      validation: int32 ``[batches, rows, length + 1]``.
    """

    train: jax.Array
    validation: jax.Array


def load_prose(*, length: int, rows: int, steps: int, validation_rows: int) -> Prose:
    """English prose as bytes, cut into windows; the same batches for every trial."""
    parts = []
    for split, batch, batches in (
        ("train", rows, steps),
        ("validation", 64, max(1, validation_rows // 64)),
    ):
        texts = [item.texts[0] for item in source_by_name("prose", split)]
        stream = np.frombuffer("\n".join(texts).encode(), np.uint8).astype(np.int32)
        starts = np.random.default_rng(0).integers(
            len(stream) - length, size=(batches, batch)
        )
        windows = stream[starts[..., None] + np.arange(length + 1)]
        parts.append(jnp.asarray(windows))
    return Prose(*parts)


def model_config(width: int, num_layers: int, head_dim: int) -> TransformerConfig:
    """The family: heads are added at a fixed head dimension."""
    return TransformerConfig(
        vocabulary_size=VOCABULARY_SIZE,
        width=width,
        num_layers=num_layers,
        head_dim=head_dim,
        rope_base=1_000.0,
    )


def fresh(config: TransformerConfig, seed: Any = 0) -> Any:
    """Parameters as the model's own initialiser draws them."""
    return nnx.state(Denoiser(config, rngs=nnx.Rngs(seed)), nnx.Param)


def leaves_between(
    base: TransformerConfig, target: TransformerConfig
) -> dict[str, Leaf]:
    """Roles and ratios; a family twice as wide and deep names what scales."""
    larger = dataclasses.replace(
        base, width=2 * base.width, num_layers=2 * base.num_layers
    )
    return infer(fresh, base, target, family=(base, larger))


def causal_attention(query: Any, key: Any, value: Any, *, segment_ids: Any) -> Any:
    """Softmax attention to this position and those before it, scale 1/√head_dim."""
    del segment_ids
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def make_loss(config: TransformerConfig) -> Callable[..., Any]:
    """``loss(params, windows [rows, length + 1])``, nats per byte."""
    graphdef = nnx.split(
        nnx.eval_shape(
            lambda: Denoiser(config, rngs=nnx.Rngs(0), attention=causal_attention)
        )
    )[0]

    def loss(params: Any, windows: Any) -> Any:
        model = nnx.merge(graphdef, params)
        nll = cross_entropy(
            model.hidden(windows[:, :-1]), model.unembedding[...], windows[:, 1:]
        )
        return jnp.mean(nll)

    return loss


def make_trial(
    config: TransformerConfig,
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    hyper: AdamW,
    *,
    warmup: float = 0.1,
    final_ratio: float = 0.0,
) -> Callable[[Prose, Any, Any], dict[str, Any]]:
    """One training run as a function to be compiled once.

    Args:
      config: shape of the model.
      leaves: from `leaves_between`.
      multipliers: of the parameterisation under test.
      hyper: hyper-parameters at the base; its learning rate counts as 1.
      warmup: fraction of the steps; cosine decay follows …
      final_ratio: … to this share of the peak.

    Returns:
      ``trial(prose, params, learning_rate)`` with the validation loss after the last
      step (nats per byte) and the training losses ``[steps]``.
    """
    loss = make_loss(config)
    matrices = {name for name, leaf in leaves.items() if leaf.matrix}

    def trial(prose: Prose, params: Any, learning_rate: Any) -> dict[str, Any]:
        steps = prose.train.shape[0]
        shape = optax.warmup_cosine_decay_schedule(
            0.0, 1.0, max(1, round(warmup * steps)), steps, end_value=final_ratio
        )
        optimizer = adamw(
            dataclasses.replace(hyper, learning_rate=1.0),
            multipliers,
            schedule=lambda count: learning_rate * shape(count),
            mask=mask_by_name(matrices),
        )

        def step(carry: Any, windows: Any) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, windows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, start, prose.train)
        validation = jax.lax.map(lambda w: loss(params, w), prose.validation)
        return {"validation": jnp.mean(validation), "losses": losses}

    return trial


@functools.partial(jax.jit, static_argnums=0)
def fresh_jitted(config: TransformerConfig, seed: Any) -> Any:
    """`fresh`, compiled."""
    return fresh(config, jax.random.key(seed))
