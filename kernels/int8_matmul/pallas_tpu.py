"""The integer product on a TPU: one pass over x and W, the perturbation, division and clip on the sums in registers.

The whole of `in` is one block, at most 1152: with tiles of 256 x 512, x, W and the result take 2 MB of VMEM double-buffered,
the sums and the factors of the rows 1 MB.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning
from kernels.int8_matmul import reference

TILE = 32  # rows of an int8 tile


class Rows(NamedTuple):
    """The rows of all members one below the other, each with the factor A that is its own.

    Attributes:
        x: int8 [R, in], R a multiple of the tile.
        rows: i32 [R / tile, 2, tile], of each row sign (x . B) and the number of its factor in the block.
        left: int8 [F / block, block, out].
        blocks: i32 [R / tile], the block of factors of each tile.
        shape: of the result without its columns; rows beyond are padding.
    """

    x: Array
    rows: Array
    left: Array
    blocks: Array
    shape: tuple[int, ...]

    def result(self, out: Array, n: int) -> Array:
        """Without padding, in the population's axes."""
        return out[: math.prod(self.shape), :n].reshape(*self.shape, n)


def unserved() -> str:
    """Why the TPU at hand cannot run the kernel, or ""."""
    kind = jax.devices()[0].device_kind
    return f"{kind} has no int8 products" if kind.startswith(("TPU v2", "TPU v3", "TPU v4")) else ""


def in_rows(x: Array, right: Array, left: Array, sign: Array, tile: int, sizes: tuple[int, ...]) -> Rows:
    """Lays a product out, with the first of `sizes` for a block of factors that holds those of any tile.

    Where none does, factors are repeated once per row, in blocks of the last size, a multiple of the tile.
    """
    lead = np.broadcast_shapes(x.shape[:-2], right.shape[:-1], left.shape[:-1], sign.shape)
    rows, n = x.shape[-2], left.shape[-1]
    have = np.arange(math.prod(left.shape[:-1]), dtype=np.int32).reshape(left.shape[:-1])
    owners = np.repeat(np.broadcast_to(have, lead), rows)
    left, fill = left.reshape(-1, n), -len(owners) % tile
    place = np.pad(owners, (0, fill), mode="edge")
    tiles = place.reshape(-1, tile)
    block = next((b for b in sizes if (tiles // b == tiles[:, :1] // b).all()), None)
    if block is None:
        block, left, place = sizes[-1], left[owners], np.arange(len(place), dtype=np.int32)
    s = jnp.broadcast_to(reference.coefficient(x, right, sign), (*lead, rows)).reshape(-1)
    x = jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    return Rows(
        jnp.pad(x, ((0, fill), (0, 0))),
        jnp.stack([jnp.pad(s, (0, fill)).reshape(-1, tile), (place % block).reshape(-1, tile)], 1),
        jnp.pad(left, ((0, -len(left) % block), (0, 0))).reshape(-1, block, n),
        jnp.asarray(place[::tile] // block),
        (*lead, rows),
    )


def matmul(x: Array, w: Array, right: Array, left: Array, sign: Array, *, shift: int, divisor: int) -> Array:
    """See `kernels.int8_matmul.api.matmul`."""
    n, k = w.shape
    size = tuning.blocks("int8_matmul", "tpu", {"m": 256, "n": 512}, k=k, n=n)
    bm, bn, depth = size["m"], min(size["n"], tuning.up(n, 128)), tuning.up(k, 128)
    laid = in_rows(x, right, left, sign, bm, (*(b for b in (TILE, 2 * TILE, 4 * TILE) if b < bm), bm))
    block = laid.left.shape[1]
    wide = tuning.up(n, bn)
    pad = lambda a, *to: jnp.pad(a, [(0, size - have) for size, have in zip(to, a.shape, strict=True)])
    out = pl.pallas_call(
        functools.partial(_body, shift=shift, divisor=divisor),
        out_shape=jax.ShapeDtypeStruct((len(laid.x), wide), jnp.int8),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(laid.blocks), wide // bn),
            in_specs=[
                pl.BlockSpec((bm, depth), lambda i, j, blocks: (i, 0)),
                pl.BlockSpec((depth, bn), lambda i, j, blocks: (0, j)),
                pl.BlockSpec((1, 2, bm), lambda i, j, blocks: (i, 0, 0)),
                pl.BlockSpec((1, block, bn), lambda i, j, blocks: (blocks[i], 0, j)),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j, blocks: (i, j)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=dispatch.interpreted(),
    )(
        laid.blocks,
        pad(laid.x, len(laid.x), depth),
        pad(w.T, depth, wide),
        laid.rows,
        pad(laid.left, len(laid.left), block, wide),
    )
    return laid.result(out, n)


def _body(blocks, x, w, rows, left, out, *, shift: int, divisor: int):
    product = functools.partial(jnp.dot, preferred_element_type=jnp.int32)
    by_row = rows[0].T  # here and not in memory, where a column takes the room of 128
    # A row's factor is picked by a product with one 1 in each row: exact, and on the unit that has nothing else to do.
    column = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], left.shape[1]), 1)
    pick = (by_row[:, 1:] == column).astype(jnp.int32).astype(jnp.int8)
    out[...] = reference.finish(product(x[...], w[...]), by_row[:, :1], product(pick, left[0]), shift, divisor)
