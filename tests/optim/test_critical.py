import math
import warnings

import pytest

from diffmm.optim.critical import (
    check_critical,
    learning_rate_deficit,
    measure_critical_steps,
)
from diffmm.optim.sde import Budget

RUN = Budget(batch=2048, tokens=1e7)  # 4882.8 steps


def test_enough_steps_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_critical(RUN, 4000, noise_scale=1e4, devices=8, accumulation=2)
        assert check_critical(RUN).critical_batch is None
    assert report.within
    assert report.critical_batch == 2500
    assert report.per_device_batch == 156  # 2500 // 16
    assert report.steps == RUN.steps


def test_too_few_steps_warn_with_the_remedy():
    with pytest.warns(UserWarning, match=r"critical batch 1000; .* device is 62 \(8"):
        report = check_critical(RUN, 10_000, devices=8, accumulation=2)
    assert not report.within
    assert report.critical_batch == 1000
    assert report.per_device_batch == 62


def test_noise_scale_warns():
    with pytest.warns(UserWarning, match=r"batch 2048 .* noise scale 1024"):
        assert not check_critical(RUN, noise_scale=1024).within


def test_measured_from_a_sweep():
    runs = [(4, 1000, 2.015), (1, 4000, 2.0), (2, 2000, 1.99), (8, 500, 2.3)]
    found = measure_critical_steps([*runs, (16, 250, math.nan), (32, 125, 2.0)])
    assert found.steps == 1000
    assert found.reached
    assert [row.kappa for row in found.table] == [1, 2, 4, 8, 16, 32]
    # A lucky run after the first failure proves nothing.
    assert [row.within for row in found.table] == [True] * 3 + [False] * 3
    assert found.table[2].excess == pytest.approx(0.0075)
    assert measure_critical_steps(runs, tolerance=0.005).steps == 2000
    assert not measure_critical_steps(runs, tolerance=0.2).reached


def test_negative_and_zero_losses():
    assert measure_critical_steps([(1, 9, -2.0), (2, 5, -1.99)]).steps == 5
    assert measure_critical_steps([(1, 9, -2.0), (2, 5, -1.9)]).steps == 9
    assert measure_critical_steps([(1, 9, 0.0), (2, 5, 0.0), (4, 2, 0.1)]).steps == 5


@pytest.mark.parametrize(
    ("snr_squared", "kappa", "expected"),
    [
        *((1e-3, 16, 1.007), (1e-3, 64, 1.031), (1e-3, 256, 1.120)),
        *((1e-2, 16, 1.072), (1e-2, 64, 1.274), (1e-2, 256, 1.877)),
    ],
)
def test_learning_rate_deficit(snr_squared, kappa, expected):
    got = learning_rate_deficit(kappa, snr_squared)
    assert got == pytest.approx(expected, abs=5.1e-4)
    assert learning_rate_deficit(kappa, 0) == learning_rate_deficit(1, 0.3) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_critical(RUN, 0), "critical_steps"),
        (lambda: check_critical(RUN, noise_scale=-1), "noise_scale"),
        (lambda: check_critical(RUN, 10, devices=0), "devices"),
        (lambda: check_critical(RUN, 10, accumulation=1.5), "accumulation"),
        (lambda: measure_critical_steps([(1, 10, 2.0)]), "two or more"),
        (lambda: measure_critical_steps([(1, 10, 2.0), (1, 5, 2.0)]), "kappa"),
        (lambda: measure_critical_steps([(1, 9, math.nan), (2, 5, 2.0)]), "smallest"),
        (lambda: measure_critical_steps([(1, 0, 2.0), (2, 5, 2.0)]), "steps"),
        (lambda: measure_critical_steps([(1, 9, 2), (2, 5, 2)], 0), "tolerance"),
        (lambda: learning_rate_deficit(0, 1), "kappa"),
        (lambda: learning_rate_deficit(1, -1), "snr_squared"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
