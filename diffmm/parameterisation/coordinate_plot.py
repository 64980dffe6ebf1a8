"""The picture of a coordinate report."""

from __future__ import annotations

import os

import numpy as np

from diffmm.parameterisation.coordinate_report import CoordinateReport


def draw(report: CoordinateReport, path: str | os.PathLike[str]) -> None:
    """Means over seeds against size on log scales, one panel per axis.

    The legend holds the slopes; quantities that fail are dashed, single seeds are dots.

    Args:
      report: what to draw.
      path: of the picture; its suffix decides the format.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "diffmm[examples]"'
        ) from error
    failed = {(failure.axis, failure.quantity) for failure in report.failures()}
    means, slopes = report.means(), report.slopes()
    longest = max(len(quantities) for quantities in means.values())
    figure = Figure(
        figsize=(6.4 * len(means), max(4.0, 0.24 * longest)), layout="constrained"
    )
    panels = figure.subplots(1, len(means), squeeze=False)[0]
    for panel, (axis, sizes) in zip(panels, report.sizes().items(), strict=True):
        for i, (quantity, values) in enumerate(means[axis].items()):
            fails = (axis, quantity) in failed
            label = f"{quantity}: {slopes[axis][quantity]:+.2f}"
            panel.plot(
                sizes,
                values,
                color=f"C{i % 10}",
                linestyle="--" if fails else "-",
                label=f"{label} FAIL" if fails else label,
            )
            for row in report.rows:
                if (row.axis, row.quantity) == (axis, quantity):
                    panel.plot(row.size, row.value, ".", color=f"C{i % 10}", alpha=0.5)
        everything = np.concatenate(list(means[axis].values()))
        panel.set_xscale("log", base=2)
        if np.any(np.isfinite(everything) & (everything > 0)):
            panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
        panel.legend(
            title="slope", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    figure.savefig(path, dpi=120)
