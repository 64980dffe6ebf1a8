"""Per-module factors: interpolation over depth, application to leaves, bad input."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmm.parameterisation.absorb import absorbed
from diffmm.parameterisation.infer import infer
from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.parameterisation.per_module import PerModule, interpolate_depth
from diffmm.parameterisation.rules import CompletedP, evaluate
from diffmm.typing import Multiplier

LISTED = [1.2, 1.0, 1.0, 0.8, 0.8, 0.9, 1.0, 1.1]
factors = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)
modes = st.sampled_from(["log", "linear"])


def leaf(name, module, shape, **fields):
    return Leaf(name=name, role=Role.HIDDEN, module=module, shape=shape, **fields)


def model(num_layers=4, stacked=True):
    """Leaves of a tiny decoder, its layers stacked or one by one."""
    shapes = {
        "query": ("attn.q", (8, 2, 4), ""),
        "output": ("attn.o", (2, 4, 8), "attn.res"),
        "down": ("mlp.down", (16, 8), "mlp.res"),
        "gain": ("attn.pre_norm", (8,), ""),
    }
    leaves = [leaf("embedding", "embed", (11, 8))]
    for name, (module, shape, residual) in shapes.items():
        fields = {"in_block": True, "num_layers": num_layers, "residual": residual}
        if stacked:
            leaves.append(
                leaf(
                    f"blocks/{name}",
                    module,
                    (num_layers, *shape),
                    stack_axis=0,
                    **fields,
                )
            )
        else:
            leaves += [
                leaf(f"block_{i}/{name}", module, shape, layer=i, **fields)
                for i in range(num_layers)
            ]
    return {item.name: item for item in leaves}


def ones(leaves):
    return {name: Multiplier() for name in leaves}


TUNED = PerModule(
    type={
        "attn.q": {"learning_rate": 1.6, "b1": 0.5, "eps": 3.0},
        "embed": {"learning_rate": 4.0, "weight_decay": 0.0, "init_std": 0.5},
        "attn.res": {"residual": 0.7},
        "mlp.res": {"residual": 2.0},
    },
    depth={
        "learning_rate": [1.2, 1.0, 0.8, 0.5],
        "init_std": [1.0, 2.0, 3.0, 4.0],
        "residual": [1.0, 0.9, 0.9, 1.5],
    },
)


def test_golden_interpolation():
    np.testing.assert_allclose(
        interpolate_depth(LISTED, 4), [1.2, 0.928318, 0.865350, 1.1], atol=5e-7
    )
    np.testing.assert_allclose(
        interpolate_depth(LISTED, 4, "linear"),
        [1.2, 0.933333, 0.866667, 1.1],
        atol=5e-7,
    )
    np.testing.assert_allclose(
        interpolate_depth(LISTED, 16)[:8],
        [1.2, 1.102123, 1.012229, 1, 1, 0.928318, 0.836512, 0.8],
        atol=5e-7,
    )


@given(values=factors, num_layers=st.integers(1, 40), mode=modes)
@settings(deadline=None)
def test_interpolation_invariants(values, num_layers, mode):
    result = interpolate_depth(values, num_layers, mode)
    assert result.shape == (num_layers,)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(interpolate_depth(values, len(values), mode), values)
    if num_layers > 1:
        assert result[0] == values[0]
        assert len(values) == 1 or result[-1] == values[-1]
    # 1e-12 relative: rounding of the power.
    assert np.all(result >= min(values) * (1 - 1e-12))
    assert np.all(result <= max(values) * (1 + 1e-12))
    rising = interpolate_depth(sorted(values), num_layers, mode)
    assert np.all(np.diff(rising) >= -1e-12 * rising[1:])
    constant = [values[0]] * len(values)
    assert set(interpolate_depth(constant, num_layers, mode)) == {values[0]}


@given(values=factors, num_layers=st.integers(1, 20))
@settings(deadline=None)
def test_log_interpolation_commutes_with_reciprocals(values, num_layers):
    inverse = interpolate_depth([1 / value for value in values], num_layers)
    np.testing.assert_allclose(
        inverse, 1 / interpolate_depth(values, num_layers), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("values", "mode", "middle"),
    [
        ([1.0, 4.0], "log", 2.0),
        ([1.0, 4.0], "linear", 2.5),
        ([9.0, 3.0, 1.0], "log", 3.0),
    ],
)
def test_one_layer_takes_the_middle(values, mode, middle):
    np.testing.assert_allclose(interpolate_depth(values, 1, mode), [middle], rtol=1e-14)


def test_zero_factors_interpolate_only_linearly():
    zero = [0.0, 0.0, 1.0]
    np.testing.assert_array_equal(interpolate_depth(zero, 3), zero)
    np.testing.assert_array_equal(interpolate_depth([0.0, 0.0], 5), np.zeros(5))
    np.testing.assert_allclose(
        interpolate_depth(zero, 5, "linear"), [0, 0, 0, 0.5, 1], atol=1e-15
    )
    with pytest.raises(ValueError, match="interpolation='linear'"):
        interpolate_depth(zero, 5)
    frozen = PerModule(depth={"learning_rate": zero})
    with pytest.raises(ValueError, match=r"depth\['learning_rate'\].*'linear'"):
        frozen.apply(model(5), ones(model(5)), absorb_residual=False)


def test_identity_changes_nothing():
    leaves = model()
    before = {name: Multiplier(learning_rate=0.3, eps=0.1) for name in leaves}
    neutral = PerModule(
        type={"attn.q": {"b2": 1.0}, "*": {"init_std": 1.0}},
        depth={"weight_decay": [1.0] * 7, "residual": [1.0]},
    )
    for per_module in (PerModule(), neutral):
        for absorb_residual in (False, True):
            after = per_module.apply(leaves, before, absorb_residual=absorb_residual)
            assert after == before  # numbers still, not arrays of ones
            assert list(after) == list(before)


def test_factors_of_a_stacked_leaf():
    leaves = model()
    base = {name: Multiplier(learning_rate=0.25, init_variance=2.0) for name in leaves}
    after = TUNED.apply(leaves, base, absorb_residual=False)
    query = after["blocks/query"]
    assert query.learning_rate.shape == (4, 1, 1, 1)
    np.testing.assert_allclose(
        query.learning_rate.ravel(), 0.25 * 1.6 * np.array([1.2, 1.0, 0.8, 0.5])
    )
    np.testing.assert_allclose(query.init_variance.ravel(), [2.0, 8.0, 18.0, 32.0])
    assert (query.b1, query.b2, query.eps, query.forward) == (0.5, 1.0, 3.0, 1.0)
    # Outside blocks there is no depth factor, and a zero decay is legal.
    assert after["embedding"] == Multiplier(
        learning_rate=1.0, weight_decay=0.0, init_variance=0.5
    )


@pytest.mark.parametrize("absorb_residual", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3, 4, 6])
def test_stacked_equals_unrolled(num_layers, absorb_residual):
    stacked, unrolled = model(num_layers), model(num_layers, stacked=False)
    one = TUNED.apply(stacked, ones(stacked), absorb_residual=absorb_residual)
    many = TUNED.apply(unrolled, ones(unrolled), absorb_residual=absorb_residual)
    for name, multiplier in many.items():
        index, _, suffix = name.partition("/")
        if not suffix:
            assert one[name] == multiplier
            continue
        layer = int(index.removeprefix("block_"))
        for field, value in dataclasses.asdict(multiplier).items():
            assert isinstance(value, float)
            array = getattr(one[f"blocks/{suffix}"], field)
            whole = np.broadcast_to(np.ravel(array), num_layers)
            assert whole[layer] == value, (name, field)


def test_layers_stacked_on_another_axis():
    middle = leaf("w", "attn.q", (8, 4, 8), stack_axis=1, in_block=True, num_layers=4)
    last = dataclasses.replace(middle, name="v", shape=(8, 8, 4), stack_axis=-1)
    leaves = {"w": middle, "v": last}
    tuned = PerModule(depth={"learning_rate": [1.0, 2.0]})
    after = tuned.apply(leaves, ones(leaves), absorb_residual=False)
    assert after["w"].learning_rate.shape == (1, 4, 1)
    assert after["v"].learning_rate.shape == (1, 1, 4)


def test_residual_multipliers_of_a_model_that_takes_them():
    np.testing.assert_allclose(
        TUNED.residual("attn.res", 4), 0.7 * np.array([1.0, 0.9, 0.9, 1.5])
    )
    assert TUNED.residual("mlp.res", 7).shape == (7,)
    np.testing.assert_array_equal(PerModule().residual("attn.res", 3), np.ones(3))
    with pytest.raises(ValueError, match=r"attn\.res.*'attn\.q'"):
        TUNED.residual("attn.q", 4)
    with pytest.raises(ValueError, match="num_layers"):
        TUNED.residual("attn.res", 0)


def test_absorbed_residual_multipliers():
    leaves = model()
    base = {name: Multiplier(forward=0.5) for name in leaves}
    plain = dataclasses.replace(TUNED, type={}, depth={})
    tuned = dataclasses.replace(
        plain,
        type={"attn.res": {"residual": 0.7}},
        depth={"residual": [1.0, 0.9, 0.9, 1.5]},
    )
    after = tuned.apply(leaves, base, absorb_residual=True)
    a = tuned.residual("attn.res", 4).reshape(4, 1, 1, 1)
    output = after["blocks/output"]
    np.testing.assert_allclose(output.init_variance, a**2)
    np.testing.assert_allclose(output.learning_rate, a)
    np.testing.assert_allclose(output.eps, 1 / a)
    np.testing.assert_allclose(output.weight_decay, 1 / a)
    assert output.forward == 0.5  # the rule's own, untouched
    down = after["blocks/down"]
    assert down.learning_rate.shape == (4, 1, 1)
    np.testing.assert_allclose(down.learning_rate.ravel(), [1.0, 0.9, 0.9, 1.5])
    assert after["blocks/query"] == base["blocks/query"]

    # Noted in `forward`, and absorbed together with the rule's: the same in the end.
    noted = tuned.apply(leaves, base, absorb_residual=False)
    np.testing.assert_allclose(noted["blocks/output"].forward, 0.5 * a)
    for name, both in absorbed(noted, leaves).items():
        other = absorbed(after, leaves)[name]
        for field in ("init_variance", "learning_rate", "eps", "weight_decay"):
            np.testing.assert_allclose(
                getattr(both, field), getattr(other, field), rtol=1e-14
            )


def test_every_module_at_once():
    leaves = model(stacked=False)
    both = PerModule(
        type={"*": {"eps": 2.0, "residual": 3.0}, "attn.q": {"eps": 5.0}}
    ).apply(leaves, ones(leaves), absorb_residual=False)
    assert both["embedding"].eps == 2.0
    assert both["block_1/query"].eps == 10.0
    assert both["block_1/down"].forward == 3.0


def test_real_leaves_at_twice_the_size():
    nnx = pytest.importorskip("flax.nnx")
    models = pytest.importorskip("diffmm.models")

    def make(size):
        width, num_layers = size
        config = models.TransformerConfig(
            vocabulary_size=16, width=width, num_layers=num_layers, head_dim=4
        )
        return nnx.split(models.Denoiser(config, rngs=nnx.Rngs(0)))[1]

    leaves = infer(make, (8, 2), (16, 4), family=((8, 2), (16, 4)))
    multipliers = evaluate(CompletedP(), leaves)
    tuned = PerModule(
        type={leaf.module: {"learning_rate": 2.0} for leaf in leaves.values()},
        depth={"learning_rate": [1.0, 8.0]},
    )
    after = tuned.apply(leaves, multipliers, absorb_residual=True)
    assert after["embedding"].learning_rate == 2.0
    assert after["blocks/mlp/up"].learning_rate.shape == (4, 1, 1)
    np.testing.assert_allclose(
        after["blocks/mlp/up"].learning_rate.ravel(), [1.0, 2.0, 4.0, 8.0]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": {"attn.q": {"lr": 1.0}}}, r"type\['attn.q'\].*'lr'"),
        ({"type": {"attn.q": {"residual": 1.0}}}, r"type\['attn.q'\].*'residual'"),
        ({"type": {"attn.res": {"eps": 1.0}}}, r"type\['attn.res'\].*'eps'"),
        ({"type": {"embed": {"eps": 0.0}}}, r"\['eps'\] must be finite and positive"),
        ({"type": {"embed": {"b1": 0}}}, r"\['b1'\] must be finite and positive"),
        ({"type": {"embed": {"init_std": 0.0}}}, "init_std"),
        ({"type": {"mlp.res": {"residual": 0.0}}}, "residual"),
        ({"type": {"embed": {"weight_decay": -0.1}}}, "at least 0, got -0.1"),
        ({"type": {"embed": {"learning_rate": float("nan")}}}, "learning_rate"),
        ({"type": {"embed": {"learning_rate": float("inf")}}}, "got inf"),
        ({"type": {"embed": {"learning_rate": "high"}}}, "must be a number"),
        ({"type": {"embed": 2.0}}, r"type\['embed'\] must be a mapping"),
        ({"type": [1.0]}, "type must be a mapping"),
        ({"depth": {"momentum": [1.0]}}, "depth: .*'momentum'"),
        ({"depth": {"eps": []}}, r"depth\['eps'\] .*empty list"),
        ({"depth": {"eps": 1.0}}, r"depth\['eps'\] must list one factor a layer"),
        ({"depth": {"eps": [1.0, -1.0]}}, r"depth\['eps'\]\[1\].*-1.0"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*'cubic'"),
    ],
)
def test_bad_factors_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PerModule(**fields)


def test_bad_application_is_named():
    leaves = model()
    by_depth = PerModule(depth={"eps": [1.0, 2.0]})

    def fails(per_module, leaves, message, multipliers=None):
        with pytest.raises(ValueError, match=message):
            per_module.apply(leaves, multipliers or ones(leaves), absorb_residual=False)

    unknown = PerModule(type={"attn.qq": {"eps": 2.0}})
    fails(unknown, leaves, re.escape("no leaf has the module 'attn.qq'"))
    no_branch = {"embedding": leaves["embedding"]}
    fails(PerModule(type={"attn.res": {"residual": 2.0}}), no_branch, "attn.res")
    fails(by_depth, no_branch, r"depth\['eps'\]: no leaf lies in a block")
    fails(PerModule(depth={"residual": [2.0]}), no_branch, r"depth\['residual'\]")
    fails(PerModule(), leaves, "missing .*embedding", {"x": Multiplier()})
    lost = {"w": leaf("w", "attn.q", (8, 8), in_block=True, num_layers=2)}
    fails(by_depth, lost, r"'w'.*neither layer nor stack_axis")
    wrong = {"w": dataclasses.replace(lost["w"], stack_axis=0)}
    fails(by_depth, wrong, r"'w'.*\(8, 8\) counts 8 layers, num_layers is 2")
    beyond = {"w": dataclasses.replace(lost["w"], layer=2)}
    fails(by_depth, beyond, r"'w'.*layer must lie in \[0, 2\)")
    with pytest.raises(ValueError, match="num_layers"):
        interpolate_depth([1.0], 0)
    with pytest.raises(ValueError, match="interpolation"):
        interpolate_depth([1.0], 1, "cubic")
