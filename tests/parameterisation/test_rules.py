"""Tables of exponents: golden values, two statements of one rule, the group law."""

import dataclasses
import itertools

import numpy as np
import pytest

from diffmm.parameterisation.absorb import absorb, absorbed
from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.parameterisation.rules import (
    CompletedP,
    CompleteP,
    MuP,
    Standard,
    evaluate,
    role_table,
)
from diffmm.typing import Multiplier

# (infinite_in, infinite_out, in_block) of every role whose widths scale alike.
SHAPES = {
    Role.EMBEDDING: (False, True, False),
    Role.TIED_EMBEDDING: (False, True, False),
    Role.HIDDEN: (True, True, True),
    Role.HIDDEN_BIAS: (False, True, True),
    Role.GAIN: (False, True, True),
    Role.QK_GAIN: (False, False, True),
    Role.FINAL_GAIN: (False, True, False),
    Role.UNEMBEDDING: (True, False, False),
    Role.UNEMBEDDING_BIAS: (False, False, False),
}


def leaf_of(role, m_width=1.0, m_depth=1.0, m_out=None, residual=""):
    infinite_in, infinite_out, in_block = SHAPES[role]
    return Leaf(
        name=role.value,
        role=role,
        module="any",
        shape=(1,),
        m_in=m_width if infinite_in else 1.0,
        m_out=(m_out or m_width) if infinite_out else 1.0,
        infinite_in=infinite_in,
        infinite_out=infinite_out,
        m_depth=m_depth,
        in_block=in_block,
        residual=residual,
    )


def multiplier(rule, leaf):
    return evaluate(rule, {leaf.name: leaf})[leaf.name]


def numbers(m):
    return np.array(
        [m.init_variance, m.forward, m.learning_rate, m.eps, m.weight_decay]
    )


def with_kappa(m, kappa):
    """Variance, learning rate, ε and decay with the batch and duration factor."""
    s = kappa**0.5
    return (m.init_variance, m.learning_rate * s, m.eps / s, m.weight_decay * s)


GOLDEN_A = {  # m_N = 4, m_L = 2, m_B = 2, m_D = 8: kappa = 1/4
    (Role.EMBEDDING, 1.0): (1, 0.5, 0.5, 0.5),
    (Role.HIDDEN, 1.0): (0.25, 0.125, 0.25, 2),
    (Role.HIDDEN_BIAS, 1.0): (1, 0.5, 0.25, 0.5),
    (Role.GAIN, 1.0): (1, 0.5, 0.25, 0.5),
    (Role.QK_GAIN, 1.0): (1, 0.5, 1, 0.5),
    (Role.FINAL_GAIN, 1.0): (1, 0.5, 2, 0.5),
    (Role.UNEMBEDDING, 1.0): (0.0625, 0.125, 2, 2),
    (Role.UNEMBEDDING_BIAS, 1.0): (1, 0.5, 2, 0.5),
    (Role.EMBEDDING, 0.5): (1, 0.5, 0.5, 0.5),
    (Role.HIDDEN, 0.5): (0.25, 0.0883883476, 0.3535533906, 2),
    (Role.HIDDEN_BIAS, 0.5): (1, 0.3535533906, 0.3535533906, 0.5),
    (Role.GAIN, 0.5): (1, 0.3535533906, 0.3535533906, 0.5),
    (Role.QK_GAIN, 0.5): (1, 0.3535533906, 1.4142135624, 0.5),
    (Role.FINAL_GAIN, 0.5): (1, 0.5, 2, 0.5),
    (Role.UNEMBEDDING, 0.5): (0.0625, 0.125, 2, 2),
    (Role.UNEMBEDDING_BIAS, 0.5): (1, 0.5, 2, 0.5),
}


@pytest.mark.parametrize(("role", "alpha"), GOLDEN_A)
def test_golden_values_of_a_small_ratio(role, alpha):
    got = with_kappa(multiplier(CompletedP(alpha=alpha), leaf_of(role, 4, 2)), 0.25)
    want = GOLDEN_A[role, alpha]
    if alpha == 1.0:
        assert got == want
    else:
        np.testing.assert_allclose(got, want, atol=6e-11)


def test_golden_values_of_the_final_norm_derived():
    rule = CompletedP(final_norm_eps="derived")
    assert with_kappa(multiplier(rule, leaf_of(Role.FINAL_GAIN, 4, 2)), 0.25)[2] == 0.5


GOLDEN_B = {  # (256, 8, 2^17, 1.6e9) to (4096, 32, 2^22, 1.4e11)
    (Role.EMBEDDING, 1.0): (1, 0.6047432, 0.1033497, 0.6047432),
    (Role.HIDDEN, 1.0): (0.0625, 0.0377964, 0.0258374, 9.6758905),
    (Role.GAIN, 1.0): (1, 0.6047432, 0.0258374, 0.6047432),
    (Role.QK_GAIN, 1.0): (1, 0.6047432, 0.4133986, 0.6047432),
    (Role.FINAL_GAIN, 1.0): (1, 0.6047432, 1.6535946, 0.6047432),
    (Role.UNEMBEDDING, 1.0): (0.00390625, 0.0377964, 1.6535946, 9.6758905),
    (Role.UNEMBEDDING_BIAS, 1.0): (1, 0.6047432, 1.6535946, 0.6047432),
    (Role.HIDDEN, 0.5): (0.0625, 0.0188982, 0.0516748, 9.6758905),
    (Role.HIDDEN_BIAS, 0.5): (1, 0.3023716, 0.0516748, 0.6047432),
    (Role.QK_GAIN, 0.5): (1, 0.3023716, 0.8267973, 0.6047432),
}


@pytest.mark.parametrize(("role", "alpha"), GOLDEN_B)
def test_golden_values_of_a_large_ratio(role, alpha):
    kappa = 32 / 87.5
    got = with_kappa(multiplier(CompletedP(alpha=alpha), leaf_of(role, 16, 4)), kappa)
    np.testing.assert_allclose(got, GOLDEN_B[role, alpha], atol=6e-8)


@pytest.mark.parametrize(
    ("role", "alpha", "want"),
    [
        (Role.HIDDEN, 1.0, (0.0625, 0.0625, 0.5, 4)),
        (Role.HIDDEN_BIAS, 1.0, (0.25, 0.25, 0.5, 1)),
        (Role.HIDDEN, 0.5, (0.125, 0.0625, 0.5, 2.8284271247)),
        (Role.HIDDEN_BIAS, 0.5, (0.5, 0.25, 0.5, 0.7071067812)),
    ],
)
def test_golden_values_of_an_absorbed_residual(role, alpha, want):
    leaf = leaf_of(role, 4, 2, residual="mlp.res")
    leaves = {leaf.name: leaf}
    multipliers = evaluate(CompletedP(alpha=alpha), leaves)
    assert multipliers[leaf.name].forward == 2**-alpha
    got = absorbed(multipliers, leaves)[leaf.name]
    assert got.forward == 1.0
    np.testing.assert_allclose(with_kappa(got, 0.25), want, atol=6e-11)


def test_independent_decay_and_invariant_decay():
    for role in SHAPES:
        m = multiplier(CompletedP(), leaf_of(role, 4, 2))
        assert m.learning_rate * m.weight_decay * 0.25 == 0.25
        half = multiplier(CompletedP(alpha=0.5), leaf_of(role, 4, 2))
        shrink = half.learning_rate * half.weight_decay * 0.25
        want = 0.1767766953 if SHAPES[role][2] else 0.25
        np.testing.assert_allclose(shrink, want, atol=6e-11)
        rule = CompletedP(alpha=0.5, wd_depth="invariant")
        free = multiplier(rule, leaf_of(role, 4, 2))
        np.testing.assert_allclose(free.learning_rate * free.weight_decay, 1.0, 1e-15)
    rule = CompletedP(alpha=0.5, wd_depth="invariant")
    hidden = multiplier(rule, leaf_of(Role.HIDDEN, 4, 2))
    np.testing.assert_allclose(hidden.weight_decay * 0.5, 2.8284271247, atol=6e-11)


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("final", ["paper", "derived"])
@pytest.mark.parametrize(("m_width", "m_depth"), [(4, 2), (0.5, 0.25), (3, 5), (1, 1)])
def test_shape_rule_equals_role_table(alpha, final, m_width, m_depth):
    rule = CompletedP(alpha=alpha, final_norm_eps=final)
    for role in SHAPES:
        by_shape = multiplier(rule, leaf_of(role, m_width, m_depth))
        by_role = role_table(
            role,
            m_width=m_width,
            m_depth=m_depth,
            alpha=alpha,
            final_norm_eps=final,
        )
        np.testing.assert_allclose(numbers(by_shape), numbers(by_role), rtol=4e-16)


RULES = [
    CompletedP(),
    CompletedP(alpha=0.7, final_norm_eps="derived", wd_depth="invariant"),
    CompletedP(alpha=0.6, family="sgd"),
    CompletedP(family="lion"),
    CompletedP(alpha=0.9, family="muon"),
    CompleteP(alpha=0.5),
    MuP(),
    Standard(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_group_law(rule):
    """A to B to C is A to C, with widths that scale apart and ratios below one."""
    for role, residual in itertools.product(SHAPES, ("", "attn.res")):
        first = leaf_of(role, 0.5, 3.0, m_out=0.75, residual=residual)
        second = leaf_of(role, 6.0, 0.25, m_out=1.0, residual=residual)
        both = dataclasses.replace(
            first,
            m_in=first.m_in * second.m_in,
            m_out=first.m_out * second.m_out,
            m_depth=first.m_depth * second.m_depth,
        )
        product = numbers(multiplier(rule, first)) * numbers(multiplier(rule, second))
        np.testing.assert_allclose(product, numbers(multiplier(rule, both)), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ratios_of_one_are_the_identity(rule):
    for role in SHAPES:
        assert multiplier(rule, leaf_of(role, residual="mlp.res")) == Multiplier()


@pytest.mark.parametrize(
    ("tensor", "m_in", "m_out", "in_block", "want"),
    [
        # (init variance, lr, eps, wd) at m_N = 4, m_L = 2, α = 1
        ("d_ff scaled apart: up", 4, 8, True, (1 / 4, 1 / 4, 1 / 16, 4)),
        ("d_ff scaled apart: down", 8, 4, True, (1 / 8, 1 / 8, 1 / 8, 8)),
        ("GQA key, MoE router", 4, None, True, (1 / 16, 1 / 4, 1 / 2, 4)),
        ("depthwise convolution", None, 4, True, (1, 1, 1 / 8, 1)),
        ("per-head QK gain", None, 4, True, (1, 1, 1 / 8, 1)),
        ("patch embedding", None, 4, False, (1, 1, 1 / 4, 1)),
        ("image head", 4, None, False, (1 / 16, 1 / 4, 1, 4)),
        ("scalar in a block", None, None, True, (1, 1, 1 / 2, 1)),
    ],
)
def test_ratios_of_single_tensors(tensor, m_in, m_out, in_block, want):
    leaf = Leaf(
        name=tensor,
        role=Role.HIDDEN,
        module="any",
        shape=(1,),
        m_in=m_in or 1.0,
        m_out=m_out or 1.0,
        infinite_in=m_in is not None,
        infinite_out=m_out is not None,
        m_depth=2,
        in_block=in_block,
    )
    assert with_kappa(multiplier(CompletedP(), leaf), 1.0) == want


def test_absorbing_the_logit_multiplier_of_completep_gives_completedp():
    leaf = leaf_of(Role.UNEMBEDDING, 4, 2)
    leaves = {leaf.name: leaf}
    assert evaluate(CompleteP(), leaves)[leaf.name].forward == 0.25
    assert absorbed(evaluate(CompleteP(), leaves), leaves) == evaluate(
        CompletedP(), leaves
    )


def test_sgd_is_mup_in_width():
    rule = CompletedP(alpha=0.5, family="sgd")
    rates = {r: multiplier(rule, leaf_of(r, 4, 9)).learning_rate for r in SHAPES}
    assert rates[Role.HIDDEN] == 1.0
    assert rates[Role.EMBEDDING] == rates[Role.GAIN] == 4.0
    assert rates[Role.UNEMBEDDING] == 0.25


def test_a_tied_embedding_keeps_its_multiplier():
    leaf = leaf_of(Role.TIED_EMBEDDING, 4, 2)
    leaves = {leaf.name: leaf}
    multipliers = evaluate(CompletedP(), leaves)
    assert multipliers[leaf.name].forward == 0.25
    with pytest.raises(ValueError, match="tied embedding"):
        absorbed(multipliers, leaves)


def test_bad_input_names_the_argument():
    for alpha in (0.49, 1.01, float("nan"), "1"):
        with pytest.raises(ValueError, match="alpha"):
            CompletedP(alpha=alpha)
    with pytest.raises(ValueError, match=r"wd_depth.*invariant"):
        CompletedP(wd_depth="other")
    with pytest.raises(ValueError, match=r"family.*muon"):
        CompletedP(family="adagrad")
    with pytest.raises(ValueError, match="m_width"):
        role_table(Role.HIDDEN, m_width=0, m_depth=1)
    with pytest.raises(ValueError, match="role"):
        role_table(Role.SCALAR, m_width=1, m_depth=1)
    with pytest.raises(ValueError, match="a must be"):
        absorb(Multiplier(), 0.0)
