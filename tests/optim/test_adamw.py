"""AdamW per leaf: optax's state, optax's bits, and the identities of the theory."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from diffmm._tree import map_with_name, named_leaves
from diffmm.optim.adamw import adamw, mask_by_name
from diffmm.optim.clipping import clip_by_absorbed_norm
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.rates import scale_beta
from diffmm.training import Checkpointer
from diffmm.typing import Multiplier

HYPER = AdamW(learning_rate=0.02, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
FACTORS = {
    "embed": Multiplier(eps=0.25, b2=0.5),
    "blocks/query": Multiplier(learning_rate=0.3, eps=4.0, weight_decay=3.0),
    "blocks/value": Multiplier(learning_rate=1.7, b1=2.0),
    "blocks/gain": Multiplier(weight_decay=0.0, b1=0.3, b2=3.0),
    "bias": Multiplier(learning_rate=0.0),
}
NAMES = tuple(FACTORS)


def make_params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (3, 4, 2), "value": (3, 4, 4), "gain": (3, 4)}
    return {
        "embed": jnp.asarray(rng.normal(size=(5, 4)), dtype),
        "blocks": {
            k: jnp.asarray(rng.normal(size=v), dtype) for k, v in shapes.items()
        },
        "bias": jnp.asarray(rng.normal(size=3), dtype),
    }


def mixed_params():
    """Matrices and vectors of float32 and of bfloat16."""
    params = make_params()
    half = make_params(jnp.bfloat16)
    blocks = {**params["blocks"], "query": half["blocks"]["query"]}
    return {**params, "blocks": blocks, "bias": half["bias"]}


def gradients_of(params, step):
    """Any smooth function of parameters and step will do."""
    return jax.tree.map(lambda p: jnp.sin(3 * p + step).astype(p.dtype) * 0.1, params)


def train(tx, params, steps=10, gradients=gradients_of):
    @jax.jit
    def update(params, state, step):
        updates, state = tx.update(gradients(params, step), state, params)
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    for step in range(steps):
        params, state, updates = update(params, state, step)
    return params, state, updates


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(one, other, tolerance):
    for name, leaf in named_leaves(one).items():
        gap = np.abs(np.asarray(leaf, np.float64) - named_leaves(other)[name]).max()
        assert gap <= tolerance, (name, gap)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def cosine(count):
    return 0.5 * (1 + jnp.cos(count / 10.0))


VARIANTS = {
    "plain": {},
    "schedule": {"schedule": cosine},
    "mask": {"mask": is_matrix},
    "prefix mask": {"mask": {"embed": True, "blocks": True, "bias": False}},
    "schedule and mask": {"schedule": cosine, "mask": is_matrix},
    "eps_root": {"eps_root": 1e-7},
    "no decay": {"weight_decay": 0.0, "mask": is_matrix},
    "bfloat16 moment": {"mu_dtype": jnp.bfloat16, "schedule": cosine},
    "float32 moment": {"mu_dtype": "float32"},
}


def both(variant, multipliers=None):
    """The same variant of `adamw` and of ``optax.adamw``."""
    options = dict(VARIANTS[variant])
    fields = {k: options.pop(k) for k in ("eps_root", "weight_decay") if k in options}
    hyper = dataclasses.replace(HYPER, **fields)
    kinds = {k: options[k] for k in ("mask", "mu_dtype") if k in options}
    rate = hyper.learning_rate
    if "schedule" in options:
        rate = lambda count: hyper.learning_rate * cosine(count)  # noqa: E731
    plain = optax.adamw(
        rate,
        b1=hyper.b1,
        b2=hyper.b2,
        eps=hyper.eps,
        eps_root=hyper.eps_root,
        weight_decay=hyper.weight_decay,
        **kinds,
    )
    return adamw(hyper, multipliers, **options), plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_of_one_are_optax_bit_for_bit(variant):
    ones = dict.fromkeys(NAMES, Multiplier(learning_rate=np.ones(()), init_variance=9))
    params = mixed_params()
    expected = train(both(variant)[1], params)
    assert_same_bits(train(both(variant, ones)[0], params), expected)
    if variant == "schedule and mask":
        assert_same_bits(train(both(variant)[0], params), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_is_that_of_optax_and_nothing_is_promoted(variant):
    params = mixed_params()

    def result(tx):
        """Trees, shapes and types of the state, the updates and the next state."""
        state = jax.eval_shape(tx.init, params)
        return state, *jax.eval_shape(tx.update, params, state, params)

    ours, plain = both(variant, FACTORS)
    assert result(ours) == result(plain)
    assert_same_bits(ours.init(params), plain.init(params))


@pytest.mark.parametrize("variant", ["plain", "schedule and mask"])
def test_checkpoints_move_either_way(tmp_path, variant):
    params = make_params()
    transformations = dict(zip(("ours", "plain"), both(variant), strict=True))
    for name, other in (("ours", "plain"), ("plain", "ours")):
        _, state, _ = train(transformations[name], params, steps=3)
        with Checkpointer(tmp_path / name, asynchronous=False) as saver:
            saver.save(3, state)
        with Checkpointer(tmp_path / name) as reader:
            restored = reader.restore(transformations[other].init(params)).state
        assert_same_bits(restored, state)
        update = jax.jit(transformations[other].update)
        gradients = gradients_of(params, 3)
        expected = jax.jit(transformations[name].update)(gradients, state, params)
        assert_same_bits(update(gradients, restored, params), expected)


def optax_per_leaf(hyper, multipliers, form, schedule=lambda count: 1.0):
    """One ``optax.adamw`` per leaf, by name."""

    def one(m):
        return optax.adamw(
            lambda count: hyper.learning_rate * m.learning_rate * schedule(count),
            b1=scale_beta(hyper.b1, m.b1, form),
            b2=scale_beta(hyper.b2, m.b2, form),
            eps=hyper.eps * m.eps,
            eps_root=hyper.eps_root * m.eps**2,
            weight_decay=hyper.weight_decay * m.weight_decay,
        )

    return optax.partition(
        {name: one(m) for name, m in multipliers.items()},
        lambda tree: map_with_name(lambda name, _: name, tree),
    )


@pytest.mark.parametrize("form", ["exponential", "linear", "harmonic"])
def test_each_leaf_trains_as_if_alone_with_its_own_numbers(form):
    hyper = dataclasses.replace(HYPER, eps=1e-3, eps_root=1e-4)
    tx = adamw(hyper, FACTORS, schedule=cosine, beta_form=form)
    params = make_params()
    new, _, _ = train(tx, params)
    plain = optax_per_leaf(hyper, FACTORS, form, cosine)
    assert_close(new, train(plain, params)[0], 1e-6)
    assert_same_bits(new["bias"], params["bias"])  # learning rate 0


LAYERED = {
    "learning_rate": [0.5, 1.0, 2.0],
    "eps": [1.0, 8.0, 0.1],
    "weight_decay": [0.0, 1.0, 2.5],
    "b1": [1.0, 0.4, 2.0],
    "b2": [0.3, 1.0, 1.5],
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_stacked_layers_train_as_unrolled_ones(decay, dtype):
    hyper = dataclasses.replace(HYPER, eps=1e-2, decay=decay)
    stacked = make_params(dtype)["blocks"]
    multipliers = {
        name: Multiplier(
            **{
                field: np.reshape(values, (3, *[1] * (leaf.ndim - 1)))
                for field, values in LAYERED.items()
            }
        )
        for name, leaf in stacked.items()
    }
    unrolled = {f"{i}": {k: v[i] for k, v in stacked.items()} for i in range(3)}
    each = {
        f"{i}/{name}": Multiplier(**{k: values[i] for k, values in LAYERED.items()})
        for i in range(3)
        for name in stacked
    }
    new, state, _ = train(adamw(hyper, multipliers, schedule=cosine), stacked)
    other, _, _ = train(adamw(hyper, each, schedule=cosine), unrolled)
    assert {leaf.dtype for leaf in jax.tree.leaves((new, state[0].nu))} == {
        jnp.dtype(dtype)
    }
    back = {
        name: jnp.stack([other[f"{i}"][name] for i in range(3)]) for name in stacked
    }
    # bfloat16: fusions may keep more digits in one form than in the other.
    assert_close(new, back, 1e-6 if dtype == jnp.float32 else 2e-2)


def test_coupled_and_independent_decay_are_the_same_training():
    with jax.enable_x64(True):
        params = make_params(np.float64)
        independent = dataclasses.replace(
            HYPER,
            decay="independent",
            weight_decay=HYPER.learning_rate * HYPER.weight_decay,
        )
        for schedule in (None, cosine):
            make = functools.partial(adamw, multipliers=FACTORS, schedule=schedule)
            one, _, _ = train(make(HYPER), params, steps=30)
            other, _, _ = train(make(independent), params, steps=30)
            assert_close(one, other, 1e-12)


def regression(steps, hyper, a, dtype):
    """Trains W = a·w of a tanh regression from the same function; returns W."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(16, n)), dtype) for n in (8, 3))
    start = jnp.asarray(rng.normal(size=(8, 3)), dtype) / 3
    multiplier = Multiplier(learning_rate=1 / a, eps=a, weight_decay=a)
    tx = adamw(hyper, {"w": multiplier})

    def loss(params):
        return jnp.mean((jnp.tanh(x @ (a * params["w"])) - y) ** 2)

    params = {"w": start / a}
    new, _, _ = train(tx, params, steps, lambda params, step: jax.grad(loss)(params))
    return np.asarray(a * new["w"])


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_a_factor_may_live_in_the_model_or_in_the_weight(decay):
    hyper = dataclasses.replace(
        HYPER,
        learning_rate=0.01,
        eps=1e-3,
        eps_root=1e-5,
        decay=decay,
        weight_decay=0.1 if decay == "coupled" else 1e-3,
    )
    train_32 = functools.partial(regression, 50, hyper, dtype=np.float32)
    np.testing.assert_array_equal(train_32(a=0.25), train_32(a=1.0))
    with jax.enable_x64(True):
        train_64 = functools.partial(regression, 50, hyper, dtype=np.float64)
        np.testing.assert_array_equal(train_64(a=0.25), train_64(a=1.0))
        for a in (1 / 3, 10.0):
            np.testing.assert_allclose(train_64(a=a), train_64(a=1.0), atol=1e-12)


def test_bias_correction_survives_rates_near_zero_and_beta_zero():
    hyper = AdamW(learning_rate=1.0, b1=0.9, b2=0.999, eps=0.0)
    factors = {"slow": 1e-5, "layers": np.array([[1e-6], [1e-2]]), "same": 1.0}
    tx = adamw(hyper, {name: Multiplier(b1=f, b2=f) for name, f in factors.items()})
    params = {"slow": jnp.ones(3), "layers": jnp.ones((2, 3)), "same": jnp.ones(1)}
    gradients = jax.tree.map(lambda p: -0.3 * p, params)
    state = tx.init(params)
    for _ in range(3):  # a constant gradient: every average is the gradient itself
        updates, state = jax.jit(tx.update)(gradients, state, params)
        for name in ("slow", "layers"):
            np.testing.assert_allclose(updates[name], 1.0, rtol=2e-6)

    params = {"w": jnp.ones(2)}
    hyper = AdamW(learning_rate=1.0, b1=0.0, b2=0.0, eps=0.0)
    tx = adamw(hyper, {"w": Multiplier(b1=3.0, b2=0.1)})
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], -1.0)


def test_sharded_equals_unsharded_and_factors_are_constants():
    tx = adamw(HYPER, FACTORS, schedule=cosine)
    params = make_params()
    params["embed"] = jnp.ones((8, 4))
    expected, _, _ = train(tx, params)
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))

    def place(leaf):
        axis = next((i for i, n in enumerate(leaf.shape) if n % 4 == 0), None)
        spec = [None] * leaf.ndim
        if axis is not None:
            spec[axis] = "fsdp"
        return jax.device_put(
            leaf, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        )

    sharded = jax.tree.map(place, params)
    found, state, _ = train(tx, sharded)
    assert_close(found, expected, 1e-6)
    assert len(state[0].mu["embed"].sharding.device_set) == 4
    closed = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    assert not closed.consts


def test_runs_inside_scan_and_learning_rates_may_be_traced():
    params = make_params()

    @jax.jit
    @jax.vmap
    def sweep(rate):
        tx = adamw(
            dataclasses.replace(HYPER, learning_rate=1.0),
            FACTORS,
            schedule=lambda count: rate * cosine(count),
        )

        def step(carry, index):
            params, state = carry
            updates, state = tx.update(gradients_of(params, index), state, params)
            return (optax.apply_updates(params, updates), state), None

        (found, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(10))
        return found

    found = sweep(jnp.array([0.01, 0.02]))
    for index, rate in enumerate((0.01, 0.02)):
        hyper = dataclasses.replace(HYPER, learning_rate=rate)
        expected, _, _ = train(adamw(hyper, FACTORS, schedule=cosine), params)
        assert_close(jax.tree.map(lambda x, i=index: x[i], found), expected, 1e-6)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.value = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.tanh(x @ self.value[...]))


def test_nnx_optimizer_works_unchanged():
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    multipliers = {
        "value": Multiplier(learning_rate=0.5),
        "dense/kernel": Multiplier(eps=4.0),
        "dense/bias": Multiplier(weight_decay=0.0),
    }
    model = Block(nnx.Rngs(0))
    tx = adamw(HYPER, multipliers, mask=mask_by_name(["value", "dense/kernel"]))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)

    def loss(params, step):
        dense = params["dense"]
        y = jnp.tanh(x @ params["value"]) @ dense["kernel"] + dense["bias"][None]
        return jnp.sum(y**2)

    expected, _, _ = train(tx, start, 3, jax.grad(loss))
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(found, expected, 1e-6)
    # `nnx.State` itself is a pytree too: split, functional use.
    _, params = nnx.split(Block(nnx.Rngs(0)))
    assert_close(
        train(tx, params, 2, gradients_of)[0],
        train(tx, start, 2, gradients_of)[0],
        1e-6,
    )


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_linen_parameters_keep_their_boxes(box):
    axes = ("embed", "mlp")
    model = nn.Dense(3, kernel_init=box(nn.initializers.lecun_normal(), axes))
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    multipliers = {"kernel": Multiplier(learning_rate=0.5), "bias": Multiplier()}
    tx = adamw(HYPER, multipliers, mask=is_matrix, schedule=cosine)
    new, state, _ = train(tx, params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert new["kernel"].names == axes
    plain = optax.adamw(cosine, mask=is_matrix)
    assert_same_bits(jax.tree.map(jnp.zeros_like, state), plain.init(params))
    expected, _, _ = train(tx, nn.meta.unbox(params))
    assert_same_bits(nn.meta.unbox(new), expected)


class Attention(eqx.Module):
    value: jax.Array
    heads: int
    act: object = jnp.tanh


def test_equinox_modules_and_their_empty_places():
    model = {"attn": Attention(jnp.ones((2, 3)), 4), "frozen": jnp.ones(2)}
    params = eqx.filter(model, eqx.is_array)
    everything = dict.fromkeys(named_leaves(params), Multiplier(learning_rate=0.5))
    tx = adamw(HYPER, everything)
    new, _, _ = train(tx, params)
    assert isinstance(eqx.combine(new, model)["attn"], Attention)
    # A part of the model: the multipliers of all of it still serve.
    part = {"attn": params["attn"], "frozen": None}
    tuned, _, _ = train(tx, part)
    assert tuned["frozen"] is None
    assert_same_bits(tuned["attn"].value, new["attn"].value)


def test_works_on_parts_of_a_tree_and_under_tree_map_params():
    params = make_params()
    tx = adamw(HYPER, FACTORS, mask=is_matrix)
    vectors = map_with_name(lambda name, _: name == "bias", params)
    parts = optax.partition({True: optax.sgd(0.1), False: tx}, vectors)
    new, _, _ = train(parts, params)
    expected, _, _ = train(tx, params)
    assert_same_bits(new["blocks"], expected["blocks"])
    state = tx.init(params)
    doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert float(doubled[0].mu["bias"][0]) == 1.0
    chained = optax.chain(optax.clip_by_global_norm(1.0), tx)
    train(chained, params, steps=1)


def one(**factors):
    return {**FACTORS, "blocks/query": Multiplier(**factors)}


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        (one(learning_rate=-1.0), "learning_rate of leaf 'blocks/query'"),
        (one(eps=0.0), "eps of leaf 'blocks/query' must be finite and positive"),
        (one(b2=float("nan")), "b2 of leaf 'blocks/query'"),
        (one(weight_decay=np.array([1.0, np.inf])), "weight_decay of leaf"),
        (
            one(weight_decay=1e4),
            "learning_rate \\* weight_decay of leaf 'blocks/query'",
        ),
        ({**FACTORS, "bias": 1.0}, "leaf 'bias' must have a Multiplier"),
        (one(b1=[0.5, 1.0, 1.0]), "b1 of leaf 'blocks/query' has shape \\(3,\\)"),
        (
            one(eps=np.arange(1.0, 3.0).reshape(2, 1, 1)),
            "eps.*\\(2, 1, 1\\).*\\(3, 4, 2",
        ),
        ({k: FACTORS[k] for k in NAMES[:3]}, "no entry .*'bias', 'blocks/gain'"),
        ({**FACTORS, "head": Multiplier()}, "match no leaf: \\['head'\\]"),
    ],
)
def test_bad_multipliers_are_named(multipliers, message):
    with pytest.raises(ValueError, match=message):
        adamw(HYPER, multipliers).init(make_params())
    params = make_params()
    with pytest.raises(ValueError, match=message):
        adamw(HYPER, multipliers).update(params, optax.adamw(1e-3).init(params), params)


def test_bad_arguments_are_named():
    params = make_params()
    tx = adamw(HYPER, FACTORS)
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"b1 of leaf 'w'.*linear"):
        adamw(HYPER, {"w": Multiplier(b1=20.0)}, beta_form="linear")
    with pytest.raises(ValueError, match="beta_form"):
        adamw(HYPER, beta_form="quadratic")
    with pytest.raises(ValueError, match="schedule"):
        adamw(HYPER, schedule=0.5)
    with pytest.raises(ValueError, match="schedule must return a scalar"):
        train(adamw(HYPER, schedule=lambda count: jnp.ones(2)), params)
    with pytest.raises(ValueError, match="hyper must be an AdamW"):
        adamw(1e-3)
    with pytest.raises(ValueError, match="mask: no leaf decays"):
        adamw(HYPER, mask=lambda p: jax.tree.map(lambda x: False, p)).init(params)
    with pytest.raises(ValueError, match="match no leaf: \\['nowhere'\\]"):
        adamw(HYPER, mask=mask_by_name(["nowhere"])).init(params)


def test_clipping_ignores_where_factors_live():
    params = make_params()
    gradients = gradients_of(params, 0)
    plain = optax.clip_by_global_norm(0.3)
    ours = clip_by_absorbed_norm(0.3, {})
    for scale in (0.01, 1.0):
        scaled = jax.tree.map(lambda g, s=scale: g * s, gradients)
        assert_same_bits(
            jax.jit(ours.update)(scaled, ours.init(params)),
            jax.jit(plain.update)(scaled, plain.init(params)),
        )
    # W = a·w: the gradient of w is a times that of W.
    layers = np.array([0.5, 0.25, 0.125]).reshape(3, 1)
    factors = {"embed": 0.25, "blocks/gain": layers}
    explicit = map_with_name(
        lambda name, g: g * jnp.asarray(factors.get(name, 1.0), g.dtype), gradients
    )
    expected, _ = jax.jit(plain.update)(explicit, plain.init(params))
    clip = clip_by_absorbed_norm(0.3, factors)
    found, _ = jax.jit(clip.update)(gradients, clip.init(params))
    found = map_with_name(
        lambda name, g: g * jnp.asarray(factors.get(name, 1.0), g.dtype), found
    )
    assert_close(found, expected, 1e-7)
    with pytest.raises(ValueError, match=r"absorbed.*'head'"):
        clip_by_absorbed_norm(1.0, {"head": 0.5}).update(gradients, optax.EmptyState())
    with pytest.raises(ValueError, match="absorbed of leaf 'embed'"):
        clip_by_absorbed_norm(1.0, {"embed": 0.0})
    with pytest.raises(ValueError, match="max_norm"):
        clip_by_absorbed_norm(0.0, {})
