"""Names of the axes of a transformer's parameters, and their number."""

from __future__ import annotations

from typing import Any

import jax

from diffmm._tree import map_with_name
from diffmm.typing import Params

_LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "position_embedding": ("sequence", "embed"),
    "unembedding": ("embed", "vocab"),
    "blocks/attention/query": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/key": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/value": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/query_bias": ("layers", "heads", "head_dim"),
    "blocks/attention/key_bias": ("layers", "heads", "head_dim"),
    "blocks/attention/value_bias": ("layers", "heads", "head_dim"),
    "blocks/attention/output": ("layers", "heads", "head_dim", "embed"),
    "blocks/attention/query_norm/gain": ("layers", "head_dim"),
    "blocks/attention/query_norm/bias": ("layers", "head_dim"),
    "blocks/attention/key_norm/gain": ("layers", "head_dim"),
    "blocks/attention/key_norm/bias": ("layers", "head_dim"),
    "blocks/attention_norm/gain": ("layers", "embed"),
    "blocks/attention_norm/bias": ("layers", "embed"),
    "blocks/attention_post_norm/gain": ("layers", "embed"),
    "blocks/attention_post_norm/bias": ("layers", "embed"),
    "blocks/attention_scale": ("layers", "embed"),
    "blocks/mlp_norm/gain": ("layers", "embed"),
    "blocks/mlp_norm/bias": ("layers", "embed"),
    "blocks/mlp_post_norm/gain": ("layers", "embed"),
    "blocks/mlp_post_norm/bias": ("layers", "embed"),
    "blocks/mlp_scale": ("layers", "embed"),
    "blocks/mlp/gate": ("layers", "embed", "mlp"),
    "blocks/mlp/up": ("layers", "embed", "mlp"),
    "blocks/mlp/down": ("layers", "mlp", "embed"),
    "final_norm/gain": ("embed",),
    "final_norm/bias": ("embed",),
}
# One offset per head, or per layer.
_BIAS_OFFSET = "blocks/attention/bias_offset"


def logical_axes(params: Params) -> Params:
    """Names every axis of every parameter of a `Denoiser`, for the sharding table.

    Args:
      params: state of a `Denoiser` (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      The same tree with a tuple of axis names at each leaf.
    """

    def axes(name: str, leaf: Any) -> tuple[str, ...]:
        if name == _BIAS_OFFSET:
            return ("layers", "heads")[: leaf.ndim]
        return _LOGICAL_AXES[name]

    return map_with_name(axes, params)


def num_parameters(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
