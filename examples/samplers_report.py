"""Table, figure and animation of `compare_samplers.py`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from PIL import Image, ImageColor, ImageDraw, ImageFont

from diffmm.samplers import frames
from diffmm.typing import Modality

COLOURS = {
    "ancestral": "#7f7f7f",
    "quota, max-prob": "#4c78a8",
    "quota, random": "#72b7b2",
    "quota, other scores": "#9ecae9",
    "threshold": "#e45756",
    "factor": "#f58518",
    "Fréchet": "#ffbf79",
    "EB": "#54a24b",
    "other adaptive": "#b279a2",
    "remasking and editing": "#9d755d",
    "greedy": "#1f2430",
    "caches": "#eeca3b",
}
MARKERS = dict(zip(COLOURS, "os^Dv<>pPXdh", strict=True))
INK, MUTED, PAPER = "#1f2430", "#586070", "#f6f7f9"


def line(name: str, figures: Mapping[str, Any]) -> str:
    """One sampler in one line, for the terminal."""
    score, bits = figures.get("score", math.nan), figures.get("bits", math.nan)
    return (
        f"{name:32s} score {score:.2f}  bits {bits:.2f}  "
        f"entropy {figures.get('entropy', math.nan):.2f}  "
        f"{figures['forwards']:5.1f} forwards  "
        f"{figures['tokens_per_second']:6,.0f} tokens/s"
    )


def write_table(
    folder: pathlib.Path, table: Mapping[str, Any], real: Mapping[str, float]
) -> None:
    """``table.md``, in the order of the comparison."""
    rows = [
        "| sampler | score | bits per token | entropy | forwards, mean (most) "
        "| tokens/s |",
        "|---|---|---|---|---|---|",
        f"| *real held-out images* | {real['score']:.2f} | {real['bits']:.2f} "
        f"| {real['entropy']:.2f} | | |",
    ]
    for name, row in table.items():
        quality = "- | - | -"
        if "score" in row:
            quality = (
                f"{row['score']:.2f} ± {row['score_error']:.2f} | {row['bits']:.2f} "
                f"| {row['entropy']:.2f}"
            )
        rows.append(
            f"| {name} | {quality} | {row['forwards']:.1f} ({row['most_forwards']}) "
            f"| {row['tokens_per_second']:,.0f} |"
        )
    (folder / "table.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of (cost, score) that no cheaper one equals, by rising cost."""
    best, kept = -math.inf, []
    for name, (_, score) in sorted(
        points.items(), key=lambda item: (item[1][0], -item[1][1])
    ):
        if score > best:
            best = score
            kept.append(name)
    return kept


def plot(
    folder: pathlib.Path, table: Mapping[str, Any], real: Mapping[str, float]
) -> pathlib.Path:
    """``samplers.png``: score against forwards, and entropy against bits."""
    table = {name: row for name, row in table.items() if "score" in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), width_ratios=(3, 2))
    for family, colour in COLOURS.items():
        rows = [row for row in table.values() if row["family"] == family]
        rows.sort(key=lambda row: row["forwards"])
        if not rows:
            continue
        style = {"color": colour, "marker": MARKERS[family], "ms": 8}
        style |= {"mec": "white", "mew": 0.5}
        swept = family in ("quota, max-prob", "quota, random", "threshold", "EB")
        left.errorbar(
            [row["forwards"] for row in rows],
            [row["score"] for row in rows],
            yerr=[row["score_error"] for row in rows],
            ls="-" if swept else "none",
            lw=1.2,
            elinewidth=0.8,
            ecolor=colour + "66",
            label=family,
            zorder=3,
            **style,
        )
        right.plot(
            [row["bits"] for row in rows],
            [row["entropy"] for row in rows],
            ls="none",
            **style,
        )
    points = {name: (row["forwards"], row["score"]) for name, row in table.items()}
    kept = frontier(points)
    most = max(x for x, _ in points.values())
    steps = [points[name] for name in kept]
    steps.append((most, steps[-1][1]))
    left.step(*zip(*steps, strict=True), where="post", color=INK, lw=6, alpha=0.10)
    # Names stand above all points, at three heights, so that they hide none.
    for place, name in enumerate(kept):
        left.annotate(
            name,
            points[name],
            xytext=(points[name][0], 1.07 + 0.05 * (place % 3)),
            fontsize=8.5,
            color=INK,
            ha="center",
            bbox={"fc": "white", "ec": "none", "pad": 0.8},
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6},
            zorder=2,
        )
    left.axhline(real["score"], color=MUTED, lw=1, ls="--", zorder=1)
    left.text(
        most,
        real["score"] + 0.008,
        "real held-out images",
        color=MUTED,
        ha="right",
        va="bottom",
        fontsize=8.5,
        zorder=1,
    )
    left.set_xscale("log", base=2)
    left.set_xlim(0.8 * min(x for x, _ in points.values()), 1.15 * most)
    left.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    left.set(
        xlabel="denoiser evaluations per image (mean)",
        ylabel="share recognised as the digit asked for",
        ylim=(None, 1.24),
        yticks=np.linspace(0, 1, 6),
    )
    left.set_title("Quality against cost; the band is the frontier", loc="left")
    right.plot(real["bits"], real["entropy"], "*", ms=17, color="#eeca3b", mec=INK)
    right.annotate(
        "real images",
        (real["bits"], real["entropy"]),
        xytext=(-10, -4),
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
        ha="right",
    )
    right.set(
        xlabel="bits per token of the output under the model (bound)",
        ylabel="entropy of the tokens of an image, bits",
    )
    right.set_title("Diversity against likelihood under the model", loc="left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8ec", lw=0.8)
        axis.set_axisbelow(True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.10, 1, 1))
    path = folder / "samplers.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def states(result: Any, trial: Any, row: int) -> np.ndarray:
    """Generated tokens of one row before and after each evaluation ``[T + 1, N]``."""
    generate = np.asarray(trial.canvas.generate)[row]
    if result.trace is None:
        return frames(result, trial.canvas, trial.mask_id, row=row)[:, generate]
    turns = int(np.asarray(result.trace.active)[row].sum())
    after = np.asarray(result.trace.tokens)[row, :turns, : generate.sum()]
    return np.concatenate([np.full_like(after[:1], trial.mask_id), after])


_SCALE = 10
_GAP = 10
_TITLE = 40
_MARGIN = 24
_HEADER = 44


def animate(
    folder: pathlib.Path,
    results: Mapping[str, Any],
    trial: Any,
    *,
    rows: int,
    columns: int = 2,
    milliseconds: int = 140,
) -> pathlib.Path:
    """``unmasking.gif``: one frame per evaluation, all samplers side by side."""
    histories = {
        name: [states(result, trial, row) for row in range(rows)]
        for name, result in results.items()
    }
    data = trial.model.data
    offset, _ = data.vocabulary.span(Modality.IMAGE)
    tokenizer = data.tokenizers["image"]
    longest = max(len(h) for history in histories.values() for h in history)
    shape = np.squeeze(tokenizer.decode(np.zeros(trial.count, np.int32))).shape
    high, wide = (side * _SCALE for side in shape)
    panel = (rows * (wide + _GAP) - _GAP, high + _TITLE)
    lines = -(-len(histories) // columns)
    size = (
        columns * (panel[0] + _MARGIN) + _MARGIN,
        _HEADER + lines * (panel[1] + _MARGIN),
    )
    fonts = [ImageFont.load_default(points) for points in (19, 15, 13)]
    palette, images = _palette(), []
    for frame in range(longest):
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        wanted = ", ".join(trial.labels[:rows])
        draw.text((_MARGIN, 12), f"Asked for: {wanted}", fill=INK, font=fonts[0])
        _legend(draw, size[0] - _MARGIN, 14, fonts[2])
        for place, (name, history) in enumerate(histories.items()):
            x = _MARGIN + place % columns * (panel[0] + _MARGIN)
            y = _HEADER + place // columns * (panel[1] + _MARGIN)
            done = max(len(h) for h in history) - 1
            finished = frame >= done
            draw.text((x, y + 12), name, fill=INK, font=fonts[1])
            draw.text(
                (x + panel[0], y + 12),
                f"{done} forwards: done" if finished else f"forward {frame}",
                fill=_DONE if finished else MUTED,
                font=fonts[1],
                anchor="ra",
            )
            for row, states_of_row in enumerate(history):
                now = states_of_row[min(frame, len(states_of_row) - 1)]
                before = states_of_row[min(max(frame - 1, 0), len(states_of_row) - 1)]
                masked = (now == trial.mask_id).reshape(shape)
                fresh = (now != before).reshape(shape)
                codes = np.where(now == trial.mask_id, 0, now - offset)
                grey = np.asarray(tokenizer.decode(codes.astype(np.int32)))
                _digit(
                    draw,
                    x + row * (wide + _GAP),
                    y + _TITLE,
                    np.clip(grey.reshape(shape), 0.0, 1.0),
                    masked,
                    fresh,
                )
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    path = folder / "unmasking.gif"
    durations = [700] + [milliseconds] * (longest - 2) + [3_000]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=durations[:longest],
        loop=0,
        optimize=True,
    )
    return path


_MASKED, _GRID = (176, 196, 222), (199, 213, 232)
_FRESH, _AGAIN = (245, 133, 24), (160, 60, 160)
_DONE = "#2f7d32"


def _palette() -> Image.Image:
    """One palette for all frames: ink and what is written on paper, and the marks."""
    ends = [("#ffffff", INK), (PAPER, INK), (PAPER, MUTED), (PAPER, _DONE)]
    shades = [
        tuple(round(a + (b - a) * share) for a, b in zip(*pair, strict=True))
        for pair in (tuple(map(ImageColor.getrgb, names)) for names in ends)
        for share in np.linspace(0, 1, 48)
    ]
    marks = [_MASKED, _GRID, _FRESH, _AGAIN]
    image = Image.new("P", (1, 1))
    image.putpalette([value for shade in [*shades, *marks] for value in shade])
    return image


def _digit(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    grey: np.ndarray,
    masked: np.ndarray,
    fresh: np.ndarray,
) -> None:
    """Pixels in ink, masks in blue; what changed just now has a frame."""
    for i, j in np.ndindex(*grey.shape):
        left, top = x + j * _SCALE, y + i * _SCALE
        box = (left, top, left + _SCALE - 1, top + _SCALE - 1)
        ink = (
            np.array([255, 255, 255]) * (1 - grey[i, j])
            + np.array([31, 36, 48]) * grey[i, j]
        )
        colour = _MASKED if masked[i, j] else tuple(int(c) for c in ink)
        outline = _GRID if masked[i, j] else None
        if fresh[i, j]:
            outline = _AGAIN if masked[i, j] else _FRESH
        width = 2 if fresh[i, j] else 1
        draw.rectangle(box, fill=colour, outline=outline, width=width)


def _legend(draw: ImageDraw.ImageDraw, right: int, y: int, font: Any) -> None:
    """What the colours mean, right-aligned."""
    items = (
        ("masked", _MASKED, None),
        ("new", None, _FRESH),
        ("again", _MASKED, _AGAIN),
    )
    for text, fill, outline in reversed(items):
        width = int(draw.textlength(text, font=font))
        draw.text((right - width, y), text, fill=MUTED, font=font)
        box = (right - width - 20, y + 1, right - width - 6, y + 15)
        draw.rectangle(box, fill=fill, outline=outline, width=2)
        right -= width + 34
