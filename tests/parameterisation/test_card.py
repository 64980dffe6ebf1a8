"""The card: exact round trip, atomic writes, messages that name the field."""

import dataclasses
import json
import math
import os
import pathlib

import numpy as np
import pytest

from diffmm.parameterisation.card import Card
from diffmm.parameterisation.per_module import PerModule

CARD = Card(
    width=256,
    depth=8,
    batch=2**17,
    tokens=1.6e9,
    rule="CompletedP",
    options={"alpha": 1.0, "final_norm_eps": "paper"},
    hyper={"learning_rate": 0.1 + 0.2, "eps": 1e-300, "clip": None, "nesterov": False},
    per_module=PerModule(
        type={"attn.q": {"learning_rate": 1 / 3}, "attn.res": {"residual": math.pi}},
        depth={"learning_rate": np.exp(np.random.default_rng(0).normal(size=8))},
        interpolation="linear",
    ),
)


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "scale.json"
    CARD.save(path)
    loaded = Card.load(str(path))
    assert loaded == CARD
    assert loaded.hyper["learning_rate"] == 0.1 + 0.2
    assert isinstance(loaded.width, int)
    assert loaded.to_json() == path.read_text(encoding="utf-8")
    minimal = Card(width=1, depth=1, batch=1, tokens=1)
    minimal.save(path)  # overwrites
    assert Card.load(path) == minimal
    assert os.listdir(tmp_path) == ["scale.json"]


def test_numpy_scalars_become_plain():
    card = Card(
        width=np.int64(32),
        depth=np.float32(2),
        batch=np.float64(8),
        tokens=64,
        hyper={"learning_rate": np.float64(0.1), "steps": np.int32(3)},
    )
    assert [type(v) for v in (card.width, card.depth, card.batch)] == [
        int,
        float,
        float,
    ]
    assert Card.from_json(card.to_json()) == card


def test_a_failed_write_keeps_the_old_card(tmp_path, monkeypatch):
    path = tmp_path / "scale.json"
    CARD.save(path)
    before = path.read_text(encoding="utf-8")

    def full_disk(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        dataclasses.replace(CARD, width=1).save(path)
    assert path.read_text(encoding="utf-8") == before
    assert os.listdir(tmp_path) == ["scale.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "width must be a positive number, got None"),
        ({"depth": 0}, "depth must be a positive number, got 0"),
        ({"batch": -1.0}, "batch must be"),
        ({"tokens": "many"}, "tokens must be .*'many'"),
        ({"tokens": True}, "tokens must be"),
        ({"rule": 3}, "rule must be"),
        ({"rule": ""}, "rule must be"),
        ({"options": [1]}, "options must be a mapping"),
        ({"options": {"alpha": [1.0]}}, r"options\['alpha'\]"),
        ({"hyper": None}, "hyper must be a mapping"),
        ({"hyper": {"eps": {}}}, r"hyper\['eps'\]"),
        ({"per_module": []}, "per_module must be an object"),
        ({"per_module": {}}, r"per_module: fields missing \['depth'"),
        (
            {"per_module": {"type": {}, "depth": {"eps": []}, "interpolation": "log"}},
            r"per_module: depth\['eps'\]",
        ),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": None}, "version must be 1"),
        ({"learning_rate": 1.0}, r"unknown \['learning_rate'\]"),
    ],
)
def test_malformed_files_name_the_field(tmp_path, change, message):
    path = tmp_path / "scale.json"
    path.write_text(json.dumps({**json.loads(CARD.to_json()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        Card.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("field", ["width", "rule", "hyper", "per_module", "version"])
def test_missing_fields_are_named(field):
    data = json.loads(CARD.to_json())
    del data[field]
    with pytest.raises(ValueError, match=field):
        Card.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"version": 1', "\udcff"])
def test_no_card_at_all(tmp_path, text):
    path = tmp_path / "scale.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"scale\.json"):
        Card.load(path)
    with pytest.raises(FileNotFoundError):
        Card.load(tmp_path / "none.json")


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"hyper\['eps'\] must be a finite number"):
        dataclasses.replace(CARD, hyper={"eps": math.inf})
    with pytest.raises(ValueError, match="width"):
        dataclasses.replace(CARD, width=math.nan)
    with pytest.raises(ValueError, match="per_module must be a PerModule, got dict"):
        dataclasses.replace(CARD, per_module={})
