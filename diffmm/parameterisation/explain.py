"""Every factor in the open: leaf, role, number, formula and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffmm.parameterisation.leaf import Leaf
from diffmm.parameterisation.rules import Exponents, Rule, evaluate
from diffmm.typing import Factor, Multiplier

_COLUMNS = ("init_variance", "forward", "learning_rate", "eps", "weight_decay")


def explain(
    rule: Rule,
    leaves: Mapping[str, Leaf],
    multipliers: Mapping[str, Multiplier] | None = None,
) -> str:
    """A table of every leaf with its multipliers, their formulas and their source.

    Args:
      rule: a parameterisation.
      leaves: from `infer`.
      multipliers: what is applied in the end, if that is more than the rule (absorbed
        residuals, per-module factors); numbers are theirs, formulas the rule's. A
        factor that differs over layers is printed as its range.

    Returns:
      Lines of text: per leaf ``name, role, module`` and, for each hyper-parameter,
      number and formula; then one line with the source. Batch and duration multiply
      all leaves alike and are not in the table: see `diffmm.optim.reparameterise`.
    """
    applied = evaluate(rule, leaves) if multipliers is None else multipliers
    missing = [name for name in leaves if name not in applied]
    if missing:
        raise ValueError(f"multipliers: none for the leaves {missing}")
    rows = [["leaf", "role", "module", *_COLUMNS]]
    for name, leaf in leaves.items():
        formulas = rule.row(leaf)._asdict()
        cells = [
            _cell(getattr(applied[name], field), _infinite(formulas[field], leaf))
            for field in _COLUMNS
        ]
        rows.append([name, leaf.role.value, leaf.module, *cells])
    return "\n".join([*_aligned(rows), f"source: {rule.source}"])


def _infinite(exponents: Exponents, leaf: Leaf) -> str:
    """The formula without the ratios of finite dimensions, which are 1."""
    finite = {
        side: 0.0
        for side, infinite in (
            ("m_in", leaf.infinite_in),
            ("m_out", leaf.infinite_out),
            ("m_depth", leaf.in_block),
        )
        if not infinite
    }
    return exponents._replace(**finite).formula()


def _cell(factor: Factor, formula: str) -> str:
    if isinstance(factor, np.ndarray) and factor.size > 1:
        number = f"{factor.min():.4g} … {factor.max():.4g}"
    else:
        number = f"{float(np.asarray(factor).item()):.4g}"
    return number if formula == "1" else f"{number} = {formula}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
