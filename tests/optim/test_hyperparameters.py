import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmm.optim.hyperparameters import AdamW


def test_fields_become_python_floats():
    hyper = AdamW(
        learning_rate=np.float32(0.5), eps=jnp.asarray(1.0), clip=1, ema=np.array(0)
    )
    for field in ("learning_rate", "eps", "clip", "ema", "b1"):
        assert type(getattr(hyper, field)) is float
    assert dataclasses.replace(hyper) == hyper
    assert hash(hyper) == hash(dataclasses.replace(hyper))


def test_shrink():
    assert AdamW(learning_rate=1e-3, weight_decay=0.1).shrink == pytest.approx(1e-4)
    independent = AdamW(learning_rate=1e-3, weight_decay=0.1, decay="independent")
    assert independent.shrink == 0.1


def test_limits_that_are_legal():
    AdamW(learning_rate=0, b1=0, b2=0, eps=0, ema=1)
    AdamW(learning_rate=1, ema=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", "1e-3x"),
        ("b1", 1.0),
        ("b2", -0.1),
        ("b2", 1.5),
        ("eps", -1e-8),
        ("eps_root", -1.0),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("clip", 0.0),
        ("clip", -1.0),
        ("ema", 1.1),
        ("ema", -0.1),
        ("decay", "l2"),
    ],
)
def test_bad_input_names_the_argument(field, value):
    with pytest.raises(ValueError, match=field):
        AdamW(**{"learning_rate": 1e-3, field: value})


def test_a_step_may_not_remove_a_weight():
    with pytest.raises(ValueError, match=r"learning_rate \* weight_decay"):
        AdamW(learning_rate=1e-1, weight_decay=10)
    with pytest.raises(ValueError, match=r"weight_decay=1.0"):
        AdamW(learning_rate=1e-1, weight_decay=1.0, decay="independent")


def test_traced_values_are_refused_by_name():
    with pytest.raises(ValueError, match="learning_rate must be a number known"):
        jax.jit(lambda lr: AdamW(learning_rate=lr).learning_rate)(1.0)
