"""Per-module hyper-parameters: one factor for each module type times one per layer.

    log ζ[module, layer] = log ζ_type[module] + log ζ_depth[layer],

which takes |modules| + layers numbers instead of |modules| · layers, and transfers: to
another width as it is, to another depth by interpolation over relative depth.

References:
  Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width, Depth,
  Batch and Duration", arXiv 2512.22382.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from diffmm.parameterisation.absorb import absorb
from diffmm.parameterisation.leaf import RESIDUALS, Leaf
from diffmm.typing import Factor, Multiplier

#: Hyper-parameters of a leaf that take a factor.
LEAF_HYPERPARAMETERS = ("learning_rate", "weight_decay", "b1", "b2", "eps", "init_std")
#: The multiplier of a residual branch, which belongs to ``attn.res`` or ``mlp.res``.
RESIDUAL = "residual"
#: The module type that stands for all of them.
EVERY = "*"

_ZERO_ALLOWED = ("learning_rate", "weight_decay")
_INTERPOLATIONS = ("log", "linear")

Interpolation = Literal["log", "linear"]


def interpolate_depth(
    values: Sequence[float], num_layers: int, interpolation: Interpolation = "log"
) -> np.ndarray:
    """Factors per layer, taken to another number of layers.

    Piecewise linear over the relative depth ``x_l = l / (L − 1)``, so that the first
    and the last layer keep their factors and equal depths are the exact identity. One
    given factor stands for all layers; a target of one layer reads x = ½.

    Args:
      values: factors of L layers.
      num_layers: L', of the target.
      interpolation: of ``"log"`` factors, or of the factors themselves.

    Returns:
      float64 ``[num_layers]``.

    Raises:
      ValueError: no values, no layers, a negative or infinite factor, an unknown
        interpolation, or one of ``"log"`` between a factor of 0 and another.

    >>> interpolate_depth([1.0, 4.0], 3).tolist()
    [1.0, 2.0, 4.0]
    """
    factors = np.asarray(_depth_list("values", values))
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers!r}")
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"interpolation must be one of {_INTERPOLATIONS}, got {interpolation!r}"
        )
    if num_layers == 1:
        lower, rest = np.divmod(np.array([len(factors) - 1]), 2)
        weight = rest / 2
    else:
        # Integers, so that a layer which falls on a given one takes it exactly.
        place = np.arange(num_layers) * (len(factors) - 1)
        lower, rest = np.divmod(place, num_layers - 1)
        weight = rest / (num_layers - 1)
    low, high = factors[lower], factors[np.minimum(lower + 1, len(factors) - 1)]
    mixed = (weight > 0) & (low != high)
    if interpolation == "linear":
        return np.where(mixed, low + weight * (high - low), low)
    if np.any(mixed & (np.minimum(low, high) == 0)):
        raise ValueError(
            f"values: the logarithm of a factor 0 in {list(values)} cannot be "
            f"interpolated to {num_layers} layers; use interpolation='linear'"
        )
    ratio = np.where(mixed, high, 1.0) / np.where(mixed, low, 1.0)
    return low * np.where(mixed, ratio**weight, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerModule:
    """Factors by module type and by layer, on top of a parameterisation.

    Hyper-parameters are ``learning_rate``, ``weight_decay``, ``b1``, ``b2``, ``eps``,
    ``init_std`` and, of the modules ``attn.res`` and ``mlp.res`` alone, ``residual``,
    what the output of a branch is multiplied by. Everything not named is 1.

    - ``weight_decay`` is λ of the learning-rate-coupled form ``θ −= η λ θ``: a factor
      on ``learning_rate`` changes the decay per step too.
    - ``b1`` and ``b2`` multiply the rate at which a moment forgets, not β itself.
    - ``init_std`` is a factor of the scale: the variance takes its square.

    Attributes:
      type: by module type (`Leaf.module`, ``attn.res``, ``mlp.res``, or ``"*"`` for
        all), factors by hyper-parameter.
      depth: by hyper-parameter, one factor for each layer of the model they were
        found on; ``residual`` is shared by both branches.
      interpolation: how ``depth`` goes to another number of layers, see
        `interpolate_depth`.

    Example:
      >>> tuned = PerModule(
      ...     type={"attn.q": {"learning_rate": 1.6}, "mlp.res": {"residual": 0.5}},
      ...     depth={"learning_rate": [1.0, 4.0]})
      >>> tuned.residual("mlp.res", 3).tolist()
      [0.5, 0.5, 0.5]
    """

    type: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    depth: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    interpolation: Interpolation = "log"

    def __post_init__(self) -> None:
        """Checks every factor and stores plain floats."""
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {_INTERPOLATIONS}, got "
                f"{self.interpolation!r}"
            )
        types = {}
        for module, factors in _mapping("type", self.type).items():
            where = f"type[{module!r}]"
            factors = _mapping(where, factors)
            for name in factors:
                _check_hyperparameter(where, name, module)
            types[module] = {
                name: _factor(f"{where}[{name!r}]", value, name)
                for name, value in factors.items()
            }
        depths = {}
        for name, values in _mapping("depth", self.depth).items():
            _check_hyperparameter("depth", name)
            depths[name] = _depth_list(f"depth[{name!r}]", values, name)
        object.__setattr__(self, "type", types)
        object.__setattr__(self, "depth", depths)

    def apply(
        self,
        leaves: Mapping[str, Leaf],
        multipliers: Mapping[str, Multiplier],
        *,
        absorb_residual: bool,
    ) -> dict[str, Multiplier]:
        """Multiplies a parameterisation's multipliers by these factors.

        A leaf that stacks its layers gets arrays, ``num_layers`` long at its
        `Leaf.stack_axis` and 1 elsewhere; a leaf of one layer, and a leaf outside
        blocks, which takes no depth factor, get numbers.

        Args:
          leaves: of the model that is to be trained.
          multipliers: of the same names, width and depth factors of a rule.
          absorb_residual: True folds residual multipliers into the last map of their
            branch (`absorb`, with the scalings of Adam), for a model that has none in
            its code. False leaves them to the model, which multiplies each branch by
            `residual`; they are noted in ``forward`` of those maps, from where
            `absorbed` can still take them.

        Returns:
          ``{name: Multiplier}``, in the order of ``multipliers``.

        Raises:
          ValueError: leaves and multipliers of different names; a module type that no
            leaf has; a leaf in a block whose layer cannot be told, or whose stacked
            axis is not as long as its stream; names them.
        """
        check_names("multipliers", multipliers, leaves)
        self._check_modules(leaves)
        return {
            name: self._apply_to(leaves[name], multiplier, absorb_residual)
            for name, multiplier in multipliers.items()
        }

    def residual(self, module: str, num_layers: int) -> np.ndarray:
        """What the branch of every layer is multiplied by, beside the rule's own.

        Args:
          module: ``"attn.res"`` or ``"mlp.res"``.
          num_layers: of the stream.

        Returns:
          float64 ``[num_layers]``.

        Raises:
          ValueError: another module.
        """
        if module not in RESIDUALS:
            raise ValueError(f"module must be one of {RESIDUALS}, got {module!r}")
        layers = interpolate_depth(
            self.depth.get(RESIDUAL, (1.0,)), num_layers, self.interpolation
        )
        return self._of_type(module, RESIDUAL) * layers

    def _apply_to(
        self, leaf: Leaf, multiplier: Multiplier, absorb_residual: bool
    ) -> Multiplier:
        changed: dict[str, Factor] = {}
        for name in LEAF_HYPERPARAMETERS:
            factor: Factor = self._of_type(leaf.module, name)
            if name in self.depth and leaf.num_layers:
                layers = factor * self._of_depth(name, leaf.num_layers)
                factor = _of_layers(leaf, layers)
            field = name
            if name == "init_std":
                field, factor = "init_variance", factor * factor
            if not _is_one(factor):
                changed[field] = getattr(multiplier, field) * factor
        multiplier = dataclasses.replace(multiplier, **changed)
        if not leaf.residual:
            return multiplier
        a: Factor = self._of_type(leaf.residual, RESIDUAL)
        if RESIDUAL in self.depth and leaf.num_layers:
            a = _of_layers(leaf, self.residual(leaf.residual, leaf.num_layers))
        if _is_one(a):
            return multiplier
        if absorb_residual:
            # The rule's own multiplier stays where it was.
            forward = multiplier.forward
            return dataclasses.replace(absorb(multiplier, a), forward=forward)
        return dataclasses.replace(multiplier, forward=multiplier.forward * a)

    def _of_type(self, module: str, name: str) -> float:
        factor = 1.0
        for key in (EVERY, module):
            value = self.type.get(key, {}).get(name, 1.0)
            factor = value if factor == 1.0 else factor * value
        return factor

    def _of_depth(self, name: str, num_layers: int) -> np.ndarray:
        try:
            return interpolate_depth(self.depth[name], num_layers, self.interpolation)
        except ValueError as error:
            raise ValueError(f"depth[{name!r}]: {error}") from None

    def _check_modules(self, leaves: Mapping[str, Leaf]) -> None:
        known = {EVERY} | {leaf.module for leaf in leaves.values()}
        known |= {leaf.residual for leaf in leaves.values()} - {""}
        unknown = sorted(set(self.type) - known)
        if unknown:
            raise ValueError(
                f"type: no leaf has the module {', '.join(map(repr, unknown))}; the "
                f"model has {sorted(known)}"
            )
        for name in self.depth:
            if not any(
                leaf.num_layers and (leaf.residual or name != RESIDUAL)
                for leaf in leaves.values()
            ):
                raise ValueError(f"depth[{name!r}]: no leaf lies in a block")


def check_names(
    argument: str, given: Mapping[str, object], leaves: Mapping[str, Leaf]
) -> None:
    """Refuses a mapping whose keys are not the names of the leaves."""
    missing, extra = sorted(set(leaves) - set(given)), sorted(set(given) - set(leaves))
    if missing or extra:
        raise ValueError(
            f"{argument} must have the names of the leaves; missing {missing}, "
            f"unknown {extra}"
        )


def _of_layers(leaf: Leaf, layers: np.ndarray) -> Factor:
    """A factor per layer as it applies to one leaf."""
    if leaf.stack_axis is not None:
        axis = leaf.stack_axis % len(leaf.shape)
        if leaf.shape[axis] != len(layers):
            raise ValueError(
                f"leaves[{leaf.name!r}]: axis {leaf.stack_axis} of shape {leaf.shape} "
                f"counts {leaf.shape[axis]} layers, num_layers is {len(layers)}"
            )
        shape = [1] * len(leaf.shape)
        shape[axis] = len(layers)
        return layers.reshape(shape)
    if leaf.layer is None:
        raise ValueError(
            f"leaves[{leaf.name!r}] lies in one of {len(layers)} layers, but has "
            "neither layer nor stack_axis: depth factors cannot be applied to it"
        )
    if not 0 <= leaf.layer < len(layers):
        raise ValueError(
            f"leaves[{leaf.name!r}]: layer must lie in [0, {len(layers)}), got "
            f"{leaf.layer}"
        )
    return float(layers[leaf.layer])


def _is_one(factor: Factor) -> bool:
    # Not multiplied at all then, so that an identity is exact and stays a number.
    return bool(np.all(factor == 1.0))


def _check_hyperparameter(where: str, name: str, module: str | None = None) -> None:
    allowed: tuple[str, ...] = (*LEAF_HYPERPARAMETERS, RESIDUAL)
    if module in RESIDUALS:
        allowed = (RESIDUAL,)
    elif module not in (None, EVERY):
        allowed = LEAF_HYPERPARAMETERS
    if name not in allowed:
        raise ValueError(
            f"{where}: hyper-parameter must be one of {allowed}, got {name!r}"
        )


def _mapping(where: str, value: object) -> Mapping:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"{where} must be a mapping by name, got {value!r}")
    return value


def _factor(where: str, value: object, name: str) -> float:
    try:
        factor = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, got {value!r}") from None
    zero_allowed = name in _ZERO_ALLOWED
    if not math.isfinite(factor) or factor < 0 or (factor == 0 and not zero_allowed):
        bound = "at least 0" if zero_allowed else "positive"
        raise ValueError(f"{where} must be finite and {bound}, got {value!r}")
    return factor


def _depth_list(
    where: str, values: object, name: str = "learning_rate"
) -> tuple[float, ...]:
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise ValueError(f"{where} must list one factor a layer, got {values!r}")
    if not len(values):
        raise ValueError(f"{where} must hold one factor a layer, got an empty list")
    return tuple(
        _factor(f"{where}[{index}]", value, name) for index, value in enumerate(values)
    )
