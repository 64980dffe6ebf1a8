"""What names say of leaves: tables for common layers, and how to extend them."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from diffmm.parameterisation.leaf import Role

Kind = Literal["matrix", "embedding", "bias", "gain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """What every leaf is whose path ends in a certain way.

    Attributes:
      path: regular expression for the end of the path, from a whole component on:
        ``"(query|q_proj)/kernel"``.
      module: type for per-module hyper-parameters, such as ``"attn.q"``.
      kind: matrices have inputs and outputs, embeddings a finite input (all axes but
        the last), biases and gains outputs alone.
      in_axes: axes that are contracted, counted without a stacked layer axis, negative
        from the end. By default the first of two scaled axes, or the only one if it is
        the first.
      out_axes: axes that are produced.
      role: overrides what kind and place imply; needed for the gain of the final norm
        and for tied embeddings.
      residual: ``"attn.res"`` or ``"mlp.res"`` for the last map of a residual branch,
        its bias, or the gain that ends the branch.
      residual_order: where several leaves of a model claim the end of one branch, only
        those of the highest order have it: a norm after the last map takes it over.
    """

    path: str
    module: str
    kind: Kind = "matrix"
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    role: Role | None = None
    residual: str = ""
    residual_order: int = 0

    def matches(self, name: str) -> bool:
        """Whether a path ends in this pattern."""
        return re.search(rf"(?:^|/)(?:{self.path})$", name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    r"""Where the residual blocks are.

    Attributes:
      path: regular expression for whole components of the path that lead into a block.
        For unrolled blocks it holds a group named ``layer`` around the index:
        ``r"block_(?P<layer>\d+)"``.
      stack_axis: axis of every leaf that counts layers, where a scan stacks them; then
        ``path`` has no group.
    """

    path: str
    stack_axis: int | None = None

    def __post_init__(self) -> None:
        """Refuses a pattern that says both or neither."""
        grouped = "(?P<layer>" in self.path
        if grouped == (self.stack_axis is not None):
            raise ValueError(
                f"blocks: path {self.path!r} needs either a group (?P<layer>...) or a "
                f"stack_axis, got stack_axis={self.stack_axis}"
            )

    def find(self, name: str) -> re.Match[str] | None:
        """The first place in a path where a block begins."""
        return re.search(rf"(?:^|(?<=/))(?:{self.path})(?=/)", name)


def _end_of_branch(branch: str, module: str) -> tuple[Pattern, ...]:
    """A second norm and a gain per channel, in this order, after the last map."""
    residual = f"{module}.res"
    return (
        *(
            Pattern(
                path=f"{branch}_post_norm/{leaf}",
                module=f"{module}.post_norm" + ("_bias" if leaf == "bias" else ""),
                kind="bias" if leaf == "bias" else "gain",
                residual=residual,
                residual_order=1,
            )
            for leaf in ("gain", "bias")
        ),
        Pattern(
            path=f"{branch}_scale",
            module=f"{module}.scale",
            kind="gain",
            residual=residual,
            residual_order=2,
        ),
    )


#: `diffmm.models.Denoiser`, blocks stacked.
DENOISER = (
    Pattern(path="embedding", module="embed", kind="embedding"),
    Pattern(path="position_embedding", module="pos_embed", kind="embedding"),
    Pattern(path="unembedding", module="unembed"),
    Pattern(
        path="final_norm/gain", module="final_norm", kind="gain", role=Role.FINAL_GAIN
    ),
    Pattern(path="final_norm/bias", module="final_norm_bias", kind="bias"),
    Pattern(path="attention_norm/gain", module="attn.pre_norm", kind="gain"),
    Pattern(path="attention_norm/bias", module="attn.pre_norm_bias", kind="bias"),
    Pattern(path="attention/query", module="attn.q"),
    Pattern(path="attention/key", module="attn.k"),
    Pattern(path="attention/value", module="attn.v"),
    Pattern(path="attention/query_bias", module="attn.q_bias", kind="bias"),
    Pattern(path="attention/key_bias", module="attn.k_bias", kind="bias"),
    Pattern(path="attention/value_bias", module="attn.v_bias", kind="bias"),
    Pattern(path="attention/output", module="attn.o", residual="attn.res"),
    Pattern(path="attention/query_norm/gain", module="attn.q_norm", kind="gain"),
    Pattern(path="attention/query_norm/bias", module="attn.q_norm_bias", kind="bias"),
    Pattern(path="attention/key_norm/gain", module="attn.k_norm", kind="gain"),
    Pattern(path="attention/key_norm/bias", module="attn.k_norm_bias", kind="bias"),
    Pattern(path="attention/bias_offset", module="attn.logit_bias", kind="bias"),
    *_end_of_branch("attention", "attn"),
    Pattern(path="mlp_norm/gain", module="mlp.pre_norm", kind="gain"),
    Pattern(path="mlp_norm/bias", module="mlp.pre_norm_bias", kind="bias"),
    Pattern(path="mlp/gate", module="mlp.gate"),
    Pattern(path="mlp/up", module="mlp.up"),
    Pattern(path="mlp/down", module="mlp.down", residual="mlp.res"),
    *_end_of_branch("mlp", "mlp"),
)
DENOISER_BLOCKS = (Blocks(path="blocks", stack_axis=0),)

#: Attention of flax: `nnx.MultiHeadAttention`, `linen.MultiHeadDotProductAttention`,
#: `linen.SelfAttention`, and embeddings. Norms and feed-forward layers have names of
#: the model's own (``LayerNorm_0``, ``Dense_1``): add patterns for them.
FLAX_ATTENTION = (
    Pattern(path="query/kernel", module="attn.q"),
    Pattern(path="key/kernel", module="attn.k"),
    Pattern(path="value/kernel", module="attn.v"),
    Pattern(path="out/kernel", module="attn.o", residual="attn.res"),
    Pattern(path="query/bias", module="attn.q_bias", kind="bias"),
    Pattern(path="key/bias", module="attn.k_bias", kind="bias"),
    Pattern(path="value/bias", module="attn.v_bias", kind="bias"),
    Pattern(path="out/bias", module="attn.o_bias", kind="bias", residual="attn.res"),
    Pattern(path="query_ln/scale", module="attn.q_norm", kind="gain"),
    Pattern(path="key_ln/scale", module="attn.k_norm", kind="gain"),
    Pattern(path="query_ln/bias", module="attn.q_norm", kind="bias"),
    Pattern(path="key_ln/bias", module="attn.k_norm", kind="bias"),
    Pattern(path="embedding", module="embed", kind="embedding"),
)

#: Mixtures of experts: the expert axis comes first and is nobody's fan-in.
EXPERTS = (
    Pattern(path="router(/kernel)?", module="moe.router"),
    Pattern(path="experts/gate", module="moe.gate", in_axes=(-2,), out_axes=(-1,)),
    Pattern(path="experts/up", module="moe.up", in_axes=(-2,), out_axes=(-1,)),
    Pattern(
        path="experts/down",
        module="moe.down",
        in_axes=(-2,),
        out_axes=(-1,),
        residual="mlp.res",
    ),
)


def linear(path: str, module: str, *, residual: str = "") -> tuple[Pattern, ...]:
    """Patterns of a flax linear layer: ``path/kernel [in, out]`` and ``path/bias``."""
    return (
        Pattern(path=f"(?:{path})/kernel", module=module, residual=residual),
        Pattern(
            path=f"(?:{path})/bias",
            module=f"{module}_bias",
            kind="bias",
            residual=residual,
        ),
    )


def torch_linear(path: str, module: str, *, residual: str = "") -> tuple[Pattern, ...]:
    """Patterns of a layer with ``path/weight [out, in]``: Equinox, PyTorch."""
    return (
        Pattern(
            path=f"(?:{path})/weight",
            module=module,
            in_axes=(-1,),
            out_axes=(-2,),
            residual=residual,
        ),
        Pattern(
            path=f"(?:{path})/bias",
            module=f"{module}_bias",
            kind="bias",
            residual=residual,
        ),
    )


def norm(path: str, module: str, *, role: Role | None = None) -> tuple[Pattern, ...]:
    """Patterns of a norm: ``path/scale``, ``/gain`` or ``/weight``, and ``/bias``."""
    return (
        Pattern(
            path=f"(?:{path})/(?:scale|gain|weight)",
            module=module,
            kind="gain",
            role=role,
        ),
        Pattern(path=f"(?:{path})/bias", module=f"{module}_bias", kind="bias"),
    )
