r"""Trains and samples one masked diffusion model of text, images and speech.

One bidirectional transformer learns one stream of discrete tokens: Python's own prose,
handwritten digits with captions, and words spoken by a synthesiser. Then it writes
digits from captions, speaks words, captions digits, understands words and fills gaps in
prose. Classifiers that saw only real data judge the result.

    python examples/train_trimodal.py --workdir=runs/demo        # = make demo
    python examples/train_trimodal.py --workdir=runs/sigmoid --attention=sigmoid

About 8 minutes on 2 CPU cores. Expected: each judged accuracy at least 0.85 of the
ceiling that the same judge reaches on real held-out data. A run that was killed
continues where it stopped; `report.html` shows everything.

Paper: Bethune et al., "The Design Space of Tri-Modal Masked Diffusion Models",
arXiv 2602.21472. Sigmoid attention: Ramapuram et al., arXiv 2409.04431.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np
from absl import logging
from flax import nnx

from diffmm.data import (
    ByteTokenizer,
    GreyLevelTokenizer,
    HuggingFaceTokenizer,
    LogMelUnitTokenizer,
    SentencePieceTokenizer,
    TrimodalData,
    make_loader,
    tokenise,
    validate_batch,
)
from diffmm.data.sources import limited, source_by_name
from diffmm.data.trimodal import SPLITS
from diffmm.diffusion import (
    BernoulliMasking,
    bits_per_token,
    cross_entropy,
    diffusion_loss,
    normalise,
    schedule_by_name,
)
from diffmm.models import (
    Denoiser,
    logical_axes,
    num_parameters,
    preset,
    training_flops_per_token,
)
from diffmm.optim import TRIMODAL_HORIZON, averaged_params
from diffmm.training import (
    DATA_PARALLEL,
    Checkpointer,
    GracefulShutdown,
    MetricsWriter,
    Progress,
    check_finite,
    environment,
    init_state,
    make_mesh,
    make_train_step,
    option,
    read_metrics,
    run_from_flags,
    shard_batch,
    state_shardings,
    write_result,
)
from diffmm.typing import Tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import train_image_tokenizer
import trimodal_evaluation
import trimodal_optimizer
import trimodal_report

GROUPS = ("text", "image", "audio", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run; each field is a flag."""

    workdir: str = option("runs/trimodal", "where checkpoints, metrics, report go")
    seed: int = option(0, "of initialisation, data order and masks")
    # Data.
    image: str = option("digits", "digits | folder:PATH | tfds:NAME")
    audio: str = option("speech", "speech | folder:PATH | ljspeech:PATH | tfds:NAME")
    text: str = option("prose", "prose | folder:PATH | tfds:NAME")
    text_tokenizer: str = option("bytes", "bytes | a tokenizer.json | a .model file")
    image_tokenizer: str = option(
        "grey", "grey (17 levels a pixel) | an autoencoder.npz of train_image_tokenizer"
    )
    image_size: int = option(8, "images are resized to this many pixels a side")
    audio_units: int = option(256, "k-means units of the log-mel tokenizer")
    max_examples: int = option(0, "keep only so many examples a split; 0 = all")
    shares: str = option(
        "text=0.08,t2i=0.34,i2t=0.3,t2a=0.22,a2t=0.06", "token shares of the tasks"
    )
    # Model.
    preset: str = option("trimodal-demo", "a name of diffmm.models.PRESETS")
    width: int = option(0, "overrides the preset's width; 0 = keep")
    num_layers: int = option(0, "overrides the preset's number of layers; 0 = keep")
    attention: str = option(
        "softmax", "softmax | sigmoid, whose bias is -log of the length of a row"
    )
    # Diffusion.
    schedule: str = option(
        "linear", "linear | polyP | cosine | cosine_mdlm | geometric"
    )
    p_uncond: float = option(0.1, "how often a condition is hidden, for guidance")
    # Optimisation. Hyper-parameters are those of the base, and are carried over.
    base_width: int = option(0, "width of the model they were tuned on; 0 = the run's")
    base_num_layers: int = option(0, "its layers; 0 = the run's")
    base_batch: int = option(24, "rows per step of the run they were tuned on")
    base_steps: int = option(4_000, "steps of that run")
    steps: int = option(4_000, "length of this run, in steps of base_batch rows")
    physical_batch: int = option(24, "rows per step of this run, over all devices")
    logical_batch: int = option(
        0, "rows at which they are right; 0 = base_batch (steps / base_steps)^horizon"
    )
    horizon: float = option(TRIMODAL_HORIZON, "how the logical batch grows with length")
    chunk: int = option(8_192, "positions whose logits exist at once in the loss")
    micro_batches: int = option(1, "parts of a batch that are run one after the other")
    learning_rate: float = option(5e-3, "peak of the cosine schedule")
    warmup: float = option(0.05, "fraction of the run")
    weight_decay: float = option(0.1, "of AdamW, multiplied by the learning rate")
    decay_gains: bool = option(True, "decay the gains of norms too, not only matrices")
    clip: float = option(1.0, "global gradient norm; 0 = no clipping")
    ema: float = option(0.0, "decay per step of averaged weights, sampled from; 0 = no")
    # Bookkeeping.
    log_every: int = option(50, "steps between records of metrics")
    save_every: int = option(800, "steps between checkpoints")
    draws: int = option(16, "Monte-Carlo draws per row of the validation bound")
    bound_rows: int = option(128, "validation rows per task for the bound")
    num_generated: int = option(200, "samples per generation task")
    tensorboard: bool = option(True, "also write TensorBoard events")


def parse_shares(text: str) -> dict[str, float]:
    """``"text=0.2,t2i=0.8"`` as a mapping."""
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {task: float(share) for task, share in pairs}
    except ValueError:
        raise ValueError(
            f"shares must read like 'text=0.2,t2i=0.8', got {text!r}"
        ) from None


def load_data(config: Config) -> TrimodalData:
    """Sources of the three modalities, tokenised into one stream."""
    names = {"text": config.text, "image": config.image, "audio": config.audio}
    sources = {
        modality: {
            split: limited(
                source_by_name(name, split, image_size=config.image_size),
                config.max_examples,
            )
            for split in (SPLITS[:2] if modality == "text" else SPLITS)
        }
        for modality, name in names.items()
    }
    clips = sources["audio"]["train"]
    tokenizers = {
        "text": text_tokenizer(config),
        "image": image_tokenizer(config),
        "audio": LogMelUnitTokenizer.fit(
            [clip.audio for clip in clips],
            sample_rate=clips[0].sample_rate,
            num_units=config.audio_units,
            seed=config.seed,
        ),
    }
    return tokenise(sources, tokenizers)


def text_tokenizer(config: Config) -> Tokenizer:
    name = config.text_tokenizer
    if name == "bytes":
        return ByteTokenizer()
    if name.endswith(".json"):
        return HuggingFaceTokenizer(name)
    if name.endswith(".model"):
        return SentencePieceTokenizer(name)
    raise ValueError(f"text_tokenizer must be bytes, *.json or *.model, got {name!r}")


def image_tokenizer(config: Config) -> Tokenizer:
    name, size = config.image_tokenizer, config.image_size
    if name == "grey":
        return GreyLevelTokenizer(height=size, width=size)
    if name.endswith(".npz"):
        return train_image_tokenizer.load_tokenizer(name)
    raise ValueError(f"image_tokenizer must be grey or *.npz, got {name!r}")


def model_config(config: Config, data: TrimodalData):
    # Softmax has no use for the length: given to both, they differ in name only.
    overrides = {
        "vocabulary_size": data.vocabulary.padded_size,
        "attention": config.attention,
        "length": data.length,
    }
    if preset(config.preset).num_positions:
        overrides["num_positions"] = data.length
    if config.width:
        overrides["width"] = config.width
    if config.num_layers:
        overrides["num_layers"] = config.num_layers
    return preset(config.preset, **overrides)


def make_nll(graphdef, mask_id: int, chunk: int | None = None):
    """−log p(clean token) at every position; the mask itself is no outcome."""

    def nll(params, tokens, batch):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(tokens, batch.positions, batch.segment_ids)
        unembedding = model.unembedding[...]
        excluded = np.arange(unembedding.shape[1]) == mask_id
        return cross_entropy(
            hidden, unembedding, batch.tokens, excluded=excluded, chunk_size=chunk
        )

    return nll


def make_loss(nll, process, mask_id: int):
    """The diffusion bound as a sum over rows, with its additive metrics."""

    def loss_fn(params, batch, key, rows, num_rows):
        loss, metrics = diffusion_loss(
            nll,
            params,
            batch,
            key,
            process=process,
            mask_id=mask_id,
            rows=rows,
            num_rows=num_rows,
        )
        return loss, metrics._asdict()

    return loss_fn


def summarise(records: list[dict], seconds: float, config: Config) -> dict:
    """Means over the steps since the last record, as they are logged."""
    total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *records)
    bits = bits_per_token(total["nats"], total["count"])
    by_time = bits_per_token(total["nats_by_time"], total["count_by_time"])
    return {
        "loss": float(total["loss"]) / len(records),
        "grad_norm": float(total["grad_norm"]) / len(records),
        "bits": dict(zip(GROUPS, bits.tolist(), strict=True)),
        "bits_by_time": by_time.tolist(),
        "rows_per_second": len(records) * config.physical_batch / seconds,
    }


def train(config: Config) -> dict:
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    # Data: sources -> tokenizers -> rows -> mixture -> batches.
    data = load_data(config)
    shares = parse_shares(config.shares)
    loader = make_loader(
        data.rows("train"),
        shares,
        batch_size=config.physical_batch,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    mask_id = data.vocabulary.mask_id

    # Model and loss.
    plan = trimodal_optimizer.make_plan(config, model_config(config, data))
    shape, num_steps = plan.shape, plan.num_steps
    model = Denoiser(shape, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model)
    process = BernoulliMasking(
        schedules=schedule_by_name(config.schedule),
        times="segment",
        p_uncond=config.p_uncond,
    )
    nll = make_nll(graphdef, mask_id, config.chunk)
    loss_fn = make_loss(nll, process, mask_id)

    # State and step, over all devices of the machine.
    optimizer = plan.optimizer()
    mesh = make_mesh()
    state = init_state(params, optimizer, jax.random.key(config.seed))
    placement = state_shardings(mesh, state, logical_axes(params), DATA_PARALLEL)
    state = jax.device_put(state, placement)
    step_fn = make_train_step(
        loss_fn, optimizer, prepare=normalise, micro_batches=config.micro_batches
    )
    step_fn = jax.jit(step_fn, donate_argnums=0)

    # Resume, if there is something to resume.
    checkpoints = Checkpointer(workdir / "checkpoints")
    saved = {"model": dataclasses.asdict(shape), "run": dataclasses.asdict(config)}
    fingerprints = data.fingerprints()
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(
            state, loader, config=saved, fingerprints=fingerprints
        )
        state = restored.state
        logging.info("continuing from step %d", restored.step)
    plan.save(workdir)
    first = int(state.step)

    tokens_per_step = config.physical_batch * data.length
    print(
        f"{num_parameters(params):,} parameters, vocabulary {data.vocabulary.size}, "
        f"rows of {data.length} tokens, {num_steps} steps of {config.physical_batch} "
        f"rows, {training_flops_per_token(shape, data.length):,} FLOPs per token\n"
        f"{plan}"
    )
    writer = MetricsWriter(workdir, start_step=first, tensorboard=config.tensorboard)
    progress = Progress(num_steps, start_step=first)
    records, last_good, clock = [], first, time.perf_counter()
    with GracefulShutdown() as shutdown:
        for step in range(first + 1, num_steps + 1):
            batch = next(loader)
            if step == first + 1:
                validate_batch(batch, data.vocabulary)
            state, metrics = step_fn(state, shard_batch(batch, mesh))
            records.append(metrics)
            ending = step == num_steps or shutdown.requested
            saving = ending or step % config.save_every == 0
            if saving or step % config.log_every == 0:
                records = jax.device_get(records)
                for offset, record in enumerate(records):
                    check_finite(record, step - len(records) + 1 + offset, last_good)
                now = time.perf_counter()
                summary = summarise(records, now - clock, config)
                writer.write(step, summary)
                progress.update(
                    step, summary["bits"], tokens=len(records) * tokens_per_step
                )
                records, clock = [], now
            if saving:
                checkpoints.save(
                    step,
                    state,
                    loader,
                    config=saved,
                    fingerprints=fingerprints,
                    metrics={"loss": summary["loss"]},
                )
                last_good = step
            if shutdown.requested:
                break
    progress.close()
    writer.close()
    checkpoints.close()
    loader.close()
    if int(state.step) < num_steps:
        print(f"stopped at step {int(state.step)}; the same command continues")
        return {}
    trained = time.perf_counter() - started

    # Scores, samples, report.
    trained_params = state.params
    if plan.hyper.ema is not None:
        trained_params = averaged_params(state.opt_state, like=state.params)
    figures, artifacts = trimodal_evaluation.evaluate(
        data,
        graphdef,
        trained_params,
        nll,
        seed=config.seed,
        draws=config.draws,
        bound_rows=config.bound_rows,
        num_generated=config.num_generated,
    )
    figures["seconds"] = {
        "training": trained,
        "total": time.perf_counter() - started,
    }
    figures["parameters"] = num_parameters(params)
    figures["steps"] = num_steps
    figures["attention"] = config.attention
    records = read_metrics(workdir / "metrics.jsonl")
    figures["final"] = trimodal_evaluation.final_training(records, num_steps)
    accuracy = figures["accuracy"]
    expected = {task: {"share_of_ceiling": ">= 0.85"} for task in accuracy}
    ok = all(scores["share_of_ceiling"] >= 0.85 for scores in accuracy.values())
    np.savez_compressed(workdir / "samples.npz", **artifacts)
    report = trimodal_report.write(
        workdir, data, artifacts, figures, environment(), command(config)
    )
    print(f"report: {report}")
    return write_result(workdir, "train_trimodal", figures, expected, ok)


def command(config: Config) -> str:
    """The command line that repeats this run."""
    changed = [
        f"--{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default
    ]
    return " ".join(["python examples/train_trimodal.py", *changed])


if __name__ == "__main__":
    run_from_flags(Config, train)
