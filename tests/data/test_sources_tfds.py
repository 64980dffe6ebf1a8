import builtins

import numpy as np
import pytest

from diffmm.data.sources import KNOWN_FIELDS, Fields, Source, TfdsSource, tfds_source

tfds = pytest.importorskip("tensorflow_datasets")


def _builder_class():
    class SpokenPictures(tfds.core.GeneratorBasedBuilder):
        """Tensors only, so that neither writing nor reading needs TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "speech": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                        "picture": tfds.features.Tensor(
                            shape=(2, 3, 1), dtype=np.uint8
                        ),
                        "text": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(names=["no", "yes"]),
                        "speaker": tfds.features.Scalar(np.int64),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(8),
                "test": self._generate_examples(2),
            }

        def _generate_examples(self, count):
            for i in range(count):
                yield (
                    i,
                    {
                        "speech": np.full(4 + i, 16384, np.int16),
                        "picture": np.full((2, 3, 1), i, np.uint8),
                        "text": f"número {i}",
                        "label": i % 2,
                        "speaker": i // 2,
                    },
                )

    return SpokenPictures


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    builder = _builder_class()(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


FIELDS = Fields(
    texts=("text",),
    image="picture",
    audio="speech",
    sample_rate=16_000,
    label="label",
    templates=("say {}",),
    group="speaker",
)


def test_prepared_folder(prepared):
    source = tfds_source(prepared, "train", fields=FIELDS)
    assert isinstance(source, Source)
    assert len(source) == 8
    examples = sorted(source[:], key=lambda e: len(e.audio))
    for i, example in enumerate(examples):
        label = ("no", "yes")[i % 2]
        assert example.texts == (f"número {i}", f"say {label}")
        assert example.label == label
        assert example.group == str(i // 2)
        assert example.sample_rate == 16_000
        assert example.audio.dtype == np.float32
        np.testing.assert_array_equal(example.audio, np.full(4 + i, 0.5))
        np.testing.assert_array_equal(example.image, np.full((2, 3, 1), i, np.uint8))
    assert len(list(source)) == 8
    with pytest.raises(IndexError):
        source[8]
    assert len(tfds_source(prepared, "train[:25%]", fields=FIELDS)) == 2
    assert len(tfds_source(prepared, "test", fields=FIELDS)) == 2


def test_prepared_folder_bad_input(prepared):
    with pytest.raises(ValueError, match="fields must be given"):
        tfds_source(prepared)
    with pytest.raises(ValueError, match=r"no split 'dev', only \['test', 'train'\]"):
        tfds_source(prepared, "dev", fields=FIELDS)
    source = tfds_source(prepared, fields=Fields(texts=("words",)))
    with pytest.raises(ValueError, match=r"no feature 'words', found \['label'"):
        source[0]


def test_a_format_without_random_access(tmp_path, monkeypatch, prepared):
    def refuse(self, split=None, **kwargs):
        raise NotImplementedError("tfrecord")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", refuse)
    with pytest.raises(ValueError, match="file_format='array_record'"):
        tfds_source(prepared, fields=FIELDS)


@pytest.mark.parametrize(
    ("name", "split", "shape"),
    [
        ("mnist", "train", (28, 28, 1)),
        ("fashion_mnist", "test", (28, 28, 1)),
        ("cifar10", "train", (32, 32, 3)),
        ("lm1b", "train", None),
        ("tiny_shakespeare", "train", None),
        ("ag_news_subset", "train", None),
    ],
)
def test_catalogue_without_tensorflow(name, split, shape):
    with tfds.testing.mock_data(num_examples=3):
        source = tfds_source(name, split)
        assert len(source) == 3
        for example in source:
            assert example.texts
            assert all(isinstance(text, str) for text in example.texts)
            if shape is None:
                assert example.image is None
            else:
                assert example.image.shape == shape
                assert example.image.dtype == np.uint8
                assert isinstance(example.label, str)
                assert example.label in example.texts[0]


def test_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="not prepared in"):
        tfds_source("mnist", data_dir=tmp_path, download=False)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"only those of \['ag_news_subset'"):
        tfds_source("no_such_set")
    with pytest.raises(ValueError, match="tfds has no data set 'no_such_set'"):
        tfds_source("no_such_set", data_dir=tmp_path, fields=FIELDS)


def test_what_needs_tensorflow_says_so(tmp_path):
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        for name in ("spoken_digit", "librispeech", "coco_captions"):
            with pytest.raises(ImportError, match=r"diffmm\[tensorflow\]"):
                tfds_source(name, data_dir=tmp_path, download=False)


def test_missing_tfds_names_the_extra(monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "tensorflow_datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"diffmm\[tfds\]"):
        tfds_source("mnist")


def test_every_known_map_reads_features_of_its_shape():
    # Field names as the catalogue documents them; the audio sets cannot even be
    # opened without TensorFlow.
    speech = np.arange(-4, 4, dtype=np.int64) * 8192
    features = {
        "spoken_digit": {"audio": speech, "audio/filename": b"x.wav", "label": 1},
        "speech_commands": {"audio": speech, "label": 1},
        "ljspeech": {"speech": speech, "text": b"1", "text_normalized": b"one"},
        "librispeech": {"speech": speech, "text": b"ONE", "speaker_id": 19},
        "libritts": {"speech": speech, "text_normalized": b"One", "speaker_id": 19},
    }
    for name, row in features.items():
        example = TfdsSource(name, [row], KNOWN_FIELDS[name], ("zero", "one"))[0]
        assert example.texts[0].lower() == "one"
        np.testing.assert_array_equal(example.audio, np.arange(-4, 4) / 4)
        assert example.sample_rate in (8_000, 16_000, 22_050, 24_000)
    image = np.zeros((4, 4, 3), np.uint8)
    for captions in (
        {"id": np.array([1, 2]), "text": np.array([b"a cat", b"a dog"], object)},
        [{"id": 1, "text": b"a cat"}, {"id": 2, "text": b"a dog"}],
    ):
        row = {"image": image, "image/id": 7, "captions": captions}
        example = TfdsSource("coco", [row], KNOWN_FIELDS["coco_captions"])[0]
        assert example.texts == ("a cat", "a dog")
        assert example.group == "7"


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "at least one"),
        ({"audio": "a"}, "sample_rate"),
        ({"audio": "a", "sample_rate": 0}, "sample_rate"),
        ({"texts": ("a",), "templates": ("{}",)}, "need a label"),
        ({"label": "a", "templates": ("x",)}, "templates must contain"),
    ],
)
def test_bad_fields(bad, match):
    with pytest.raises(ValueError, match=match):
        Fields(**bad)
