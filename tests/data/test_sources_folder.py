import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from diffmm.data.audio_tokenizers import MuLawTokenizer
from diffmm.data.sources import (
    BadFileError,
    encode_source,
    folder_source,
    hash_split,
    ljspeech_source,
)
from diffmm.data.text_tokenizers import ByteTokenizer


def tone(rate=16_000, seconds=0.1):
    t = np.arange(int(rate * seconds)) / rate
    return 0.5 * np.sin(2 * np.pi * 440 * t)


@pytest.fixture
def pictures(tmp_path):
    colour = np.zeros((6, 10, 3), np.uint8)
    colour[:, :5] = (255, 0, 0)
    Image.fromarray(colour).save(tmp_path / "red.png")
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,kind\nred.png,"a red, half",x\nclear.png,nothing,y\n'
    )
    return tmp_path


@pytest.fixture
def recordings(tmp_path):
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", tone(), 16_000)
    soundfile.write(tmp_path / "b.flac", np.stack([tone(), -0.5 * tone()], 1), 16_000)
    soundfile.write(tmp_path / "c.ogg", tone(), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 16_000)
    nan = tone()
    nan[3] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFFjunk")
    names = ["clips/a.wav", "b.flac", "c.ogg", "silent.wav", "nan.wav", "broken.wav"]
    lines = [{"file_name": n, "transcription": f"clip {n}", "who": "s"} for n in names]
    lines.append({"file_name": "gone.wav", "transcription": "x"})
    lines.append({"file_name": "c.ogg", "transcription": "  "})
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text + "\n\n")
    return tmp_path


def test_pictures(pictures):
    source = folder_source(pictures, label_column="kind")
    assert len(source) == 2
    assert source[0].texts == ("a red, half",)
    assert source[0].image.shape == (6, 10, 3)
    assert source[0].image.dtype == np.uint8
    assert source[0].image[0, 0].tolist() == [255, 0, 0]
    assert source[0].label == "x"
    assert source[0].group == "red.png"
    assert (source[1].image == 255).all()  # transparency is white
    assert [e.label for e in source[:]] == ["x", "y"]


def test_picture_size_and_grey(pictures):
    source = folder_source(pictures, image_size=4, greyscale=True)
    assert source[0].image.shape == (4, 4)
    wide = folder_source(pictures, image_size=(2, 8))
    assert wide[0].image.shape == (2, 8, 3)
    # The crop is around the centre: half red, half black.
    assert wide[0].image[:, :3, 0].min() > 200
    assert wide[0].image[:, 5:, 0].max() < 50


def test_recordings(recordings):
    source = folder_source(recordings, group_column="who")
    assert len(source) == 8
    for i in (0, 1, 2):
        assert source[i].sample_rate == 16_000
        assert source[i].audio.dtype == np.float32
        assert source[i].group == "s"
    np.testing.assert_allclose(source[0].audio, tone(), atol=1e-4)
    np.testing.assert_allclose(source[1].audio, 0.25 * tone(), atol=1e-4)  # mono mix
    resampled = folder_source(recordings, sample_rate=8_000)[0]
    assert (resampled.sample_rate, len(resampled.audio)) == (8_000, 800)


@pytest.mark.parametrize(
    ("index", "file", "reason"),
    [
        (3, "silent.wav", "silent"),
        (4, "nan.wav", "NaN"),
        (5, "broken.wav", "Format not recognised|Error opening"),
        (6, "gone.wav", "no such file"),
        (7, "c.ogg", "no text"),
    ],
)
def test_bad_recordings_are_named(recordings, index, file, reason):
    source = folder_source(recordings)
    with pytest.raises(BadFileError, match=reason) as caught:
        source[index]
    assert file in str(caught.value)


def test_bad_recordings_are_skipped_or_errors_by_name(recordings):
    source = folder_source(recordings)
    tokenizer = MuLawTokenizer(sample_rate=8_000)
    out = encode_source(source, text=ByteTokenizer(), audio=tokenizer)
    assert out.indices.tolist() == [0, 1, 2]
    assert len(out.skipped) == 5
    assert source.by_name("clips/a.wav").texts == ("clip clips/a.wav",)
    with pytest.raises(BadFileError, match=r"silent\.wav"):
        source.by_name("silent.wav")
    with pytest.raises(ValueError, match=r"no file 'other\.wav'"):
        source.by_name("other.wav")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\nrest"])
def test_bad_pictures_are_named(pictures, content):
    (pictures / "red.png").write_bytes(content)
    source = folder_source(pictures)
    with pytest.raises(BadFileError, match=r"red\.png: unreadable image"):
        source[0]
    assert source[1].texts == ("nothing",)


def test_deep_and_cut_pictures(pictures):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(pictures / "clear.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(pictures / "red.png")
    data = (pictures / "red.png").read_bytes()
    (pictures / "red.png").write_bytes(data[: len(data) // 2])
    source = folder_source(pictures)
    with pytest.raises(BadFileError, match="truncated"):
        source[0]
    with pytest.raises(BadFileError, match="more than 8 bits"):
        source[1]


def test_unknown_suffix(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.txt,x\n")
    with pytest.raises(BadFileError, match=r"a\.txt: suffix '\.txt'"):
        folder_source(tmp_path)[0]


def test_picture_and_recording_together(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    line = {"picture": "a.png", "sound": "a.wav", "names": ["one", "uno"], "more": "1"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    example = folder_source(
        tmp_path,
        manifest="list.jsonl",
        file_columns=("picture", "sound"),
        text_columns=("names", "more"),
        greyscale=True,
    )[0]
    assert example.texts == ("one", "uno", "1")
    assert example.image.shape == (2, 3)
    assert example.audio.shape == (1600,)


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (None, "no manifest metadata.csv or metadata.jsonl"),
        ("", "no lines"),
        ("file_name,text\n", "no lines"),
        (
            "name,text\na.png,x\n",
            r"no column \['file_name'\], found \['name', 'text'\]",
        ),
        ("file_name,words\na.png,x\n", r"found \['file_name', 'words'\]"),
        ("file_name,text\na.png\n", "line 2: 2 fields"),
        ("file_name,text\na.png,x,y\n", "line 2: 2 fields"),
        ("file_name,text\n../a.png,x\n", "line 2.*leaves the folder"),
        ("file_name,text\n/etc/a.png,x\n", "leaves the folder"),
        ("file_name,text\nC:\\a.png,x\n", "leaves the folder"),
        ("file_name,text\nd\\..\\..\\a.png,x\n", "leaves the folder"),
        ("file_name,text\n,x\n", "no file name"),
        ("file_name,text\n\xff,x\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_bad_manifests(tmp_path, manifest, match):
    if isinstance(manifest, bytes):
        (tmp_path / "metadata.csv").write_bytes(manifest)
    elif manifest is not None:
        (tmp_path / "metadata.csv").write_text(manifest)
    with pytest.raises(ValueError, match=match):
        folder_source(tmp_path)


@pytest.mark.parametrize(
    ("line", "match"), [("{", "line 1: not JSON"), ("[1]", "line 1: a JSON object")]
)
def test_bad_json_lines(tmp_path, line, match):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=match):
        folder_source(tmp_path)


def test_bad_arguments(pictures):
    with pytest.raises(ValueError, match="not a folder"):
        folder_source(pictures / "none")
    with pytest.raises(ValueError, match=r"no column \['speaker'\]"):
        folder_source(pictures, group_column="speaker")
    with pytest.raises(ValueError, match="no manifest other"):
        folder_source(pictures, manifest="other.csv")
    with pytest.raises(ValueError, match="image_size"):
        folder_source(pictures, image_size=0)
    with pytest.raises(ValueError, match="sample_rate"):
        folder_source(pictures, sample_rate=-1)
    with pytest.raises(ValueError, match="file_columns"):
        folder_source(pictures, file_columns=())
    with pytest.raises(ValueError, match="split must be one of"):
        folder_source(pictures, split="dev")


def test_spreadsheet_byte_order_mark(pictures):
    text = (pictures / "metadata.csv").read_text()
    (pictures / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(folder_source(pictures)) == 2


def test_splits_by_group(tmp_path):
    rows = [(f"{i}.png", f"text {i}", f"speaker{i % 20}") for i in range(200)]
    body = "\n".join(",".join(row) for row in rows)
    (tmp_path / "metadata.csv").write_text(f"file_name,text,who\n{body}\n")
    seen = {}
    for split in ("train", "validation", "test"):
        source = folder_source(
            tmp_path, group_column="who", split=split, validation=0.3, test=0.3
        )
        for record in source.records:
            assert hash_split(record.group, validation=0.3, test=0.3) == split
            seen.setdefault(record.group, set()).add(split)
    assert all(len(splits) == 1 for splits in seen.values())
    assert len(seen) == 20
    with pytest.raises(ValueError, match="no line of the manifest"):
        folder_source(tmp_path, split="test", validation=0, test=0)


@pytest.fixture
def lj(tmp_path):
    (tmp_path / "wavs").mkdir()
    for name in ("LJ001-0001", "LJ001-0002"):
        soundfile.write(tmp_path / "wavs" / f"{name}.wav", tone(22_050), 22_050)
    (tmp_path / "metadata.csv").write_text(
        'LJ001-0001|In "1900"|In "nineteen hundred"\nLJ001-0002|Only one.|\n'
    )
    return tmp_path


def test_ljspeech(lj):
    source = ljspeech_source(lj, sample_rate=8_000)
    assert [e.texts for e in source] == [('In "nineteen hundred"',), ("Only one.",)]
    assert source[0].sample_rate == 8_000
    assert ljspeech_source(lj, normalised=False)[0].texts == ('In "1900"',)
    with pytest.raises(ValueError, match="looks like LJSpeech: use ljspeech_source"):
        folder_source(lj)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("just text\n", "line 1: expected id"),
        ("\n", "no lines"),
        ("../../x|a|b\n", "leaves the folder"),
    ],
)
def test_bad_ljspeech(lj, text, match):
    (lj / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        ljspeech_source(lj)
