"""What callers import: words of noise, and the two distributions made of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels.noise_bits import reference


def words(key: Sequence[ArrayLike], stream: Sequence[ArrayLike], count: int) -> jnp.ndarray:
    """Random 32-bit words addressed by (key, stream, element).

    Element e of a stream is word (e // 128) mod 4 of the Threefry-4x32-20 block with counter
    ((e // 512) * 128 + e mod 128, *stream): one block serves four elements, and a longer draw starts with the shorter one.

    Args:
        key: four u32 arrays (for example seed, seed, leaf, generation).
        stream: three u32 arrays (for example member, layer, role), broadcastable against the key.
        count: elements per stream, below 2^32.

    Returns:
        u32 [*broadcast shape of key and stream, count].

    Raises:
        ValueError: key or stream of another length, or count out of range.
    """
    if len(key) != 4 or len(stream) != 3:
        raise ValueError(f"words needs 4 key words and 3 stream words; got {len(key)} and {len(stream)}")
    if not 0 < count < 2**32:
        raise ValueError(f"count must be from 1 to 2^32 - 1 (the element counter is one u32); got {count}")
    return reference.words(key, stream, count)


def once(fn: Callable, key: Sequence[ArrayLike], *args: Any) -> Any:
    """fn(key, *args), kept apart from whatever reads the result.

    XLA would otherwise fuse cheap elementwise code, a whole hash included, into every reader and compute it again for each
    element that is read: noise is read once per member, and packed bits 32 times.

    Args:
        fn: pure function of arrays.
        key: as for `words`; at least one array.
        args: pytrees of arrays.
    """
    return reference.once(fn, key, *args)


def gaussian(bits: jnp.ndarray) -> jnp.ndarray:
    """One near-Gaussian per word: (popcount of 16 bits - 8 + uniform fill) / standard deviation.

    Mean 0 and variance 1 exactly, symmetric (complementing the word negates the value), excess kurtosis -0.1204,
    |z| <= 4.21. Drawn in f32 with exactly rounded operations only, so that every device gives the same bits.

    Args:
        bits: u32 [...].

    Returns:
        f32 [...].
    """
    return reference.gaussian(bits)


def signs(bits: jnp.ndarray, count: int) -> jnp.ndarray:
    """The first `count` bits of each row of words as +1 (bit 0) or -1 (bit 1): element e is bit e mod 32 of word e // 32.

    Args:
        bits: u32 [..., ceil(count / 32)].
        count: elements wanted.

    Returns:
        f32 [..., count].
    """
    return reference.signs(bits, count)


def gaussian_int8(bits: jnp.ndarray) -> jnp.ndarray:
    """One near-Gaussian integer per word, 16 standing for 1: round(16 (popcount of 16 bits - 8 + uniform fill) / deviation).

    In integers alone. Mean 0 exactly (complementing the word negates the value), |x| <= 67; for the variance, near 16^2, see
    `eggroll.integer.noise.second_moment`.

    Args:
        bits: u32 [...].

    Returns:
        int8 [...].
    """
    return reference.gaussian_int8(bits)


def signs_int8(bits: jnp.ndarray, count: int) -> jnp.ndarray:
    """`signs` in units of 1/16: +16 (bit 0) or -16 (bit 1), int8 [..., count]."""
    return reference.signs_int8(bits, count)
