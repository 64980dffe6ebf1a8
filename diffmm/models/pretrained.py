"""Denoisers from public checkpoints.

`load_pretrained` reads a directory with ``config.json`` and ``*.safetensors`` as the
Hugging Face hub has them: LLaDA (own names of tensors), Dream (names of Qwen2, biases,
logits that predict the next position), and plain Llama, Qwen2 and Qwen3. Files are
opened lazily, and every device gets only its own slice of every tensor.

Download a checkpoint, 16 GB each::

    pip install huggingface_hub "diffmm[pretrained]"
    hf download GSAI-ML/LLaDA-8B-Instruct --local-dir llada
    hf download GSAI-ML/LLaDA-8B-Base --local-dir llada-base
    hf download Dream-org/Dream-v0-Instruct-7B --local-dir dream

Load it on one device, or split over eight::

    from diffmm.models import load_pretrained, logical_axes, predict_fn
    from diffmm.training import TENSOR_PARALLEL, make_mesh, shardings

    llada = load_pretrained("llada")

    mesh = make_mesh(data=1, model=8)
    llada = load_pretrained(
        "llada",
        shardings=lambda shapes: shardings(
            mesh, shapes, logical_axes(shapes), TENSOR_PARALLEL
        ),
    )

(Dream has four heads of keys: ``make_mesh(data=1, model=4)``.) Sample from it; tokens
are those of the checkpoint's own tokenizer::

    import jax
    from transformers import AutoTokenizer
    from diffmm.samplers import FixedQuota, canvas_from_prompts, sample

    tokenizer = AutoTokenizer.from_pretrained("llada", trust_remote_code=True)
    question = [{"role": "user", "content": "What is a denoiser?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    canvas = canvas_from_prompts([prompt], 128, mask_id=llada.mask_id)
    result = sample(
        predict_fn(llada.graphdef, shift=llada.shift),
        llada.params,
        canvas,
        jax.random.key(0),
        rule=FixedQuota(num_steps=128),
        mask_id=llada.mask_id,
        block_length=32,
    )
    print(tokenizer.decode(result.tokens[0]))

Where ``shift`` is 1 (Dream), what predicts position i are the logits at i − 1.

What is verified: tiny random Llama, Qwen2 and Qwen3 models, and their tensors under
LLaDA's and Dream's names, give the logits of ``transformers`` to 1e-4 in float32. The
real checkpoints, and the code that comes with them, were not run; their names and
configurations are taken from their published files.

References:
  Nie et al., "Large Language Diffusion Models" (LLaDA), arXiv 2502.09992.
  Ye et al., "Dream 7B: Diffusion Large Language Models", arXiv 2508.15487.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffmm._tree import map_with_name, named_leaves
from diffmm.models.config import TransformerConfig
from diffmm.models.families import (
    SHIFT_KEY,
    Family,
    find_family,
    merged_axes,
    stored_tensors,
)
from diffmm.models.hf_config import to_config
from diffmm.models.tensor_files import TensorFiles, compare
from diffmm.models.transformer import Denoiser
from diffmm.typing import Params

#: Dtypes of weights that can be asked for.
DTYPES = ("float32", "bfloat16", "float16")
# Stored rows that are read and transposed at a time: what a cache holds, for speed.
_ROWS_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A denoiser from a checkpoint.

    Attributes:
      config: of the transformer.
      graphdef: with ``params`` the two halves of a `Denoiser`, for ``nnx.merge`` and
        `predict_fn`.
      params: its parameters, placed.
      family: one of `FAMILIES`.
      shift: 0 if logits at i predict position i; 1 if they predict i + 1.
      mask_id: of ``mask_token_id``; None if the checkpoint is no denoiser.
      eos_ids: of ``eos_token_id``, which may be several.
      pad_id: of ``pad_token_id``, or None.
      hf_config: config.json, for whatever else is in it.
    """

    config: TransformerConfig
    graphdef: Any
    params: Params
    family: str
    shift: int
    mask_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    hf_config: Mapping[str, Any]

    @property
    def eos_id(self) -> int | None:
        """The first of ``eos_ids``, or None."""
        return self.eos_ids[0] if self.eos_ids else None


def load_pretrained(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    shardings: Any = None,
    family: str | None = None,
    shift: int | None = None,
    mask_id: int | None = None,
    **overrides: Any,
) -> Pretrained:
    """A denoiser from a directory with ``config.json`` and safetensors files.

    Attention is bidirectional, whatever the checkpoint was trained with, unless
    config.json says ``is_causal`` or ``causal=True`` is given. Host memory in use is
    the shards of one stacked parameter at a time: at most 3.2 GB for LLaDA-8B.

    Args:
      path: the directory.
      dtype: of parameters and activations: "bfloat16", "float32" or "float16".
      shardings: a tree of ``jax.sharding.Sharding`` like the parameters, or a function
        that makes it from their shapes (a tree of ``jax.ShapeDtypeStruct``). None puts
        all on the default device.
      family: one of `FAMILIES`; None is what config.json says.
      shift: None is what the family does: 0 for LLaDA, 1 for Dream and for plain
        language models, whose heads predict the next token, unless config.json has a
        ``prediction_shift``.
      mask_id: None is ``mask_token_id`` of config.json.
      **overrides: fields of `TransformerConfig`, such as ``remat`` or ``causal``.

    Returns:
      The `Pretrained` denoiser.

    Raises:
      ValueError: files are missing or broken; config.json asks for what our
        transformer does not compute (all keys are named); tensors are missing, extra,
        misshapen or not of floats (all are named, before any is read).
      ImportError: safetensors is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    directory = Path(path)
    hf_config = _read_config(directory)
    found = find_family(family, hf_config)
    config = dataclasses.replace(
        to_config(found, hf_config), **{"compute_dtype": dtype, **overrides}
    )
    graphdef, shapes = abstract_params(config, dtype)
    files = TensorFiles(directory)
    _check_tensors(directory, found, shapes, files)
    if callable(shardings):
        shardings = shardings(shapes)
    eos = hf_config.get("eos_token_id")
    if shift is None:
        shift = hf_config.get(SHIFT_KEY, found.shift)
    if mask_id is None:
        mask_id = hf_config.get("mask_token_id")
    if shift not in (0, 1):
        raise ValueError(f"shift must be 0 or 1, got {shift!r}")
    if mask_id is not None and not 0 <= mask_id < config.vocabulary_size:
        raise ValueError(
            f"mask_id must be in [0, {config.vocabulary_size}), got {mask_id}"
        )

    def load(name: str, leaf: jax.ShapeDtypeStruct, *sharding: Any) -> jax.Array:
        return _load_leaf(files, found, name, leaf, *sharding)

    trees = (shapes,) if shardings is None else (shapes, shardings)
    return Pretrained(
        config=config,
        graphdef=graphdef,
        params=map_with_name(load, *trees),
        family=found.name,
        shift=shift,
        mask_id=mask_id,
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=hf_config.get("pad_token_id"),
        hf_config=hf_config,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.exists():
        raise ValueError(f"path: {directory} has no config.json")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def abstract_params(config: TransformerConfig, dtype: str) -> tuple[Any, Params]:
    """Graph definition, and shapes of the parameters; nothing is allocated."""
    model = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params
    )
    return graphdef, shapes


def _check_tensors(
    directory: Path, family: Family, shapes: Params, files: TensorFiles
) -> None:
    expected = {}
    for leaf, value in named_leaves(shapes).items():
        names, stored = stored_tensors(family, leaf, value.shape)
        expected.update(dict.fromkeys(names, stored))
    # A tied head may be stored a second time, and old files hold frequencies.
    ignore = {family.tensors["unembedding"]}
    ignore |= {n for n in files.stored if n.endswith("rotary_emb.inv_freq")}
    problems = compare(expected, files.stored, ignore=ignore)
    if problems:
        raise ValueError(
            f"{directory}: tensors are not those of its config.json read as "
            f"{family.name}: " + "; ".join(problems)
        )


def _load_leaf(
    files: TensorFiles,
    family: Family,
    name: str,
    leaf: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    names, _ = stored_tensors(family, name, leaf.shape)
    stacked = name.startswith("blocks/")
    groups = merged_axes(name)
    blocks: dict[Any, np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        bounds = tuple(
            entry.indices(size)[:2]
            for entry, size in zip(index, leaf.shape, strict=True)
        )
        # Devices that hold the same slice share one read.
        if bounds not in blocks:
            blocks[bounds] = _read_block(
                files, names, groups, leaf, bounds, stacked=stacked
            )
        return blocks[bounds]

    if sharding is None:
        return jax.device_put(block((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, block)


def _read_block(
    files: TensorFiles,
    names: tuple[str, ...],
    groups: tuple[tuple[int, ...], ...],
    leaf: jax.ShapeDtypeStruct,
    bounds: tuple[tuple[int, int], ...],
    *,
    stacked: bool,
) -> np.ndarray:
    """One block of a parameter, from the corresponding blocks of its tensors."""
    result = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    # Copies of numbers that numpy has no native type for are slow: move their bits.
    bits = result.view(f"u{leaf.dtype.itemsize}")
    sizes = leaf.shape
    if stacked:
        names = names[slice(*bounds[0])]
        sizes, bounds = sizes[1:], bounds[1:]
    else:
        bits = bits[None]
    first, *merged = groups[0]
    rows = max(1, _ROWS_AT_A_TIME // math.prod(sizes[axis] for axis in merged))
    start, stop = bounds[first]
    for target, name in zip(bits, names, strict=True):
        for row in range(start, stop, rows):
            part = list(bounds)
            part[first] = (row, min(row + rows, stop))
            index, split, cut = _stored_part(groups, sizes, part)
            values = files.read(name, index).astype(leaf.dtype, copy=False)
            values = values.view(target.dtype).reshape(split)[cut]
            order = np.argsort([axis for group in groups for axis in group])
            at = [slice(None)] * len(sizes)
            at[first] = slice(row - start, part[first][1] - start)
            target[tuple(at)] = values.transpose(order)
    return result


def _stored_part(
    groups: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    bounds: Sequence[tuple[int, int]],
) -> tuple[list[tuple[int, int]], list[int], tuple[slice, ...]]:
    """How to get at a block of a parameter in its tensor.

    Of axes merged into one the first is read in part, the others wholly and cut then.

    Returns:
      ``(what to read, its shape with the axes split, what to keep of that)``.
    """
    index, split, cut = [], [], []
    for first, *rest in groups:
        start, stop = bounds[first]
        inner = math.prod(sizes[axis] for axis in rest)
        index.append((start * inner, stop * inner))
        split += [stop - start, *(sizes[axis] for axis in rest)]
        cut += [slice(None), *(slice(*bounds[axis]) for axis in rest)]
    return index, split, tuple(cut)
