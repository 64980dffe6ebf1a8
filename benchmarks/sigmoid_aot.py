"""What the Hopper kernels of sigmoid attention compile to; needs no GPU.

    python benchmarks/sigmoid_aot.py                        # 2 CPU cores, ~8 minutes

Compiles every configuration of the tables of tiles ahead of time for an H100, over head
sizes, masks and dtypes, and prints for each kernel the registers of a thread at launch,
the bytes that the assembler spills to memory, shared memory, and the assembler's
warnings about wgmma (C75xx: "serialized" undoes the overlap that the loops are written
for). Expected of the forward kernel: no spill, no such warning, at most 232,448 bytes
of shared memory, and every row of the tables compiled. Spills of the backward kernels
are listed, not judged.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.resources
import inspect
import json
import os
import pathlib
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.training import option, run_from_flags, write_result

PACKAGES = (
    *("jax-cuda13-pjrt", "jax-cuda13-plugin"),
    *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvdisasm"),
)
MINIMUM_JAX = (0, 11, 2)
SMEM_LIMIT = 232_448
PACKAGE = "diffmm_kernels.sigmoid_attention"

# An H100 SXM, as the compiler asks a device to describe itself.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compiled."""

    workdir: str = option("runs/sigmoid_aot", "where result.json goes")
    only: str = option("", "compile only cases whose name contains this")
    length: int = option(1024, "queries and keys")
    keep: str = option("", "folder that keeps PTX and SASS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call: head sizes, dtype and keywords of `sigmoid_attention`."""

    d: int
    e: int
    dtype: str
    features: str

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"d{self.d} e{self.e} {self.dtype} {self.features}"

    def keywords(self, length: int) -> dict[str, Any]:
        """What is passed beside q, k and v."""
        per_head = jnp.ones((2,), jnp.float32)
        ids = jnp.zeros((1, length), jnp.int32)
        known = {
            "full": {},
            "causal": {"causal": True},
            "window": {"window": (length // 4, 0)},
            "segments": {"q_segment_ids": ids, "kv_segment_ids": ids},
            "alibi": {"alibi_slopes": per_head},
            "bias": {"bias": per_head},
            "float32": {"out_dtype": jnp.float32},
            "high": {"precision": "high"},
            "fast": {"precision": "fast"},
            "deterministic": {"deterministic": True},
        }
        chosen: dict[str, Any] = {}
        for feature in self.features.split("+"):
            chosen |= known[feature]
        return chosen


HEADS = (64, 128, 192, 256)
EVERYTHING = "window+segments+alibi+bias"


def forward_cases() -> list[Case]:
    """Every head size with every kind of mask, and a few calls out of the ordinary."""
    found = []
    for head in HEADS:
        for features in (
            *("full", "causal", "window", "causal+segments"),
            *("full+alibi+bias", "causal+alibi+bias", EVERYTHING),
        ):
            found.append(Case(d=head, e=head, dtype="bfloat16", features=features))
        for features in ("full", EVERYTHING):
            found.append(Case(d=head, e=head, dtype="float16", features=features))
    for head in (64, 128):
        for features in ("full+fast", "causal+fast", "full+high", "causal+float32"):
            found.append(Case(d=head, e=head, dtype="bfloat16", features=features))
    for d, e in ((192, 128), (64, 256), (256, 64)):
        found.append(Case(d=d, e=e, dtype="bfloat16", features="causal"))
    return found


def backward_cases() -> list[Case]:
    """Every head size, without and with masks, in one pass and in a fixed order."""
    return [
        Case(d=head, e=head, dtype="bfloat16", features=features + order)
        for head in HEADS
        for features in ("full", "causal", EVERYTHING)
        for order in ("", "+deterministic")
        if head <= 128 or order  # without a single pass both are the same
    ]


def install(packages: tuple[str, ...], version: str) -> str:
    """The command that installs compilers for this version of JAX."""
    exact = (f"{p}=={version}" if p.startswith("jax") else p for p in packages)
    return f"pip install --no-deps {' '.join(exact)}"


def prepare() -> None:
    """Checks that all is installed and points the compiler at it.

    Raises:
      SystemExit: naming what to install.
    """
    if jax.__version_info__ < MINIMUM_JAX:
        least = ".".join(map(str, MINIMUM_JAX))
        raise SystemExit(
            f"compiling without a GPU needs jax >= {least}, this is {jax.__version__}. "
            "In an environment of Python >= 3.12 with this project:\n"
            f"  pip install jax=={least}\n  {install(PACKAGES, least)}"
        )
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    missing = tuple(name for name in PACKAGES if name not in installed)
    if missing:
        raise SystemExit(
            f"missing: {', '.join(missing)}. Install (together about 260 MB):\n"
            f"  {install(missing, jax.__version__)}"
        )
    toolkit = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    os.environ["PATH"] = f"{toolkit / 'bin'}:{os.environ['PATH']}"
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_gpu_cuda_data_dir={toolkit}"
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    for name in ("PTX", "PTXAS", "SASS"):
        os.environ[f"MOSAIC_GPU_DUMP_{name}"] = "1"
    jax.config.update("jax_platforms", "cpu")


class Pass(NamedTuple):
    """One of the two passes.

    Attributes:
      cases: what is compiled.
      build: ``(operands, options) -> function, its arguments``.
      table: name of the table of tiles.
      facts: ``(operands, options) -> what the rows of the table are chosen by``.
    """

    cases: list[Case]
    build: Callable[[Any, Any], tuple[Callable, tuple]]
    table: str
    facts: Callable[[Any, Any], dict[str, Any]]


def passes() -> dict[str, Pass]:
    """Both passes by name."""
    from diffmm_kernels.sigmoid_attention import mosaic_gpu
    from diffmm_kernels.sigmoid_attention.arguments import Needs

    def forward(operands: Any, options: Any) -> tuple[Callable, tuple]:
        return lambda operands: mosaic_gpu.forward(operands, options), (operands,)

    def backward(operands: Any, options: Any) -> tuple[Callable, tuple]:
        needs = Needs(bias=operands.bias is not None, logit_bias=False)
        shape = *operands.q.shape[:3], operands.v.shape[-1]
        do = jax.ShapeDtypeStruct(shape, options.out_dtype)
        return (
            lambda operands, do: mosaic_gpu.backward(operands, options, do, needs),
            (operands, do),
        )

    found = {}
    for name, cases, build in (
        ("forward", forward_cases(), forward),
        ("backward", backward_cases(), backward),
    ):
        # Not an attribute of the package, where a function has the same name.
        module = importlib.import_module(f"{PACKAGE}.mosaic_gpu.{name}")
        found[name] = Pass(cases, build, module.TABLE, module.facts)
    return found


def call(case: Case, length: int) -> tuple[Any, Any]:
    """Operands, as shapes, and options of a case."""
    from diffmm_kernels.sigmoid_attention import sigmoid_attention
    from diffmm_kernels.sigmoid_attention.arguments import canonical

    parameters = inspect.signature(sigmoid_attention).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    del defaults["implementation"]
    options = None

    def build(q: Any, k: Any, v: Any) -> Any:
        nonlocal options
        given = {**defaults, **case.keywords(length)}
        operands, options, _ = canonical(q, k, v, **given)
        return operands

    shapes = ((1, length, 2, case.d), (1, length, 2, case.d), (1, length, 2, case.e))
    operands = jax.eval_shape(
        build, *(jax.ShapeDtypeStruct(x, jnp.dtype(case.dtype)) for x in shapes)
    )
    return operands, options


def compile_for(device: Any, function: Callable, arguments: Any, folder: str) -> float:
    """Compiles for the device; the compiler leaves its files in the folder. Seconds."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    started = time.perf_counter()
    jax.jit(function).lower(*arguments).compile()
    return time.perf_counter() - started


def read(folder: str) -> list[dict[str, Any]]:
    """What the assembler said of each kernel in a folder."""
    found = []
    for log in sorted(pathlib.Path(folder).glob("*.ptxas")):
        text = log.read_text()
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        resources = log.with_suffix(".resources.txt").read_text()
        shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
        if spill is None or registers is None or shared is None:
            raise RuntimeError(f"{log} does not report spills, registers, memory")
        found.append(
            {
                "kernel": re.sub(r"_\d+$", "", log.stem),
                "registers": int(registers[1]),
                "spill_store_bytes": int(spill[1]),
                "spill_load_bytes": int(spill[2]),
                "shared_memory_bytes": int(shared[1]),
                "warnings": sorted(set(re.findall(r"\bC75\d\d\b", text))),
            }
        )
    return found


def rows(table: str) -> list[dict[str, Any]]:
    """The rows of a table of tiles."""
    path = importlib.resources.files(PACKAGE) / "tables" / f"{table}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def row_of(table: str, facts: dict[str, Any]) -> int:
    """Index of the row that a call with these facts takes."""

    def holds(value: Any, wanted: Any) -> bool:
        if isinstance(wanted, list):
            return wanted[0] <= value <= wanted[1]
        return value == wanted

    return next(
        index
        for index, row in enumerate(rows(table))
        if all(holds(facts[fact], wanted) for fact, wanted in row["when"].items())
    )


def clean(report: dict[str, Any]) -> bool:
    """No spill, no warning, memory that fits."""
    return (
        report["spill_store_bytes"] == report["spill_load_bytes"] == 0
        and not report["warnings"]
        and report["shared_memory_bytes"] <= SMEM_LIMIT
    )


def line(label: str, report: dict[str, Any]) -> str:
    """One kernel of a case, for readers."""
    return (
        f"{label:64s} {report['kernel']:34s} registers {report['registers']:3d}"
        f"  spill {report['spill_store_bytes']:4d} + {report['spill_load_bytes']:4d} B"
        f"  shared {report['shared_memory_bytes']:7,d} B"
        f"  {' '.join(report['warnings']) or '-':6s}"
    )


def run(config: Config) -> dict:
    prepare()
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    device = topology.devices[0]
    reports: list[dict[str, Any]] = []
    unused: list[str] = []
    failures: list[str] = []
    for name, what in passes().items():
        used = set()
        for case in what.cases:
            label = f"{name} {case.name}"
            if config.only not in label:
                continue
            operands, options = call(case, config.length)
            used.add(row_of(what.table, what.facts(operands, options)))
            with tempfile.TemporaryDirectory() as folder:
                if config.keep:
                    folder = os.path.join(config.keep, label.replace(" ", "_"))
                    os.makedirs(folder, exist_ok=True)
                try:
                    function, arguments = what.build(operands, options)
                    seconds = compile_for(device, function, arguments, folder)
                except Exception as error:  # one failure must not hide the others
                    failures.append(label)
                    text = f"{type(error).__name__}: {error}"
                    print(f"{label} FAILED {text[:300]}", flush=True)
                    continue
                found = read(folder)
            for report in found:
                reports.append({"pass": name, "case": case.name, **report})
                print(line(label, report), f"{seconds:5.1f} s", flush=True)
        if not config.only:
            everything = set(range(len(rows(what.table))))
            unused += [f"{what.table} row {i}" for i in sorted(everything - used)]
    forward = [r for r in reports if r["pass"] == "forward"]
    backward = [r for r in reports if r["pass"] == "backward"]
    spilled = [r["spill_store_bytes"] for r in backward]
    figures = {
        "target": "sm_90a",
        "assembler": importlib.metadata.version("nvidia-cuda-nvcc"),
        "forward_kernels": len(forward),
        "forward_not_clean": [r["case"] for r in forward if not clean(r)],
        "forward_largest_shared_memory_bytes": max(
            (r["shared_memory_bytes"] for r in forward), default=0
        ),
        "rows_without_case": unused,
        "backward_kernels": len(backward),
        "backward_without_spill": int(np.sum(np.array(spilled, int) == 0)),
        "backward_most_spilled_bytes": max(spilled, default=0),
        "failures": failures,
        "kernels": reports,
    }
    expected = {
        "forward_not_clean": "[]: no spill, no C75xx, shared memory <= 232,448 bytes",
        "rows_without_case": "[]",
        "failures": "[]",
    }
    ok = bool(forward) and not (figures["forward_not_clean"] or unused or failures)
    return write_result(config.workdir, "sigmoid_aot", figures, expected, ok)


if __name__ == "__main__":
    run_from_flags(Config, run)
