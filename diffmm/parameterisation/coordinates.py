"""Coordinate and gradient checks: does training look the same at every size?

A correct parameterisation changes every activation by the same amount at every width
and depth, and scales AdamW's ε like the gradients. Both are power laws, so a check
measures at several sizes, fits slopes of log value against log size and compares them
with the slopes that theory expects.

References:
  Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
  Hyperparameter Transfer", arXiv 2203.03466 (the coordinate check). Mlodozeniec et al.,
  "Completed Hyperparameter Transfer across Modules, Width, Depth, Batch and Duration",
  arXiv 2512.22382 (depth and ε).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmm._tree import named_leaves
from diffmm.parameterisation.coordinate_report import (
    FLAT_TOLERANCE,
    Axis,
    CoordinateReport,
    Expected,
    Measurement,
    check_sizes,
    check_tolerance,
    fit_slope,
    log,
)
from diffmm.typing import Array, ArrayLike, Multiplier, Params

#: How closely slopes of gradients have to follow the exponent of ε.
GRADIENT_TOLERANCE = 0.25

#: Called as ``measure(width=64, seed=0)`` or ``measure(depth=8, seed=0)``.
Measure = Callable[..., Mapping[str, Any]]


def coordinate_check(
    measure: Measure,
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    seeds: int | Sequence[int] = 2,
    tolerance: float = FLAT_TOLERANCE,
) -> CoordinateReport:
    """Measures at several widths and depths; everything is expected to be flat.

    Logits at initialisation are not (they shrink as width^-½ under a variance of
    m_N^-2): measure changes, with `activation_changes`.

    >>> def measure(*, width=64, depth=2, seed=0):
    ...     return {"hidden": 1.0 + 0.01 * seed, "logits": width**0.5}
    >>> report = coordinate_check(measure, widths=(32, 64, 128))
    >>> [str(failure) for failure in report.failures()]
    ['width, logits: slope 0.500, expected -0.15 … 0.15']

    Args:
      measure: trains a few steps and returns ``{quantity: value}``. It is called with
        ``seed`` and one of ``width`` and ``depth``; the other is its own default.
      widths: at least three, or none to leave width out.
      depths: the same.
      seeds: how many, counted from 0, or which; values are averaged over them.
      tolerance: slopes up to this pass.

    Returns:
      A report; nothing is raised for slopes that are not flat.

    Raises:
      ValueError: fewer than three distinct ``widths`` or ``depths``, neither given, no
        seeds, a tolerance that is not positive, names of quantities that differ
        between sizes, or a value that is negative or not a scalar.
    """
    axes: dict[Axis, Sequence[int]] = {"width": widths, "depth": depths}
    axes = {axis: sizes for axis, sizes in axes.items() if len(sizes)}
    if not axes:
        raise ValueError("widths and depths: both empty, give at least one of them")
    for axis, sizes in axes.items():
        check_sizes(f"{axis}s", sizes)
    chosen = tuple(range(seeds) if isinstance(seeds, int) else dict.fromkeys(seeds))
    if not chosen:
        raise ValueError(f"seeds must name at least one seed, got {seeds!r}")
    check_tolerance(tolerance)
    rows = [
        Measurement(axis, size, seed, quantity, _scalar(quantity, value))
        for axis, sizes in axes.items()
        for size in sorted(set(sizes))
        for seed in chosen
        for quantity, value in measure(**{axis: size, "seed": seed}).items()
    ]
    return CoordinateReport(rows=tuple(rows), tolerance=tolerance)


def gradient_check(
    measure: Measure,
    multipliers: Callable[..., Mapping[str, Multiplier]],
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    seeds: int | Sequence[int] = 2,
    classes: Mapping[str, str] | Callable[[str], str] | None = None,
    tolerance: float = GRADIENT_TOLERANCE,
) -> CoordinateReport:
    """Compares how gradients scale with how AdamW's ε does.

    ε matters equally at every size only if it shrinks as the gradients do. Measure
    after some steps: at initialisation some gradients scale otherwise. The gain of a
    QK norm that heads share is bounded by its ε (exponent 0 in width, −½ if heads are
    uncorrelated): judge it by ``report.expecting({"width": {name: (-0.7, 0.25)}})``.

    Args:
      measure: as in `coordinate_check`; returns `gradient_rms` by leaf name.
      multipliers: called with ``width`` or ``depth``; the multipliers at that size,
        whose ``eps`` gives the expected slope.
      widths: at least three, or none.
      depths: the same.
      seeds: how many, or which.
      classes: class of every leaf name, to report classes in place of leaves, by the
        geometric mean over leaves, whose ε must scale alike. Needed where the names
        of leaves differ between depths.
      tolerance: how far a slope may be from the exponent of ε.

    Returns:
      A report with these expectations.

    Raises:
      ValueError: as in `coordinate_check`; leaves without a multiplier or a class;
        leaves of one class whose ε scales differently.
    """

    def class_of(name: str) -> str:
        if isinstance(classes, Mapping):
            if name not in classes:
                raise ValueError(f"classes: no class for the leaf {name!r}")
            return classes[name]
        return name if classes is None else classes(name)

    measured: dict[tuple[Axis, int], set[str]] = {}

    def grouped(seed: int, **size: int) -> dict[str, float]:
        (place,) = size.items()
        logs: dict[str, list[float]] = {}
        for name, value in measure(seed=seed, **size).items():
            measured.setdefault(place, set()).add(name)  # type: ignore[arg-type]
            logs.setdefault(class_of(name), []).append(log(_scalar(name, value)))
        return {quantity: math.exp(np.mean(found)) for quantity, found in logs.items()}

    report = coordinate_check(
        grouped, widths=widths, depths=depths, seeds=seeds, tolerance=tolerance
    )
    expected: dict[Axis, dict[str, Expected]] = {}
    for axis, sizes in report.sizes().items():
        log_eps: dict[str, list[float]] = {}
        for size in sizes:
            found = multipliers(**{axis: size})
            absent = sorted(measured[axis, size] - set(found))
            if absent:
                raise ValueError(f"multipliers: none at {axis} {size} for {absent}")
            for name in measured[axis, size]:
                # Factors per layer have a geometric mean that scales as they do.
                eps = np.mean(np.log(np.asarray(found[name].eps, np.float64)))
                log_eps.setdefault(name, []).append(float(eps))
        expected[axis] = dict(_exponents(sizes, log_eps, class_of))
    return report.expecting(expected)


def activation_changes(
    apply: Callable[..., Any],
    before: Params,
    after: Params,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Array]:
    """RMS of Δh = h(after) − h(before) for every activation h.

    Args:
      apply: ``apply(params, *args, **kwargs)`` gives a pytree of activations, usually
        a dictionary.
      before: parameters at initialisation.
      after: the same after a few steps.
      *args: what else the function takes, the first batch usually.
      **kwargs: the same.

    Returns:
      float32 scalars by name. Works under ``jax.jit``.

    Raises:
      ValueError: activations whose names depend on the parameters.
    """
    first = named_leaves(apply(before, *args, **kwargs))
    second = named_leaves(apply(after, *args, **kwargs))
    if first.keys() != second.keys():
        unequal = sorted(first.keys() ^ second.keys())
        raise ValueError(f"apply: only one of before and after has {unequal}")
    return {name: _rms_difference(second[name], first[name]) for name in first}


def gradient_rms(grads: Params) -> dict[str, Array]:
    """RMS of every leaf of a gradient, float32 scalars by name."""
    return {name: _rms(leaf) for name, leaf in named_leaves(grads).items()}


@jax.jit
def _rms(x: ArrayLike) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(x, jnp.float32))))


@jax.jit
def _rms_difference(x: ArrayLike, y: ArrayLike) -> Array:
    return _rms(jnp.asarray(x, jnp.float32) - jnp.asarray(y, jnp.float32))


def _exponents(
    sizes: Sequence[int],
    log_eps: Mapping[str, list[float]],
    class_of: Callable[[str], str],
) -> dict[str, float]:
    """Exponent of ε by class, from log ε of every leaf at the sizes that have it."""
    members: dict[str, list[str]] = {}
    for name in sorted(log_eps):
        members.setdefault(class_of(name), []).append(name)
    out = {}
    for quantity, names in members.items():
        # A leaf that some depths lack has no exponent of its own.
        everywhere = [name for name in names if len(log_eps[name]) == len(sizes)]
        if not everywhere:
            raise ValueError(f"no leaf of {quantity!r} is at all sizes {sizes}")
        slopes = [fit_slope(sizes, np.exp(log_eps[name])) for name in everywhere]
        if max(slopes) - min(slopes) > 1e-6:
            text = ", ".join(
                f"{name!r}: {slope:.3g}"
                for name, slope in zip(everywhere, slopes, strict=True)
            )
            raise ValueError(f"classes: eps of {quantity!r} scales differently: {text}")
        out[quantity] = slopes[0]
    return out


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"{name!r} must be one number, got shape {array.shape}")
    return float(array.reshape(()))
