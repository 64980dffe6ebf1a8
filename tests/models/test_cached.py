"""Features, caches, block-causal attention and shadows: each equals the plain model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm._tree import map_with_name
from diffmm.models import (
    Denoiser,
    KeyValueCache,
    SigmoidAttention,
    SoftmaxAttention,
    TransformerConfig,
    alibi_slopes,
    predict_fn,
    row_places,
    sigmoid_defaults,
    unembed,
    view_of,
)
from diffmm.typing import CachedFn, FeatureFn, ShadowFn

LENGTH, MASK = 12, 18
# Two segments and padding; one segment.
SEGMENTS = np.array([[1] * 7 + [2] * 4 + [0], [1] * 12], np.int32)
POSITIONS = np.array([[*range(7), *range(4), 0], [*range(12)]], np.int32)
REAL = SEGMENTS != 0
# What has shadows: padding, a first position, neighbours, and one position twice.
SCORED = np.array([[3, 9, 11, 3], [6, 0, 2, 7]], np.int32)
EVERY = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))

PLAIN = TransformerConfig(
    vocabulary_size=19, width=16, num_layers=2, head_dim=4, num_kv_heads=2
)
# Everything that a block can have, on top of sigmoid attention.
FULL = sigmoid_defaults(
    dataclasses.replace(PLAIN, length=LENGTH, qkv_bias=True, num_positions=LENGTH),
    length=LENGTH,
    positions="alibi",
    qk_norm="layer",
    layer_scale=0.5,
    trainable_bias="head",
    attention_residual=(0.5, 1.5),
)
CONFIGS = {
    "softmax": PLAIN,
    "sigmoid": FULL,
    "softmax blocks": dataclasses.replace(PLAIN, causal_block=4, positions="alibi"),
    "sigmoid blocks": dataclasses.replace(FULL, causal_block=4),
    "causal": dataclasses.replace(PLAIN, causal=True, scan=False),
}


def structure(config):
    """``nnx.split`` of a model, nothing drawn."""
    return nnx.split(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0))))


class Case:
    """A model whose every use is compiled once: 14 queries and 12 scored positions."""

    def __init__(self, config, shift=0):
        self.graphdef, params = structure(config)
        rng = np.random.default_rng(0)

        def draw(name, leaf):
            # Every leaf matters, also those that models begin with 0 or 1.
            mean = 1.0 if name.endswith(("gain", "scale")) else 0.0
            return rng.normal(mean, 0.3, leaf.shape).astype(np.float32)

        self.params = jax.device_put(map_with_name(draw, params))
        self.predict = predict_fn(self.graphdef, shift)
        self._features = jax.jit(self.predict.features)
        self._cached = jax.jit(self.predict.cached_features)
        self._shadows = jax.jit(self.predict.shadow_features)

    def features(self, tokens, scored=EVERY):
        row = tokens, POSITIONS, SEGMENTS, scored
        return np.asarray(self._features(self.params, *row))

    def empty(self):
        return self.predict.empty_cache(self.params, *EVERY.shape)

    def cached(self, tokens, cache, queries, scored=EVERY):
        row = tokens, POSITIONS, SEGMENTS, scored
        if queries is not None:
            unused = np.full((2, 14 - queries.shape[1]), LENGTH, np.int32)
            queries = np.concatenate([unused, queries], axis=1)
        return self._cached(self.params, *row, cache, queries)

    def shadows(self, tokens):
        row = tokens, POSITIONS, SEGMENTS, SCORED
        return self._shadows(self.params, *row, MASK)


@functools.cache
def case(name, shift=0, layers=2):
    if layers == 2:
        return Case(CONFIGS[name], shift)
    return Case(dataclasses.replace(CONFIGS[name], num_layers=layers), shift)


def random_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, MASK, EVERY.shape).astype(np.int32)


def altered(tokens, where):
    return np.where(where, (tokens + 1) % MASK, tokens)


def close(found, expected, where=REAL):
    """Equal on real positions: several sums of a few dozen products in float32."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found[where], expected[where], atol=1e-5)


# The function itself.


def test_equal_structures_share_what_was_compiled():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(predict, params, tokens):
        traces.append(predict)
        return predict(params, tokens, POSITIONS, SEGMENTS, EVERY[:, :3])

    one, other = (structure(PLAIN)[0] for _ in range(2))
    assert one is not other
    assert predict_fn(one) == predict_fn(other)
    assert hash(predict_fn(one)) == hash(predict_fn(other))
    assert predict_fn(one, shift=1) != predict_fn(one)
    for graphdef in (one, other):
        run.eval_shape(predict_fn(graphdef), case("softmax").params, random_tokens())
    assert len(traces) == 1
    with pytest.raises(ValueError, match="shift must be 0 or 1, got 2"):
        predict_fn(one, shift=2)


@pytest.mark.parametrize("graph_mode", [True, False])
def test_a_predict_function_satisfies_every_protocol(graph_mode):
    with nnx.set_graph_mode(graph_mode):
        predict = predict_fn(structure(CONFIGS["softmax blocks"])[0], shift=1)
    assert all(isinstance(predict, kind) for kind in (FeatureFn, CachedFn, ShadowFn))
    assert (predict.causal_block, predict.shift) == (4, 1)


def test_logits_are_the_unembedding_of_features_bit_for_bit():
    this = case("softmax")
    tokens, scored = random_tokens(), EVERY[:, ::-1]

    def plain(params):
        model = nnx.merge(this.graphdef, params)
        hidden = model.hidden(tokens, POSITIONS, SEGMENTS)
        hidden = jnp.take_along_axis(hidden, scored[:, :, None], axis=1)
        return unembed(hidden, model.output_matrix)

    row = tokens, POSITIONS, SEGMENTS, scored
    logits = jax.jit(this.predict)(this.params, *row)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, jax.jit(plain)(this.params))
    flat = this.features(tokens, scored)[:, 1]
    one = jax.jit(this.predict.logits)(this.params, flat)
    np.testing.assert_allclose(one, logits[:, 1], atol=1e-5)


def test_a_shifted_model_reads_the_position_before():
    tokens = random_tokens()
    own = case("softmax").features(tokens)
    shifted = case("softmax", shift=1).features(tokens)
    for row, i in itertools.product(range(2), range(LENGTH)):
        first = i == 0 or SEGMENTS[row, i - 1] != SEGMENTS[row, i]
        np.testing.assert_allclose(
            shifted[row, i], own[row, i if first else i - 1], atol=1e-6
        )


# Block-causal attention.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [SoftmaxAttention, SigmoidAttention])
def test_attention_in_a_view_equals_its_float64_definition(kind, causal):
    """Five queries at any places against the keys of whole rows."""
    options = {"length": 9} if kind is SigmoidAttention else {}
    attention = kind(alibi=True, causal=causal, **options)
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 2, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, LENGTH, 2, 4)).astype(np.float32)
    at = np.stack([rng.permutation(11)[:5] for _ in range(2)]).astype(np.int32)
    row = row_places(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    queries = type(row)(*(np.take_along_axis(np.asarray(x), at, 1) for x in row))
    view = view_of(queries, row, causal_block=3)
    out = jax.jit(lambda *heads: attention(*heads, view=view))(query, key, value)
    slopes = alibi_slopes(2)
    for b, q, h in itertools.product(range(2), range(5), range(2)):
        i = at[b, q]
        seen = [
            j
            for j in range(LENGTH)
            if SEGMENTS[b, i] == SEGMENTS[b, j]
            and POSITIONS[b, j] // 3 <= POSITIONS[b, i] // 3
            and (j <= i or not causal)
        ]
        scores = np.array(
            [
                query[b, q, h].astype(float) @ key[b, j, h] / 2 - slopes[h] * abs(i - j)
                for j in seen
            ]
        )
        if kind is SigmoidAttention:
            weights = 1 / (1 + 9 * np.exp(-scores))
        else:
            weights = np.exp(scores) / np.exp(scores).sum()
        expected = weights @ value[b, seen, h].astype(float)
        np.testing.assert_allclose(out[b, q, h], expected, atol=2e-6)


@pytest.mark.parametrize("name", ["softmax blocks", "sigmoid blocks"])
def test_blocks_see_themselves_and_what_is_before(name):
    this = case(name)
    tokens = random_tokens()
    before = this.features(tokens)
    number = SEGMENTS * 100 + POSITIONS // 4
    for row, block in ((0, 101), (0, 200), (1, 101)):
        change = np.zeros_like(REAL)
        change[row, np.argmax(number[row] == block)] = True
        after = this.features(altered(tokens, change))
        moved = np.abs(after - before).max(-1) > 1e-4
        same_row = np.arange(2)[:, None] == row
        expected = same_row & (number >= block) & (block // 100 == SEGMENTS)
        np.testing.assert_array_equal(moved, expected)


def test_statistics_see_blocks_too():
    this = case("softmax blocks")
    model = nnx.merge(this.graphdef, this.params)
    statistics = jax.jit(
        lambda tokens: model.attention_statistics(tokens, POSITIONS, SEGMENTS)
    )(random_tokens())
    np.testing.assert_allclose(statistics.row_mass, 1.0, rtol=1e-5)
    last = jax.jit(lambda tokens: model.hidden(tokens))(random_tokens())
    assert np.all(np.isfinite(last))


# Caches.


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "causal"])
def test_refreshing_and_renewing_everything_equal_no_cache(name):
    this = case(name)
    tokens = random_tokens()
    plain = this.features(tokens)
    dirty = jax.tree.map(lambda x: x + 3.0, this.empty())
    features, cache = this.cached(tokens, dirty, None)
    close(features, plain)
    assert isinstance(cache, KeyValueCache)
    assert cache.key.shape == (2, 2, LENGTH, 2, 4)
    # All positions in any order, two places of the second row unused.
    rng = np.random.default_rng(1)
    queries = np.full((2, LENGTH + 2), LENGTH, np.int32)
    queries[0, 1:-1] = rng.permutation(LENGTH)
    queries[1, 2:] = rng.permutation(LENGTH)
    again, renewed = this.cached(tokens, dirty, queries)
    close(again, plain)
    for one, other in zip(renewed, cache, strict=True):
        close(np.moveaxis(one, 0, 2), np.moveaxis(other, 0, 2))


def test_positions_are_renewed_against_what_is_stored():
    """With the same tokens nothing changes; with one block, whatever is renewed."""
    tokens = random_tokens()
    queries = np.array([[8, 2, 3, LENGTH], [LENGTH, 5, 11, 0]], np.int32)
    asked = np.zeros_like(REAL)
    for row in range(2):
        asked[row, [i for i in queries[row] if i < LENGTH]] = True
    this = case("softmax")
    _, cache = this.cached(tokens, this.empty(), None)
    features, same = this.cached(tokens, cache, queries)
    close(features, this.features(tokens), REAL & asked)
    for one, other in zip(same, cache, strict=True):
        close(np.moveaxis(one, 0, 2), np.moveaxis(other, 0, 2))
    # What the first block stores of a token depends on that token alone …
    shallow = case("softmax", layers=1)
    _, cache = shallow.cached(tokens, shallow.empty(), None)
    new = altered(tokens, asked)
    features, _ = shallow.cached(new, cache, queries)
    close(features, shallow.features(new), REAL & asked)
    # … what the second stores depends on others, which are as they were.
    features, _ = this.cached(new, same, queries)
    stale = np.abs(features - this.features(new)).max(-1)
    assert stale[REAL & asked].max() > 1e-4


def test_unused_places_store_nothing_and_rows_are_independent():
    this = case("softmax")
    tokens = random_tokens()
    _, cache = this.cached(tokens, this.empty(), None)
    queries = np.full((2, 4), LENGTH, np.int32)
    queries[1] = [4, 7, LENGTH, 5]
    new = altered(tokens, np.ones_like(REAL))
    features, changed = this.cached(new, cache, queries)
    assert np.all(np.isfinite(features))
    for one, other in zip(changed, cache, strict=True):
        np.testing.assert_array_equal(one[:, 0], other[:, 0])
        moved = np.any(one[:, 1] != other[:, 1], axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(moved), [4, 5, 7])


@pytest.mark.parametrize(
    ("name", "shift"), [("softmax blocks", 1), ("sigmoid blocks", 0)]
)
def test_a_block_causal_cache_is_exact(name, shift):
    """One forward per block beside those of its steps, or none if it is fused."""
    this = case(name, shift=shift)
    clean = random_tokens()
    # Generation of positions 4 … 11 of the second row, the first row pauses.
    tokens = np.where(EVERY >= 4, MASK, clean).astype(np.int32)
    tokens[0] = clean[0]
    _, cache = this.cached(tokens, this.empty(), None)

    def step(tokens, cache, queries, scored):
        places = np.full((2, 8), LENGTH, np.int32)
        places[1, : len(queries)] = queries
        features, cache = this.cached(tokens, cache, places)
        where = np.zeros_like(REAL)
        where[1, scored] = True
        close(features, this.features(tokens), where)
        return cache

    first, second = range(4, 8), range(8, 12)
    read = range(4, 8) if not shift else range(3, 8)
    tokens[1, 5] = clean[1, 5]
    cache = step(tokens, cache, read, first)
    tokens[1, 4:7] = clean[1, 4:7]
    cache = step(tokens, cache, read, first)
    tokens[1, 7] = clean[1, 7]
    fused = step(tokens, cache, [*first, *second], second)
    tokens[1, 10] = clean[1, 10]
    step(tokens, fused, [7, *second] if shift else second, second)
    if not shift:
        # Not fused: the finished block alone, then the next one.
        apart = step(tokens, cache, first, first)
        step(tokens, apart, second, second)


def test_caches_are_of_the_compute_dtype():
    graphdef, params = structure(dataclasses.replace(PLAIN, compute_dtype="bfloat16"))
    predict = predict_fn(graphdef)

    def run(params, queries):
        row = random_tokens(), POSITIONS, SEGMENTS, EVERY
        cache = predict.empty_cache(params, 2, LENGTH)
        return cache, predict.cached_features(params, *row, cache, queries)

    for queries in (None, EVERY[:, :3]):
        before, (features, after) = jax.eval_shape(run, params, queries)
        assert before == after
        assert features.dtype == after.key.dtype == after.value.dtype == jnp.bfloat16


# Shadows.


@pytest.mark.parametrize(
    ("name", "shift"), [("softmax", 1), ("sigmoid", 0), ("softmax blocks", 1)]
)
def test_a_shadow_is_one_position_renewed_as_a_mask(name, shift):
    """The cache holds all others as they are; the mask takes the token's place.

    A shifted model is read at the position before, which is computed when the mask is
    in its place.
    """
    this = case(name, shift=shift)
    tokens = random_tokens()
    tokens[1, [2, 6]] = MASK
    features, shadows = this.shadows(tokens)
    real = np.take_along_axis(REAL, SCORED, 1)
    plain = this.features(tokens)
    close(features, np.take_along_axis(plain, SCORED[:, :, None], 1), real)
    _, cache = this.cached(tokens, this.empty(), None)
    for k in range(4):
        at = SCORED[:, k : k + 1]
        hidden = np.where(at == EVERY, MASK, tokens)
        one, behind = this.cached(hidden, cache, at)
        if shift:
            first = POSITIONS[np.arange(2)[:, None], at] == 0
            before = np.where(first, LENGTH, at - 1).astype(np.int32)
            # What begins a segment is read at itself, from the first call.
            read, _ = this.cached(hidden, behind, before)
            one = np.where(first[:, :, None], one, read)
        one = np.take_along_axis(np.asarray(one), at[:, :, None], 1)
        close(shadows[:, k : k + 1], one, real[:, k : k + 1])
    # The shadow of a mask is the mask.
    close(shadows, features, np.take_along_axis(tokens, SCORED, 1) == MASK)


def test_shadows_see_what_a_dense_mask_says():
    this = case("softmax")
    tokens = random_tokens()
    visible = np.zeros((2, 16, 16), bool)
    for b, q, k in itertools.product(range(2), range(16), range(16)):
        own = [*range(LENGTH), *SCORED[b]]
        seen = q == k if k >= LENGTH else q < LENGTH or own[q] != k
        visible[b, q, k] = seen and SEGMENTS[b, own[q]] == SEGMENTS[b, own[k]]
    long = [
        np.concatenate([x, np.take_along_axis(x, SCORED, 1)], 1)
        for x in (tokens, POSITIONS)
    ]
    long[0][:, LENGTH:] = MASK
    places = row_places(*map(jnp.asarray, (long[1], np.ones_like(long[1]))))
    view = view_of(places, places, visible=visible)
    expected = jax.jit(
        lambda tokens: nnx.merge(this.graphdef, this.params).hidden_in_view(
            tokens, long[1], None, view
        )
    )(long[0])
    _, shadows = this.shadows(tokens)
    np.testing.assert_allclose(shadows, expected[:, LENGTH:], atol=1e-5)


def test_a_shadow_does_not_know_its_token():
    tokens = random_tokens()
    for layers, leaks in ((1, False), (2, True)):
        this = case("softmax", shift=1, layers=layers)
        _, before = this.shadows(tokens)
        for k in (0, 1, 3):
            _, after = this.shadows(altered(tokens, SCORED[:, k : k + 1] == EVERY))
            moved = np.abs(after - before).max(-1)
            # From the second block on through others, who know the token.
            own = moved[:, k]
            assert np.all(own > 1e-4) if leaks else np.all(own == 0), (layers, own)
            assert np.all(np.delete(moved[1], k) > 1e-4)
