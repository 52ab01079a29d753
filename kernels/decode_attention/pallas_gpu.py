"""Attention of one token per slot on a Hopper GPU: every slot reads its cache up to its own length, once.

A block is one warpgroup with one key-value head of one slot. Its query heads are rows of a tensor-core product, which has 64 at
least: rows beyond are whatever is there, none meets another. 64 positions of keys and of values at a time stream through shared
memory, three of each in flight: 96 KB at a head size of 128, so that two blocks share a multiprocessor and one streams while
the other starts or ends. Scores, weights and sums stay in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, mosaic_gpu, tuning
from kernels.decode_attention import layout

DTYPES = (jnp.bfloat16,)
_POSITIONS = 64  # of a step: a row of a swizzled tile
_ROWS = 64
_LOWEST = float(jnp.finfo(jnp.float32).min)


def limits(q: tuple[int, ...], k: tuple[int, ...]) -> str:
    """Why the kernel cannot serve q [H, D] and k [G, D, T], or ""."""
    (heads, size), (groups, _, room) = q, k
    if size not in (64, 128):
        return f"head sizes are 64 or 128: tiles of 64, and sums of two in registers; got {size}"
    if room % _POSITIONS:
        return f"a cache is copied in tiles of {_POSITIONS} positions, so its room is a multiple of that; got {room}"
    if heads > _ROWS * groups:
        return f"at most {_ROWS} heads share a key-value head: what a product has rows; got {heads // groups}"
    return ""


def attend(q: Array, k: Array, v: Array, length: Array) -> Array:
    """See `kernels.decode_attention.api.attend`; leading axes as `kernels.batching.leading` adds them."""
    laid = layout.in_slots(q, k, v, length)
    slots, groups, rows, size = laid.q.shape
    steps = tuning.blocks(
        "decode_attention", "gpu", {"steps": 3}, k.dtype.name, groups=groups, size=size, room=k.shape[-1]
    )["steps"]
    padded = jnp.pad(laid.q, ((0, 0), (0, 0), (0, -rows % 8), (0, 0)))
    tiles = mosaic_gpu.tiled(k.dtype)

    def body(q, k, v, length, owner, out, tile, barrier):
        slot, head = lax.axis_index("slot"), lax.axis_index("head")
        count, cache, mine = length[slot], owner[slot], tile.at[pl.ds(0, padded.shape[2])]
        plgpu.copy_gmem_to_smem(q.at[slot, head], mine, barrier)
        plgpu.barrier_wait(barrier)
        block = plgpu.BlockSpec((None, None, size, _POSITIONS), lambda t: (cache, head, 0, t), transforms=tiles)
        row = plgpu.Layout.WGMMA.reduce(1)
        acc, _, total = plgpu.emit_pipeline(
            functools.partial(_step, tile, count),
            grid=(pl.cdiv(count, jnp.int32(_POSITIONS)),),
            in_specs=[block, block],
            max_concurrent_steps=steps,
            init_carry=(
                _full((_ROWS, size), 0, plgpu.Layout.WGMMA),
                _full((_ROWS,), _LOWEST, row),
                _full((_ROWS,), 0, row),
            ),
        )(k, v)
        total = jnp.where(total == 0, 1.0, total)
        tile[...] = (acc / lax.broadcast_in_dim(total, acc.shape, (0,))).astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[slot, head])
        plgpu.wait_smem_to_gmem(0)

    out = mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(padded.shape, v.dtype),
        grid=(slots, groups),
        grid_names=("slot", "head"),
        scratch_types=[plgpu.SMEM((_ROWS, size), k.dtype, transforms=tiles), plgpu.Barrier()],
    )(padded, laid.k, laid.v, laid.length, jnp.asarray(laid.owner))
    return laid.heads(out)


def _step(q, count, index, k, v, carry):
    """One block of positions; carried: sums of weighted values [64, D], the largest score and the sum of weights [64]."""
    acc, top, total = carry
    left = count - index[0] * _POSITIONS

    @pl.when(left < _POSITIONS)
    def _():  # the last block: a weight of zero does not hide a NaN
        at = mosaic_gpu.iota(jnp.int32, v.shape, 1, plgpu.Layout.WGMMA)
        values = mosaic_gpu.load(v, plgpu.Layout.WGMMA)
        v[...] = jnp.where(at < left, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    scores = _product(q, k) * q.shape[1] ** -0.5
    at = mosaic_gpu.iota(jnp.int32, scores.shape, 1, plgpu.Layout.WGMMA)
    scores = jnp.where(at < left, scores, _LOWEST)
    peak = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp(scores - lax.broadcast_in_dim(peak, scores.shape, (0,)))
    shrink = jnp.exp(top - peak)
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, (0,)) + _product(weights.astype(v.dtype), v, transposed=True)
    return acc, peak, total


def _product(a, b, transposed: bool = False) -> Array:
    """a b, or a b^T, of references (a may be in registers), in registers in f32."""
    if transposed and dispatch.interpreted():  # which has no transposed operands, nor a first one in registers
        return jnp.dot(a, b[...].T, preferred_element_type=jnp.float32)
    b = b.transpose((1, 0)) if transposed else b

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _full(shape: tuple[int, ...], value: float, layout) -> Array:
    """In registers of this layout, which the interpreter does not know of."""
    full = jnp.full(shape, value, jnp.float32)
    return full if dispatch.interpreted() else plgpu.layout_cast(full, layout)
