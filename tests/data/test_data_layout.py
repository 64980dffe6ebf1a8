import dataclasses

import numpy as np
import pytest

from diffmm.data import (
    TASKS,
    BadExampleError,
    JointVocabulary,
    RowLayout,
    canvas,
    infill,
    read_target,
    stack,
    validate_batch,
)
from diffmm.typing import Batch, Canvas, Group, Modality

VOCABULARY = JointVocabulary(text=20, image=8, audio=5)
LAYOUT = RowLayout(vocabulary=VOCABULARY, length=16)
PREDICT = RowLayout(
    vocabulary=VOCABULARY, length=24, pad_mode="predict", stretch_length={"text": 7}
)
T, I, A, N = Modality.TEXT, Modality.IMAGE, Modality.AUDIO, Modality.NONE  # noqa: E741
TEXT, IMAGE, AUDIO = np.array([3, 4, 5]), np.array([7, 0, 1, 2]), np.array([4, 0])


def codes_of(task):
    return {"text": None, "t2i": IMAGE, "i2t": IMAGE, "joint_ti": IMAGE}.get(
        task, AUDIO
    )


def row_of(layout, task):
    return layout.row(task, text=TEXT, codes=codes_of(task))


def names(tokens):
    out = []
    for token in tokens.tolist():
        special = [n for n in VOCABULARY.specials if VOCABULARY.id(n) == token]
        out.append(special[0] if special else token)
    return out


t_ids, i_ids, a_ids = [3, 4, 5], [27, 20, 21, 22], [32, 28]
PAD = ["pad"]


@pytest.mark.parametrize(
    ("task", "tokens", "modality", "group"),
    [
        (
            "text",
            ["task_text", "bos", *t_ids, "eos", *PAD * 10],
            [N, N, T, T, T, T, *[N] * 10],
            [4, 4, 0, 0, 0, 3, *[4] * 10],
        ),
        (
            "t2i",
            ["task_t2i", "bos", *t_ids, "eos", "boi", *i_ids, "eoi", *PAD * 4],
            [*[N] * 7, *[I] * 4, *[N] * 5],
            [*[4] * 7, *[1] * 4, *[4] * 5],
        ),
        (
            "i2t",
            ["task_i2t", "boi", *i_ids, "eoi", "bos", *t_ids, "eos", *PAD * 4],
            [*[N] * 8, *[T] * 4, *[N] * 4],
            [*[4] * 8, 0, 0, 0, 3, *[4] * 4],
        ),
        (
            "t2a",
            ["task_t2a", "bos", *t_ids, "eos", "boa", *a_ids, "eoa", *PAD * 6],
            [*[N] * 7, A, A, *[N] * 7],
            [*[4] * 7, 2, 2, *[4] * 7],
        ),
        (
            "a2t",
            ["task_a2t", "boa", *a_ids, "eoa", "bos", *t_ids, "eos", *PAD * 6],
            [*[N] * 6, *[T] * 4, *[N] * 6],
            [*[4] * 6, 0, 0, 0, 3, *[4] * 6],
        ),
        (
            "joint_ti",
            ["task_t2i", "bos", *t_ids, "eos", "boi", *i_ids, "eoi", *PAD * 4],
            [N, N, T, T, T, N, N, *[I] * 4, *[N] * 5],
            [4, 4, 0, 0, 0, 4, 4, *[1] * 4, *[4] * 5],
        ),
    ],
)
def test_templates(task, tokens, modality, group):
    row = row_of(LAYOUT, task)
    assert names(row.tokens) == tokens
    assert row.modality.tolist() == modality
    assert row.group.tolist() == group
    np.testing.assert_array_equal(row.maskable, row.modality != N)
    np.testing.assert_array_equal(row.loss_weight, row.maskable)
    used = 16 - tokens.count("pad")
    assert row.segment_ids.tolist() == [1] * used + [0] * (16 - used)
    assert row.positions[:used].tolist() == list(range(used))
    assert TASKS[int(row.task)] == task
    # The condition is the content of the first stretch of a conditional row, only.
    content = row.tokens < 33
    expected = content & ~row.maskable
    np.testing.assert_array_equal(row.condition, expected)
    assert row.condition.any() == (task in ("t2i", "i2t", "t2a", "a2t"))


@pytest.mark.parametrize("layout", [LAYOUT, PREDICT])
@pytest.mark.parametrize("task", TASKS)
def test_rows_are_valid_and_typed(layout, task):
    row = row_of(layout, task)
    batch = stack([row, row])
    validate_batch(batch, VOCABULARY)
    kinds = " ".join(str(field.dtype) for field in row)
    assert kinds == "int32 int32 int32 int8 bool bool float32 int8 int8"


def test_predict_mode_makes_closing_and_padding_targets():
    row = row_of(PREDICT, "t2i")
    assert names(row.tokens)[7:] == [*i_ids, "eoi", *PAD * 12]
    assert row.maskable[7:].all()
    assert not row.maskable[:7].any()
    assert (row.modality[7:] == I).all()
    assert row.group[7:].tolist() == [1] * 4 + [3] * 13
    assert (row.segment_ids == 1).all()
    # A caption stretch has its configured length and not the rest of the row.
    row = row_of(PREDICT, "i2t")
    assert names(row.tokens)[8:] == [*t_ids, "eos", *PAD * 12]
    assert np.flatnonzero(row.maskable).tolist() == list(range(8, 15))
    assert row.segment_ids.tolist() == [1] * 15 + [0] * 9
    row = row_of(PREDICT, "joint_ta")
    assert names(row.tokens)[:10] == ["task_t2a", "bos", *t_ids, "eos", *PAD * 3, "boa"]
    assert row.maskable[2:9].all()
    assert not row.maskable[9]
    assert row.group[2:10].tolist() == [0, 0, 0, 3, 3, 3, 3, 4]


def test_predicted_padding_is_legal_for_its_modality():
    for task in TASKS:
        row = row_of(PREDICT, task)
        table = PREDICT.allowed_table()
        assert table[row.modality, row.tokens][row.maskable].all()
        row = row_of(LAYOUT, task)
        table = LAYOUT.allowed_table()
        assert table[row.modality, row.tokens][row.maskable].all()


@pytest.mark.parametrize("layout", [LAYOUT, PREDICT])
def test_one_document_is_the_text_template(layout):
    for a, b in zip(layout.text_row([TEXT]), row_of(layout, "text"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_segments_equal_the_documents_alone():
    documents = [np.arange(4), np.array([7]), np.arange(2)]
    row = LAYOUT.text_row(documents)
    for segment, document in enumerate(documents, start=1):
        here = row.segment_ids == segment
        alone = LAYOUT.text_row([document])
        there = alone.segment_ids == 1
        for name in Batch._fields:
            if name not in ("segment_ids", "task"):
                np.testing.assert_array_equal(
                    getattr(row, name)[here], getattr(alone, name)[there], err_msg=name
                )
    assert (row.segment_ids == 0).sum() == 16 - 7 - 3 * 3
    validate_batch(stack([row]), VOCABULARY)


def test_unclosed_pieces_have_no_eos():
    row = LAYOUT.text_row([TEXT, TEXT], closed=[False, True])
    assert names(row.tokens)[:11] == [
        *("task_text", "bos", *t_ids),
        *("task_text", "bos", *t_ids, "eos"),
    ]
    assert row.group[:11].tolist() == [4, 4, 0, 0, 0, 4, 4, 0, 0, 0, 3]


def test_predicted_tail_of_a_packed_row_belongs_to_its_last_document():
    row = PREDICT.text_row([TEXT, TEXT])
    assert (row.segment_ids[6:] == 2).all()
    assert row.positions[6:].tolist() == list(range(18))
    assert row.maskable[8:].all()
    assert row.group[11:].tolist() == [3] * 13
    row = PREDICT.text_row([TEXT, TEXT], closed=[True, False])
    assert (row.segment_ids[11:] == 0).all()


def same_geometry(a: Canvas, row: Batch):
    for name in ("positions", "segment_ids", "modality", "condition"):
        np.testing.assert_array_equal(getattr(a, name), getattr(row, name), name)
    np.testing.assert_array_equal(a.generate, row.maskable)
    np.testing.assert_array_equal(a.tokens == VOCABULARY.mask_id, row.maskable)
    np.testing.assert_array_equal(
        np.where(a.generate, row.tokens, a.tokens), row.tokens
    )


LENGTHS = {"text": 3, "image": 4, "audio": 2}


@pytest.mark.parametrize("layout", [LAYOUT, PREDICT])
@pytest.mark.parametrize("task", TASKS)
def test_canvas_filled_with_the_target_is_the_training_row(layout, task):
    row = row_of(layout, task)
    condition = {}
    if task in ("t2i", "t2a"):
        condition = {"text": TEXT}
    elif task in ("i2t", "a2t"):
        condition = {"codes": codes_of(task)}
    target_length = None if layout is PREDICT else LENGTHS
    empty = canvas(layout, task, **condition, target_length=target_length)
    same_geometry(empty, row)
    for modality in {"text": ["text"], "i2t": ["text"], "a2t": ["text"]}.get(
        task, ["image" if task.endswith("i") else "audio"]
    ):
        found = read_target(row.tokens, empty, VOCABULARY, modality=modality)
        expected = TEXT if modality == "text" else codes_of(task)
        np.testing.assert_array_equal(found, expected)


def test_text_prompt_is_kept_and_continued():
    a = canvas(LAYOUT, "text", text=TEXT[:2], target_length=4)
    assert names(a.tokens)[:9] == ["task_text", "bos", 3, 4, *["mask"] * 5]
    assert a.condition.nonzero()[0].tolist() == [2, 3]
    assert a.generate.sum() == 5  # four tokens and the closing one
    done = np.where(a.generate, 9, a.tokens)
    done[6] = VOCABULARY.id("eos")
    np.testing.assert_array_equal(read_target(done, a, VOCABULARY), [9, 9])
    b = canvas(PREDICT, "text", text=TEXT[:2], target_length=4)
    assert b.generate.sum() == 4
    assert canvas(PREDICT, "text", text=TEXT[:2]).generate.sum() == 24 - 4


def test_fixed_code_count():
    layout = dataclasses.replace(LAYOUT, code_count={"image": 4})
    assert canvas(layout, "t2i", text=TEXT).generate.sum() == 4
    with pytest.raises(ValueError, match=r"differs from code_count\[image\]=4"):
        canvas(layout, "t2i", text=TEXT, target_length=3)
    with pytest.raises(ValueError, match=r"3 given, code_count\[image\]=4 needed"):
        layout.row("t2i", text=TEXT, codes=IMAGE[:3])


def test_infill_keeps_all_but_the_span():
    row = LAYOUT.text_row([np.arange(6)])
    a = infill(row, (1, 4), mask_id=VOCABULARY.mask_id)
    assert a.generate.nonzero()[0].tolist() == [3, 4, 5]
    np.testing.assert_array_equal(a.tokens[~a.generate], row.tokens[~a.generate])
    assert (a.tokens[a.generate] == VOCABULARY.mask_id).all()
    chosen = np.zeros(16, bool)
    chosen[[2, 7]] = True
    assert infill(row, chosen, mask_id=0).generate.sum() == 2
    chosen[1] = True
    with pytest.raises(ValueError, match=r"generate\[1\] is True"):
        infill(row, chosen, mask_id=0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 7\]"):
        infill(row, (3, 9), mask_id=0)


def test_read_target_refuses_what_is_no_content():
    a = canvas(LAYOUT, "t2i", text=TEXT, target_length=4)
    with pytest.raises(ValueError, match="special token 'mask'"):
        read_target(a.tokens, a, VOCABULARY)
    both = canvas(LAYOUT, "joint_ti", target_length=LENGTHS)
    with pytest.raises(ValueError, match=r"text.*image"):
        read_target(both.tokens, both, VOCABULARY)
    with pytest.raises(ValueError, match="not generated"):
        read_target(a.tokens, a, VOCABULARY, modality="audio")


def test_stack():
    batch = stack([row_of(LAYOUT, task) for task in TASKS])
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == (7, 16)
    assert batch.task.tolist() == list(range(7))
    canvases = stack([canvas(LAYOUT, "text", target_length=n) for n in (1, 5)])
    assert isinstance(canvases, Canvas)
    assert canvases.generate.sum(axis=1).tolist() == [2, 6]
    with pytest.raises(ValueError, match="empty"):
        stack([])
    with pytest.raises(ValueError, match="different shapes"):
        stack([row_of(LAYOUT, "text"), row_of(PREDICT, "text")])


def test_modality_weight_scales_loss_weight_only():
    layout = dataclasses.replace(LAYOUT, modality_weight={"image": 0.25})
    plain, weighted = row_of(LAYOUT, "joint_ti"), row_of(layout, "joint_ti")
    factor = np.where(plain.modality == I, 0.25, 1.0)
    np.testing.assert_array_equal(weighted.loss_weight, plain.loss_weight * factor)
    np.testing.assert_array_equal(weighted.maskable, plain.maskable)


def test_rows_do_not_share_tokens():
    first = LAYOUT.row("t2i", text=TEXT, codes=IMAGE)
    second = LAYOUT.row("t2i", text=TEXT + 1, codes=IMAGE)
    assert first.tokens[2] == 3
    assert second.tokens[2] == 4
    with pytest.raises(ValueError, match="read-only"):
        first.maskable[0] = True


def test_examples_that_do_not_fit():
    with pytest.raises(BadExampleError, match=r"needs 19 positions.*length=16"):
        LAYOUT.row("t2i", text=np.zeros(10, int), codes=IMAGE)
    with pytest.raises(BadExampleError, match="text is empty"):
        LAYOUT.row("t2i", text=[], codes=IMAGE)
    with pytest.raises(BadExampleError, match="image is empty"):
        canvas(LAYOUT, "i2t", codes=[], target_length=3)
    with pytest.raises(BadExampleError, match="need 18 positions"):
        LAYOUT.text_row([np.zeros(15, int)])
    with pytest.raises(BadExampleError, match="the stretch has 7"):
        PREDICT.row("i2t", text=np.zeros(7, int), codes=IMAGE)
    with pytest.raises(ValueError, match="needs 23 positions"):
        canvas(LAYOUT, "text", text=np.zeros(10, int), target_length=10)


def test_bad_arguments():
    with pytest.raises(ValueError, match="value 20 at index 1 is outside"):
        LAYOUT.row("t2i", text=[1, 20], codes=IMAGE)
    with pytest.raises(ValueError, match="must be one of"):
        LAYOUT.row("t2v", text=TEXT, codes=IMAGE)
    with pytest.raises(ValueError, match="needs codes"):
        LAYOUT.row("t2i", text=TEXT)
    with pytest.raises(ValueError, match="text only"):
        LAYOUT.row("text", text=TEXT, codes=IMAGE)
    with pytest.raises(ValueError, match="pad_mode='left'"):
        RowLayout(vocabulary=VOCABULARY, length=8, pad_mode="left")
    with pytest.raises(ValueError, match="length=0"):
        RowLayout(vocabulary=VOCABULARY, length=0)
    with pytest.raises(ValueError, match="modality_weight"):
        dataclasses.replace(LAYOUT, modality_weight={"text": -1.0})
    with pytest.raises(ValueError, match="target_length of image is needed"):
        canvas(LAYOUT, "t2i", text=TEXT)
    with pytest.raises(ValueError, match="target_length=0"):
        canvas(LAYOUT, "t2i", text=TEXT, target_length=0)
    with pytest.raises(ValueError, match="needs the condition text"):
        canvas(LAYOUT, "t2i", target_length=4)
    with pytest.raises(ValueError, match="generates it"):
        canvas(LAYOUT, "i2t", text=TEXT, codes=IMAGE, target_length=4)
    with pytest.raises(ValueError, match="no place"):
        canvas(LAYOUT, "text", codes=IMAGE, target_length=4)
    unbounded = RowLayout(vocabulary=VOCABULARY, length=24, pad_mode="predict")
    with pytest.raises(ValueError, match=r"stretch_length\[text\]"):
        row_of(unbounded, "joint_ti")


BATCH = stack([row_of(LAYOUT, task) for task in TASKS])


def changed(field, place, value):
    array = getattr(BATCH, field).copy()
    array[place] = value
    return BATCH._replace(**{field: array})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            changed("tokens", (0, 2), 46),
            r"tokens\[0, 2\]=46; allowed: ids in",
        ),
        (changed("tokens", (0, 2), VOCABULARY.mask_id), r"tokens\[0, 2\]=.*mask id"),
        (changed("tokens", (0, 2), 21), r"tokens\[0, 2\]=21 is not .* modality text"),
        (changed("modality", (1, 8), N), r"modality\[1, 8\]=3"),
        (changed("modality", (1, 8), 9), r"modality\[1, 8\]=9; .*\[0, 4\)"),
        (changed("group", (1, 8), Group.TEXT), r"group\[1, 8\]=0"),
        (changed("task", 2, 11), r"task\[2\]=11"),
        (changed("condition", (1, 8), True), r"condition\[1, 8\]=True"),
        (changed("positions", (1, 8), 0), r"positions\[1, 8\]=0"),
        (changed("loss_weight", (1, 8), np.nan), r"loss_weight\[1, 8\]=nan"),
        (BATCH._replace(task=BATCH.task[:2]), r"task: shape \(2,\) given, \(7,\)"),
        (BATCH._replace(maskable=BATCH.tokens), "maskable: dtype int32 given, bool"),
    ],
)
def test_validate_batch_names_what_is_wrong(batch, message):
    validate_batch(BATCH, VOCABULARY)
    with pytest.raises(ValueError, match=message):
        validate_batch(batch, VOCABULARY)
