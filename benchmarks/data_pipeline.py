"""Tokens per second of the data pipeline, beside what the train step consumes.

    python benchmarks/data_pipeline.py                    # 2 CPU cores, ~1 minute

Both are measured in one run, on the demo's own rows. Expected: the pipeline delivers at
least 5 times the tokens that a step of the demo model consumes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import time

from diffmm.data import make_loader
from diffmm.models import preset
from diffmm.training import (
    option,
    run_from_flags,
    write_result,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import train_step
import train_trimodal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = option("runs/data_pipeline", "where result.json goes")
    batches: int = option(100, "batches per measurement")
    repeats: int = option(5, "measurements")


def run(config: Config) -> dict:
    demo = train_trimodal.Config()
    data = train_trimodal.load_data(demo)
    shares = train_trimodal.parse_shares(demo.shares)
    loader = make_loader(
        data.rows("train"), shares, batch_size=demo.physical_batch, seed=0
    )
    tokens = demo.physical_batch * data.length
    step_config = train_step.Config(rows=demo.physical_batch, length=data.length)
    shape = preset(demo.preset, vocabulary_size=data.vocabulary.padded_size)
    compiled, state, batch, _ = train_step.build(step_config, shape)

    delivered, consumed = [], []
    for _ in range(20):
        next(loader)
    for _ in range(config.repeats):
        started = time.perf_counter()
        for _ in range(config.batches):
            next(loader)
        delivered.append(tokens * config.batches / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(3):
            state, metrics = compiled(state, batch)
        metrics["loss"].block_until_ready()
        consumed.append(3 * tokens / (time.perf_counter() - started))
    loader.close()
    ratio = statistics.median(a / b for a, b in zip(delivered, consumed, strict=True))
    figures = {
        "pipeline_tokens_per_second": train_step.spread(delivered),
        "step_tokens_per_second": train_step.spread(consumed),
        "pipeline_over_step": ratio,
    }
    expected = {"pipeline_over_step": ">= 5"}
    return write_result(config.workdir, "data_pipeline", figures, expected, ratio >= 5)


if __name__ == "__main__":
    run_from_flags(Config, run)
