"""What callers import."""

import functools

import jax.numpy as jnp
from jax import Array

from kernels import batching, dispatch
from kernels.int8_matmul import reference

_INT8, _INT32 = 127, 2**31 - 1  # the largest magnitudes: -128 is not a number of the format


def matmul(
    x: Array,
    w: Array,
    right: Array,
    left: Array,
    sign: Array,
    *,
    shift: int,
    divisor: int,
    implementation: str | None = None,
) -> Array:
    """y = clip((W x + ((sign (x . B) A) >> shift)) // divisor), in integers: int8 operands, int32 sums, int8 result.

    `>>` and `//` round to minus infinity and the sign is applied before the shift, so the two members of a pair are no mirror
    images of each other; the clip is to [-127, 127]. With 16 standing for 1.0 in x and w and factors of standard deviation 16,
    `shift = 4 + s` is noise of standard deviation 2^-s and `divisor = 16 isqrt(in)` keeps the variance.

    Leading axes are those of a population and broadcast against each other, or are added by `vmap`, with W unbatched: members
    that share a factor have an axis of size 1 there. Independent members: [N] on x, B and A. Antithetic pairs: x [P, 2], B and
    A [P, 1], sign [1, 2]. Crossed: x [P, Q], A [P, 1], B [1, Q].

    Args:
        x: int8 [*members, M, in], M rows per member.
        w: int8 [out, in].
        right: B, int8 [*members, in].
        left: A, int8 [*members, out].
        sign: any signed integers [*members], in {-1, 0, 1}; 0: unperturbed.
        shift: static, 0 to 31.
        divisor: static, positive.
        implementation: see `kernels.use`.

    Returns:
        int8 [*members, M, out], the same bits from every implementation. Operands are in [-127, 127]; -128 is computed with
        like any number, but only up to in = 1016 are the sums then sure to fit int32.

    Raises:
        ValueError: shapes or types that do not fit, a shift or divisor out of range, an `in` whose sums could overflow int32
            (above 1048; 1040 without a shift), a named kernel that cannot serve.
    """
    _check(x, w, right, left, sign)
    _check_range(w.shape[1], shift, divisor)
    shape = f"x [*, {w.shape[1]}] int8, w {list(w.shape)}"
    limits = {"pallas_tpu": lambda: dispatch.module("int8_matmul", "pallas_tpu").unserved(), "pallas_gpu": lambda: ""}
    chosen = dispatch.choose("int8_matmul", shape, limits, implementation)
    fn = reference.matmul if chosen == "reference" else dispatch.module("int8_matmul", chosen).matmul
    call = functools.partial(fn, shift=shift, divisor=divisor)
    return batching.leading(call, [False, True])(x, w, right, left, sign.astype(jnp.int32))


def _check(x: Array, w: Array, right: Array, left: Array, sign: Array) -> None:
    lead = (x.ndim - 2, right.ndim - 1, left.ndim - 1, sign.ndim)
    if len(set(lead)) > 1 or w.ndim != 2 or lead[0] < 0:
        raise ValueError(
            "int8_matmul needs x [*members, M, in], w [out, in], right [*members, in], left [*members, out] and sign "
            f"[*members] with as many member axes each; got {x.shape}, {w.shape}, {right.shape}, {left.shape} and {sign.shape}"
        )
    n, k = w.shape
    if x.shape[-1] != k or right.shape[-1] != k or left.shape[-1] != n:
        raise ValueError(
            f"int8_matmul of w {w.shape} needs x [.., {k}], right [.., {k}] and left [.., {n}]; got {x.shape}, {right.shape} "
            f"and {left.shape}"
        )
    types = [a.dtype for a in (x, w, right, left)]
    if any(t != jnp.int8 for t in types) or not jnp.issubdtype(sign.dtype, jnp.signedinteger):
        raise ValueError(
            f"int8_matmul takes int8 x, w, right and left and a signed integer sign; got {', '.join(map(str, types))} and "
            f"{sign.dtype}: cast them"
        )
    try:
        jnp.broadcast_shapes(x.shape[:-2], right.shape[:-1], left.shape[:-1], sign.shape)
    except ValueError as error:
        raise ValueError(
            f"the member axes of x, right, left and sign must broadcast; got {x.shape[:-2]}, {right.shape[:-1]}, "
            f"{left.shape[:-1]} and {sign.shape}: give a shared operand axes of size 1"
        ) from error


def _check_range(k: int, shift: int, divisor: int) -> None:
    if not 0 <= shift <= 31:
        raise ValueError(f"the shift must be in 0 .. 31, the bits of an int32; got {shift}")
    if not 1 <= divisor <= reference.MAX_DIVISOR:
        raise ValueError(f"the divisor must be in 1 .. {reference.MAX_DIVISOR}; got {divisor}")
    term = _INT8**3 * k
    largest = max(term, _INT8**2 * k - (-term >> shift))
    if k < 1 or largest > _INT32:
        raise ValueError(
            "in must be at least 1, and int32 must hold 127^3 in and 127^2 in + (127^3 in >> shift), rounded up; got "
            f"in = {k} and shift = {shift}, which could reach {largest} > {_INT32}: split the product, in <= 1048 fits "
            "(1040 without a shift)"
        )
