"""The self-contained report of a tri-modal run, and its samples as PNG and WAV files.

Used by `train_trimodal.py`.
"""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import soundfile

from diffmm.data import TrimodalData
from diffmm.training import read_metrics

TASK_TITLES = {
    "t2i": "text → image",
    "t2a": "text → speech",
    "i2t": "image → text (exact caption)",
    "a2t": "speech → text (exact word)",
}
GROUP_COLOURS = {
    "text": "#4c78a8",
    "image": "#e45756",
    "audio": "#54a24b",
    "length": "#b279a2",
}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; background: #f6f7f9;
       margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; }
p.lead { color: #586070; margin: 0 0 20px; }
table { border-collapse: collapse; width: 100%; background: #fff; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid #e6e8ec; }
th { font-weight: 600; color: #586070; font-size: 14px; }
td.number { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } img.pixel { image-rendering: pixelated; }
.bar { background: #e6e8ec; height: 10px; width: 160px; position: relative; }
.bar i { display: block; height: 10px; background: #4c78a8; }
.bar b { position: absolute; top: -3px; width: 2px; height: 16px; background: #1f2430; }
.digits { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr));
          gap: 12px; }
.digits figure { margin: 0; background: #fff; padding: 8px; font-size: 12px;
                 text-align: center; color: #586070; }
.digits img { width: 64px; height: 64px; }
audio { height: 32px; width: 220px; }
mark { background: #ffe08a; } code, pre { font: 13px/1.5 ui-monospace, monospace; }
pre { background: #fff; padding: 12px; overflow-x: auto; white-space: pre-wrap; }
.yes { color: #2f7d32; } .no { color: #b3261e; }
"""


def write(
    workdir: pathlib.Path,
    data: TrimodalData,
    artifacts: dict[str, Any],
    figures: dict[str, Any],
    made_with: dict[str, Any],
    command: str,
) -> pathlib.Path:
    """Writes ``report.html`` and ``samples/``; returns the path of the report."""
    samples = workdir / "samples"
    samples.mkdir(exist_ok=True)
    sections = [
        "<h1>One model of text, images and speech</h1>",
        f"<p class=lead>{figures['attention'].capitalize()} attention, "
        f"{figures['parameters']:,} parameters, {figures['steps']:,} "
        f"steps, {figures['seconds']['total'] / 60:.1f} minutes in all. Judges are "
        "classifiers that saw real training data only; the ceiling is what they reach "
        "on real held-out data.</p>",
        _scores(figures["accuracy"], figures["forwards"]),
        _curves(read_metrics(workdir / "metrics.jsonl")),
        _bounds(figures["bits_per_token"]),
        _images(data, artifacts, samples),
        _speech(data, artifacts, samples),
        _understanding(data, artifacts),
        _gaps(artifacts),
        _provenance(command, made_with),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>diffmm: tri-modal run</title><style>{STYLE}</style>"
        f"<main>{''.join(sections)}</main></html>"
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td class=number>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _scores(accuracy: dict[str, Any], forwards: dict[str, int]) -> str:
    rows = []
    for task, score in accuracy.items():
        bar = (
            f"<div class=bar><i style='width:{100 * score['value']:.1f}%'></i>"
            f"<b style='left:{100 * score['ceiling']:.1f}%'></b></div>"
        )
        good = "yes" if score["share_of_ceiling"] >= 0.85 else "no"
        rows.append(
            (
                TASK_TITLES[task],
                f"<b>{score['value']:.3f}</b>",
                bar,
                f"{score['ceiling']:.3f}",
                f"<span class={good}>{score['share_of_ceiling']:.2f}</span>",
                f"{score['chance']:.3f}",
                f"{score['count']}",
                f"{forwards[task]}",
            )
        )
    header = (
        *("task", "accuracy", "", "ceiling", "share of ceiling", "chance"),
        *("samples", "forward passes"),
    )
    return "<h2>Judged accuracy</h2>" + _table(header, rows)


def _curves(records: list[dict[str, Any]]) -> str:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    for group, colour in GROUP_COLOURS.items():
        points = [
            (r["step"], r[f"bits/{group}"])
            for r in records
            if r.get(f"bits/{group}") is not None
        ]
        if points:
            left.plot(*zip(*points, strict=True), color=colour, label=group)
    left.set(
        xlabel="step", ylabel="bits per token", title="training bound", ylim=(0, None)
    )
    left.legend(frameon=False)
    last = [r["bits_by_time"] for r in records[-10:] if r.get("bits_by_time")]
    if last:
        means = np.nanmean(np.array(last, float), axis=0)
        centres = (np.arange(len(means)) + 0.5) / len(means)
        right.bar(centres, means, width=0.09, color=GROUP_COLOURS["text"])
    right.set(xlabel="diffusion time t", title="the same by time, end of training")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return f"<h2>Training</h2><img alt='loss curves' src='{_png_of(figure)}'>"


def _bounds(bits: dict[str, Any]) -> str:
    rows = [
        (
            task,
            group,
            f"{entry['value']:.3f} ± {entry['monte_carlo_error']:.3f}",
            f"{entry['example_error']:.3f}",
            f"{entry['tokens']:,}",
        )
        for task, groups in bits.items()
        for group, entry in groups.items()
    ]
    header = (
        *("task", "tokens", "bits per token ± Monte-Carlo error"),
        *("error over examples", "count"),
    )
    return (
        "<h2>Validation likelihood bound</h2><p>An upper bound of the negative "
        "log-likelihood over the full vocabulary (mask excluded); tasks with a "
        "condition bound the likelihood given the condition.</p>" + _table(header, rows)
    )


def _images(
    data: TrimodalData, artifacts: dict[str, Any], samples: pathlib.Path
) -> str:
    tokenizer, test = data.tokenizers["image"], data.pairs["test"]["image"]
    count = min(20, len(artifacts["t2i_codes"]))
    generated = []
    for i in range(count):
        caption = str(artifacts["t2i_captions"][i])
        picture = _picture(tokenizer.decode(artifacts["t2i_codes"][i]))
        plt.imsave(samples / f"image_{i:02d}.png", picture, cmap="gray", vmin=0, vmax=1)
        generated.append(_figure(picture, caption))
    real = [
        _figure(_picture(tokenizer.decode(test.codes[i])), f"real: {test.labels[i]}")
        for i in range(min(10, len(test)))
    ]
    steps = [
        _figure(_picture_of_masked(tokenizer, codes), f"{number} of 64 shown")
        for codes, number in zip(
            artifacts["t2i_frames"],
            (artifacts["t2i_frames"] >= 0).sum(axis=1),
            strict=True,
        )
    ]
    return (
        "<h2>Text → image</h2><p>Generated from the caption below each:</p>"
        f"<div class=digits>{''.join(generated)}</div><p>Real held-out images:</p>"
        f"<div class=digits>{''.join(real)}</div><p>The order in which one image was "
        f"unmasked:</p><div class=digits>{''.join(steps)}</div>"
    )


def _speech(
    data: TrimodalData, artifacts: dict[str, Any], samples: pathlib.Path
) -> str:
    tokenizer, test = data.tokenizers["audio"], data.pairs["test"]["audio"]
    rate, rows = tokenizer.sample_rate, []
    for i in range(min(8, len(artifacts["t2a_codes"]))):
        word = str(artifacts["t2a_captions"][i])
        wave = tokenizer.decode(artifacts["t2a_codes"][i])
        soundfile.write(samples / f"speech_{i:02d}.wav", wave, rate)
        twins = [j for j, texts in enumerate(test.captions) if word in texts]
        real = _player(tokenizer.decode(test.codes[twins[0]]), rate) if twins else ""
        spectrogram = _spectrogram(tokenizer, artifacts["t2a_codes"][i])
        rows.append((html.escape(word), _player(wave, rate), spectrogram, real))
    header = ("word", "generated", "its log-mel", "real, same tokenizer, unseen voice")
    return "<h2>Text → speech</h2>" + _table(header, rows)


def _understanding(data: TrimodalData, artifacts: dict[str, Any]) -> str:
    out = []
    for task, kind in (("i2t", "image"), ("a2t", "audio")):
        test, rows = data.pairs["test"][kind], []
        tokenizer = data.tokenizers[kind]
        for i in range(min(8, len(test))):
            decoded = tokenizer.decode(test.codes[i])
            if kind == "image":
                shown = f"<img class=pixel width=48 src='{_png(_picture(decoded))}'>"
            else:
                shown = _player(decoded, tokenizer.sample_rate)
            mark = "yes" if artifacts[f"{task}_hits"][i] else "no"
            answer = html.escape(str(artifacts[f"{task}_texts"][i]))
            truth = html.escape(test.labels[i])
            rows.append((shown, truth, f"<span class={mark}>{answer}</span>"))
        out.append(f"<h2>{TASK_TITLES[task]}</h2>")
        out.append(_table(("real held-out input", "label", "answer"), rows))
    return "".join(out)


def _gaps(artifacts: dict[str, Any]) -> str:
    rows = [
        (
            f"{html.escape(before)}<mark>{html.escape(filled)}</mark>{html.escape(after)}",
            f"<code>{html.escape(real)}</code>",
        )
        for before, real, filled, after in zip(
            *(
                artifacts[f"text_{name}"]
                for name in ("before", "real", "filled", "after")
            ),
            strict=True,
        )
    ]
    header = ("held-out prose, gap filled by the model", "what stood there")
    return "<h2>Text infilling</h2>" + _table(header, rows)


def _provenance(command: str, environment: dict[str, Any]) -> str:
    versions = "\n".join(f"{name}: {value}" for name, value in environment.items())
    text = html.escape(f"{command}\n\n{versions}")
    return f"<h2>Made with</h2><pre>{text}</pre>"


def _picture(image: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(image, np.float32).squeeze(), 0.0, 1.0)


def _picture_of_masked(tokenizer: Any, codes: np.ndarray) -> np.ndarray:
    """An image in colour whose masked pixels are blue."""
    grey = _picture(tokenizer.decode(np.maximum(codes, 0)))
    picture = np.repeat(grey[..., None], 3, axis=-1)
    hidden = (codes < 0).reshape(grey.shape[:2])
    picture[hidden] = (0.30, 0.47, 0.66)
    return picture


def _figure(picture: np.ndarray, caption: str) -> str:
    return (
        f"<figure><img class=pixel alt='' src='{_png(picture)}'><br>"
        f"{html.escape(caption)}</figure>"
    )


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    plt.imsave(buffer, picture, cmap="gray", vmin=0.0, vmax=1.0, format="png")
    return _uri(buffer, "image/png")


def _png_of(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return _uri(buffer, "image/png")


def _spectrogram(tokenizer: Any, codes: np.ndarray) -> str:
    features = np.asarray(tokenizer.features(codes)).T[::-1]
    low, high = features.min(), features.max()
    picture = (features - low) / max(high - low, 1e-6)
    return f"<img class=pixel alt='' height=48 src='{_png(picture)}'>"


def _player(wave: np.ndarray, rate: int) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(wave, np.float32), rate, format="WAV")
    return f"<audio controls preload=none src='{_uri(buffer, 'audio/wav')}'></audio>"


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
