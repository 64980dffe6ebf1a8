import json
import logging

import grain
import numpy as np
import pytest

from diffmm.data import (
    BadExampleError,
    JointVocabulary,
    PairRows,
    RowLayout,
    RowSource,
    TextRows,
    add_counts,
    make_loader,
    process_rows,
    realised_shares,
    token_counts,
    validate_batch,
)
from diffmm.typing import Batch

VOCABULARY = JointVocabulary(text=200, image=16, audio=8)
LAYOUT = RowLayout(vocabulary=VOCABULARY, length=32)
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 200, n) for n in RNG.integers(1, 60, 40)]
CAPTIONS = [
    [RNG.integers(0, 200, n) for n in RNG.integers(2, 6, 1 + i % 3)] for i in range(30)
]
IMAGES = RNG.integers(0, 16, (30, 16))
WORDS = [RNG.integers(0, 200, 3) for _ in range(25)]
SOUNDS = [RNG.integers(0, 8, n) for n in RNG.integers(4, 12, 25)]
SOURCES = {
    "text": TextRows(LAYOUT, DOCUMENTS),
    "t2i": PairRows(LAYOUT, "t2i", text=CAPTIONS, codes=IMAGES),
    "t2a": PairRows(LAYOUT, "t2a", text=WORDS, codes=SOUNDS),
}


def loader(batch_size=8, **kwargs):
    arguments = {"seed": 1, "stratum": 8, "vocabulary": VOCABULARY} | kwargs
    return make_loader(SOURCES, batch_size=batch_size, **arguments)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def joined(batches):
    return Batch(*(np.concatenate(f) for f in zip(*batches, strict=True)))


def assert_equal(a, b):
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.fixture(scope="module")
def stream():
    """The first 96 rows, read without threads."""
    return joined(take(loader(batch_size=8, num_threads=0), 12))


def test_sources_follow_the_protocol():
    for source in SOURCES.values():
        assert isinstance(source, RowSource)
        rows = [source.row(i) for i in range(len(source))]
        tokens = [int(row.maskable.sum()) for row in rows]
        # Captions do not count in t2i, so the mean over one epoch is the exact mean.
        assert source.mean_tokens == pytest.approx(np.mean(tokens))


@pytest.mark.parametrize("batch_size", [1, 4, 12, 48])
def test_order_does_not_depend_on_the_batch_size(stream, batch_size):
    it = loader(batch_size=batch_size)
    assert_equal(joined(take(it, 96 // batch_size)), stream)
    it.close()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_stream_row_by_row(stream, process_count):
    for p in range(process_count):
        it = loader(process_index=p, process_count=process_count)
        mine = process_rows(8, process_index=p, process_count=process_count)
        for step, batch in enumerate(take(it, 5)):
            expected = Batch(*(field[8 * step + mine] for field in stream))
            assert_equal(batch, expected)
        it.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_gives_exactly_the_next_batch(stream, num_threads):
    it = loader(num_threads=num_threads)
    take(it, 3)
    state = json.loads(json.dumps(it.get_state()))
    following = take(it, 4)
    again = loader(num_threads=num_threads)
    take(again, 1)
    again.set_state(state)
    assert again.next_row == 24
    for a, b in zip(take(again, 4), following, strict=True):
        assert_equal(a, b)
    # The state is a row index: it also fits another batch size.
    wider = loader(batch_size=12, num_threads=num_threads)
    wider.set_state(state)
    assert_equal(next(wider), Batch(*(field[24:36] for field in stream)))
    for one in (it, again, wider):
        one.close()


def test_state_of_another_stream_is_refused():
    state = loader(stratum=None).get_state()
    other = loader(batch_size=4, stratum=None)
    with pytest.raises(ValueError, match="stratum"):
        other.set_state(state)
    other.set_state({"next_row": state["next_row"]})


def test_loader_is_a_grain_iterator():
    assert isinstance(loader(num_threads=0), grain.DatasetIterator)


def test_realised_token_shares_approach_the_request():
    shares = {"text": 0.5, "t2i": 0.3, "t2a": 0.2}
    it = make_loader(SOURCES, shares, batch_size=64, seed=0, num_threads=0)
    by_task, by_source = {}, {}
    for batch in (next(it) for _ in range(40)):
        by_task = add_counts(by_task, token_counts(batch))
        counts = token_counts(batch, it.last_sources, it.names)
        by_source = add_counts(by_source, counts)
    assert by_task == by_source  # one source per task here, of the same name
    found = realised_shares(by_source)
    for name, share in shares.items():
        # 2560 rows: whole epochs have exact means; what is left is the last epoch.
        assert found[name] == pytest.approx(share, rel=0.03)
    total = sum(c.positions for c in by_source.values())
    assert total == 40 * 64 * 32
    rows = it.mixture.counts(40 * 64)
    assert {name: c.rows for name, c in by_source.items()} == rows
    pads = sum(c.pad for c in by_source.values())
    assert 0 < pads < total


def test_captions_rotate_with_the_epoch():
    source = SOURCES["t2i"]
    for index in range(6):
        n = len(CAPTIONS[index])
        shown = [
            source.row(index, seed=5, epoch=e).tokens.tobytes() for e in range(2 * n)
        ]
        assert len(set(shown[:n])) == n
        assert shown[:n] == shown[n:]
    starts = {int(source.row(2, seed=s).tokens[2]) for s in range(30)}
    assert len(starts) == len({int(c[0]) for c in CAPTIONS[2]})


def test_bad_examples_are_replaced_and_counted(caplog):
    words = list(WORDS)
    for i in (0, 7, 20):
        words[i] = np.zeros(40, int)
    words[11] = np.zeros(0, int)
    source = PairRows(LAYOUT, "t2a", text=words, codes=SOUNDS)

    def build():
        return make_loader({"a": source}, batch_size=5, seed=0, num_threads=0)

    it = build()
    with caplog.at_level(logging.WARNING, logger="diffmm.data"):
        batches = take(it, 10)
    assert it.skipped == {"a": 4}
    assert "skipped" in caplog.text
    assert "needs" in caplog.text
    again = build()
    again.set_state({"next_row": 25})
    for a, b in zip(take(again, 5), batches[5:], strict=True):
        assert_equal(a, b)


def test_a_source_without_usable_examples_raises():
    class Broken:
        mean_tokens = 3.0

        def __len__(self):
            return 4

        def row(self, index, *, seed=0, epoch=0):
            raise BadExampleError(f"example {index} is broken")

    it = make_loader({"broken": Broken()}, batch_size=2, seed=0, num_threads=0)
    with pytest.raises(ValueError, match="no usable example among 4"):
        next(it)
    with pytest.raises(ValueError, match="no example of task 't2a' fits"):
        PairRows(LAYOUT, "t2a", text=[np.zeros(50, int)], codes=[SOUNDS[0]])


def test_errors_that_are_not_of_one_example_surface():
    source = PairRows(LAYOUT, "t2a", text=WORDS, codes=[s + 7 for s in SOUNDS])
    it = make_loader({"a": source}, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="audio codes: value"):
        next(it)
    it.close()


def test_finite_stream_drops_the_incomplete_batch():
    it = loader(num_rows=27, num_threads=0)
    assert len(list(it)) == 3


def test_predicted_padding_counts_in_mean_tokens():
    layout = RowLayout(vocabulary=VOCABULARY, length=32, pad_mode="predict")
    for source in (
        TextRows(layout, DOCUMENTS),
        PairRows(layout, "t2a", text=WORDS, codes=SOUNDS),
    ):
        tokens = [int(source.row(i).maskable.sum()) for i in range(len(source))]
        assert source.mean_tokens == pytest.approx(np.mean(tokens))
        it = make_loader({"a": source}, batch_size=8, seed=0, num_threads=0)
        validate_batch(next(it), VOCABULARY)


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size=0"):
        loader(batch_size=0)
    with pytest.raises(ValueError, match="process_count=3 must divide batch_size=8"):
        loader(process_count=3)
    with pytest.raises(ValueError, match="unknown source 'video'"):
        make_loader(SOURCES, {"video": 1.0}, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="sources is empty"):
        make_loader({}, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="has no pairs"):
        PairRows(LAYOUT, "text", text=WORDS, codes=SOUNDS)
    with pytest.raises(ValueError, match="25 examples, codes has 3"):
        PairRows(LAYOUT, "t2a", text=WORDS, codes=SOUNDS[:3])
    with pytest.raises(ValueError, match="no token"):
        TextRows(LAYOUT, [[], []])
