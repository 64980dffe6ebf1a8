"""Public families of checkpoints: their configurations and their names of tensors.

A family is a dialect of ``config.json`` and a table from our parameters to its tensors.
Its linear layers are stored ``[outputs, inputs]``, one tensor per layer, with heads and
head dimension merged into one axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

#: What exports add to config.json: logits at i predict position i + shift.
SHIFT_KEY = "prediction_shift"

_LLAMA_TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "unembedding": "lm_head.weight",
    "final_norm/gain": "model.norm.weight",
    "blocks/attention_norm/gain": "model.layers.{}.input_layernorm.weight",
    "blocks/attention/query": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/attention/key": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/attention/value": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/attention/query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks/attention/key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks/attention/value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks/attention/query_norm/gain": "model.layers.{}.self_attn.q_norm.weight",
    "blocks/attention/key_norm/gain": "model.layers.{}.self_attn.k_norm.weight",
    "blocks/attention/output": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/mlp_norm/gain": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/mlp/up": "model.layers.{}.mlp.up_proj.weight",
    "blocks/mlp/down": "model.layers.{}.mlp.down_proj.weight",
}
_LLADA_TENSORS = {
    "embedding": "model.transformer.wte.weight",
    "unembedding": "model.transformer.ff_out.weight",
    "final_norm/gain": "model.transformer.ln_f.weight",
    "blocks/attention_norm/gain": "model.transformer.blocks.{}.attn_norm.weight",
    "blocks/attention/query": "model.transformer.blocks.{}.q_proj.weight",
    "blocks/attention/key": "model.transformer.blocks.{}.k_proj.weight",
    "blocks/attention/value": "model.transformer.blocks.{}.v_proj.weight",
    "blocks/attention/query_bias": "model.transformer.blocks.{}.q_proj.bias",
    "blocks/attention/key_bias": "model.transformer.blocks.{}.k_proj.bias",
    "blocks/attention/value_bias": "model.transformer.blocks.{}.v_proj.bias",
    "blocks/attention/output": "model.transformer.blocks.{}.attn_out.weight",
    "blocks/mlp_norm/gain": "model.transformer.blocks.{}.ff_norm.weight",
    "blocks/mlp/gate": "model.transformer.blocks.{}.ff_proj.weight",
    "blocks/mlp/up": "model.transformer.blocks.{}.up_proj.weight",
    "blocks/mlp/down": "model.transformer.blocks.{}.ff_out.weight",
}

# For each axis of the stored tensor the axes of our parameter (without that of layers)
# that are merged into it.
_MERGED = {
    "embedding": ((0,), (1,)),
    "unembedding": ((1,), (0,)),
    "query": ((1, 2), (0,)),
    "key": ((1, 2), (0,)),
    "value": ((1, 2), (0,)),
    "query_bias": ((0, 1),),
    "key_bias": ((0, 1),),
    "value_bias": ((0, 1),),
    "output": ((2,), (0, 1)),
    "gate": ((1,), (0,)),
    "up": ((1,), (0,)),
    "down": ((1,), (0,)),
    "gain": ((0,),),
}

# What a key of config.json means if it is absent, and the values that our transformer
# computes.
Restrictions = Mapping[str, tuple[Any, tuple[Any, ...]]]
_OFF = (False, (False, None))
_NONE = (None, (None,))
_LLAMA_RESTRICTIONS: Restrictions = {
    "hidden_act": ("silu", ("silu", "swish")),
    "mlp_bias": _OFF,
    "use_sliding_window": _OFF,
    "use_mrope": _OFF,
    "partial_rotary_factor": (1.0, (1.0, None)),
    "quantization_config": _NONE,
    "num_experts": _NONE,
    "num_local_experts": _NONE,
}
_NO_BIAS: Restrictions = {**_LLAMA_RESTRICTIONS, "attention_bias": _OFF}
_LLADA_RESTRICTIONS: Restrictions = {
    "activation_type": ("swiglu", ("silu",)),
    "alibi": _OFF,
    "attention_layer_norm": _OFF,
    "bias_for_layer_norm": _OFF,
    "block_group_size": (1, (1,)),
    "block_type": ("sequential", ("llama",)),
    "include_bias": _OFF,
    "input_emb_norm": _OFF,
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "rope": (False, (True,)),
    "scale_logits": _OFF,
    "quantization_config": _NONE,
    "num_experts": _NONE,
}

_LLAMA_KEYS = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "mlp_hidden": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
_LLADA_KEYS = {
    "vocabulary_size": "embedding_size",
    "width": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "key_heads": "n_kv_heads",
    "mlp_hidden": "mlp_hidden_size",
    "norm_epsilon": "rms_norm_eps",
    "tied": "weight_tying",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One public family of checkpoints.

    Attributes:
      name: ours.
      model_type: of config.json, in lower case.
      architecture: of config.json.
      keys: key of config.json of each quantity of a transformer.
      tensors: tensor of each of our parameters; ``{}`` stands for the layer.
      restrictions: keys of config.json of which our transformer computes some values.
      qkv_bias: with bias, without, or (None) as ``include_qkv_bias`` says.
      qk_norm: norms of queries and keys.
      bidirectional: the published code sees both sides; otherwise it is causal unless
        config.json says ``is_causal`` = false.
      shift: 0 if logits at i predict position i; 1 if they predict i + 1.
    """

    name: str
    model_type: str
    architecture: str
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    restrictions: Restrictions
    qkv_bias: bool | None
    qk_norm: bool = False
    bidirectional: bool = False
    shift: int = 1

    @property
    def is_llada(self) -> bool:
        """Whether config.json and the tensors are in LLaDA's own dialect."""
        return self.keys is _LLADA_KEYS

    @property
    def length_key(self) -> str:
        """Key of config.json of the longest row."""
        return "max_sequence_length" if self.is_llada else "max_position_embeddings"


#: By name. LLaDA and Dream are denoisers; the heads of plain language models predict
#: the next token, and denoisers that were adapted from them mostly still do.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llada",
            model_type="llada",
            architecture="LLaDAModelLM",
            keys=_LLADA_KEYS,
            tensors=_LLADA_TENSORS,
            restrictions=_LLADA_RESTRICTIONS,
            qkv_bias=None,
            bidirectional=True,
            shift=0,
        ),
        Family(
            name="dream",
            model_type="dream",
            architecture="DreamModel",
            keys=_LLAMA_KEYS,
            tensors=_LLAMA_TENSORS,
            restrictions=_LLAMA_RESTRICTIONS,
            qkv_bias=True,
            bidirectional=True,
        ),
        Family(
            name="llama",
            model_type="llama",
            architecture="LlamaForCausalLM",
            keys=_LLAMA_KEYS,
            tensors=_LLAMA_TENSORS,
            restrictions={**_NO_BIAS, "sliding_window": _NONE},
            qkv_bias=False,
        ),
        Family(
            name="qwen2",
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            keys=_LLAMA_KEYS,
            tensors=_LLAMA_TENSORS,
            restrictions=_LLAMA_RESTRICTIONS,
            qkv_bias=True,
        ),
        Family(
            name="qwen3",
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            keys=_LLAMA_KEYS,
            tensors=_LLAMA_TENSORS,
            restrictions=_NO_BIAS,
            qkv_bias=False,
            qk_norm=True,
        ),
    )
}


def merged_axes(leaf: str) -> tuple[tuple[int, ...], ...]:
    """For each stored axis, the axes of our parameter (of one layer) merged into it."""
    return _MERGED[leaf.rsplit("/", 1)[-1]]


def find_family(name: str | None, hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, or the one asked for.

    Raises:
      ValueError: there is none of that name, model type or architecture.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {name!r}")
        return FAMILIES[name]
    model_type = hf_config.get("model_type")
    architectures = hf_config.get("architectures") or ()
    for family in FAMILIES.values():
        if str(model_type).lower() == family.model_type:
            # Relatives of another kind (mixtures of experts, block diffusion) call
            # themselves by the same model type.
            if architectures and family.architecture not in architectures:
                break
            return family
    raise ValueError(
        f"config.json: model_type={model_type!r} with architectures="
        f"{list(architectures)} is none of "
        f"{[(f.model_type, f.architecture) for f in FAMILIES.values()]}; if its "
        f"network is one of them, say which: family={tuple(FAMILIES)}"
    )


def stored_tensors(
    family: Family, leaf: str, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Where a parameter is stored.

    Args:
      family: names of tensors.
      leaf: name of our parameter.
      shape: of our parameter, layers first if it is in a block.

    Returns:
      ``(names, stored shape)``: names of its tensors, one for each layer or a single
      one, and the shape of each.

    Raises:
      KeyError: the family has no such parameter.
    """
    template = family.tensors[leaf]
    stacked = leaf.startswith("blocks/")
    layers = range(shape[0] if stacked else 1)
    names = tuple(template.format(layer) for layer in layers)
    sizes = shape[1:] if stacked else shape
    stored = tuple(math.prod(sizes[a] for a in axes) for axes in merged_axes(leaf))
    return names, stored
