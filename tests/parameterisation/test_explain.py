"""The table that shows every factor, and the findings of the audit."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from diffmm._tree import map_with_name
from diffmm.models import Denoiser, TransformerConfig
from diffmm.optim.adamw import adamw, mask_by_name
from diffmm.optim.hyperparameters import AdamW
from diffmm.parameterisation.absorb import absorbed
from diffmm.parameterisation.audit import audit, shrink_per_step
from diffmm.parameterisation.explain import explain
from diffmm.parameterisation.infer import infer
from diffmm.parameterisation.initialise import rescale_init, rms_by_name
from diffmm.parameterisation.leaf import Role
from diffmm.parameterisation.rules import CompletedP, evaluate


def make(size):
    width, num_layers = size
    config = TransformerConfig(
        vocabulary_size=20, width=width, num_layers=num_layers, head_dim=8
    )
    return nnx.state(Denoiser(config, rngs=nnx.Rngs(0)), nnx.Param)


BASE, TARGET = (8, 2), (32, 8)


@pytest.fixture(scope="module")
def leaves():
    return infer(make, BASE, TARGET)


@pytest.fixture(scope="module")
def params():
    return make(TARGET)


def checks(findings):
    return [finding.check for finding in findings]


def test_every_leaf_is_in_the_table_with_number_formula_and_source(leaves):
    rule = CompletedP(alpha=0.5)
    text = explain(rule, leaves)
    lines = text.splitlines()
    assert len(lines) == len(leaves) + 2
    assert all(name in text for name in leaves)
    query = next(line for line in lines if line.startswith("blocks/attention/query "))
    assert "0.125 = m_in^-1 · m_depth^-0.5" in query
    assert "hidden weight" in query
    assert lines[-1] == "source: arXiv 2512.22382, Table 1"
    multipliers = evaluate(rule, leaves)
    name = "blocks/mlp/up"
    multipliers[name] = dataclasses.replace(
        multipliers[name], learning_rate=np.array([1.0, 2.0]).reshape(2, 1, 1)
    )
    assert "1 … 2" in explain(rule, leaves, multipliers)
    with pytest.raises(ValueError, match="embedding"):
        explain(rule, leaves, {})


def test_a_sound_set_up_has_no_findings(leaves, params):
    multipliers = evaluate(CompletedP(), leaves)
    hyper = AdamW(learning_rate=1e-2, weight_decay=0.1)
    matrices = {name for name, leaf in leaves.items() if leaf.matrix}
    tx = adamw(hyper, multipliers, mask=mask_by_name(matrices))
    assert not audit(
        leaves,
        multipliers,
        params=params,
        base_rms=rms_by_name(make(BASE)),
        rms=rms_by_name(params),
        shrink=shrink_per_step(tx, params),
        eps=1e-8,
        head_dims=(8, 8),
        base_width=128,
        base_depth=4,
    )


def test_the_wrong_decay_mode_is_found(leaves, params):
    """An optimiser whose decay ignores the learning rate, fed coupled factors."""
    multipliers = evaluate(CompletedP(), leaves)

    def decay_by(factor):
        def update(updates, state, params):
            shrunk = jax.tree.map(
                lambda u, f, p: u - 1e-3 * f * p, updates, factor, params
            )
            return shrunk, state

        return optax.GradientTransformation(lambda p: optax.EmptyState(), update)

    def factors(field):
        return map_with_name(
            lambda name, _: getattr(multipliers[name], field) * leaves[name].matrix,
            params,
        )

    def message(field):
        shrink = shrink_per_step(decay_by(factors(field)), params)
        (finding,) = audit(leaves, multipliers, shrink=shrink)
        assert finding.check == "decay mode"
        return finding.message

    assert "independently" in message("weight_decay")
    assert "too little" in message("learning_rate")
    plain = shrink_per_step(optax.adamw(1e-2, weight_decay=0.1), params)
    found = audit(leaves, multipliers, shrink=plain)
    # One λ and one learning rate: lr·wd is width-free, only vectors should not decay.
    assert checks(found) == ["decay mask"]


def test_depth_counted_twice(leaves, params):
    multipliers = evaluate(CompletedP(), leaves)
    base_rms = rms_by_name(make(BASE))
    rms = rms_by_name(params)
    for name, leaf in leaves.items():
        if leaf.residual:
            rms[name] *= leaf.m_depth**-0.5
    (finding,) = audit(leaves, multipliers, base_rms=base_rms, rms=rms)
    assert finding.check == "depth counted twice"
    assert len(finding.leaves) == 2
    repaired = rescale_init(params, leaves, multipliers, base_rms)
    assert not audit(leaves, multipliers, base_rms=base_rms, rms=rms_by_name(repaired))


def test_the_other_findings(leaves, params):
    multipliers = evaluate(CompletedP(), leaves)
    less = {k: v for k, v in multipliers.items() if k != "embedding"}
    (finding,) = audit(
        leaves, less | {"none": multipliers["embedding"]}, params=params
    )[:1]
    assert finding.check == "no rule"
    assert finding.leaves == ("embedding",)
    assert "embedding" in str(finding)
    no_output = {k: v for k, v in leaves.items() if k != "unembedding"}
    assert checks(audit(no_output, multipliers)) == ["tied weights"]
    tied = {
        k: dataclasses.replace(v, role=Role.TIED_EMBEDDING) if k == "embedding" else v
        for k, v in no_output.items()
    }
    assert checks(audit(tied, multipliers)) == ["tied weights"]
    no_ends = {k: dataclasses.replace(v, residual="") for k, v in leaves.items()}
    assert checks(audit(no_ends, multipliers)) == ["residual branches"]
    inside = absorbed(multipliers, leaves)
    assert checks(audit(leaves, inside, clips_by_global_norm=True)) == ["clipping"]
    assert not audit(leaves, multipliers, clips_by_global_norm=True)
    assert checks(audit(leaves, multipliers, eps=1e-3)) == ["epsilon"]
    assert checks(audit(leaves, multipliers, base_width=64, base_depth=2)) == [
        "base",
        "base",
    ]
    no_norm = {k: v for k, v in leaves.items() if v.role is not Role.QK_GAIN}
    assert checks(audit(no_norm, multipliers, head_dims=(8, 16))) == ["head dimension"]
    shrunk = infer(make, TARGET, BASE)
    assert "base" in checks(audit(shrunk, evaluate(CompletedP(), shrunk)))
