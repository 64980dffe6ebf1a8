import builtins
import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmm.data.codes import check_codes, digest
from diffmm.data.text_tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from diffmm.typing import Tokenizer

WORDS = ["the quick brown fox", "jumps over the lazy dog", "seven is a number"]


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    # What the wrapper has to switch off: special tokens, padding, truncation.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=3)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "spm.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["bytes", "hugging_face", "sentence_piece"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "hugging_face":
        return HuggingFaceTokenizer(request.getfixturevalue("json_file"))
    return SentencePieceTokenizer(request.getfixturevalue("model_file"))


def test_protocol_and_round_trip(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    for text in WORDS:
        codes = tokenizer.encode(text)
        assert codes.dtype == np.int32
        assert codes.ndim == 1
        assert codes.min() >= 0
        assert codes.max() < tokenizer.vocabulary_size
        assert tokenizer.decode(codes) == text
    assert tokenizer.decode(np.zeros(0, np.int64)) == ""
    assert tokenizer.decode([]) == ""


def test_copies_agree(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(copy.encode(WORDS[0]), tokenizer.encode(WORDS[0]))


@pytest.mark.parametrize("text", ["", None, b"bytes", 7])
def test_bad_text(tokenizer, text):
    with pytest.raises(ValueError, match=f"{tokenizer.name}: text"):
        tokenizer.encode(text)


@pytest.mark.parametrize("codes", [[-1], [10**6], [0.5], [[1, 2]]])
def test_bad_codes(tokenizer, codes):
    with pytest.raises(ValueError, match=tokenizer.name):
        tokenizer.decode(codes)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255)))
def test_bytes_decode_never_fails(codes):
    assert isinstance(ByteTokenizer().decode(codes), str)


def test_bytes_lone_surrogate():
    with pytest.raises(ValueError, match="character 1"):
        ByteTokenizer().encode("a\ud800")


def test_bytes_ill_formed_becomes_replacement():
    assert ByteTokenizer().decode([104, 0xFF, 105]) == "h\ufffdi"


def test_hugging_face_adds_nothing(json_file):
    tokenizer = HuggingFaceTokenizer(json_file)
    codes = tokenizer.encode(WORDS[1])
    assert not np.isin([0, 1], codes).any()
    assert tokenizer.decode([0, *codes.tolist()]).startswith("<s>")


def test_hugging_face_text_outside_the_vocabulary(tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 5}, merges=[])
    tokenizers.Tokenizer(model).save(str(path))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.vocabulary_size == 6  # ids have a gap
    with pytest.raises(ValueError, match="no token for the text 'zz'"):
        tokenizer.encode("zz")


@pytest.mark.parametrize("kind", [HuggingFaceTokenizer, SentencePieceTokenizer])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff\xfe\x00", b"{}"])
def test_bad_files(kind, content, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="does not exist"):
        kind(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path: .* is not a"):
        kind(path)


def test_fingerprints_follow_the_file(json_file, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(json_file.read_text().replace("</s>", "<e>"))
    one, two = HuggingFaceTokenizer(json_file), HuggingFaceTokenizer(other)
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == HuggingFaceTokenizer(json_file).fingerprint


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        (HuggingFaceTokenizer, "tokenizers"),
        (SentencePieceTokenizer, "sentencepiece"),
    ],
)
def test_missing_library_names_the_extra(kind, library, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"diffmm\[text\]"):
        kind("file")


def test_digest_tells_arrays_apart():
    a = np.arange(6, dtype=np.int32)
    parts = [a, a.reshape(2, 3), a.astype(np.int64), a + 1, a.tobytes(), "a", b"a"]
    assert len({digest(part) for part in parts}) == len(parts)
    assert digest("a", "b") != digest("ab")
    assert digest(a) == digest(np.asfortranarray(a))


def test_check_codes_length():
    assert check_codes([1, 2], 3, "x", length=2).dtype == np.int32
    with pytest.raises(ValueError, match="exactly 3"):
        check_codes([1, 2], 3, "x", length=3)
