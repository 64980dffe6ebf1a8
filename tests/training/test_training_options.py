"""Flags from a configuration, and back."""

import dataclasses

import pytest
from absl import flags

from diffmm.training import config_from_flags, define_flags, option, parse_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    options_test_steps: int = option(3, "how many")
    options_test_rate: float = option(0.5, "how fast")
    options_test_name: str = option("a", "which")
    options_test_flag: bool = option(True, "whether")


def test_flags_round_trip():
    define_flags(Config)
    assert config_from_flags(Config) == Config()
    flags.FLAGS.options_test_steps = 7
    assert config_from_flags(Config) == Config(options_test_steps=7)
    assert flags.FLAGS["options_test_rate"].help == "how fast"


def test_a_field_that_no_flag_holds_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        shape: "tuple[int, ...]" = (1,)

    with pytest.raises(ValueError, match="shape"):
        define_flags(Odd)


def test_dashes_and_underscores_name_the_same_flag():
    flags.DEFINE_integer("options_test_batch", 1, "rows")
    rest = parse_flags(["program", "--options-test-batch=8", "left-alone"])
    assert flags.FLAGS.options_test_batch == 8
    assert rest == ["program", "left-alone"]
