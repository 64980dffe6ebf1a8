import dataclasses
import math

import numpy as np
import pytest

from diffmm.optim.continuous import Continuous
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.sde import Budget, reparameterise

HYPER = AdamW(learning_rate=3e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
B0 = 2**17


def test_golden_rates():
    rates = Continuous.from_adamw(HYPER, B0)
    got = (
        rates.learning_rate,
        rates.half_life_b1,
        rates.half_life_b2,
        rates.decay_time,
        rates.eps,
    )
    expected = (
        8.286407592029853e-06,
        862298.2403143218,
        1771229.326077444,
        436841127.389375,
        3.620386719675124e-06,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("batch", "stretch", "lr", "b1", "b2", "exact", "linear", "independent", "eps"),
    [
        (
            *(2**15, None, 0.0015, 0.9740037464, 0.9872585449),
            *(0.0500056260, 0.05, 7.500843898e-5, 2e-8),
        ),
        (
            *(2**20, None, 0.0084852814, 0.43046721, 0.6634204313),
            *(0.2825459058, 0.2828427125, 2.397481511e-3, 3.535533906e-9),
        ),
        (
            *(2**22, (87.5, 1.0), 0.0018142295, 0.9622010623, 0.9814161587),
            *(0.0604800703, 0.0604743157, 1.097247260e-4, 1.653594569e-8),
        ),
        (
            *(2**22, (87.5, 0.44), 0.0063453338, 0.6241585351, 0.7949543496),
            *(0.2114009446, 0.2115111261, 1.341409556e-3, 4.727883674e-9),
        ),
    ],
)
def test_golden_table(batch, stretch, lr, b1, b2, exact, linear, independent, eps):
    def at(hyper, **options):
        rates = Continuous.from_adamw(hyper, B0, **options)
        return (rates.stretch(*stretch) if stretch else rates).at(batch)

    new = at(HYPER)
    got = (new.learning_rate, new.b1, new.b2, new.weight_decay)
    np.testing.assert_allclose(got, (lr, b1, b2, exact), atol=5.1e-11)
    assert new.eps == pytest.approx(eps, rel=1e-9)
    assert at(HYPER, exact_decay=False).weight_decay == pytest.approx(linear, abs=5e-11)
    shrink = dataclasses.replace(HYPER, weight_decay=3e-4, decay="independent")
    assert at(shrink).weight_decay == pytest.approx(independent, rel=1e-9)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("clip", ["keep", "batch"])
@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_round_trip(exact, clip, decay):
    hyper = AdamW(
        learning_rate=2e-3,
        b1=0.9,
        b2=0.9999,
        eps=1e-12,
        eps_root=1e-10,
        weight_decay=0.3,
        decay=decay,
        clip=0.7,
        ema=0.99995,
    )
    for batch in (1, 96, 2**22):
        back = Continuous.from_adamw(hyper, batch, exact_decay=exact, clip=clip)
        _assert_close(back.at(batch), hyper, 1e-14)


def _assert_close(got, expected, rtol):
    got, expected = dataclasses.asdict(got), dataclasses.asdict(expected)
    assert got.pop("decay") == expected.pop("decay")
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=rtol, abs=0), name


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("clip", ["keep", "batch"])
@pytest.mark.parametrize("decay", ["coupled", "independent"])
@pytest.mark.parametrize("horizon", [0.0, 0.44, 1.0])
def test_equals_the_rule(exact, clip, decay, horizon):
    hyper = dataclasses.replace(
        HYPER, decay=decay, weight_decay=1e-3, eps_root=1e-12, clip=1.0, ema=0.999
    )
    base, target = Budget(batch=B0, tokens=1.6e9), Budget(batch=2**21, tokens=7e10)
    rule = reparameterise(
        hyper, base, target, horizon=horizon, exact_decay=exact, clip=clip
    )
    rates = Continuous.from_adamw(hyper, B0, exact_decay=exact, clip=clip)
    ratio = target.tokens / base.tokens
    _assert_close(rates.stretch(ratio, horizon).at(target.batch), rule, 1e-12)


def test_limits():
    hyper = AdamW(learning_rate=1e-3, b1=0.0, ema=1.0)
    rates = Continuous.from_adamw(hyper, 64)
    assert rates.decay_time == math.inf
    new = rates.stretch(10).at(1024)
    assert new.b1 == 0.0
    assert new.ema == 1.0
    assert new.weight_decay == 0.0
    assert new.clip is None
    assert Continuous.from_adamw(HYPER, 64).at(64).ema is None
    zero = dataclasses.replace(hyper, ema=0.0)
    assert Continuous.from_adamw(zero, 64).at(8).ema == 0.0


def test_exact_decay_never_removes_a_whole_weight():
    rates = Continuous.from_adamw(HYPER, B0)
    assert rates.at(B0 * 1e4).shrink < 1
    linear = Continuous.from_adamw(HYPER, B0, exact_decay=False)
    with pytest.raises(ValueError, match="weight_decay"):
        linear.at(B0 * 1e4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Continuous.from_adamw(AdamW(learning_rate=0.0), 1),
            "learning_rate must be positive, got 0.0",
        ),
        (lambda: Continuous.from_adamw(HYPER, 0), "batch"),
        (lambda: Continuous.from_adamw(HYPER, 1, clip="root"), "clip"),
        (lambda: Continuous.from_adamw(HYPER, 1).at(-1), "batch"),
        (lambda: Continuous.from_adamw(HYPER, 1).stretch(0), "tokens_ratio"),
        (lambda: Continuous.from_adamw(HYPER, 1).stretch(2, -1), "horizon"),
        (
            lambda: Continuous(learning_rate=1, half_life_b1=-1, half_life_b2=1),
            "half_life_b1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
