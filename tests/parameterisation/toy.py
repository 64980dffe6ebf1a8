"""A toy decoder in pure JAX, small enough to train at every width and depth.

Pre-norm blocks with QK norm, layers stacked and scanned, so that compile time does not
grow with depth. Shapes: B rows, T row length, V vocabulary, N width, H heads, K head
size, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffmm.optim.adamw import adamw
from diffmm.optim.hyperparameters import AdamW
from diffmm.parameterisation.coordinates import activation_changes, gradient_rms
from diffmm.parameterisation.leaf import Leaf, Role
from diffmm.parameterisation.rules import evaluate

VOCABULARY = 64
HEAD = 16
ROWS, LENGTH = 16, 32
STEPS = 10
# Nothing hides behind such an ε.
HYPER = AdamW(learning_rate=2e-2, b1=0.9, b2=0.95, eps=1e-30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    width: int
    depth: int


WIDTH_BASE = Size(width=2 * HEAD, depth=2)
DEPTH_BASE = Size(width=4 * HEAD, depth=2)

# name: role, shape in units of (input, output) width, fan-in side first
_BLOCK = {
    "attention_norm": (Role.GAIN, (1,)),
    "q": (Role.HIDDEN, (1, 1)),
    "k": (Role.HIDDEN, (1, 1)),
    "v": (Role.HIDDEN, (1, 1)),
    "q_norm": (Role.QK_GAIN, ()),
    "k_norm": (Role.QK_GAIN, ()),
    "o": (Role.HIDDEN, (1, 1)),
    "mlp_norm": (Role.GAIN, (1,)),
    "up": (Role.HIDDEN, (1, 4)),
    "up_bias": (Role.HIDDEN_BIAS, (4,)),
    "down": (Role.HIDDEN, (4, 1)),
    "down_bias": (Role.HIDDEN_BIAS, (1,)),
}
_RESIDUAL = {"o": "attn.res", "down": "mlp.res", "down_bias": "mlp.res"}
_OUTSIDE = {
    "embedding": (Role.EMBEDDING, "embed"),
    "final_norm": (Role.FINAL_GAIN, "final_norm"),
    "unembedding": (Role.UNEMBEDDING, "unembed"),
    "unembedding_bias": (Role.UNEMBEDDING_BIAS, "unembed"),
}


def leaves(size, base):
    """Every leaf, declared by hand."""
    m_width, m_depth = size.width / base.width, size.depth / base.depth
    n, finite = size.width, VOCABULARY
    out = {}
    for name, (role, units) in _BLOCK.items():
        path = f"blocks/{name}"
        shape = tuple(unit * n for unit in units) or (HEAD,)
        out[path] = Leaf(
            name=path,
            role=role,
            module=name,
            shape=(size.depth, *shape),
            m_in=m_width if len(units) == 2 else 1.0,
            m_out=m_width if units else 1.0,
            infinite_in=len(units) == 2,
            infinite_out=bool(units),
            m_depth=m_depth,
            in_block=True,
            residual=_RESIDUAL.get(name, ""),
            stack_axis=0,
            num_layers=size.depth,
            matrix=len(units) == 2,
        )
    shapes = {
        "embedding": (finite, n),
        "final_norm": (n,),
        "unembedding": (n, finite),
        "unembedding_bias": (finite,),
    }
    for name, (role, module) in _OUTSIDE.items():
        infinite_in = name == "unembedding"
        infinite_out = name in ("embedding", "final_norm")
        out[name] = Leaf(
            name=name,
            role=role,
            module=module,
            shape=shapes[name],
            m_in=m_width if infinite_in else 1.0,
            m_out=m_width if infinite_out else 1.0,
            infinite_in=infinite_in,
            infinite_out=infinite_out,
            matrix=len(shapes[name]) == 2,
        )
    return out


def multipliers(rule, size, base):
    return evaluate(rule, leaves(size, base))


def initialise(seed, size, base, factors):
    """Base variances (1 / fan-in, unit embedding, 1/32 unembedding) times factors."""
    rng = np.random.default_rng(seed)
    declared = leaves(size, base)

    def draw(name):
        leaf = declared[name]
        if name.endswith("norm"):
            return np.ones(leaf.shape, np.float32)
        if name.endswith("bias"):
            return np.zeros(leaf.shape, np.float32)
        variance = factors[name].init_variance
        if leaf.role is Role.HIDDEN:
            variance /= leaf.shape[-2] / leaf.m_in
        elif leaf.role is Role.UNEMBEDDING:
            variance /= WIDTH_BASE.width
        values = rng.standard_normal(leaf.shape, np.float32)
        return values * np.float32(variance**0.5)

    blocks = {name: draw(f"blocks/{name}") for name in _BLOCK}
    params = {"blocks": blocks, **{name: draw(name) for name in _OUTSIDE}}
    return jax.device_put(params)


def _norm(x, gain):
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * gain.reshape((1,) * (x.ndim - 1) + gain.shape)


def forward(params, tokens, scales):
    """Logits ``[B, T, V]`` and the activations that the coordinate check follows."""

    def block(carry, w):
        x, _ = carry  # carrying the branches keeps the last block's, without a stack

        def heads(y, weight):
            return (y @ weight).reshape(*y.shape[:2], -1, HEAD)

        y = _norm(x, w["attention_norm"])
        query_BTHK = _norm(heads(y, w["q"]), w["q_norm"])
        key_BTHK = _norm(heads(y, w["k"]), w["k_norm"])
        scores_BHQT = jnp.einsum("bqhk,bthk->bhqt", query_BTHK, key_BTHK) * HEAD**-0.5
        causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores_BHQT, -1e30))
        mixed = jnp.einsum("bhqt,bthk->bqhk", weights, heads(y, w["v"]))
        attention = mixed.reshape(x.shape) @ w["o"]
        x = x + scales["attention"] * attention
        y = _norm(x, w["mlp_norm"])
        hidden = jax.nn.gelu(y @ w["up"] + w["up_bias"][None, None])
        mlp = hidden @ w["down"] + w["down_bias"][None, None]
        x = x + scales["mlp"] * mlp
        return (x, (attention, hidden, mlp)), None

    embedded = params["embedding"][tokens]
    zeros = jnp.zeros_like(embedded)
    empty = zeros, jnp.repeat(zeros, 4, axis=-1), zeros
    (x, branches), _ = jax.lax.scan(block, (embedded, empty), params["blocks"])
    logits = _norm(x, params["final_norm"]) @ params["unembedding"]
    logits = scales["logits"] * (logits + params["unembedding_bias"][None, None])
    attention, hidden, mlp = branches
    return logits, {
        "embedding": embedded,
        "attention out": attention,
        "MLP hidden": hidden,
        "MLP out": mlp,
        "residual stream": x,
        "logits": logits,
    }


def loss_fn(params, tokens, scales):
    """Mean negative log-likelihood of the next token in nats, and activations."""
    logits, activations = forward(params, tokens[:, :-1], scales)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
    return jnp.mean(nll), activations


@functools.cache
def batches(seed, count):
    """Rows of a Markov chain whose transitions are Dirichlet(0.05): ``[n, B, T+1]``."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(VOCABULARY, 0.05), size=VOCABULARY)
    cumulative = np.cumsum(rows, axis=1)
    tokens = np.empty((count, ROWS, LENGTH + 1), np.int32)
    tokens[..., 0] = rng.integers(VOCABULARY, size=tokens.shape[:2])
    uniform = rng.random(tokens.shape)
    for t in range(1, LENGTH + 1):
        below = cumulative[tokens[..., t - 1]] < uniform[..., t, None]
        tokens[..., t] = np.minimum(below.sum(axis=-1), VOCABULARY - 1)
    return tokens


# One program serves training, activations and gradients: compilation is dear.
value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
rms_of_gradient = jax.jit(gradient_rms)


@functools.cache
def train(rule, size, base, seed):
    """What ten steps change: activations, gradients by leaf name, loss.

    Args:
      rule: a parameterisation.
      size: of the model trained.
      base: of the model whose hyper-parameters it takes.
      seed: of weights and data.

    Returns:
      ``"changes"`` and ``"gradients"``, both on the first batch, and ``"loss"`` of the
      last batch trained on, before its step.
    """
    factors = multipliers(rule, size, base)
    scales = {
        "attention": factors["blocks/o"].forward,
        "mlp": factors["blocks/down"].forward,
        "logits": factors["unembedding"].forward,
    }
    params = initialise(seed, size, base, factors)
    tx = adamw(HYPER, factors)

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = jax.jit(tx.init)(params)
    data = batches(seed, STEPS)
    first = None
    for tokens in data:
        (loss, activations), grads = value_and_grad(params, tokens, scales)
        first = activations if first is None else first
        params, state = update(params, state, grads)
    (_, last), grads = value_and_grad(params, data[0], scales)
    return jax.device_get(
        {
            # Both forward passes are at hand: what is applied is the identity.
            "changes": activation_changes(lambda h: h, first, last),
            "gradients": rms_of_gradient(grads),
            "loss": loss,
        }
    )
