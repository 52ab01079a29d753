"""int8 noise as a pure function of (seed, leaf, generation, factor), its exact moments, and the released noise.

A matrix [out, in] is perturbed by A B^T, A of `out` and B of `in` numbers; a vector [k] by the elementwise product u v of two
factors, so that all leaves share one scale. Left factors (A, u) belong to rows of the population, right ones (B, v) to columns.
Factors are streams of `kernels.noise_bits`, addressed as in `eggroll.noise`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry_2x32

from eggroll.noise import LEFT, RIGHT, Leaf, distinct, path_name, seed_words
from eggroll.population import Population
from kernels import noise_bits

KINDS = ("gaussian", "rademacher")
_TABLE_BITS = 30
_MIXER = np.uint32(0x45D9F3B)


def plan(params: Any) -> tuple[Leaf, ...]:
    """The leaves in flattening order; all are int8 matrices [out, in] or vectors.

    Raises:
        TypeError: a leaf that is not int8.
        ValueError: a leaf that is neither matrix nor vector, or two whose paths share a hash.
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path_name(path)
        if jnp.asarray(leaf).dtype != jnp.int8:
            raise TypeError(
                f"integer parameters are int8; {name!r} is {jnp.asarray(leaf).dtype}: round 16 times the value"
            )
        if jnp.ndim(leaf) not in (1, 2) or not jnp.size(leaf):
            raise ValueError(
                f"a parameter must be a matrix [out, in] or a vector; {name!r} has shape {jnp.shape(leaf)}: split it"
            )
        leaves.append(Leaf(name, jnp.shape(leaf), jnp.dtype(jnp.int8), "oi" if jnp.ndim(leaf) == 2 else "full"))
    return distinct(leaves)


def draw(leaves: Sequence[Leaf], key: Array, generation: Array, ids: Array, side: int, kind: str) -> list[Array]:
    """One side's factors of every leaf.

    Args:
        key: typed PRNG key from `jax.random.key(seed)`.
        generation: integer scalar.
        ids: u32 [...], factor identities: rows' for LEFT, columns' for RIGHT.
        side: LEFT or RIGHT.
        kind: "gaussian": `noise_bits.gaussian_int8`; "rademacher": -16 or 16, 32 numbers a word; "released": see `released`.

    Returns:
        Per leaf int8 [*ids.shape, size of the factor].
    """
    if kind == "released":
        return released(leaves, key, generation, ids, side)
    first, second = seed_words(key)
    sizes = [_size(leaf, side) for leaf in leaves]
    counts = [-(-size // 32) if kind == "rademacher" else size for size in sizes]
    words: dict[int, Array] = {}
    for count in sorted(set(counts)):  # one call of the generator for all leaves of a size
        mine = [i for i, c in enumerate(counts) if c == count]
        hashes = np.asarray([leaves[i].hash for i in mine], np.uint32)
        address = (first, second, hashes, generation.astype(jnp.uint32))
        together = noise_bits.words(address, (ids[..., None], np.uint32(0), np.uint32(side)), count)
        words |= {i: together[..., place, :] for place, i in enumerate(mine)}

    def numbers(_, words):
        if kind == "rademacher":
            return [noise_bits.signs_int8(w, size) for w, size in zip(words, sizes, strict=True)]
        return [noise_bits.gaussian_int8(w) for w in words]

    return noise_bits.once(numbers, (first,), [words[i] for i in range(len(leaves))])


def second_moment(kind: str) -> float:
    """E[x^2] of one number, exactly; of a product of two factors it is the standard deviation. Of the released noise the
    nominal 16^2, which its thresholds use (it is 243.6)."""
    return _moments()[0] if kind == "gaussian" else 256.0


def excess(kind: str, population: Population) -> float:
    """Excess kurtosis of a sum over pairs without signal, where pairs share factors: the terms are then dependent, and the sum
    has heavier tails than a normal.

    With P rows x Q columns in each of G blocks, k = E[x^4] / E[x^2]^2 and random signs:
    ((k^2 + 3 k (P + Q - 2) + 3 (P - 1)(Q - 1)) / (P Q) - 3) / G. Of independent pairs, about 6 / pairs, it is left out: it
    changes the share that moves by less than a hundredth of it from 64 pairs on.
    """
    blocks, rows, columns = population.shape[:3]
    if rows * columns == 1:
        return 0.0
    k = _moments()[1] / _moments()[0] ** 2 if kind == "gaussian" else 1.0
    return ((k * k + 3 * k * (rows + columns - 2) + 3 * (rows - 1) * (columns - 1)) / (rows * columns) - 3) / blocks


@functools.cache
def _moments() -> tuple[float, float]:
    """E[x^2] and E[x^4] of `noise_bits.gaussian_int8` over all words."""
    count, fill = np.meshgrid(np.arange(17), np.arange(1 << 16), indexing="ij")
    ways = np.array([math.comb(16, k) for k in range(17)], np.int64)[:, None]
    word = ((1 << count) - 1 << 16 | fill).astype(np.uint32)
    with jax.ensure_compile_time_eval():
        numbers = np.asarray(noise_bits.gaussian_int8(jnp.asarray(word)), np.int64)
    return tuple(int((ways * numbers**power).sum()) / 2**32 for power in (2, 4))


def largest(kind: str) -> int:
    """The largest |x|."""
    return {"gaussian": 67, "rademacher": 16, "released": int(np.abs(_edges()).max()) if kind == "released" else 0}[
        kind
    ]


def _size(leaf: Leaf, side: int) -> int:
    return leaf.shape[0] if side == LEFT else leaf.shape[-1]


# -- the released noise ----------------------------------------------------------------------------------------------


def released(leaves: Sequence[Leaf], key: Array, generation: Array, ids: Array, side: int) -> list[Array]:
    """Slices of a table of 2^30 numbers int8(16 normal(key)), rounded to zero, where a hash of the pair's number says.

    The leaf with key k starts at (key_data(fold_in(k, generation))[0] ^ hash(pair)) mod 2^30, with hash(t) = ((t >> 16) ^ t)
    0x45d9f3b. A matrix reads B, then A; a vector pairs of its two factors. From about 2^18 members on, slices of different
    members overlap. The table is not kept: its entries are computed from their places, by comparing the uniform number that a
    normal is made of with bounds.
    """
    names = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    drawn = []
    for leaf, name in zip(leaves, names, strict=True):
        word = jax.random.key_data(jax.random.fold_in(name, generation))[0]
        matrix = len(leaf.shape) == 2
        length = sum(leaf.shape) if matrix else 2 * leaf.shape[0]
        start = jnp.minimum(
            (word ^ hashed(ids)) & np.uint32((1 << _TABLE_BITS) - 1), np.uint32((1 << _TABLE_BITS) - length)
        )
        offset = np.arange(_size(leaf, side), dtype=np.uint32)
        offset = (
            offset + np.uint32(leaf.shape[1] if side == LEFT else 0)
            if matrix
            else 2 * offset + np.uint32(side == RIGHT)
        )
        place = start[..., None] + offset
        hashes = threefry_2x32(
            jax.random.key_data(key), jnp.concatenate([jnp.zeros(place.size, jnp.uint32), place.reshape(-1)])
        )
        bits = hashes[: place.size] ^ hashes[place.size :]
        drawn.append(table_number(bits).reshape(place.shape))
    return drawn


def table_number(bits: Array) -> Array:
    """The int8(16 normal) that `jax.random.normal` would make of u32 words."""
    uniform = (bits >> 9).astype(jnp.int32)
    return jnp.asarray(_edges(), jnp.int8)[jnp.searchsorted(jnp.asarray(_bounds()), uniform, side="right")]


def hashed(pair: Array) -> Array:
    """The released hash of a pair's number, u32."""
    pair = pair.astype(jnp.uint32)
    return (pair >> np.uint32(16) ^ pair) * _MIXER


@functools.cache
def _values() -> np.ndarray:
    """int8(16 z) of all 2^23 uniform numbers that a normal is made of, in their order."""
    with jax.ensure_compile_time_eval():
        one_to_two = jax.lax.bitcast_convert_type(
            jnp.arange(1 << 23, dtype=jnp.uint32) | np.uint32(0x3F800000), jnp.float32
        )
        low = np.nextafter(np.float32(-1), np.float32(0))
        uniform = jnp.maximum(low, (one_to_two - 1) * (np.float32(1) - low) + low)
        return np.asarray((16 * np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)).astype(jnp.int8))


@functools.cache
def _edges() -> np.ndarray:
    """The values that occur."""
    return np.unique(_values()).astype(np.int32)


@functools.cache
def _bounds() -> np.ndarray:
    """For each value but the smallest, the first of the 2^23 that has it."""
    return np.searchsorted(_values(), _edges()[1:]).astype(np.int32)
