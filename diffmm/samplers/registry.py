"""Rules by name: for the command line only.

Library code passes objects (``rule=Threshold(threshold=0.8)``); a string never goes
further than here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diffmm.diffusion.names import schedule_by_name
from diffmm.samplers.adaptive import (
    EntropyBounded,
    Factor,
    Frechet,
    Threshold,
)
from diffmm.samplers.checks import check_options
from diffmm.samplers.dinfer import Credit, Hierarchy
from diffmm.samplers.klass import KLASS
from diffmm.samplers.quota import remaining_cosine, remaining_even, remaining_linear
from diffmm.samplers.remasking import WINO, JointThreshold
from diffmm.samplers.remdm import ReMDM
from diffmm.samplers.rule import Rule
from diffmm.samplers.rules import Ancestral, FirstHitting, FixedQuota
from diffmm.samplers.scores import score_from_name
from diffmm.samplers.stochastic import DreamOrigin, StochasticQuota

RULES: dict[str, type] = {
    "ancestral": Ancestral,
    "credit": Credit,
    "dream_origin": DreamOrigin,
    "eb": EntropyBounded,
    "factor": Factor,
    "first_hitting": FirstHitting,
    "fixed_quota": FixedQuota,
    "frechet": Frechet,
    "hierarchy": Hierarchy,
    "joint_threshold": JointThreshold,
    "klass": KLASS,
    "remdm": ReMDM,
    "stochastic_quota": StochasticQuota,
    "threshold": Threshold,
    "wino": WINO,
}

_QUOTAS = {
    "cosine": remaining_cosine,
    "even": remaining_even,
    "linear": remaining_linear,
}


def rule_from_name(name: str, **options: Any) -> Rule:
    """The rule that a command line calls ``name``.

    >>> rule_from_name("factor", factor=0.5)
    Factor(factor=0.5)

    Args:
      name: a key of `RULES`.
      **options: its fields. ``score``, ``schedule`` and ``remaining`` may be names.

    Raises:
      ValueError: if there is no rule, score, schedule or quota of that name, the rule
        does not take an option, or an option without default is missing.
    """
    if name not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {name!r}")
    kind = RULES[name]
    takes = {field.name for field in dataclasses.fields(kind)}
    if "num_steps" in options and "num_steps" not in takes:
        raise ValueError(
            f"rule {name!r} takes no num_steps: it stops when nothing is masked, and "
            f"its own thresholds decide how many evaluations that takes; give either "
            f"num_steps or a rule such as this, not both"
        )
    check_options(f"rule {name!r}", kind, options)
    for option, resolve in (
        ("score", score_from_name),
        ("schedule", schedule_by_name),
        ("remaining", _quota),
    ):
        if isinstance(options.get(option), str):
            options[option] = resolve(options[option])
    return kind(**options)


def _quota(name: str) -> Any:
    if name not in _QUOTAS:
        raise ValueError(f"remaining must be one of {sorted(_QUOTAS)}, got {name!r}")
    return _QUOTAS[name]
