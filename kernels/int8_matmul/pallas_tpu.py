"""The integer product on a TPU: one pass over x and W, the perturbation, division and clip on the sums in registers.

The whole of `in` is one block, at most 1152: with tiles of 256 x 512, x, W and the result take 2 MB of VMEM double-buffered,
the sums and the factors of the rows 1 MB.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning
from kernels.int8_matmul import layout, reference


def unserved() -> str:
    """Why the TPU at hand cannot run the kernel, or ""."""
    kind = jax.devices()[0].device_kind
    return f"{kind} has no int8 products" if kind.startswith(("TPU v2", "TPU v3", "TPU v4")) else ""


def matmul(x: Array, w: Array, right: Array, left: Array, sign: Array, *, shift: int, divisor: int) -> Array:
    """See `kernels.int8_matmul.api.matmul`."""
    n, k = w.shape
    size = tuning.blocks("int8_matmul", "tpu", {"m": 256, "n": 512}, "int8", k=k, n=n)
    bm, bn, depth = size["m"], min(size["n"], tuning.up(n, 128)), tuning.up(k, 128)
    laid = layout.in_rows(x, right, left, sign, bm, layout.TILE)
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
