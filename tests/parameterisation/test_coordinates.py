"""Coordinate and gradient checks: the tool, and the rules seen through it."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffmm.parameterisation.coordinate_report import CoordinateReport, Measurement
from diffmm.parameterisation.coordinates import (
    activation_changes,
    coordinate_check,
    gradient_check,
    gradient_rms,
)
from diffmm.parameterisation.rules import CompletedP, StandardFanIn
from diffmm.typing import Multiplier

ACTIVATIONS = (
    "embedding",
    "attention out",
    "MLP hidden",
    "MLP out",
    "residual stream",
    "logits",
)
CLASS = {
    name: leaf.role.value
    for name, leaf in toy.leaves(toy.WIDTH_BASE, toy.WIDTH_BASE).items()
}
# The table's exponent 0 is an upper bound; heads that are uncorrelated give -1/2.
QK_WIDTH = {"width": {"QK-norm gain": (-0.7, 0.25)}}
LAZY = {"depth": {"MLP out": (-math.inf, -0.2)}}
# Below α = 1 this gradient falls faster than its ε: over eight seeds and depths 4 to 16
# the slope is -0.74 with a standard deviation of 0.24, so 0.17 for the mean of two.
QK_LAZY_DEPTH = {"depth": {"QK-norm gain": (-1.1, -0.4)}}


def place(width, depth):
    """Sizes on the two axes of the measurements: each has a base of its own."""
    base = toy.DEPTH_BASE if width is None else toy.WIDTH_BASE
    return toy.Size(width=width or base.width, depth=depth or base.depth), base


def measuring(rule, kind):
    def measure(*, width=None, depth=None, seed):
        result = toy.train(rule, *place(width, depth), seed)
        extra = {"loss": result["loss"]} if kind == "changes" else {}
        return {**result[kind], **extra}

    return measure


def changes(rule, **sizes):
    report = coordinate_check(measuring(rule, "changes"), **sizes)
    return report.expecting({axis: {"loss": None} for axis in report.sizes()})


def gradients(rule, *, judged_by=None, **sizes):
    def multipliers(*, width=None, depth=None):
        return toy.multipliers(judged_by or rule, *place(width, depth))

    measure = measuring(rule, "gradients")
    return gradient_check(measure, multipliers, classes=CLASS, **sizes)


SMALL_WIDTHS = {"widths": (32, 64, 128, 256), "seeds": 1}
SMALL_DEPTHS = {"depths": (4, 8, 16), "seeds": 1}
FULL_WIDTHS = {"widths": (32, 64, 128, 256, 512), "seeds": 2}
FULL_DEPTHS = {"depths": (2, 4, 8, 16, 32), "seeds": 2}
COMPLETED = CompletedP(final_norm_eps="derived")
LAZY_RULE = CompletedP(alpha=0.5, final_norm_eps="derived")


def check_widths(sizes):
    report = changes(COMPLETED, **sizes)
    report.assert_flat(only=ACTIVATIONS)
    report.assert_slopes()
    loss = report.means()["width"]["loss"]
    assert np.all(np.diff(loss) <= 0.02), loss


def check_depths(sizes):
    changes(COMPLETED, **sizes).select("depth", start=4).assert_slopes()
    lazy = changes(LAZY_RULE, **sizes).select("depth", start=4)
    lazy.expecting(LAZY).assert_slopes()


def test_widths_change_alike():
    check_widths(SMALL_WIDTHS)


@pytest.mark.slow
def test_depths_change_alike_and_branches_are_lazy_below_one():
    check_depths(SMALL_DEPTHS)


def test_standard_parameterisation_grows_with_width():
    report = changes(StandardFanIn(), widths=(32, 64, 128), seeds=1)
    assert report.slopes()["width"]["residual stream"] > 0.5
    with pytest.raises(AssertionError, match="width, residual stream: slope 1"):
        report.assert_flat()


def test_gradients_follow_eps_over_widths():
    gradients(COMPLETED, **SMALL_WIDTHS).expecting(QK_WIDTH).assert_slopes()
    # The published ε of the final gain does not scale; its gradient does.
    paper = gradients(COMPLETED, judged_by=CompletedP(), **SMALL_WIDTHS)
    failed = paper.expecting(QK_WIDTH).failures()
    assert [failure.quantity for failure in failed] == ["final-norm gain"]


def test_gradients_follow_eps_over_depths():
    gradients(COMPLETED, **SMALL_DEPTHS).assert_slopes()
    gradients(LAZY_RULE, **SMALL_DEPTHS).assert_slopes(only=("hidden weight",))


@pytest.mark.slow
def test_full_widths():
    check_widths(FULL_WIDTHS)
    report = gradients(COMPLETED, **FULL_WIDTHS).expecting(QK_WIDTH)
    report.assert_slopes()


@pytest.mark.slow
def test_full_widths_of_the_standard_parameterisation():
    report = changes(StandardFanIn(), **FULL_WIDTHS)
    assert report.slopes()["width"]["residual stream"] > 0.5
    assert report.slopes()["width"]["logits"] > 0.3


@pytest.mark.slow
def test_full_depths():
    check_depths(FULL_DEPTHS)
    gradients(COMPLETED, **FULL_DEPTHS).assert_slopes()
    gradients(LAZY_RULE, **FULL_DEPTHS).expecting(QK_LAZY_DEPTH).assert_slopes()


def power_law(**exponents):
    def measure(*, width=32, depth=2, seed):
        del seed
        return {name: 3.0 * (width * depth) ** e for name, e in exponents.items()}

    return measure


WIDTHS = (32, 64, 256)


def test_slopes_of_power_laws_are_exact():
    report = coordinate_check(
        power_law(a=0.5, b=-1.0, c=0.0), widths=WIDTHS, depths=(2, 4, 16)
    )
    for axis in ("width", "depth"):
        slopes = report.slopes()[axis]
        np.testing.assert_allclose([slopes[q] for q in "abc"], [0.5, -1, 0], atol=1e-12)
    failed = report.failures()
    assert [(f.axis, f.quantity) for f in failed] == [
        ("width", "a"),
        ("width", "b"),
        ("depth", "a"),
        ("depth", "b"),
    ]
    assert not report.failures(1.1)
    assert not report.failures(only=("c",))
    report.assert_flat(only=("c",))
    with pytest.raises(AssertionError, match=r"(?s)width, a: slope 0\.500.*depth, b"):
        report.assert_flat()


def test_values_are_averaged_over_seeds_before_the_fit():
    def measure(*, width, seed):
        return {"a": width * (1.0 + seed)}

    report = coordinate_check(measure, widths=WIDTHS, seeds=(0, 2))
    np.testing.assert_allclose(report.means()["width"]["a"], 2 * np.array(WIDTHS))
    assert len(report.rows) == 6
    single = coordinate_check(measure, widths=(256, 32, 64, 64), seeds=[1])
    assert [row.size for row in single.rows] == [32, 64, 256]


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_value_without_a_logarithm_fails(bad):
    report = coordinate_check(
        lambda *, width, seed: {"a": bad if width == 64 else 1.0}, widths=WIDTHS
    )
    assert math.isnan(report.slopes()["width"]["a"])
    assert [f.quantity for f in report.failures(10.0)] == ["a"]


def test_expectations_move_and_lift_the_range():
    report = coordinate_check(power_law(a=0.5, b=-1.0), widths=WIDTHS)
    moved = report.expecting({"width": {"a": 0.45, "b": (-2.0, -0.9)}})
    moved.assert_slopes()
    assert len(moved.failures(0.01)) == 1  # bounds take no tolerance
    with pytest.raises(AssertionError, match="2 slopes"):
        moved.assert_flat()
    assert not report.expecting({"width": {"a": None, "b": -1}}).failures()
    assert len(report.failures()) == 2


def test_outliers_are_left_out():
    def measure(*, depth, seed):
        return {"a": 9.0 if depth == 2 else 1.0}

    report = coordinate_check(measure, depths=(2, 4, 8, 16))
    assert report.failures()
    report.select("depth", start=4).assert_flat()
    with pytest.raises(ValueError, match="depths: a slope needs at least 3"):
        report.select("depth", start=8)
    with pytest.raises(ValueError, match="widths: nothing"):
        report.select("width")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"widths": (32, 64)}, r"widths: .* at least 3 .*\(32, 64\)"),
        ({"widths": WIDTHS, "depths": (2, 4, 4)}, "depths: .* at least 3"),
        ({}, "widths and depths"),
        ({"widths": (0, 32, 64)}, "widths must be positive"),
        ({"widths": WIDTHS, "seeds": 0}, "seeds"),
        ({"widths": WIDTHS, "seeds": ()}, "seeds"),
        ({"widths": WIDTHS, "tolerance": 0.0}, "tolerance"),
    ],
)
def test_sizes_and_seeds_are_checked_before_anything_runs(kwargs, message):
    def measure(**_):
        pytest.fail("measured")

    with pytest.raises(ValueError, match=message):
        coordinate_check(measure, **kwargs)


def test_bad_measurements_are_named():
    with pytest.raises(ValueError, match=r"'h64' .* every width"):
        coordinate_check(
            lambda *, width, seed: {"a": 1.0} | ({"h64": 1.0} if width == 64 else {}),
            widths=WIDTHS,
        )
    with pytest.raises(ValueError, match="negative"):
        coordinate_check(lambda *, width, seed: {"a": -1.0}, widths=WIDTHS)
    with pytest.raises(ValueError, match=r"'a' must be one number, got shape \(2,\)"):
        coordinate_check(lambda *, width, seed: {"a": np.ones(2)}, widths=WIDTHS)
    with pytest.raises(ValueError, match="none given"):
        coordinate_check(lambda *, width, seed: {}, widths=WIDTHS)
    report = coordinate_check(power_law(a=0.0), widths=WIDTHS)
    with pytest.raises(ValueError, match=r"only: \['b'\] .* \['a'\]"):
        report.failures(only=("b",))
    with pytest.raises(ValueError, match=r"only .* list of names"):
        report.failures(only="a")
    with pytest.raises(ValueError, match="expected"):
        report.expecting({"depth": {"a": 0.0}})
    with pytest.raises(ValueError, match="expected"):
        report.expecting({"width": {"a": (1.0, 0.0)}})
    with pytest.raises(ValueError, match="tolerance"):
        report.assert_flat(-0.1)


def test_table_csv_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = coordinate_check(
        power_law(flat=0.0, grows=0.5), widths=WIDTHS, depths=(2, 4, 8)
    ).expecting({"depth": {"grows": None}})
    text = str(report)
    assert "FAIL: 1 slope out of range" in text
    (line,) = [line for line in text.splitlines() if line.endswith("FAIL")]
    assert line.split()[:5] == ["grows", "24", "33.94", "67.88", "+0.50"]
    assert "(not judged)" in text
    assert str(report.select("depth")).endswith("pass: all slopes")

    report.to_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = [
            Measurement(
                r["axis"],
                int(r["size"]),
                int(r["seed"]),
                r["quantity"],
                float(r["value"]),
            )
            for r in csv.DictReader(file)
        ]
    assert CoordinateReport(rows=tuple(rows)).slopes() == report.slopes()

    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_values_without_logarithm_still_appears(tmp_path):
    pytest.importorskip("matplotlib")
    report = coordinate_check(
        lambda *, width, seed: {"a": math.nan, "b": 0.0, "c": math.inf}, widths=WIDTHS
    )
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "nan" in str(report)


def test_changes_and_gradients_are_root_mean_squares():
    def apply(params, x, *, gain):
        return {"h": params["w"] * x, "nested": {"y": gain * params["w"]}}

    before, after = {"w": jnp.ones(4)}, {"w": jnp.array([1.0, 3.0, 1.0, 1.0])}
    x = jnp.full(4, 2.0)
    for function in (activation_changes, jax.jit(activation_changes, static_argnums=0)):
        found = function(apply, before, after, x, gain=3.0)
        assert {name: float(v) for name, v in found.items()} == {
            "h": pytest.approx(2.0),
            "nested/y": pytest.approx(3.0),
        }
    grads = {"a": jnp.full((2, 3), -2.0, jnp.bfloat16), "b": [jnp.array([3.0, 4.0])]}
    found = gradient_rms(grads)
    assert float(found["a"]) == 2.0
    assert found["a"].dtype == jnp.float32
    assert float(found["b/0"]) == pytest.approx(math.sqrt(12.5))
    with pytest.raises(ValueError, match=r"\['g', 'h'\]"):
        activation_changes(lambda p: {"h" if p else "g": 1.0}, {}, {"w": 1.0})


def synthetic(sizes=WIDTHS, **kwargs):
    """Gradients of w fall as 1/n and of its bias not at all."""

    def measure(*, width, seed):
        return {"w": 5.0 / width, "v": 1.0 / width, "bias": 2.0}

    def multipliers(*, width):
        per_layer = np.array([1.0, 2.0]).reshape(2, 1, 1)
        return {
            "w": Multiplier(eps=32.0 / width * per_layer / math.sqrt(2.0)),
            "v": Multiplier(eps=32.0 / width),
            "bias": Multiplier(),
        }

    return gradient_check(
        measure, kwargs.pop("multipliers", multipliers), widths=sizes, **kwargs
    )


def test_expected_slopes_are_the_exponents_of_eps():
    report = synthetic()
    expected = report.expected["width"]
    assert expected == {
        "w": pytest.approx(-1.0),
        "v": pytest.approx(-1.0),
        "bias": pytest.approx(0.0),
    }
    report.assert_slopes(1e-9)
    unscaled = synthetic(
        multipliers=lambda *, width: dict.fromkeys(("w", "v", "bias"), Multiplier())
    )
    assert [f.quantity for f in unscaled.failures()] == ["w", "v"]


def test_classes_replace_leaves():
    classes = {"w": "weight", "v": "weight", "bias": "bias"}
    report = synthetic(classes=classes)
    report.assert_slopes(1e-9)
    values = report.means()["width"]["weight"]
    np.testing.assert_allclose(values, math.sqrt(5.0) / np.array(WIDTHS), rtol=1e-12)
    assert synthetic(classes=classes.__getitem__).slopes() == report.slopes()
    with pytest.raises(ValueError, match="classes: no class for the leaf 'bias'"):
        synthetic(classes={"w": "weight", "v": "weight"})
    with pytest.raises(ValueError, match=r"'all' scales differently: 'bias': 0"):
        synthetic(classes=lambda name: "all")
    with pytest.raises(ValueError, match=r"multipliers: .* 32 .*\['bias', 'v'\]"):
        synthetic(multipliers=lambda *, width: {"w": Multiplier()})


def test_classes_join_blocks_that_are_not_stacked():
    def names(depth):
        return [f"blocks/{i}/w" for i in range(depth)]

    report = gradient_check(
        lambda *, depth, seed: dict.fromkeys(names(depth), 4.0 / depth),
        lambda *, depth: dict.fromkeys(names(depth), Multiplier(eps=2.0 / depth)),
        depths=(2, 4, 16),
        classes=lambda name: name.split("/")[-1],
    )
    assert report.expected == {"depth": {"w": pytest.approx(-1.0)}}
    report.assert_slopes(1e-9)
