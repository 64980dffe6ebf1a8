"""Tiles of the kernels: what may be chosen, and the tables of good choices.

Numbers differ between configurations within the tolerances of the tests: sums are
taken in another order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, Literal

Precision = Literal["default", "fast", "high"]
PRECISIONS: tuple[Precision, ...] = ("default", "fast", "high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one kernel cuts its work; each kernel's docstring says what it uses.

    Attributes:
      block_q: query rows of a tile.
      block_kv: keys of a tile.
      stages: tiles in flight between memory and the tensor cores.
      loop: "pipeline" overlaps inside each warpgroup, "ping_pong" between two.
      persistent: one thread block per multiprocessor takes tiles in turn.
      single_pass: backward: dq by reduce-add from the loop that makes dk and dv.
    """

    block_q: int
    block_kv: int
    stages: int = 2
    loop: Literal["pipeline", "ping_pong"] = "pipeline"
    persistent: bool = False
    single_pass: bool = False

    def __post_init__(self) -> None:
        """Refuses tiles that no kernel has."""
        for name in ("block_q", "block_kv", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.loop not in ("pipeline", "ping_pong"):
            raise ValueError(
                f"loop must be 'pipeline' or 'ping_pong', got {self.loop!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of the two passes; None leaves the choice to the table.

    Attributes:
      forward: tiles of the forward kernel.
      backward: tiles of the backward kernel or kernels.
    """

    forward: Tiles | None = None
    backward: Tiles | None = None


@functools.cache
def _table(name: str) -> tuple[dict[str, Any], ...]:
    folder = importlib.resources.files("diffmm_kernels.sigmoid_attention")
    text = (folder / "tables" / f"{name}.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["rows"])


def tiles_from_table(table: str, **facts: Any) -> Tiles:
    """The tiles of the first row of a table whose conditions all hold.

    A row is ``{"when": {fact: value or [low, high]}, "tiles": {...}}``; a pair of
    numbers is an inclusive range, and a fact that ``when`` does not name may be
    anything. The last row has an empty ``when``.

    Args:
      table: name of a file in ``tables/``, without ``.json``.
      **facts: for example ``head_dim=128, causal=True, dtype="bfloat16"``.

    Raises:
      LookupError: no row fits.
    """
    for row in _table(table):
        if all(_holds(facts[fact], wanted) for fact, wanted in row["when"].items()):
            return Tiles(**row["tiles"])
    raise LookupError(f"no row of {table} fits {facts}")


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        low, high = wanted
        return low <= value <= high
    return value == wanted
