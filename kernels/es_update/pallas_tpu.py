"""The estimate's contraction on a TPU, with factors read or made in the tile.

A tile of 512 x 1024 sums stays in VMEM (2 MB, twice) while the terms pass by, 128 at a time (0.25 and 0.5 MB of factors, and
some ten times that while they are made): inside the 16 MB that a kernel gets on every generation. A factor made here is made
for every tile that reads it, n / 1024 times a left one and m / 512 times a right one: hence tiles as large as fit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning
from kernels.es_update import layout
from kernels.noise_bits import Generated, reference
from kernels.noise_bits.generated import tile

DTYPES = (jnp.float32,)
_LANES = reference.LANES
_SHARED = 4 * _LANES  # elements of 128 blocks: four words each


def update(weights: Array, left: Array | Generated, right: Array | Generated) -> Array:
    """One matrix of `kernels.es_update.api.update`, with leading axes.

    Args:
        weights, left, right: as for `layout.terms`.

    Returns:
        f32 [*B, m, n].
    """
    m, n = left.shape[-1], right.shape[-1]
    count = weights.shape[-3] * weights.shape[-2] * left.shape[-2]
    kind = " ".join(f.kind if isinstance(f, Generated) else "stored" for f in (left, right))
    size = tuning.blocks("es_update", "tpu", {"m": 512, "n": 1024, "terms": 128}, kind, m=m, n=n, terms=count)
    bm, bn, bc = (
        min(size[of], tuning.up(have, by)) for of, have, by in (("m", m, 128), ("n", n, 128), ("terms", count, 8))
    )
    laid = layout.terms(weights, left, right, bc)
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in laid))

    def spec(x: Array, block: tuple, place: Callable) -> pl.BlockSpec:
        index = lambda *g: (*(i if have > 1 else 0 for i, have in zip(g, x.shape[:-2], strict=False)), *place(*g[-3:]))
        return pl.BlockSpec((*[None] * len(lead), *block), index)

    def operand(x: Array, factor, width: int, place: Callable):
        """How a factor comes into the kernel, and how its tile comes of that."""
        if x.dtype == jnp.float32:
            return spec(x, (bc, width), place), lambda number, ref: ref[...]
        rows = spec(x, (bc, layout.ELEMENT.stop), lambda i, j, s: (s, 0))
        return rows, lambda number, ref: made(factor, ref[...], (number * width).astype(jnp.uint32), width)

    left_spec, left_tile = operand(laid.left, left, bm, lambda i, j, s: (s, i))
    right_spec, right_tile = operand(laid.right, right, bn, lambda i, j, s: (s, j))

    def body(weight, left, right, out):
        row, column, step = (pl.program_id(len(lead) + axis) for axis in range(3))

        @pl.when(step == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        out[...] += lax.dot_general(
            left_tile(row, left),
            weight[...] * right_tile(column, right),
            (((0,), (0,)), ((), ())),
            precision="highest",
            preferred_element_type=jnp.float32,
        )

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((*lead, m, n), jnp.float32),
        grid=(*lead, pl.cdiv(m, bm), pl.cdiv(n, bn), laid.weight.shape[-2] // bc),
        in_specs=[spec(laid.weight, (bc, 1), lambda i, j, s: (s, 0)), left_spec, right_spec],
        out_specs=pl.BlockSpec((*[None] * len(lead), bm, bn), lambda *g: g[:-1]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(*["parallel"] * (len(lead) + 2), "arbitrary")),
        interpret=dispatch.interpreted(),
    )(*laid)


def made(factor: Generated, address: Array, start: Array, width: int) -> Array:
    """Numbers [start, start + width) of every row of a tile, f32 [rows, width].

    Columns beyond the factor's size hold numbers of no meaning: they end outside the result.

    Args:
        factor: what they are of; its arrays are not read.
        address: u32 [rows, 6], see `layout.Terms`.
        start: u32, column of the first, a multiple of the width.
    """
    key = [address[:, i : i + 1] for i in range(layout.KEY.stop)]
    ids, first = address[:, layout.IDENTITY], address[:, layout.ELEMENT] + start
    within = lambda count: lax.broadcasted_iota(jnp.uint32, (address.shape[0], count), 1)
    stream = (ids, np.uint32(factor.layer), np.uint32(factor.role))
    if factor.kind == "gaussian" and factor.size % _SHARED == width % _SHARED == 0:
        words = reference.threefry4x32(key, [first // np.uint32(4) + within(width // 4), *stream])
        groups = [word[:, at : at + _LANES] for at in range(0, width // 4, _LANES) for word in words]
        return reference.gaussian(jnp.concatenate(groups, axis=1), reference.ones_of_16)
    if factor.kind == "rademacher" and factor.size % 32 == width % _LANES == 0 and width <= 32 * _LANES:
        words = reference.words_at(key, stream, first // np.uint32(32) + within(_LANES))
        at = lambda column: ((np.uint32(column) + within(_LANES)) // np.uint32(32)).astype(jnp.int32)
        groups = [
            jnp.take_along_axis(words, at(column), axis=1, mode="promise_in_bounds")
            for column in range(0, width, _LANES)
        ]
        bit = (jnp.concatenate(groups, axis=1) >> within(width) % np.uint32(32)) & np.uint32(1)
        return lax.bitcast_convert_type((bit << np.uint32(31)) | np.uint32(0x3F800000), jnp.float32)
    return tile(key, ids, first + within(width), factor)
