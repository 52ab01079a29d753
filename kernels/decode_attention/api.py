"""What callers import."""

from jax import Array

from kernels.decode_attention import reference


def attend(q: Array, k: Array, v: Array, length: Array | int) -> Array:
    """softmax(q k / sqrt(D)) v over the first `length` entries of a cache, scores and softmax in f32 or wider.

    Args:
        q: [H, D], one token's queries; head h reads key-value head h // (H / G).
        k, v: [G, D, T], features before positions, so that the sums over D and over T both run along contiguous T.
        length: i32 scalar, 0 to T. Entries from there on are never read: they may be NaN. 0 gives zeros.

    Returns:
        [H, D], in the type of v.
    """
    return reference.attend(q, k, v, length)
