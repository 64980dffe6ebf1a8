"""Bit-exact resume; damaged, foreign and unwritable checkpoints are named."""

import errno
import json
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmm.training import (
    FULLY_SHARDED,
    Checkpointer,
    CheckpointWriteError,
    UnreadableCheckpointError,
    init_state,
    make_mesh,
    state_shardings,
)
from diffmm.training._saved import checksums

# The reader's threads may complain after the test that damaged their files.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def make_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    params = {
        "blocks": {"w": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),
    }
    return init_state(params, optax.adamw(1e-3), jax.random.key(seed))


def make_iterator():
    dataset = grain.MapDataset.source(np.arange(1000)).shuffle(seed=1).repeat()
    return iter(dataset.batch(4).to_iter_dataset())


def bits(tree):
    def leaf_bits(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes(), str(leaf.dtype), leaf.shape

    return [leaf_bits(leaf) for leaf in jax.tree.leaves(tree)]


def damage(step_directory, how):
    """Spoils the largest array file, or the description, of a checkpoint."""
    folder = pathlib.Path(step_directory)
    files = [p for p in (folder / "state").rglob("d/*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    if how == "flip":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0x10
        largest.write_bytes(content)
    elif how == "truncate":
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "missing":
        shutil.rmtree(folder / "state")
    elif how == "description":
        (folder / "meta" / "metadata").write_text('{"format": 1')
    elif how == "half deleted":
        shutil.rmtree(folder / "meta")
        (folder / "_CHECKPOINT_METADATA").unlink()
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_bit_by_bit(tmp_path, asynchronous):
    state, iterator = make_state(), make_iterator()
    next(iterator)
    with Checkpointer(tmp_path / "run", asynchronous=asynchronous) as checkpointer:
        assert checkpointer.latest_step() is None
        assert not (tmp_path / "run").exists()
        assert checkpointer.save(
            7,
            state,
            iterator,
            config={"model": {"width": 8}, "dtype": jnp.float32},
            fingerprints={"text": "ab12"},
            metrics={"loss": jnp.float32(1.5)},
        )
        # The position is that of the call, however late the bytes are written.
        following = [next(iterator) for _ in range(3)]
        assert not checkpointer.save(7, state, iterator)
    fresh = make_iterator()
    with Checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.restore(
            make_state(1),
            fresh,
            fingerprints={"text": "ab12"},
            config={"model": {"width": 8}},
        )
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.step == 7
    assert restored.config == {"model": {"width": 8}, "dtype": "float32"}
    assert restored.fingerprints == {"text": "ab12"}
    assert restored.metrics == {"loss": 1.5}
    for batch in following:
        np.testing.assert_array_equal(next(fresh), batch)


def test_kinds_of_leaves(tmp_path):
    state = {
        "typed": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "raw": jax.random.key_data(jax.random.key(1)),
        "numpy": np.arange(3, dtype=np.int64) << 40,
        "double": np.array(1 / 3),
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "bool": jnp.array([True, False]),
        "int8": jnp.array([-1, 5], jnp.int8),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "empty": jnp.zeros((0, 4)),
        "nan": jnp.array([jnp.nan, -0.0]),
        "nested": [(jnp.ones(1), None), {}],
        "python": 3,
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore(state).state
    assert restored.pop("python") == state.pop("python") == 3
    assert bits(restored) == bits(state)
    assert jax.random.key_impl(restored["typed"]) == "rbg"
    assert type(restored["numpy"]) is np.ndarray


def test_donated_state_is_saved_before_it_changes(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    state = update({"w": jnp.ones((512, 1024))})
    expected = np.array(state["w"])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(5):
            state = update(state)
        restored = checkpointer.restore({"w": jax.ShapeDtypeStruct((512, 1024), "f4")})
    np.testing.assert_array_equal(restored.state["w"], expected)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_restores_onto_another_mesh_and_back(tmp_path):
    axes = {"blocks": {"w": ("layers", "embed")}, "half": (None,)}
    state = make_state()
    mesh = make_mesh()
    placement = state_shardings(mesh, state, axes, FULLY_SHARDED)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        sharded = checkpointer.restore(jax.device_put(make_state(1), placement)).state
        assert bits(sharded) == bits(state)
        assert sharded.params["blocks"]["w"].sharding == placement.params["blocks"]["w"]
        assert sharded.opt_state[0].mu["blocks"]["w"].addressable_shards[
            0
        ].data.shape == (4, 2)
        checkpointer.save(2, sharded)
        plain = checkpointer.restore(make_state(1)).state
    assert bits(plain) == bits(state)
    # Free arrays stay free: a computation over a mesh accepts them.
    assert not plain.params["blocks"]["w"].committed


def test_keeps_the_last_and_the_best(tmp_path):
    state = {"w": jnp.ones(3)}
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5, 6: None}
    with Checkpointer(tmp_path, keep_last=2, keep_best=1) as checkpointer:
        for step, loss in losses.items():
            metrics = {} if loss is None else {"loss": loss}
            checkpointer.save(step, state, metrics=metrics)
        assert checkpointer.steps() == [2, 5, 6]
        assert checkpointer.best_step() == 2
    with Checkpointer(tmp_path, keep_last=1, best_mode="max") as checkpointer:
        checkpointer.restore(state)
        checkpointer.save(7, state, metrics={"loss": 9.0})
        assert checkpointer.steps() == [7]


class Counter:
    """An iterator whose state is JSON."""

    def __init__(self):
        self.n = 0

    def __next__(self):
        self.n += 1
        return self.n

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


def test_any_iterator_with_a_state(tmp_path):
    counter, fresh = Counter(), Counter()
    next(counter)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(1)}, counter)
        checkpointer.restore({"w": jnp.ones(1)}, fresh)
        assert next(fresh) == 2
        with pytest.raises(ValueError, match=r"get_state\(\).*list"):
            checkpointer.save(2, {"w": jnp.ones(1)}, [1])
        checkpointer.save(2, {"w": jnp.ones(1)})
        with pytest.raises(ValueError, match="without a data iterator"):
            checkpointer.restore({"w": jnp.ones(1)}, fresh)


@pytest.mark.parametrize(
    "how", ["flip", "truncate", "missing", "description", "half deleted"]
)
def test_damage_is_noticed_and_the_older_one_taken(tmp_path, how, caplog):
    states = {step: {"w": jnp.asarray(np.random.default_rng(step).normal(size=5000))}
              for step in (10, 20, 30)}  # fmt: skip
    with Checkpointer(tmp_path) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, states[step], metrics={"loss": 1.0})
    damage(tmp_path / "20", how)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UnreadableCheckpointError) as error:
            checkpointer.restore(states[10], step=20)
        assert str(tmp_path / "20") in str(error.value)
        assert "steps [10]" in str(error.value)
        with caplog.at_level(logging.WARNING, logger="diffmm"):
            restored = checkpointer.restore(states[10])
        assert restored.step == 10
        assert str(tmp_path / "20") in caplog.text
        assert bits(restored.state) == bits(states[10])
        # The run goes on and writes step 20 again; the damaged one is kept aside.
        assert checkpointer.save(20, states[30])
        assert checkpointer.steps() == [10, 20]
        assert bits(checkpointer.restore(states[10]).state) == bits(states[30])
    assert (tmp_path / "set_aside" / "20-0").exists()
    damage(tmp_path / "10", "flip")
    damage(tmp_path / "20", "flip")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UnreadableCheckpointError, match="no older checkpoint"),
    ):
        checkpointer.restore(states[10])


def test_an_older_step_can_be_resumed_without_losing_the_later(tmp_path):
    state = {"w": jnp.ones(2)}
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": jnp.full(2, step, jnp.float32)})
        with pytest.raises(ValueError, match="step: 2 is before 3"):
            checkpointer.save(2, state)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"already holds checkpoints.*\[1, 2, 3\]"):
            checkpointer.save(1, state)
        assert float(checkpointer.restore(state, step=1).state["w"][0]) == 1.0
        assert checkpointer.save(2, {"w": jnp.full(2, 9.0)})
        assert checkpointer.steps() == [1, 2]
        assert float(checkpointer.restore(state).state["w"][0]) == 9.0
    aside = sorted(path.name for path in (tmp_path / "set_aside").iterdir())
    assert aside == ["2-0", "3-0"]


def test_foreign_checkpoints_are_named(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            checkpointer.restore(state)
        checkpointer.save(
            1, state, config={"model": {"width": 8}}, fingerprints={"text": "ab"}
        )
        with pytest.raises(FileNotFoundError, match=r"step 5.*\[1\]"):
            checkpointer.restore(state, step=5)
        with pytest.raises(ValueError, match=r"'text'.*saved ab, current cd"):
            checkpointer.restore(state, fingerprints={"text": "cd"})
        with pytest.raises(ValueError, match=r"'audio'.*saved None, current ef"):
            checkpointer.restore(state, fingerprints={"text": "ab", "audio": "ef"})
        with pytest.raises(ValueError, match="width: saved 8, current 9"):
            checkpointer.restore(state, config={"model": {"width": 9}})
        with pytest.raises(ValueError, match=r"'params/blocks/w'.*\[4, 8\].*\[4, 9\]"):
            checkpointer.restore(make_state(width=9))
        with pytest.raises(ValueError, match="lacks extra"):
            checkpointer.restore({**state._asdict(), "extra": jnp.ones(1)})
        with pytest.raises(ValueError, match="JSON"):
            checkpointer.save(2, state, config={"model": object()})
        assert checkpointer.latest_step() == 1
    for arguments in ({"keep_last": 0}, {"keep_best": -1}, {"best_mode": "up"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Checkpointer(tmp_path, **arguments)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_failed_write_leaves_the_earlier_ones(tmp_path, monkeypatch, asynchronous):
    """The device fills up while arrays are written, on whatever thread that is."""
    import orbax.checkpoint as ocp

    state = {"w": jnp.ones(3000)}
    handler = ocp.JsonCheckpointHandler
    write = handler._save_fn if hasattr(handler, "_save_fn") else None
    if write is None:
        pytest.skip("orbax writes JSON in another way")
    threads = []

    async def full(self, *arguments, **keywords):
        threads.append(threading.current_thread())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpointer.save(1, state)
    checkpointer.save(2, state)
    checkpointer.wait()
    monkeypatch.setattr(handler, "_save_fn", full)

    def save_and_wait():
        checkpointer.save(3, state)
        checkpointer.wait()

    message = r"step 3.*disk is full.*\[1, 2\]"
    with pytest.raises(CheckpointWriteError, match=message) as error:
        save_and_wait()
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setattr(handler, "_save_fn", write)
    assert checkpointer.save(3, {"w": jnp.zeros(3000)})
    assert checkpointer.steps() == [1, 2, 3]
    assert not checkpointer.restore(state).state["w"].any()
    checkpointer.close()
    assert threads
    assert not list(tmp_path.glob("*tmp*"))


FULL_DISK = """
import sys, errno, numpy as np, jax.numpy as jnp
from diffmm.training import Checkpointer, CheckpointWriteError
state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=150000), jnp.float32)}
checkpointer = Checkpointer(sys.argv[1], keep_last=9)
saved = 0
try:
    for step in range(1, 9):
        checkpointer.save(step, state)
        checkpointer.wait()
        saved = step
except CheckpointWriteError as error:
    assert error.errno == errno.ENOSPC, error
    assert f"step {saved + 1}" in str(error), error
assert 0 < saved < 8, saved
assert checkpointer.steps() == list(range(1, saved + 1))
restored = checkpointer.restore(state)
assert restored.step == saved
assert (restored.state["w"] == state["w"]).all()
print("full")
"""


def test_full_disk(tmp_path):
    """A real full file system, in a mount name space of its own."""
    python, folder = shlex.quote(sys.executable), shlex.quote(str(tmp_path))
    probe = f"mount -t tmpfs -o size=2m tmpfs {folder}"
    command = f'{probe} && exec {python} -c "$CODE" {folder}/run'
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run(
            [unshare, "-rm", "sh", "-c", probe], capture_output=True
        ).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", command],
        env={**os.environ, "CODE": FULL_DISK},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("full")


def test_checksum_sees_every_change():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(7, 11)).astype(np.float32)
    original = checksums({"w": jnp.asarray(array)})["w"]
    assert original == checksums({"w": array})["w"]
    for index in range(array.size):
        changed = array.copy()
        changed.view(np.uint32).flat[index] ^= 1 << (index % 32)
        assert checksums({"w": jnp.asarray(changed)})["w"] != original
    swapped = array[::-1].copy()
    assert checksums({"w": jnp.asarray(swapped)})["w"] != original
    if jax.device_count() >= 4:
        mesh = make_mesh()
        spread = jax.device_put(
            rng.normal(size=(8, 3)).astype(np.float32),
            jax.NamedSharding(mesh, jax.P("data")),
        )
        assert checksums({"w": spread}) == checksums({"w": np.asarray(spread)})


def test_saved_files_are_readable_by_people(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"w": jnp.ones(2)}, config={"model": {"width": 8}})
    config = json.loads((tmp_path / "3" / "config" / "metadata").read_text())
    assert config == {"config": {"model": {"width": 8}}}
