"""Structure: what every rule must respect whatever the denoiser says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.samplers import (
    Ancestral,
    Drawn,
    FirstHitting,
    FixedQuota,
    Interval,
    Margin,
    NegativeEntropy,
    Plan,
    Position,
    Random,
    Settings,
    canvas_from_prompts,
    defaults_for,
    frames,
    quota_table,
    remaining_cosine,
    sample,
    sample_in_turn,
    score_from_name,
    shifted,
)
from diffmm.typing import Canvas, Modality

SIZE, MASK, EOS = 11, 7, 2
ALLOWED = np.ones((4, SIZE), bool)
ALLOWED[Modality.IMAGE, :5] = False
TRACES = [0]


def predict(params, tokens, positions, segment_ids, scored):
    """Depends on every visible token of the row, by position; loves the mask id."""
    TRACES[0] += 1
    seen = jnp.where(segment_ids > 0, tokens, 0)
    mixed = (seen * (positions % 5 + 1) * (segment_ids > 0)).sum(axis=1)
    at = jnp.take_along_axis(positions, scored, axis=1)
    index = (mixed[:, None] * 7 + at * 13) % len(params)
    logits = params[index]
    return logits.at[..., MASK].set(1e4)


PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=(97, SIZE)) * 2, jnp.float32)
# Few rules, shapes and kinds of settings: each combination compiles the loop once.
CONFIDENCE = FixedQuota(num_steps=4)
COSINE_MARGIN = FixedQuota(num_steps=8, score=Margin(), remaining=remaining_cosine)
RULES = [
    (Ancestral(num_steps=4), None),
    (FirstHitting(), 4),
    (CONFIDENCE, None),
    (CONFIDENCE, 4),
    (COSINE_MARGIN, None),
    (FixedQuota(num_steps=4, score=Drawn()), None),
]
MORE_RULES = [
    (Ancestral(num_steps=4, lazy=False, final_argmax=True), 4),
    (FixedQuota(num_steps=4, score=NegativeEntropy(), choice_temperature=2.0), None),
    (FixedQuota(num_steps=4, score=Random()), 4),
    (FixedQuota(num_steps=4, score=Position()), 4),
]


def settings_with(**fields):
    return Settings(**{"top_p": 0.9, "top_k": SIZE, **fields})


def ragged_canvas():
    """Three rows, one with nothing to generate; a prompt token equals the mask id."""
    canvas = canvas_from_prompts(
        [[1, 2, 3], [4], [5, 6]], [8, 5, 0], mask_id=MASK, row_length=16
    )
    canvas.tokens[0, 1] = MASK
    return canvas


def run(canvas, rule, seed=0, key=None, **options):
    key = jax.random.key(seed) if key is None else key
    options.setdefault("settings", settings_with())
    return sample(
        predict,
        PARAMS,
        canvas,
        key,
        rule=rule,
        mask_id=MASK,
        allowed=ALLOWED,
        **options,
    )


def take_rows(canvas, rows):
    return Canvas(*(np.asarray(x)[rows] for x in canvas))


@pytest.mark.parametrize(
    ("rule", "block_length"),
    [*RULES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_RULES)],
)
def test_structure_of_every_rule(rule, block_length):
    canvas = ragged_canvas()
    result = run(canvas, rule, block_length=block_length)
    tokens, generate = np.asarray(result.tokens), np.asarray(canvas.generate)
    np.testing.assert_array_equal(tokens[~generate], canvas.tokens[~generate])
    assert (tokens[generate] != MASK).all()
    order = np.asarray(result.step_committed)
    assert ((order >= 0) == generate).all()
    assert (np.asarray(result.logprob)[~generate] == 0).all()
    assert (np.asarray(result.logprob) <= 0).all()
    assert np.isfinite(result.logprob).all()
    nfe = np.asarray(result.nfe)
    assert nfe[2] == 0
    assert nfe.max() <= int(result.forwards) <= 8
    assert not np.asarray(result.still_masked).any()
    if block_length is not None:
        for row in range(2):
            steps = order[row][generate[row]]
            for start in range(0, len(steps) - block_length, block_length):
                before = steps[: start + block_length]
                assert before.max() < steps[start + block_length :].min()
    if rule.guarded:
        # Every evaluation commits something.
        for row in range(2):
            assert set(order[row][generate[row]]) == set(range(nfe[row]))
    # At other places of the batch and of the row: the same tokens.
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        jax.random.key(0), jnp.arange(3)
    )
    moved = Canvas(*(np.roll(x[[1, 2, 0]], 3, axis=1) for x in canvas))
    swapped = run(
        moved, rule, key=keys[jnp.array([1, 2, 0])], block_length=block_length
    )
    back = np.roll(np.asarray(swapped.tokens)[[2, 0, 1]], -3, axis=1)
    np.testing.assert_array_equal(back, tokens)
    np.testing.assert_array_equal(np.asarray(swapped.nfe)[[2, 0, 1]], nfe)


@pytest.mark.parametrize(
    "rule", [RULES[0][0], pytest.param(CONFIDENCE, marks=pytest.mark.slow)]
)
def test_a_row_alone_equals_the_row_in_a_batch(rule):
    canvas = ragged_canvas()
    keys = jax.random.split(jax.random.key(1), 3)
    batch = run(canvas, rule, key=keys)
    # The second row is also generated in a narrower window.
    for row in range(2):
        alone = run(take_rows(canvas, [row]), rule, key=keys[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
        assert int(alone.nfe[0]) == int(batch.nfe[row])
        assert int(alone.forwards) == int(alone.nfe[0])


def test_infilling_keeps_what_is_given():
    given = np.tile(np.arange(16, dtype=np.int32) % SIZE, (3, 1))
    generate = np.zeros((3, 16), bool)
    generate[0, [1, 4, 5, 7, 9, 10, 14, 15]] = True
    generate[1, [0, 15]] = True
    canvas = Canvas(
        tokens=np.where(generate, MASK, given),
        positions=np.tile(np.arange(16, dtype=np.int32), (3, 1)),
        segment_ids=np.ones((3, 16), np.int32),
        modality=np.zeros((3, 16), np.int8),
        generate=generate,
        condition=~generate,
    )
    result = run(canvas, FixedQuota(num_steps=16))
    np.testing.assert_array_equal(
        np.asarray(result.tokens)[~generate], given[~generate]
    )
    assert (np.asarray(result.tokens)[generate] != MASK).all()
    np.testing.assert_array_equal(result.nfe, [8, 2, 0])


def test_modalities_take_their_own_ids():
    canvas = ragged_canvas()
    modality = np.asarray(canvas.modality).copy()
    modality[0, 6:] = Modality.IMAGE
    result = run(
        canvas._replace(modality=modality),
        CONFIDENCE,
        settings={
            Modality.TEXT: settings_with(temperature=9.0, top_p=1.0),
            Modality.IMAGE: settings_with(temperature=0.0),
        },
    )
    tokens = np.asarray(result.tokens)
    assert (tokens[0, 6:11] >= 5).all()
    assert (tokens[:2, 1:6][np.asarray(canvas.generate)[:2, 1:6]] < 5).any()


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_steps_without_a_commit_cost_nothing(steps):
    masks = [8, 6, 3]
    canvas = canvas_from_prompts([[1]] * 3, masks, mask_id=MASK, row_length=16)
    rule = dataclasses.replace(COSINE_MARGIN, num_steps=steps)
    result = run(canvas, rule)
    for row, count in enumerate(masks):
        quota = np.asarray(quota_table(count, steps))
        assert int(result.nfe[row]) == int((quota > 0).sum())
        order = np.asarray(result.step_committed)[row]
        np.testing.assert_array_equal(np.bincount(order[order >= 0]), quota[quota > 0])
    assert int(result.forwards) == int(np.max(result.nfe))


def test_steps_are_shared_among_the_blocks_of_a_row():
    canvas = canvas_from_prompts([[1], [2], []], [8, 4, 0], mask_id=MASK, row_length=16)
    result = run(canvas, CONFIDENCE, block_length=4)
    # Two blocks of two steps; one block of four.
    np.testing.assert_array_equal(result.nfe, [4, 4, 0])
    assert int(result.forwards) == 4


@pytest.mark.slow
def test_left_to_right_is_left_to_right():
    result = run(
        ragged_canvas(), FixedQuota(num_steps=8, score=Position()), block_length=4
    )
    np.testing.assert_array_equal(result.step_committed[0, 3:11], np.arange(8))


def test_max_forwards_stops_rows_on_their_own():
    canvas = ragged_canvas()
    result = run(canvas, FixedQuota(num_steps=8), max_forwards=6)
    np.testing.assert_array_equal(result.nfe, [6, 5, 0])
    np.testing.assert_array_equal(result.still_masked, [True, False, False])


def test_early_stop_fills_with_eos():
    # A denoiser that says EOS at rank 1 and 3 elsewhere.
    def eos_early(params, tokens, positions, segment_ids, scored):
        at = jnp.take_along_axis(positions, scored, axis=1)
        target = jnp.where(at == 2, EOS, 3)
        return jax.nn.one_hot(target, SIZE) * 50.0

    canvas = canvas_from_prompts([[1], [1, 1, 1]], 8, mask_id=MASK)
    result = sample(
        eos_early,
        (),
        canvas,
        jax.random.key(0),
        rule=FixedQuota(num_steps=8),
        settings=Settings(temperature=0.0),
        mask_id=MASK,
        allowed=ALLOWED,
        block_length=4,
        eos_id=EOS,
    )
    np.testing.assert_array_equal(
        result.tokens[0], [1, 3, EOS, 3, 3, EOS, EOS, EOS, EOS, 0, 0]
    )
    np.testing.assert_array_equal(result.nfe, [4, 8])
    assert not np.asarray(result.still_masked).any()
    shown = frames(result, canvas, MASK)
    np.testing.assert_array_equal(shown[0], canvas.tokens[0])
    np.testing.assert_array_equal(shown[-1], result.tokens[0])


def test_frames_replay_the_generation():
    canvas = ragged_canvas()
    result = run(canvas, FirstHitting(), block_length=4)
    shown = frames(result, canvas, MASK, row=0)
    np.testing.assert_array_equal(shown[0], canvas.tokens[0])
    np.testing.assert_array_equal(shown[-1], result.tokens[0])
    left = ((shown == MASK) & canvas.generate[0]).sum(axis=1)
    np.testing.assert_array_equal(left, np.arange(8, -1, -1))


def test_guidance_identities_in_the_loop():
    canvas, rule = ragged_canvas(), CONFIDENCE
    plain = run(canvas, rule)
    one = run(canvas, rule, settings=settings_with(guidance_scale=1.0))
    np.testing.assert_array_equal(plain.tokens, one.tokens)
    np.testing.assert_array_equal(plain.nfe, one.nfe)
    assert int(plain.forwards) == int(one.forwards)
    hidden = canvas._replace(tokens=np.where(canvas.condition, MASK, canvas.tokens))
    none = run(canvas, rule, settings=settings_with(guidance_scale=0.0))
    unconditional = run(hidden, rule)
    generate = np.asarray(canvas.generate)
    np.testing.assert_array_equal(
        np.asarray(none.tokens)[generate], np.asarray(unconditional.tokens)[generate]
    )
    scale = run(canvas, rule, settings=settings_with(guidance_scale=3.0))
    weight = run(canvas, rule, settings=settings_with(cfg_weight=2.0))
    np.testing.assert_array_equal(scale.tokens, weight.tokens)
    np.testing.assert_array_equal(scale.nfe, 2 * np.asarray(plain.nfe))
    assert int(scale.forwards) == 2 * int(plain.forwards)
    assert (np.asarray(scale.tokens) != np.asarray(plain.tokens)).any()


@pytest.mark.slow
def test_guidance_in_an_interval_pays_only_there():
    settings = settings_with(
        guidance_scale=3.0, guidance_schedule=Interval(low=0.4, high=0.8)
    )
    result = run(ragged_canvas(), FixedQuota(num_steps=8), settings=settings)
    # Times 1, 7/8, ..., 1/8: 6/8, 5/8 and 4/8 lie inside. The row of 5 positions
    # spreads them over the first 5 steps, so that it meets the same times.
    np.testing.assert_array_equal(result.nfe, [8 + 3, 5 + 3, 0])
    assert int(result.forwards) == 8 + 3


def test_greedy_does_not_depend_on_the_key():
    settings = settings_with(temperature=0.0, top_k=3, top_p=0.5)
    canvas, rule = ragged_canvas(), CONFIDENCE
    first = run(canvas, rule, seed=0, settings=settings)
    second = run(canvas, rule, seed=1, settings=settings)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    only_one = run(canvas, rule, seed=2, settings=settings_with(top_k=1, top_p=1.0))
    np.testing.assert_array_equal(first.tokens, only_one.tokens)


def test_drawn_score_equals_confidence_when_greedy():
    canvas, settings = ragged_canvas(), settings_with(temperature=0.0)
    by_drawn = run(canvas, FixedQuota(num_steps=4, score=Drawn()), settings=settings)
    by_max = run(canvas, CONFIDENCE, settings=settings)
    np.testing.assert_array_equal(by_drawn.tokens, by_max.tokens)


def test_one_compilation_over_a_sweep():
    canvas = ragged_canvas()
    TRACES[0] = 0
    for seed, (tau, p, k, scale, noise, steps) in enumerate(
        [
            (0.0, 0.9, 3, 1.0, 0.0, 3),
            (0.7, 1.0, 5, 2.0, 1.0, 6),
            (1, 0.5, 11, 0, 2, 1),
        ]
    ):
        settings = Settings(temperature=tau, top_p=p, top_k=k, guidance_scale=scale)
        rule = FixedQuota(
            num_steps=steps, score=Margin(), choice_temperature=float(noise)
        )
        run(canvas, rule, seed=seed, settings=settings, max_forwards=100 + seed)
    assert TRACES[0] == 2  # one for each branch of guidance


def test_raw_and_typed_keys_agree_and_donation_spares_the_canvas():
    canvas, rule = ragged_canvas(), FirstHitting()
    tokens = jnp.asarray(canvas.tokens)
    typed = run(
        canvas._replace(tokens=tokens), rule, key=jax.random.key(3), block_length=4
    )
    raw = run(
        canvas._replace(tokens=tokens), rule, key=jax.random.PRNGKey(3), block_length=4
    )
    np.testing.assert_array_equal(typed.tokens, raw.tokens)
    np.testing.assert_array_equal(tokens, canvas.tokens)


def test_deferred_ids_come_last():
    def flat(params, tokens, positions, segment_ids, scored):
        at = jnp.take_along_axis(positions, scored, axis=1)
        sure = jnp.where(at % 2 == 0, 9.0, 5.0)[..., None]
        target = jnp.where(at % 2 == 0, EOS, 3)
        return jax.nn.one_hot(target, SIZE) * sure

    result = sample(
        flat,
        (),
        canvas_from_prompts([[1]], 6, mask_id=MASK),
        jax.random.key(0),
        rule=FixedQuota(num_steps=6, deferred_ids=(EOS,)),
        settings=Settings(temperature=0.0),
        mask_id=MASK,
        allowed=ALLOWED,
    )
    # The surer, even positions say EOS: they would come first.
    np.testing.assert_array_equal(result.step_committed[0], [-1, 0, 3, 1, 4, 2, 5])


def test_shifted_denoisers_read_one_to_the_left():
    def next_token(params, tokens, positions, segment_ids, scored):
        at = jnp.take_along_axis(positions, scored, axis=1)
        return jax.nn.one_hot(at + 1, SIZE)

    positions = jnp.arange(6)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    scored = jnp.array([[0, 2, 3, 5]])
    logits = shifted(next_token)((), positions, positions, segments, scored)
    np.testing.assert_array_equal(logits.argmax(-1), [[1, 2, 4, 5]])


def test_modalities_in_turn():
    canvas = canvas_from_prompts([[1, 3]] * 2, 8, mask_id=MASK)
    modality = np.asarray(canvas.modality).copy()
    modality[:, 6:] = Modality.IMAGE
    canvas = canvas._replace(modality=modality)
    result = sample_in_turn(
        predict,
        PARAMS,
        canvas,
        jax.random.key(0),
        plans=[
            (Modality.IMAGE, Plan(rule=FirstHitting())),
            (Modality.TEXT, defaults_for(Modality.TEXT, 4)),
        ],
        mask_id=MASK,
        allowed=ALLOWED,
    )
    order = np.asarray(result.step_committed)
    assert (np.asarray(result.tokens)[:, 2:] != MASK).all()
    assert order[:, 2:6].min() == 4
    assert order[:, 6:].max() == 3
    np.testing.assert_array_equal(result.nfe, 8)
    assert not np.asarray(result.still_masked).any()
    assert set(result.record) == {"IMAGE", "TEXT"}


def test_record_tells_how_it_was_made():
    result = run(
        ragged_canvas(),
        FirstHitting(),
        block_length=4,
        settings=settings_with(top_k=2),
    )
    assert result.record["rule"]["kind"] == "FirstHitting"
    assert result.record["settings"]["top_k"] == 2
    assert result.record["version"]


BAD = [
    ({"settings": Settings(temperature=-1.0)}, "temperature.*-1"),
    ({"settings": Settings(top_k=0)}, "top_k.*0"),
    ({"settings": Settings(top_p=0.0)}, r"top_p.*0\.0"),
    ({"settings": Settings(top_p=1.5)}, r"top_p.*1\.5"),
    (
        {"settings": Settings(guidance_scale=2.0, cfg_weight=1.0)},
        "guidance_scale.*cfg_weight",
    ),
    ({"settings": Settings(cfg_weight=float("nan"))}, "cfg_weight.*nan"),
    ({"settings": {Modality.IMAGE: Settings()}}, "settings.*TEXT"),
    ({"rule": FixedQuota(num_steps=0)}, "num_steps.*0"),
    ({"rule": FixedQuota(num_steps=3), "block_length": 4}, "num_steps.*3"),
    ({"rule": FixedQuota(num_steps=2, score="best")}, "score.*best"),
    ({"rule": FixedQuota(num_steps=2, choice_temperature=-1.0)}, "choice_temp.*-1"),
    ({"block_length": 3}, "block_length.*3"),
    ({"block_length": 0}, "block_length.*0"),
    ({"max_forwards": 0}, "max_forwards.*0"),
    ({"mask_id": SIZE}, f"mask_id.*{SIZE}"),
    ({"mask_id": -1}, "mask_id.*-1"),
    ({"eos_id": SIZE}, f"eos_id.*{SIZE}"),
    ({"eos_id": MASK}, f"eos_id.*{MASK}"),
    ({"allowed": np.ones((4, SIZE))}, "allowed.*float64"),
    ({"allowed": np.zeros((4, SIZE), bool)}, "allowed must have an id"),
    ({"key": jax.random.split(jax.random.key(0), 5)}, r"key.*\(5,\)"),
    ({"mask_id": 8}, "generate.*True only where"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_requests_are_refused_by_name(options, message):
    options = {
        "rule": FixedQuota(num_steps=4),
        "mask_id": MASK,
        "allowed": ALLOWED,
        "key": jax.random.key(0),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        sample(predict, PARAMS, ragged_canvas(), options.pop("key"), **options)


def test_bad_canvases_are_refused_by_name():
    canvas, rule = ragged_canvas(), CONFIDENCE
    tokens = canvas.tokens.copy()
    tokens[0, 0] = SIZE
    for field, value in {
        "tokens": tokens,
        "generate": np.ones_like(canvas.generate),
        "modality": np.full_like(canvas.modality, 9),
        "segment_ids": np.zeros_like(canvas.segment_ids),
        "condition": canvas.condition[:1],
    }.items():
        with pytest.raises(ValueError, match="canvas"):
            run(canvas._replace(**{field: value}), rule)
    with pytest.raises(ValueError, match=r"row_length.*4"):
        canvas_from_prompts([[1, 2, 3]], 8, mask_id=MASK, row_length=4)
    bare = canvas._replace(condition=np.zeros_like(canvas.condition))
    with pytest.raises(ValueError, match=r"guidance_scale.*condition"):
        run(bare, rule, settings=settings_with(guidance_scale=2.0))
    with pytest.raises(ValueError, match=r"score.*max_prob.*best"):
        score_from_name("best")
    with pytest.raises(ValueError, match="plans"):
        sample_in_turn(
            predict,
            PARAMS,
            canvas,
            jax.random.key(0),
            plans=[],
            mask_id=MASK,
            allowed=ALLOWED,
        )
    with pytest.raises(ValueError, match="length"):
        defaults_for(Modality.TEXT, 0)


def test_logits_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"predict.*\(3, 8, 12\)"):
        sample(
            predict,
            PARAMS,
            ragged_canvas(),
            jax.random.key(0),
            rule=FirstHitting(),
            mask_id=MASK,
            allowed=np.ones((4, SIZE + 1), bool),
        )
