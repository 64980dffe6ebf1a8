"""Configurations of transformers as the ``config.json`` of public checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmm.models.config import TransformerConfig
from diffmm.models.families import Family


def to_config(family: Family, hf_config: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration of a config.json.

    Raises:
      ValueError: keys that are missing, or that ask for what our transformer does not
        compute (scaled rotary frequencies, windows, biases elsewhere, experts); all of
        them are named.
    """
    problems = [
        f"{key}={hf_config.get(key, default)!r} (only {allowed[0]!r})"
        for key, (default, allowed) in family.restrictions.items()
        if hf_config.get(key, default) not in allowed
    ]
    values: dict[str, Any] = {
        ours: hf_config.get(key) for ours, key in family.keys.items()
    }
    if family.is_llada:
        _llada_defaults(values, hf_config)
    elif values["key_heads"] is None:
        values["key_heads"] = values["num_heads"]
    required = ("vocabulary_size", "width", "num_layers", "num_heads", "mlp_hidden")
    problems += [f"{family.keys[k]} is missing" for k in required if not values[k]]
    base = _rotary_base(hf_config, problems)
    layers = set(hf_config.get("layer_types") or ()) - {"full_attention"}
    if layers:
        problems.append(f"layer_types={sorted(layers)} (only 'full_attention')")
    width, heads = values["width"], values["num_heads"]
    if width and heads and width % heads:
        problems.append(f"{family.keys['num_heads']}={heads} does not divide {width}")
    elif width and heads:
        head_dim = hf_config.get("head_dim") or width // heads
        if head_dim * heads != width:
            problems.append(
                f"head_dim={head_dim} (only {family.keys['width']} / "
                f"{family.keys['num_heads']} = {width // heads})"
            )
    if problems:
        raise ValueError(
            f"config.json of a {family.name} checkpoint: " + "; ".join(problems)
        )
    epsilon = 1e-5 if family.is_llada else 1e-6
    bias = family.qkv_bias
    return TransformerConfig(
        vocabulary_size=values["vocabulary_size"],
        width=width,
        num_layers=values["num_layers"],
        head_dim=width // heads,
        num_kv_heads=None if values["key_heads"] == heads else values["key_heads"],
        qkv_bias=bool(hf_config.get("include_qkv_bias")) if bias is None else bias,
        mlp_width=values["mlp_hidden"],
        causal=not family.bidirectional and bool(hf_config.get("is_causal")),
        rope_base=base,
        norm_epsilon=values["norm_epsilon"] or epsilon,
        qk_norm="rms" if family.qk_norm else None,
        tied=bool(values["tied"]),
    )


def _llada_defaults(values: dict[str, Any], hf_config: Mapping[str, Any]) -> None:
    values["vocabulary_size"] = values["vocabulary_size"] or hf_config.get("vocab_size")
    if values["key_heads"] is None:
        one = hf_config.get("multi_query_attention")
        values["key_heads"] = 1 if one else values["num_heads"]
    if not values["mlp_hidden"] and values["width"]:
        values["mlp_hidden"] = hf_config.get("mlp_ratio", 4) * values["width"]
    if values["tied"] is None:
        values["tied"] = True


def _rotary_base(hf_config: Mapping[str, Any], problems: list[str]) -> float:
    """Adds to ``problems`` what is not plain rotary embedding."""
    base = hf_config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        value = hf_config.get(key) or {}
        kind = value.get("rope_type", value.get("type", "default"))
        partial = value.get("partial_rotary_factor", 1.0)
        nested = any(isinstance(entry, Mapping) for entry in value.values())
        if kind != "default" or partial != 1.0 or nested:
            problems.append(f"{key}={value!r} (only unscaled rotary embedding)")
        base = value.get("rope_theta", base)
    return 10_000.0 if base is None else float(base)


def from_config(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """The config.json of our configuration; the inverse of `to_config`.

    Raises:
      ValueError: the family has no such transformer; all fields that differ are named.
    """
    needed = {
        "attention": "softmax",
        "causal_block": 0,
        "positions": "rope",
        "num_positions": 0,
        "norm": "rms",
        "qk_norm": "rms" if family.qk_norm else None,
        "hybrid_norm": False,
        "layer_scale": None,
        "attention_residual": 1.0,
        "mlp_residual": 1.0,
        "mlp": "swiglu",
    }
    if family.qkv_bias is not None:
        needed["qkv_bias"] = family.qkv_bias
    if family.bidirectional:
        needed["causal"] = False
    differing = [
        f"{field}={getattr(config, field)!r} (only {value!r})"
        for field, value in needed.items()
        if getattr(config, field) != value
    ]
    if differing:
        raise ValueError(
            f"config: a {family.name} checkpoint cannot have " + ", ".join(differing)
        )
    found = {key: getattr(config, ours) for ours, key in family.keys.items()}
    found |= {
        "architectures": [family.architecture],
        "model_type": "Dream" if family.name == "dream" else family.model_type,
        "rope_theta": config.rope_base,
    }
    if config.length is not None:
        found[family.length_key] = config.length
    if family.is_llada:
        allowed = {key: values[0] for key, (_, values) in family.restrictions.items()}
        return {
            **{key: value for key, value in allowed.items() if value is not None},
            **found,
            "include_qkv_bias": config.qkv_bias,
            "vocab_size": config.vocabulary_size,
        }
    found |= {
        "hidden_act": "silu",
        "head_dim": config.head_dim,
        # Older and newer readers of config.json look for the base in either place.
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
    }
    if not family.bidirectional:
        found["is_causal"] = config.causal
    return found
