"""What callers import."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kernels import batching, dispatch
from kernels.es_update import reference
from kernels.noise_bits import Generated

_KERNELS = ("pallas_tpu", "pallas_gpu")
Factors = Array | Generated | Sequence[Generated]


def update(weights: Array, left: Factors, right: Factors, *, implementation: str | None = None) -> Array:
    """Sum over members of weight_gij * (sum_k left_gi,k right_gj,k^T), one matrix per stacked index.

    Two contractions, F R first and then L^T (F R): 2 G P Q r n + 2 G P r m n operations for a crossed block of P x Q
    members, against 2 G P Q r m n for the sum written out.

    Args:
        weights: [G, P, Q], shaped fitness per direction.
        left: [G, P, stacked, r, m], output-side factors of the rows. Or their addresses, with ids [G, P], one per stacked
            index (or one alone): drawn here, or on a TPU made in the kernel's tiles and never stored.
        right: [G, Q, stacked, r, n], input-side factors of the columns. Or their addresses, with ids [G, Q]; those of crossed
            members, few as they are, are drawn everywhere.
        implementation: see `kernels.use`; the kernels take f32.

    Returns:
        [stacked, m, n] in the operands' type (f32 or f64).

    Raises:
        ValueError: shapes that do not fit, a named kernel that cannot serve.
    """
    left, right = _layers(left), _layers(right)
    left_shape, right_shape = _shape(left), _shape(right)
    if (
        (weights.ndim, len(left_shape)) != (3, 5)
        or left_shape != (*weights.shape[:2], *left_shape[2:])
        or right_shape != (weights.shape[0], weights.shape[2], *left_shape[2:4], right_shape[-1])
    ):
        raise ValueError(
            f"update needs weights [G, P, Q], left [G, P, S, r, m] and right [G, Q, S, r, n]; got {weights.shape}, "
            f"{left_shape} and {right_shape}"
        )
    chosen = _choose(weights, left, right, implementation)
    if chosen == "reference":
        return reference.update(weights, left, right)
    return _by(dispatch.module("es_update", chosen).update, weights, left, right)


def serves(dtype: jnp.dtype, implementation: str | None = None) -> bool:
    """Whether `update` in this type would run a kernel: for callers that have addresses or factors to give."""

    def unserved(name):
        taken = map(jnp.dtype, dispatch.module("es_update", name).DTYPES)
        return "" if dtype in taken else f"it does not take {dtype}"

    limits = {name: functools.partial(unserved, name) for name in _KERNELS}
    return dispatch.choose("es_update", f"addresses, {jnp.dtype(dtype).name}", limits, implementation) != "reference"


def _layers(factors: Factors) -> Array | tuple[Generated, ...]:
    if isinstance(factors, Generated):
        return (factors,)
    return tuple(factors) if isinstance(factors, list) else factors


def _shape(factors) -> tuple[int, ...]:
    """[G, members, stacked, r, elements]."""
    if not isinstance(factors, tuple):
        return factors.shape
    shapes = {f.shape for f in factors}
    if len(shapes) != 1:
        raise ValueError(f"addresses of a stack are one per index, at least one, all of one shape; got shapes {shapes}")
    *members, rank, elements = shapes.pop()
    return (*members, len(factors), rank, elements)


def _choose(weights: Array, left, right, implementation: str | None) -> str:
    sizes = (*weights.shape, *_shape(left)[2:], _shape(right)[-1])
    made = [f[0].kind if isinstance(f, tuple) else "stored" for f in (left, right)]
    dtype = jnp.result_type(weights, *(f for f in (left, right) if not isinstance(f, tuple)))
    shape = f"[G, P, Q, S, r, m, n] = {list(sizes)}, {' and '.join(made)} factors, {dtype.name}"

    def unserved(name):
        kernel = dispatch.module("es_update", name)
        if dtype not in kernel.DTYPES:
            return f"it takes {', '.join(jnp.dtype(d).name for d in kernel.DTYPES)}"
        return "" if all(sizes) else "there is nothing to sum"

    limits = {name: functools.partial(unserved, name) for name in _KERNELS}
    return dispatch.choose("es_update", shape, limits, implementation)


def _by(fn: Callable, weights: Array, left, right) -> Array:
    """Every stacked index by a kernel of one matrix: one call for stored factors, one an index for addresses."""

    def one(weights, left, right):
        parts, tree = jax.tree.flatten((left, right))
        own = batching.leading(lambda weights, *parts: fn(weights, *tree.unflatten(parts)))
        return batching.differentiable(own, lambda weights, *parts: plain(weights, *tree.unflatten(parts)))(
            weights, *parts
        )

    def plain(weights, *sides):
        return reference.update(weights, *((f,) if isinstance(f, Generated) else f[:, :, None] for f in sides))[0]

    wide = lambda x: x if isinstance(x, tuple) else jnp.asarray(x, jnp.float32)
    weights, left, right = wide(weights), wide(left), wide(right)
    if not any(isinstance(f, tuple) for f in (left, right)):
        return jax.vmap(one, (None, 2, 2))(weights, left, right)
    at = lambda f, s: f[s] if isinstance(f, tuple) else f[:, :, s]
    return jnp.stack([one(weights, at(left, s), at(right, s)) for s in range(_shape(left)[2])])
