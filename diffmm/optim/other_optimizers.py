"""Batch-size rules of many optimisers, as one table of exponents of κ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from diffmm.optim import validate
from diffmm.optim.rates import BETA_FORMS, BetaForm, scale_beta, scale_decay

DecayForm = Literal["coupled", "independent", "l2"]
DECAY_FORMS: tuple[str, ...] = get_args(DecayForm)

#: Exponent of κ in the learning rate, for the optimisers that have a rule.
LEARNING_RATE_EXPONENTS: dict[str, float] = {
    "sgd": 1.0,
    "momentum": 1.0,
    "rmsprop": 0.5,
    "adam": 0.5,
    "adamw": 0.5,
    "adagrad": 0.0,
}

_BETAS = ("b1", "b2", "decay_rate")
_KEYS = (
    "learning_rate",
    *_BETAS,
    "momentum",
    "eps",
    "eps_root",
    "weight_decay",
    "initial_accumulator_value",
    "ema",
)


def power(kappa: float, exponent: float) -> float:
    """κ^exponent; exactly 1 at κ = 1 or exponent 0, a correctly rounded root at ½."""
    if kappa == 1 or exponent == 0:
        return 1.0
    if exponent == 0.5:
        return math.sqrt(kappa)
    if exponent == -0.5:
        return 1 / math.sqrt(kappa)
    return kappa**exponent


def exact_shrink(shrink: float, kappa: float) -> float:
    """What κ decay steps remove together, 1 − (1 − a)^κ, of a per-step shrink a.

    Args:
      shrink: a in [0, 1).
      kappa: positive.

    Returns:
      The shrink of the one step that replaces them.
    """
    return shrink if kappa == 1 else -math.expm1(kappa * math.log1p(-shrink))


def scale_hyperparameters(
    hyperparameters: Mapping[str, float],
    kappa: float,
    optimizer: str = "adamw",
    *,
    decay: DecayForm | None = None,
    beta_form: BetaForm = "exponential",
    exact_decay: bool = False,
    learning_rate_exponent: float | None = None,
) -> dict[str, float]:
    """Hyper-parameters after one step has become κ steps, by the optimiser's rule.

    With κ^p the factor of the learning rate, all else follows: a step must shrink a
    weight κ times as much, an average must forget κ times as fast, and what is
    compared with the gradient follows the gradient noise, κ^-½ under a mean loss.

    ==================  ====  ===========  ==========  ========  ===========  ======
    optimiser           p     β            eps         λ (l2)    λ (coupled)  ρ
    ==================  ====  ===========  ==========  ========  ===========  ======
    sgd, momentum       1     –            –           same      same         ρ^κ
    rmsprop, adam(w)    ½     `scale_beta` eps/√κ      same      √κ λ         ρ^κ
    adagrad             0     –            eps/κ       same      κ λ          ρ^κ
    ==================  ====  ===========  ==========  ========  ===========  ======

    λ that the learning rate does not multiply (``"independent"``) becomes κλ.
    ``momentum`` is a heavy ball, whose sum is not normalised, and stays as it is.
    ``eps_root``, inside the root, takes the square of the factor of ``eps``, and so
    does Adagrad's initial accumulator, /κ², since it starts a sum of squares. The SGD
    rule is one of batch size; of duration there is none for SGD.

    Trap: the ``eps`` of `optax.adagrad` always lies inside the root, and that of
    `optax.rmsprop` unless ``eps_in_sqrt=False``: pass those as ``eps_root``. Their
    ``decay`` coefficient is ``decay_rate`` here.

    >>> hyper = {"learning_rate": 1e-3, "b1": 0.9, "weight_decay": 0.1}
    >>> new = scale_hyperparameters(hyper, 4, "adamw")
    >>> [round(new[name], 6) for name in hyper]
    [0.002, 0.6561, 0.2]

    Args:
      hyperparameters: any of ``learning_rate`` (positive), ``b1``, ``b2``,
        ``decay_rate``, ``momentum``, ``eps``, ``eps_root``, ``weight_decay``,
        ``initial_accumulator_value``, ``ema``.
      kappa: positive; 1 returns an equal dictionary.
      optimizer: a name in `LEARNING_RATE_EXPONENTS`, or any other name together with
        ``learning_rate_exponent``.
      decay: how λ acts: ``"coupled"`` (θ −= ηλθ), ``"independent"`` (θ −= λθ) or
        ``"l2"`` (added to the gradient). Default: ``"coupled"`` for adamw and for
        optimisers without a rule, ``"l2"`` for the rest.
      beta_form: of ``b1``, ``b2`` and ``decay_rate``; ``ema`` is always ρ^κ.
      exact_decay: composes the shrink exactly, 1 − a′ = (1 − a)^κ, instead of
        a′ = κa. No effect on ``"l2"``.
      learning_rate_exponent: p, for optimisers without a published rule (LARS, LAMB,
        Lion, Muon, …); overrides the table.

    Returns:
      A new dictionary of Python floats with the same keys.

    Raises:
      ValueError: a value out of range, an unknown key or option, an optimiser without
        a rule and no exponent, the linear form of β where it has no value, or a decay
        that would remove a whole weight in one step.

    References:
      Malladi et al., arXiv 2205.10287 (RMSProp, Adam). Busbridge et al., How to Scale
      Your EMA, arXiv 2307.13813 (ρ). The rules of weight decay and Adagrad follow from
      the same argument: per unit of SDE time nothing may change.
    """
    kappa = validate.positive("kappa", kappa)
    validate.one_of("beta_form", beta_form, BETA_FORMS)
    unknown = sorted(set(hyperparameters) - set(_KEYS))
    if unknown:
        raise ValueError(
            f"hyperparameters has unknown names {unknown}; known: {list(_KEYS)}."
        )
    if learning_rate_exponent is not None:
        exponent = validate.number("learning_rate_exponent", learning_rate_exponent)
    elif optimizer in LEARNING_RATE_EXPONENTS:
        exponent = LEARNING_RATE_EXPONENTS[optimizer]
    else:
        raise ValueError(
            f"optimizer={optimizer!r} has no known rule for its learning rate; "
            f"rules exist for {sorted(LEARNING_RATE_EXPONENTS)}. Pass "
            "learning_rate_exponent, the power of kappa, to choose one."
        )
    if decay is None:
        ruled = optimizer in LEARNING_RATE_EXPONENTS
        decay = "l2" if ruled and optimizer != "adamw" else "coupled"
    validate.one_of("decay", decay, DECAY_FORMS)
    old = _checked(hyperparameters)
    if kappa == 1:
        return old

    new = dict(old)
    # Adagrad's root holds a sum over steps of squares, not their average.
    noise_exponent = -1.0 if optimizer == "adagrad" else -0.5
    factors = {
        "learning_rate": power(kappa, exponent),
        "eps": power(kappa, noise_exponent),
        "eps_root": power(kappa, 2 * noise_exponent),
        "initial_accumulator_value": power(kappa, 2 * noise_exponent),
    }
    for name, factor in factors.items():
        if name in old:
            new[name] = old[name] * factor
    for name in _BETAS:
        if name in old:
            new[name] = scale_beta(old[name], kappa, beta_form, name=name)
    if "ema" in old:
        new["ema"] = scale_decay(old["ema"], kappa, name="ema")
    if old.get("weight_decay") and decay != "l2":
        new["weight_decay"] = _scaled_decay(old, kappa, exponent, decay, exact_decay)
    return new


def _checked(hyperparameters: Mapping[str, float]) -> dict[str, float]:
    """The values as floats, each in its own range."""
    checked = {}
    for name, value in hyperparameters.items():
        if name == "learning_rate":
            checked[name] = validate.positive(name, value)
        elif name in (*_BETAS, "momentum"):
            checked[name] = validate.probability(name, value)
        elif name == "ema":
            checked[name] = validate.probability(name, value, one=True)
        else:
            checked[name] = validate.non_negative(name, value)
    return checked


def _scaled_decay(
    old: Mapping[str, float],
    kappa: float,
    exponent: float,
    decay: str,
    exact_decay: bool,
) -> float:
    """λ′ of a decay that acts on the weights themselves."""
    weight_decay = old["weight_decay"]
    if decay == "coupled":
        learning_rate = old.get("learning_rate")
        linear = weight_decay * power(kappa, 1 - exponent)
        if learning_rate is None:
            if exact_decay:
                raise ValueError(
                    "hyperparameters must hold learning_rate for the exact coupled "
                    f"weight_decay, got {sorted(old)}."
                )
            return linear
    else:
        learning_rate = 1.0
        linear = weight_decay * kappa
    shrink = learning_rate * weight_decay
    if shrink >= 1 or (not exact_decay and shrink * kappa >= 1):
        raise ValueError(
            f"weight_decay={weight_decay!r} would remove a whole weight in one step at "
            f"kappa={kappa!r}: its shrink per step, {shrink!r} before kappa, must stay "
            "below 1. With exact_decay=True it does, if it does before kappa."
        )
    if not exact_decay:
        return linear
    scale = power(kappa, exponent) if decay == "coupled" else 1.0
    return exact_shrink(shrink, kappa) / (scale * learning_rate)
