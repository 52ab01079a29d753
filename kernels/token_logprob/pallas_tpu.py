"""Tiles of scores on a TPU (v5e or later), each made, used and forgotten in VMEM.

A tile is [rows, tokens], with all of D: `m` rows of x stay while the head passes by, `n` columns at a time. Per-row numbers are
the first columns of an array [R, 128], which is what a TPU stores for [R, 1]. The last columns of a vocabulary that `n` does
not divide lie outside the head: whatever is read there is masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch, tuning

DTYPES = (jnp.bfloat16, jnp.float32)
MAX_ROW = 32 * 1024  # bytes of a row of x
_LANES = 128
_LOWEST = -1e30  # exp gives 0, and products with that 0 too, unlike -inf
_VMEM = 60 * 2**20  # of 64 MiB a core or more: what the largest D needs in f32


def unserved(d: int, v: int, dtype: jnp.dtype) -> str:
    """Why no tile of this head fits, or ""."""
    kind = jax.devices()[0].device_kind
    if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        return f"{kind} has too little memory beside its cores"
    most = MAX_ROW // dtype.itemsize
    if d > most:
        return f"a tile holds all of D, up to {most} for {dtype.name}"
    return "" if v < 2**24 else "tokens are numbered in f32, up to 2^24"


def forward(x: Array, w: Array, tokens: Array, scale: Array) -> tuple[Array, Array, Array]:
    """See `kernels.token_logprob.gradient`."""
    m, n = _sizes(x, w)
    numbers = _columns(m, scale, tokens)
    out = _call(
        functools.partial(_forward, w.shape[1]),
        grid=(len(numbers) // m, pl.cdiv(w.shape[1], n)),
        specs=_specs(m, n, x.shape[1], lambda i, j: i, lambda i, j: j),
        out=jax.ShapeDtypeStruct(numbers.shape, jnp.float32),
        out_spec=pl.BlockSpec((m, _LANES), lambda i, j: (i, 0)),
        scratch=[pltpu.VMEM((m, _LANES), jnp.float32)] * 4,
    )(_filled(x, m), w, numbers)
    return tuple(out[: len(x), :3].T)


def d_hidden(x: Array, w: Array, *numbers: Array) -> Array:
    """See `kernels.token_logprob.gradient`; sums live in the block of the result, f32, while the head passes by."""
    (m, n), d = _sizes(x, w), x.shape[1]
    packed = _columns(m, *_ordered(*numbers))
    out = _call(
        functools.partial(_d_hidden, w.shape[1]),
        grid=(len(packed) // m, pl.cdiv(w.shape[1], n)),
        specs=_specs(m, n, d, lambda i, j: i, lambda i, j: j),
        out=jax.ShapeDtypeStruct((len(packed), d), jnp.float32),
        out_spec=pl.BlockSpec((m, d), lambda i, j: (i, 0)),
    )(_filled(x, m), w, packed)
    return out[: len(x)]


def d_head(x: Array, w: Array, *numbers: Array) -> Array:
    """See `kernels.token_logprob.gradient`; `n` columns stay while all rows pass by, as x and as x^T."""
    (m, n), d = _sizes(x, w), x.shape[1]
    packed, x = _columns(m, *_ordered(*numbers)), _filled(x, m)
    return _call(
        functools.partial(_d_head, w.shape[1]),
        grid=(pl.cdiv(w.shape[1], n), len(packed) // m),
        specs=[*_specs(m, n, d, lambda j, i: i, lambda j, i: j), pl.BlockSpec((d, m), lambda j, i: (0, i))],
        out=jax.ShapeDtypeStruct(w.shape, w.dtype),
        out_spec=pl.BlockSpec((d, n), lambda j, i: (0, j)),
        scratch=[pltpu.VMEM((d, n), jnp.float32)],
    )(x, w, packed, x.T)


def _sizes(x: Array, w: Array) -> tuple[int, int]:
    """Rows and columns of a tile: as many of each, 128 to 512, as have 2 MiB of x and of the head; at least 128."""
    d, v = w.shape
    side = next((s for s in (512, 256) if s * d * x.dtype.itemsize <= 2 * 2**20), 128)
    size = tuning.blocks("token_logprob", "tpu", {"m": side, "n": side}, x.dtype.name, d=d, v=v)
    return min(size["m"], tuning.up(max(len(x), 1), _LANES)), min(size["n"], v)


def _filled(x: Array, m: int) -> Array:
    """x with rows of zeros up to a multiple of m, at least one tile."""
    return jnp.pad(x, ((0, tuning.up(max(len(x), 1), m) - len(x)), (0, 0)))


def _columns(m: int, *numbers: Array) -> Array:
    """[R, 128], one number of a row in each of the first columns, zeros beyond."""
    packed = jnp.stack([x.astype(jnp.float32) for x in numbers], 1)
    return jnp.pad(_filled(packed, m), ((0, 0), (0, _LANES - len(numbers))))


def _ordered(tokens, scale, logsumexp, entropy, d_logp, d_entropy):
    return scale, tokens, logsumexp, entropy, d_logp, d_entropy


def _specs(m: int, n: int, d: int, row, column) -> list[pl.BlockSpec]:
    """Of x, the head and the numbers; row, column: grid indices -> tile."""
    return [
        pl.BlockSpec((m, d), lambda *at: (row(*at), 0)),
        pl.BlockSpec((d, n), lambda *at: (0, column(*at))),
        pl.BlockSpec((m, _LANES), lambda *at: (row(*at), 0)),
    ]


def _call(body, grid, specs, out, out_spec, scratch=()):
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        in_specs=specs,
        out_specs=out_spec,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=dispatch.interpreted(),
    )


# -- bodies ----------------------------------------------------------------------------------------------------------


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scores(x, w, numbers, tile, vocab: int) -> tuple[Array, Array]:
    """z [m, n] of a tile, the lowest number outside the vocabulary; and where a row's token is."""
    z = _dot(x[...], w[...], (1, 0)) * numbers[:, :1]
    column = tile * z.shape[1] + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    return jnp.where(column < vocab, z, _LOWEST), column == numbers[:, 1:2].astype(jnp.int32)


def _forward(vocab, x, w, numbers, out, high, total, mean, chosen):
    """Per row, of the tiles so far: the highest z, sum exp(z - high), sum exp(z - high) (z - high), and the token's z."""
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        high[...] = jnp.full_like(high, _LOWEST)
        for sums in (total, mean, chosen):
            sums[...] = jnp.zeros_like(sums)

    z, token = _scores(x, w, numbers, tile, vocab)
    before = high[...]
    now = jnp.maximum(before, z.max(1, keepdims=True))
    z0 = z - now[:, :1]
    e, shrink = jnp.exp(z0), jnp.exp(before - now)
    mean[...] = shrink * (mean[...] + (before - now) * total[...]) + (e * z0).sum(1, keepdims=True)
    total[...] = shrink * total[...] + e.sum(1, keepdims=True)
    chosen[...] += jnp.where(token, z, 0).sum(1, keepdims=True)
    high[...] = now

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        log_total = jnp.log(total[...])
        known = numbers[:, 1:2] >= 0
        logp = jnp.where(known, chosen[...] - high[...] - log_total, jnp.nan)
        column = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
        entropy = log_total - mean[...] / total[...]
        out[...] = jnp.where(column == 0, logp, jnp.where(column == 1, entropy, high[...] + log_total))


def _d_scores(x, w, numbers, tile, vocab: int) -> Array:
    """dz of a tile, in the type of x; see `kernels.token_logprob.gradient`."""
    z, token = _scores(x, w, numbers, tile, vocab)
    scale, logsumexp, entropy, d_logp, d_entropy = (numbers[:, i : i + 1] for i in (0, 2, 3, 4, 5))
    log_p = z - logsumexp
    p = jnp.exp(log_p)
    dz = d_logp * (token.astype(jnp.float32) - p) - d_entropy * p * (log_p + entropy)
    return (scale * dz).astype(x.dtype)


def _d_hidden(vocab, x, w, numbers, out):
    tile, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(tile == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    dz, beyond = _d_scores(x, w, numbers, tile, vocab), vocab % w.shape[1]

    def add(head):
        out[...] += _dot(dz, head, (1, 1))

    if not beyond:
        add(w[...])
        return
    pl.when(tile < last)(lambda: add(w[...]))

    @pl.when(tile == last)
    def _():
        column = jax.lax.broadcasted_iota(jnp.int32, w.shape, 1)
        add(jnp.where(column < beyond, w[...], 0).astype(w.dtype))


def _d_head(vocab, x, w, numbers, x_t, out, acc):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    acc[...] += _dot(x_t[...], _d_scores(x, w, numbers, pl.program_id(0), vocab), (1, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = acc[...].astype(out.dtype)
