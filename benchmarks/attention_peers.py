"""The PyTorch side of `sigmoid_attention.py`.

`scaled_dot_product_attention` through FlashAttention-2 and cuDNN, and FlexAttention as
softmax and as sigmoid: with the score log σ(z), softmax times the row sum exp(lse) is
sigmoid attention. Calls are captured in a CUDA graph, so that starting them costs
nothing that is measured, and timed with events over its replays.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from attention_worker import serve, spec_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    AuxRequest,
    create_block_mask,
    flex_attention,
)

from diffmm_kernels.sigmoid_attention.specs import Spec, alibi_slopes

ROTATED_SETS = 3
SAMPLE_SECONDS = 0.02
_MOST_SECONDS = 3.0
_LIMIT_BYTES = 8e9

_BACKENDS = {
    "torch flash softmax": SDPBackend.FLASH_ATTENTION,
    "torch cudnn softmax": SDPBackend.CUDNN_ATTENTION,
}

# [B, H, T, D], [B, K, S, D], [B, K, S, E] to [B, H, T, E].
Attention = Callable[[Any, Any, Any], Any]


def sdpa(spec: Spec, backend: SDPBackend) -> Attention:
    if spec.window is not None or spec.segments is not None:
        raise NotImplementedError(
            "scaled_dot_product_attention has neither windows nor segments"
        )

    def call(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=spec.causal and spec.q_length > 1,
                enable_gqa=spec.group_size > 1,
            )

    return call


def _visibility(spec: Spec, device: str) -> Any:
    """A block mask, or None where everything is visible."""
    start, end = spec.intervals()
    if (start == 0).all() and (end == spec.kv_length).all():
        return None
    first, last = (
        torch.tensor(x, device=device, dtype=torch.int32) for x in (start, end)
    )

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (first[i] <= j) & (j < last[i])

    if spec.causal and spec.window is None and spec.segments is None:
        offset = spec.q_offset

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            return j <= i + offset

    return create_block_mask(
        visible, None, None, spec.q_length, spec.kv_length, device=device
    )


def flex(spec: Spec, sigmoid: bool, device: str) -> Attention:
    """Compiled on a GPU; elsewhere as PyTorch runs it without compiling."""
    mask = _visibility(spec, device)
    slopes = torch.tensor(alibi_slopes(spec.heads), device=device)
    bias, offset = spec.bias, spec.q_offset

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        z = s + bias if sigmoid else s
        if spec.alibi:
            z = z - slopes[h] * (i + offset - j).abs()
        return F.logsigmoid(z) if sigmoid else z

    def call(q: Any, k: Any, v: Any) -> Any:
        keywords = {
            "score_mod": score if sigmoid or spec.alibi else None,
            "block_mask": mask,
            "enable_gqa": spec.group_size > 1,
        }
        if not sigmoid:
            return flex_attention(q, k, v, **keywords)
        o, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **keywords)
        return (o * aux.lse.exp()[..., None]).to(o.dtype)

    if device != "cuda":
        return call
    torch._dynamo.reset()  # else the ninth case would not be compiled any more
    # The backward pass is timed again and again over one forward pass.
    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)


def attention(side: str, spec: Spec, device: str) -> Attention:
    """One side of the comparison."""
    if side in _BACKENDS:
        return sdpa(spec, _BACKENDS[side])
    sigmoid = {"flex softmax": False, "flex sigmoid": True}[side]
    return flex(spec, sigmoid, device)


def _random(spec: Spec, device: str, gradients: bool) -> list[Any]:
    """q, k, v and do as ``[B, H, T, D]`` views of ``[B, T, H, D]``."""
    dtype = getattr(torch, spec.dtype)
    tensors = [
        torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)
        for shape in spec.shapes().values()
    ]
    for tensor in tensors[:3]:
        tensor.requires_grad_(gradients)
    return tensors


def row_error(
    spec: Spec, inputs: list[Any], o: Any, *, sigmoid: bool, alibi: bool
) -> float:
    """Error of the last rows of the first batch row, at the size that is timed."""
    q, k, v = (x[0].detach().double() for x in inputs[:3])
    rows = min(4, spec.q_length)
    k, v = (x.repeat_interleave(spec.group_size, dim=0) for x in (k, v))
    s = q[:, -rows:] @ k.mT * spec.head_dim**-0.5
    start, end = (torch.tensor(x[-rows:], device=s.device) for x in spec.intervals())
    key = torch.arange(spec.kv_length, device=s.device)
    seen = (start[:, None] <= key) & (key < end[:, None])
    position = torch.arange(spec.q_length, device=s.device)[-rows:] + spec.q_offset
    if alibi:
        distance = (position[:, None] - key).abs()
        slopes = torch.tensor(alibi_slopes(spec.heads), device=s.device).double()
        s = s - slopes[:, None, None] * distance
    if sigmoid:
        p = torch.where(seen, (s + spec.bias).sigmoid(), 0.0)
    else:
        p = torch.where(seen, s, -torch.inf).softmax(-1)
    wanted = p @ v
    found = o[0, :, -rows:].detach().double()
    return float((found - wanted).norm() / wanted.norm())


@contextlib.contextmanager
def _released() -> Iterator[None]:
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _replay(
    calls: list[Callable[[], Any]], stream: Any
) -> tuple[Callable[[], None], str]:
    """One function that runs all calls: a captured graph, or the calls themselves."""
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept.extend(call() for call in calls)
        return graph.replay, "graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"no graph: {error}", flush=True)

    def eager() -> None:
        for call in calls:
            call()

    return eager, "eager"


def timed(
    calls: list[Callable[[], Any]], samples: int, stream: Any = None
) -> dict[str, Any]:
    """Seconds of one call, the calls taking turns."""
    stream = stream or torch.cuda.Stream()
    run, method = _replay(calls, stream)
    with torch.cuda.stream(stream):

        def seconds(repeats: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / (repeats * len(calls))

        for _ in range(2):
            estimate = seconds(2)
        repeats = max(1, math.ceil(SAMPLE_SECONDS / (estimate * len(calls))))
        affordable = int(_MOST_SECONDS / (estimate * len(calls) * repeats))
        samples = min(samples, max(3, affordable))
        found = [seconds(repeats) for _ in range(samples)]
    return {"seconds": spread(found), "method": method}


def measure(
    spec: dict[str, Any],
    side: str,
    direction: str,
    samples: int = 20,
    verify: bool = True,
) -> dict[str, Any]:
    """Times one side on one case, and checks the last rows of its output."""
    case = spec_of(spec)
    f = attention(side, case, "cuda")
    gradients = direction != "forward"
    one = case.q_length * case.heads * case.head_dim * 2 * case.batch
    size = (5 if gradients else 2) * one + 2 * case.cache_bytes()
    sets = ROTATED_SETS if ROTATED_SETS * size < _LIMIT_BYTES else 1
    stream = torch.cuda.Stream()

    def forward(x: list[Any]) -> Any:
        return f(*x[:3])

    def both(x: list[Any]) -> Any:
        return torch.autograd.grad(f(*x[:3]), x[:3], x[3])

    with _released():
        inputs = [_random(case, "cuda", gradients) for _ in range(sets)]
        torch.cuda.synchronize()
        figures: dict[str, Any] = {"sets": sets}
        if verify:
            figures["error"] = row_error(
                case,
                inputs[0],
                forward(inputs[0]),
                sigmoid=side == "flex sigmoid",
                alibi=case.alibi and "flex" in side,
            )
        if direction == "backward":
            # The backward pass runs on the stream of its forward pass.
            with torch.cuda.stream(stream):
                outputs = [forward(x) for x in inputs]
            stream.synchronize()
            calls = [
                functools.partial(
                    torch.autograd.grad, o, x[:3], x[3], retain_graph=True
                )
                for o, x in zip(outputs, inputs, strict=True)
            ]
        else:
            step = both if direction == "both" else forward
            calls = [functools.partial(step, x) for x in inputs]
        with torch.set_grad_enabled(gradients):
            return {**figures, **timed(calls, samples, stream)}


def ceilings(size: int = 8192, copied: int = 2**31) -> dict[str, Any]:
    """FLOP/s of a square bfloat16 product and bytes/s of a copy, read and written."""
    with _released(), torch.no_grad():
        matrices = [
            torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
            for _ in range(ROTATED_SETS)
        ]
        products = [
            functools.partial(torch.matmul, matrices[i], matrices[i - 1])
            for i in range(ROTATED_SETS)
        ]
        matmul = timed(products, samples=20)["seconds"]["median"]
        source = torch.randint(
            0, 2**31, (copied // 4,), device="cuda", dtype=torch.int32
        )
        target = torch.empty_like(source)
        copy = timed([functools.partial(target.copy_, source)], samples=20)
        return {
            "matmul_flops_per_second": 2 * size**3 / matmul,
            "copy_bytes_per_second": 2 * copied / copy["seconds"]["median"],
        }


def environment() -> dict[str, Any]:
    """Versions of this process."""
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_cudnn": torch.backends.cudnn.version(),
    }


if __name__ == "__main__":
    serve({"environment": environment, "ceilings": ceilings, "measure": measure})
