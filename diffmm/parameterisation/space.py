"""Named coordinates of a search over per-module hyper-parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from diffmm.parameterisation.leaf import Leaf
from diffmm.parameterisation.per_module import (
    EVERY,
    LEAF_HYPERPARAMETERS,
    RESIDUAL,
    Interpolation,
    PerModule,
)
from diffmm.typing import ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """A map between vectors of logarithms and `PerModule`.

    Coordinates read ``type/MODULE/HYPERPARAMETER``, for example
    ``type/attn.q/learning_rate`` or ``type/*/b1`` for all modules at once, and
    ``depth/HYPERPARAMETER/LAYER``. What has no coordinate stays 1.

    Attributes:
      coordinates: their names, in the order of the vector.
      num_layers: of the model that is searched; needed for depth coordinates.
      interpolation: of the depth factors, see `PerModule`.

    Example:
      >>> space = Space(
      ...     coordinates=("type/embed/learning_rate", "depth/learning_rate/1"),
      ...     num_layers=2)
      >>> space.per_module([0.0, 0.0]).depth
      {'learning_rate': (1.0, 1.0)}
    """

    coordinates: Sequence[str]
    num_layers: int = 0
    interpolation: Interpolation = "log"

    def __post_init__(self) -> None:
        """Checks names; hyper-parameters and modules are checked by `PerModule`."""
        names = tuple(self.coordinates)
        object.__setattr__(self, "coordinates", names)
        if not names:
            raise ValueError("coordinates must name at least one, got none")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"coordinates: {twice} come twice")
        for name in names:
            kind, _, last = _split(name)
            if kind == "depth" and not (
                last.isdecimal() and int(last) < self.num_layers
            ):
                raise ValueError(
                    f"coordinates: the layer of {name!r} must be a number below "
                    f"num_layers={self.num_layers}"
                )
        self.per_module(np.zeros(len(names)))

    @classmethod
    def of(
        cls,
        leaves: Mapping[str, Leaf],
        *,
        type: Sequence[str] = ("learning_rate",),
        depth: Sequence[str] = (),
        every: Sequence[str] = (),
        interpolation: Interpolation = "log",
    ) -> Space:
        """The space of a model's own modules.

        ``weight_decay`` and ``init_std`` get coordinates of the modules that have
        matrices only; ``residual`` those of the branches.

        Args:
          leaves: of the model.
          type: hyper-parameters with one factor per module type.
          depth: hyper-parameters with one factor per layer.
          every: hyper-parameters with one factor for all modules.
          interpolation: of the depth factors.

        Raises:
          ValueError: an unknown hyper-parameter; depth factors of a model without
            blocks, or of one whose streams differ in depth.
        """
        names = [f"type/{EVERY}/{name}" for name in every]
        for name in type:
            allowed = (*LEAF_HYPERPARAMETERS, RESIDUAL)
            if name not in allowed:
                raise ValueError(f"type: must be of {allowed}, got {name!r}")
            if name == RESIDUAL:
                modules = dict.fromkeys(leaf.residual for leaf in leaves.values())
                modules.pop("", None)
            else:
                modules = dict.fromkeys(
                    leaf.module
                    for leaf in leaves.values()
                    if leaf.matrix or name not in ("weight_decay", "init_std")
                )
            names += [f"type/{module}/{name}" for module in modules]
        lengths = {leaf.num_layers for leaf in leaves.values()} - {0}
        if depth and len(lengths) != 1:
            raise ValueError(
                "depth: coordinates by layer need streams of one depth, got depths "
                f"{sorted(lengths)}"
            )
        num_layers = max(lengths, default=0)
        names += [f"depth/{name}/{i}" for name in depth for i in range(num_layers)]
        return cls(
            coordinates=names, num_layers=num_layers, interpolation=interpolation
        )

    def __len__(self) -> int:
        """Number of coordinates."""
        return len(self.coordinates)

    def per_module(self, point: ArrayLike | Sequence[float]) -> PerModule:
        """Factors ``exp(point)``.

        Args:
          point: ``[len(self)]``, logarithms.

        Raises:
          ValueError: another shape, or numbers that are not finite.
        """
        vector = np.asarray(point, np.float64)
        if vector.shape != (len(self),) or not np.all(np.isfinite(vector)):
            raise ValueError(
                f"point must hold {len(self)} finite numbers, got {point!r}"
            )
        types: dict[str, dict[str, float]] = {}
        depths: dict[str, list[float]] = {}
        for name, value in zip(self.coordinates, vector, strict=True):
            kind, key, last = _split(name)
            if kind == "type":
                types.setdefault(key, {})[last] = math.exp(value)
            else:
                layers = depths.setdefault(key, [1.0] * self.num_layers)
                layers[int(last)] = math.exp(value)
        return PerModule(type=types, depth=depths, interpolation=self.interpolation)

    def point(self, per_module: PerModule) -> np.ndarray:
        """The vector of a `PerModule`: logarithms, float64 ``[len(self)]``.

        Raises:
          ValueError: depth factors of another number of layers, factors of 0, or
            factors other than 1 that the space has no coordinate for; names them.
        """
        factors = {
            f"type/{module}/{name}": factor
            for module, named in per_module.type.items()
            for name, factor in named.items()
        }
        for name, layers in per_module.depth.items():
            if len(layers) != self.num_layers:
                raise ValueError(
                    f"per_module: depth[{name!r}] has {len(layers)} factors, the "
                    f"space {self.num_layers} layers"
                )
            factors |= {f"depth/{name}/{i}": x for i, x in enumerate(layers)}
        lost = sorted(
            name
            for name, factor in factors.items()
            if factor == 0 or (factor != 1 and name not in self.coordinates)
        )
        if lost:
            raise ValueError(
                f"per_module: the space has no coordinate for {lost}, or they are 0"
            )
        return np.log([factors.get(name, 1.0) for name in self.coordinates])


def _split(name: str) -> tuple[str, str, str]:
    """``"type/attn.q/learning_rate"`` as three parts."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in ("type", "depth"):
        raise ValueError(
            "coordinates must read 'type/MODULE/HYPERPARAMETER' or "
            f"'depth/HYPERPARAMETER/LAYER', got {name!r}"
        )
    return parts[0], parts[1], parts[2]
