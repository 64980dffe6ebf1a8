"""A small trained denoiser of digits: read from a run, or trained in a few minutes.

Used by `compare_samplers.py`; see `train_trimodal.py` for the whole story.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from absl import logging
from flax import nnx

from diffmm.data import TrimodalData, make_loader
from diffmm.diffusion import BernoulliMasking, normalise, schedule_by_name
from diffmm.models import Denoiser
from diffmm.optim import averaged_params
from diffmm.training import (
    Checkpointer,
    Progress,
    check_finite,
    init_state,
    make_train_step,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import train_trimodal
import trimodal_optimizer


class DemoModel(NamedTuple):
    """A denoiser with its data.

    Attributes:
      data: vocabulary, tokenizers, examples.
      graphdef: first result of ``nnx.split(model)``.
      params: trained.
      nll: as `train_trimodal.make_nll` gives it.
      steps: of training.
    """

    data: TrimodalData
    graphdef: Any
    params: Any
    nll: Any
    steps: int


def from_run(run_dir: str) -> DemoModel:
    """The newest checkpoint of a run of `train_trimodal.py`.

    Raises:
      ValueError: if the folder holds no checkpoint.
    """
    checkpoints = Checkpointer(pathlib.Path(run_dir) / "checkpoints")
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(
            f"run_dir must be the workdir of a run of train_trimodal.py, got "
            f"{run_dir!r}, which holds no checkpoint"
        )
    saved = checkpoints.directory / str(step) / "config" / "metadata"
    options = json.loads(saved.read_text())["config"]["run"]
    config = train_trimodal.Config(**options)
    data, plan, graphdef, state = _fresh(config)
    state = checkpoints.restore(
        state, fingerprints=data.fingerprints(), step=step
    ).state
    checkpoints.close()
    return _finished(config, data, plan, graphdef, state)


def trained(steps: int, seed: int = 0, **options: Any) -> DemoModel:
    """Trains on captions and digits alone.

    Args:
      steps: of 24 rows.
      seed: of everything.
      **options: other fields of `train_trimodal.Config`.
    """
    options = {"shares": "t2i=1", "base_steps": steps, "steps": steps, **options}
    config = train_trimodal.Config(seed=seed, **options)
    data, plan, graphdef, state = _fresh(config)
    loader = make_loader(
        data.rows("train"),
        train_trimodal.parse_shares(config.shares),
        batch_size=config.physical_batch,
        seed=seed,
    )
    mask_id = data.vocabulary.mask_id
    process = BernoulliMasking(
        schedules=schedule_by_name(config.schedule),
        times="segment",
        p_uncond=config.p_uncond,
    )
    nll = train_trimodal.make_nll(graphdef, mask_id, config.chunk)
    step_fn = make_train_step(
        train_trimodal.make_loss(nll, process, mask_id),
        plan.optimizer(),
        prepare=normalise,
    )
    step_fn = jax.jit(step_fn, donate_argnums=0)
    progress = Progress(plan.num_steps)
    records: list[Any] = []
    for step in range(1, plan.num_steps + 1):
        state, metrics = step_fn(state, next(loader))
        records.append(metrics)
        if step % 50 == 0 or step == plan.num_steps:
            records = jax.device_get(records)
            for offset, record in enumerate(records):
                check_finite(record, step - len(records) + 1 + offset, 0)
            loss = sum(float(record["loss"]) for record in records) / len(records)
            tokens = len(records) * config.physical_batch * data.length
            progress.update(step, {"loss": loss}, tokens=tokens)
            records = []
    progress.close()
    loader.close()
    return _finished(config, data, plan, graphdef, state)


def _fresh(config: train_trimodal.Config) -> tuple[TrimodalData, Any, Any, Any]:
    data = train_trimodal.load_data(config)
    shape = train_trimodal.model_config(config, data)
    plan = trimodal_optimizer.make_plan(config, shape)
    model = Denoiser(plan.shape, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model)
    state = init_state(params, plan.optimizer(), jax.random.key(config.seed))
    return data, plan, graphdef, state


def _finished(
    config: train_trimodal.Config,
    data: TrimodalData,
    plan: Any,
    graphdef: Any,
    state: Any,
) -> DemoModel:
    params = state.params
    if plan.hyper.ema is not None:
        params = averaged_params(state.opt_state, like=state.params)
    nll = train_trimodal.make_nll(graphdef, data.vocabulary.mask_id, config.chunk)
    steps = int(state.step)
    if steps < plan.num_steps:
        logging.warning("the run stopped at step %d of %d", steps, plan.num_steps)
    return DemoModel(data, graphdef, params, nll, steps)
