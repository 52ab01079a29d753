"""What callers import."""

import functools

import jax.numpy as jnp
from jax import Array

from kernels import batching, dispatch
from kernels.decode_attention import reference

_KERNELS = ("pallas_tpu", "pallas_gpu")


def attend(q: Array, k: Array, v: Array, length: Array | int, *, implementation: str | None = None) -> Array:
    """softmax(q k / sqrt(D)) v over the first `length` entries of a cache, scores and softmax in f32 or wider.

    Slots, and members over them, are added by `vmap`: a kernel is called once for all, and reads a cache that some share where
    it lies. The gradient is the reference's.

    Args:
        q: [H, D], one token's queries; head h reads key-value head h // (H / G).
        k, v: [G, D, T], features before positions, so that the sums over D and over T both run along contiguous T.
        length: i32 scalar, 0 to T. Entries from there on are never used: they may be NaN. 0 gives zeros.
        implementation: see `kernels.use`.

    Returns:
        [H, D], in the type of v.

    Raises:
        ValueError: shapes that do not fit, a named kernel that cannot serve.
    """
    fits = (q.ndim, k.ndim) == (2, 3) and k.shape == v.shape and q.shape[1] == k.shape[1]
    if not fits or not k.shape[0] or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"attend needs q [H, D], k and v [G, D, T] with H a multiple of G; got {q.shape}, {k.shape} and {v.shape}: slots "
            "and members are added by vmap"
        )
    chosen = _choose(q, k, v, implementation)
    if chosen == "reference":
        return reference.attend(q, k, v, length)
    call = batching.differentiable(
        batching.leading(dispatch.module("decode_attention", chosen).attend), reference.attend
    )
    return call(q, k, v, jnp.asarray(length, jnp.int32))


def _choose(q: Array, k: Array, v: Array, implementation: str | None) -> str:
    def unserved(name):
        kernel = dispatch.module("decode_attention", name)
        if not (q.size and k.size):
            return "there is nothing to compute"
        if not q.dtype == k.dtype == v.dtype or q.dtype not in kernel.DTYPES:
            return f"q, k and v are all of one type of {', '.join(jnp.dtype(d).name for d in kernel.DTYPES)}"
        return kernel.limits(q.shape, k.shape)

    shape = f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {v.dtype}"
    limits = {name: functools.partial(unserved, name) for name in _KERNELS}
    return dispatch.choose("decode_attention", shape, limits, implementation)
