import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmm.data import RowLayout, TextRows, chunk_documents, fill_rate, pack
from diffmm.data.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary(text=1000)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12))
def test_chunks_join_to_the_documents(lengths, limit):
    chunks = chunk_documents(lengths, limit)
    documents = [np.arange(n) for n in lengths]
    joined: list[list[int]] = [[] for _ in lengths]
    for document, start, stop in zip(*chunks, strict=True):
        assert 1 <= stop - start <= limit
        joined[document] += documents[document][start:stop].tolist()
    assert joined == [d.tolist() for d in documents]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60), st.integers(16, 24))
def test_pack_places_every_item_once_within_capacity(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= capacity for b in bins)
    # No two bins could have shared one: every item was offered to all open bins.
    loads = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_pack_is_best_fit():
    # 7 leaves 3, 6 leaves 4; 3 must go to the fuller bin, then 4 fits the other.
    assert pack([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]


def test_log_normal_documents_fill_97_percent_of_rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.0, 1.0, 5000).astype(int), 1, None)
    documents = [np.arange(n) % 1000 for n in lengths]
    layout = RowLayout(vocabulary=VOCABULARY, length=1024)
    source = TextRows(layout, documents)
    rows = [source.row(i) for i in range(len(source))]
    filled = np.mean([np.mean(r.segment_ids > 0) for r in rows])
    assert filled >= 0.97
    # No token is lost: content plus one eos per document.
    maskable = sum(int(r.maskable.sum()) for r in rows)
    assert maskable == lengths.sum() + len(lengths)
    assert source.mean_tokens == pytest.approx(maskable / len(rows))
    tokens = np.concatenate([r.tokens[r.maskable] for r in rows])
    expected = np.bincount(np.concatenate(documents), minlength=1000)
    found = np.bincount(tokens[tokens < 1000], minlength=1000)
    np.testing.assert_array_equal(found, expected)


def test_fill_rate():
    assert fill_rate([4, 7, 3, 6], [[1, 2], [3, 0]], 10) == 1.0
    assert fill_rate([5], [[0]], 10) == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="max_length=0"):
        chunk_documents([3], 0)
    with pytest.raises(ValueError, match=r"lengths\[1\]=-1"):
        chunk_documents([3, -1], 2)
    with pytest.raises(ValueError, match=r"lengths\[1\]=9 is larger than capacity=8"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match=r"lengths\[0\]=0"):
        pack([0], 8)
