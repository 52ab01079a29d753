"""A GRPO step of a Llama written out by hand, twice: the program one writes first, and one tuned to what a CPU is slow at.

Both are plain JAX on the parameters of `rl.models.transformer` and nothing else of this project; `grpo_step` times ours against
them. Every prompt has P tokens and every completion L, which they, unlike ours, are written for; T = P + L. One update is
made per batch, so the ratio of the policy to the one the step started from is 1 in value, but not in its gradient.

The tuned one differs in what turned out to matter on a CPU: gradients from micro-batches of few sequences,
whose activations stay in cache; attention in blocks of rows, which do not meet the keys after them; the head at completion
tokens only; one prefill for all samples of a prompt; a cache with features before positions, read only as far as it is
filled, with the sums over a head's few features unrolled; one uniform number per token rather than one per logit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rl.models.transformer import TransformerConfig

CLIP, KL, STEP = 0.2, 0.04, 1e-4


class Batch(NamedTuple):
    """What an update learns from: ids i32 [N, T]; advantage f32 [N]; reference f32 [N, L], log-probabilities."""

    ids: Array
    advantage: Array
    reference: Array


def group_advantage(reward: Array, samples: int) -> Array:
    """(R - mean) / (std + 1e-6) over each prompt's samples, [N] -> [N]."""
    groups = reward.reshape(-1, samples)
    spread = groups.std(axis=1, keepdims=True, ddof=1)
    return ((groups - groups.mean(axis=1, keepdims=True)) / (spread + 1e-6)).reshape(-1)


def grpo(logp: Array, batch: Batch) -> Array:
    """Sum over sequences of the mean over tokens of -(min(r A, clip(r) A) - KL k3), r = exp(logp - sg(logp))."""
    advantage = batch.advantage[:, None]
    ratio = jnp.exp(logp - lax.stop_gradient(logp))
    term = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    gap = batch.reference - logp
    return -(term - KL * (jnp.exp(gap) - gap - 1)).mean(axis=1).sum()


# -- what both share: a layer without its attention ------------------------------------------------------------------


def norm(x: Array, scale: Array, epsilon: float) -> Array:
    """RMS norm over the last axis."""
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """x [..., T, H, D] turned by its positions [T]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def projections(c: TransformerConfig, layer, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """x [..., T, width] -> q [..., T, H, D], k and v [..., T, G, D]."""
    x = norm(x, layer["norm1"]["scale"], c.norm_epsilon)
    heads = lambda name: (x @ layer["attention"][name]["kernel"]).reshape(*x.shape[:-1], -1, c.head_dim)
    turned = (rotate(heads(name), positions, c.rope.theta) for name in ("query", "key"))
    return *turned, heads("value")


def rest(c: TransformerConfig, layer, x: Array, attended: Array) -> Array:
    """The layer's output from its input and what its heads found [..., T, H, D]."""
    x = x + attended.reshape(*x.shape[:-1], -1) @ layer["attention"]["out"]["kernel"]
    h = norm(x, layer["norm2"]["scale"], c.norm_epsilon)
    mlp = {name: kernel["kernel"] for name, kernel in layer["mlp"].items()}
    return x + (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]


def log_softmax_at(logits: Array, ids: Array) -> Array:
    """Log-probability of each id [...] under its logits [..., V]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]


def layers(c: TransformerConfig, params):
    """Parameters of every layer, in order."""
    return [params[f"layer_{i}"] for i in range(c.layers)]


def adam(gradient, state):
    """(params, first moments, second moments, step) after one step of Adam."""
    params, first, second, step = state
    step, tree = step + 1, jax.tree.map
    first = tree(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = tree(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
    scale = lambda m, v: (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8)
    params = tree(lambda p, m, v: p - STEP * scale(m, v), params, first, second)
    return params, first, second, step


def adam_state(params):
    """What `adam` steps."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.tree.map(jnp.array, params), zeros, jax.tree.map(jnp.array, zeros), jnp.float32(0)


# -- the plain step --------------------------------------------------------------------------------------------------


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """q [B, S, H, D], k and v [B, T, G, D], seen [S, T] -> [B, S, H, D]."""
    b, s, h, d = q.shape
    q = q.reshape(b, s, k.shape[2], -1, d)
    scores = jnp.einsum("bsgrd,btgd->bgrst", q, k) / d**0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bgrst,btgd->bsgrd", weights, v).reshape(b, s, h, d)


def plain_forward(c: TransformerConfig, params, ids: Array, caches, start: Array | int):
    """(logits [B, S, V], caches): `ids` [B, S] at positions start, start + 1, ... after what the caches [B, T, G, D] hold."""
    positions = start + jnp.arange(ids.shape[1])
    x, after = params["embed"]["embedding"][ids], []
    seen = jnp.arange(caches[0][0].shape[1]) <= positions[:, None]
    for layer, cache in zip(layers(c, params), caches, strict=True):
        q, *new = projections(c, layer, x, positions)
        k, v = (lax.dynamic_update_slice_in_dim(old, x, start, 1) for old, x in zip(cache, new, strict=True))
        x = rest(c, layer, x, attend(q, k, v, seen))
        after.append((k, v))
    return norm(x, params["norm"]["scale"], c.norm_epsilon) @ params["embed"]["embedding"].T, after


def plain_caches(c: TransformerConfig, rows: int, length: int):
    """Empty keys and values of every layer."""
    return [(jnp.zeros((rows, length, c.kv_heads, c.head_dim)),) * 2 for _ in range(c.layers)]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def plain_rollout(c: TransformerConfig, params, prompts: Array, key: Array, samples: int, longest: int):
    """Prompts [Q, P] -> tokens and their log-probabilities [Q samples, L]."""
    prompts = jnp.repeat(prompts, samples, axis=0)
    rows, length = prompts.shape
    logits, caches = plain_forward(c, params, prompts, plain_caches(c, rows, length + longest), 0)

    def step(carry, i):
        logits, caches = carry
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        logp = log_softmax_at(logits, token)
        logits, caches = plain_forward(c, params, token[:, None], caches, length + i)
        return (logits[:, 0], caches), (token, logp)

    _, drawn = lax.scan(step, (logits[:, -1], caches), jnp.arange(longest))
    return jax.tree.map(lambda x: x.T, drawn)


def plain_logp(c: TransformerConfig, params, ids: Array, longest: int) -> Array:
    """Log-probabilities [N, L] of the completions in ids [N, T], from logits of everything."""
    logits, _ = plain_forward(c, params, ids, plain_caches(c, *ids.shape), 0)
    return log_softmax_at(logits[:, :-1], ids[:, 1:])[:, -longest:]


def plain_gradient(c: TransformerConfig, params, batch: Batch, longest: int):
    """(loss, gradient) of all sequences at once."""
    objective = lambda params: grpo(plain_logp(c, params, batch.ids, longest), batch) / len(batch.ids)
    return jax.value_and_grad(objective)(params)


# -- the tuned step ------------------------------------------------------------------------------------------------

MICRO, ROWS, VIEW, BLOCK = 2, 64, 32, 64  # sequences, rows of queries, growth of the cache, prompt tokens


def rows_attend(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of one sequence, q [T, H, D], k and v [T, G, D], a block of rows at a time."""
    size, h, d = q.shape
    q = q.reshape(size, k.shape[1], -1, d).transpose(1, 2, 0, 3) / d**0.5
    k, v = k.transpose(1, 2, 0), v.transpose(1, 0, 2)
    out = []
    for a in range(0, size, ROWS):
        b = min(a + ROWS, size)
        seen = jnp.arange(b) <= jnp.arange(a, b)[:, None]
        scores = jnp.einsum("grsd,gdt->grst", q[:, :, a:b], k[:, :, :b])
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        out.append(jnp.einsum("grst,gtd->sgrd", weights, v[:, :b]))
    return jnp.concatenate(out).reshape(size, h, d)


def tuned_logp(c: TransformerConfig, params, ids: Array, longest: int) -> Array:
    """As `plain_logp`, of few sequences."""
    x, positions = params["embed"]["embedding"][ids], jnp.arange(ids.shape[1])
    for layer in layers(c, params):
        x = rest(c, layer, x, jax.vmap(rows_attend)(*projections(c, layer, x, positions)))
    x = norm(x[:, -longest - 1 : -1], params["norm"]["scale"], c.norm_epsilon)
    return log_softmax_at(x @ params["embed"]["embedding"].T, ids[:, -longest:])


def tuned_scores(c: TransformerConfig, params, ids: Array, longest: int) -> Array:
    """As `plain_logp`."""
    some = lambda ids: tuned_logp(c, params, ids, longest)
    return lax.map(some, ids.reshape(-1, MICRO, ids.shape[1])).reshape(len(ids), longest)


def tuned_gradient(c: TransformerConfig, params, batch: Batch, longest: int):
    """(loss, gradient), summed over micro-batches."""
    objective = lambda params, some: grpo(tuned_logp(c, params, some.ids, longest), some)

    def add(total, some):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(objective)(params, some)), None

    micro = jax.tree.map(lambda x: x.reshape(-1, MICRO, *x.shape[1:]), batch)
    total, _ = lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), micro)
    return jax.tree.map(lambda x: x / len(batch.ids), total)


def token_attend(q: Array, k: Array, v: Array, position: Array) -> Array:
    """q [B, H, D], k and v [B, G, D, T] -> [B, H, D]; the sum over D is written out."""
    b, h, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d) / d**0.5
    scores = sum(q[..., i, None] * k[:, :, None, i] for i in range(d))
    weights = jax.nn.softmax(jnp.where(jnp.arange(k.shape[-1]) <= position, scores, -1e30), axis=-1)
    return jnp.sum(weights[:, :, :, None] * v[:, :, None], -1).reshape(b, h, d)


def tuned_token(c: TransformerConfig, params, token: Array, caches, position: Array):
    """(logits [B, V], caches) after one token [B] per row; caches [B, G, D, T]."""
    x, after = params["embed"]["embedding"][token][:, None], []
    for layer, cache in zip(layers(c, params), caches, strict=True):
        q, *new = projections(c, layer, x, position[None])
        k, v = (
            lax.dynamic_update_slice_in_dim(old, x.transpose(0, 2, 3, 1), position, 3)
            for old, x in zip(cache, new, strict=True)
        )
        x = rest(c, layer, x, token_attend(q[:, 0], k, v, position)[:, None])
        after.append((k, v))
    return norm(x[:, 0], params["norm"]["scale"], c.norm_epsilon) @ params["embed"]["embedding"].T, after


def tuned_prefill(c: TransformerConfig, params, prompts: Array):
    """(logits after each prompt [Q, V], caches [Q, G, D, P])."""
    x, positions, caches = params["embed"]["embedding"][prompts], jnp.arange(prompts.shape[1]), []
    for layer in layers(c, params):
        q, k, v = projections(c, layer, x, positions)
        x = rest(c, layer, x, jax.vmap(rows_attend)(q, k, v))
        caches.append(tuple(x.transpose(0, 2, 3, 1) for x in (k, v)))
    return norm(x[:, -1], params["norm"]["scale"], c.norm_epsilon) @ params["embed"]["embedding"].T, caches


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def tuned_rollout(c: TransformerConfig, params, prompts: Array, key: Array, samples: int, longest: int):
    """As `plain_rollout`."""
    length = prompts.shape[1]
    logits, caches = jax.tree.map(lambda x: jnp.repeat(x, samples, 0), tuned_prefill(c, params, prompts))
    uniforms = jax.random.uniform(key, (longest, len(logits), 1))

    def step(carry, i):
        logits, caches = carry
        shifted = logits - logits.max(-1, keepdims=True)
        running = jnp.cumsum(jnp.exp(shifted), -1)
        total = running[:, -1:]
        token = jnp.argmax(running > uniforms[i] * total * (1 - 1e-6), axis=-1)
        logp = jnp.take_along_axis(shifted, token[:, None], -1)[:, 0] - jnp.log(total[:, 0])
        logits, caches = tuned_token(c, params, token, caches, length + i)
        return (logits, caches), (token, logp)

    carry, parts = (logits, caches), []
    for start in range(0, longest, VIEW):
        more = min(VIEW, longest - start)
        longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, more),)), carry[1])  # noqa: B023
        carry, drawn = lax.scan(step, (carry[0], longer), start + jnp.arange(more))
        parts.append(drawn)
    return jax.tree.map(lambda *xs: jnp.concatenate(xs).T, *parts)
