"""Tiles of scores on a Hopper GPU, in registers: the forward pass alone is a kernel.

A block is one warpgroup with `m` rows, for which the vocabulary passes by in tiles of 128 x 128 scores; x and the head stream
through shared memory, 64 of D at a time, four steps in flight (128 KB). The gradient is plain JAX over blocks of the
vocabulary, whose scores it makes again: its sums, [rows, D] or [D, columns], are far larger than the registers of a warpgroup,
and a block's matrix products are large ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu, tuning

DTYPES = (jnp.bfloat16,)
_SCORES = 2**26  # of a block of the vocabulary in the gradient: 256 MiB in f32
_TILE = plgpu.Layout.WGMMA
_LOWEST = -1e30  # exp gives 0, and products with that 0 too, unlike -inf


def unserved(d: int, v: int, dtype: jnp.dtype) -> str:
    """Why this head cannot be served: any can."""
    return ""


def forward(x: Array, w: Array, tokens: Array, scale: Array) -> tuple[Array, Array, Array]:
    """See `kernels.token_logprob.gradient`. A head with V no multiple of `n`, or D of 64, is copied with zeros at its end."""
    (rows, d), v = x.shape, w.shape[1]
    size = tuning.blocks("token_logprob", "gpu", {"m": 128, "n": 128, "steps": 4}, x.dtype.name, d=d, v=v)
    m, n, k = size["m"], size["n"], mosaic_gpu.SWIZZLE // x.dtype.itemsize
    fill = tuning.up(max(rows, 1), m) - rows
    x, w = jnp.pad(x, ((0, fill), (0, -d % k))), jnp.pad(w, ((0, -d % k), (0, -v % n)))
    column = jax.ShapeDtypeStruct((rows + fill,), jnp.float32)
    chosen, entropy, logsumexp = mosaic_gpu.kernel(
        functools.partial(_forward, v, m, n, k, min(size["steps"], x.shape[1] // k)),
        out_type=[column] * 3,
        grid=(len(x) // m,),
        grid_names=("row",),
        scratch_types=[plgpu.SMEM((m,), t) for t in (jnp.int32, *[jnp.float32] * 4)] + [plgpu.Barrier(num_barriers=2)],
    )(x, w, jnp.pad(tokens, (0, fill)), jnp.pad(scale, (0, fill)))
    return jnp.where(tokens >= 0, chosen[:rows], jnp.nan), entropy[:rows], logsumexp[:rows]


def _forward(v, m, n, k, steps, x, w, tokens, scale, *refs):
    """Per row, of the tiles so far: the highest z, sum exp(z - high), sum exp(z - high) (z - high), and the token's z."""
    outs, (tokens_here, scale_here, *parts, barrier) = refs[:3], refs[3:]
    mine = pl.ds(lax.axis_index("row") * m, m)
    for i, (there, here) in enumerate(((tokens, tokens_here), (scale, scale_here))):
        plgpu.copy_gmem_to_smem(there.at[mine], here, barrier.at[i])
        plgpu.barrier_wait(barrier.at[i])
    tokens, scale = (mosaic_gpu.load(here, _TILE.reduce(1)) for here in (tokens_here, scale_here))
    spread = lambda row: lax.broadcast_in_dim(row, (m, n), (0,))

    def tile(j, carry):
        high, total, mean, chosen = carry
        z = _product(x.at[mine], w.at[:, pl.ds(j * n, n)], m, n, k, steps) * spread(scale)
        column = mosaic_gpu.iota(jnp.int32, (m, n), 1, _TILE) + j * n
        z = jnp.where(column < v, z, _LOWEST)
        now = jnp.maximum(high, z.max(1))
        z0 = z - spread(now)
        e, shrink = jnp.exp(z0), jnp.exp(high - now)
        mean = shrink * (mean + (high - now) * total) + (e * z0).sum(1)
        total = shrink * total + e.sum(1)
        return now, total, mean, chosen + jnp.where(column == spread(tokens), z, 0.0).sum(1)

    none = 0 * scale  # zeros in the registers of rows
    high, total, mean, chosen = lax.fori_loop(0, w.shape[1] // n, tile, (none + _LOWEST, none, none, none))
    log_total = jnp.log(total)
    for part, value in zip(parts, (chosen - high - log_total, log_total - mean / total, high + log_total), strict=True):
        part[...] = value
    plgpu.commit_smem()
    for part, out in zip(parts, outs, strict=True):
        plgpu.copy_smem_to_gmem(part, out.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _product(x, w, m: int, n: int, k: int, steps: int) -> Array:
    """x [m, D] @ w [D, n], both in global memory, in registers."""
    tiles = mosaic_gpu.tiled(x.dtype)

    def product(acc):
        def step(_, x_tile, w_tile):
            plgpu.wgmma(acc, x_tile, w_tile)
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            step,
            grid=(x.shape[1] // k,),
            in_specs=[
                plgpu.BlockSpec((m, k), lambda s: (0, s), transforms=tiles),
                plgpu.BlockSpec((k, n), lambda s: (s, 0), transforms=tiles),
            ],
            max_concurrent_steps=steps,
        )(x, w)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((m, n), jnp.float32))


# -- gradient --------------------------------------------------------------------------------------------------------


def d_hidden(x: Array, w: Array, *numbers: Array) -> Array:
    """See `kernels.token_logprob.gradient`."""

    def add(total, start, columns, dz):
        return total + jnp.matmul(dz, columns.T, preferred_element_type=jnp.float32)

    return _over_vocabulary(add, jnp.zeros(x.shape, jnp.float32), x, w, *numbers)


def d_head(x: Array, w: Array, *numbers: Array) -> Array:
    """See `kernels.token_logprob.gradient`."""

    def put(total, start, columns, dz):
        block = jnp.matmul(x.T, dz, preferred_element_type=jnp.float32).astype(w.dtype)
        there = lax.dynamic_slice(total, (0, start), block.shape)
        return lax.dynamic_update_slice(total, there + block, (0, start))

    return _over_vocabulary(put, jnp.zeros(w.shape, w.dtype), x, w, *numbers)


def _over_vocabulary(step, total, x, w, tokens, scale, logsumexp, entropy, d_logp, d_entropy) -> Array:
    """step(total, first column, columns of w, their dz) for blocks of equal width; dz is 0 where the last repeats columns."""
    v = w.shape[1]
    width = min(v, max(128, _SCORES // max(len(x), 1)))
    rows = lambda a: a[:, None]

    def one(i, total):
        start = jnp.minimum(i * width, v - width)
        columns = lax.dynamic_slice(w, (0, start), (len(w), width))
        column = start + jnp.arange(width)
        log_p = jnp.matmul(x, columns, preferred_element_type=jnp.float32) * rows(scale) - rows(logsumexp)
        p = jnp.exp(log_p)
        dz = rows(d_logp) * ((column == rows(tokens)) - p) - rows(d_entropy) * p * (log_p + rows(entropy))
        return step(total, start, columns, jnp.where(column < i * width, 0, rows(scale) * dz).astype(x.dtype))

    return lax.fori_loop(0, -(-v // width), one, total)
