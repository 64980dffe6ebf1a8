"""What goes wrong silently: a reader of set-ups, not of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffmm._tree import named_leaves
from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.typing import Multiplier, Params


class Optimizer(Protocol):
    """The two functions of an optax transformation."""

    init: Any
    update: Any


class Finding(NamedTuple):
    """One thing that will make transfer fail, or may.

    Attributes:
      check: short name of the check.
      leaves: the leaves concerned; empty if the whole set-up is.
      message: what is wrong, and what to do.
    """

    check: str
    leaves: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        """One line."""
        where = f" [{', '.join(self.leaves)}]" if self.leaves else ""
        return f"{self.check}: {self.message}{where}"


def shrink_per_step(optimizer: Optimizer, params: Params) -> dict[str, float]:
    """How much of itself every leaf loses to weight decay in a step, measured.

    One update with zero gradients, from the initial state, on parameters of one: what
    remains is decay. Transformations that are not silent at zero gradients (noise,
    clipping to a minimum) cannot be measured so.

    Args:
      optimizer: an optax transformation, whose schedule must not start at zero.
      params: tree whose names and shapes it expects; values are not read.

    Returns:
      ``{name: lr·wd}``, means over the leaf.
    """
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), params)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = optimizer.update(zeros, optimizer.init(ones), ones)
    return {name: -float(jnp.mean(u)) for name, u in named_leaves(updates).items()}


def audit(
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    *,
    params: Params | None = None,
    base_rms: Mapping[str, float] | None = None,
    rms: Mapping[str, float] | None = None,
    shrink: Mapping[str, float] | None = None,
    eps: float | None = None,
    head_dims: tuple[int, int] | None = None,
    base_width: int | None = None,
    base_depth: int | None = None,
    clips_by_global_norm: bool = False,
) -> list[Finding]:
    """Looks for what makes hyper-parameters stop transferring without any error.

    Each check runs if what it needs is given.

    Args:
      leaves: from `infer`.
      multipliers: what the optimiser will apply.
      params: parameters or their shapes: leaves that have no rule.
      base_rms: `rms_by_name` of a fresh draw of the base model …
      rms: … and of the target as it will start: depth that is counted twice.
      shrink: `shrink_per_step` of the optimiser: the wrong decay mode, drift of
        lr·wd, decay of vectors that the mask should leave out.
      eps: AdamW's ε at the base.
      head_dims: of base and target.
      base_width: width of the base model.
      base_depth: layers of the base model.
      clips_by_global_norm: whether gradients are clipped by their global norm.

    Returns:
      Findings, the empty list if there is nothing to say.
    """
    findings: list[Finding] = []
    if params is not None:
        findings += _without_rule(multipliers, named_leaves(params))
    findings += _tied(leaves, multipliers)
    findings += _missing_ends(leaves)
    if base_rms is not None and rms is not None:
        findings += _depth_twice(leaves, multipliers, base_rms, rms)
    if shrink is not None:
        findings += _decay(leaves, multipliers, shrink)
    findings += _small(leaves, head_dims, base_width, base_depth)
    if eps is not None and eps > 1e-6:
        findings.append(
            Finding("epsilon", (), f"eps={eps:g} at the base is not small: use <= 1e-8")
        )
    if clips_by_global_norm and _is_absorbed(leaves, multipliers):
        findings.append(
            Finding(
                "clipping",
                (),
                "the global norm of gradients is not invariant under absorption: clip "
                "by the norm of the rescaled gradients instead",
            )
        )
    return findings


def _without_rule(
    multipliers: Mapping[str, Multiplier], params: Mapping[str, Any]
) -> list[Finding]:
    absent = tuple(name for name in params if name not in multipliers)
    extra = tuple(name for name in multipliers if name not in params)
    findings = []
    if absent:
        findings.append(Finding("no rule", absent, "leaves without a multiplier"))
    if extra:
        findings.append(Finding("no leaf", extra, "multipliers of leaves that are not"))
    return findings


def _tied(
    leaves: Mapping[str, Leaf], multipliers: Mapping[str, Multiplier]
) -> list[Finding]:
    roles = {leaf.role for leaf in leaves.values()}
    embeddings = tuple(n for n, x in leaves.items() if x.module == "embed")
    if (
        Role.EMBEDDING in roles
        and embeddings
        and not roles & {Role.UNEMBEDDING, Role.TIED_EMBEDDING}
    ):
        return [
            Finding(
                "tied weights",
                embeddings,
                "there is an embedding and no unembedding: if the logits use it, give "
                "it the role of a tied embedding",
            )
        ]
    wrong = tuple(
        name
        for name, leaf in leaves.items()
        if leaf.role is Role.TIED_EMBEDDING
        and leaf.m_out != 1.0
        and np.all(np.asarray(multipliers[name].forward) == 1.0)
    )
    if wrong:
        return [
            Finding(
                "tied weights",
                wrong,
                "a tied embedding needs the multiplier 1/m_width on the logits",
            )
        ]
    return []


def _missing_ends(leaves: Mapping[str, Leaf]) -> list[Finding]:
    deep = [leaf for leaf in leaves.values() if leaf.in_block and leaf.m_depth != 1.0]
    if deep and not any(leaf.residual for leaf in deep):
        return [
            Finding(
                "residual branches",
                (),
                "depth changes but no leaf is marked as the end of a residual branch: "
                "nothing carries the residual multiplier in absorbed mode",
            )
        ]
    return []


def _depth_twice(
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    base_rms: Mapping[str, float],
    rms: Mapping[str, float],
) -> list[Finding]:
    twice = []
    for name, leaf in leaves.items():
        names = leaf.base_names or (name,)
        base = np.sqrt(np.mean([base_rms[n] ** 2 for n in names]))
        if not leaf.residual or leaf.m_depth == 1.0 or base == 0.0:
            continue
        expected = base * np.sqrt(np.mean(multipliers[name].init_variance))
        ratio = rms[name] / expected
        # A 1/√(2·layers) initialiser leaves the factor m_depth^-1/2; the geometric
        # middle between it and 1 separates the two.
        middle = leaf.m_depth**-0.25
        if (ratio < middle) == (leaf.m_depth > 1):
            twice.append(name)
    if twice:
        return [
            Finding(
                "depth counted twice",
                tuple(twice),
                "the initialiser shrinks with depth (1/√(2·layers)?) although the rule "
                "scales residual branches already: use rescale_init",
            )
        ]
    return []


def _decay(
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier],
    shrink: Mapping[str, float],
) -> list[Finding]:
    """Compares measured shrinkage with that of the rule, up to one common factor."""
    findings = []
    vectors = tuple(n for n, x in leaves.items() if not x.matrix and shrink[n] > 0)
    matrices = [n for n, x in leaves.items() if x.matrix]
    kept = tuple(n for n in matrices if shrink[n] == 0.0)
    decayed = [n for n in matrices if shrink[n] > 0]
    if vectors:
        findings.append(
            Finding("decay mask", vectors, "gains and biases decay: give a mask")
        )
    if kept and decayed:
        findings.append(Finding("decay mask", kept, "matrices that do not decay"))
    expected, without_rate, with_rate = {}, {}, {}
    for name in decayed:
        rate = float(np.mean(multipliers[name].learning_rate))
        decay = float(np.mean(multipliers[name].weight_decay))
        expected[name] = shrink[name] / (rate * decay)
        without_rate[name] = shrink[name] / decay
        with_rate[name] = shrink[name] / rate
    if decayed and not _constant(expected):
        if _constant(without_rate):
            message = (
                "decay is multiplied by λ's factor but not by the learning rate's: the "
                "optimiser decays independently of it, the factors are of the coupled "
                "form (lr·wd drifts with width)"
            )
        elif _constant(with_rate):
            message = (
                "decay is multiplied by the learning rate's factor but not by λ's: "
                "wider models decay too little"
            )
        else:
            message = "lr·wd of the leaves is not what the rule says"
        findings.append(Finding("decay mode", tuple(decayed), message))
    return findings


def _constant(values: Mapping[str, float]) -> bool:
    numbers = np.array(list(values.values()))
    return bool(np.ptp(numbers) <= 1e-3 * numbers.max())


def _small(
    leaves: Mapping[str, Leaf],
    head_dims: tuple[int, int] | None,
    base_width: int | None,
    base_depth: int | None,
) -> list[Finding]:
    findings = []
    qk_norm = any(leaf.role is Role.QK_GAIN for leaf in leaves.values())
    if head_dims is not None and head_dims[0] != head_dims[1] and not qk_norm:
        findings.append(
            Finding(
                "head dimension",
                (),
                f"scales from {head_dims[0]} to {head_dims[1]} without QK norm: scale "
                "attention by √d_base/d_head instead of 1/√d_head",
            )
        )
    if any(leaf.m_in < 1 or leaf.m_out < 1 for leaf in leaves.values()):
        findings.append(Finding("base", (), "the target is narrower than the base"))
    if base_width is not None and base_width < 128:
        findings.append(
            Finding("base", (), f"width {base_width} < 128: transfer is approximate")
        )
    if base_depth is not None and base_depth < 4:
        findings.append(
            Finding("base", (), f"depth {base_depth} < 4: transfer is approximate")
        )
    return findings


def _is_absorbed(
    leaves: Mapping[str, Leaf], multipliers: Mapping[str, Multiplier]
) -> bool:
    return any(
        leaf.residual
        and leaf.m_depth != 1.0
        and np.all(np.asarray(multipliers[name].forward) == 1.0)
        for name, leaf in leaves.items()
    )
