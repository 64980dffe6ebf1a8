"""What the sampling loop costs beside the denoiser.

    python benchmarks/samplers.py                         # 2 CPU cores, ~9 minutes
    python benchmarks/samplers.py --quick                 # seconds, checks alone

One process. Most parts use a stub that hands out prepared logits, behind a barrier that
keeps the compiler from moving work on them out of the loop; a loop that only evaluates
the stub is measured too. (a) Microseconds per forward at 1, 8 and 64 rows, 32 scored
positions and a vocabulary of 126,464. (b) The same greedy decoding in PyTorch, on the
same logits, with the same tokens as a result. (c) The share of a step that is not a
100M denoiser, from pairs of runs, where a block of 32 positions is scored and where
all are. (d) Compilations in a sweep of settings. Expected: PyTorch takes at least 5
times as long at 8 rows, the share is at most 5 % with blocks, and a sweep compiles once
for each rule.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffmm.models import Denoiser, TransformerConfig, num_parameters, predict_fn
from diffmm.samplers import (
    FixedQuota,
    Request,
    Rule,
    Settings,
    State,
    canvas_from_prompts,
    generate,
    prepare,
    sample,
)
from diffmm.samplers.adaptive import (
    KLASS,
    EntropyBounded,
    Factor,
    Frechet,
    Threshold,
)
from diffmm.samplers.dinfer import Credit, Hierarchy
from diffmm.training import option, run_from_flags, write_result

GREEDY = Settings(temperature=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    workdir: str = option("runs/samplers", "where result.json goes")
    rows: str = option("1,8,64", "B of the stub")
    vocabulary: int = option(126_464, "V of the stub")
    block: int = option(32, "scored positions")
    repeats: int = option(7, "measured runs of each side")
    torch: bool = option(True, "measure PyTorch too")
    torch_rows: int = option(8, "B of the comparison")
    width: int = option(768, "of the denoiser of (c)")
    layers: int = option(8, "of it")
    denoiser_vocabulary: int = option(32_768, "of it")
    denoiser_rows: int = option(4, "B of (c)")
    length: int = option(256, "L of (c)")
    pairs: int = option(7, "paired runs of (c)")
    settings: int = option(20, "settings of each sweep of (d)")
    threads: int = option(2, "CPU cores used; 0 = all")
    quick: bool = option(False, "tiny shapes: that all sides run and agree")

    def small(self) -> Config:
        """The same at shapes that take seconds."""
        return dataclasses.replace(
            self,
            rows="2",
            vocabulary=5_000,
            repeats=2,
            torch_rows=2,
            width=64,
            layers=1,
            denoiser_vocabulary=512,
            denoiser_rows=2,
            length=64,
            pairs=2,
        )


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def prepared_logits(rows: int, width: int, size: int) -> np.ndarray:
    """Float32 ``[B, K, V]``: noise, and one likely id per position.

    Its probability is uniform on (0.2, 1) over positions, so that some pass a threshold
    at once and others wait to be the best. The last id, the mask, is never likely.
    """
    rng = np.random.default_rng(0)
    distinct = min(rows, 8)
    noise = rng.random((distinct, width, size), np.float32)
    probability = rng.uniform(0.2, 0.999, (distinct, width))
    likely = rng.integers(0, size - 1, (distinct, width))
    rest = np.exp(noise).sum(axis=-1, dtype=np.float64)
    logit = np.log(rest * probability / (1.0 - probability)).astype(np.float32)
    np.put_along_axis(noise, likely[..., None], logit[..., None], axis=2)
    return np.concatenate([noise] * -(-rows // distinct))[:rows]


def stub(params: Any, tokens: Any, positions: Any, segment_ids: Any, scored: Any):
    """The parameters are the logits; they seem to depend on the tokens."""
    del positions, segment_ids, scored
    return jax.lax.optimization_barrier((params, tokens))[0]


@jax.jit
def stub_alone(params: Any, tokens: Any, forwards: Any) -> Any:
    """As many evaluations of the stub, of whose logits one number each is read."""

    def body(index: Any, tokens: Any) -> Any:
        logits = stub(params, tokens, None, None, None)
        read = logits[0, 0, index % logits.shape[2]] > 0
        return tokens.at[0, 0].add(read.astype(jnp.int32))

    return jax.lax.fori_loop(0, forwards, body, tokens)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - started, found


def request_of(
    predict: Any,
    params: Any,
    rule: Rule,
    rows: int,
    width: int,
    settings: Settings = GREEDY,
    *,
    prompt: int = 0,
) -> Request:
    """Rows of ``prompt`` zeros and ``width`` masks in one block; V − 1 is the mask."""
    one = jax.ShapeDtypeStruct((1, 1), np.int32)
    size = jax.eval_shape(predict, params, one, one, one, one).shape[-1]
    canvas = canvas_from_prompts([[0] * prompt] * rows, width, mask_id=size - 1)
    return prepare(
        predict,
        params,
        canvas,
        jax.random.key(0),
        rule=rule,
        settings=settings,
        mask_id=size - 1,
    )


def run_request(request: Request, params: Any) -> State:
    return generate(
        request.predict,
        params,
        jnp.array(request.tokens),
        request.problem,
        request.program,
        spec=request.spec,
    )


class Case(NamedTuple):
    """A rule, its settings, and the same for PyTorch's decoder."""

    rule: Rule
    settings: Settings
    torch: dict[str, Any] | None


def cases(width: int) -> dict[str, Case]:
    return {
        "top-1": Case(FixedQuota(num_steps=width), GREEDY, {"num_steps": width}),
        "threshold 0.9": Case(Threshold(threshold=0.9), GREEDY, {"threshold": 0.9}),
        "top-1, temperature 1": Case(FixedQuota(num_steps=width), Settings(), None),
        "four at once": Case(FixedQuota(num_steps=max(width // 4, 1)), GREEDY, None),
    }


def outside_the_model(config: Config) -> dict[str, Any]:
    """(a) Microseconds per forward with a stub that costs nothing."""
    found: dict[str, Any] = {}
    for rows in map(int, config.rows.split(",")):
        logits = prepared_logits(rows, config.block, config.vocabulary)
        params = jnp.asarray(logits)
        del logits
        for name, case in cases(config.block).items():
            request = request_of(
                stub, params, case.rule, rows, config.block, case.settings
            )
            first, state = timed(lambda r=request, p=params: run_request(r, p))
            forwards = int(state.counts.whole_calls)
            tokens = jnp.asarray(request.tokens)
            timed(lambda p=params, t=tokens, n=forwards: stub_alone(p, t, n))
            ours, alone = [], []
            for _ in range(config.repeats if rows <= 8 else min(config.repeats, 2)):
                a, _ = timed(lambda p=params, t=tokens, n=forwards: stub_alone(p, t, n))
                b, _ = timed(lambda r=request, p=params: run_request(r, p))
                alone.append(1e6 * a / forwards)
                ours.append(1e6 * b / forwards)
            figure = {
                "forwards": forwards,
                "microseconds": spread(
                    [b - a for a, b in zip(alone, ours, strict=True)]
                ),
                "stub_microseconds": spread(alone),
                "first_call_seconds": first,
            }
            found[f"{name}, B={rows}"] = figure
            print(
                f"B={rows} {name}: {figure['microseconds']['median']:,.0f} µs per "
                f"forward, {forwards} forwards, first call {first:.1f} s",
                flush=True,
            )
    return found


def beside_torch(config: Config) -> dict[str, Any]:
    """(b) Seconds of the whole decoding in both, interleaved; the tokens are equal."""
    import torch
    import torch_decoding

    rows, width = config.torch_rows, config.block
    logits = prepared_logits(rows, width, config.vocabulary)
    params, theirs = jnp.asarray(logits), torch.from_numpy(logits)
    mask_id = config.vocabulary - 1
    theirs[..., mask_id] = -torch.inf  # both forbid the mask
    params = params.at[..., mask_id].set(-jnp.inf)
    start = torch.full((rows, width), mask_id)
    found: dict[str, Any] = {"torch": torch.__version__, "rows": rows}
    for name, case in cases(width).items():
        if case.torch is None:
            continue
        request = request_of(stub, params, case.rule, rows, width, case.settings)

        def ours(request: Request = request) -> State:
            return run_request(request, params)

        def other(options: dict[str, Any] = case.torch) -> tuple[Any, int]:
            return torch_decoding.decode(lambda _: theirs, start, mask_id, **options)

        state, (tokens, calls) = jax.block_until_ready(ours()), other()
        seconds: tuple[list[float], list[float]] = [], []
        for repeat in range(min(config.repeats, 3)):
            for side in (0, 1) if repeat % 2 else (1, 0):
                seconds[side].append(timed((ours, other)[side])[0])
        found[name] = {
            "same_tokens": bool(np.array_equal(state.tokens, tokens.numpy())),
            "same_forwards": int(state.counts.whole_calls) == calls,
            "forwards": calls,
            "seconds": spread(seconds[0]),
            "torch_seconds": spread(seconds[1]),
            "torch_over_ours": spread([b / a for a, b in zip(*seconds, strict=True)]),
        }
        print(
            f"{name}, B={rows}: PyTorch takes "
            f"{found[name]['torch_over_ours']['median']:.1f} times as long "
            f"({found[name]['torch_seconds']['median'] / calls * 1e3:.0f} ms per "
            f"forward)",
            flush=True,
        )
    return found


@jax.jit(static_argnames=("predict", "scored"))
def denoiser_alone(
    predict: Any, params: Any, tokens: Any, problem: Any, forwards: Any, *, scored: int
) -> Any:
    """As many evaluations of a denoiser, unembedding of the scored positions included.

    Of the logits one number is read; the next evaluation depends on it.
    """
    at = jnp.asarray(problem.order)[:, :scored]

    def body(index: Any, tokens: Any) -> Any:
        logits = predict(params, tokens, problem.positions, problem.segment_ids, at)
        logits = jax.lax.optimization_barrier(logits)
        read = logits[0, 0, index] > 1e9
        return tokens.at[0, 0].add(read.astype(jnp.int32))

    return jax.lax.fori_loop(0, forwards, body, tokens)


def share_of_a_step(config: Config) -> dict[str, Any]:
    """(c) The share of a step that is not the denoiser, from pairs of runs."""
    shape = TransformerConfig(
        vocabulary_size=config.denoiser_vocabulary,
        width=config.width,
        num_layers=config.layers,
        head_dim=64,
    )
    graphdef, params = nnx.split(Denoiser(shape, rngs=nnx.Rngs(0)))
    predict = predict_fn(graphdef)
    rows, forwards = config.denoiser_rows, 4
    found: dict[str, Any] = {
        "parameters": num_parameters(params),
        "rows": rows,
        "length": config.length,
        "forwards": forwards,
    }
    for width in (min(config.block, config.length // 2), config.length):
        request = request_of(
            predict,
            params,
            FixedQuota(num_steps=forwards),
            rows,
            width,
            prompt=config.length - width,
        )
        tokens = jnp.asarray(request.tokens)

        def ours(request: Request = request) -> State:
            return run_request(request, params)

        def alone(request: Request = request, tokens: Any = tokens, k: int = width):
            problem = request.problem
            return denoiser_alone(predict, params, tokens, problem, forwards, scored=k)

        sides = (alone, ours)
        for side in sides:
            jax.block_until_ready(side())
        seconds: tuple[list[float], list[float]] = [], []
        for repeat in range(config.pairs):
            for side in (0, 1) if repeat % 2 else (1, 0):
                seconds[side].append(timed(sides[side])[0])
        shares = [(b - a) / b for a, b in zip(*seconds, strict=True)]
        # Of the fastest runs of both: what else runs on the machine only ever adds.
        best = 1.0 - min(seconds[0]) / min(seconds[1])
        found[f"{width} scored"] = {
            "share": spread(shares),
            "share_of_fastest": best,
            "seconds_per_forward": spread([b / forwards for b in seconds[1]]),
            "denoiser_seconds_per_forward": spread([a / forwards for a in seconds[0]]),
        }
        print(
            f"{width} of {config.length} positions scored: "
            f"{100 * statistics.median(shares):.1f} % of a step is not the denoiser "
            f"({100 * min(shares):.1f} to {100 * max(shares):.1f})",
            flush=True,
        )
    return found


def compilations(config: Config) -> dict[str, int]:
    """(d) How often the denoiser is traced while settings of one rule change."""
    traces = [0]

    def counted(
        params: Any, tokens: Any, positions: Any, segment_ids: Any, scored: Any
    ):
        traces[0] += 1
        return stub(params, tokens, positions, segment_ids, scored)

    size, width, rows = 64, 8, 2
    params = jnp.asarray(prepared_logits(rows, width, size))
    canvas = canvas_from_prompts([[]] * rows, width, mask_id=size - 1)
    rules: dict[str, Callable[[float], Rule]] = {
        "fixed quota": lambda x: FixedQuota(
            num_steps=1 + int(7 * x), choice_temperature=x
        ),
        "threshold": lambda x: Threshold(threshold=x),
        "factor": lambda x: Factor(factor=2 * x),
        "frechet": lambda x: Frechet(factor=2 * x),
        "entropy bounded": lambda x: EntropyBounded(gamma=x),
        "klass": lambda x: KLASS(confidence=x, kl=0.1 * x),
        "hierarchy": lambda x: Hierarchy(high=x, low=0.5 * x),
        "credit": lambda x: Credit(boost=x, decay=x, threshold=x),
    }
    found = {}
    for name, make in list(rules.items())[: 2 if config.quick else None]:
        before = traces[0]
        for x in np.linspace(0.05, 1.0, config.settings):
            sample(
                counted,
                params,
                canvas,
                jax.random.key(int(100 * x)),
                rule=make(float(x)),
                mask_id=size - 1,
                allowed=np.ones((4, size), bool),
                settings=Settings(
                    temperature=float(x), top_k=1 + int(9 * x), top_p=float(x)
                ),
            )
        found[name] = traces[0] - before
    return found


def run(config: Config) -> dict[str, Any]:
    threads = config.threads or os.cpu_count() or 1
    if hasattr(os, "sched_setaffinity"):
        # Before JAX counts cores; PyTorch is told.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    if config.torch:
        import torch

        torch.set_num_threads(threads)
    if config.quick:
        config = config.small()
    figures: dict[str, Any] = {"threads": threads}
    figures["compilations"] = compilations(config)
    print(f"compilations per rule: {figures['compilations']}", flush=True)
    figures["outside_the_model"] = outside_the_model(config)
    expected: dict[str, Any] = {"compilations": "1 per rule"}
    ok = set(figures["compilations"].values()) == {1}
    if config.torch:
        figures["beside_torch"] = beside_torch(config)
        pairs = [x for x in figures["beside_torch"].values() if isinstance(x, dict)]
        ok &= all(pair["same_tokens"] and pair["same_forwards"] for pair in pairs)
        expected["beside_torch"] = "the same tokens"
        if not config.quick:
            expected["beside_torch"] += ", median torch_over_ours >= 5"
            ok &= all(pair["torch_over_ours"]["median"] >= 5 for pair in pairs)
    figures["share_of_a_step"] = share_of_a_step(config)
    if not config.quick:
        block = f"{config.block} scored"
        expected["share_of_a_step"] = f"{block}: median share <= 0.05"
        ok &= figures["share_of_a_step"][block]["share"]["median"] <= 0.05
    return write_result(config.workdir, "samplers", figures, expected, bool(ok))


if __name__ == "__main__":
    run_from_flags(Config, run)
