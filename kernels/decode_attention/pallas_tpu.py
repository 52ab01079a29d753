"""Attention of one token per slot on a TPU: every slot reads its cache up to its own length, once.

A block of the cache is 512 positions of as many key-value heads as fit in 1 MB; of keys and values two of each are in VMEM, one
at work and one on its way (4 MB). The heads of a block are one batched product, so that a step moves enough to hide its start.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning
from kernels.decode_attention import layout

DTYPES = (jnp.bfloat16, jnp.float32)
_ROWS = 16  # query rows are padded to what a tile of bf16 has
_BLOCK = 2**20  # bytes
_LARGEST = 512


def limits(q: tuple[int, ...], k: tuple[int, ...]) -> str:
    """Why the kernel cannot serve q [H, D] and k [G, D, T], or ""."""
    return f"head sizes go up to {_LARGEST}: a block has them whole; got {q[1]}" if q[1] > _LARGEST else ""


def attend(q: Array, k: Array, v: Array, length: Array) -> Array:
    """See `kernels.decode_attention.api.attend`; leading axes as `kernels.batching.leading` adds them.

    A block spans the head size whole, and the last one may reach beyond the cache: what is there is masked like what is beyond
    the length. So a cache of any size is read as it is, never padded, which would copy it.
    """
    laid = layout.in_slots(q, k, v, length)
    slots, groups, rows, size = laid.q.shape
    room = k.shape[-1]
    tuned = tuning.blocks(
        "decode_attention", "tpu", {"t": 512, "bytes": _BLOCK}, k.dtype.name, groups=groups, size=size, room=room
    )
    bt = min(tuned["t"], room)
    most = max(1, tuned["bytes"] // (size * bt * k.dtype.itemsize))
    heads = max(h for h in range(1, min(groups, most) + 1) if groups % h == 0)
    padded = jnp.pad(laid.q, ((0, 0), (0, 0), (0, -rows % _ROWS), (0, 0)))

    def cache(slot, head, step, length, owner):
        last = jnp.maximum(pl.cdiv(length[slot], bt) - 1, 0)  # steps beyond stay there: no block is fetched twice
        return owner[slot], head, 0, jnp.minimum(step, last)

    mine = pl.BlockSpec((1, heads, *padded.shape[2:]), lambda slot, head, step, *_: (slot, head, 0, 0))
    kept = lambda columns: pltpu.VMEM((heads, padded.shape[2], columns), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_body, "highest" if k.dtype == jnp.float32 else None),
        out_shape=jax.ShapeDtypeStruct(padded.shape, v.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, groups // heads, pl.cdiv(room, bt)),
            in_specs=[mine, *[pl.BlockSpec((1, heads, size, bt), cache)] * 2],
            out_specs=mine,
            scratch_shapes=[kept(1), kept(1), kept(size)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=dispatch.interpreted(),
    )(laid.length, jnp.asarray(laid.owner), padded, laid.k, laid.v)
    return laid.heads(out)


def _body(precision, length, owner, q, k, v, out, top, total, acc):
    """One block of positions for some heads; top, total and acc are the softmax so far: the largest score, and sums over it."""
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    step, bt = pl.program_id(2), k.shape[-1]
    count = length[pl.program_id(0)] - step * bt  # entries of this block that are in use

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, jnp.finfo(jnp.float32).min)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(count > 0)
    def _():
        seen = jax.lax.broadcasted_iota(jnp.int32, (1, 1, bt), 2) < count
        scores = product("hrd,hdt->hrt", q[0], k[0]) * q.shape[-1] ** -0.5
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        peak = jnp.maximum(top[...], scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - peak), jnp.exp(top[...] - peak)
        values = jnp.where(seen, v[0], 0)  # a weight of zero does not hide a NaN
        top[...] = peak
        total[...] = total[...] * shrink + weights.sum(axis=-1, keepdims=True)
        acc[...] = acc[...] * shrink + product("hrt,hdt->hrd", weights.astype(values.dtype), values)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[0] = (acc[...] / jnp.where(total[...] == 0, 1, total[...])).astype(out.dtype)
