"""What a likelihood evaluation reports: bounds per token with two standard errors.

With e_j the mean over the K draws of example j (nats per example), s_j² the sample
variance of those draws, n_j the tokens of example j and N = Σ n_j over J examples:

    bound per token             R = Σ_j e_j / N
    Monte-Carlo error of R      sqrt(Σ_j s_j²/K) / N
    error of R over examples    sqrt(J/(J−1) · Σ_j (e_j − R·n_j)²) / N

The first error is sqrt(Σ_j s_j²/K)/J, that of the mean over examples, divided by the
mean length N/J: what another choice of masks would change (an overestimate, since the
draws are stratified). The second is the linearised error of a ratio of means: what
another draw of examples would change, the masks included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from diffmm.typing import NUM_GROUPS, Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A sum of nats over a set of tokens, and its uncertainty.

    Attributes:
      nats: bound on the negative log-likelihood, summed over examples.
      count: tokens summed over examples.
      monte_carlo_error: standard error of ``nats_per_token`` from the choice of
        masks; 0 when exact, not-a-number with a single draw.
      example_error: standard error of ``nats_per_token`` from the choice of examples;
        not-a-number with a single example.
    """

    nats: float
    count: int
    monte_carlo_error: float
    example_error: float

    @property
    def nats_per_token(self) -> float:
        """Not-a-number for a group without tokens."""
        return self.nats / self.count if self.count else math.nan

    @property
    def bits_per_token(self) -> float:
        """Nats per token over log 2."""
        return self.nats_per_token / math.log(2.0)

    @property
    def perplexity_bound(self) -> float:
        """exp(nats per token): an upper bound, not an autoregressive perplexity."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodBound:
    """Result of a likelihood evaluation.

    Attributes:
      total: all tokens. ``total.nats`` is the sum of the groups' nats.
      groups: the part of each `Group` with tokens. In a joint row these are parts of
        one joint bound, not bounds on the modalities' own likelihoods.
      example_nats: float64 ``[J]``, bound on −log p of each example (for comparing
        answers to one prompt, or models on the same examples).
      example_count: int64 ``[J]``, tokens of each example.
      draws: K, draws per example; 0 when exact.
      exact: whether all subsets were enumerated.
    """

    total: Estimate
    groups: Mapping[Group, Estimate]
    example_nats: np.ndarray
    example_count: np.ndarray
    draws: int
    exact: bool


def assemble(
    samples: np.ndarray, counts: np.ndarray, *, exact: bool
) -> LikelihoodBound:
    """Turns samples of the bound into a result.

    Args:
      samples: float64 ``[J, K, NUM_GROUPS]``, nats of each example and draw by group.
      counts: int64 ``[J, NUM_GROUPS]``, tokens.
      exact: whether ``samples`` are exact values (K = 1).
    """
    groups = {
        Group(index): _estimate(samples[..., index], counts[:, index], exact=exact)
        for index in range(NUM_GROUPS)
        if counts[:, index].sum()
    }
    joint, joint_counts = samples.sum(axis=-1), counts.sum(axis=-1)
    total = dataclasses.replace(
        _estimate(joint, joint_counts, exact=exact),
        nats=sum((group.nats for group in groups.values()), 0.0),
    )
    return LikelihoodBound(
        total=total,
        groups=groups,
        example_nats=joint.mean(axis=1),
        example_count=joint_counts,
        draws=0 if exact else samples.shape[1],
        exact=exact,
    )


def _estimate(samples: np.ndarray, counts: np.ndarray, *, exact: bool) -> Estimate:
    """From nats ``[J, K]`` and tokens ``[J]``."""
    num_examples, draws = samples.shape
    means = samples.mean(axis=1)
    nats, count = float(means.sum()), int(counts.sum())
    monte_carlo_error = 0.0 if exact else math.nan
    example_error = math.nan
    if count and draws > 1:
        variance = samples.var(axis=1, ddof=1)
        monte_carlo_error = math.sqrt(variance.sum() / draws) / count
    if count and num_examples > 1:
        residual = means - nats / count * counts
        scale = num_examples / (num_examples - 1)
        example_error = math.sqrt(scale * np.sum(residual**2)) / count
    return Estimate(
        nats=nats,
        count=count,
        monte_carlo_error=monte_carlo_error,
        example_error=example_error,
    )
