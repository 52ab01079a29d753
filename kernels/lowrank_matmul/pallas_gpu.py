"""The fused product on a Hopper GPU: one pass over x and W, the correction as one more step of the contraction.

A block is one warpgroup with a tile of 128 x 128 sums in registers; x and W stream through shared memory, 64 of K at a time,
four steps in flight (128 KB); the tile of D and A comes after them through the same buffers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu, tuning
from kernels.lowrank_matmul import layout
from kernels.noise_bits import Generated
from kernels.noise_bits.generated import tile as drawn

DTYPES = (jnp.bfloat16,)


def matmul(x: Array, w: Array, right: Array | Generated, left: Array | Generated, scale: Array, dtype) -> Array:
    """See `kernels.lowrank_matmul.api.matmul`. The scaled coefficients and the factors are rounded to bf16."""
    k, n = w.shape
    kind = layout.kind(x, left)
    size = tuning.blocks("lowrank_matmul", "gpu", {"m": 128, "n": 128, "steps": 4}, kind, k=k, n=n)
    laid = layout.in_rows(x, right, left, scale, size["m"])
    pad = lambda a, *fills: jnp.pad(a, [(0, f) for f in fills])
    bk = mosaic_gpu.SWIZZLE // x.dtype.itemsize
    x, w, d = pad(laid.x, 0, -k % bk), pad(w, -k % bk, -n % size["n"]), pad(laid.d, 0, -laid.d.shape[1] % bk)
    blocks = jnp.asarray(laid.blocks)
    if isinstance(laid.left, Generated):
        ids, start = (pad(rows, 0, -rows.shape[1] % bk) for rows in layout.addresses(laid))
        factor = [laid.left.key, ids, start]
    else:
        factor = [pad(laid.left, 0, -laid.left.shape[1] % bk, -n % size["n"])]
    out = _product(x, w, d, blocks, factor, laid.left, dtype, laid.tile, size["n"], bk, size["steps"])
    count = math.prod(laid.lead) * laid.rows
    return out[:count, :n].reshape(*laid.lead, laid.rows, n)


def _product(
    x: Array, w: Array, d: Array, blocks: Array, factor: list[Array], left, dtype, bm: int, bn: int, bk: int, steps: int
) -> Array:
    tiles = mosaic_gpu.tiled(x.dtype)

    def accumulate(acc, left, right, row, column):
        """acc += left[row tile] @ right[:, column tile], streamed."""

        def step(_, left_tile, right_tile):
            plgpu.wgmma(acc, left_tile, right_tile)
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            step,
            grid=(left.shape[1] // bk,),
            in_specs=[
                plgpu.BlockSpec((bm, bk), lambda s: (row, s), transforms=tiles),
                plgpu.BlockSpec((bk, bn), lambda s: (s, column), transforms=tiles),
            ],
            max_concurrent_steps=min(steps, left.shape[1] // bk),
        )(left, right)

    def correct(acc, d, factor, block, row, column, d_tile, a_tile, rows, barrier):
        """acc += D @ A with A made here, a step's worth of its rows at a time."""
        key, *addresses = factor

        def step(i, _):
            part = pl.ds(i * bk, bk)
            copies = [(address.at[block, part], rows.at[j]) for j, address in enumerate(addresses)]
            for source, target in (*copies, (d.at[pl.ds(row * bm, bm), part], d_tile)):
                plgpu.copy_gmem_to_smem(source, target, barrier)
                plgpu.barrier_wait(barrier)
            a_tile[...] = _drawn(left, key, rows, column * bn, (bk, bn)).astype(a_tile.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(acc, d_tile, a_tile)
            plgpu.wgmma_wait(0)

        lax.fori_loop(0, d.shape[1] // bk, step, None)

    def body(x, w, d, blocks, *refs):
        *factor, out, tile, d_tile, a_tile, rows, barrier = refs
        row, column = lax.axis_index("row"), lax.axis_index("column")

        @functools.partial(pl.run_scoped, acc=plgpu.ACC((bm, bn), jnp.float32))
        def _(acc):
            accumulate(acc, x, w, row, column)
            if isinstance(left, Generated):
                correct(acc, d, factor, blocks[row], row, column, d_tile, a_tile, rows, barrier)
            else:
                accumulate(acc, d, factor[0].at[blocks[row]], row, column)
            tile[...] = acc[...].astype(tile.dtype)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(row * bm, bm), pl.ds(column * bn, bn)])
        plgpu.wait_smem_to_gmem(0)

    room = lambda *shape, dtype=x.dtype: plgpu.SMEM(shape, dtype, transforms=mosaic_gpu.tiled(dtype))
    return mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), dtype),
        grid=(x.shape[0] // bm, w.shape[1] // bn),
        grid_names=("row", "column"),
        scratch_types=[
            room(bm, bn, dtype=jnp.dtype(dtype)),
            room(bm, bk),
            room(bk, bn),
            plgpu.SMEM((2, bk), jnp.uint32),
            plgpu.Barrier(),
        ],
    )(x, w, d, blocks, *factor)


def _drawn(left: Generated, key, rows, first, shape: tuple[int, int]) -> Array:
    """Columns from `first` on of a block of factors, in registers."""
    layout_ = plgpu.Layout.WGMMA
    ids, start = (lax.broadcast_in_dim(mosaic_gpu.load(rows.at[i], layout_.reduce(1)), shape, (0,)) for i in range(2))
    n = mosaic_gpu.iota(jnp.uint32, shape, 1, layout_) + first.astype(jnp.uint32)
    return drawn([key[i] for i in range(4)], ids, start + n, left)
