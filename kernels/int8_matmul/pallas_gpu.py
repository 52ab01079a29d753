"""The integer product on a Hopper GPU: int8 tensor cores, the perturbation, division and clip on the sums in registers.

A block is one warpgroup with 64 x 128 sums and as many factors in registers, which is half of what a thread has; x and W
stream through shared memory, 128 of `in` at a time. With three steps in flight and the factors a block takes 105 KB: two fit,
and one computes while the other waits. The tensor cores read int8 along the contraction only, so W and A come as [out, ..].
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, mosaic_gpu, tuning
from kernels.int8_matmul import layout, reference

STEP = mosaic_gpu.SWIZZLE  # of the contraction, in bytes and so in numbers


def matmul(x: Array, w: Array, right: Array, left: Array, sign: Array, *, shift: int, divisor: int) -> Array:
    """See `kernels.int8_matmul.api.matmul`."""
    n, k = w.shape
    size = tuning.blocks("int8_matmul", "gpu", {"m": 64, "n": 128, "steps": 3}, "int8", k=k, n=n)
    laid = layout.in_rows(x, right, left, sign, size["m"], STEP)
    pad = lambda a, *fills: jnp.pad(a, [(0, f) for f in fills])
    factors = pad(laid.left.swapaxes(1, 2), 0, -n % size["n"], 0)
    x, w = pad(laid.x, 0, -k % STEP), pad(w, -n % size["n"], -k % STEP)
    product = functools.partial(_product, size["m"], size["n"], size["steps"], shift, divisor)
    return laid.result(product(x, w, laid.rows, factors, laid.blocks), n)


def _product(bm: int, bn: int, steps: int, shift: int, divisor: int, x: Array, w: Array, *rest: Array) -> Array:
    tiles = mosaic_gpu.tiled(x.dtype)
    depth = x.shape[1] // STEP

    def sums(acc, x, w, row, column):
        """acc = x[row tile] @ w[column tile]^T, streamed."""

        def step(_, x_tile, w_tile):
            _multiply(acc, x_tile, w_tile)
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            step,
            grid=(depth,),
            in_specs=[
                plgpu.BlockSpec((bm, STEP), lambda s: (row, s), transforms=tiles),
                plgpu.BlockSpec((bn, STEP), lambda s: (column, s), transforms=tiles),
            ],
            max_concurrent_steps=min(steps, depth),
        )(x, w)
        return acc[...]

    def picked(acc, rows, factors, pick, factor, barrier):
        """The factors of the rows, by a product with one 1 in each row."""
        plgpu.copy_gmem_to_smem(factors, factor, barrier)
        number = column_of(rows.at[1], STEP)
        column = mosaic_gpu.iota(jnp.int32, (bm, STEP), 1, plgpu.Layout.WGMMA)
        pick[...] = (number == column).astype(jnp.int32).astype(jnp.int8)
        plgpu.commit_smem()
        plgpu.barrier_wait(barrier)
        _multiply(acc, pick, factor)
        return acc[...]

    def column_of(row, width):
        return lax.broadcast_in_dim(mosaic_gpu.load(row, plgpu.Layout.WGMMA.reduce(1)), (bm, width), (0,))

    def body(x, w, all_rows, factors, blocks, out, tile, rows, pick, factor, barrier):
        row, column = lax.axis_index("row"), lax.axis_index("column")
        mine, across = pl.ds(row * bm, bm), pl.ds(column * bn, bn)
        plgpu.copy_gmem_to_smem(all_rows.at[row], rows, barrier)
        plgpu.barrier_wait(barrier)
        sum_of = lambda fn, *args: pl.run_scoped(lambda acc: fn(acc, *args), plgpu.ACC((bm, bn), jnp.int32))
        base = sum_of(sums, x, w, row, column)
        a = sum_of(picked, rows, factors.at[blocks[row], across], pick, factor, barrier)
        tile[...] = reference.finish(base, column_of(rows.at[0], bn), a, shift, divisor)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[mine, across])
        plgpu.wait_smem_to_gmem(0)

    room = lambda *shape: plgpu.SMEM(shape, jnp.int8, transforms=tiles)
    return mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.int8),
        grid=(x.shape[0] // bm, w.shape[0] // bn),
        grid_names=("row", "column"),
        scratch_types=[room(bm, bn), plgpu.SMEM((2, bm), jnp.int32), room(bm, STEP), room(bn, STEP), plgpu.Barrier()],
    )(x, w, *rest)


def _multiply(acc, a, b) -> None:
    """acc += a b^T."""
    if not dispatch.interpreted():
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return

    def turned(scratch):  # the interpreter knows of no transposed operand
        scratch[...] = b[...].T
        plgpu.wgmma(acc, a, scratch)

    pl.run_scoped(turned, plgpu.SMEM(b.shape[::-1], b.dtype))
