"""A run killed at any moment ends as the run that was never killed, bit by bit."""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

# A whole training script, small.
SCRIPT = """
import sys
import grain, jax, jax.numpy as jnp, numpy as np, optax
from diffmm.training import *

def loss_fn(params, batch, key, rows, num_rows):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    noise = jax.vmap(lambda k: jax.random.normal(k, (64,)))(keys)
    error = jnp.tanh(noise @ params["w"]) - batch["y"][:, None]
    return jnp.mean(error**2, axis=1).sum() / num_rows, {"rows": rows.sum()}

def main(workdir, total_steps, save_every):
    optimizer = optax.adam(1e-2)
    step_fn = jax.jit(make_train_step(loss_fn, optimizer, micro_batches=2),
                      donate_argnums=0)
    source = grain.MapDataset.source(np.linspace(-1, 1, 257, dtype=np.float32))
    data = iter(source.shuffle(seed=1).repeat().map(lambda y: {"y": y}).batch(8)
                .to_iter_dataset())
    params = {"w": jax.random.normal(jax.random.key(0), (64, 256)) * 0.1}
    state = init_state(params, optimizer, jax.random.key(1))
    with Checkpointer(f"{workdir}/checkpoints") as checkpointer, \\
            GracefulShutdown() as shutdown:
        if checkpointer.latest_step() is not None:
            state = checkpointer.restore(state, data).state
        start = int(state.step)
        print("start", start, flush=True)
        with MetricsWriter(workdir, start_step=start, tensorboard=False) as writer:
            for step in range(start + 1, total_steps + 1):
                state, metrics = step_fn(state, next(data))
                writer.write(step, metrics)
                check_finite(metrics, step, checkpointer.last_saved)
                print("step", step, flush=True)
                if step % save_every == 0 or shutdown.requested:
                    checkpointer.save(step, state, data,
                                      metrics={"loss": metrics["loss"]})
                if shutdown.requested:
                    return None
    return float(jnp.sum(state.params["w"]))

if __name__ == "__main__":
    print("end", main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), flush=True)
"""


def start(script, workdir, total_steps, save_every):
    return subprocess.Popen(
        [sys.executable, script, str(workdir), str(total_steps), str(save_every)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out


def read_lines(process, number):
    """Waits until that many more steps were taken; False if the run ended first."""
    return all("end" not in process.stdout.readline() for _ in range(number))


def records(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare(reference, resumed, end_reference, end_resumed):
    assert end_reference.splitlines()[-1] == end_resumed.splitlines()[-1]
    assert records(reference) == records(resumed)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    out = finish(start(script, folder / "run", 16, 2))
    return script, folder / "run", out


def run_killed(uninterrupted, workdir, kills, seed):
    script, reference, out = uninterrupted
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(script, workdir, 16, 2)
        alive = read_lines(process, rng.randint(2, 6))
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.communicate()
        killed += alive
    resumed = finish(start(script, workdir, 16, 2))
    assert killed, "every run ended before it was killed"
    compare(reference, workdir, out, resumed)
    assert not list((pathlib.Path(workdir) / "checkpoints").glob("*tmp*"))


def test_killed_once(uninterrupted, tmp_path):
    run_killed(uninterrupted, tmp_path, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_many_times(uninterrupted, tmp_path, seed):
    run_killed(uninterrupted, tmp_path, kills=6, seed=seed)


def test_terminated_run_saves_exits_with_zero_and_resumes(uninterrupted, tmp_path):
    script, reference, out = uninterrupted
    process = start(script, tmp_path, 16, 1000)
    assert read_lines(process, 5)
    process.terminate()
    finish(process)
    steps = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1
    assert int(steps[0]) >= 4
    compare(reference, tmp_path, out, finish(start(script, tmp_path, 16, 1000)))
