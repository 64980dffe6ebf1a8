"""Denoisers as checkpoints of public families."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffmm._tree import named_leaves
from diffmm.models.config import TransformerConfig
from diffmm.models.families import (
    SHIFT_KEY,
    Family,
    find_family,
    merged_axes,
    stored_tensors,
)
from diffmm.models.hf_config import from_config
from diffmm.models.pretrained import DTYPES, abstract_params
from diffmm.models.tensor_files import write_tensors
from diffmm.typing import Params


def export_pretrained(
    path: str | Path,
    params: Params,
    config: TransformerConfig,
    *,
    family: str,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    mask_id: int | None = None,
    shift: int | None = None,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a denoiser as ``config.json`` and safetensors files of a public family.

    ``transformers`` loads ``"llama"``, ``"qwen2"`` and ``"qwen3"`` by itself, with
    ``is_causal`` in config.json as in ``config``; the others with the code of the
    published checkpoint beside the files. A default `Denoiser`, which normalises
    queries and keys, is a ``"qwen3"``. Numbers are not changed if ``dtype`` is that of
    the parameters.

    Args:
      path: a directory, made if need be.
      params: of a `Denoiser` of ``config``, on devices of this process.
      config: of the transformer.
      family: one of `FAMILIES`.
      dtype: of the files; None is that of the parameters.
      max_shard_bytes: larger models are split into several files.
      mask_id: written as ``mask_token_id``.
      shift: written as ``prediction_shift`` for `load_pretrained`.
      hf_config: further entries of config.json, such as ``eos_token_id``; those that
        describe the network are overwritten.

    Raises:
      ValueError: the family has no such transformer (all fields are named); parameters
        are not those of ``config``; the directory holds tensors already.
      ImportError: safetensors is not installed.
    """
    found = find_family(family, {})
    entries = from_config(found, config)
    leaves = named_leaves(params)
    _check_export(leaves, config)
    directory = Path(path)
    if any(directory.glob("*.safetensors*")):
        raise ValueError(f"path: {directory} holds *.safetensors files already")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if dtype is None:
        dtype = str(leaves["embedding"].dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    kept = dict(hf_config or {})
    for key in ("rope_scaling", "layer_types"):
        kept.pop(key, None)
    entries = {**kept, **entries, "dtype": dtype, "torch_dtype": dtype}
    if mask_id is not None:
        entries["mask_token_id"] = mask_id
    if shift is not None:
        entries[SHIFT_KEY] = shift
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(
        directory,
        _writers(found, leaves, np.dtype(jnp.dtype(dtype))),
        item_bytes=jnp.dtype(dtype).itemsize,
        max_shard_bytes=max_shard_bytes,
    )
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def _check_export(leaves: Mapping[str, Any], config: TransformerConfig) -> None:
    expected = {
        name: leaf.shape
        for name, leaf in named_leaves(abstract_params(config, "float32")[1]).items()
    }
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    differing = sorted(
        name
        for name in expected.keys() | shapes.keys()
        if expected.get(name) != shapes.get(name)
    )
    if differing:
        raise ValueError(
            "params are not those of config: "
            + ", ".join(
                f"{name} {shapes.get(name)} instead of {expected.get(name)}"
                for name in differing
            )
        )


def _writers(
    family: Family, leaves: Mapping[str, Any], dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Shape of every tensor and a function that makes it, layer by layer."""
    writers = {}
    for leaf, value in leaves.items():
        names, shape = stored_tensors(family, leaf, value.shape)
        order = [axis for group in merged_axes(leaf) for axis in group]
        for layer, name in enumerate(names):

            def make(
                value: Any = value,
                layer: int | None = layer if leaf.startswith("blocks/") else None,
                shape: tuple[int, ...] = shape,
                order: list[int] = order,
            ) -> np.ndarray:
                part = np.asarray(value if layer is None else value[layer])
                return part.transpose(order).reshape(shape).astype(dtype, copy=False)

            writers[name] = (shape, make)
    return dict(sorted(writers.items()))
