"""Joined rows mean what their parts mean; tri-modal data as a whole."""

import numpy as np
import pytest

from diffmm.data import JointVocabulary, PairRows, RowLayout, validate_batch
from diffmm.data.joined import JoinedRows, join
from diffmm.data.sources import Example, MemorySource
from diffmm.data.templates import BadExampleError
from diffmm.data.text_tokenizers import ByteTokenizer
from diffmm.data.trimodal import SPLITS, tokenise
from diffmm.typing import Batch

VOCABULARY = JointVocabulary(text=256, image=3, audio=5)
LAYOUT = RowLayout(vocabulary=VOCABULARY, length=14)


def pairs(number=5):
    text = [np.array([97 + i] * (1 + i % 3)) for i in range(number)]
    codes = [np.array([i % 5] * 3) for i in range(number)]
    return PairRows(LAYOUT, "t2a", text=text, codes=codes)


def test_join_keeps_every_field_of_its_parts():
    rows = pairs()
    parts = [rows.row(0), rows.row(1)]
    used = [int((part.segment_ids != 0).sum()) for part in parts]
    joined = join(parts, 24, pad_id=VOCABULARY.pad_id)
    validate_batch(Batch(*(np.asarray(f)[None] for f in joined)), VOCABULARY)
    for name in Batch._fields[:-1]:
        field = getattr(joined, name)
        left, right = field[: used[0]], field[used[0] : sum(used)]
        np.testing.assert_array_equal(left, getattr(parts[0], name)[: used[0]])
        expected = getattr(parts[1], name)[: used[1]]
        if name == "segment_ids":
            expected = expected + 1
        np.testing.assert_array_equal(right, expected, err_msg=name)
    assert not joined.segment_ids[sum(used) :].any()
    assert not joined.maskable[sum(used) :].any()
    assert (joined.tokens[sum(used) :] == VOCABULARY.pad_id).all()


def test_parts_that_do_not_fit_are_refused():
    rows = pairs()
    with pytest.raises(BadExampleError, match="length=12"):
        join([rows.row(0), rows.row(1)], 12, pad_id=VOCABULARY.pad_id)
    with pytest.raises(ValueError, match="per_row=0"):
        JoinedRows(rows, per_row=0, length=24, pad_id=VOCABULARY.pad_id)


def test_an_epoch_holds_every_part_and_neighbours_change():
    rows = JoinedRows(pairs(6), per_row=2, length=24, pad_id=VOCABULARY.pad_id)
    assert len(rows) == 3
    assert rows.mean_tokens == 6.0

    def epoch(number):
        built = [rows.row(i, seed=1, epoch=number) for i in range(len(rows))]
        return np.stack([row.tokens for row in built])

    def letters(tokens):
        return sorted(tokens[(tokens >= 97) & (tokens < 103)].tolist())

    np.testing.assert_array_equal(epoch(0), epoch(0))
    assert letters(epoch(0)) == letters(epoch(1)) == letters(epoch(5))
    assert any((epoch(0) != epoch(k)).any() for k in (1, 2, 3))


class FirstCode:
    """A tokenizer for tests: a constant array becomes its value, repeated."""

    def __init__(self, size, count):
        self.name, self.vocabulary_size, self.fingerprint = "first", size, f"{size}"
        self.count = count

    def encode(self, item):
        if np.isnan(item).any():
            raise ValueError("item is NaN")
        return np.full(self.count, int(np.ravel(item)[0]), np.int32)

    def decode(self, codes):
        return np.asarray(codes)


def sources():
    def image(i):
        return Example(
            texts=(f"n{i}", f"number {i}"),
            image=np.full((2, 2), float("nan") if i == 3 else float(i)),
            label=i,
        )

    def audio(i):
        return Example(
            texts=("yes" if i else "no",),
            audio=np.full(8, float(i), np.float32),
            sample_rate=8000,
        )

    prose = [Example(texts=("some words of prose",))]
    return {
        "text": {split: MemorySource("prose", prose) for split in SPLITS[:2]},
        "image": {
            split: MemorySource("images", [image(i) for i in range(4)])
            for split in SPLITS
        },
        "audio": {
            split: MemorySource("sounds", [audio(i) for i in range(2)])
            for split in SPLITS
        },
    }


TOKENIZERS = {
    "text": ByteTokenizer(),
    "image": FirstCode(4, 16),
    "audio": FirstCode(2, 4),
}


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffmm.data.sources.encode._LOG.warning", lambda *args: None)
        return tokenise(sources(), TOKENIZERS)


def test_rows_of_every_task_fit_and_are_valid(data):
    # task, 16 codes and 8 caption bytes, two brackets each.
    assert data.length == 1 + (16 + 2) + (8 + 2)
    rows = data.rows("train")
    assert set(rows) == {"text", "t2i", "i2t", "t2a", "a2t"}
    for source in rows.values():
        row = source.row(0)
        assert row.tokens.shape == (data.length,)
        validate_batch(Batch(*(np.asarray(f)[None] for f in row)), data.vocabulary)
    # Short pairs share a row: 1 + (4 + 2) + (3 + 2) = 12 positions, two fit in 29.
    assert rows["t2a"].row(0).segment_ids.max() == 2
    assert data.pairs["train"]["image"].skipped == 1
    assert data.pairs["test"]["audio"].labels == ["no", "yes"]


def test_canvases_agree_with_training_rows(data):
    pairs_ = data.pairs["train"]["image"]
    for task, condition in (("t2i", pairs_.text[0][1]), ("i2t", pairs_.codes[0])):
        canvas = data.canvases(task, [condition])
        row = PairRows(
            data.layout("image"),
            task,
            text=[pairs_.text[0][1]],
            codes=pairs_.codes[:1],
        ).row(0)
        length = canvas.tokens.shape[1]
        np.testing.assert_array_equal(canvas.generate[0], row.maskable[:length])
        np.testing.assert_array_equal(canvas.positions[0], row.positions[:length])
        np.testing.assert_array_equal(
            np.where(canvas.generate[0], row.tokens[:length], canvas.tokens[0]),
            row.tokens[:length],
        )


def test_missing_modalities_and_splits_are_named():
    incomplete = sources()
    del incomplete["audio"]
    with pytest.raises(ValueError, match="lacks 'audio'"):
        tokenise(incomplete, TOKENIZERS)
    incomplete = sources()
    del incomplete["image"]["test"]
    with pytest.raises(ValueError, match="'test'"):
        tokenise(incomplete, TOKENIZERS)
