"""What transformations make of a kernel: under `vmap` one call with more rows, under `grad` the reference's gradient."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap


def leading(fn: Callable[..., Array | tuple[Array, ...]], fixed: Sequence[bool] = ()) -> Callable:
    """fn, whose `vmap` adds a leading axis to its operands and calls it once.

    Under k nested vmaps fn sees k leading axes on every operand, outermost first, of size 1 where the operand is the same for
    all: which operands share what is read off the sizes. Results have all k axes in full.

    Args:
        fn: (*operands, each with the same number of leading axes) -> an array or several.
        fixed: per operand, whether it has no leading axes, ever (a weight that all members share); one that is batched after
            all makes `vmap` a loop over fn.
    """

    @custom_vmap
    def call(*operands):
        return fn(*operands)

    @call.def_vmap
    def rule(axis_size, batched, *operands):
        still = [*fixed, *[False] * (len(operands) - len(fixed))]
        if any(b and f for b, f in zip(batched, still, strict=True)):
            axes = [0 if b else None for b in batched]
            out = jax.lax.map(
                lambda i: leading(fn, fixed)(*(x if a is None else x[i] for x, a in zip(operands, axes, strict=True))),
                jnp.arange(axis_size),
            )
        else:
            lifted = [x if b or f else x[None] for x, b, f in zip(operands, batched, still, strict=True)]
            out = leading(fn, fixed)(*lifted)
            full = lambda y: jnp.broadcast_to(y, (axis_size, *y.shape[1:]))  # all operands the same for all
            out = jax.tree.map(full, out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def differentiable(fn: Callable, reference: Callable) -> Callable:
    """fn with the gradient of its reference, which computes anew what it needs; reverse mode alone."""

    @jax.custom_vjp
    def call(*operands):
        return fn(*operands)

    call.defvjp(
        lambda *operands: (fn(*operands), operands), lambda operands, bar: jax.vjp(reference, *operands)[1](bar)
    )
    return call
