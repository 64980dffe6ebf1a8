"""Cross-entropy through the unembedding: values, gradients, domain, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.diffusion import cross_entropy

WIDTH, VOCABULARY = 8, 20
EXCLUDED = np.zeros(VOCABULARY, bool)
EXCLUDED[[3, 19]] = True
ALLOWED = np.zeros((3, VOCABULARY), bool)
ALLOWED[0, :8] = ALLOWED[1, 8:14] = ALLOWED[2, 14:] = True


@pytest.fixture(scope="module")
def inputs():
    """hidden [3, 7, D], unembedding, targets in their class's domain, classes."""
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(3, 7, WIDTH)).astype(np.float32)
    unembedding = generator.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    classes = generator.integers(0, 3, (3, 7)).astype(np.int8)
    domain = ALLOWED & ~EXCLUDED
    targets = np.vectorize(lambda c: generator.choice(np.flatnonzero(domain[c])))(
        classes
    )
    return hidden, unembedding, targets.astype(np.int32), classes


def naive(hidden, unembedding, targets, keep):
    """float64 reference; ``keep`` is bool ``[..., V]``."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    logits = np.where(keep, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    log_normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return log_normaliser - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


DOMAINS = ["full", "excluded", "allowed", "both"]


def options(domain, classes):
    excluded = EXCLUDED if domain in ("excluded", "both") else None
    allowed = ALLOWED if domain in ("allowed", "both") else None
    keep = np.ones((*classes.shape, VOCABULARY), bool)
    if excluded is not None:
        keep &= ~excluded
    if allowed is not None:
        keep &= allowed[classes]
    return keep, {
        "excluded": excluded,
        "allowed": allowed,
        "classes": None if allowed is None else classes,
    }


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 20, 21])
def test_values(inputs, domain, chunk_size):
    hidden, unembedding, targets, classes = inputs
    keep, kwargs = options(domain, classes)
    nll = cross_entropy(hidden, unembedding, targets, chunk_size=chunk_size, **kwargs)
    assert nll.dtype == jnp.float32
    assert nll.shape == (3, 7)
    np.testing.assert_allclose(
        nll, naive(hidden, unembedding, targets, keep), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_gradients(inputs, domain, chunk_size):
    hidden, unembedding, targets, classes = inputs
    keep, kwargs = options(domain, classes)
    weight = np.random.default_rng(1).uniform(size=targets.shape).astype(np.float32)

    def ours(hidden, unembedding):
        nll = cross_entropy(
            hidden, unembedding, targets, chunk_size=chunk_size, **kwargs
        )
        return jnp.sum(weight * nll)

    def reference(hidden, unembedding):
        logits = jnp.where(keep, hidden @ unembedding, -1e30)
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return -jnp.sum(weight * picked)

    got = jax.grad(ours, (0, 1))(hidden, unembedding)
    want = jax.grad(reference, (0, 1))(hidden, unembedding)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want
    )
    if domain == "excluded":
        np.testing.assert_array_equal(got[1][:, EXCLUDED], 0.0)


def test_excluded_ids_have_no_probability(inputs):
    hidden, unembedding, targets, _ = inputs
    changed = unembedding.copy()
    changed[:, EXCLUDED] = 100.0
    for chunk_size in (None, 5):
        before, after = (
            cross_entropy(hidden, w, targets, excluded=EXCLUDED, chunk_size=chunk_size)
            for w in (unembedding, changed)
        )
        np.testing.assert_array_equal(before, after)


def test_full_minus_restricted_is_the_information_of_the_domain(inputs):
    hidden, unembedding, targets, classes = inputs
    full = cross_entropy(hidden, unembedding, targets, excluded=EXCLUDED)
    restricted = cross_entropy(
        hidden,
        unembedding,
        targets,
        excluded=EXCLUDED,
        allowed=ALLOWED,
        classes=classes,
    )
    logits = np.where(EXCLUDED, -np.inf, hidden @ unembedding).astype(np.float64)
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    allowed = np.sum(p * ALLOWED[classes], axis=-1)
    assert np.all(full >= restricted)
    np.testing.assert_allclose(full - restricted, -np.log(allowed), atol=1e-5)


def test_uniform_logits_give_the_log_of_the_domain(inputs):
    hidden, unembedding, targets, classes = inputs
    keep, kwargs = options("both", classes)
    nll = cross_entropy(np.zeros_like(hidden), unembedding, targets, **kwargs)
    np.testing.assert_allclose(nll, np.log(keep.sum(-1)), rtol=1e-6)


def test_extreme_logits_and_targets_outside_the_domain_stay_finite(inputs):
    hidden, unembedding, targets, classes = inputs
    _, kwargs = options("allowed", classes)
    targets = np.where(classes == 0, 19, targets)
    for chunk_size in (None, 6):

        def loss(hidden, chunk_size=chunk_size):
            nll = cross_entropy(
                1e4 * hidden, unembedding, targets, chunk_size=chunk_size, **kwargs
            )
            return jnp.sum(jnp.where(classes == 0, 0.0, nll)), nll

        (total, nll), grad = jax.value_and_grad(loss, has_aux=True)(hidden)
        assert np.isfinite(total)
        assert np.all(np.isfinite(grad))
        assert np.all(nll[classes == 0] > 1e29)
        np.testing.assert_array_equal(grad[classes == 0], 0.0)


def test_bfloat16_accumulates_in_float32(inputs):
    hidden, unembedding, targets, _ = inputs
    low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembedding)]
    keep = np.ones((3, 7, VOCABULARY), bool)
    golden = naive(*(x.astype(jnp.float32) for x in low), targets, keep)
    for chunk_size in (None, 5):

        def loss(hidden, unembedding, chunk_size=chunk_size):
            nll = cross_entropy(hidden, unembedding, targets, chunk_size=chunk_size)
            return jnp.sum(nll), nll

        (_, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*low)
        assert nll.dtype == jnp.float32
        # Products of bfloat16 numbers are exact in float32.
        np.testing.assert_allclose(nll, golden, rtol=1e-5, atol=1e-5)
        assert all(grad.dtype == jnp.bfloat16 for grad in grads)


def test_memory_is_that_of_chunks():
    num_positions, width, vocabulary_size, chunk_size = 4096, 64, 8192, 256

    def loss(hidden, unembedding, targets, classes, chunk_size):
        nll = cross_entropy(
            hidden,
            unembedding,
            targets,
            excluded=jnp.zeros(vocabulary_size, bool),
            allowed=jnp.ones((3, vocabulary_size), bool),
            classes=classes,
            chunk_size=chunk_size,
        )
        return jnp.mean(nll)

    shapes = (
        jax.ShapeDtypeStruct((8, num_positions // 8, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary_size), jnp.float32),
        jax.ShapeDtypeStruct((8, num_positions // 8), jnp.int32),
        jax.ShapeDtypeStruct((8, num_positions // 8), jnp.int8),
    )

    def extra_bytes(chunk_size):
        step = jax.jit(
            jax.value_and_grad(functools.partial(loss, chunk_size=chunk_size), (0, 1))
        )
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    chunk = 4 * chunk_size * vocabulary_size
    # Beside two chunks: the accumulated gradient and its update, and the gradient
    # and the re-ordered copy of the hidden states.
    arguments = 4 * width * (vocabulary_size + num_positions)
    assert extra_bytes(chunk_size) < 2 * chunk + 2 * arguments
    assert extra_bytes(None) > 4 * num_positions * vocabulary_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unembedding": np.zeros((WIDTH + 1, VOCABULARY))}, "unembedding"),
        ({"targets": np.zeros((3, 6), np.int32)}, "targets"),
        ({"excluded": EXCLUDED[:-1]}, "excluded"),
        ({"allowed": ALLOWED}, "together"),
        ({"classes": np.zeros((3, 7), np.int8)}, "together"),
        ({"allowed": ALLOWED[0], "classes": np.zeros((3, 7), np.int8)}, "allowed"),
        ({"allowed": ALLOWED, "classes": np.zeros(3, np.int8)}, "classes"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_input(inputs, change, message):
    hidden, unembedding, targets, _ = inputs
    arguments = {"hidden": hidden, "unembedding": unembedding, "targets": targets}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**arguments, **change})
