"""Adam-mini: Adam with one second moment for a whole block of weights.

    M = b1 M + (1 - b1) G;   v_b = b2 v_b + (1 - b2) mean(G_b^2);   W <- W - lr Mhat / (sqrt(vhat_b) + eps)

Blocks, by path: an output neuron of a matrix [in, out] (a column, "out"), a token of an embedding [vocab, width] ("in"),
every entry of a bias or of a kernel with more axes ("element": plain Adam), a whole norm or other vector ("tensor"), and a head
of queries or keys where a rule says so ("heads:8": columns h d .. (h + 1) d - 1 together, over all inputs). State of a matrix
in f32: 4 m n bytes and 4 a block.

On the estimates of evolution: a block's mean of squares is far less noisy than one weight's square, which helps where Adam's
second moment mostly measures noise.

Source: Zhang et al., Adam-mini, arXiv 2406.16793, the partition of version 1.1.1.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rl.optim import groups

_EMBEDDING = re.compile(r"(^|/)(\w*embed\w*|wte|wpe)(/|$)", re.IGNORECASE)


class AdamMiniState(NamedTuple):
    """Attributes: steps made, i32; first moments; second moments of the blocks."""

    count: Array
    mu: Any
    nu: Any


def scale_by_adam_mini(
    block: str, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam's direction with a second moment per block: "out", "in", "tensor" or "heads:N"; see the module."""
    average = lambda x, axis: jnp.mean(x, axis) if x.size else jnp.sum(x, axis)  # the mean of nothing is 0
    heads = int(block.partition(":")[2]) if block.startswith("heads:") else 0

    def mean(path, square):
        if block == "tensor":
            return average(square, tuple(range(groups.stacked(path), square.ndim)))
        if not groups.is_matrix(path, square):
            raise ValueError(
                f"blocks {block!r} are of matrices; {path} has shape {square.shape}: take 'tensor' or 'element'"
            )
        if not heads:
            return average(square, -2 if block == "out" else -1)
        *lead, m, n = square.shape
        if not groups.is_plain(path, square):
            raise ValueError(
                f"blocks {block!r} are of columns of a matrix; {path} has shape {square.shape}: take 'element'"
            )
        if n % heads:
            raise ValueError(f"columns must divide into heads; got {n} of {path} and {heads} heads")
        return jnp.mean(square.reshape(*lead, m, heads, n // heads), axis=(-3, -1))

    def spread(nu, like):
        if block == "tensor":
            return nu.reshape(*nu.shape, *[1] * (like.ndim - nu.ndim))
        if heads:
            nu = jnp.repeat(nu, like.shape[-1] // heads, axis=-1)
        return jnp.expand_dims(nu, -1 if block == "in" else -2)

    def means(tree):
        return jax.tree.unflatten(jax.tree.structure(tree), [mean(path, x * x) for path, x in groups.leaves(tree)])

    def init(params):
        shapes = jax.eval_shape(means, params)
        nu = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return AdamMiniState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), nu)

    def update(updates, old, params=None):
        count = optax.safe_increment(old.count)
        mu = optax.tree.update_moment(updates, old.mu, b1, 1)
        nu = jax.tree.map(lambda new, v: b2 * v + (1 - b2) * new, means(updates), old.nu)
        first, second = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        out = jax.tree.map(lambda m, v: m / (jnp.sqrt(spread(v, m)) + eps), first, second)
        return out, AdamMiniState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
) -> optax.GradientTransformation:
    """Adam-mini on all parameters.

    Args:
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, blocks) by path, before the module's: "out", "in", "tensor", "element", "heads:N", or "frozen". For
            queries and keys: (("query/kernel", "heads:8"), ("key/kernel", "heads:4")).

    Raises:
        ValueError: unknown blocks, or blocks that do not fit a leaf, or a rule that fits nothing.
    """
    parts = {name: scale_by_adam_mini(name, b1, b2, eps) for name in ("out", "in", "tensor")}
    parts |= {name: scale_by_adam_mini(name, b1, b2, eps) for _, name in rules if re.fullmatch(r"heads:[1-9]\d*", name)}
    parts |= {"element": optax.scale_by_adam(b1, b2, eps), "frozen": optax.set_to_zero()}

    def default(path, leaf):
        if groups.is_matrix(path, leaf):
            return "in" if _EMBEDDING.search(path) else "out" if groups.is_plain(path, leaf) else "element"
        return "element" if re.search(r"(bias|(^|/)b)$", path) else "tensor"

    return groups.grouped(learning_rate, parts, rules=rules, default=default, weight_decay=weight_decay, mask=mask)
