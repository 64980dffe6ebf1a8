"""What a check over sizes found: values, slopes, verdicts, a table and a plot."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Axis = Literal["width", "depth"]
AXES: tuple[Axis, ...] = ("width", "depth")
MIN_SIZES = 3
#: Slopes of activation changes up to this count as flat.
FLAT_TOLERANCE = 0.15

#: What a slope should be: a number up to the tolerance, bounds ``(low, high)`` to which
#: no tolerance is added, or None for a quantity that is shown and not judged.
Expected = float | tuple[float, float] | None


class Measurement(NamedTuple):
    """One value: ``quantity`` at one size and seed; ``axis`` says what was scaled."""

    axis: Axis
    size: int
    seed: int
    quantity: str
    value: float


class Failure(NamedTuple):
    """A slope outside ``[low, high]``; NaN if a value was zero, infinite or NaN."""

    axis: Axis
    quantity: str
    slope: float
    low: float
    high: float

    def __str__(self) -> str:
        """``"width, logits: slope 0.62, expected -0.15 … 0.15"``."""
        bounds = f"expected {self.low:.3g} … {self.high:.3g}"
        return f"{self.axis}, {self.quantity}: slope {self.slope:.3f}, {bounds}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateReport:
    """Measurements over sizes, their slopes, and whether these are as expected.

    Attributes:
      rows: every quantity at every size and seed of its axis.
      expected: slopes by axis and quantity; 0 for those it does not name.
      tolerance: half-width of the range about an expected slope.

    Raises:
      ValueError: fewer than three sizes on an axis (named ``widths`` or ``depths``), a
        quantity that some size or seed lacks, a negative value.
    """

    rows: tuple[Measurement, ...]
    expected: Mapping[Axis, Mapping[str, Expected]] = dataclasses.field(
        default_factory=dict
    )
    tolerance: float = FLAT_TOLERANCE

    def __post_init__(self) -> None:
        """Refuses rows from which no slope can be fitted."""
        if not self.rows:
            raise ValueError("rows: none given, a report needs measurements")
        for axis, sizes in self.sizes().items():
            check_sizes(f"{axis}s", sizes)
            rows = [row for row in self.rows if row.axis == axis]
            seeds = {row.seed for row in rows}
            for quantity in dict.fromkeys(row.quantity for row in rows):
                places = [(r.size, r.seed) for r in rows if r.quantity == quantity]
                if len(set(places)) < len(sizes) * len(seeds):
                    absent = {(n, s) for n in sizes for s in seeds} - set(places)
                    raise ValueError(
                        f"{quantity!r} is not measured at every {axis} and seed: "
                        f"absent at (size, seed) {sorted(absent)}; quantities need "
                        "the same names at all sizes"
                    )
            negative = next((row for row in rows if row.value < 0), None)
            if negative:
                raise ValueError(f"values must not be negative, got {negative}")

    def sizes(self) -> dict[Axis, tuple[int, ...]]:
        """Sizes of every axis, ascending."""
        return {
            axis: tuple(sorted({row.size for row in self.rows if row.axis == axis}))
            for axis in AXES
            if any(row.axis == axis for row in self.rows)
        }

    def means(self) -> dict[Axis, dict[str, np.ndarray]]:
        """Means over seeds, in the order of `sizes`."""
        out: dict[Axis, dict[str, np.ndarray]] = {}
        for axis, sizes in self.sizes().items():
            values: dict[str, dict[int, list[float]]] = {}
            for row in self.rows:
                if row.axis == axis:
                    by_size = values.setdefault(row.quantity, {n: [] for n in sizes})
                    by_size[row.size].append(row.value)
            out[axis] = {
                quantity: np.array([np.mean(by_size[n]) for n in sizes])
                for quantity, by_size in values.items()
            }
        return out

    def slopes(self) -> dict[Axis, dict[str, float]]:
        """Least-squares slopes of log mean against log size; NaN if a log is."""
        sizes = self.sizes()
        return {
            axis: {
                q: fit_slope(sizes[axis], values) for q, values in quantities.items()
            }
            for axis, quantities in self.means().items()
        }

    def select(self, axis: Axis, *, start: int = 0) -> CoordinateReport:
        """The report of one axis, from a smallest size on.

        Small models may be outliers: the attention branch of a two-layer one often is.

        Raises:
          ValueError: fewer than three sizes are left.
        """
        kept = tuple(r for r in self.rows if r.axis == axis and r.size >= start)
        if not kept:
            raise ValueError(f"{axis}s: nothing was measured from {start} on")
        return dataclasses.replace(self, rows=kept)

    def expecting(
        self, expected: Mapping[Axis, Mapping[str, Expected]]
    ) -> CoordinateReport:
        """The same report with other expectations for the quantities named.

        Args:
          expected: by axis and quantity; see `Expected`.

        Raises:
          ValueError: a quantity that was not measured on that axis, or bounds that
            are no range.
        """
        known = self.means()
        merged = {axis: dict(named) for axis, named in self.expected.items()}
        for axis, named in expected.items():
            _check_known("expected", named, known.get(axis, {}))
            for quantity, wanted in named.items():
                _check_expected(quantity, wanted)
            merged.setdefault(axis, {}).update(named)
        return dataclasses.replace(self, expected=merged)

    def failures(
        self,
        tolerance: float | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> tuple[Failure, ...]:
        """Slopes outside the range expected of them.

        Args:
          tolerance: the report's own unless given.
          only: the quantities to judge; all by default.

        Raises:
          ValueError: ``only`` names what was not measured; a tolerance that is not
            positive.
        """
        check_tolerance(self.tolerance if tolerance is None else tolerance)
        slopes = self.slopes()
        if only is not None:
            _check_known("only", only, {q for named in slopes.values() for q in named})
        failed = []
        for axis, named in slopes.items():
            for quantity, slope in named.items():
                bounds = self._bounds(axis, quantity, tolerance)
                if bounds is None or (only is not None and quantity not in only):
                    continue
                if not bounds[0] <= slope <= bounds[1]:
                    failed.append(Failure(axis, quantity, slope, *bounds))
        return tuple(failed)

    def assert_slopes(
        self,
        tolerance: float | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """Raises unless every slope is what is expected of it; see `failures`.

        Raises:
          AssertionError: with quantities, slopes and ranges.
        """
        failed = self.failures(tolerance, only=only)
        if failed:
            lines = "\n".join(f"  {failure}" for failure in failed)
            raise AssertionError(f"{_count(failed)} out of range:\n{lines}")

    def assert_flat(
        self,
        tolerance: float | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """`assert_slopes` with an expectation of 0 for everything.

        Raises:
          AssertionError: with quantities, slopes and ranges.
        """
        dataclasses.replace(self, expected={}).assert_slopes(tolerance, only=only)

    def _bounds(
        self, axis: Axis, quantity: str, tolerance: float | None = None
    ) -> tuple[float, float] | None:
        wanted = self.expected.get(axis, {}).get(quantity, 0.0)
        if wanted is None or isinstance(wanted, tuple):
            return wanted
        half = self.tolerance if tolerance is None else tolerance
        return wanted - half, wanted + half

    def __str__(self) -> str:
        """A table of means and slopes, with a verdict on each and on all."""
        failed = self.failures()
        names = {(failure.axis, failure.quantity) for failure in failed}
        means, slopes = self.means(), self.slopes()
        lines = []
        for axis, sizes in self.sizes().items():
            pad = max(len(axis), *(len(q) for q in means[axis]))
            header = "".join(f"{size:>10d}" for size in sizes)
            lines.append(f"{axis:<{pad}}{header}   slope  expected")
            for quantity, values in means[axis].items():
                bounds = self._bounds(axis, quantity)
                verdict = "(not judged)"
                if bounds is not None:
                    word = "FAIL" if (axis, quantity) in names else "pass"
                    verdict = f"{bounds[0]:+.2f} … {bounds[1]:+.2f}  {word}"
                numbers = "".join(f"{value:>10.4g}" for value in values)
                slope = slopes[axis][quantity]
                lines.append(f"{quantity:<{pad}}{numbers}  {slope:+6.2f}  {verdict}")
            lines.append("")
        verdict = (
            f"FAIL: {_count(failed)} out of range" if failed else "pass: all slopes"
        )
        lines.append(verdict)
        return "\n".join(lines)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes axis, size, seed, quantity and value, one measurement a line."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Measurement._fields)
            writer.writerows(self.rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws means against size on log scales, one panel per axis.

        The legend holds the slopes; failing quantities are dashed, values of single
        seeds are dots. The suffix of the path decides the format.

        Raises:
          ImportError: matplotlib is not installed.
        """
        # Here, because that module needs this one's class.
        from diffmm.parameterisation.coordinate_plot import draw

        draw(self, path)


def _count(failed: Sequence[Failure]) -> str:
    return f"{len(failed)} slope{'' if len(failed) == 1 else 's'}"


def fit_slope(sizes: Sequence[int], values: np.ndarray | Sequence[float]) -> float:
    """Least-squares slope of log values against log sizes; NaN if a log is infinite."""
    logs = np.array([log(float(value)) for value in values])
    if not np.all(np.isfinite(logs)):
        return math.nan
    x = np.log(np.asarray(sizes, np.float64))
    x -= x.mean()
    return float(x @ (logs - logs.mean()) / (x @ x))


def log(value: float) -> float:
    """Natural logarithm that gives −inf at zero and NaN below."""
    return math.log(value) if value > 0 else (-math.inf if value == 0 else math.nan)


def check_tolerance(tolerance: float) -> None:
    """Refuses what is not a positive number."""
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Refuses sizes that cannot give a slope."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"{name} must be positive, got {tuple(sizes)}")
    if len(set(sizes)) < MIN_SIZES:
        raise ValueError(
            f"{name}: a slope needs at least {MIN_SIZES} distinct sizes, "
            f"got {tuple(sizes)}"
        )


def _check_known(argument: str, names: Collection[str], known: Collection[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a list of names, got {names!r}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{argument}: {unknown} were not measured, allowed: {sorted(known)}"
        )


def _check_expected(quantity: str, wanted: Expected) -> None:
    low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if wanted is not None and not low <= high:  # type: ignore[operator]
        raise ValueError(
            f"expected: {quantity!r} must have a number, bounds (low, high) or None, "
            f"got {wanted!r}"
        )
