"""The loop around real transformers: caches, shifts, shadows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig, predict_fn
from diffmm.samplers import (
    Delayed,
    Dual,
    Exact,
    FirstHitting,
    Prefix,
    Settings,
    canvas_from_prompts,
    sample,
    shifted,
)
from diffmm.samplers.adaptive import Threshold
from diffmm.samplers.remasking import WINO

MASK = 11


def denoiser(causal_block=0, shift=0):
    config = TransformerConfig(
        vocabulary_size=12,
        width=16,
        num_layers=2,
        head_dim=8,
        causal_block=causal_block,
        unembedding_std=1.0,
    )
    graphdef, params = nnx.split(Denoiser(config, rngs=nnx.Rngs(0)))
    return predict_fn(graphdef, shift=shift), params


def run(predict, params, *, rule=None, prompts=(5, 3), **options):
    """Rows with prompts of two lengths, generated to position 16."""
    canvas = canvas_from_prompts(
        [[1 + i % 9 for i in range(n)] for n in prompts],
        [16 - n for n in prompts],
        mask_id=MASK,
    )
    return sample(
        predict,
        params,
        canvas,
        jax.random.key(2),
        rule=FirstHitting() if rule is None else rule,
        mask_id=MASK,
        **options,
    )


@pytest.mark.parametrize("shift", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_cache_of_a_block_causal_denoiser_is_exact(shift):
    predict, params = denoiser(causal_block=4, shift=shift)
    cached = run(predict, params, block_length=4, cache=Exact())
    np.testing.assert_array_equal(cached.counts.whole, [1, 1])
    np.testing.assert_array_equal(cached.nfe, [11, 13])
    # Finished blocks do not see later ones: each token's law is the same without.
    tokens = np.asarray(cached.tokens)
    order = np.asarray(cached.step_committed)
    # Blocks end at multiples of 4 of the position, whatever the prompt.
    for row, first in ((0, 5), (1, 3)):
        blocks = np.arange(first, 16) // 4
        steps = order[row, first:]
        for block in np.unique(blocks)[:-1]:
            assert steps[blocks == block].max() < steps[blocks > block].min()
    # Replayed without a cache, every token has the same probability.
    for step in range(13):
        known = (order < step) & ((order >= 0) | (tokens != MASK))
        seen = np.where(known, tokens, MASK).astype(np.int32)
        logits = predict(
            params,
            jnp.asarray(seen),
            jnp.broadcast_to(jnp.arange(16), (2, 16)),
            jnp.ones((2, 16), jnp.int32),
            jnp.broadcast_to(jnp.arange(16), (2, 16)),
        )
        logits = np.array(logits)
        logits[..., MASK] = -1e30
        law = np.asarray(jax.nn.log_softmax(logits))
        now = order == step
        expected = np.take_along_axis(law, tokens[..., None], axis=2)[..., 0]
        np.testing.assert_allclose(
            np.asarray(cached.logprob)[now], expected[now], atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "shift"),
    [
        (Dual(refresh_every=1), 1),
        pytest.param(Prefix(refresh_every=1), 0, marks=pytest.mark.slow),
        pytest.param(Delayed(refresh_every=1), 1, marks=pytest.mark.slow),
    ],
)
def test_a_cache_refreshed_every_step_is_no_cache(cache, shift):
    predict, params = denoiser(shift=shift)
    settings = Settings(cfg_weight=0.5)
    options = {"prompts": (4, 8), "block_length": 4, "settings": settings}
    plain = run(predict, params, **options)
    cached = run(predict, params, cache=cache, **options)
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    np.testing.assert_allclose(plain.logprob, cached.logprob, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [Dual(), Dual(vicinity=2), Prefix(), Delayed()])
@pytest.mark.parametrize("shift", [0, 1])
def test_caches_of_bidirectional_denoisers_complete_rows(cache, shift):
    predict, params = denoiser(shift=shift)
    options = {"prompts": (4, 8), "block_length": 4}
    cached = run(predict, params, cache=cache, **options)
    plain = run(predict, params, **options)
    assert (np.asarray(cached.tokens) != MASK).all()
    np.testing.assert_array_equal(cached.nfe, plain.nfe)
    assert float(cached.counts.processed) < float(plain.counts.processed)
    assert not np.array_equal(cached.logprob, plain.logprob)


def test_a_cache_must_suit_the_denoiser():
    causal, params = denoiser(causal_block=4)
    with pytest.raises(ValueError, match=r"cache must be Exact.*Dual"):
        run(causal, params, prompts=(4, 8), cache=Dual(), block_length=4)
    with pytest.raises(ValueError, match=r"block_length must be.*4.*8"):
        run(causal, params, cache=Exact(), block_length=8)
    with pytest.raises(ValueError, match="block-causal"):
        run(*denoiser(), prompts=(4, 8), cache=Exact(), block_length=4)


@pytest.mark.slow
def test_a_shifted_denoiser_reads_one_to_the_left():
    predict, params = denoiser()
    other, _ = denoiser(shift=1)
    first = run(shifted(predict), params)
    second = run(other, params)
    np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1])
def test_takes_back_what_shadows_doubt(shift):
    predict, params = denoiser(shift=shift)
    options = {"prompts": (4, 8), "settings": Settings(temperature=0.0)}
    bold = WINO(draft=0.0, verify=0.9, least=3, most=3)
    result = run(predict, params, rule=bold, max_forwards=64, **options)
    assert (np.asarray(result.tokens) != MASK).all()
    # With three drafts each time 12 tokens take 4 evaluations, and more if doubted.
    assert int(result.nfe[0]) > 4
    easy = WINO(draft=0.0, verify=0.0, least=3, most=3)
    result = run(predict, params, rule=easy, max_forwards=64, **options)
    np.testing.assert_array_equal(result.nfe, [4, 3])
    plain = run(predict, params, rule=Threshold(threshold=2.0), **options)
    np.testing.assert_array_equal(plain.nfe, [12, 8])
