"""Strict numerics for every test: four host devices, no silent promotion."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation: LLVM need not optimise what runs once.
_FLAGS = (
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _parsed_absl_flags():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Forgets compiled programs before there are too many.

    Each maps memory, and Linux gives a process 65,530 maps: then the compiler crashes.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Tests of an accelerator are skipped unless JAX_PLATFORMS asks for it."""
    platforms = os.environ["JAX_PLATFORMS"]
    for item in items:
        for marker, platform in (("gpu", "cuda"), ("tpu", "tpu")):
            if item.get_closest_marker(marker) and platform not in platforms:
                reason = f"needs a {marker.upper()}: run with JAX_PLATFORMS={platform}"
                item.add_marker(pytest.mark.skip(reason=reason))
