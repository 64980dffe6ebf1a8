"""The image tokenizer example with a tiny configuration."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

PATH = pathlib.Path(__file__).parents[2] / "examples" / "train_image_tokenizer.py"
TINY = {
    "levels": "4,3",
    "patch_size": 4,
    "width": 32,
    "steps": 30,
    "batch_size": 16,
    "warmup": 5,
    "log_every": 10,
    "save_every": 20,
    "num_shown": 3,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[PATH.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_trains_judges_saves_and_resumes(example, tmp_path):
    result = example.train(example.Config(workdir=str(tmp_path), **TINY))
    figures = result["figures"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["name"] == "train_image_tokenizer"
    # Grey pictures, which the network starts from, have an error of about 0.2.
    assert 0 < figures["mse"] < 0.15
    assert 1 <= figures["code_perplexity"] <= 12 * figures["codes_used"] + 1e-9
    assert 0 <= figures["judge_accuracy"] <= 1
    assert figures["judge_accuracy_real"] > 0.95
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [10, 20, 30]
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.size == (12 * (3 * 9 + 1), 12 * (2 * 9 + 1))

    tokenizer = example.load_tokenizer(tmp_path / "autoencoder.npz")
    assert tokenizer.fingerprint == figures["fingerprint"]
    images, labels = example.load_images("test")
    assert images.shape == (len(labels), 8, 8, 1)
    assert tokenizer.encode(images[0]).shape == (4,)

    # The run is complete: the same command finds nothing left to train.
    again = example.train(example.Config(workdir=str(tmp_path), **TINY))
    assert again["figures"]["fingerprint"] == figures["fingerprint"]


def test_metrics_of_codes(example):
    np.testing.assert_allclose(example.perplexity(np.array([[0, 1], [2, 3]])), 4)
    np.testing.assert_allclose(example.perplexity(np.zeros((5, 5), int)), 1)
    np.testing.assert_allclose(example.psnr(0.01), 20)
