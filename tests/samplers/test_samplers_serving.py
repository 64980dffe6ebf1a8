"""Streams, budgets, traces, caches, speculation and faults of the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.samplers import (
    CacheView,
    Delayed,
    Dual,
    Exact,
    FirstHitting,
    FixedQuota,
    Margin,
    MaxProb,
    NegativeEntropy,
    Position,
    Prefix,
    Random,
    Rule,
    Selection,
    Settings,
    canvas_from_prompts,
    sample,
    sample_speculatively,
    sample_stream,
)

MASK, SIZE, LENGTH = 7, 8, 16
GREEDY = Settings(temperature=0.0)
ONE = FixedQuota(num_steps=48)
PARAMS = jax.random.normal(jax.random.key(7), (LENGTH, SIZE, SIZE)) * 2.0


def laws(params, tokens, scored):
    """Pairwise scores: every token votes for every position by its distance."""
    length = tokens.shape[1]
    index = jnp.arange(length)
    distance = (index[None, :] - index[:, None]) % LENGTH
    votes = params[distance[None], tokens[:, None]]  # [B, L(target), L(source), V]
    logits = jnp.sum(votes, axis=2) / 2.0
    return jnp.take_along_axis(logits, scored[..., None], axis=1)


def predict(params, tokens, positions, segment_ids, scored):
    return laws(params, tokens, scored)


class Halves:
    """The same denoiser in two halves, with an unembedding of its own."""

    causal_block, shift = 0, 0

    def __call__(self, params, tokens, positions, segment_ids, scored):
        return laws(params, tokens, scored)

    def features(self, params, tokens, positions, segment_ids, scored):
        # Half of the logits: what comes before the "unembedding".
        return laws(params, tokens, scored) * 0.5

    def logits(self, params, features):
        return features * 2.0

    def empty_cache(self, params, num_rows, row_length):
        return jnp.full((1, num_rows, row_length), MASK, jnp.int32)

    def cached_features(
        self, params, tokens, positions, segment_ids, scored, cache, queries
    ):
        """A cache of tokens: the others are seen as they were when last computed."""
        if queries is None:
            cache = tokens[None]
        else:
            rows = jnp.arange(len(tokens))[:, None]
            at = jnp.minimum(queries, tokens.shape[1] - 1)
            seen = jnp.take_along_axis(tokens, at, axis=1)
            cache = cache.at[0, rows, queries].set(seen, mode="drop")
        return self.features(params, cache[0], positions, segment_ids, scored), cache


HALVES = Halves()


def canvas_of(*lengths):
    prompts = [[1, 2, 3][: 1 + i % 3] for i in range(len(lengths))]
    return canvas_from_prompts(prompts, list(lengths), mask_id=MASK, row_length=LENGTH)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
class Nothing(Rule):
    """Commits nothing, ever."""

    guarded = False

    def select(self, key, window, prediction, aux):
        none = jnp.zeros(window.masked.shape, bool)
        return Selection(none, none.astype(jnp.float32), aux)


def run(canvas, rule=ONE, fn=predict, key=0, **options):
    options.setdefault("settings", GREEDY)
    return sample(
        fn, PARAMS, canvas, jax.random.key(key), rule=rule, mask_id=MASK, **options
    )


def test_halves_of_a_denoiser_give_the_same_tokens():
    canvas = canvas_of(12, 8)
    for settings in (GREEDY, Settings()):
        whole = run(canvas, FirstHitting(), settings=settings)
        halves = run(canvas, FirstHitting(), fn=HALVES, settings=settings)
        np.testing.assert_array_equal(whole.tokens, halves.tokens)
        np.testing.assert_allclose(whole.logprob, halves.logprob, atol=1e-5)


def test_a_batch_of_mixed_lengths_costs_what_its_slowest_row_costs():
    lengths = np.random.default_rng(0).integers(1, 13, 32)
    result = run(canvas_of(*lengths.tolist()))
    np.testing.assert_array_equal(result.nfe, lengths)
    assert int(result.forwards) == lengths.max()  # the bar is 5 % above


@pytest.mark.parametrize("refill_at", [1, 2])
def test_a_stream_gives_what_a_batch_gives(refill_at):
    lengths = [3, 12, 1, 7, 12, 2, 5]
    requests = []
    for i in range(7):
        one = canvas_of(*lengths)
        one = type(one)(*(np.asarray(x)[i : i + 1] for x in one))
        requests.append((one, jax.random.fold_in(jax.random.key(3), i)))
    rule = FirstHitting()
    finished = list(
        sample_stream(
            predict,
            PARAMS,
            iter(requests),
            slots=3,
            num_generated=12,
            rule=rule,
            mask_id=MASK,
            refill_at=refill_at,
        )
    )
    assert sorted(f.request for f in finished) == list(range(7))
    keys = jnp.stack([key for _, key in requests])
    batch = sample(predict, PARAMS, canvas_of(*lengths), keys, rule=rule, mask_id=MASK)
    for done in finished:
        row = done.request
        np.testing.assert_array_equal(done.tokens, batch.tokens[row])
        np.testing.assert_allclose(done.logprob, batch.logprob[row], atol=1e-5)
        assert done.nfe == lengths[row]
        assert not done.still_masked
    # Short requests overtake long ones.
    assert [f.request for f in finished] != list(range(7))


def test_streams_refuse_bad_numbers():
    for options, message in (
        ({"slots": 0}, "slots"),
        ({"refill_at": 3}, "refill_at"),
        ({"trace": 4}, "trace"),
        ({"num_generated": 2}, "num_generated"),
    ):
        options = {"slots": 2, "num_generated": 12, "rule": ONE, **options}
        request = (canvas_of(12), jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            list(sample_stream(predict, PARAMS, [request], mask_id=MASK, **options))


@pytest.mark.parametrize(
    "score",
    [
        NegativeEntropy(),
        pytest.param(MaxProb(), marks=pytest.mark.slow),
        pytest.param(Position(), marks=pytest.mark.slow),
    ],
)
def test_speculation_is_lossless(score):
    canvas = canvas_of(12, 8, 4, 12)
    plain = run(canvas, FixedQuota(num_steps=36, score=score), block_length=4)
    ratios = []
    for drafts in (1, 4):
        result = sample_speculatively(
            predict,
            PARAMS,
            canvas,
            mask_id=MASK,
            drafts=drafts,
            score=score,
            block_length=4,
        )
        np.testing.assert_array_equal(result.tokens, plain.tokens)
        np.testing.assert_array_equal(result.decisions, plain.nfe)
        ratios.append(int(result.forwards) / int(plain.forwards))
    assert ratios[0] == 1.0
    assert ratios[1] < 0.9


def test_speculation_refuses_what_is_random():
    for options, message in (
        ({"drafts": 0}, "drafts"),
        ({"score": Random()}, "score.*Random"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_speculatively(predict, PARAMS, canvas_of(4), mask_id=MASK, **options)


def test_a_trace_replays_the_generation():
    canvas = canvas_of(12, 8)
    rule = FixedQuota(num_steps=6, score=Margin())
    plain = run(canvas, rule, block_length=4)
    traced = run(canvas, rule, block_length=4, trace=8)
    np.testing.assert_array_equal(plain.tokens, traced.tokens)
    trace = jax.tree.map(np.asarray, traced.trace)
    assert (trace.active.sum(axis=1) == traced.nfe).all()
    left = trace.exists
    for t in range(8):
        on = trace.active[:, t]
        np.testing.assert_array_equal(trace.masked[on, t], left[on])
        assert (trace.allowed[:, t] <= trace.masked[:, t]).all()
        assert ((trace.action[:, t] > 0) <= trace.allowed[:, t]).all()
        # Four positions at most: those of the block.
        assert trace.allowed[:, t].sum(axis=1).max() <= 4
        left = left & ~(trace.action[:, t] > 0)
        confidence = trace.confidence[:, t]
        assert ((confidence > 0) == (trace.exists & on[:, None])).all()
    assert not left.any()
    last = trace.tokens[0, int(traced.nfe[0]) - 1, :12]
    np.testing.assert_array_equal(last, np.asarray(traced.tokens)[0, 1:13])


def test_budgets_per_block_leave_masks_behind():
    canvas = canvas_of(12, 8)
    result = run(canvas, Nothing(), block_length=4, block_forwards=2, max_forwards=64)
    np.testing.assert_array_equal(result.nfe, [6, 4])
    assert np.asarray(result.still_masked).all()
    result = run(canvas, Nothing(), block_length=4, block_forwards=9, max_forwards=5)
    np.testing.assert_array_equal(result.nfe, [5, 5])
    result = run(canvas, ONE, block_length=4, block_forwards=3)
    committed = np.asarray(result.step_committed)[0, 1:13].reshape(3, 4) >= 0
    assert (committed.sum(axis=1) == 3).all()


def test_bad_budgets_and_canvases_are_refused():
    canvas = canvas_of(12)
    for options, message in (
        ({"block_length": 4, "max_forwards": 2}, "max_forwards.*3.*2"),
        ({"block_forwards": 0}, "block_forwards.*0"),
        ({"trace": 0}, "trace.*0"),
        ({"min_tokens": 2}, "min_tokens.*2"),
        ({"suppressed": [SIZE]}, f"suppressed.*{SIZE}"),
        ({"settings": Settings(min_p=2.0)}, "min_p.*2"),
        ({"rule": "threshold"}, "rule.*threshold"),
        ({"cache": Dual()}, "cache=Dual.*cached_features"),
        ({"cache": Exact()}, "cache=Exact.*cached_features"),
    ):
        with pytest.raises(ValueError, match=message):
            run(canvas, **options)
    for options, message in (
        ({"cache": Exact()}, "block-causal"),
        ({"cache": Dual(refresh_every=0)}, "refresh_every.*0"),
        ({"cache": Dual(vicinity=-1)}, "vicinity.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(canvas, fn=HALVES, **options)
    with pytest.raises(ValueError, match=r"canvas\.generate"):
        run(canvas._replace(generate=np.zeros_like(canvas.generate)))
    with pytest.raises(ValueError, match=r"mask_id=7.*row 0, position 1"):
        canvas_from_prompts([[1, MASK]], 2, mask_id=MASK)


def test_guidance_needs_an_unconditional_branch():
    class Conditional(Halves):
        unconditional = False

    with pytest.raises(ValueError, match="unconditional"):
        run(canvas_of(4), fn=Conditional(), settings=Settings(guidance_scale=2.0))


def test_laws_that_are_no_laws_are_named():
    def broken(params, tokens, positions, segment_ids, scored):
        logits = laws(params, tokens, scored)
        full = jnp.sum(tokens == MASK, axis=1) <= 10
        row = jnp.arange(len(tokens)) == 1
        bad = (full & row)[:, None] & (scored == 5)
        return jnp.where(bad[..., None], jnp.nan, logits)

    with pytest.raises(ValueError, match=r"log_normalizer.*row 1, turn 2, position 5"):
        run(canvas_of(12, 12), FixedQuota(num_steps=12, score=Position()), fn=broken)


def test_logits_of_minus_infinity_are_fine():
    def hard(params, tokens, positions, segment_ids, scored):
        logits = laws(params, tokens, scored)
        return jnp.where(jnp.arange(SIZE)[None, None] < 3, logits, -jnp.inf)

    result = run(canvas_of(12), FirstHitting(), fn=hard, settings=Settings())
    assert np.asarray(result.tokens)[0, 1:13].max() < 3
    assert np.isfinite(result.logprob).all()


def test_suppression_minimum_length_and_min_p():
    canvas = canvas_of(12)
    plain = np.asarray(run(canvas, ONE).tokens)[0, 1:13]
    banned = [int(plain[0])]
    assert not np.isin(
        run(canvas, ONE, suppressed=banned).tokens[0, 1:13], banned
    ).any()

    def stops(params, tokens, positions, segment_ids, scored):
        logits = jax.nn.one_hot(jnp.full(scored.shape, 4), SIZE) * 9.0
        return logits + jax.nn.one_hot(jnp.full(scored.shape, 3), SIZE) * 5.0

    for least in (0, 3):
        result = run(canvas, ONE, fn=stops, block_length=4, eos_id=4, min_tokens=least)
        expected = [3] * least + [4] * (12 - least)
        np.testing.assert_array_equal(result.tokens[0, 1:13], expected)
        assert int(result.nfe[0]) == 4
    narrow = run(canvas, ONE, settings=Settings(min_p=1.0))
    np.testing.assert_array_equal(narrow.tokens[0, 1:13], plain)


@pytest.mark.parametrize(
    "strategy",
    [Delayed, *(pytest.param(s, marks=pytest.mark.slow) for s in (Prefix, Dual))],
)
def test_a_cache_refreshed_every_step_is_no_cache(strategy):
    canvas = canvas_of(12, 8)
    rule = FixedQuota(num_steps=24, score=NegativeEntropy())
    plain = run(canvas, rule, block_length=4, settings=Settings())
    cached = run(
        canvas,
        rule,
        fn=HALVES,
        block_length=4,
        settings=Settings(),
        cache=strategy(refresh_every=1),
    )
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_array_equal(cached.counts.whole, plain.nfe)
    assert int(cached.counts.partial_calls) == 0


# Evaluations of whole rows: at the three (two) block entries and when overdue.
COUNTS = {
    "dual": (Dual(vicinity=2), [3, 2]),
    "prefix": (Prefix(), [3, 2]),
    "dual, every 2": (Dual(refresh_every=2), [6, 4]),
    "delayed": (Delayed(refresh_every=8), [2, 1]),
    "delayed, once": (Delayed(refresh_every=None), [1, 1]),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "dual" else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS],
)
def test_caches_compute_what_they_say(name):
    canvas, (cache, whole) = canvas_of(12, 8), COUNTS[name]
    rule = FixedQuota(num_steps=24, score=NegativeEntropy())
    keys = jax.random.split(jax.random.key(0), 2)

    def decode(rows, rule):
        return sample(
            HALVES,
            PARAMS,
            type(canvas)(*(np.asarray(x)[rows] for x in canvas)),
            keys[np.array(rows)],
            rule=rule,
            mask_id=MASK,
            settings=GREEDY,
            block_length=4,
            cache=cache,
        )

    result = decode([0, 1], rule)
    np.testing.assert_array_equal(result.counts.whole, whole)
    np.testing.assert_array_equal(result.counts.partial, np.array([12, 8]) - whole)
    np.testing.assert_array_equal(result.nfe, [12, 8])
    # A row does not depend on its neighbour, nor on when the neighbour refreshes.
    swapped = decode([1, 0], rule)
    np.testing.assert_array_equal(swapped.tokens[::-1], result.tokens)
    # A block that is full after its first evaluation costs one and not two.
    assert int(decode([0, 1], FixedQuota(num_steps=3)).nfe[0]) == 3


def test_guidance_works_with_caches():
    canvas = canvas_of(12, 8)
    rule = FixedQuota(num_steps=24)
    settings = Settings(temperature=0.0, cfg_weight=1.5)
    plain = run(canvas, rule, block_length=4, settings=settings)
    cached = run(
        canvas,
        rule,
        fn=HALVES,
        block_length=4,
        settings=settings,
        cache=Prefix(refresh_every=1),
    )
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_array_equal(cached.nfe, [24, 16])
    np.testing.assert_array_equal(cached.counts.unconditional, [12, 8])


def test_a_dual_cache_wants_the_block_and_its_vicinity():
    block = jnp.zeros((1, 10), bool).at[0, 4:6].set(True)
    exists = jnp.ones((1, 10), bool).at[0, 9].set(False)
    view = CacheView(
        exists=exists,
        block=block,
        masked=block,
        fresh=block,
        positions=jnp.arange(10)[None],
        segment_ids=exists.astype(jnp.int32),
        first=jnp.array([4]),
        entered=jnp.array([False]),
        age=jnp.array([0]),
        causal_block=0,
    )
    for vicinity, columns in ((0, range(4, 6)), (2, range(2, 8)), (9, range(9))):
        want = np.flatnonzero(Dual(vicinity=vicinity).want(view)[0])
        np.testing.assert_array_equal(want, list(columns))
