"""8-bit Adam: AdamW whose moments are kept in 8 bits, in blocks of 256 with a scale each.

A block is 256 neighbours of the flattened leaf, kept as its largest magnitude, f32, and 256 codes of the dynamic map, which has
seven decades of magnitude with 2^i steps in decade i: for i = 0 .. 6 the middles of 2^i equal parts of
[0.1, 1] 10^(i - 6) (2^(i + 1) parts where there are no negative values), and 0 and 1. Every step: decode, AdamW, encode
to the nearest code. State of a leaf: 2 + 8 / 256 bytes per weight. Leaves below 4,096 entries, embeddings and output layer keep
f32 moments.

On the estimates of evolution: as Adam; the relative error of a code, up to 1.6 % in the upper decade, is far below the noise.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rl.optim import groups

BLOCK = 256
DECADES = 7
SMALL = 4096  # entries below which moments stay f32


def codebook(signed: bool) -> np.ndarray:
    """The dynamic map: 256 values in ascending order, f32."""
    positive = []
    for decade in range(DECADES):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        positive.append(10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(positive)
    return np.sort(np.concatenate([-positive if signed else [], [0], positive, [1]])).astype(np.float32)


BOOKS = {signed: codebook(signed) for signed in (False, True)}


class Coded(NamedTuple):
    """An array in 8 bits: codes, u8 in its shape, and the largest magnitude of every 256 entries, f32 [ceil(size / 256)]."""

    codes: Array
    scale: Array


def nearest(x: Array, signed: bool) -> Array:
    """The code of the nearest value of the map, u8, for x in [-1, 1]; the lower one of two as near.

    Inside a decade the borders between codes are those of equal parts, so a code is guessed from decade and part, and put right
    by one where the guess misses (next to a decade's ends, 0 and 1).
    """
    book = BOOKS[signed]
    border = np.append((book[1:].astype(np.float64) + book[:-1]) / 2, np.inf).astype(np.float32)
    size = jnp.abs(x)
    decade = sum((size > np.float32(10.0**-i)).astype(jnp.int32) for i in range(1, DECADES))
    parts = jnp.left_shift(1, decade + (not signed))
    first = parts - 1 - (not signed)  # codes of positive values below this decade
    inside = (size * jnp.asarray(10.0 ** np.arange(DECADES - 1, -1, -1), x.dtype)[decade] - 0.1) / 0.9
    place = first + jnp.clip(jnp.floor(inside * parts), 0, parts - 1).astype(jnp.int32)
    guess = jnp.where(x < 0, 126 - place, 128 + place) if signed else 1 + place
    table = jnp.asarray(border)
    code = guess + (x > table[guess]) - ((guess > 0) & (x <= table[jnp.maximum(guess - 1, 0)]))
    return code.astype(jnp.uint8)


def encode(x: Array, signed: bool) -> Coded:
    """x in 8 bits."""
    flat = jnp.pad(x.astype(jnp.float32).reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = jnp.max(jnp.abs(flat), axis=1)
    unit = flat / jnp.where(scale > 0, scale, 1)[:, None]
    return Coded(nearest(unit, signed).reshape(-1)[: x.size].reshape(x.shape), scale)


def decode(coded: Coded, signed: bool) -> Array:
    """The array that `coded` stands for, f32."""
    codes, scale = coded
    flat = jnp.asarray(BOOKS[signed])[codes.astype(jnp.int32)].reshape(-1)
    return (flat * jnp.repeat(scale, BLOCK)[: flat.size]).reshape(codes.shape)


class Adam8bitState(NamedTuple):
    """Attributes: steps made, i32; codes and scales of both moments, as of `Coded`."""

    count: Array
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction, with both moments in 8 bits."""

    def zeros(params, signed):
        zero = int(np.flatnonzero(BOOKS[signed] == 0)[0])
        scale = lambda x: jnp.zeros(-(-x.size // BLOCK), jnp.float32)
        return jax.tree.map(lambda x: jnp.full_like(x, zero, jnp.uint8), params), jax.tree.map(scale, params)

    def plain(codes, scales, signed):
        return jax.tree.map(lambda code, scale: decode(Coded(code, scale), signed), codes, scales)

    def coded(tree, signed):
        made = [encode(x, signed) for x in jax.tree.leaves(tree)]
        return [
            jax.tree.unflatten(jax.tree.structure(tree), part)
            for part in ([x.codes for x in made], [x.scale for x in made])
        ]

    def init(params):
        return Adam8bitState(jnp.zeros((), jnp.int32), *zeros(params, True), *zeros(params, False))

    def update(updates, old, params=None):
        count = optax.safe_increment(old.count)
        mu, nu = plain(old.mu, old.mu_scale, True), plain(old.nu, old.nu_scale, False)
        mu, nu = optax.tree.update_moment(updates, mu, b1, 1), optax.tree.update_moment(updates, nu, b2, 2)
        first, second = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        out = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return out, Adam8bitState(count, *coded(mu, True), *coded(nu, False))

    return optax.GradientTransformation(init, update)


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
) -> optax.GradientTransformation:
    """8-bit AdamW.

    Args:
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, group) by path: "full" (f32 moments), "coded", "frozen".

    Raises:
        ValueError: a rule that fits nothing.
    """
    parts = {
        "full": optax.scale_by_adam(b1, b2, eps),
        "coded": scale_by_adam8bit(b1, b2, eps),
        "frozen": optax.set_to_zero(),
    }
    default = lambda path, leaf: "coded" if jnp.size(leaf) >= SMALL and not groups.is_lookup(path) else "full"
    return groups.grouped(learning_rate, parts, rules=rules, default=default, weight_decay=weight_decay, mask=mask)
