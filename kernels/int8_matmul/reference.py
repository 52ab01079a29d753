"""The integer product in plain JAX; see `kernels.int8_matmul.api`. Kernels share its last step."""

import jax.numpy as jnp
from jax import Array, lax

MAX_DIVISOR = (2**31 - 1) // 254


def matmul(x: Array, w: Array, right: Array, left: Array, sign: Array, *, shift: int, divisor: int) -> Array:
    """One product with w for all members that differ in x, and an outer product for each."""
    base = lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    s = coefficient(x, right, sign)
    return finish(base, s[..., None], left[..., None, :].astype(jnp.int32), shift, divisor)


def coefficient(x: Array, right: Array, sign: Array) -> Array:
    """Of each row, sign (x . B): i32 [*members, M]."""
    return sign[..., None] * jnp.einsum("...mi,...i->...m", x, right, preferred_element_type=jnp.int32)


def finish(acc: Array, s: Array, a: Array, shift: int, divisor: int) -> Array:
    """int8 clip((acc + ((s a) >> shift)) // divisor) of int32 operands, also inside a kernel's tile."""
    acc = acc + (s * a >> shift)
    if divisor & (divisor - 1) == 0:
        return jnp.clip(acc >> (divisor.bit_length() - 1), -127, 127).astype(jnp.int8)
    # Clipped before the division and moved to where rounding to zero, which all devices have, is rounding down.
    top = 127 * divisor
    return (lax.div(jnp.clip(acc, -top, top) + top, jnp.int32(divisor)) - 127).astype(jnp.int8)
