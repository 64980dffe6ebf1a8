"""Which implementation serves a call, on which device, and why."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Literal, NamedTuple, Protocol

import jax

from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
)

Name = Literal["reference", "xla", "mosaic_gpu", "mosaic_tpu"]
IMPLEMENTATIONS: tuple[Name, ...] = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")

_logger = logging.getLogger("diffmm_kernels")


class Device(NamedTuple):
    """What a computation is traced for.

    Attributes:
      platform: "cpu", "cuda", "rocm", "tpu" …, as `jax.lax.platform_dependent` has it.
      kind: for example "NVIDIA H100 80GB HBM3" or "TPU v5e"; "" where unknown.
    """

    platform: str
    kind: str


class Implementation(Protocol):
    """A module that computes sigmoid attention."""

    def supports(self, operands: Operands, options: Options) -> str | None:
        """None, or the reason why this call cannot be served.

        Shapes and dtypes of the operands are looked at, not values.
        """

    def forward(self, operands: Operands, options: Options) -> Any:
        """``[B, T, H, E]`` in ``options.out_dtype``."""

    def backward(
        self, operands: Operands, options: Options, do: Any, needs: Needs
    ) -> Gradients:
        """Cotangents of the operands for the cotangent ``do`` of the output."""


def implementation(name: Name) -> Implementation:
    """The module behind a name; kernels are imported when first asked for."""
    module = importlib.import_module(f"diffmm_kernels.sigmoid_attention.{name}")
    return module  # type: ignore[return-value]


def current_device() -> Device:
    """The device of an abstract mesh in use, else the default device of the process."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform = abstract.platform or (
            "tpu" if "TPU" in abstract.device_kind else "gpu"
        )
        return Device("cuda" if platform == "gpu" else platform, abstract.device_kind)
    device = jax.devices()[0]
    platform = device.platform
    if platform == "gpu":
        version = getattr(device.client, "platform_version", "")
        platform = "rocm" if "rocm" in version.lower() else "cuda"
    return Device(platform, device.device_kind)


def _is_hopper(device: Device) -> bool:
    return device.platform == "cuda" and any(
        name in device.kind for name in ("H100", "H200", "H800", "H20", "GH200")
    )


class Choice(NamedTuple):
    """What will run.

    Attributes:
      name: the implementation that serves the device.
      platform: the platform it is for; on others, `elsewhere` runs. None: everywhere.
      reasons: why each implementation that was tried before it did not serve.
    """

    name: Name
    platform: str | None
    reasons: tuple[str, ...]


#: What runs where the chosen kernel's platform is not the one lowered for.
ELSEWHERE: Name = "xla"


def choose(
    operands: Operands, options: Options, name: Name | None, device: Device
) -> Choice:
    """Picks the implementation of a call without running it.

    Args:
      operands: arrays or `jax.ShapeDtypeStruct`.
      options: of the call.
      name: the implementation that the user asks for, or None.
      device: what is traced for.

    Raises:
      ValueError: unknown name.
      NotImplementedError: the named implementation cannot serve; says why.
    """
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be None or one of {IMPLEMENTATIONS}, got {name!r}"
            )
        reason = _refusal(name, operands, options)
        if reason is not None:
            raise NotImplementedError(f"implementation {name!r}: {reason}")
        return Choice(name, None, ())
    if _is_hopper(device):
        kernel: Name = "mosaic_gpu"
    elif device.platform == "tpu":
        kernel = "mosaic_tpu"
    else:
        why = f"no kernel for {device.platform} {device.kind}".rstrip()
        return Choice("xla", None, () if device.platform == "cpu" else (why,))
    reason = _refusal(kernel, operands, options)
    if reason is None:
        return Choice(kernel, device.platform, ())
    return Choice("xla", None, (f"{kernel}: {reason}",))


def _refusal(name: Name, operands: Operands, options: Options) -> str | None:
    if options.interpret and name in ("reference", "xla"):
        return "interpret=True is for kernels"
    return implementation(name).supports(operands, options)


@functools.cache
def report(choice: Choice, device: Device, shapes: str) -> None:
    """Logs once what serves a call; a fallback on an accelerator is a warning."""
    level = logging.WARNING if choice.reasons else logging.INFO
    why = f" ({'; '.join(choice.reasons)})" if choice.reasons else ""
    _logger.log(
        level,
        "sigmoid_attention on %s: %s for %s%s",
        device.kind or device.platform,
        choice.name,
        shapes,
        why,
    )
