"""Parameterisations as tables of exponents of m_in, m_out and m_depth.

A rule maps a `Leaf` to exponents, and these to a `Multiplier`. Width and depth only:
batch size and duration multiply every leaf alike and live in `diffmm.optim`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.typing import Multiplier

Family = Literal["adam", "sgd", "lion", "muon"]
FAMILIES: tuple[Family, ...] = ("adam", "sgd", "lion", "muon")


class Exponents(NamedTuple):
    """A factor ``m_in^a · m_out^b · m_depth^c``."""

    m_in: float = 0.0
    m_out: float = 0.0
    m_depth: float = 0.0

    def of(self, leaf: Leaf) -> float:
        """The factor of one leaf, as a Python float; exactly 1.0 if all ratios are."""
        factor = 1.0
        for name, exponent in zip(self._fields, self, strict=True):
            if exponent:
                factor *= float(getattr(leaf, name)) ** exponent
        return factor

    def formula(self) -> str:
        """``"m_in^-1 · m_depth^-0.5"``; ``"1"`` if all exponents are 0."""
        powers = [
            name if exponent == 1 else f"{name}^{exponent:g}"
            for name, exponent in zip(self._fields, self, strict=True)
            if exponent
        ]
        return " · ".join(powers) or "1"


ONE = Exponents()


class Row(NamedTuple):
    """Exponents of everything that a rule sets for one leaf."""

    init_variance: Exponents = ONE
    forward: Exponents = ONE
    learning_rate: Exponents = ONE
    eps: Exponents = ONE
    weight_decay: Exponents = ONE


class Rule(Protocol):
    """A parameterisation: a frozen dataclass of its options."""

    def row(self, leaf: Leaf) -> Row:
        """Exponents of one leaf."""
        ...

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        ...


def evaluate(rule: Rule, leaves: Mapping[str, Leaf]) -> dict[str, Multiplier]:
    """Multipliers of every leaf under a rule.

    Args:
      rule: a parameterisation, `CompletedP` for example.
      leaves: from `diffmm.parameterisation.infer`.

    Returns:
      ``{name: Multiplier}`` of Python floats.
    """
    return {
        name: Multiplier(
            **{
                field: exponents.of(leaf)
                for field, exponents in rule.row(leaf)._asdict().items()
            }
        )
        for name, leaf in leaves.items()
    }


def _initial_variance(leaf: Leaf) -> Exponents:
    """Three cases; ``min(1, m_out/m_in) / m_in`` would break the group law."""
    if not leaf.infinite_in:
        return ONE
    return Exponents(m_in=-1 if leaf.infinite_out else -2)


def _check_alpha(alpha: float) -> None:
    if not (isinstance(alpha, (int, float)) and 0.5 <= alpha <= 1.0):
        raise ValueError(f"alpha must lie in [0.5, 1], got {alpha!r}")


def _check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletedP:
    """Complete^(d)P: every leaf's exponents from its shape and its place.

    With r = 1 inside residual blocks and 0 outside::

        init_variance = 1          input side finite
                      = m_in^-1    both sides infinite
                      = m_in^-2    only the input infinite
        learning_rate = m_in^-1 · m_depth^(r(α-1))
        eps           = m_out^-1 · m_depth^(-rα)
        weight_decay  = m_in                          (coupled: lr·wd is width-free)
        forward       = m_depth^-α at the end of a residual branch, 1 elsewhere

    Two exceptions: the gain of the final norm, whose published ε factor is 1
    (``final_norm_eps``), and a tied embedding, whose logits keep ``forward = m_out^-1``
    because one tensor cannot absorb two roles.

    Attributes:
      alpha: depth exponent in [½, 1]; 1 is the only one that is non-lazy in depth.
      final_norm_eps: ``"paper"``: 1; ``"derived"``: m_out^-1, which is how the gradient
        of that gain scales (measured slope −1.05). They differ visibly only if ε is of
        the size of the gradients.
      wd_depth: ``"paper"``: λ does not depend on depth, so lr·wd ∝ m_depth^(α-1)
        inside blocks; ``"invariant"``: lr·wd does not.
      family: optimiser whose update the learning rate multiplies. ``"sgd"``:
        learning_rate = m_out/m_in · m_depth^(r(2α-1)); ``"lion"``: as Adam;
        ``"muon"``: √(m_out/m_in) · m_depth^(α-1) on matrices with two infinite sides
        inside blocks (divide out a shape factor that the implementation has of its
        own), as Adam elsewhere. Weight decay always keeps lr·wd.

    References:
      Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width,
      Depth, Batch and Duration", arXiv 2512.22382, Table 1. Dey et al., "Don't be
      lazy: CompleteP enables compute-efficient deep transformers", arXiv 2505.01618.
    """

    alpha: float = 1.0
    final_norm_eps: Literal["paper", "derived"] = "paper"
    wd_depth: Literal["paper", "invariant"] = "paper"
    family: Family = "adam"

    def __post_init__(self) -> None:
        """Refuses unknown options."""
        _check_alpha(self.alpha)
        _check_option("final_norm_eps", self.final_norm_eps, ("paper", "derived"))
        _check_option("wd_depth", self.wd_depth, ("paper", "invariant"))
        _check_option("family", self.family, FAMILIES)

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        if self.family == "adam":
            return "arXiv 2512.22382, Table 1"
        return f"derived for {self.family} from arXiv 2512.22382, Table 1"

    def row(self, leaf: Leaf) -> Row:
        """Exponents of one leaf."""
        r = float(leaf.in_block)
        depth_rate = r * (self.alpha - 1.0)
        learning_rate = self._learning_rate(leaf)
        # learning_rate · weight_decay = m_depth^(r(α-1)), or 1 if invariant.
        decay = depth_rate if self.wd_depth == "paper" else 0.0
        eps = Exponents(m_out=-1, m_depth=-r * self.alpha)
        if leaf.role is Role.FINAL_GAIN and self.final_norm_eps == "paper":
            eps = ONE
        forward = ONE
        if leaf.residual:
            forward = Exponents(m_depth=-self.alpha)
        elif leaf.role is Role.TIED_EMBEDDING:
            forward = Exponents(m_out=-1)
        return Row(
            init_variance=_initial_variance(leaf),
            forward=forward,
            learning_rate=learning_rate,
            eps=eps if self.family in ("adam", "muon") else ONE,
            weight_decay=Exponents(
                m_in=-learning_rate.m_in,
                m_out=-learning_rate.m_out,
                m_depth=decay - learning_rate.m_depth,
            ),
        )

    def _learning_rate(self, leaf: Leaf) -> Exponents:
        r = float(leaf.in_block)
        if self.family == "sgd":
            return Exponents(m_in=-1, m_out=1, m_depth=r * (2 * self.alpha - 1))
        hidden = leaf.in_block and leaf.infinite_in and leaf.infinite_out
        if self.family == "muon" and hidden:
            return Exponents(m_in=-0.5, m_out=0.5, m_depth=r * (self.alpha - 1))
        return Exponents(m_in=-1, m_depth=r * (self.alpha - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteP:
    """CompleteP with AdamW: muP in width, m_depth^-α on residual branches.

    Differs from `CompletedP` in an explicit multiplier m_in^-1 on the logits instead
    of its absorbed form, in the embedding's ε (unscaled) and in the final norm's. The
    gains of QK norms, which the paper does not treat, follow `CompletedP`.

    Attributes:
      alpha: depth exponent in [½, 1].

    References:
      Dey et al., arXiv 2505.01618, Table 1.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuses an exponent outside its range."""
        _check_alpha(self.alpha)

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        return "arXiv 2505.01618, Table 1"

    def row(self, leaf: Leaf) -> Row:
        """Exponents of one leaf."""
        row = CompletedP(alpha=self.alpha).row(leaf)
        if leaf.role in (Role.UNEMBEDDING, Role.UNEMBEDDING_BIAS):
            inverse = Exponents(m_in=-1)
            return Row(forward=inverse, eps=inverse)
        if leaf.role in (Role.EMBEDDING, Role.FINAL_GAIN):
            return row._replace(eps=ONE)
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuP:
    """muP with AdamW: width only, nothing depends on depth.

    References:
      Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
      Hyperparameter Transfer", arXiv 2203.03466, Table 8; ε as in arXiv 2505.01618.
    """

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        return "arXiv 2505.01618, Table 1 (muP column)"

    def row(self, leaf: Leaf) -> Row:
        """Exponents of one leaf."""
        flat = dataclasses.replace(leaf, in_block=False, residual="")
        return CompleteP().row(flat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """The standard parameterisation: one variance and one learning rate for all."""

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        return "standard parameterisation"

    def row(self, leaf: Leaf) -> Row:
        """All exponents are 0."""
        del leaf
        return Row()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardFanIn:
    """Fan-in initialisation and one learning rate: what most code bases do.

    Differs from `Standard`, where the variance itself is kept over widths, in hidden
    and output matrices: variance m_in^-1.
    """

    @property
    def source(self) -> str:
        """Where the exponents come from."""
        return "standard parameterisation, fan-in initialisation"

    def row(self, leaf: Leaf) -> Row:
        """Only the initial variance of matrices scales."""
        return Row(init_variance=Exponents(m_in=-1) if leaf.infinite_in else ONE)


def role_table(
    role: Role,
    *,
    m_width: float,
    m_depth: float,
    alpha: float = 1.0,
    final_norm_eps: Literal["paper", "derived"] = "paper",
) -> Multiplier:
    """Complete^(d)P's table by role, for models that scale every width alike.

    The same numbers as `CompletedP` gives from shapes; stated apart, so that each
    checks the other.

    Args:
      role: class of the leaf; not `Role.SCALAR`, whose place decides.
      m_width: width, target over base.
      m_depth: residual layers, target over base.
      alpha: depth exponent.
      final_norm_eps: as in `CompletedP`.

    Returns:
      A `Multiplier`; ``forward`` of a residual branch is ``m_depth^-alpha`` and does
      not belong to a role.

    Raises:
      ValueError: a ratio that is not positive and finite, ``alpha`` outside [½, 1],
        or a role without a row.

    References:
      arXiv 2512.22382, Table 1.
    """
    for name, ratio in (("m_width", m_width), ("m_depth", m_depth)):
        check_ratio(name, ratio)
    _check_alpha(alpha)
    _check_option("final_norm_eps", final_norm_eps, ("paper", "derived"))
    n, rate, depth = 1.0 / m_width, m_depth ** (alpha - 1.0), m_depth**-alpha
    rows = {
        # role: init variance, learning rate, eps, weight decay
        Role.EMBEDDING: (1.0, 1.0, n, 1.0),
        Role.TIED_EMBEDDING: (1.0, 1.0, n, 1.0),
        Role.HIDDEN: (n, n * rate, n * depth, m_width),
        Role.HIDDEN_BIAS: (1.0, rate, n * depth, 1.0),
        Role.GAIN: (1.0, rate, n * depth, 1.0),
        Role.QK_GAIN: (1.0, rate, depth, 1.0),
        Role.FINAL_GAIN: (1.0, 1.0, 1.0 if final_norm_eps == "paper" else n, 1.0),
        Role.UNEMBEDDING: (n * n, n, 1.0, m_width),
        Role.UNEMBEDDING_BIAS: (1.0, 1.0, 1.0, 1.0),
    }
    if role not in rows:
        raise ValueError(f"role must be one of {[r.value for r in rows]}, got {role!r}")
    variance, learning_rate, eps, weight_decay = rows[role]
    return Multiplier(
        init_variance=variance,
        forward=n if role is Role.TIED_EMBEDDING else 1.0,
        learning_rate=learning_rate,
        eps=eps,
        weight_decay=weight_decay,
    )


def check_ratio(name: str, ratio: float) -> None:
    """Refuses a ratio that is not a positive finite number."""
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"{name} must be a positive finite number, got {ratio!r}")
