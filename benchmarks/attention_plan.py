"""What `sigmoid_attention.py` measures, most important first, and what is aimed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from diffmm_kernels.sigmoid_attention.specs import SPECS, Pass, Spec, decode, square

OURS = "sigmoid"
JAX_SIDES = (
    OURS,
    "sigmoid deterministic",
    "sigmoid fast",
    "sigmoid high",
    "sigmoid xla",
    "xla dense sigmoid",
    "jax cudnn softmax",
    "tokamax softmax",
)
TORCH_SIDES = (
    "torch cudnn softmax",
    "torch flash softmax",
    "flex softmax",
    "flex sigmoid",
)
_SOFTMAX = ("jax cudnn softmax", "torch cudnn softmax", "torch flash softmax")
_FLEX = ("flex softmax", "flex sigmoid")
_K = 1024


@dataclasses.dataclass(frozen=True)
class Group:
    """Sides that are measured one after the other on one case.

    Attributes:
      spec: the case.
      direction: which pass.
      sides: of `JAX_SIDES` and `TORCH_SIDES`.
      alone: too large for two processes to hold at once.
      verify: check some rows of what is timed.
    """

    spec: Spec
    direction: Pass
    sides: tuple[str, ...]
    alone: bool = False
    verify: bool = True

    @property
    def case(self) -> str:
        """Name of the case in the tables."""
        return case_name(self.spec)


def case_name(spec: Spec) -> str:
    """For example ``D128 causal B1 H16 S16384``, or the name in `SPECS` before it."""
    heads = f"H{spec.heads}"
    if spec.kv_heads != spec.heads:
        heads += f"/{spec.kv_heads}"
    kind = "causal" if spec.causal and spec.q_length > 1 else "full"
    sizes = f"D{spec.head_dim} {kind} B{spec.batch} {heads} S{spec.kv_length}"
    named = "" if spec.name in ("full", "causal", "diffusion") else f"{spec.name} "
    return named + sizes


@dataclasses.dataclass(frozen=True)
class Goal:
    """TFLOP/s to reach, or for decoding the share of the bandwidth of a copy.

    Attributes:
      spec: the case.
      direction: which pass.
      must: more than every public sigmoid kernel.
      should: more than softmax by cuDNN.
      stretch: more than softmax by FlashAttention-3.
    """

    spec: Spec
    direction: Pass
    must: float
    should: float | None = None
    stretch: float | None = None


def _square(length: int, head_dim: int, causal: bool, tokens: int = 16 * _K) -> Spec:
    name = "causal" if causal else "full"
    return square(name, length, head_dim, causal=causal, tokens=tokens)


_LONG = {
    (head_dim, causal): _square(16 * _K, head_dim, causal)
    for head_dim in (64, 128, 256)
    for causal in (False, True)
}
_WIDE = _square(8 * _K, 128, True, tokens=64 * _K)

# FlashAttention-3 and cuDNN as its paper draws them; sigmoid kernels as published.
GOALS = (
    Goal(_LONG[128, False], "forward", 605, 620, 650),
    Goal(_LONG[128, True], "forward", 610, 610, 620),
    Goal(_WIDE, "forward", 610, 610, 620),
    Goal(_LONG[64, False], "forward", 400, 415, 500),
    Goal(_LONG[256, False], "forward", 450, 585, 760),
    Goal(_LONG[256, True], "forward", 450, 510, 645),
    Goal(_WIDE, "backward", 360, 440),
    Goal(_LONG[128, False], "backward", 400, 520, 565),
    Goal(_LONG[64, False], "backward", 300, 435, 475),
    Goal(SPECS["decode"], "forward", 0.85),
)


def groups(tokamax: bool = False) -> Iterator[Group]:
    """Everything, most important first; no case and pass twice for one side."""
    seen: set[tuple[str, str, str]] = set()
    for group in _all(("tokamax softmax",) if tokamax else ()):
        sides = [
            side
            for side in dict.fromkeys(group.sides)
            if (group.case, group.direction, side) not in seen
        ]
        seen.update((group.case, group.direction, side) for side in sides)
        if sides:
            yield dataclasses.replace(group, sides=tuple(sides))


def _all(more: tuple[str, ...]) -> Iterator[Group]:
    for goal in GOALS:
        yield Group(goal.spec, goal.direction, (OURS, *_SOFTMAX, *more))
    for direction in ("forward", "backward"):
        for name in ("gala7b", "gala1b", "gqa"):
            yield Group(SPECS[name], direction, (OURS, *_SOFTMAX))
        yield Group(SPECS["window1024"], direction, (OURS, "jax cudnn softmax"))
        yield Group(SPECS["packed"], direction, (OURS,))
    for causal in (True, False):
        yield Group(_LONG[128, causal], "forward", _FLEX)
    for head_dim in (128, 64):
        spec = _LONG[head_dim, False]
        yield Group(spec, "backward", ("sigmoid deterministic",))
        yield Group(spec, "forward", ("sigmoid fast", "sigmoid high"))
    short = _square(4 * _K, 128, False)
    for direction in ("forward", "backward"):
        plain = ("xla dense sigmoid", "sigmoid xla")
        yield Group(short, direction, (OURS, *_SOFTMAX, *plain))
    yield Group(_LONG[128, True], "backward", (OURS, *_SOFTMAX, *_FLEX))
    for name in ("window1024", "packed"):
        yield Group(SPECS[name], "forward", _FLEX)
    yield Group(_LONG[64, False], "forward", _FLEX)
    yield from _sweep()
    for batch in (1, 8):
        for length in (2 * _K, 4 * _K, 8 * _K):
            spec = _square(length, 128, True).replace(
                batch=batch, heads=24, kv_heads=24
            )
            for direction in ("forward", "backward"):
                yield Group(spec, direction, (OURS, *_SOFTMAX))
    for spec in _LONG.values():
        yield Group(spec, "both", (OURS, *_SOFTMAX))
    for batch, length in ((1, 64 * _K), (128, 8 * _K), (1, 8 * _K), (16, 64 * _K)):
        yield Group(decode(batch, length), "forward", (OURS, *_SOFTMAX))
    yield Group(decode(128, 64 * _K), "forward", (OURS, *_SOFTMAX), alone=True)


def _sweep() -> Iterator[Group]:
    for length in (16, 8, 2, 4, 1, 0.5):
        for head_dim in (128, 64, 256):
            for causal in (False, True):
                spec = _square(int(length * _K), head_dim, causal)
                for direction in ("forward", "backward"):
                    yield Group(spec, direction, (OURS, *_SOFTMAX), verify=False)


def checks() -> list[tuple[Spec, dict[str, Any]]]:
    """Cases of `attention_checks.check` on a GPU, most important first."""
    small = {name: spec.reduced(length=512) for name, spec in SPECS.items()}
    wide = small["diffusion"].replace(head_dim=256)
    half = small["odd"].replace(dtype="float16")
    return [
        (small["diffusion"], {}),
        (small["odd"], {}),
        (small["gqa"], {}),
        (small["packed"], {}),
        (small["diffusion"].replace(head_dim=64), {}),
        (small["odd"], {"deterministic": True}),
        (small["gala1b"], {}),
        (small["window1024"], {}),
        (wide, {}),
        (half, {}),
        (small["odd"], {"precision": "high"}),
        (small["diffusion"], {"precision": "fast", "gradients": False}),
        (small["odd"].replace(head_dim=96, value_dim=40), {}),
    ]


def candidates(direction: Pass, head_dim: int, causal: bool) -> list[dict[str, Any]]:
    """Tiles to try, likely good ones first, that may fit in shared memory."""
    found = []
    for block_q, block_kv, stages in (
        *((64, 128, 2), (64, 64, 4), (128, 128, 2), (64, 256, 2), (64, 128, 3)),
        *((128, 64, 2), (64, 64, 2), (64, 64, 3), (128, 64, 3), (128, 128, 3)),
    ):
        # Keys and values, and queries of two warpgroups, or what stands for them.
        least = 2 * head_dim * (2 * stages * block_kv + 2 * block_q)
        if least > 232_448:
            continue
        tiles = {"block_q": block_q, "block_kv": block_kv, "stages": stages}
        if direction == "forward":
            for loop in ("pipeline", "ping_pong"):
                for persistent in (False,) if causal else (False, True):
                    found.append({**tiles, "loop": loop, "persistent": persistent})
        else:
            found.extend({**tiles, "single_pass": one} for one in (True, False))
    return found
