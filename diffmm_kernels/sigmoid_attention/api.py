"""`sigmoid_attention`: one function for every device.

References:
  Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
  arXiv 2409.04431.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from diffmm_kernels.sigmoid_attention import dispatch, partitioning, reference
from diffmm_kernels.sigmoid_attention.arguments import (
    Gradients,
    Needs,
    Operands,
    Options,
    canonical,
)
from diffmm_kernels.sigmoid_attention.batching import (
    foldable_backward,
    foldable_forward,
)
from diffmm_kernels.sigmoid_attention.config import Config, Precision
from diffmm_kernels.sigmoid_attention.dispatch import ELSEWHERE, Choice, Name
from diffmm_kernels.sigmoid_attention.varying import uniformly_varying

#: Name that `jax.checkpoint` policies know the output by.
OUTPUT_NAME = "attn_out"

#: Keeps the output of attention and nothing else. The backward pass needs q, k and v
#: alone, so that under this policy the forward kernel runs once in a training step;
#: with softmax, whose backward pass needs the row sums, it runs twice.
save_attention_output = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)


def sigmoid_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    bias: Any = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = 0,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    logit_bias: Any = None,
    precision: Precision = "default",
    out_dtype: Any = None,
    implementation: Name | None = None,
    deterministic: bool = False,
    config: Config | None = None,
    interpret: bool | None = None,
) -> Any:
    """``o_i = Σ_j σ(scale · q_i·k_j + bias + …) v_j`` over the visible keys j.

    There is no normalisation over keys; the bias ``-log n``, n the length trained at,
    keeps the sum of the weights of order one. Query head h reads key head
    ``h // (H / K)``. All restrictions of visibility are intersected; a query that sees
    nothing returns exactly 0. Letters: B batch, T queries, S keys, H query heads,
    K key heads, D and E head sizes.

    Args:
      q: ``[B, T, H, D]``; B may be left out of q, k, v and everything else.
      k: ``[B, S, K, D]``.
      v: ``[B, S, K, E]``. One dtype for the three: bfloat16, float16 or float32
        (float64 by "xla" and "reference").
      bias: offset of the sigmoid: a number, or a float array ``[]``, ``[H]`` or
        ``[B, H]``, which is differentiable. None is ``-log(S)``: give the length
        trained at wherever S is another one.
      scale: multiplies q·k only; ``D ** -0.5`` by default.
      causal: query at position i sees keys ``j <= i``.
      window: keys from ``i - left`` to ``i + right``: a pair (None = unlimited), or one
        number for both.
      q_offset: query i sits at position ``i + q_offset`` of the keys; an integer,
        ``[B]`` or ``[B, T]``. 0 aligns the first query with the first key, ``S - T``
        the last ones.
      q_segment_ids: ``[B, T]``; a query sees keys of its own id; negative ids are
        padding, which neither sees nor is seen. Ascending ids are fastest.
      kv_segment_ids: ``[B, S]``; for T = S one of the two serves both.
      q_lengths: ``[B]``; rows from there on return 0 and receive no gradient.
      kv_lengths: ``[B]``; keys from there on are invisible.
      alibi_slopes: ``[H]`` or ``[B, H]``: subtracts ``slope · |i - j|``; constants.
      mask: bool, broadcastable to ``[B, H, T, S]``, True = visible.
      logit_bias: float, broadcastable to ``[B, H, T, S]``, added to the logits.
        Its gradient takes memory quadratic in the length.
      precision: the kernels' activation: "default" is accurate to half a bfloat16
        step, "high" to float16, "fast" is FlashSigmoid's tanh form, which loses
        relative accuracy at small weights.
      out_dtype: of the output; that of q by default.
      implementation: one of `IMPLEMENTATIONS`, or None to choose by device.
      deterministic: demand gradients whose bits do not vary from run to run.
      config: tiles of the kernels, instead of those of the tables.
      interpret: run a kernel in Pallas' interpreter, for tests without accelerator.

    Returns:
      ``[B, T, H, E]``.

    Raises:
      ValueError: an argument is out of what is allowed; names it and what came.
      NotImplementedError: the named implementation cannot serve this call; says why.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = v = jnp.ones((1, 4, 2, 8))
      >>> sigmoid_attention(q, k, v, bias=-1000.0).sum().item()
      0.0
    """
    operands, options, unbatched = canonical(
        q,
        k,
        v,
        bias=bias,
        scale=scale,
        causal=causal,
        window=window,
        q_offset=q_offset,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        alibi_slopes=alibi_slopes,
        mask=mask,
        logit_bias=logit_bias,
        precision=precision,
        out_dtype=out_dtype,
        deterministic=deterministic,
        config=config,
        interpret=interpret,
    )
    o = checkpoint_name(attend(operands, options, implementation), OUTPUT_NAME)
    return o[0] if unbatched else o


def attend(operands: Operands, options: Options, name: Name | None) -> Any:
    """Chooses an implementation, reports it once, and calls it."""
    device = dispatch.current_device()
    choice = dispatch.choose(operands, options, name, device)
    q, k = operands.q, operands.k
    dispatch.report(choice, device, f"{q.dtype} q {q.shape}, k {k.shape}")

    def run(operands: Operands) -> Any:
        operands = uniformly_varying(operands)
        if choice.name == "reference":
            return reference.forward(operands, options)
        return _attend(choice._replace(reasons=()), options, operands)

    with jax.named_scope("sigmoid_attention"):
        return partitioning.on_shards(run, operands)


def _calls_back(name: Name, options: Options) -> bool:
    """The interpreter of Hopper kernels calls the host, which cannot be partitioned."""
    return name == "mosaic_gpu" and bool(options.interpret)


def _forward(choice: Choice, options: Options, operands: Operands) -> Any:
    def run(name: Name, operands: Operands) -> Any:
        module = dispatch.implementation(name)
        if _calls_back(name, options):
            return module.forward(operands, options)
        return partitioning.forward(module, operands, options)

    def anywhere(operands: Operands) -> Any:
        if choice.platform is None:
            return run(choice.name, operands)
        return jax.lax.platform_dependent(
            operands,
            default=functools.partial(run, ELSEWHERE),
            **{choice.platform: functools.partial(run, choice.name)},
        )

    return foldable_forward(anywhere)(operands)


def _backward(
    choice: Choice, options: Options, needs: Needs, operands: Operands, do: Any
) -> Gradients:
    def run(name: Name, operands: Operands, do: Any) -> Gradients:
        module = dispatch.implementation(name)
        if _calls_back(name, options):
            return module.backward(operands, options, do, needs)
        return partitioning.backward(module, operands, options, do, needs)

    def anywhere(operands: Operands, do: Any) -> Gradients:
        if choice.platform is None:
            return run(choice.name, operands, do)
        return jax.lax.platform_dependent(
            operands,
            do,
            default=functools.partial(run, ELSEWHERE),
            **{choice.platform: functools.partial(run, choice.name)},
        )

    return foldable_backward(anywhere)(operands, do)


# Compiled once per choice, options and shapes, so that calls outside jit are fast too.
@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, options: Options, operands: Operands) -> Any:
    return _forward(choice, options, operands)


def _attend_forward(choice: Choice, options: Options, operands: Any) -> Any:
    perturbed = Operands(*(x is not None and x.perturbed for x in operands))
    operands = Operands(*(None if x is None else x.value for x in operands))
    if perturbed.alibi_slopes:
        raise NotImplementedError(
            f"implementation {choice.name!r}: alibi_slopes are constants; only "
            "'reference' differentiates them"
        )
    # A flag in the structure: () is yes and None is no, neither is an array.
    needs = tuple(() if x else None for x in (perturbed.bias, perturbed.logit_bias))
    # Not the output: the backward pass needs the inputs alone.
    return _forward(choice, options, operands), (operands, needs)


def _attend_backward(choice: Choice, options: Options, saved: Any, do: Any) -> Any:
    operands, flags = saved
    needs = Needs(*(flag is not None for flag in flags))
    with jax.named_scope("sigmoid_attention_backward"):
        gradients = _backward(choice, options, needs, operands, do)
    return (Operands(**gradients._asdict()),)


_attend.__wrapped__.defvjp(  # type: ignore[attr-defined]
    _attend_forward, _attend_backward, symbolic_zeros=True
)


def explain_dispatch(
    q: Any, k: Any, v: Any, *, implementation: Name | None = None, **arguments: Any
) -> Choice:
    """What `sigmoid_attention` would run for these arguments, and why; runs nothing.

    Args:
      q: as in `sigmoid_attention`.
      k: likewise.
      v: likewise.
      implementation: likewise.
      **arguments: likewise.

    Returns:
      The choice with the reasons against what was tried before it.
    """
    choices: list[Choice] = []

    def look(q: Any, k: Any, v: Any) -> None:
        defaults: dict[str, Any] = {
            name: parameter.default for name, parameter in _parameters().items()
        }
        operands, options, _ = canonical(q, k, v, **{**defaults, **arguments})
        device = dispatch.current_device()
        choices.append(dispatch.choose(operands, options, implementation, device))

    jax.eval_shape(look, q, k, v)
    return choices[0]


@functools.cache
def _parameters() -> dict[str, Any]:
    parameters = dict(inspect.signature(sigmoid_attention).parameters)
    for name in ("q", "k", "v", "implementation"):
        del parameters[name]
    return parameters
