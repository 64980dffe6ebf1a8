r"""Every sampler of the library on one denoiser: quality, likelihood, cost, diversity.

A demo model draws handwritten digits from captions. Each sampler completes the same
canvases; a classifier that saw only real digits says how many show the digit that was
asked for. Beside that score stand the bits per token of the output under the model (a
bound, with the same masks for all), the entropy of its tokens, the forward passes and
tokens per second.

    python examples/compare_samplers.py                         # trains a model first
    python examples/compare_samplers.py --run_dir=runs/demo     # after `make demo`

About 8 minutes on 2 CPU cores, 5 with a run. Writes `table.md`, `result.json`,
`samplers.png` (score against forwards, diversity against bits) and `unmasking.gif` (the
order in which some of them unmask). Expected: steps that reveal nothing are free, so
that lazy ancestral sampling gives the tokens of the other kind with fewer forwards;
speculation gives those of greedy decoding with fewer forwards; and no sampler leaves
a mask.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffmm.data import read_target
from diffmm.diffusion import likelihood_bound
from diffmm.models import predict_fn
from diffmm.samplers import (
    KLASS,
    WINO,
    Ancestral,
    Credit,
    Delayed,
    Drawn,
    Dual,
    EntropyBounded,
    Factor,
    FirstHitting,
    FixedQuota,
    Frechet,
    Hierarchy,
    JointThreshold,
    Margin,
    NegativeEntropy,
    PCScore,
    Position,
    Prefix,
    Random,
    ReMDM,
    Rule,
    Settings,
    Threshold,
    remaining_cosine,
    sample,
    sample_speculatively,
)
from diffmm.training import option, run_from_flags, write_result
from diffmm.typing import Batch, Canvas, Group, Modality

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import demo_model
import samplers_report
import trimodal_evaluation

TASK, KIND = "t2i", "image"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared."""

    workdir: str = option("runs/compare_samplers", "where everything goes")
    run_dir: str = option("", "workdir of train_trimodal.py; empty = train first")
    train_steps: int = option(1_500, "steps of that training")
    rows: int = option(60, "canvases, ten captions in turn")
    temperature: float = option(0.7, "of all draws, except where greedy")
    draws: int = option(4, "Monte-Carlo draws per row of the bound on bits")
    seed: int = option(0, "of training, draws and masks")
    quick: bool = option(False, "a tiny model and few samplers: that all of it runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One sampler: a rule and how it is run.

    Attributes:
      family: what it is drawn and listed with.
      rule: ``None`` for speculation.
      options: further arguments of `diffmm.samplers.sample`.
      greedy: arg-max instead of draws.
    """

    family: str
    rule: Rule | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    greedy: bool = False


def entries(count: int, frequency: np.ndarray) -> dict[str, Entry]:
    """All samplers for ``count`` generated positions per row, by name."""
    half, quarter = count // 2, count // 4
    budget = {"max_forwards": 2 * count}
    found = {
        f"ancestral, {half} steps": Entry(
            family="ancestral", rule=Ancestral(num_steps=half)
        ),
        f"ancestral, {half} steps, not lazy": Entry(
            family="ancestral", rule=Ancestral(num_steps=half, lazy=False)
        ),
        f"ancestral, {2 * count} steps": Entry(
            family="ancestral", rule=Ancestral(num_steps=2 * count)
        ),
        "first hitting": Entry(family="ancestral", rule=FirstHitting()),
    }
    for steps in (count // 16, count // 8, quarter, half, count):
        found[f"max-prob, {steps} steps"] = Entry(
            family="quota, max-prob", rule=FixedQuota(num_steps=steps)
        )
        found[f"random, {steps} steps"] = Entry(
            family="quota, random", rule=FixedQuota(num_steps=steps, score=Random())
        )
    scores = {
        "margin": Margin(),
        "entropy": NegativeEntropy(),
        "left to right": Position(),
        "drawn token": Drawn(),
        "PC-sampler": PCScore(frequency=frequency, decay=0.02),
    }
    for name, score in scores.items():
        found[f"{name}, {quarter} steps"] = Entry(
            family="quota, other scores",
            rule=FixedQuota(num_steps=quarter, score=score),
        )
    found[f"MaskGIT, {quarter} steps"] = Entry(
        family="quota, other scores",
        rule=FixedQuota(
            num_steps=quarter,
            score=Drawn(),
            remaining=remaining_cosine,
            choice_temperature=4.5,
        ),
    )
    adaptive = {f"threshold {x}": Threshold(threshold=x) for x in (0.2, 0.3, 0.5, 0.9)}
    adaptive |= {f"factor {x}": Factor(factor=x) for x in (1.0, 4.0, 16.0)}
    adaptive |= {f"Fréchet {x}": Frechet(factor=x) for x in (1.0, 4.0, 16.0)}
    adaptive |= {f"EB {x}": EntropyBounded(gamma=x) for x in (1.0, 5.0, 20.0)}
    adaptive |= {
        "KLASS": KLASS(confidence=0.6, kl=0.05),
        "hierarchy": Hierarchy(high=0.9, low=0.4),
        "credit": Credit(threshold=0.7),
    }
    for name, rule in adaptive.items():
        family = name.split(" ")[0]
        if family in ("KLASS", "hierarchy", "credit"):
            family = "other adaptive"
        found[name] = Entry(family=family, rule=rule)
    for variant in ("cap", "rescale", "conf", "loop"):
        found[f"ReMDM {variant}, {half} steps"] = Entry(
            family="remasking and editing",
            rule=ReMDM(num_steps=half, variant=variant),
            options=budget,
        )
    found["WINO"] = Entry(
        family="remasking and editing",
        rule=WINO(draft=0.5, verify=0.3, least=2),
        options=budget,
    )
    found["joint threshold"] = Entry(
        family="remasking and editing",
        rule=JointThreshold(threshold=0.5, edit_threshold=0.9),
    )
    found["greedy, one by one"] = Entry(
        family="greedy", rule=FixedQuota(num_steps=count), greedy=True
    )
    found["speculation, 4 drafts"] = Entry(family="greedy", rule=None, greedy=True)
    blocks = FixedQuota(num_steps=half, score=Random())
    for name, cache in {
        "no cache": None,
        "prefix cache": Prefix(),
        "dual cache": Dual(),
        "delayed cache": Delayed(),
    }.items():
        found[f"{name}, 4 blocks"] = Entry(
            family="caches",
            rule=blocks,
            options={"block_length": quarter, "cache": cache},
        )
    return found


#: What `--quick` keeps, and what the animation shows.
QUICK = ("ancestral", "max-prob, 8", "ReMDM cap")
SHOWN = (
    "ancestral, 32 steps",
    "max-prob, 16 steps",
    "left to right, 16 steps",
    "threshold 0.5",
    "EB 1.0",
    "hierarchy",
    "ReMDM cap, 32 steps",
    "WINO",
)


class Trial:
    """Canvases, the denoiser, and how outputs are judged."""

    def __init__(self, config: Config, model: demo_model.DemoModel):
        """Fits the judge on real training examples."""
        self.config, self.model, data = config, model, model.data
        self.mask_id = data.vocabulary.mask_id
        self.predict = predict_fn(model.graphdef)
        self.allowed = data.layout(KIND).allowed_table()
        self.judge = trimodal_evaluation.Judge.fit(
            data.tokenizers[KIND], data.pairs["train"][KIND]
        )
        names = sorted(set(data.pairs["test"][KIND].labels))
        self.labels = [names[i % len(names)] for i in range(config.rows)]
        known: dict[str, str] = {}
        train = data.pairs["train"][KIND]
        for label, texts in zip(train.labels, train.captions, strict=True):
            known.setdefault(label, texts[0])
        self.captions = [known[label] for label in self.labels]
        encode = data.tokenizers["text"].encode
        self.canvas = data.canvases(TASK, [encode(text) for text in self.captions])
        self.count = int(np.asarray(self.canvas.generate)[0].sum())

    def frequency(self) -> np.ndarray:
        """Share of each id among the real training images, float32 ``[V]``."""
        vocabulary = self.model.data.vocabulary
        offset, _ = vocabulary.span(Modality.IMAGE)
        codes = self.model.data.pairs["train"][KIND].codes + offset
        counts = np.bincount(codes.ravel(), minlength=self.allowed.shape[1])
        return (counts / counts.sum()).astype(np.float32)

    def run(self, entry: Entry, **options: Any) -> Any:
        """Samples, and waits for it."""
        shared = {"mask_id": self.mask_id, "allowed": self.allowed}
        if entry.rule is None:
            result = sample_speculatively(
                self.predict, self.model.params, self.canvas, drafts=4, **shared
            )
        else:
            temperature = 0.0 if entry.greedy else self.config.temperature
            result = sample(
                self.predict,
                self.model.params,
                self.canvas,
                jax.random.key(self.config.seed),
                rule=entry.rule,
                settings=Settings(temperature=temperature),
                **shared,
                **{**entry.options, **options},
            )
        return jax.block_until_ready(result.tokens), result

    def codes(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Image codes of completed rows."""
        return [
            read_target(row, Canvas(*one), self.model.data.vocabulary)
            for row, *one in zip(tokens, *self.canvas, strict=True)
        ]

    def quality(self, tokens: np.ndarray) -> dict[str, float]:
        """Score, bits per token and entropy of completed rows."""
        codes = self.codes(tokens)
        score = self.judge.accuracy(codes, self.labels)
        generate = np.asarray(self.canvas.generate)
        batch = Batch(
            tokens=tokens,
            positions=np.asarray(self.canvas.positions),
            segment_ids=np.asarray(self.canvas.segment_ids),
            modality=np.asarray(self.canvas.modality),
            maskable=generate,
            condition=np.asarray(self.canvas.condition),
            loss_weight=generate.astype(np.float32),
            group=np.where(generate, Group.IMAGE, Group.NONE).astype(np.int8),
            task=np.zeros(len(tokens), np.int8),
        )
        bound = likelihood_bound(
            self.model.nll,
            self.model.params,
            batch,
            jax.random.key(self.config.seed),
            mask_id=self.mask_id,
            draws=self.config.draws,
        )
        return {
            "score": score,
            "score_error": float(np.sqrt(score * (1 - score) / len(tokens))),
            "bits": float(bound.groups[Group.IMAGE].bits_per_token),
            "entropy": float(np.mean([entropy(row) for row in codes])),
        }


def entropy(codes: np.ndarray) -> float:
    """Entropy of the tokens of one row, in bits: 0 for a picture of one grey."""
    share = np.unique(np.asarray(codes), return_counts=True)[1] / len(codes)
    return float(-np.sum(share * np.log2(share)))


def measure(trial: Trial, entry: Entry) -> tuple[dict[str, Any], Any]:
    """Figures of one sampler and its result; the first call compiles."""
    started = time.perf_counter()
    if entry.rule is None:
        trial.run(entry)
    else:
        # A bound is traced: nothing more to compile afterwards.
        blocks = trial.count // entry.options.get("block_length", trial.count)
        trial.run(entry, max_forwards=blocks)
    compiled = time.perf_counter()
    tokens, result = trial.run(entry)
    seconds = time.perf_counter() - compiled
    tokens = np.asarray(tokens)
    generate = np.asarray(trial.canvas.generate)
    left = int((tokens[generate] == trial.mask_id).sum())
    figures = {
        "family": entry.family,
        "forwards": float(np.mean(np.asarray(result.nfe))),
        "most_forwards": int(np.max(np.asarray(result.nfe))),
        "calls": int(result.forwards),
        "seconds": seconds,
        "tokens_per_second": float(generate.sum() / seconds),
        "first_call_seconds": compiled - started,
        "masks_left": left,
    }
    if hasattr(result, "counts"):
        figures["positions_computed"] = float(result.counts.processed)
    # A mask has no likelihood: rows are judged only if all of them are complete.
    figures |= trial.quality(tokens) if not left else {}
    return figures, result


def real_images(trial: Trial) -> dict[str, float]:
    """The same figures of real held-out images."""
    pairs = trial.model.data.pairs["test"][KIND]
    tokens = np.array(trial.canvas.tokens)
    offset, _ = trial.model.data.vocabulary.span(Modality.IMAGE)
    by_label = {
        label: [i for i, other in enumerate(pairs.labels) if other == label]
        for label in set(trial.labels)
    }
    for row, label in enumerate(trial.labels):
        codes = pairs.codes[by_label[label][row // 10 % len(by_label[label])]]
        tokens[row, np.asarray(trial.canvas.generate)[row]] = codes + offset
    return trial.quality(tokens)


def run(config: Config) -> dict[str, Any]:
    started = time.perf_counter()
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.quick:
        config = dataclasses.replace(config, rows=10, train_steps=20, draws=2)
    if config.run_dir:
        model = demo_model.from_run(config.run_dir)
    else:
        small = {"width": 32, "num_layers": 1, "max_examples": 100}
        options = small if config.quick else {}
        model = demo_model.trained(config.train_steps, config.seed, **options)
    trained = time.perf_counter() - started
    trial = Trial(config, model)
    table, results = {}, {}
    for name, entry in entries(trial.count, trial.frequency()).items():
        if config.quick and not name.startswith(QUICK):
            continue
        animated = name in SHOWN and entry.rule is not None and entry.rule.remasks
        if animated:
            trace = {"trace": entry.options["max_forwards"]}
            entry = dataclasses.replace(entry, options={**entry.options, **trace})
        table[name], results[name] = measure(trial, entry)
        print(samplers_report.line(name, table[name]), flush=True)
    real = real_images(trial)
    figures = {
        "training_steps": model.steps,
        "rows": config.rows,
        "positions": trial.count,
        "temperature": config.temperature,
        "real": real,
        "samplers": table,
        **comparisons(table, results),
    }
    samplers_report.write_table(folder, table, real)
    samplers_report.plot(folder, table, real)
    samplers_report.animate(
        folder,
        {name: results[name] for name in SHOWN if name in results},
        trial,
        rows=min(4, config.rows),
    )
    figures["seconds"] = {
        "training": trained,
        "total": time.perf_counter() - started,
    }
    expected = {
        "masks_left": 0,
        "lazy_tokens_equal": True,
        "lazy_saves_forwards": True,
        "speculation_tokens_equal": True,
        "speculation_saves_calls": True,
    }
    ok = all(figures.get(name, want) == want for name, want in expected.items())
    return write_result(folder, "compare_samplers", figures, expected, ok)


def comparisons(table: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """What must hold between samplers, of those that were run."""
    found: dict[str, Any] = {
        "masks_left": sum(figures["masks_left"] for figures in table.values())
    }

    def same(a: str, b: str) -> bool:
        return bool(np.array_equal(results[a].tokens, results[b].tokens))

    lazy = [name for name in table if name + ", not lazy" in table]
    for name in lazy:
        other = name + ", not lazy"
        found["lazy_tokens_equal"] = same(name, other)
        found["lazy_saves_forwards"] = (
            table[name]["forwards"] <= table[other]["forwards"]
        )
    greedy, drafted = "greedy, one by one", "speculation, 4 drafts"
    if greedy in table and drafted in table:
        found["speculation_tokens_equal"] = same(greedy, drafted)
        found["speculation_saves_calls"] = (
            table[drafted]["calls"] < table[greedy]["calls"]
        )
    return found


if __name__ == "__main__":
    run_from_flags(Config, run)
