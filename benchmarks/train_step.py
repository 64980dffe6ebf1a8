"""Speed of one optimiser step, beside the same architecture in PyTorch.

    python benchmarks/train_step.py                       # 2 CPU cores, ~4 minutes
    python benchmarks/train_step.py --preset=trimodal-320m --length=2048 --rows=8 \
        --notorch                                         # a GPU: tokens/s and MFU

One run measures, interleaved: a whole step of diffmm (masking, forward, backward,
clipping, AdamW), a whole step of PyTorch, and the matrix-product ceiling of the device.
Compile time of 24 layers is compared with that of 4. Expected on CPU: at least as fast
as PyTorch (ratio >= 1.0, aim 1.5), compile ratio <= 1.3.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffmm.diffusion import (
    BernoulliMasking,
    cross_entropy,
    diffusion_loss,
    normalise,
)
from diffmm.models import Denoiser, preset, training_flops_per_token
from diffmm.training import (
    init_state,
    make_train_step,
    option,
    run_from_flags,
    write_result,
)
from diffmm.typing import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = option("runs/train_step", "where result.json goes")
    preset: str = option("trimodal-demo", "a name of diffmm.models.PRESETS")
    vocabulary: int = option(542, "V; 0 = the preset's own")
    rows: int = option(24, "rows per step")
    length: int = option(88, "tokens per row")
    repeats: int = option(12, "measured steps of each side")
    torch: bool = option(True, "measure PyTorch too")
    compile_ratio: bool = option(True, "compare compile times of 24 and 4 layers")
    chunk: int = option(0, "positions whose logits exist at once; 0 = all")


def synthetic_batch(config: Config, vocabulary: int) -> Batch:
    """Rows of two documents; the last id is the mask."""
    rng = np.random.default_rng(0)
    shape = (config.rows, config.length)
    half = config.length // 2
    place = np.arange(config.length)
    return Batch(
        tokens=rng.integers(0, vocabulary - 1, shape).astype(np.int32),
        positions=np.tile(np.where(place < half, place, place - half), (shape[0], 1)),
        segment_ids=np.tile(1 + (place >= half), (shape[0], 1)).astype(np.int32),
        modality=np.zeros(shape, np.int8),
        maskable=np.ones(shape, bool),
        condition=np.zeros(shape, bool),
        loss_weight=np.ones(shape, np.float32),
        group=np.zeros(shape, np.int8),
        task=np.zeros(shape[0], np.int8),
    )


def build(config: Config, shape):
    """A compiled step of diffmm and its state."""
    graphdef, params = nnx.split(Denoiser(shape, rngs=nnx.Rngs(0)))
    mask_id = shape.vocabulary_size - 1

    def nll(params, tokens, batch):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(tokens, batch.positions, batch.segment_ids)
        excluded = np.arange(shape.vocabulary_size) == mask_id
        return cross_entropy(
            hidden,
            model.unembedding[...],
            batch.tokens,
            excluded=excluded,
            chunk_size=config.chunk or None,
        )

    def loss_fn(params, batch, key, rows, num_rows):
        loss, metrics = diffusion_loss(
            nll,
            params,
            batch,
            key,
            process=BernoulliMasking(),
            mask_id=mask_id,
            rows=rows,
            num_rows=num_rows,
        )
        return loss, metrics._asdict()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1),
    )
    state = init_state(params, optimizer, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, synthetic_batch(config, shape.vocabulary_size))
    step = jax.jit(
        make_train_step(loss_fn, optimizer, prepare=normalise), donate_argnums=0
    )
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    return compiled, state, batch, time.perf_counter() - started


def matmul_ceiling(dtype: str) -> Callable[[], float]:
    """A function that measures FLOP/s of one large square matrix product."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    left = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(left).block_until_ready()

    def measure() -> float:
        started = time.perf_counter()
        product(left).block_until_ready()
        return 2 * size**3 / (time.perf_counter() - started)

    return measure


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def run(config: Config) -> dict:
    overrides = {"vocabulary_size": config.vocabulary} if config.vocabulary else {}
    shape = preset(config.preset, **overrides)
    compiled, state, batch, compile_seconds = build(config, shape)
    memory = compiled.memory_analysis()
    tokens = config.rows * config.length
    flops = training_flops_per_token(shape, config.length) * tokens

    torch_step = None
    if config.torch:
        import torch
        from torch_denoiser import TorchTrainer

        torch.set_num_threads(jax.local_device_count() and torch.get_num_threads())
        trainer = TorchTrainer(shape, shape.vocabulary_size - 1, 1e-3)
        arguments = [
            torch.tensor(np.asarray(x).astype(np.int64))
            for x in (batch.tokens, batch.positions, batch.segment_ids)
        ]
        arguments.append(torch.tensor(np.asarray(batch.maskable)))

        def torch_step() -> None:
            trainer.step(*arguments)

    ceiling = matmul_ceiling(shape.compute_dtype)
    ours, theirs, peaks = [], [], []
    for repeat in range(config.repeats + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        metrics["loss"].block_until_ready()
        seconds = time.perf_counter() - started
        peak = ceiling()
        if torch_step:
            started = time.perf_counter()
            torch_step()
            other = time.perf_counter() - started
        if repeat >= 2:  # two rounds of warm-up
            ours.append(seconds)
            peaks.append(peak)
            if torch_step:
                theirs.append(other)

    seconds = statistics.median(ours)
    figures = {
        "preset": config.preset,
        "rows": config.rows,
        "length": config.length,
        "vocabulary": shape.vocabulary_size,
        "step_seconds": spread(ours),
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops / seconds,
        "matmul_flops_per_second": spread(peaks),
        "share_of_matmul_ceiling": flops / seconds / statistics.median(peaks),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "compile_seconds": compile_seconds,
    }
    ok = True
    expected: dict = {}
    if theirs:
        figures["torch_step_seconds"] = spread(theirs)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        figures["speed_over_torch"] = spread(ratios)
        expected["speed_over_torch"] = ">= 1.0, aim 1.5"
        ok &= statistics.median(ratios) >= 1.0
    if config.compile_ratio:
        times = {4: [], 24: []}
        for _ in range(3):
            for layers, found in times.items():
                deep = dataclasses.replace(shape, num_layers=layers)
                found.append(build(config, deep)[3])
        ratio = statistics.median(times[24]) / statistics.median(times[4])
        figures["compile_seconds_4_layers"] = spread(times[4])
        figures["compile_seconds_24_layers"] = spread(times[24])
        figures["compile_ratio_24_over_4"] = ratio
        expected["compile_ratio_24_over_4"] = "<= 1.3"
        ok &= ratio <= 1.3
    return write_result(config.workdir, "train_step", figures, expected, bool(ok))


if __name__ == "__main__":
    run_from_flags(Config, run)
