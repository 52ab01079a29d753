"""How kernels over rows become a function with batching and gradients.

A kernel module has three functions of rows x [R, D], the head W [D, V], tokens i32 [R] (-1: no token) and scale f32 [R], with
z = scale x W and p = softmax(z):

    forward(x, W, tokens, scale) -> log p(token), entropy H, logsumexp z; f32 [R] each
    d_hidden(x, W, *saved, d_logp, d_entropy) -> f32 [R, D]: dz W^T
    d_head(x, W, *saved, d_logp, d_entropy) -> [D, V] in W's type: x^T dz, summed over all rows in f32

where saved = (tokens, scale, logsumexp, H) and dz = scale (d_logp (1[token] - p) - d_entropy p (log p + H)).

The derivative is a linear primitive, whose transpose calls the last two, rather than a `custom_vjp`: `vmap` would make one
[D, V] per sequence out of the backward pass of a `custom_vjp` and sum afterwards, while a linear map is batched first, with the
head still shared, and its transpose then runs over the rows of all sequences.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels.batching import leading


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_prob(kernel: ModuleType, hidden: Array, head: Array, tokens: Array, scale: Array) -> tuple[Array, Array]:
    """(log p(token) [*k, L], entropies [*k, L]) for hidden [*k, L, D], tokens [*k, L], scale [*k], and one head [D, V]."""
    return _forward(kernel, hidden, head, tokens, scale)[:2]


@functools.partial(log_prob.defjvp, symbolic_zeros=True)
def _tangents(kernel, primals, tangents):
    hidden, head, _, scale = primals
    d_hidden, d_head, _, d_scale = tangents
    logp, entropy, logsumexp = _forward(kernel, *primals)
    along = functools.partial(_tangent.bind, *primals, logsumexp, entropy, kernel=kernel)
    parts = [(jnp.zeros_like(logp), jnp.zeros_like(entropy))]
    moves = [] if isinstance(d_hidden, SymbolicZero) else [d_hidden.astype(jnp.float32)]
    if not isinstance(d_scale, SymbolicZero):  # z is linear in scale times hidden
        moves.append((d_scale / scale)[..., None, None] * hidden.astype(jnp.float32))
    if moves:
        parts.append(along(sum(moves), wrt="hidden"))
    if not isinstance(d_head, SymbolicZero):
        parts.append(along(d_head, wrt="head"))
    return (logp, entropy), tuple(map(sum, zip(*parts, strict=True)))


def _forward(kernel: ModuleType, hidden: Array, head: Array, tokens: Array, scale: Array) -> tuple[Array, ...]:
    def call(head, hidden, tokens, scale):
        lead, (hidden, tokens, scale) = _rows(hidden, tokens, scale)
        return tuple(x.reshape(lead) for x in kernel.forward(hidden, head, tokens, scale))

    return leading(call, [True])(head, hidden, tokens, scale)


def _rows(hidden: Array, *numbers: Array) -> tuple[tuple[int, ...], list[Array]]:
    """[*k, L], and the operands of all rows one below the other; numbers [*k, L] or [*k]."""
    numbers = [x if x.ndim == hidden.ndim - 1 else x[..., None] for x in numbers]
    lead = jnp.broadcast_shapes(hidden.shape[:-1], *(x.shape for x in numbers))
    flat = [jnp.broadcast_to(x, lead).reshape(-1) for x in numbers]
    return lead, [jnp.broadcast_to(hidden, (*lead, hidden.shape[-1])).reshape(-1, hidden.shape[-1]), *flat]


_tangent = Primitive("token_logprob_tangent")
_tangent.multiple_results = True


@_tangent.def_impl
def _no_forward_mode(*operands, kernel, wrt):
    raise NotImplementedError(
        "log_prob of a kernel has reverse-mode derivatives alone: use implementation='reference' for jax.jvp or jacfwd"
    )


@_tangent.def_abstract_eval
def _shapes(hidden, head, tokens, scale, logsumexp, entropy, along, *, kernel, wrt):
    return [ShapedArray(logsumexp.shape, logsumexp.dtype)] * 2


def _transpose(cotangents, hidden, head, tokens, scale, logsumexp, entropy, along, *, kernel, wrt):
    """Leading axes at this point are summed over in the head's gradient; those that a later `vmap` adds are not."""
    fill = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if isinstance(x, ad.Zero) else x
    numbers = (tokens, scale, logsumexp, entropy, *map(fill, cotangents))

    def of_hidden(head, hidden, *numbers):
        lead, (rows, *flat) = _rows(hidden, *numbers)
        return kernel.d_hidden(rows, head, *flat).reshape(*lead, rows.shape[1])

    def of_head(head, hidden, *numbers):
        _, (rows, *flat) = _rows(hidden, *numbers)
        return kernel.d_head(rows, head, *flat)

    fn = leading(of_hidden, [True]) if wrt == "hidden" else sequential_vmap(of_head)
    return [None] * 6 + [fn(head, hidden, *numbers)]


def _batch(args, axes, *, kernel, wrt):
    """As `leading`: all sequences' rows in one call where they share the head, else one call after the other."""
    (size,) = {x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None}
    args = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes, strict=True)]
    batched = [a is not None for a in axes]
    bind = functools.partial(_tangent.bind, kernel=kernel, wrt=wrt)
    shared = {1} if wrt == "hidden" else {1, 6}  # the head, and its tangent
    if any(batched[i] for i in shared):
        over = [x for x, b in zip(args, batched, strict=True) if b]

        def one(parts):
            parts = iter(parts)
            return bind(*(next(parts) if b else x for x, b in zip(args, batched, strict=True)))

        return jax.lax.map(one, over), [0, 0]
    args = [x if b or i in shared else x[None] for i, (x, b) in enumerate(zip(args, batched, strict=True))]
    full = lambda x: jnp.broadcast_to(x, (size, *x.shape[1:]))
    args[4:6] = map(full, args[4:6])  # what the results are shaped like
    if wrt == "hidden":
        args[6] = full(args[6])  # its transpose sums over the sequences that share it
    return bind(*args), [0, 0]


mlir.register_lowering(_tangent, mlir.lower_fun(_no_forward_mode, multiple_results=True))
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _batch
