"""Particles in a noisy quadratic: the optimisers in plain NumPy float64."""

import numpy as np


def adamw_paths(hyper, steps, *, curvature, noise, start, shape, seed=0, marks=()):
    """θ and its average after AdamW on gradients h·θ + noise·z, and θ at marks.

    The average takes θ before each step. `hyper` is an `AdamW`; with ``decay`` a string
    "l2" in place of a decoupled form, λθ joins the gradient.
    """
    generator = np.random.default_rng(seed)
    theta = np.full(shape, float(start))
    average = theta.copy()
    m = np.zeros(shape)
    v = np.zeros(shape)
    seen = []
    rho = 0.0 if hyper.ema is None else hyper.ema
    shrink = hyper.shrink
    p1 = p2 = 1.0
    for step in range(steps):
        g = curvature * theta + noise * generator.standard_normal(shape)
        average += (1 - rho) * (theta - average)
        m += (1 - hyper.b1) * (g - m)
        v += (1 - hyper.b2) * (g * g - v)
        p1 *= hyper.b1
        p2 *= hyper.b2
        root = np.sqrt(v / (1 - p2)) + hyper.eps
        theta = (1 - shrink) * theta - (hyper.learning_rate / (1 - p1)) * m / root
        if step + 1 in marks:
            seen.append(theta.copy())
    return theta, average, seen


def quadratic_paths(update, steps, *, noise, start, rho, paths, seed=0):
    """θ and its average under ``update(θ, g, step) -> θ`` with g = θ + noise·z."""
    generator = np.random.default_rng(seed)
    theta = np.full(paths, float(start))
    average = theta.copy()
    for step in range(steps):
        g = theta + noise * generator.standard_normal(paths)
        average += (1 - rho) * (theta - average)
        theta = update(theta, g, step)
    return theta.mean(), average.mean()
