"""The one place that turns pytree key paths into strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a jax key path into ``"blocks/attention/query"``.

    Flax variables add a last ``.value`` attribute to the path of their array; it is
    dropped, so that NNX state, Linen parameters and plain dictionaries of the same
    model share one spelling.
    """
    parts = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                parts.append(str(getattr(entry, attribute)))
                break
        else:
            parts.append(str(entry))
    # An attribute only: a dictionary's key "value" is the leaf's own name.
    is_attribute = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
    if is_attribute and parts[-1] in ("value", "raw_value"):
        parts.pop()
    return "/".join(parts)


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps ``function(name, leaf, *rest_leaves)`` over a pytree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns ``{name: leaf}`` in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}
