import math

import numpy as np
import pytest
from sde_toys import adamw_paths, quadratic_paths

from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.other_optimizers import exact_shrink, scale_hyperparameters
from diffmm.optim.sde import scale_by_kappa

HYPER = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "ema": 0.99,
}

# κ; η; linear β; exponential β; ε; first-order λ; exact λ; exact λ of 1e-4 that the
# learning rate does not multiply; ρ.
GOLDEN = [
    (
        *(0.25, 5e-4, (0.975, 0.99975), (0.97400375, 0.99974991), 2e-8),
        *(0.05, 0.0500018751, 2.50009e-5, 0.9974905699),
    ),
    (
        *(4, 2e-3, (0.6, 0.996), (0.6561, 0.996005996), 5e-9),
        *(0.2, 0.1999700020, 3.99940e-4, 0.96059601),
    ),
    (
        *(9, 3e-3, (0.1, 0.991), (0.38742049, 0.991035916), 3.3333e-9),
        *(0.3, 0.2998800280, 8.99640e-4, 0.9135172475),
    ),
    (
        *(10, math.sqrt(10) * 1e-3, None, (0.34867844, 0.990044880), 3.1623e-9),
        *(0.3162278, 0.3160855, 9.99550e-4, 0.9043820750),
    ),
]


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_table(row):
    kappa, lr, linear, exponential, eps, first_order, exact, undivided, rho = row
    new = scale_hyperparameters(HYPER, kappa)
    assert new["learning_rate"] == pytest.approx(lr, rel=1e-12)
    assert (new["b1"], new["b2"]) == pytest.approx(exponential, abs=1e-8)
    assert new["eps"] == pytest.approx(eps, rel=2e-5)
    assert new["weight_decay"] == pytest.approx(first_order, rel=1e-6)
    assert new["ema"] == pytest.approx(rho, abs=1e-10)
    if linear is None:
        with pytest.raises(ValueError, match=r"b1=0.9.*kappa=10"):
            scale_hyperparameters(HYPER, kappa, beta_form="linear")
    else:
        new = scale_hyperparameters(HYPER, kappa, beta_form="linear")
        assert (new["b1"], new["b2"]) == pytest.approx(linear, abs=1e-12)
        assert new["ema"] == pytest.approx(rho, abs=1e-10)
    new = scale_hyperparameters(HYPER, kappa, exact_decay=True)
    assert new["weight_decay"] == pytest.approx(exact, rel=5e-7)
    new = scale_hyperparameters(
        {"weight_decay": 1e-4}, kappa, decay="independent", exact_decay=True
    )
    assert new["weight_decay"] == pytest.approx(undivided, rel=2e-6)


def test_same_numbers_as_the_dataclass():
    hyper = AdamW(**HYPER)
    for options in ({}, {"exact_decay": True}, {"beta_form": "harmonic"}):
        new = scale_by_kappa(hyper, 3.7, **options)
        for name, value in scale_hyperparameters(HYPER, 3.7, **options).items():
            assert getattr(new, name) == value


@pytest.mark.parametrize(
    ("optimizer", "learning_rate", "eps", "coupled"),
    [
        *(("sgd", 16, 0.25, 1), ("momentum", 16, 0.25, 1)),
        *(("rmsprop", 4, 0.25, 4), ("adam", 4, 0.25, 4), ("adamw", 4, 0.25, 4)),
        ("adagrad", 1, 1 / 16, 16),
    ],
)
def test_exponents(optimizer, learning_rate, eps, coupled):
    hyper = {
        "learning_rate": 1e-3,
        "eps": 1e-3,
        "eps_root": 1e-3,
        "initial_accumulator_value": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.01,
    }

    def factors(decay):
        new = scale_hyperparameters(hyper, 16, optimizer, decay=decay)
        return {name: new[name] / hyper[name] for name in hyper}

    got = factors("coupled")
    assert got["learning_rate"] == pytest.approx(learning_rate)
    assert got["eps"] == pytest.approx(eps)
    assert got["eps_root"] == pytest.approx(eps**2)
    assert got["initial_accumulator_value"] == pytest.approx(eps**2)
    assert got["momentum"] == 1
    assert got["weight_decay"] == pytest.approx(coupled)
    # In every form a step shrinks a weight κ times as much, or joins the gradient.
    assert got["weight_decay"] * got["learning_rate"] == pytest.approx(16)
    assert factors("independent")["weight_decay"] == pytest.approx(16)
    assert factors("l2")["weight_decay"] == 1
    default = factors(None)["weight_decay"]
    assert default == (pytest.approx(4) if optimizer == "adamw" else 1)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw", "adagrad"])
def test_group_law_and_identity(optimizer):
    hyper = {**HYPER, "weight_decay": 1e-3}
    options = {"optimizer": optimizer, "decay": "coupled", "exact_decay": True}
    once = scale_hyperparameters(hyper, 6, **options)
    half = scale_hyperparameters(hyper, 0.75, **options)
    twice = scale_hyperparameters(half, 8, **options)
    for name, value in once.items():
        assert twice[name] == pytest.approx(value, rel=1e-12)
    assert scale_hyperparameters(hyper, 1, **options) == hyper


def test_optimisers_without_a_rule():
    for name in ("lars", "lamb", "lion", "muon", "adamW"):
        with pytest.raises(ValueError, match=rf"{name}.*learning_rate_exponent"):
            scale_hyperparameters(HYPER, 2, name)
    new = scale_hyperparameters(HYPER, 16, "lion", learning_rate_exponent=0.25)
    assert new["learning_rate"] == pytest.approx(2e-3)
    assert new["weight_decay"] == pytest.approx(0.8)  # ηλ grows by κ
    assert new["b1"] == pytest.approx(0.9**16)


def test_exact_shrink_composes():
    assert exact_shrink(0.3, 1) == 0.3
    assert 1 - exact_shrink(0.3, 5) == pytest.approx(0.7**5, rel=1e-14)
    assert exact_shrink(exact_shrink(1e-9, 3), 1 / 3) == pytest.approx(1e-9, rel=1e-12)


# One noisy quadratic, gradient-noise deviation 10/√κ, 4096 base steps from 2: known
# E[θ] and E[ζ] from 4000 paths. θ of 2000 paths has a standard error of
# 0.085·√(1/2000 + 1/4000) = 0.0023 against it: four of them, and half a printed digit.

PATHS = 2000
TOLERANCE = 4 * 0.085 * math.sqrt(1 / 2000 + 1 / 4000) + 5e-4
ADAM = {"learning_rate": 3e-3, "b1": 0.98, "b2": 0.995, "eps": 1e-8, "ema": 0.998}


def _adam_means(hyper, kappa, curvature=1.0):
    theta, average, _ = adamw_paths(
        AdamW(**hyper),
        4096 // kappa,
        curvature=curvature,
        noise=10 / math.sqrt(kappa),
        start=2.0,
        shape=PATHS,
        seed=kappa,
    )
    return theta.mean(), average.mean()


def test_coupled_decay():
    hyper = {**ADAM, "weight_decay": 0.1}
    one = _adam_means(hyper, 1)
    assert one == pytest.approx((0.1650, 0.2388), abs=TOLERANCE)
    new = scale_hyperparameters(hyper, 4)
    assert _adam_means(new, 4) == pytest.approx((0.1696, 0.2437), abs=TOLERANCE)
    for name, expected in {
        "ema": (0.1696, 0.6931),
        "weight_decay": (0.3192, 0.4130),
    }.items():
        got = _adam_means({**new, name: hyper[name]}, 4)
        assert got == pytest.approx(expected, abs=TOLERANCE)
        assert max(np.abs(np.subtract(got, one))) > 0.1


def test_independent_decay():
    hyper = {**ADAM, "weight_decay": 3e-4}

    def means(kappa, exponent):
        new = scale_hyperparameters(hyper, kappa, decay="independent")
        new["weight_decay"] = hyper["weight_decay"] * kappa**exponent
        return _adam_means({**new, "decay": "independent"}, kappa)

    new = scale_hyperparameters(hyper, 4, decay="independent")
    assert new["weight_decay"] == pytest.approx(12e-4)
    assert means(4, 1) == pytest.approx((0.170, 0.244), abs=TOLERANCE)
    assert means(16, 1) == pytest.approx((0.184, 0.264), abs=TOLERANCE)
    assert means(4, 0.5) == pytest.approx((0.319, 0.413), abs=TOLERANCE)


def test_decay_inside_the_gradient():
    # λ = 0.5 added to the gradient of a unit curvature.
    new = scale_hyperparameters({**ADAM, "weight_decay": 0.5}, 4, "adam")
    curvature = 1 + new.pop("weight_decay")
    got = _adam_means(new, 4, curvature)
    assert got == pytest.approx((0.339, 0.438), abs=TOLERANCE)
    for factor, expected in ((2, (0.193, 0.277)), (4, (0.064, 0.119))):
        got = _adam_means(new, 4, 1 + 0.5 * factor)
        assert got == pytest.approx(expected, abs=TOLERANCE)


def test_large_eps():
    hyper = {**ADAM, "eps": 10.0}
    new = scale_hyperparameters(hyper, 16)
    assert _adam_means(new, 16) == pytest.approx((1.144, 1.231), abs=TOLERANCE)
    wrong = {**scale_hyperparameters(hyper, 4), "eps": 10.0}
    assert _adam_means(wrong, 4) == pytest.approx((1.337, 1.406), abs=TOLERANCE)


def test_adagrad():
    hyper = {"learning_rate": 0.2, "initial_accumulator_value": 1000.0, "ema": 0.998}

    def means(kappa, **changes):
        new = {**scale_hyperparameters(hyper, kappa, "adagrad"), **changes}
        total = np.full(PATHS, new["initial_accumulator_value"])

        def update(theta, g, step):
            nonlocal total
            total = total + g * g
            return theta - new["learning_rate"] * g / np.sqrt(total)

        return quadratic_paths(
            update,
            4096 // kappa,
            noise=10 / math.sqrt(kappa),
            start=2.0,
            rho=new["ema"],
            paths=PATHS,
            seed=kappa,
        )

    assert means(4) == pytest.approx((0.187, 0.227), abs=TOLERANCE)
    assert means(4, learning_rate=0.4) == pytest.approx((0.014, 0.025), abs=TOLERANCE)
    got = means(4, initial_accumulator_value=1000.0)
    assert got == pytest.approx((0.255, 0.307), abs=TOLERANCE)


def test_heavy_ball():
    hyper = {"learning_rate": 4e-5, "momentum": 0.9, "ema": 0.998}

    def means(kappa, **changes):
        new = {**scale_hyperparameters(hyper, kappa, "momentum"), **changes}
        ball = np.zeros(PATHS)

        def update(theta, g, step):
            nonlocal ball
            ball = new["momentum"] * ball + g
            return theta - new["learning_rate"] * ball

        return quadratic_paths(
            update,
            4096 // kappa,
            noise=3 / math.sqrt(kappa),
            start=2.0,
            rho=new["ema"],
            paths=PATHS,
            seed=kappa,
        )

    for kappa, expected in {
        4: (0.384, 0.482),
        16: (0.371, 0.473),
        64: (0.317, 0.453),
    }.items():
        assert means(kappa) == pytest.approx(expected, abs=TOLERANCE)
    assert means(16, ema=0.998)[1] == pytest.approx(1.574, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_hyperparameters(HYPER, 0), "kappa must be positive"),
        (lambda: scale_hyperparameters(HYPER, math.inf), "kappa"),
        (lambda: scale_hyperparameters({"lr": 1}, 2), r"\['lr'\]; known: \['learning"),
        (lambda: scale_hyperparameters({"learning_rate": 0}, 2), "learning_rate"),
        (lambda: scale_hyperparameters({"b1": 1.0}, 2), "b1"),
        (lambda: scale_hyperparameters({"momentum": 1.0}, 2), "momentum"),
        (lambda: scale_hyperparameters({"eps": -1}, 2), "eps"),
        (lambda: scale_hyperparameters({"ema": 1.5}, 2), "ema"),
        (lambda: scale_hyperparameters(HYPER, 2, decay="both"), "'independent', 'l2'"),
        (lambda: scale_hyperparameters(HYPER, 2, beta_form="power"), "beta_form"),
        (lambda: scale_hyperparameters(HYPER, 1e5), "weight_decay=0.1 would remove"),
        (
            lambda: scale_hyperparameters({"weight_decay": 0.1}, 2, exact_decay=True),
            "must hold learning_rate",
        ),
        (
            lambda: scale_hyperparameters(
                {"weight_decay": 0.6}, 2, decay="independent"
            ),
            "weight_decay=0.6",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
