"""Named configurations: tri-modal denoisers, and sigmoid language models.

The 320M and 3B shapes are inferred from public figures (parameter totals, the share of
embeddings, the constant ratio width / depth = 128): they are not the authors' own
configuration.

References:
  Bethune et al., "The Design Space of Tri-Modal Masked Diffusion Models",
  arXiv 2602.21472.
"""

from __future__ import annotations

import dataclasses

from diffmm.models.config import TransformerConfig
from diffmm.models.sigmoid_presets import SIGMOID_PRESETS

#: Joint vocabulary of the presets: 100,277 text + 16,384 image + 1,024 audio + 13.
TRIMODAL_VOCABULARY_SIZE = 117_698

_PRESETS = {
    # For tests; the shape rule is waived.
    "trimodal-tiny": TransformerConfig(
        vocabulary_size=1_024, width=128, num_layers=2, head_dim=32
    ),
    # The default run on two CPU cores; the vocabulary is replaced by the data's own.
    # Rows are about a hundred tokens long: a rotary base of 10,000 would leave most
    # frequencies without a turn, and reading a picture needs absolute places, which
    # learned positions give at once.
    "trimodal-demo": TransformerConfig(
        vocabulary_size=1_024,
        width=96,
        num_layers=3,
        head_dim=32,
        rope_base=100.0,
        num_positions=128,
    ),
    "trimodal-320m": TransformerConfig(
        vocabulary_size=TRIMODAL_VOCABULARY_SIZE,
        width=1_024,
        num_layers=8,
        compute_dtype="bfloat16",
    ),
    "trimodal-3b": TransformerConfig(
        vocabulary_size=TRIMODAL_VOCABULARY_SIZE,
        width=3_072,
        num_layers=24,
        compute_dtype="bfloat16",
        remat=True,
    ),
    **SIGMOID_PRESETS,
}

PRESETS = tuple(_PRESETS)


def preset(name: str, **overrides: object) -> TransformerConfig:
    """Returns a named configuration, with fields replaced by keyword.

    Args:
      name: one of `PRESETS`.
      **overrides: fields of `TransformerConfig`, for example ``vocabulary_size``.

    Raises:
      ValueError: unknown name (lists the known ones).

    >>> preset("trimodal-320m").num_layers
    8
    """
    if name not in _PRESETS:
        raise ValueError(f"name must be one of {sorted(_PRESETS)}, got {name!r}")
    return dataclasses.replace(_PRESETS[name], **overrides)  # type: ignore[arg-type]
