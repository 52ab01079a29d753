"""The fused product on a TPU: one pass over x and W, the correction as the first step of the contraction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning
from kernels.lowrank_matmul import layout
from kernels.noise_bits import Generated
from kernels.noise_bits.generated import tile as drawn

DTYPES = (jnp.bfloat16, jnp.float32)


def matmul(x: Array, w: Array, right: Array | Generated, left: Array | Generated, scale: Array, dtype) -> Array:
    """See `kernels.lowrank_matmul.api.matmul`."""
    k, n = w.shape
    kind = layout.kind(x, left)
    size = tuning.blocks("lowrank_matmul", "tpu", {"m": 256, "n": 512, "k": 512}, kind, rows=x.shape[-2], k=k, n=n)
    bn, bk = min(size["n"], tuning.up(n, 128)), min(size["k"], tuning.up(k, 128))
    laid = layout.in_rows(x, right, left, scale, size["m"])
    bm = laid.tile
    pad = lambda a, *fills: jnp.pad(a, [(0, f) for f in fills])
    x, w = pad(laid.x, 0, -k % bk), pad(w, -k % bk, -n % bn)
    grid = (x.shape[0] // bm, w.shape[1] // bn, x.shape[1] // bk)
    columns = laid.d.shape[1]
    specs = [
        pl.BlockSpec((bm, bk), lambda i, j, s, blocks: (i, s)),
        pl.BlockSpec((bk, bn), lambda i, j, s, blocks: (s, j)),
        pl.BlockSpec((bm, columns), lambda i, j, s, blocks: (i, 0)),
    ]
    if isinstance(laid.left, Generated):
        factor = [laid.left.key, *(rows[..., None] for rows in layout.addresses(laid))]
        rows = pl.BlockSpec((1, columns, 1), lambda i, j, s, blocks: (blocks[i], 0, 0))
        specs += [pl.BlockSpec(memory_space=pltpu.SMEM), rows, rows]
        make = functools.partial(_drawn, laid.left, width=bn)
    else:
        factor = [pad(laid.left, 0, 0, -n % bn)]
        specs.append(pl.BlockSpec((1, columns, bn), lambda i, j, s, blocks: (blocks[i], 0, j)))
        make = lambda j, a: a[0]
    out = pl.pallas_call(
        functools.partial(_body, make, "highest" if x.dtype == jnp.float32 else None),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec((bm, bn), lambda i, j, s, blocks: (i, j)),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=dispatch.interpreted(),
    )(jnp.asarray(laid.blocks), x, w, laid.d, *factor)
    count = int(np.prod(laid.lead, dtype=np.int64)) * laid.rows
    return out[:count, :n].reshape(*laid.lead, laid.rows, n)


def _body(make, precision, blocks, x, w, d, *refs):
    *factor, out, acc = refs
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=precision)
    step, column = pl.program_id(2), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[...] = product(d[...], make(column, *factor).astype(d.dtype))

    acc[...] += product(x[...], w[...])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[...] = acc[...].astype(out.dtype)


def _drawn(left: Generated, j, key, ids, start, *, width: int) -> Array:
    """Columns [j width, (j + 1) width) of a block of factors, made here."""
    n = jax.lax.broadcasted_iota(jnp.uint32, (ids.shape[1], width), 1) + (j * width).astype(jnp.uint32)
    return drawn([key[i] for i in range(4)], ids[0], start[0] + n, left)
