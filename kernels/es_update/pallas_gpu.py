"""The estimate's contraction on a Hopper GPU: bf16 products of factors split in two, summed in f32.

x = high + low, both bf16, is x to 2^-18 of it; of the four products of two such sums the one of the low parts, 2^-18 again, is
left out. A term is then right to about 2^-16, with random sign, where one bf16 product would be to 2^-8. Rademacher factors
are bf16 numbers: two products are enough.

A block is one warpgroup with a tile of 128 x 128 sums in registers. Up to four parts of 64 terms, 16 KB each, stream through
shared memory, two steps in flight (128 KB); the result leaves by 64 KB more.

Addresses are drawn before, each factor once. Made in the tile, every factor would be hashed again for every 128 columns of the
result, 32 times at 4096, by units that have a fraction of the tensor cores' rate: the hashing would take longer than the
contraction does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu, tuning
from kernels.es_update import layout
from kernels.noise_bits import Generated

DTYPES = (jnp.float32,)


def update(weights: Array, left: Array | Generated, right: Array | Generated) -> Array:
    """One matrix of `kernels.es_update.api.update`, with leading axes.

    Args:
        weights, left, right: as for `layout.terms`.

    Returns:
        f32 [*B, m, n].
    """
    m, n = left.shape[-1], right.shape[-1]
    terms = weights.shape[-3] * weights.shape[-2] * left.shape[-2]
    exact = isinstance(left, Generated) and left.kind == "rademacher"
    size = tuning.blocks(
        "es_update", "gpu", {"m": 128, "n": 128, "steps": 2}, "exact" if exact else "split", m=m, n=n, terms=terms
    )
    bk = mosaic_gpu.SWIZZLE // 2
    stored = lambda f: layout.drawn(f) if isinstance(f, Generated) else f
    laid = layout.terms(weights, stored(left), stored(right), bk)
    wide = lambda x, block: jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % block)])
    lefts = _parts(jnp.swapaxes(wide(laid.left, size["m"]), -1, -2))[: 1 if exact else 2]
    rights = _parts(wide(laid.weight * laid.right, size["n"]))
    return _contract(lefts, rights, size["m"], size["n"], bk, size["steps"])[..., :m, :n]


def _parts(x: Array) -> list[Array]:
    """bf16 parts of f32 numbers: the rounded number and what rounding left."""
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a pair of casts would be optimised away
    return [high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)]


def _contract(lefts: list[Array], rights: list[Array], bm: int, bn: int, bk: int, steps: int) -> Array:
    """Sum of left [*B, m, C] right [*B, C, n] over the pairs of parts but that of both low ones."""
    lead = np.broadcast_shapes(lefts[0].shape[:-2], rights[0].shape[:-2])
    (m, count), n = lefts[0].shape[-2:], rights[0].shape[-1]
    tiles = mosaic_gpu.tiled(lefts[0].dtype)
    names = (*(f"lead{axis}" for axis in range(len(lead))), "row", "column")

    def body(*refs, tile):
        *parts, out = refs
        *batch, row, column = (lax.axis_index(name) for name in names)
        at = lambda x: x.at[tuple(i if have > 1 else 0 for i, have in zip(batch, x.shape[:-2], strict=True))]

        @functools.partial(pl.run_scoped, acc=plgpu.ACC((bm, bn), jnp.float32))
        def _(acc):
            def step(_, *parts):
                left, right = parts[: len(lefts)], parts[len(lefts) :]
                for i, j in [(0, 0), (0, 1), (1, 0)][: len(lefts) + 1]:
                    plgpu.wgmma(acc, left[i], right[j])
                plgpu.wgmma_wait(0)

            specs = [plgpu.BlockSpec((bm, bk), lambda s: (row, s), transforms=tiles) for _ in lefts]
            specs += [plgpu.BlockSpec((bk, bn), lambda s: (s, column), transforms=tiles) for _ in rights]
            plgpu.emit_pipeline(
                step, grid=(count // bk,), in_specs=specs, max_concurrent_steps=min(steps, count // bk)
            )(*map(at, parts))
            tile[...] = acc[...]

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[(*batch, pl.ds(row * bm, bm), pl.ds(column * bn, bn))])
        plgpu.wait_smem_to_gmem(0)

    return mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*lead, m, n), jnp.float32),
        grid=(*lead, m // bm, n // bn),
        grid_names=names,
        scratch_types={"tile": plgpu.SMEM((bm, bn), jnp.float32, transforms=mosaic_gpu.tiled(jnp.dtype(jnp.float32)))},
    )(*lefts, *rights)
