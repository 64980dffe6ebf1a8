import numpy as np
import pytest

from diffmm.data import Mixture, row_probabilities, stable_hash

P = {"text": 5 / 47, "image": 12 / 47, "audio": 30 / 47}
LENGTHS = {"text": 11, "image": 7, "audio": 50}


def make(**kwargs):
    arguments = {"seed": 3, "stratum": 32} | kwargs
    return Mixture(LENGTHS, P, **arguments)


def test_golden_probabilities():
    shares = dict.fromkeys(("t", "i", "a"), 1 / 3)
    p = row_probabilities(shares, {"t": 3072, "i": 1280, "a": 512})
    np.testing.assert_allclose(list(p.values()), np.array([5, 12, 30]) / 47, rtol=1e-12)


def test_a_source_without_share_has_probability_zero():
    assert row_probabilities({"a": 2}, {"a": 5, "b": 1}) == {"a": 1.0, "b": 0.0}
    mixture = Mixture({"a": 3, "b": 0}, {"a": 1.0, "b": 0.0}, seed=0, stratum=4)
    assert {mixture[i].source for i in range(20)} == {"a"}


@pytest.mark.parametrize("stratum", [1, 2, 7, 32, 256])
def test_each_stratum_holds_floor_or_ceil(stratum):
    mixture = make(stratum=stratum)
    sources = mixture.sources(np.arange(300 * stratum)).reshape(300, stratum)
    for s, p in enumerate(P.values()):
        count = (sources == s).sum(axis=1)
        assert count.min() >= np.floor(stratum * p)
        assert count.max() <= np.ceil(stratum * p)
    # Strata are independent and each count is two-valued, with variance at most 1/4:
    # five standard errors of the mean are 5 * 0.5 / sqrt(300) = 0.144.
    for s, p in enumerate(P.values()):
        assert abs((sources == s).sum(axis=1).mean() - stratum * p) < 0.144


def test_integer_expectations_are_exact():
    p = {"a": 0.3, "b": 0.5, "c": 0.2}
    mixture = Mixture(dict.fromkeys(p, 9), p, seed=0, stratum=10)
    sources = mixture.sources(np.arange(20_000)).reshape(-1, 10)
    for s, count in enumerate((3, 5, 2)):
        assert ((sources == s).sum(axis=1) == count).all()


def test_the_order_inside_a_stratum_is_shuffled():
    sources = make(stratum=64).sources(np.arange(64 * 400)).reshape(400, 64)
    # Frequency of "audio" at each place: mean p, standard error sqrt(p(1-p)/400);
    # the largest of 64 deviations stays below 4.5 standard errors.
    p = P["audio"]
    rate = (sources == 2).mean(axis=0)
    assert np.abs(rate - p).max() < 4.5 * np.sqrt(p * (1 - p) / 400)


def test_counts_and_ranks_are_those_of_reading_in_order():
    mixture = make()
    seen = dict.fromkeys(LENGTHS, 0)
    for j in range(500):
        assert mixture.counts(j) == seen
        draw = mixture[j]
        rank = draw.epoch * LENGTHS[draw.source] + draw.position
        assert rank == seen[draw.source]
        assert mixture.names[int(mixture.sources(j))] == draw.source
        seen[draw.source] += 1


@pytest.mark.parametrize("large", [2**20, 0])
def test_each_example_once_per_epoch_in_a_new_order(monkeypatch, large):
    # Sources longer than the bound are shuffled without a table.
    monkeypatch.setattr("diffmm.data.mixture._LARGE", large)
    mixture = make()
    visits: dict[str, list[int]] = {name: [] for name in LENGTHS}
    for j in range(400):
        draw = mixture[j]
        visits[draw.source].append(draw.example)
    for name, size in LENGTHS.items():
        epochs = [visits[name][i : i + size] for i in range(0, 3 * size, size)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(size))
        assert epochs[0] != epochs[1] != epochs[2]


def test_random_access_is_a_pure_function_of_seed_and_row():
    rows = np.random.default_rng(0).integers(0, 200_000, 60).tolist()
    first, second = make(), make()
    forward = {j: first[j] for j in sorted(rows)}
    assert {j: second[j] for j in sorted(rows, reverse=True)} == {
        j: forward[j] for j in sorted(rows, reverse=True)
    }
    other = make(seed=4)
    assert any(other[j] != forward[j] for j in rows)
    assert make().fingerprint == first.fingerprint != other.fingerprint


def test_far_rows_cost_no_walk_through_the_stream():
    # 2e9 rows of strata of 1024: about 2e6 strata, counted in vectorised chunks.
    mixture = make(stratum=1024)
    j = 2_000_000_000
    draw = mixture[j]
    counts = mixture.counts(j)
    assert sum(counts.values()) == j
    assert draw.epoch * LENGTHS[draw.source] + draw.position == counts[draw.source]
    for name, p in P.items():
        # Variance at most 1/4 per stratum: five standard deviations over 2e6 strata.
        assert abs(counts[name] - j * p) < 5 * 0.5 * np.sqrt(2e6) + 1024


def test_length():
    mixture = make(num_rows=10)
    assert len(mixture) == 10
    with pytest.raises(IndexError, match="row=10"):
        mixture[10]
    assert len(make()) > 2**60


@pytest.mark.parametrize(
    ("shares", "means", "message"),
    [
        ({"a": -1.0}, {"a": 3}, "shares.'a'.=-1.0"),
        ({"a": float("nan")}, {"a": 3}, "finite"),
        ({"a": 0.0, "b": 0}, {"a": 3, "b": 4}, "positive sum"),
        ({}, {"a": 3}, "positive sum"),
        ({"c": 1.0}, {"a": 3}, "unknown source 'c'"),
        ({"a": 1.0}, {"a": 0}, "mean length of 'a'=0"),
    ],
)
def test_bad_shares(shares, means, message):
    with pytest.raises(ValueError, match=message):
        row_probabilities(shares, means)


def test_bad_mixtures():
    with pytest.raises(ValueError, match="source 'a' is empty"):
        Mixture({"a": 0}, {"a": 1.0}, seed=0, stratum=1)
    with pytest.raises(ValueError, match="stratum=0"):
        make(stratum=0)
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture({"a": 1}, {"a": 0.5}, seed=0, stratum=1)
    with pytest.raises(ValueError, match="same sources"):
        Mixture({"a": 1}, {"b": 1.0}, seed=0, stratum=1)


def test_stable_hash_is_pinned():
    # A change of this number would silently reorder every stream.
    assert stable_hash(0, "strata") == 15989304030801891482
