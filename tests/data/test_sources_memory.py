import logging
import pickle

import grain
import numpy as np
import pytest

from diffmm.data.audio_tokenizers import MuLawTokenizer
from diffmm.data.image_tokenizers import GreyLevelTokenizer
from diffmm.data.sources import (
    DIGIT_NAMES,
    BadFileError,
    Example,
    MemorySource,
    Source,
    digits_source,
    encode_source,
    hash_split,
    prose_source,
)
from diffmm.data.sources.prose import paragraphs
from diffmm.data.templates import BadExampleError
from diffmm.data.text_tokenizers import ByteTokenizer

# Examples


def test_example_checks_itself():
    assert Example(texts=["a", "b"]).texts == ("a", "b")
    with pytest.raises(ValueError, match="texts"):
        Example(texts="a")
    with pytest.raises(ValueError, match="texts"):
        Example(texts=(b"a",))
    with pytest.raises(ValueError, match="sample_rate"):
        Example(audio=np.zeros(3))


def test_memory_source_is_a_source_for_grain():
    source = MemorySource("three", [Example(texts=(t,)) for t in "abc"])
    assert isinstance(source, Source)
    assert [e.texts[0] for e in source[1:]] == ["b", "c"]
    assert repr(source[1:]) == "MemorySource('three', 2 examples)"
    dataset = grain.MapDataset.source(source).map(lambda e: e.texts[0])
    assert list(dataset) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        source[3]


def test_bad_file_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(BadFileError("x.wav", "silent")))
    assert (error.path, error.reason, str(error)) == (
        "x.wav",
        "silent",
        "x.wav: silent",
    )
    assert isinstance(error, BadExampleError)


def test_hash_split_fractions_and_stability():
    names = [f"speaker{i}" for i in range(4000)]
    splits = [hash_split(name, validation=0.2, test=0.1) for name in names]
    # Four standard errors of a fraction p are 4 sqrt(p (1 - p) / 4000) <= 0.026.
    assert abs(splits.count("validation") / 4000 - 0.2) < 0.026
    assert abs(splits.count("test") / 4000 - 0.1) < 0.02
    assert hash_split("a", validation=0, test=0) == "train"
    assert hash_split("a", validation=0, test=1) == "test"
    # A larger test part takes names from the others, and gives none back.
    wider = [hash_split(name, validation=0.1, test=0.2) for name in names]
    pairs = zip(splits, wider, strict=True)
    assert all(w == "test" for s, w in pairs if s == "test")
    for bad in ({"test": -0.1}, {"validation": 0.8, "test": 0.3}, {"test": np.nan}):
        with pytest.raises(ValueError, match="validation and test"):
            hash_split("a", **bad)


# Digits


def test_digit_splits_are_disjoint_stratified_and_whole():
    from sklearn.datasets import load_digits

    parts = {s: digits_source(s) for s in ("train", "validation", "test")}
    assert {s: len(p) for s, p in parts.items()} == {
        "train": 1439,
        "validation": 179,
        "test": 179,
    }
    images = [e.image.tobytes() for part in parts.values() for e in part]
    expected = [(i / 16).astype(np.float32).tobytes() for i in load_digits().images]
    assert sorted(images) == sorted(expected)
    total = np.bincount(load_digits().target)
    for split, fraction in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        counts = np.bincount([e.label for e in parts[split]])
        assert np.abs(counts - fraction * total).max() <= 1


def test_digits_are_the_same_every_time():
    one, two = digits_source("test"), digits_source("test")
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a.label == b.label


def test_digit_codes_are_exact():
    tokenizer = GreyLevelTokenizer(height=8, width=8, levels=17)
    for example in digits_source("validation")[:20]:
        back = tokenizer.decode(tokenizer.encode(example.image))
        np.testing.assert_array_equal(back, example.image)
        assert all(DIGIT_NAMES[example.label] in text for text in example.texts)


def test_digit_captions():
    source = digits_source("test", captions=("number {}",))
    assert source[0].texts == (f"number {DIGIT_NAMES[source[0].label]}",)
    with pytest.raises(ValueError, match="captions"):
        digits_source(captions=("a digit",))
    with pytest.raises(ValueError, match="captions"):
        digits_source(captions=())
    with pytest.raises(ValueError, match="split must be one of"):
        digits_source("dev")


# Prose


def test_prose_is_clean_and_split_by_topic():
    train, validation = prose_source("train"), prose_source("validation")
    assert sum(len(e.texts[0]) for e in train) > 100_000
    assert sum(len(e.texts[0]) for e in validation) > 5_000
    texts = [e.texts[0] for part in (train, validation) for e in part]
    assert len(set(texts)) == len(texts)
    assert {e.group for e in train}.isdisjoint(e.group for e in validation)
    for text in texts:
        assert len(text) >= 40
        assert "\n" not in text
        assert "::=" not in text
        assert "  " not in text
        assert "****" not in text


def test_paragraphs():
    document = (
        'The "x" statement\n*****************\n\n'
        "It is *very* good [1] and\n**bold**; a*b*c stays.\n\n"
        '   x_stmt ::= "x"\n\n'
        "* First\n  item\n\n+---+\n| a |\n+---+\n\n[1] A note.\n\n"
        "stmt ::= y\n"
    )
    assert paragraphs(document) == [
        "It is very good and bold; a*b*c stays.",
        "First item",
    ]
    assert paragraphs("") == []


def test_prose_bad_input():
    with pytest.raises(ValueError, match="split"):
        prose_source("test")
    with pytest.raises(ValueError, match="validation"):
        prose_source(validation=0)
    with pytest.raises(ValueError, match="min_length"):
        prose_source(min_length=10**9)


# Encoding


def wave(seconds, rate, peak=0.5):
    t = np.arange(int(seconds * rate)) / rate
    return (peak * np.sin(2 * np.pi * 300 * t)).astype(np.float32)


def test_encode_source_text_and_image():
    source = digits_source("test")[:5]
    tokenizer = GreyLevelTokenizer(height=8, width=8)
    out = encode_source(source, text=ByteTokenizer(), image=tokenizer)
    assert len(out.text) == len(out.codes) == 5
    assert not out.skipped
    for example, texts, codes in zip(source, out.text, out.codes, strict=True):
        assert tuple(ByteTokenizer().decode(t) for t in texts) == example.texts
        np.testing.assert_array_equal(codes, tokenizer.encode(example.image))


def test_encode_source_resamples_audio():
    source = [Example(texts=("x",), audio=wave(0.1, 16_000), sample_rate=16_000)]
    out = encode_source(source, audio=MuLawTokenizer(sample_rate=8_000))
    assert out.codes[0].shape == (800,)
    assert out.text == [[]]
    assert encode_source(source, text=ByteTokenizer()).codes is None


def test_encode_source_skips_and_counts_what_is_bad(caplog):
    good = Example(texts=("x",), audio=wave(0.1, 8_000), sample_rate=8_000)
    bad = Example(texts=("x",), audio=np.full(9, np.nan), sample_rate=8_000)
    empty = Example(texts=("",), audio=wave(0.1, 8_000), sample_rate=8_000)
    silent = Example(texts=("x",), image=np.zeros((2, 2)))
    source = [bad, good, empty, good, silent]
    tokenizers = {"text": ByteTokenizer(), "audio": MuLawTokenizer(sample_rate=8_000)}
    with caplog.at_level(logging.WARNING, logger="diffmm.data"):
        out = encode_source(source, **tokenizers)
    assert out.indices.tolist() == [1, 3]
    assert [index for index, _ in out.skipped] == [0, 2, 4]
    assert len(caplog.records) == 1
    assert "3 of 5 examples skipped" in caplog.text
    assert "NaN" in caplog.text
    with pytest.raises(BadExampleError, match=r"example 0: .*NaN"):
        encode_source(source, **tokenizers, skip_bad=False)
    with pytest.raises(ValueError, match="no usable example"):
        encode_source([bad], **tokenizers)
    with pytest.raises(ValueError, match="it is empty"):
        encode_source([], **tokenizers)


def test_encode_source_bad_arguments():
    with pytest.raises(ValueError, match="not both"):
        encode_source([], image=ByteTokenizer(), audio=ByteTokenizer())
    with pytest.raises(ValueError, match="no tokenizer"):
        encode_source([])
