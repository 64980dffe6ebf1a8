"""Groups of leaves give every optimiser of optax its per-leaf hyper-parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from diffmm._tree import map_with_name, named_leaves
from diffmm.optim.grouped import grouped
from diffmm.optim.rates import scale_beta
from diffmm.typing import Multiplier

FACTORS = {
    "embed": Multiplier(),
    "hidden": Multiplier(learning_rate=0.25, weight_decay=4.0, eps=0.5),
    "other": Multiplier(learning_rate=0.25, weight_decay=4.0, eps=0.5),
    "gain": Multiplier(b1=2.0, weight_decay=0.0),
    "bias": Multiplier(learning_rate=0.0),
}


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, 4), "hidden": (4, 4), "other": (4, 3), "gain": (4,)}
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in {**shapes, "bias": (3,)}.items()
    }


def train(tx, params, steps=6):
    @jax.jit
    def update(params, state, step):
        gradients = jax.tree.map(
            lambda p: jnp.sin(3 * p + step).astype(p.dtype) * 0.1, params
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(steps):
        params, state = update(params, state, step)
    return params, state


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(one, other, tolerance=1e-6):
    for name, leaf in named_leaves(one).items():
        np.testing.assert_allclose(
            leaf, named_leaves(other)[name], rtol=0, atol=tolerance, err_msg=name
        )


def cosine(count):
    return 0.5 * (1 + jnp.cos(count / 10.0))


def sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def lion(learning_rate, weight_decay, b1):
    return optax.lion(learning_rate, b1=b1, weight_decay=weight_decay)


def muon(learning_rate, weight_decay):
    return optax.contrib.muon(
        learning_rate,
        ns_steps=2,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
    )


MAKERS = {
    "sgd": (sgd, {}),
    "lion": (lion, {"weight_decay": 0.1, "b1": 0.9}),
    "muon": (muon, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_factors_of_one_are_the_plain_optimiser(maker):
    make, hyper = MAKERS[maker]
    params = make_params()
    expected = train(make(learning_rate=0.02, **hyper), params)
    ones = dict.fromkeys(FACTORS, Multiplier(eps=7.0, init_variance=3.0))
    assert_same_bits(
        train(grouped(make, ones, learning_rate=0.02, **hyper), params), expected
    )
    assert_same_bits(
        train(grouped(make, learning_rate=0.02, **hyper), params), expected
    )
    # Two groups that differ by a rounding error: the same training.
    split = {**ones, "embed": Multiplier(learning_rate=1 - 2**-53)}
    found, state = train(grouped(make, split, learning_rate=0.02, **hyper), params)
    assert set(state.inner_states) == {"group_0", "group_1"}
    assert_close(found, expected[0])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("schedule", [None, cosine])
def test_each_leaf_trains_as_if_alone_with_its_own_numbers(maker, schedule):
    make, hyper = MAKERS[maker]
    params = make_params()
    tx = grouped(make, FACTORS, learning_rate=0.02, schedule=schedule, **hyper)
    found, state = train(tx, params)
    # SGD is told of the learning rate alone, Muon not of b1.
    assert len(state.inner_states) == {"sgd": 3, "lion": 4, "muon": 4}[maker]
    for name, factors in FACTORS.items():
        own = {}
        if "weight_decay" in hyper:
            own["weight_decay"] = hyper["weight_decay"] * factors.weight_decay
        if "b1" in hyper:
            own["b1"] = scale_beta(hyper["b1"], factors.b1)
        peak = 0.02 * factors.learning_rate
        rate = peak if schedule is None else lambda c, peak=peak: peak * cosine(c)
        alone, _ = train(make(learning_rate=rate, **own), {name: params[name]})
        assert_close(alone, {name: found[name]})
    assert_same_bits(found["bias"], params["bias"])


LAYERS = {"learning_rate": [0.5, 1.0, 2.0], "weight_decay": [0.0, 1.0, 2.5]}


def make_muon(stacked):
    def numbers(params):
        dimensions = optax.contrib.MuonDimensionNumbers(
            *((1, 2) if stacked else (0, 1))
        )
        return jax.tree.map(
            lambda p: dimensions if p.ndim == 2 + stacked else None, params
        )

    def make(learning_rate, weight_decay):
        return optax.contrib.muon(
            learning_rate,
            ns_steps=2,
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=numbers,
        )

    return make


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("maker", ["lion", "muon"])
def test_stacked_layers_train_as_unrolled_ones(maker, dtype):
    rng = np.random.default_rng(0)
    stacked = {
        "w": jnp.asarray(rng.normal(size=(3, 4, 4)), dtype),
        "v": jnp.asarray(rng.normal(size=(3, 4, 2)), dtype),
        "gain": jnp.asarray(rng.normal(size=(3, 4)), dtype),
    }
    arrays = {
        name: Multiplier(
            **{
                field: np.reshape(values, (3, *[1] * (leaf.ndim - 1)))
                for field, values in LAYERS.items()
            }
        )
        for name, leaf in stacked.items()
    }
    unrolled = {f"{i}": {k: v[i] for k, v in stacked.items()} for i in range(3)}
    numbers = {
        f"{i}/{name}": Multiplier(**{k: values[i] for k, values in LAYERS.items()})
        for i in range(3)
        for name in stacked
    }
    makers = (optax.lion, optax.lion)
    if maker == "muon":
        makers = (make_muon(1), make_muon(0))
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "schedule": cosine}
    new, state = train(grouped(makers[0], arrays, **options), stacked)
    other, _ = train(grouped(makers[1], numbers, **options), unrolled)
    kinds = {x.dtype for x in jax.tree.leaves((new, state)) if x.ndim > 1}
    assert new["w"].dtype == dtype
    assert kinds <= {jnp.dtype(dtype), jnp.dtype(np.float32)}
    back = {
        name: jnp.stack([other[f"{i}"][name] for i in range(3)]) for name in stacked
    }
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (new, back))
    assert_close(*wide, 2e-6 if dtype == jnp.float32 else 5e-2)


def test_nnx_state_and_sharded_parameters():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    factors = {
        "kernel": Multiplier(learning_rate=0.5),
        "bias": Multiplier(weight_decay=0.0),
    }
    tx = grouped(
        optax.lion, factors, learning_rate=0.02, weight_decay=0.1, schedule=cosine
    )
    params = nnx.state(model, nnx.Param)
    expected, _ = train(tx, nnx.to_pure_dict(params))
    found, _ = train(tx, params)
    assert_close(nnx.to_pure_dict(found), expected)
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    sharded = jax.tree.map(lambda x: jax.device_put(x, place), nnx.to_pure_dict(params))
    assert_close(train(tx, sharded)[0], expected)
    pure = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
    updates, _ = tx.update(pure, tx.init(pure), pure)
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, params)
    assert_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        optax.apply_updates(pure, updates),
    )


def test_bad_input_is_named():
    params = make_params()

    def lion_of(factors):
        return grouped(lion, factors, learning_rate=0.02, b1=0.9, weight_decay=0.1)

    with pytest.raises(ValueError, match=r"no entry for the leaves \['embed'\]"):
        lion_of({k: v for k, v in FACTORS.items() if k != "embed"}).init(params)
    with pytest.raises(ValueError, match=r"match no leaf: \['head'\]"):
        lion_of({**FACTORS, "head": Multiplier()}).init(params)
    with pytest.raises(ValueError, match="learning_rate of leaf 'gain'"):
        lion_of({**FACTORS, "gain": Multiplier(learning_rate=-1.0)})
    per_layer = Multiplier(b1=np.array([[1.0], [1.0], [1.0], [2.0]]))
    with pytest.raises(ValueError, match="b1 of leaf 'hidden' must be one number"):
        lion_of({**FACTORS, "hidden": per_layer})
    tx = lion_of({**FACTORS, "gain": Multiplier(weight_decay=np.array([1.0, 2.0]))})
    with pytest.raises(ValueError, match="weight_decay of leaf 'gain' has shape"):
        tx.init(params)
    with pytest.raises(ValueError, match="nesterov"):
        grouped(optax.sgd, FACTORS, learning_rate=0.1, nesterov=True)
    with pytest.raises(ValueError, match="b1 must lie in"):
        grouped(lion, FACTORS, learning_rate=0.1, b1=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="beta_form"):
        grouped(optax.sgd, FACTORS, learning_rate=0.1, beta_form="cubic")
    # A part of the tree: the names of the rest may stay.
    some = optax.masked(
        lion_of(FACTORS), map_with_name(lambda name, _: name != "bias", params)
    )
    some.init(params)
