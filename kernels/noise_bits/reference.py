"""Threefry-4x32-20 in plain u32 arithmetic, and the two distributions built on its words.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

_ROUNDS = 20
_ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
_PARITY = np.uint32(0x1BD11BDA)

LANES = 128  # a tile of words is 4 words x 128 blocks: whole vector registers on every accelerator
# A Gaussian is popcount(high 16 bits) - 8 + fill, the fill uniform on 2^25 midpoints of (-1/2, 1/2): the low 16 bits, then 9
# of the high ones, which keeps the values near zero as finely spaced as f32 needs. Its variance, exactly: 16/4 for the
# popcount, (1 - 2^-50)/12 for the fill, 2 * (2^-16 - 2^-25)/4 for the covariance through the 9 bits used twice.
_GAUSSIAN_SCALE = np.float32(1 / math.sqrt(4 + (1 - 2.0**-50) / 12 + (2.0**-16 - 2.0**-25) / 2))


def threefry4x32(key: Sequence[ArrayLike], counter: Sequence[ArrayLike]) -> list[jnp.ndarray]:
    """The Threefry-4x32 block function with 20 rounds.

    Args:
        key: four u32 arrays.
        counter: four u32 arrays, broadcastable against each other and the key.

    Returns:
        Four u32 arrays of the broadcast shape.
    """
    k = [jnp.asarray(word, jnp.uint32) for word in key]
    k.append(k[0] ^ k[1] ^ k[2] ^ k[3] ^ _PARITY)
    x = [jnp.asarray(word, jnp.uint32) + k[i] for i, word in enumerate(counter)]
    for rnd in range(_ROUNDS):
        first, second = (1, 3) if rnd % 2 == 0 else (3, 1)
        for target, source, bits in ((0, first, _ROTATIONS[rnd % 8][0]), (2, second, _ROTATIONS[rnd % 8][1])):
            x[target] = x[target] + x[source]
            rotated = (x[source] << np.uint32(bits)) | (x[source] >> np.uint32(32 - bits))
            x[source] = rotated ^ x[target]
        if rnd % 4 == 3:
            step = rnd // 4 + 1
            x = [word + k[(i + step) % 5] for i, word in enumerate(x)]
            x[3] = x[3] + np.uint32(step)
    return x


def words_at(key: Sequence[ArrayLike], stream: Sequence[ArrayLike], element: ArrayLike) -> jnp.ndarray:
    """The words of single elements, u32, of the broadcast shape of all operands; also inside a kernel's tile.

    One elementwise expression: every element hashes its own block and keeps one of the four words. XLA makes one loop of it.
    Hashing each block once and joining the four outputs is a quarter of the arithmetic, but XLA on CPU then recomputes the
    shared rounds without bound (measured: 1 M words/s against 840 M words/s).
    """
    element = jnp.asarray(element, jnp.uint32)
    # shifts for what is element // 512 * 128 + element % 128 and element // 128 % 4: not every kernel language divides
    block = ((element >> np.uint32(9)) << np.uint32(7)) | (element & np.uint32(LANES - 1))
    which = (element >> np.uint32(7)) & np.uint32(3)
    out = threefry4x32(key, [block, *stream])
    low, high = jnp.where(which == 0, out[0], out[1]), jnp.where(which == 2, out[2], out[3])
    return jnp.where(which < 2, low, high)


def _words(key: Sequence[ArrayLike], stream: Sequence[ArrayLike], count: int) -> jnp.ndarray:
    shape = jnp.broadcast_shapes(*(jnp.shape(word) for word in (*key, *stream))) + (count,)
    element = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    lift = lambda word: jnp.asarray(word, jnp.uint32)[..., None]
    return words_at([lift(word) for word in key], [lift(word) for word in stream], element)


def words(key: Sequence[ArrayLike], stream: Sequence[ArrayLike], count: int) -> jnp.ndarray:
    """The first `count` words of every stream; see `kernels.noise_bits.api.words`."""
    key, stream = (tuple(jnp.asarray(word, jnp.uint32) for word in part) for part in (key, stream))
    return once(lambda key, stream: _words(key, stream, count), key, stream)


def once(fn: Callable, key: Sequence[jnp.ndarray], *args: Any) -> Any:
    """fn(key, *args), computed once; see `kernels.noise_bits.api.once`.

    On a CPU it sits in a conditional that is always taken: XLA drops an optimization barrier before it fuses.
    """

    def guarded(key, *args):
        taken = jnp.ravel(key[0])[0] | np.uint32(1)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, key, *args))
        return lax.cond(taken != 0, fn, lambda key, *args: nothing, key, *args)

    return lax.platform_dependent(key, *args, cpu=guarded, default=fn)


def gaussian(bits: jnp.ndarray, ones: Callable = lax.population_count) -> jnp.ndarray:
    """One near-Gaussian per word; see `kernels.noise_bits.api.gaussian`. `ones` counts the ones of 16 bits."""
    count = ones(bits >> np.uint32(16)).astype(jnp.int32) - 8
    swapped = (bits << np.uint32(16)) | (bits >> np.uint32(16))
    fill = (lax.bitcast_convert_type(swapped ^ np.uint32(1 << 31), jnp.int32) >> 7) * 2 + 1
    return (count.astype(jnp.float32) + fill.astype(jnp.float32) * np.float32(2.0**-26)) * _GAUSSIAN_SCALE


def ones_of_16(bits: jnp.ndarray) -> jnp.ndarray:
    """Ones of 16 bits in plain arithmetic: not every kernel language has the instruction."""
    bits = bits - ((bits >> np.uint32(1)) & np.uint32(0x5555))
    bits = (bits & np.uint32(0x3333)) + ((bits >> np.uint32(2)) & np.uint32(0x3333))
    bits = (bits + (bits >> np.uint32(4))) & np.uint32(0x0F0F)
    return (bits + (bits >> np.uint32(8))) & np.uint32(0x1F)


def signs(bits: jnp.ndarray, count: int) -> jnp.ndarray:
    """+1 or -1 from single bits; see `kernels.noise_bits.api.signs`."""
    bit = lax.broadcasted_iota(jnp.uint32, (*bits.shape, 32), bits.ndim)
    sign = ((bits[..., None] >> bit) & np.uint32(1)) << np.uint32(31)
    ones = lax.bitcast_convert_type(sign | np.uint32(0x3F800000), jnp.float32)
    return ones.reshape(*bits.shape[:-1], bits.shape[-1] * 32)[..., :count]


def gaussian_int8(bits: jnp.ndarray) -> jnp.ndarray:
    """16 times a near-Gaussian, rounded; see `kernels.noise_bits.api.gaussian_int8`."""
    count = lax.population_count(bits >> np.uint32(16)).astype(jnp.int32) - 8
    fill = (bits & np.uint32(0xFFFF)).astype(jnp.int32) - (1 << 15)
    odd = 2 * ((count << 16) + fill) + 1  # odd times odd is never half way between two integers: rounding is symmetric
    return (odd * 1013 + (1 << 23) >> 24).astype(jnp.int8)


def signs_int8(bits: jnp.ndarray, count: int) -> jnp.ndarray:
    """+16 or -16 from single bits; see `kernels.noise_bits.api.signs_int8`."""
    bit = lax.broadcasted_iota(jnp.uint32, (*bits.shape, 32), bits.ndim)
    sign = ((bits[..., None] >> bit) & np.uint32(1)).astype(jnp.int8)
    return (16 - 32 * sign).reshape(*bits.shape[:-1], bits.shape[-1] * 32)[..., :count]
