"""Per-leaf hyper-parameters for any optimiser of optax, by groups of leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from diffmm._tree import map_with_name
from diffmm.optim import _leaves, rates, validate
from diffmm.optim.rates import BetaForm
from diffmm.typing import Array, ArrayLike, Factor, Multiplier, Params

#: Hyper-parameters that `grouped` knows, and the field of `Multiplier` for each.
_FIELD = {
    "learning_rate": "learning_rate",
    "eps": "eps",
    "eps_root": "eps",
    "weight_decay": "weight_decay",
    "b1": "b1",
    "b2": "b2",
}
#: Those that may differ between the layers of a stacked leaf.
_PER_LAYER = ("learning_rate", "weight_decay")


def grouped(
    make: Callable[..., optax.GradientTransformation],
    multipliers: Mapping[str, Multiplier] | None = None,
    *,
    learning_rate: float,
    schedule: Callable[[Array], ArrayLike] | None = None,
    beta_form: BetaForm = "exponential",
    **hyper: float,
) -> optax.GradientTransformationExtraArgs:
    """Applies factors of leaves to an optimiser that takes one number for all leaves.

    Leaves with the same hyper-parameters form a group, and ``make`` is called once per
    group; ``optax.partition`` joins the groups. With a single group the result is
    the plain optimiser, state included. For AdamW prefer `diffmm.optim.adamw.adamw`,
    which needs no groups and compiles faster.

    Only the hyper-parameters given here are multiplied: Lion, which has no ε, is not
    told of it. Weight decay must be coupled to the learning rate, θ −= η(u + λθ), as
    everywhere in optax. What ``make`` does across leaves (a global norm) it does per
    group; keep that outside, in a chain.

    Leaves that stack layers may have arrays ``[layers, 1, ...]`` as factors of the
    learning rate, which multiply what the optimiser returns and so need updates that
    are proportional to the learning rate; and of the weight decay, which ``make`` then
    receives as an array, as ``optax.add_decayed_weights`` allows. Other arrays are
    errors.

    Optimisers that treat matrices as such (Muon) see the leaves they always see: give
    their dimension numbers as a function of the parameters, because each group is
    handed a tree with holes.

    >>> import jax.numpy as jnp
    >>> tx = grouped(
    ...     optax.sgd, {"w": Multiplier(learning_rate=0.5), "b": Multiplier()},
    ...     learning_rate=1.0,
    ... )
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["w"].tolist(), updates["b"].tolist()
    ([-0.5, -0.5], [-1.0])

    Args:
      make: function of the hyper-parameters, by keyword, that makes the optimiser.
      multipliers: ``{name of the leaf: Multiplier}``, of every leaf; None for none.
      learning_rate: peak, shared by all leaves.
      schedule: function of the step count, returning the learning rate as a multiple
        of the peak; ``make`` then receives the learning rate as a function.
      beta_form: how the factors of b1 and b2 act.
      **hyper: any of ``eps``, ``eps_root``, ``weight_decay``, ``b1``, ``b2``.

    Returns:
      A transformation; its state is that of ``optax.partition``, with groups called
      ``group_0``, ``group_1``, … in the order of their first leaf by name.

    Raises:
      ValueError: for an unknown hyper-parameter, or a factor that is negative, not
        finite or an array where that has no meaning; in ``init`` and ``update`` if
        names do not match the leaves or an array does not broadcast.
    """
    unknown = sorted(set(hyper) - set(_FIELD))
    if unknown:
        raise ValueError(
            f"grouped: hyper-parameters {unknown} have no multipliers; set them inside "
            f"make. Known are {sorted(_FIELD)}"
        )
    validate.one_of("beta_form", beta_form, rates.BETA_FORMS)
    given = {"learning_rate": validate.non_negative("learning_rate", learning_rate)}
    for field, value in hyper.items():
        is_beta = field in ("b1", "b2")
        given[field] = (
            validate.probability(field, value)
            if is_beta
            else validate.non_negative(field, value)
        )

    def build(values: Mapping[str, Factor]) -> optax.GradientTransformation:
        peak = values["learning_rate"]
        if schedule is None:
            return make(**values)
        return make(**{**values, "learning_rate": lambda count: peak * schedule(count)})

    if multipliers is None:
        return optax.with_extra_args_support(build(given))

    after: dict[str, Factor] = {}
    arrays: dict[str, dict[str, Factor]] = {}
    groups: dict[Any, dict[str, Factor]] = {}
    key_of: dict[str, Any] = {}
    for name in sorted(multipliers):
        multiplier = _leaves.check_multiplier(name, multipliers[name])
        values = {}
        for field, value in given.items():
            factor = _leaves.checked(
                name, _FIELD[field], getattr(multiplier, _FIELD[field])
            )
            if not isinstance(factor, float):
                if field not in _PER_LAYER:
                    raise ValueError(
                        f"multipliers: {field} of leaf {name!r} must be one number for "
                        "an optimiser of optax; got one per layer: use adamw, or "
                        "unrolled layers"
                    )
                arrays.setdefault(name, {})[field] = factor
                if field == "learning_rate":
                    after[name], factor = factor, 1.0
            values[field] = _scaled(field, value, factor, beta_form, name)
        key_of[name] = tuple(_hashable(value) for value in values.values())
        groups.setdefault(key_of[name], values)

    labels = {key: f"group_{index}" for index, key in enumerate(groups)}
    if len(groups) == 1:
        inner = optax.with_extra_args_support(build(next(iter(groups.values()))))
    else:
        inner = optax.partition(
            {labels[key]: build(values) for key, values in groups.items()},
            lambda tree: map_with_name(lambda name, _: labels[key_of[name]], tree),
        )

    def check(tree: Params) -> None:
        names = _leaves.names_of(tree, "multipliers", key_of, all_of=True)
        for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
            for field, factor in arrays.get(name, {}).items():
                _leaves.check_shape(name, field, factor, leaf)

    def init(params: Params) -> optax.OptState:
        if jax.tree.leaves(params):  # `optax.tree_map_params` passes a placeholder
            check(params)
        return inner.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check(updates)
        new, state = inner.update(updates, state, params, **extra_args)

        def finish(name: str, update: Array, gradient: Array) -> Array:
            if name in after:
                update = _leaves.in_dtype(after[name], update.dtype) * update
            # An array of decays is strongly typed and has promoted small types.
            return update.astype(gradient.dtype) if name in arrays else update

        return (map_with_name(finish, new, updates) if arrays else new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(
    field: str, value: float, factor: Factor, form: BetaForm, name: str
) -> Factor:
    if field in ("b1", "b2"):
        return rates.scale_beta(
            value, float(factor), form, name=f"{field} of leaf {name!r}"
        )
    product = value * factor * (factor if field == "eps_root" else 1.0)
    if isinstance(product, float):
        return product
    return np.asarray(product, jax.dtypes.canonicalize_dtype(np.float64))


def _hashable(value: Factor) -> Any:
    if isinstance(value, float):
        return value
    return value.shape, value.tobytes()
