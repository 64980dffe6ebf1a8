"""Sharded calls: by the compiler, by explicit meshes, and inside `shard_map`.

A stand-in for a kernel records the shapes that it is traced with: those of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffmm_kernels.sigmoid_attention import dispatch, reference, sigmoid_attention
from diffmm_kernels.sigmoid_attention.arguments import Gradients
from diffmm_kernels.sigmoid_attention.sharded import sigmoid_attention_sharded

B, T, S, D, E = 4, 6, 10, 8, 6

rng = np.random.default_rng(0)
KV_LENGTHS = np.array([10, 3, 9, 7])
MASK = rng.random((B, 1, T, S)) < 0.8


class Recorder:
    """The definition in the place of a kernel."""

    def __init__(self):
        self.seen = {}

    def supports(self, operands, options):
        return None

    def forward(self, operands, options):
        self.seen["forward"] = operands.q.shape, operands.k.shape
        return reference.forward(operands, options)

    def backward(self, operands, options, do, needs):
        self.seen["backward"] = operands.q.shape, operands.k.shape
        wanted = {"q", "k", "v", *(x for x in needs._fields if getattr(needs, x))}
        given = {name: getattr(operands, name) for name in wanted}

        def forward(given):
            return reference.forward(operands._replace(**given), options)

        return Gradients(**jax.vjp(forward, given)[1](do)[0])


@pytest.fixture
def recorder(monkeypatch):
    kernel, real = Recorder(), dispatch.implementation
    monkeypatch.setattr(
        dispatch,
        "implementation",
        lambda name: kernel if name == "mosaic_tpu" else real(name),
    )
    # Calls are compiled once for each choice and shape.
    jax.clear_caches()
    yield kernel
    jax.clear_caches()


@functools.cache
def arrays(h, kv_heads):
    return tuple(
        rng.standard_normal(shape).astype(np.float32)
        for shape in (
            *((B, T, h, D), (B, S, kv_heads, D), (B, S, kv_heads, E)),
            *((h,), (1, h, 1, S)),
        )
    )


def attend(q, k, v, bias, logit_bias, implementation):
    return sigmoid_attention(
        *(q, k, v),
        bias=bias,
        logit_bias=logit_bias,
        causal=True,
        q_offset=S - T,
        mask=MASK,
        kv_lengths=KV_LENGTHS,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(*x, implementation):
    def loss(*x):
        o = attend(*x, implementation)
        return jnp.sin(o).sum(), o

    gradients, o = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*x)
    return o, *gradients


@functools.cache
def expected(h, kv_heads):
    return value_and_gradients(*arrays(h, kv_heads), implementation="reference")


def check(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def make_mesh(sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(kind, kind))


def placed(mesh, h, kv_heads, spec):
    """As a program leaves them: keys sharded like queries where heads allow it."""
    heads = spec[2] if spec[2] == "model" else None
    if kv_heads % mesh.shape["model"]:
        heads = None
    specs = (
        *(spec, PartitionSpec(spec[0], None, heads), PartitionSpec(spec[0])),
        *(PartitionSpec(), PartitionSpec()),
    )
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays(h, kv_heads), specs, strict=True)
    ]


@pytest.mark.parametrize(
    ("heads", "sizes", "spec", "local"),
    [
        ((4, 2), (2, 2), ("data", None, "model"), (2, 2, 1)),
        ((4, 1), (2, 2), ("data", None, "model"), (2, 2, 1)),
        # Both axes over the heads: the second one over queries alone.
        ((4, 2), (2, 2), (None, None, ("data", "model")), (4, 1, 1)),
        # More devices than heads of keys: each takes the one it needs.
        ((8, 2), (1, 4), ("data", None, "model"), (4, 2, 1)),
        # Sequences and head sizes come together on every device.
        ((4, 4), (2, 2), ("data", "model", None), (2, 4, 4)),
    ],
)
def test_a_kernel_runs_on_shards(recorder, heads, sizes, spec, local):
    mesh = make_mesh(sizes)
    x = placed(mesh, *heads, PartitionSpec(*spec))
    got = value_and_gradients(*x, implementation="mosaic_tpu")
    check(got, expected(*heads))
    b, h, kv_heads = local
    shapes = (b, T, h, D), (b, S, kv_heads, D)
    assert recorder.seen == {"forward": shapes, "backward": shapes}
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    assert got[0].sharding.is_equivalent_to(sharding, 4)
    assert got[1].sharding.is_equivalent_to(sharding, 4)


def test_a_kernel_on_shards_of_a_vmap(recorder):
    mesh = make_mesh((2, 2))
    q, k, v, bias, _ = arrays(4, 2)
    qs = jax.device_put(np.stack([q, -q]), NamedSharding(mesh, PartitionSpec("data")))

    def one(q, implementation):
        return sigmoid_attention(q, k, v, bias=bias, implementation=implementation)

    got = jax.jit(jax.vmap(lambda q: one(q, "mosaic_tpu")))(qs)
    check(got, [one(x, "reference") for x in (q, -q)])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_plain_jax_on_shards(implementation):
    x = placed(make_mesh((2, 2)), 4, 2, PartitionSpec("data", None, "model"))
    got = value_and_gradients(*x, implementation=implementation)
    check(got, expected(4, 2))
    assert got[0].sharding.shard_shape(got[0].shape) == (B // 2, T, 2, E)
    text = value_and_gradients.lower(*x, implementation=implementation).compile()
    # Only gradients of what devices share, the two biases, are summed over them.
    assert "all-gather" not in text.as_text()


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_explicit_meshes(recorder, implementation):
    mesh = make_mesh((2, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = placed(mesh, 4, 2, PartitionSpec("data", None, "model"))
        o, *gradients = value_and_gradients(*x, implementation=implementation)
    assert jax.typeof(o).sharding.spec == PartitionSpec("data", None, "model", None)
    check((o, *gradients), expected(4, 2))
    if implementation == "mosaic_tpu":
        assert recorder.seen["forward"] == ((2, T, 2, D), (2, S, 1, D))


@pytest.mark.parametrize(
    ("implementation", "axes"),
    [("xla", {"data", "model"}), ("mosaic_tpu", {"data", "model"}), ("xla", {"data"})],
)
def test_inside_shard_map(recorder, implementation, axes):
    """Replication is checked; the bias, common to "data", gets its gradient summed."""
    heads = "model" if "model" in axes else None
    spec = PartitionSpec("data", None, heads)
    run = jax.shard_map(
        lambda q, k, v, bias: sigmoid_attention(
            q, k, v, bias=bias, causal=True, implementation=implementation
        ),
        mesh=make_mesh((2, 2)),
        axis_names=axes,
        in_specs=(spec, spec, spec, PartitionSpec(heads)),
        out_specs=spec,
    )

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(f, *x):
        return jax.grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2, 3))(*x)

    def plain(q, k, v, bias):
        return sigmoid_attention(
            q, k, v, bias=bias, causal=True, implementation="reference"
        )

    x = arrays(4, 2)[:4]
    check(gradients(run, *x), gradients(plain, *x))


def test_export_of_a_partitioned_call_is_the_kernel_alone(recorder):
    """On one device nothing of the partitioning is left in the program."""
    from jax import export

    call = jax.jit(functools.partial(attend, implementation="mosaic_tpu"))
    for platform in ("cpu", "tpu", "cuda"):
        exported = export.export(call, platforms=[platform])(*arrays(4, 2))
        assert "CustomSPMDPartitioning" not in exported.mlir_module()
    exported = export.export(call, platforms=["cpu"])(*arrays(4, 2))
    np.testing.assert_array_equal(exported.call(*arrays(4, 2)), call(*arrays(4, 2)))


def test_serialised_export():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    from jax import export

    call = jax.jit(functools.partial(attend, implementation="xla"))
    blob = export.export(call)(*arrays(4, 2)).serialize()
    again = export.deserialize(blob)
    np.testing.assert_array_equal(again.call(*arrays(4, 2)), call(*arrays(4, 2)))


def test_export_for_several_devices_goes_by_shard_map():
    """What the compiler partitions calls back to Python, which cannot be exported."""
    from jax import export

    q, k, v, *_ = arrays(4, 2)

    @jax.jit
    def call(q, k, v):
        return sigmoid_attention_sharded(
            *(q, k, v), bias=-2.0, mesh=make_mesh((2, 2)), axes={"heads": "model"}
        )

    exported = export.export(call)(q, k, v)
    assert exported.nr_devices == 4
    everywhere = NamedSharding(make_mesh((2, 2)), PartitionSpec())
    o = exported.call(*jax.device_put((q, k, v), everywhere))
    np.testing.assert_array_equal(o, call(q, k, v))


def test_a_real_kernel_on_shards():
    """In Pallas' interpreter, which stands for the device."""
    q, k, v, *_ = arrays(4, 2)
    mesh = make_mesh((2, 2))
    rows = NamedSharding(mesh, PartitionSpec("data", None, "model"))

    @functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
    def call(q, k, v, **arguments):
        return sigmoid_attention(q, k, v, bias=-2.0, causal=True, **arguments)

    want = call(q, k, v, implementation="reference")
    sharded = [jax.device_put(x, rows) for x in (q, k, v)]
    got = call(*sharded, implementation="mosaic_tpu", interpret=True)
    # float32 with the kernels' polynomial of degree 6: 1.1e-5 relative.
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert got.sharding.is_equivalent_to(rows, 4)
