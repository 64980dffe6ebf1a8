"""Sigmoid attention as its authors trained it: shapes, and recipes as plain numbers.

Parameters are initialised as the presets say, but embeddings are not tied as in the
released language models: there are V·D parameters more.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431; configurations in github.com/apple/axlearn ("gala") and
  github.com/apple/ml-sigmoid-attention ("attention_simulator").
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diffmm.models.config import TransformerConfig


def sigmoid_defaults(
    config: TransformerConfig, *, length: int, **overrides: Any
) -> TransformerConfig:
    """The recipe for a new sigmoid transformer of a given shape.

    Bias -log(length), RMS norm of queries and keys, a second norm at the end of each
    branch, no gain per channel; positions as they are, RoPE by default. Speech models
    need ``layer_scale=1e-4`` too. If the loss or the gradient norm spikes, look at
    `Denoiser.attention_statistics`: ``‖O‖/‖V‖`` far above 1 in the first steps means a
    bias that is too high, at length 4,096 without the second norm it comes later.

    Args:
      config: any shape.
      length: n, the row length trained for.
      **overrides: further fields.

    Returns:
      A copy; with ``attention="softmax"`` it is the baseline to compare with.
    """
    changes = {
        "attention": "sigmoid",
        "length": length,
        "qk_norm": "rms",
        "hybrid_norm": True,
        "layer_scale": None,
        **overrides,
    }
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """How a published model was trained.

    Attributes:
      batch: rows per step.
      length: tokens per row.
      steps: optimiser steps.
      learning_rate: peak, of AdamW.
      initial_rate: learning rate of the first step, as a fraction of the peak; linear
        from there.
      final_rate: of the last step, likewise; cosine down to there.
      warmup_steps: of the linear part.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: of AdamW; None = not stated.
      weight_decay: what a step takes off all parameters, as a fraction: multiplied by
        the schedule, whose peak is 1, but not by the learning rate.
      clip: global gradient norm; None = no clipping.
      matrix_multiplier: of the Adam updates of attention and feed-forward matrices.
    """

    batch: int
    length: int
    steps: int
    learning_rate: float
    warmup_steps: int
    initial_rate: float = 0.0
    final_rate: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float | None = 1e-8
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    matrix_multiplier: float = 1.0

    @property
    def tokens(self) -> int:
        """Seen in all steps."""
        return self.batch * self.length * self.steps


def _language_model(width: int, num_layers: int, mlp_ratio: float) -> TransformerConfig:
    return sigmoid_defaults(
        TransformerConfig(
            vocabulary_size=32_768,
            width=width,
            num_layers=num_layers,
            head_dim=width // 32,
            mlp_ratio=mlp_ratio,
            causal=True,
            positions="alibi",
            norm_epsilon=1e-5,
            embedding_std=width**-0.5,
            unembedding_std=width**-0.5,
            compute_dtype="bfloat16",
        ),
        length=4_096,
    )


SIGMOID_PRESETS = {
    # The hidden width is 8/3 of the width, rounded up to a multiple of 256.
    "sigmoid-1b": _language_model(2_048, 24, 5_632 / 2_048),
    "sigmoid-7b": _language_model(4_096, 32, 11_008 / 4_096),
    # Two blocks, pre-norm, without a second norm; trained at 2,048 and read at 1,024 to
    # 16,384, b unchanged.
    "sigmoid-example": TransformerConfig(
        vocabulary_size=32_100,
        width=3_072,
        num_layers=2,
        head_dim=256,
        mlp_ratio=4.0,
        mlp="gelu",
        attention="sigmoid",
        length=2_048,
        causal=True,
        norm="layer",
        qk_norm="layer",
        embedding_std=0.02,
        unembedding_std=0.02,
        compute_dtype="bfloat16",
    ),
}

#: Recipes of the presets of the same names.
RECIPES = {
    "sigmoid-1b": LanguageRecipe(
        batch=256,
        length=4_096,
        steps=300_000,
        learning_rate=0.01,
        warmup_steps=5_000,
        matrix_multiplier=768 / 2_048,
    ),
    "sigmoid-7b": LanguageRecipe(
        batch=1_024,
        length=4_096,
        steps=250_000,
        learning_rate=0.01,
        warmup_steps=5_000,
        matrix_multiplier=768 / 4_096,
    ),
    "sigmoid-example": LanguageRecipe(
        batch=24,
        length=2_048,
        steps=65_536,
        learning_rate=3e-4,
        warmup_steps=4_096,
        initial_rate=1 / 30,
        final_rate=1 / 30,
        eps=None,
        weight_decay=0.0,
        clip=None,
    ),
}


def recipe(name: str) -> LanguageRecipe:
    """How the preset of a name was trained by its authors.

    Raises:
      ValueError: a preset without recipe (lists those with one).

    >>> recipe("sigmoid-1b").tokens
    314572800000
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {sorted(RECIPES)}, got {name!r}")
    return RECIPES[name]
