r"""What is known of sigmoid attention, as numbers: the bias rule and a Jacobian bound.

Plain float64 NumPy on the host, for small problems, figures and tests. One head of
self-attention is ``F(X) = σ(X A Xᵀ + b) X W_v`` with ``A = W_q W_kᵀ / √D`` and tokens
as the rows of ``X``. Letters: n tokens, d width, D and E head sizes.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431: the bias -log n and, as Theorem 3.2, a bound that grows with the
  square of the token norms. The bound of this file has its own proof, given below.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

Activation = Literal["sigmoid", "softmax"]
Suprema = Literal["measured", "universal", "exponential"]

_NODES = 128  # row masses to 1e-12 for std <= 2, to 2e-7 for std = 4


def _sigmoid(z: np.ndarray) -> np.ndarray:
    t = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, t) / (1.0 + t)


def row_mass(n: int, *, alpha: float = 1.0, std: float = 1.0) -> float:
    r"""Expected sum of a row of weights, ``n·E[σ(s - α·log n)]``, s ~ N(0, std²).

    Softmax rows sum to 1; these do not, but with α = 1 their sum is of order one:
    ``σ(s - α·log n) = e^s / (n^α + e^s)``, hence the mass is
    ``n^(1-α)·E[e^s / (1 + e^s·n^-α)]`` and, by dominated convergence for α > 0, is
    ``n^(1-α)·e^(std²/2)`` in the limit of large n. That diverges for α < 1 and vanishes
    for α > 1: the bias -log n is the only multiple of log n with a finite, non-zero
    limit. Without a bias (α = 0) the mass is n/2 exactly, by symmetry.

    Gauss-Hermite quadrature with 128 nodes.

    Args:
      n: length; at least 1.
      alpha: the bias is ``-alpha·log(n)``.
      std: standard deviation of the logits.

    Returns:
      The mass, between 0 and n.

    Raises:
      ValueError: ``n < 1``, or ``std`` negative or above 4, where the quadrature is no
        longer accurate.

    References:
      Ramapuram et al., arXiv 2409.04431, section on the bias -log n.

    Example:
      >>> [round(row_mass(n), 6) for n in (16, 1024, 16384)]
      [1.346241, 1.641589, 1.648271]
      >>> round(row_mass(4096, alpha=0), 6)
      2048.0
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= std <= 4:
        raise ValueError(f"std must be between 0 and 4, got {std}")
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    values = _sigmoid(std * nodes - alpha * math.log(n))
    return float(n * (weights @ values) / weights.sum())


class JacobianBound(NamedTuple):
    """Upper bounds on the spectral norm of a Jacobian; ``first <= second``.

    Attributes:
      first: ``‖W_v‖·(‖P‖ + 2·m2·‖A‖·‖X‖²)``.
      second: ``‖W_v‖·(n·m1 + 2·m2·‖A‖·Σ_i ‖x_i‖²)``.
      m1: bound on the weights that was used.
      m2: bound on the derivatives σ' that was used.
    """

    first: float
    second: float
    m1: float
    m2: float


class _Head(NamedTuple):
    x: np.ndarray  # [n, d]
    a: np.ndarray  # [d, d]
    values: np.ndarray  # [n, E]
    w_v: np.ndarray  # [d, E]
    logits: np.ndarray  # [n, n], the bias not yet added
    bias: float


def _head(x: Any, w_q: Any, w_k: Any, w_v: Any, bias: float | None) -> _Head:
    x, w_q, w_k, w_v = (np.asarray(leaf, np.float64) for leaf in (x, w_q, w_k, w_v))
    for name, leaf in (("x", x), ("w_q", w_q), ("w_k", w_k), ("w_v", w_v)):
        if leaf.ndim != 2 or leaf.size == 0:
            raise ValueError(f"{name} must be a non-empty matrix, got {leaf.shape}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"{name} must be finite")
    n, d = x.shape
    if w_q.shape != w_k.shape or w_q.shape[0] != d or w_v.shape[0] != d:
        raise ValueError(
            f"w_q and w_k must be [{d}, D] and w_v [{d}, E] for x {x.shape}, got "
            f"{w_q.shape}, {w_k.shape} and {w_v.shape}"
        )
    a = w_q @ w_k.T / math.sqrt(w_q.shape[1])
    bias = -math.log(n) if bias is None else float(bias)
    return _Head(x, a, x @ w_v, w_v, x @ a @ x.T, bias)


def jacobian(
    x: Any,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    *,
    bias: float | None = None,
    activation: Activation = "sigmoid",
) -> np.ndarray:
    """The Jacobian of one attention head with respect to all its tokens, in float64.

    With ``dS = dX A Xᵀ + X A dXᵀ`` and values ``v_j = W_vᵀ x_j``, both kinds are
    ``dF_i = Σ_j P_ij W_vᵀ dx_j + Σ_j g_ij dS_ij (v_j - c_i)``: for the sigmoid
    ``g = P∘(1 - P)`` and ``c = 0``, for softmax ``g = P`` and ``c_i = F_i``.

    Args:
      x: tokens ``[n, d]``.
      w_q: ``[d, D]``; logits are divided by √D.
      w_k: ``[d, D]``.
      w_v: ``[d, E]``.
      bias: added to the logits; ``-log(n)`` by default. Softmax does not see it.
      activation: "sigmoid" or "softmax", for comparison.

    Returns:
      ``[n·E, n·d]``; element (i·E + e, j·d + c) is ∂F_ie / ∂x_jc.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or another name.
    """
    head = _head(x, w_q, w_k, w_v, bias)
    n, d = head.x.shape
    width = head.values.shape[1]
    if activation == "sigmoid":
        p = _sigmoid(head.logits + head.bias)
        g = p * (1 - p)
        moved = np.broadcast_to(head.values[None], (n, n, width))
    elif activation == "softmax":
        p = np.exp(head.logits - head.logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        g = p
        moved = head.values[None] - (p @ head.values)[:, None]
    else:
        raise ValueError(
            f"activation must be 'sigmoid' or 'softmax', got {activation!r}"
        )
    weighted = g[:, :, None] * moved  # [i, j, E]
    # Through the values, through the keys x_j, and through the query x_i.
    result = p[:, None, :, None] * head.w_v.T[None, :, None, :]
    result += np.einsum("ije,ic->iejc", weighted, head.x @ head.a)
    diagonal = np.arange(n)
    result[diagonal, :, diagonal, :] += np.einsum(
        "ije,jc->iec", weighted, head.x @ head.a.T
    )
    return result.reshape(n * width, n * d)


def jacobian_norm(
    x: Any,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    *,
    bias: float | None = None,
    activation: Activation = "sigmoid",
) -> float:
    """Largest singular value of `jacobian`: the local Lipschitz constant of the head.

    Exact and dense: for ``n·d`` up to a few thousand.

    Args:
      x: as in `jacobian`.
      w_q: likewise.
      w_k: likewise.
      w_v: likewise.
      bias: likewise.
      activation: likewise.

    Returns:
      The spectral norm.
    """
    matrix = jacobian(x, w_q, w_k, w_v, bias=bias, activation=activation)
    # Squaring costs accuracy at the small singular values only.
    return float(np.linalg.eigvalsh(matrix @ matrix.T)[-1]) ** 0.5


def jacobian_bound(
    x: Any,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    *,
    bias: float | None = None,
    suprema: Suprema = "measured",
) -> JacobianBound:
    r"""Bounds on `jacobian_norm` that are quadratic in the norms of the tokens.

    With ``m1 >= σ`` and ``m2 >= σ'`` over the logits that occur, and spectral norms::

        ‖J‖ <= ‖W_v‖·(‖P‖ + 2·m2·‖A‖·‖X‖²) <= ‖W_v‖·(n·m1 + 2·m2·‖A‖·Σ_i ‖x_i‖²)

    Proof. ``dF = P·dX·W_v + [σ'(S) ∘ (dX A Xᵀ + X A dXᵀ)]·X W_v``. In Frobenius norms
    the first term is at most ``‖P‖·‖dX‖·‖W_v‖``. An element-wise product with σ' grows
    a norm by m2 at most, ``‖dX A Xᵀ‖ <= ‖dX‖·‖A‖·‖X‖`` and likewise its mirror image,
    and the last factor adds ``‖X‖·‖W_v‖``: together the first bound. The second has
    ``‖P‖ <= n·m1``, because no element exceeds m1, and ``‖X‖² <= Σ_i ‖x_i‖²``.

    With the universal ``m1 = 1`` and ``m2 = 1/4`` the second bound is
    ``‖W_v‖·n·(1 + ‖A‖·R²/2)``, R² the mean of ``‖x_i‖²``: quadratic in R and linear in
    n, where bounds for softmax grow like e^(R²). With b = -log n and
    ``m1 = m2 = e^(s_max)/n`` ("exponential") it is ``‖W_v‖·e^(s_max)·(1 + 2·‖A‖·R²)``:
    no n, at the price of the exponential of the largest logit.

    Args:
      x: as in `jacobian`.
      w_q: likewise.
      w_k: likewise.
      w_v: likewise.
      bias: likewise.
      suprema: what m1 and m2 are: "measured", the largest σ and σ' over the logits that
        occur; "universal", 1 and 1/4; "exponential", ``e^(z_max)``, z with the bias.

    Returns:
      Both bounds with the m1 and m2 in them.

    Raises:
      ValueError: as in `jacobian`.

    References:
      Compare Ramapuram et al., arXiv 2409.04431, Theorem 3.2; for softmax Kim et al.,
      "The Lipschitz Constant of Self-Attention", arXiv 2006.04710, and Castin et al.,
      "How Smooth Is Attention?", arXiv 2312.14820.
    """
    head = _head(x, w_q, w_k, w_v, bias)
    z = head.logits + head.bias
    p = _sigmoid(z)
    if suprema == "measured":
        m1, m2 = float(p.max()), float((p * (1 - p)).max())
    elif suprema == "universal":
        m1, m2 = 1.0, 0.25
    elif suprema == "exponential":
        m1 = m2 = float(np.exp(z.max()))
    else:
        raise ValueError(
            f"suprema must be 'measured', 'universal' or 'exponential', got {suprema!r}"
        )

    def norm(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(matrix, 2))

    quadratic = 2 * m2 * norm(head.a)
    first = norm(p) + quadratic * norm(head.x) ** 2
    second = len(head.x) * m1 + quadratic * float((head.x**2).sum())
    w_v_norm = norm(head.w_v)
    return JacobianBound(w_v_norm * first, w_v_norm * second, m1, m2)
