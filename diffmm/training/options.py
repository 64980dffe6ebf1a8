"""Command-line flags from a frozen configuration dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging

Config = TypeVar("Config")

_DEFINE: dict[str, Callable[..., Any]] = {
    "bool": flags.DEFINE_bool,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "str": flags.DEFINE_string,
}


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and a line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def define_flags(config_class: type[Any]) -> None:
    """Defines one absl flag for every field of a dataclass.

    Args:
      config_class: fields annotated ``bool``, ``int``, ``float`` or ``str`` (also
        ``| None``), made by `option`.

    Raises:
      ValueError: a field of another type.
    """
    for field in dataclasses.fields(config_class):
        kind = getattr(field.type, "__name__", str(field.type)).split(" | ")[0]
        if kind not in _DEFINE:
            raise ValueError(f"{field.name}: no flag can hold a {field.type}")
        _DEFINE[kind](field.name, field.default, field.metadata.get("help", ""))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line, as ``flags_parser`` of absl's ``app.run``.

    ``--physical-batch=8`` is the same as ``--physical_batch=8``.

    Args:
      argv: the command line with the program's name.

    Returns:
      The program's name and what is not a flag.
    """
    return app.parse_flags_with_usage([argv[0], *map(_with_underscores, argv[1:])])


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def config_from_flags(config_class: type[Config]) -> Config:
    """The configuration that the parsed flags describe."""
    values = {
        field.name: getattr(flags.FLAGS, field.name)
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
    }
    return config_class(**values)


def run_from_flags(config_class: type[Config], run: Callable[[Config], Any]) -> None:
    """What a script does when it is called: flags, configuration, run.

    Messages below warnings are silent: jax and orbax tell every detail of their own.

    Args:
      config_class: see `define_flags`.
      run: takes the configuration; what it returns is dropped.
    """
    define_flags(config_class)

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {argv[1:]}")
        logging.set_verbosity(logging.WARNING)
        run(config_from_flags(config_class))

    app.run(main, flags_parser=parse_flags)
