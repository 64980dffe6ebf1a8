"""What a parameterisation knows of one parameter leaf: its place, never its values."""

from __future__ import annotations

import dataclasses
import enum

#: Residual branches, under the names that per-module hyper-parameters use.
RESIDUALS = ("attn.res", "mlp.res")


class Role(enum.StrEnum):
    """Class of a leaf in the tables of exponents."""

    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied embedding"
    HIDDEN = "hidden weight"
    UNEMBEDDING = "unembedding weight"
    HIDDEN_BIAS = "hidden bias"
    UNEMBEDDING_BIAS = "unembedding bias"
    GAIN = "pre-norm gain"
    QK_GAIN = "QK-norm gain"
    FINAL_GAIN = "final-norm gain"
    SCALAR = "scalar"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter of the target model, seen from the base model.

    A dimension is infinite if the family of models scales it, whether or not base and
    target happen to agree in it.

    Attributes:
      name: path, as `diffmm._tree.path_name` spells it.
      base_names: paths of its counterparts in the base model: one, or one per layer.
      role: row of the role table.
      module: type for per-module hyper-parameters, ``"attn.q"``, ``"embed"``, …
      shape: of the target's leaf.
      m_in: product of its infinite input dimensions, target over base; 1 if finite.
      m_out: the same of its output dimensions.
      infinite_in: whether any input dimension is infinite.
      infinite_out: whether any output dimension is infinite.
      m_depth: residual layers of its stream, target over base.
      in_block: whether it lies inside a residual block (r of the shape rule).
      residual: ``"attn.res"`` or ``"mlp.res"`` if it is the last map of that branch
        (or its bias, or a gain that ends it), else ``""``.
      stack_axis: axis that counts layers, for leaves that scan stacks; None otherwise.
      layer: index of its block, counted from 0, for unrolled blocks; None otherwise.
      num_layers: layers of its stream in the target; 0 outside blocks.
      matrix: whether weight decay acts on it by default (matrices and embeddings).
    """

    name: str
    role: Role
    module: str
    shape: tuple[int, ...]
    m_in: float = 1.0
    m_out: float = 1.0
    infinite_in: bool = False
    infinite_out: bool = False
    m_depth: float = 1.0
    in_block: bool = False
    residual: str = ""
    stack_axis: int | None = None
    layer: int | None = None
    num_layers: int = 0
    matrix: bool = True
    base_names: tuple[str, ...] = ()
