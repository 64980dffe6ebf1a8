"""What tests of policies share: the toy of the example, small networks, rollouts."""

import functools
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import unmasking_toy as toy

from diffmm.policies import PolicyConfig, PolicyRule, init, rollout

SMALL = PolicyConfig(width=32, mlp_hidden=64, time_width=32)
TINY = PolicyConfig(width=8, mlp_hidden=8, time_width=4)


@functools.cache
def params_of(config=TINY, seed=0):
    """Parameters whose output depends on everything."""
    params = init(jax.random.key(seed), config)
    # "Smart" initialisation hides mask and time: move every leaf a little.
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, moved)


def run(canvas, rule=None, key=0, predict=toy.predict, **options):
    if rule is None:
        rule = PolicyRule(params=params_of(), config=TINY, mode="bernoulli")
    key = jax.random.key(key) if isinstance(key, int) else key
    options = {"mask_id": toy.MASK, "allowed": toy.ALLOWED, **options}
    return rollout(predict, None, canvas, key, rule=rule, **options)
