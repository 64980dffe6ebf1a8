import dataclasses
import json

import numpy as np
import pytest

from diffmm.data import SPECIALS, TRIMODAL, JointVocabulary, as_modality
from diffmm.typing import Modality

SMALL = JointVocabulary(text=10, image=6, audio=4)
# Specials first, gap declared, content in another order than the modalities.
ODD = JointVocabulary(
    text=10,
    image=6,
    audio=4,
    offsets=(20, 3, 9),
    specials=("pad", "mask", "bos", "eos", "boi", "eoi", "boa", "eoa"),
    special_ids=(0, 1, 2, 30, 31, 32, 33, 34),
    padding=((13, 7),),
)


def test_preset_numbers():
    assert TRIMODAL.size == TRIMODAL.padded_size == TRIMODAL.num_ids == 117_698
    assert [TRIMODAL.span(m)[0] for m in range(3)] == [0, 100_277, 116_661]
    assert TRIMODAL.mask_id == 117_685
    assert TRIMODAL.specials == SPECIALS
    padded = dataclasses.replace(TRIMODAL, pad_to_multiple=128)
    assert (padded.size, padded.padded_size, padded.num_ids) == (
        117_698,
        117_760,
        117_698,
    )
    table = padded.allowed_table(closing=True)
    assert table.shape == (4, 117_760)
    assert not table[:, 117_698:].any()


@pytest.mark.parametrize("vocabulary", [SMALL, ODD, TRIMODAL])
def test_encode_decode_round_trip_and_ranges(vocabulary):
    seen = []
    for modality in ("text", "image", "audio"):
        offset, size = vocabulary.span(modality)
        codes = np.arange(size)
        ids = vocabulary.encode(modality, codes)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, np.arange(offset, offset + size))
        np.testing.assert_array_equal(vocabulary.decode(modality, ids), codes)
        seen.append(ids)
        for bad in (-1, size):
            with pytest.raises(ValueError, match=f"value {bad} at index 1"):
                vocabulary.encode(modality, np.array([0, bad]))
        for special in vocabulary.specials:
            with pytest.raises(ValueError, match=special):
                vocabulary.decode(modality, np.array([vocabulary.id(special)]))
    everything = np.concatenate(
        [*seen, [vocabulary.id(s) for s in vocabulary.specials]]
    )
    assert len(np.unique(everything)) == vocabulary.num_ids


def test_encode_takes_small_and_unsigned_types():
    vocabulary = JointVocabulary(text=256, image=256)
    codes = np.array([0, 255], np.uint8)
    np.testing.assert_array_equal(vocabulary.encode("image", codes), [256, 511])
    with pytest.raises(ValueError, match="float"):
        vocabulary.encode("text", np.array([0.5]))
    assert vocabulary.encode("text", []).shape == (0,)


@pytest.mark.parametrize("vocabulary", [SMALL, ODD])
@pytest.mark.parametrize("closing", [False, True])
def test_allowed_ids_are_exactly_the_targets(vocabulary, closing):
    ends = {"text": "eos", "image": "eoi", "audio": "eoa"}
    for modality, end in ends.items():
        offset, size = vocabulary.span(modality)
        expected = set(range(offset, offset + size))
        if modality == "text" or closing:
            expected.add(vocabulary.id(end))
        if closing:
            expected.add(vocabulary.pad_id)
        found = vocabulary.allowed_ids(modality, closing=closing)
        assert set(np.flatnonzero(found)) == expected
    table = vocabulary.allowed_table(closing=closing)
    assert not table[:, vocabulary.mask_id].any()
    everything = np.ones(vocabulary.size, bool)
    everything[vocabulary.mask_id] = False
    for offset, size in vocabulary.padding:
        everything[offset : offset + size] = False
    np.testing.assert_array_equal(table[Modality.NONE], everything)


def test_allowed_table_of_some_modalities():
    table = SMALL.allowed_table(closing=[Modality.AUDIO])
    assert table[Modality.AUDIO, SMALL.pad_id]
    assert not table[Modality.TEXT, SMALL.pad_id]
    assert not table[Modality.IMAGE, SMALL.id("eoi")]


@pytest.mark.parametrize(
    "vocabulary",
    [SMALL, ODD, TRIMODAL, JointVocabulary(text=5, specials=("pad", "mask"))],
)
def test_json_round_trip(vocabulary):
    data = json.loads(json.dumps(vocabulary.to_dict()))
    assert JointVocabulary.from_dict(data) == vocabulary
    assert hash(JointVocabulary.from_dict(data)) == hash(vocabulary)


def test_specials_may_lie_in_a_content_range_except_mask_and_pad():
    vocabulary = JointVocabulary(
        text=10, specials=("mask", "pad", "eos"), special_ids=(10, 11, 9)
    )
    assert (vocabulary.size, vocabulary.id("eos")) == (12, 9)


SPECIALS_3 = ("mask", "pad", "eos")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": -1}, "text=-1"),
        ({"text": 4, "image": 4, "offsets": (0, 3, 0)}, "overlaps"),
        ({"text": 4, "image": 4, "offsets": (0, 5, 0)}, "belong to no range"),
        ({"text": 4, "offsets": (1, 0, 0)}, "belong to no range"),
        (
            {"text": 4, "specials": SPECIALS_3, "special_ids": (2, 4, 5)},
            "mask_id=2 lies inside the text range",
        ),
        (
            {"text": 4, "specials": SPECIALS_3, "special_ids": (4, 0, 5)},
            "pad_id=0 lies inside the text range",
        ),
        (
            {"text": 4, "specials": SPECIALS_3, "special_ids": (4, 4, 5)},
            "mask_id == pad_id == 4",
        ),
        (
            {"text": 4, "specials": SPECIALS_3, "special_ids": (4, 5, 5)},
            "repeats an id",
        ),
        ({"text": 4, "specials": SPECIALS_3, "special_ids": (4, 5)}, "3 needed"),
        ({"text": 4, "specials": ("mask", "pad", "mask")}, "repeats a name"),
        ({"text": 4, "specials": ("mask",)}, "lacks 'pad'"),
        ({"text": 4, "pad_to_multiple": 0}, "pad_to_multiple=0"),
    ],
)
def test_bad_vocabularies(arguments, message):
    with pytest.raises(ValueError, match=message):
        JointVocabulary(**arguments)


def test_unknown_names():
    with pytest.raises(ValueError, match="known"):
        SMALL.id("bov")
    for bad in ("video", 7, Modality.NONE):
        with pytest.raises(ValueError, match="text, image, audio"):
            as_modality(bad)
