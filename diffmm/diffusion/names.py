"""Schedules and processes by name: for the command line only.

Library code passes objects (``schedule=Cosine()``); a string never goes further than
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from diffmm.diffusion.corruption import MaskingProcess, Schedules, per_modality
from diffmm.diffusion.process import BernoulliMasking, CountMasking, DiscreteMasking
from diffmm.diffusion.schedules import (
    Cosine,
    CosineMDLM,
    Geometric,
    Linear,
    LogLinear,
    Polynomial,
)
from diffmm.diffusion.surrogates import (
    CARTMasking,
    MaskGITMasking,
    SoftminSNRMasking,
)
from diffmm.typing import Schedule

_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "cosine_mdlm": CosineMDLM,
    "geometric": Geometric,
    "loglinear": LogLinear,
}
_POLYNOMIAL = re.compile(r"poly(?:nomial)?[:(]?([0-9.]+)\)?")

_PROCESSES: dict[str, Callable[..., MaskingProcess]] = {
    "bernoulli": BernoulliMasking,
    "count": CountMasking,
    "discrete": DiscreteMasking,
    "maskgit": MaskGITMasking,
    "softmin_snr": SoftminSNRMasking,
    "cart": CARTMasking,
}


def schedule_by_name(name: str) -> Schedule:
    """Returns the schedule of a command-line name.

    >>> schedule_by_name("poly:2")
    Polynomial(exponent=2.0)

    Args:
      name: ``"linear"``, ``"poly2"`` or ``"poly:2"`` (any exponent), ``"cosine"``,
        ``"cosine_mdlm"``, ``"geometric"`` or ``"loglinear"``.

    Raises:
      ValueError: on an unknown name; the message lists the names and tells the two
        cosines apart.
    """
    if name in _SCHEDULES:
        return _SCHEDULES[name]()
    match = _POLYNOMIAL.fullmatch(name)
    if match:
        try:
            exponent = float(match[1])
        except ValueError:
            pass
        else:
            return Polynomial(exponent=exponent)
    raise ValueError(
        f"schedule must be one of linear, poly:P (such as poly:2), cosine, "
        f"cosine_mdlm, geometric, loglinear; got {name!r}. Two functions are called "
        f"cosine: 'cosine' is m(t) = sin(pi t/2), that of MaskGIT and MD4; "
        f"'cosine_mdlm' is m(t) = 1 - cos(pi t/2), that of the MDLM code"
    )


def process_by_name(
    name: str,
    *,
    schedules: Schedules | None = None,
    times: str = "row",
    **settings: Any,
) -> MaskingProcess:
    """Returns the masking process of a command-line name.

    Args:
      name: ``"bernoulli"``, ``"count"``, ``"discrete"``, ``"maskgit"``,
        ``"softmin_snr"`` or ``"cart"``.
      schedules: one schedule or one per modality; the process's own default if None.
      times: ``"row"``, ``"segment"`` or ``"independent"``.
      **settings: further fields of the process, such as ``p_uncond``.

    Raises:
      ValueError: on an unknown name, and on settings that the process cannot honour:
        only ``"bernoulli"`` has times other than ``"row"``; only it and
        ``"discrete"`` take schedules that differ by modality.
    """
    if name not in _PROCESSES:
        raise ValueError(f"process must be one of {sorted(_PROCESSES)}, got {name!r}")
    if name == "bernoulli":
        settings["times"] = times
    elif times != "row":
        raise ValueError(f"times must be 'row' for process {name!r}, got {times!r}")
    if schedules is not None:
        own = per_modality(schedules)
        if name in ("bernoulli", "discrete"):
            settings["schedules"] = own
        elif len(set(own)) > 1:
            raise ValueError(
                f"schedules must not differ by modality for process {name!r}, got {own}"
            )
        elif name != "count":
            # One schedule shared by all positions does not enter the count form.
            settings["schedule"] = own[0]
    try:
        return _PROCESSES[name](**settings)
    except TypeError as error:
        raise ValueError(
            f"settings of process {name!r} must be fields of it: {error}"
        ) from error
