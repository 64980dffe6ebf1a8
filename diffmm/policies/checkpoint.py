"""A policy as one small file: numbers, and what network they belong to."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm._tree import named_leaves
from diffmm.policies.network import PolicyConfig, init
from diffmm.policies.rule import PolicyRule, check_params
from diffmm.typing import Params
from diffmm.version import __version__

_HEADER = "policy.json"
_KIND = "diffmm policy"


class Policy(NamedTuple):
    """A policy out of a file.

    Attributes:
      params: of the network.
      config: of the network.
      metadata: what was saved with it; JSON values.
    """

    params: Params
    config: PolicyConfig
    metadata: dict[str, Any]

    def rule(self, **fields: Any) -> PolicyRule:
        """The rule that samples with it; ``fields`` as of `PolicyRule`."""
        return PolicyRule(params=self.params, config=self.config, **fields)


def save_policy(
    path: os.PathLike[str] | str,
    params: Params,
    config: PolicyConfig,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a policy; a reader sees the old file or the new one, never a part.

    The file is an uncompressed ``.npz`` with one array per parameter and the JSON text
    ``policy.json``; it holds no pickles. 1.3 MB at the default size.

    Args:
      path: of the file, by custom ``*.npz``.
      params: of the network.
      config: of the network.
      metadata: JSON values to keep with it, such as where it was trained.

    Raises:
      ValueError: if the parameters do not fit ``config``.
    """
    check_params(params, config)
    header = {
        "kind": _KIND,
        "version": __version__,
        "config": dataclasses.asdict(config),
        "metadata": dict(metadata or {}),
    }
    text = json.dumps(header, indent=2).encode()
    arrays = {
        name: np.asarray(leaf, np.float32)
        for name, leaf in named_leaves(jax.device_get(params)).items()
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(_HEADER, text)
    write_atomically(path, buffer.getvalue())


def load_policy(path: os.PathLike[str] | str) -> Policy:
    """Reads what `save_policy` wrote.

    Args:
      path: of the file.

    Returns:
      `Policy`.

    Raises:
      ValueError: if the file is no policy, or its arrays do not fit its config; all
        that are missing, unknown or misshapen are named.
      FileNotFoundError: if there is no such file.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(_HEADER))
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name != _HEADER}
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} must be a policy of save_policy: {error}") from error
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise ValueError(f"{path} must be a policy of save_policy, got {header!r:.80}")
    known = {field.name for field in dataclasses.fields(PolicyConfig)}
    unknown = sorted(set(header["config"]) - known)
    if unknown:
        raise ValueError(
            f"{path} has settings that this version does not know: {unknown}"
        )
    config = PolicyConfig(**header["config"])
    params = _nested(found)
    check_params(params, config)
    # In the order of `init`: a tree is the same tree only with the same structure.
    structure = jax.eval_shape(lambda: init(jax.random.key(0), config))
    params = jax.tree.map(lambda _, leaf: jnp.asarray(leaf), structure, params)
    return Policy(params, config, header["metadata"])


def write_atomically(path: os.PathLike[str] | str, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = array
    return tree
