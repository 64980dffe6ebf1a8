"""Leaves of a model from the shapes of two of its sizes; no array is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffmm._tree import path_name
from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.parameterisation.patterns import (
    DENOISER,
    DENOISER_BLOCKS,
    Blocks,
    Pattern,
)


class _Place(NamedTuple):
    """Where a leaf sits: its stream of blocks, and its index or stacked axis there."""

    generic: str  # the path with the layer index replaced by *
    stream: str | None = None
    layer: int | None = None
    stack_axis: int | None = None


def infer(
    make: Callable[[Any], Any],
    base: Any,
    target: Any,
    *,
    patterns: Sequence[Pattern] = DENOISER,
    blocks: Sequence[Blocks] = DENOISER_BLOCKS,
    overrides: Sequence[Pattern] = (),
    family: tuple[Any, Any] | None = None,
) -> dict[str, Leaf]:
    """Finds role and ratios of every parameter from the model's own constructor.

    ``make`` runs under `jax.eval_shape`, once per size: nothing is drawn, compiled or
    allocated. An axis that differs between the two sizes of ``family`` is infinite; its
    ratio is that between ``base`` and ``target``. The number of blocks gives m_depth.

    Args:
      make: ``make(size)`` returns the parameters as any pytree: a Flax NNX state, Linen
        parameters (boxed or not), an Equinox module filtered to its arrays, a dict.
        Leaves that are not floating-point are ignored.
      base: size at which hyper-parameters were tuned, whatever ``make`` takes.
      target: size to be trained.
      patterns: what names say; two that match one leaf make it ambiguous.
      blocks: where the residual blocks are; empty for models without.
      overrides: patterns that win over ``patterns``.
      family: two sizes that differ in every dimension that the family scales. By
        default ``(base, target)``; needed if these agree in some of them and the same
        leaf is to be classified alike for other pairs.

    Returns:
      ``{name: Leaf}`` of the target, in the tree's order.

    Raises:
      ValueError: leaves without a pattern, or with several, or whose input and output
        axes cannot be told apart (lists all of them); base and target that differ in
        more than sizes and number of blocks (names the first path); a pattern of
        ``overrides`` or ``blocks`` that matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> def make(width):
      ...     return {"embedding": jnp.zeros((64, width)),
      ...             "unembedding": jnp.zeros((width, 64))}
      >>> leaves = infer(make, 32, 128, blocks=())
      >>> leaves["unembedding"].m_in, leaves["unembedding"].infinite_out
      (4.0, False)
    """
    sizes = _Sizes.of(make, base, target, family or (base, target), blocks)
    _all_used(sizes.target, overrides, blocks)
    problems: list[str] = []
    leaves = {}
    chosen = {}
    for name, shape in sizes.target.items():
        found = [p for p in overrides if p.matches(name)] or [
            p for p in patterns if p.matches(name)
        ]
        try:
            if len(found) != 1:
                paths = [p.path for p in found]
                raise ValueError(f"matches {paths}" if found else "no pattern matches")
            leaves[name] = _leaf(name, found[0], sizes)
            chosen[name] = found[0]
        except ValueError as error:
            problems.append(f"{name} {shape}: {error}")
    if problems:
        raise ValueError(
            "patterns: every leaf needs exactly one that fits:\n  "
            + "\n  ".join(problems)
        )
    return _one_end_per_branch(leaves, chosen, sizes)


def _one_end_per_branch(
    leaves: dict[str, Leaf], patterns: dict[str, Pattern], sizes: _Sizes
) -> dict[str, Leaf]:
    """Leaves before the one that ends their branch lose the mark of its end."""

    def branch(leaf: Leaf) -> tuple[str | None, str]:
        return sizes.places[leaf.name].stream, leaf.residual

    last: dict[tuple[str | None, str], int] = {}
    for name, leaf in leaves.items():
        order = patterns[name].residual_order
        last[branch(leaf)] = max(order, last.get(branch(leaf), 0))
    return {
        name: leaf
        if patterns[name].residual_order == last[branch(leaf)] or not leaf.residual
        else dataclasses.replace(leaf, residual="")
        for name, leaf in leaves.items()
    }


_Shapes = dict[str, tuple[int, ...]]


class _Sizes(NamedTuple):
    """Shapes of one model at several sizes.

    The fields of the family are by generic name: the path with * for the layer.
    """

    base: _Shapes
    target: _Shapes
    generic_base: _Shapes
    generic_small: _Shapes
    generic_large: _Shapes
    places: dict[str, _Place]
    base_layers: dict[str, int]
    target_layers: dict[str, int]

    @classmethod
    def of(
        cls,
        make: Callable[[Any], Any],
        base: Any,
        target: Any,
        family: tuple[Any, Any],
        blocks: Sequence[Blocks],
    ) -> _Sizes:
        """Runs the constructor on shapes, and compares what came."""
        own, theirs = _shapes(make, base), _shapes(make, target)
        small, large = (
            own if size is base else theirs if size is target else _shapes(make, size)
            for size in family
        )
        every = (own, theirs, small, large)
        places = {name: _place(name, blocks) for tree in every for name in tree}
        for first, second, argument in (
            (own, theirs, "target"),
            (small, large, "family"),
            (own, small, "family"),
        ):
            _same_structure(first, second, places, argument)
        return cls(
            base=own,
            target=theirs,
            generic_base=_by_generic_name(own, places, "base"),
            generic_small=_by_generic_name(small, places, "family"),
            generic_large=_by_generic_name(large, places, "family"),
            places=places,
            base_layers=_num_layers(own, places),
            target_layers=_num_layers(theirs, places),
        )


def _leaf(name: str, pattern: Pattern, sizes: _Sizes) -> Leaf:
    """Everything that is known of one leaf of the target."""
    place, shape = sizes.places[name], sizes.target[name]
    base_shape = sizes.generic_base[place.generic]
    scaled = _scaled_axes(
        sizes.generic_small[place.generic],
        sizes.generic_large[place.generic],
        place.stack_axis,
    )
    inputs, outputs = _sides(pattern, len(shape), scaled, place.stack_axis)
    outside = [
        axis
        for axis, (before, after) in enumerate(zip(base_shape, shape, strict=True))
        if axis not in (*inputs, *outputs, place.stack_axis) and before != after
    ]
    if outside:
        raise ValueError(
            f"axes {outside} differ from the base's {base_shape}, but family does not "
            "scale them, or they are no declared side"
        )
    in_block = place.stream is not None
    stream = place.stream or ""
    num_layers = sizes.target_layers.get(stream, 0)
    return Leaf(
        name=name,
        role=pattern.role or _role(pattern, in_block, bool(inputs), bool(outputs)),
        module=pattern.module,
        shape=shape,
        m_in=_ratio(shape, base_shape, inputs),
        m_out=_ratio(shape, base_shape, outputs),
        infinite_in=bool(inputs),
        infinite_out=bool(outputs),
        m_depth=num_layers / sizes.base_layers[stream] if in_block else 1.0,
        in_block=in_block,
        residual=pattern.residual if in_block else "",
        stack_axis=place.stack_axis,
        layer=place.layer,
        num_layers=num_layers,
        matrix=pattern.kind in ("matrix", "embedding"),
        base_names=tuple(
            other
            for other in sizes.base
            if sizes.places[other].generic == place.generic
        ),
    )


def _shapes(make: Callable[[Any], Any], size: Any) -> _Shapes:
    """Shapes of the floating-point leaves, by name."""
    tree = jax.eval_shape(lambda: make(size))
    shapes: _Shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in shapes:
            raise ValueError(f"make: two leaves are both named {name!r}")
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            shapes[name] = leaf.shape
    if not shapes:
        raise ValueError(f"make: no floating-point leaf at size {size!r}")
    return shapes


def _place(name: str, blocks: Sequence[Blocks]) -> _Place:
    for block in blocks:
        match = block.find(name)
        if match is None:
            continue
        prefix = name[: match.start()]
        if block.stack_axis is not None:
            return _Place(name, prefix + match.group(0), None, block.stack_axis)
        start, end = match.span("layer")
        stream = name[:start] + "*" + name[end : match.end()]
        generic = name[:start] + "*" + name[end:]
        return _Place(generic, stream, int(match.group("layer")), None)
    return _Place(name)


def _by_generic_name(
    shapes: _Shapes, places: dict[str, _Place], argument: str
) -> _Shapes:
    """One shape per generic name; layers of one stream must agree."""
    generic: _Shapes = {}
    for name, shape in shapes.items():
        known = generic.setdefault(places[name].generic, shape)
        if known != shape:
            raise ValueError(
                f"{argument}: {name} has shape {shape}, another layer's has {known}; "
                "layers of one stream must have equal shapes"
            )
    return generic


def _same_structure(
    first: _Shapes,
    second: _Shapes,
    places: dict[str, _Place],
    argument: str,
) -> None:
    first_ranks = {places[name].generic: len(shape) for name, shape in first.items()}
    second_ranks = {places[name].generic: len(shape) for name, shape in second.items()}
    for generic in (*first_ranks, *second_ranks):
        if first_ranks.get(generic) != second_ranks.get(generic):
            raise ValueError(
                f"{argument}: trees may differ in sizes and number of blocks alone, "
                f"but {generic!r} has {first_ranks.get(generic, 'no')} axes in one "
                f"and {second_ranks.get(generic, 'no')} in the other"
            )


def _all_used(
    shapes: _Shapes,
    overrides: Sequence[Pattern],
    blocks: Sequence[Blocks],
) -> None:
    for pattern in overrides:
        if not any(pattern.matches(name) for name in shapes):
            raise ValueError(f"overrides: {pattern.path!r} matches no leaf")
    for block in blocks:
        if not any(block.find(name) for name in shapes):
            raise ValueError(f"blocks: {block.path!r} matches no leaf")


def _num_layers(shapes: _Shapes, places: dict[str, _Place]) -> dict[str, int]:
    """Blocks in each stream."""
    indices: dict[str, set[int]] = {}
    stacked: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        place = places[name]
        if place.stream is None:
            continue
        if place.stack_axis is None:
            indices.setdefault(place.stream, set()).add(place.layer or 0)
        elif place.stack_axis >= len(shape):
            raise ValueError(
                f"blocks: {name} of shape {shape} has no axis {place.stack_axis}"
            )
        else:
            stacked.setdefault(place.stream, {})[name] = shape[place.stack_axis]
    layers = {stream: len(found) for stream, found in indices.items()}
    for stream, lengths in stacked.items():
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"blocks: leaves under {stream!r} stack different numbers of layers: "
                f"{lengths}"
            )
        layers[stream] = next(iter(lengths.values()))
    return layers


def _scaled_axes(
    small: tuple[int, ...], large: tuple[int, ...], stack_axis: int | None
) -> tuple[int, ...]:
    return tuple(
        axis
        for axis in range(len(small))
        if small[axis] != large[axis] and axis != stack_axis
    )


def _sides(
    pattern: Pattern, rank: int, scaled: tuple[int, ...], stack_axis: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Infinite input axes and infinite output axes."""
    if pattern.kind in ("bias", "gain"):
        return (), scaled
    axes = [axis for axis in range(rank) if axis != stack_axis]
    if pattern.in_axes is not None or pattern.out_axes is not None:
        declared_in = _declared(pattern.in_axes, axes, "in_axes")
        declared_out = _declared(pattern.out_axes, axes, "out_axes")
        rest = [a for a in scaled if a not in declared_in + declared_out]
        if rest and pattern.in_axes is not None and pattern.out_axes is not None:
            raise ValueError(f"axes {rest} scale but are neither input nor output")
        if pattern.in_axes is None:
            declared_in += tuple(rest)
        elif pattern.out_axes is None:
            declared_out += tuple(rest)
        return (
            tuple(a for a in scaled if a in declared_in),
            tuple(a for a in scaled if a in declared_out),
        )
    if pattern.kind == "embedding":
        if any(axis != axes[-1] for axis in scaled):
            raise ValueError("an embedding scales in more than its last axis")
        return (), scaled
    if len(scaled) == 2:
        return scaled[:1], scaled[1:]
    if not scaled:
        return (), ()
    if len(scaled) == 1 and scaled[0] == axes[-1] and len(axes) > 1:
        return (), scaled
    if len(scaled) == 1 and scaled[0] == axes[0] and len(axes) > 1:
        return scaled, ()
    raise ValueError(
        f"axes {list(scaled)} scale: declare in_axes and out_axes to say which are "
        "inputs"
    )


def _declared(
    declared: tuple[int, ...] | None, axes: list[int], argument: str
) -> tuple[int, ...]:
    try:
        return tuple(axes[axis] for axis in declared or ())
    except IndexError:
        raise ValueError(
            f"{argument}={declared} of a leaf with {len(axes)} axes"
        ) from None


def _role(
    pattern: Pattern, in_block: bool, infinite_in: bool, infinite_out: bool
) -> Role:
    """The row of the role table that kind and place imply."""
    if pattern.kind == "embedding":
        return Role.EMBEDDING
    if pattern.kind == "gain":
        qk = pattern.module in ("attn.q_norm", "attn.k_norm")
        return Role.QK_GAIN if qk else Role.GAIN
    if pattern.kind == "bias":
        if in_block or infinite_out:
            return Role.HIDDEN_BIAS
        return Role.UNEMBEDDING_BIAS
    if in_block or (infinite_in and infinite_out):
        return Role.HIDDEN
    if infinite_in:
        return Role.UNEMBEDDING
    return Role.EMBEDDING if infinite_out else Role.SCALAR


def _ratio(
    target: tuple[int, ...], base: tuple[int, ...], axes: tuple[int, ...]
) -> float:
    return math.prod(target[axis] / base[axis] for axis in axes)
