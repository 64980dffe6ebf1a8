r"""Trains an image tokenizer: an autoencoder with finite scalar quantisation (FSQ).

Handwritten digits of 8 x 8 pixels become 4 x 4 codes out of 8 · 5 · 5 · 5 = 1,000, the
discrete tokens that a masked diffusion model of images needs. On held-out digits the
run reports the error of the reconstruction, how much of the codebook is in use, and
what a classifier that saw only real digits makes of the reconstructions. Independent
k-means of the patches, with as many codes, is the baseline.

    python examples/train_image_tokenizer.py --workdir=runs/image_tokenizer

About 2 minutes on 2 CPU cores. Expected: PSNR at least 27 dB on held-out digits, and a
judge no more than 2 points less accurate than on the digits themselves. A run that was
killed continues where it stopped. Writes `reconstructions.png`, and `autoencoder.npz`,
which `load_tokenizer` reads back:

    tokenizer = load_tokenizer("runs/image_tokenizer/autoencoder.npz")
    image = tokenizer.decode(tokenizer.encode(image))

Paper: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple",
arXiv 2309.15505.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time

import grain
import jax
import numpy as np
import optax
from flax import nnx
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.svm import SVC

from diffmm.data import CallableImageTokenizer
from diffmm.data.sources import digits_source
from diffmm.models import (
    FSQAutoencoder,
    FSQConfig,
    num_parameters,
    numpy_codec,
    reconstruction_loss,
)
from diffmm.training import (
    Checkpointer,
    GracefulShutdown,
    MetricsWriter,
    Progress,
    check_finite,
    init_state,
    make_train_step,
    option,
    run_from_flags,
    write_result,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every choice of a run; each field is a flag."""

    workdir: str = option("runs/image_tokenizer", "where everything is written")
    seed: int = option(0, "of initialisation and data order")
    # Model.
    levels: str = option("8,5,5,5", "levels of each quantised dimension")
    patch_size: int = option(2, "pixels; one code per patch")
    width: int = option(64, "of encoder and decoder")
    num_layers: int = option(1, "blocks in the encoder, and in the decoder")
    mlp_ratio: float = option(4.0, "hidden width of the feed-forward layers / width")
    # Optimisation.
    steps: int = option(2_000, "optimiser steps")
    batch_size: int = option(64, "images per step")
    learning_rate: float = option(1e-2, "peak of the cosine schedule")
    warmup: int = option(50, "steps")
    weight_decay: float = option(0.1, "AdamW, on matrices only")
    clip: float = option(1.0, "global gradient norm")
    # Bookkeeping.
    log_every: int = option(50, "steps between records of metrics")
    save_every: int = option(500, "steps between checkpoints")
    num_shown: int = option(20, "held-out images in reconstructions.png")
    tensorboard: bool = option(True, "also write TensorBoard events")


def load_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 ``[n, 8, 8, 1]`` in [0, 1] and labels ``[n]``."""
    source = digits_source(split)
    examples = [source[index] for index in range(len(source))]
    images = np.stack([example.image for example in examples])[..., None]
    return images, np.array([example.label for example in examples])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, max(config.steps, config.warmup + 1)
    )
    adamw = optax.adamw(
        schedule,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 1."""
    return -10 * math.log10(max(mean_squared_error, 1e-12))


def perplexity(codes: np.ndarray) -> float:
    """The exponential of the entropy of the codes: the effective number in use."""
    _, counts = np.unique(codes, return_counts=True)
    p = counts / counts.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def kmeans_error(train: np.ndarray, test: np.ndarray, num_codes: int, patch: int):
    """Mean squared error of ``test`` by k-means of patches of ``train``."""

    def patches(images):
        n, height, width, channels = images.shape
        grid = images.reshape(n, height // patch, patch, width // patch, patch, -1)
        return grid.swapaxes(2, 3).reshape(-1, patch * patch * channels)

    num_codes = min(num_codes, len(np.unique(patches(train), axis=0)))
    model = MiniBatchKMeans(num_codes, random_state=0, n_init=1).fit(patches(train))
    nearest = model.cluster_centers_[model.predict(patches(test))]
    return float(np.mean((patches(test) - nearest) ** 2))


def evaluate(config: Config, model: FSQAutoencoder) -> tuple[dict, np.ndarray]:
    """Figures on the held-out digits, and pairs of originals and reconstructions."""
    train_images, train_labels = load_images("train")
    held_out = [load_images(split) for split in ("validation", "test")]
    images, labels = (np.concatenate(parts) for parts in zip(*held_out, strict=True))
    codec = numpy_codec(model)
    codes = codec.encode_fn(images)
    reconstructions = codec.decode_fn(codes)
    vocabulary_size = model.config.vocabulary_size

    error = float(np.mean((images - reconstructions) ** 2))
    baseline = kmeans_error(train_images, images, vocabulary_size, config.patch_size)
    # gamma 0.001 is scikit-learn's choice for grey values 0 to 16.
    judge = SVC(gamma=0.001).fit(16 * train_images.reshape(-1, 64), train_labels)
    figures = {
        "mse": error,
        "psnr_db": psnr(error),
        "kmeans_psnr_db": psnr(baseline),
        "judge_accuracy_real": judge.score(16 * images.reshape(-1, 64), labels),
        "judge_accuracy": judge.score(16 * reconstructions.reshape(-1, 64), labels),
        "codes_used": len(np.unique(codes)) / vocabulary_size,
        "code_perplexity": perplexity(codes),
        "held_out_images": len(images),
        "fingerprint": codec.fingerprint,
    }
    return figures, np.stack([images, reconstructions])


def save_picture(path: pathlib.Path, pairs: np.ndarray, scale: int = 12) -> None:
    """Originals ``pairs[0]`` in the upper row, reconstructions in the lower."""
    frame = ((0, 0), (0, 0), (1, 0), (1, 0))
    framed = np.pad(pairs[..., 0], frame, constant_values=0.5)
    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in framed])
    rows = np.pad(rows, ((0, 1), (0, 1)), constant_values=0.5)
    picture = np.kron(np.round(255 * rows).astype(np.uint8), np.ones((scale, scale)))
    Image.fromarray(picture.astype(np.uint8)).save(path)


def save_autoencoder(path: pathlib.Path, model: FSQAutoencoder) -> None:
    leaves = jax.tree.leaves(nnx.split(model)[1])
    config = json.dumps(dataclasses.asdict(model.config))
    arrays = {f"leaf_{i:03}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    np.savez_compressed(path, config=config, **arrays)


def load_tokenizer(path: pathlib.Path | str) -> CallableImageTokenizer:
    """Reads what `save_autoencoder` wrote, as a tokenizer of the data room."""
    with np.load(path) as file:
        config = FSQConfig(**json.loads(str(file["config"])))
        arrays = [file[name] for name in sorted(set(file.files) - {"config"})]
    model = nnx.eval_shape(lambda: FSQAutoencoder(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    params = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    codec = numpy_codec(nnx.merge(graphdef, jax.device_put(params)))
    return CallableImageTokenizer(
        name="fsq",
        encode_fn=codec.encode_fn,
        decode_fn=codec.decode_fn,
        image_shape=config.image_shape,
        grid=config.grid,
        vocabulary_size=config.vocabulary_size,
        fingerprint=codec.fingerprint,
    )


def train(config: Config) -> dict:
    started = time.perf_counter()
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    # Data: one pass after another over the training digits, each in a new order.
    images, _ = load_images("train")
    dataset = grain.MapDataset.source(images).seed(config.seed).shuffle().repeat()
    batches = iter(dataset.batch(config.batch_size).to_iter_dataset())

    # Model and loss.
    shape = FSQConfig(
        levels=tuple(int(level) for level in config.levels.split(",")),
        image_size=images.shape[1:3],
        channels=images.shape[3],
        patch_size=config.patch_size,
        width=config.width,
        num_layers=config.num_layers,
        mlp_ratio=config.mlp_ratio,
    )
    graphdef, params = nnx.split(FSQAutoencoder(shape, rngs=nnx.Rngs(config.seed)))

    def loss_fn(params, batch, key, rows, num_rows):
        reconstruction, _ = nnx.merge(graphdef, params)(batch)
        share = rows.shape[0] / num_rows
        return share * reconstruction_loss(batch, reconstruction), {}

    # State and step.
    optimizer = make_optimizer(config)
    state = init_state(params, optimizer, jax.random.key(config.seed))
    step_fn = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)

    # Resume, if there is something to resume.
    checkpoints = Checkpointer(workdir / "checkpoints", keep_last=1)
    saved = {"model": dataclasses.asdict(shape), "run": dataclasses.asdict(config)}
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state, batches, config=saved).state
        print(f"continuing from step {int(state.step)}")
    first = int(state.step)

    print(
        f"{num_parameters(params):,} parameters, {math.prod(shape.grid)} codes of "
        f"{shape.vocabulary_size} per image, {len(images)} training images"
    )
    last_good, record = first, {}
    with (
        GracefulShutdown() as shutdown,
        MetricsWriter(
            workdir, start_step=first, tensorboard=config.tensorboard
        ) as writer,
        Progress(config.steps, start_step=first) as progress,
        checkpoints,
    ):
        for step in range(first + 1, config.steps + 1):
            state, metrics = step_fn(state, next(batches))
            ending = step == config.steps or shutdown.requested
            if ending or step % config.log_every == 0:
                metrics = jax.device_get(metrics)
                check_finite(metrics, step, last_good)
                record = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
                writer.write(step, record)
                progress.update(step, {"loss": record["loss"]})
            if ending or step % config.save_every == 0:
                checkpoints.save(step, state, batches, config=saved)
                last_good = step
            if shutdown.requested:
                break
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)}; the same command continues")
        return {}
    trained = time.perf_counter() - started

    # Scores, picture, parameters.
    model = nnx.merge(graphdef, state.params)
    save_autoencoder(workdir / "autoencoder.npz", model)
    figures, pairs = evaluate(config, model)
    save_picture(workdir / "reconstructions.png", pairs[:, : config.num_shown])
    figures |= {
        "parameters": num_parameters(params),
        "steps": config.steps,
        "seconds": {"training": trained, "total": time.perf_counter() - started},
    }
    expected = {"psnr_db": "at least 27", "judge_accuracy": "at least real - 0.02"}
    ok = (
        figures["psnr_db"] >= 27
        and figures["judge_accuracy"] >= figures["judge_accuracy_real"] - 0.02
    )
    return write_result(workdir, "train_image_tokenizer", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, train)
