"""One leaf of AdamW: its constants, and what is done to it in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.optim import _leaves, rates
from diffmm.optim.hyperparameters import AdamW, Decay
from diffmm.optim.rates import BetaForm
from diffmm.typing import Array, ArrayLike, Factor, Multiplier


class Moment(NamedTuple):
    """Coefficients of one exponential average; arrays if layers differ.

    Attributes:
      beta: weight of the old value.
      complement: 1 − beta to full precision.
      log: ln beta; None where the multiplier is 1, whose formulas are optax's.
      unchanged: in arrays, the layers whose multiplier is 1.
    """

    beta: Factor
    complement: Factor
    log: Factor | None
    unchanged: Any = None

    @classmethod
    def of(cls, beta: float, factor: Factor, form: BetaForm, name: str) -> Moment:
        """Multiplies the rate of ``beta`` by a checked factor."""
        if _leaves.is_one(factor):
            return cls(beta, 1 - beta, None)
        each = np.ravel(factor)
        betas = [rates.scale_beta(beta, k, form, name=name) for k in each]
        complements = [rates.complement(beta, k, form) for k in each]
        if isinstance(factor, float):
            log = _leaves.log_of_complement(complements[0])
            return cls(betas[0], complements[0], log)
        complement = np.reshape(complements, factor.shape)
        log = _leaves.log_of_complement(complement)
        return cls(np.reshape(betas, factor.shape), complement, log, factor == 1)

    def bias_correction(self, count: Array) -> Array:
        """1 − beta^count in float32 (or wider), stable for beta close to 1."""
        if self.log is None:
            return jnp.asarray(1 - self.beta**count)
        stable = -jnp.expm1(count * self.log)
        if np.any(self.unchanged):
            return jnp.where(self.unchanged, 1 - self.beta**count, stable)
        return stable


class Constants(NamedTuple):
    """Hyper-parameters of one leaf: Python floats, or float64 arrays over layers."""

    learning_rate: Factor
    eps: Factor
    eps_root: Factor
    decay: Factor
    b1: Moment
    b2: Moment


_FIELDS = ("learning_rate", "eps", "weight_decay", "b1", "b2")


def constants(
    hyper: AdamW, multipliers: Mapping[str, Multiplier], form: BetaForm
) -> dict[str, Constants]:
    """Applies checked multipliers to the hyper-parameters that all leaves share.

    Raises:
      ValueError: naming the leaf whose factor or product is out of range.
    """
    moments: dict[tuple[str, float], Moment] = {}

    def moment(name: str, field: str, factor: Factor) -> Moment:
        made = moments.get((field, factor)) if isinstance(factor, float) else None
        if made is None:
            beta = getattr(hyper, field)
            made = Moment.of(beta, factor, form, f"{field} of leaf {name!r}")
            if isinstance(factor, float):
                moments[field, factor] = made
        return made

    found = {}
    for name, multiplier in multipliers.items():
        _leaves.check_multiplier(name, multiplier)
        factors = {
            field: _leaves.checked(name, field, getattr(multiplier, field))
            for field in _FIELDS
        }
        decay = hyper.weight_decay * factors["weight_decay"]
        shrink = decay * factors["learning_rate"]
        if hyper.decay == "independent":
            decay = shrink
        else:
            shrink = hyper.learning_rate * shrink
        if np.any(np.asarray(shrink) >= 1):
            raise ValueError(
                f"multipliers: learning_rate * weight_decay of leaf {name!r} must be "
                f"below 1, or a step removes the whole weight; got {np.max(shrink):.3g}"
            )
        found[name] = Constants(
            learning_rate=hyper.learning_rate * factors["learning_rate"],
            eps=hyper.eps * factors["eps"],
            eps_root=hyper.eps_root * factors["eps"] * factors["eps"],
            decay=decay,
            b1=moment(name, "b1", factors["b1"]),
            b2=moment(name, "b2", factors["b2"]),
        )
    return found


class Scalars:
    """Traced scalars of one update, each formed once however many leaves need it."""

    def __init__(self, count: Array, value: ArrayLike | None):
        self._count, self._value = count, value
        self._corrections: dict[int, Array] = {}
        self._steps: dict[float, Any] = {}

    def correction(self, moment: Moment) -> Array:
        """The bias correction of a moment; `constants` makes equal moments one."""
        if id(moment) not in self._corrections:
            self._corrections[id(moment)] = moment.bias_correction(self._count)
        return self._corrections[id(moment)]

    def step(self, peak: Factor) -> Any:
        """Minus the peak times the schedule's value; None if there is no schedule."""
        if self._value is None:
            return None
        if not isinstance(peak, float):
            return -1 * (peak * self._value)
        if peak not in self._steps:
            self._steps[peak] = -1 * (peak * self._value)
        return self._steps[peak]


def update_leaf(
    gradient: Array,
    mu: Array,
    nu: Array,
    parameter: Array,
    constants: Constants,
    decay: Decay | None,
    scalars: Scalars,
) -> tuple[Array, Array, Array]:
    """One leaf: operation for operation what ``optax.adamw`` does to it.

    Returns:
      Update and new moments, in the types that the arithmetic gives them.
    """
    traced = (
        scalars.correction(constants.b1),
        scalars.correction(constants.b2),
        scalars.step(constants.learning_rate),
        scalars.step(constants.decay) if decay == "independent" else None,
    )
    # Outside jit nothing is compiled; arrays over layers have no hash.
    once = isinstance(gradient, jax.core.Tracer) and not _has_arrays(constants)
    function = _update_once if once else _update
    return function(gradient, mu, nu, parameter, *traced, constants, decay)


def _has_arrays(c: Constants) -> bool:
    factors = (*c[:4], c.b1.beta, c.b2.beta)
    return not all(isinstance(factor, float) for factor in factors)


def _update(gradient, mu, nu, parameter, correct_1, correct_2, step, shrink, c, decay):
    cast = _leaves.in_dtype
    square = gradient**2 if jnp.isrealobj(gradient) else jnp.abs(gradient) ** 2
    mu = (
        cast(c.b1.complement, gradient.dtype) * gradient
        + cast(c.b1.beta, mu.dtype) * mu
    )
    nu = cast(c.b2.complement, square.dtype) * square + cast(c.b2.beta, nu.dtype) * nu
    # Corrections stay float32 until here: beta**count in bfloat16 would be 1.
    root = jnp.sqrt(nu / correct_2.astype(nu.dtype) + cast(c.eps_root, nu.dtype))
    update = mu / correct_1.astype(mu.dtype) / (root + cast(c.eps, nu.dtype))
    if isinstance(c.decay, float) and c.decay == 0.0:
        decay = None
    if decay == "coupled":
        update = update + cast(c.decay, parameter.dtype) * parameter
    update = _times(step, c.learning_rate, update)
    if decay == "independent":
        update = update + _times(shrink, c.decay, parameter)
    return update, mu, nu


def _times(step: Any, peak: Factor, array: Array) -> Array:
    """Minus the rate times an array, in the array's type."""
    if step is None:
        return _leaves.in_dtype(-1 * peak, array.dtype) * array
    return jnp.array(step, dtype=array.dtype) * array


# Leaves of one class and shape are traced once; the caller's program is the same.
_update_once = jax.jit(_update, static_argnames=("c", "decay"), inline=True)


def check_shapes(name: str, constants: Constants, leaf: Any) -> None:
    """Raises a ValueError unless every array broadcasts against the leaf."""
    fields = {
        "learning_rate": constants.learning_rate,
        "eps": constants.eps,
        "weight_decay": constants.decay,
        "b1": constants.b1.beta,
        "b2": constants.b2.beta,
    }
    for field, value in fields.items():
        _leaves.check_shape(name, field, value, leaf)
