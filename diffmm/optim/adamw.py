"""AdamW whose every leaf has its own hyper-parameters, with the state of optax's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffmm._tree import map_with_name
from diffmm.optim import _leaves, _per_leaf, rates, validate
from diffmm.optim.hyperparameters import AdamW
from diffmm.optim.rates import BetaForm
from diffmm.typing import Array, ArrayLike, Multiplier, Params

_DECAYED = object()


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    return leaves, treedef


def adamw(
    hyper: AdamW,
    multipliers: Mapping[str, Multiplier] | None = None,
    *,
    schedule: Callable[[Array], ArrayLike] | None = None,
    mask: Any = None,
    mu_dtype: Any = None,
    beta_form: BetaForm = "exponential",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with per-leaf hyper-parameters and the state of ``optax.adamw``.

    With f the factors of the leaf's `Multiplier`, s(t) the schedule, and moments whose
    rates of forgetting are multiplied by f.b1 and f.b2 (each leaf corrects its own
    bias)::

        u = m̂ / (√(v̂ + f.eps²·eps_root) + f.eps·eps)
        coupled:      θ ← θ − f.learning_rate·η·s(t) · (u + f.weight_decay·λ·θ)
        independent:  θ ← θ − f.learning_rate·η·s(t)·u
                            − f.learning_rate·f.weight_decay·λ·s(t)·θ

    The state is the one of ``optax.adamw`` called with the same kinds of arguments
    (schedule or number, mask or none, ``mu_dtype``), so that checkpoints move either
    way. With factors of 1, jitted updates equal those of ``optax.adamw`` bit for bit.
    Factors are constants of the compiled program: one fused pass per leaf, whatever
    their number, and any sharding.

    The learning rate of a sweep may be traced: let the schedule close over it.
    ``hyper.clip`` and ``hyper.ema`` are left to the caller, because they would change
    the state: chain ``optax.clip_by_global_norm`` or `clip_by_absorbed_norm` before.
    As in optax the arithmetic has the types of the leaf: keep parameters in float32,
    since b2 = 0.999 is 1 in bfloat16.

    >>> hyper = AdamW(learning_rate=0.1, eps=0.0)
    >>> tx = adamw(hyper, {"w": Multiplier(learning_rate=0.5)})
    >>> params = {"w": jnp.ones(2)}
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> [round(float(x), 4) for x in updates["w"]]
    [-0.05, -0.05]

    Args:
      hyper: hyper-parameters that all leaves share.
      multipliers: ``{name of the leaf: Multiplier}``, of every leaf; None for none.
        Factors of leaves that stack layers may be arrays ``[layers, 1, ...]``. Places
        of the tree that ``optax.masked`` or Equinox leave empty may be named too.
      schedule: function of optax's step count, returning the learning rate as a
        multiple of the peak ``hyper.learning_rate``; None for a constant one.
      mask: which leaves decay, as in ``optax.adamw`` (a tree of booleans, a prefix of
        one, or a function of the parameters); None for all. See `mask_by_name`.
      mu_dtype: of the first moment; None for that of the parameters.
      beta_form: how the factors of b1 and b2 act, see `diffmm.optim.rates.scale_beta`.

    Returns:
      A transformation whose ``update`` must be given the parameters.

    Raises:
      ValueError: at once if a factor is negative or not finite (zero is legal for
        ``learning_rate`` and ``weight_decay``), or a β or a decay leaves its range;
        in ``init`` and ``update`` if names do not match the leaves, an array does not
        broadcast, or the mask matches no leaf; in ``update`` without parameters. Each
        names the leaf.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
      Mlodozeniec et al., Completed Hyperparameter Transfer across Modules, Width,
      Depth, Batch and Duration, arXiv 2512.22382.
    """
    if not isinstance(hyper, AdamW):
        raise ValueError(f"hyper must be an AdamW, got {hyper!r}")
    if schedule is not None and not callable(schedule):
        raise ValueError(
            "schedule must be a function of the step count that returns the factor of "
            f"the peak learning rate, got {schedule!r}"
        )
    validate.one_of("beta_form", beta_form, rates.BETA_FORMS)
    plain = optax.adamw(
        hyper.learning_rate if schedule is None else schedule,
        b1=hyper.b1,
        b2=hyper.b2,
        eps=hyper.eps,
        eps_root=hyper.eps_root,
        mu_dtype=mu_dtype,
        weight_decay=hyper.weight_decay,
        mask=mask,
    )
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    same = _per_leaf.constants(hyper, {"": Multiplier()}, beta_form)[""]
    constants = _per_leaf.constants(hyper, multipliers or {}, beta_form)
    # What optax's own masking gives to the wrapped transformation, it marks.
    marking = optax.masked(
        optax.GradientTransformation(
            lambda params: optax.EmptyState(),
            lambda tree, state, params=None: (
                jax.tree.map(lambda _: _DECAYED, tree),
                state,
            ),
        ),
        mask,
    )

    def plan(tree: Params) -> tuple[list[_per_leaf.Constants], list[bool]]:
        """Constants of every leaf, and whether it decays."""
        leaves, treedef = _flatten(tree)
        chosen = [same] * len(leaves)
        if multipliers is not None:
            names = _leaves.names_of(tree, "multipliers", constants, all_of=True)
            chosen = [constants[name] for name in names]
            for name, leaf, found in zip(names, leaves, chosen, strict=True):
                _per_leaf.check_shapes(name, found, leaf)
        if mask is None:
            return chosen, [True] * len(leaves)
        marked, _ = marking.update(tree, optax.MaskedState(optax.EmptyState()))
        decayed = [leaf is _DECAYED for leaf in treedef.flatten_up_to(marked)]
        whole = leaves and not _leaves.has_empty_places(tree)
        if whole and hyper.weight_decay > 0 and not any(decayed):
            raise ValueError(
                f"mask: no leaf decays, yet weight_decay={hyper.weight_decay!r}; use "
                "weight_decay=0.0 for none"
            )
        return chosen, decayed

    def init(params: Params) -> optax.OptState:
        if jax.tree.leaves(params):  # `optax.tree_map_params` passes a placeholder
            plan(params)
        return plain.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError("params must be given to update: weight decay needs them")
        adam, decay_state, step_state = state
        leaves, treedef = _flatten(updates)
        chosen, decayed = plan(updates)
        count = optax.safe_increment(adam.count)
        value = None if schedule is None else schedule(step_state.count)
        if value is not None and jnp.shape(value) != ():
            raise ValueError(
                f"schedule must return a scalar, got the shape {jnp.shape(value)}"
            )
        scalars = _per_leaf.Scalars(count, value)
        columns = (
            leaves,
            treedef.flatten_up_to(adam.mu),
            treedef.flatten_up_to(adam.nu),
            treedef.flatten_up_to(params),
            chosen,
            decayed,
        )
        new, mu, nu = [], [], []
        for gradient, m, v, parameter, c, decays in zip(*columns, strict=True):
            decay = hyper.decay if decays else None
            results = _per_leaf.update_leaf(
                gradient, m, v, parameter, c, decay, scalars
            )
            new.append(results[0])
            mu.append(results[1] if mu_dtype is None else results[1].astype(mu_dtype))
            nu.append(results[2].astype(v.dtype))
        adam = adam._replace(
            count=count, mu=treedef.unflatten(mu), nu=treedef.unflatten(nu)
        )
        if schedule is not None:
            step_state = step_state._replace(
                count=optax.safe_increment(step_state.count)
            )
        return treedef.unflatten(new), (adam, decay_state, step_state)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_by_name(names: Collection[str]) -> Callable[[Params], Any]:
    """A weight-decay mask for `adamw` and optax: true for the leaves named.

    Args:
      names: of the leaves that decay.

    Returns:
      A function from parameters to a tree of booleans.

    Raises:
      ValueError: from that function, if names match no leaf.
    """
    chosen = frozenset(names)

    def mask(tree: Params) -> Any:
        _leaves.names_of(tree, "names", chosen, all_of=False)
        return map_with_name(lambda name, _: name in chosen, tree)

    return mask
