"""Who uses which factor, as a kernel needs it: the correction of a tile of rows is one more step of the contraction.

With rows of all members one below the other, y = [x D] [W; A]: row i of D holds t_i = scale (x_i B) in the columns of its own
factor and zeros in the others, and A has the factors of a block one below the other. All rows of a tile find their factors in
one block, so a tile reads one block of D, of A, and nothing of its neighbours' factors.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.noise_bits import Generated

BLOCK = 16  # factors of a block at least: what a tile of bf16 has rows
SMALLEST = 64  # rows of a tile: what a warpgroup multiplies at once
WIDEST = 1024  # columns of D at most, where a smaller tile can help it


class Rows(NamedTuple):
    """A product laid out in rows.

    Attributes:
        x: [R, K], R a multiple of the tile.
        d: [R, C], C = block * r.
        left: [F / block, C, N], or the address of factors [F], F a multiple of `block`.
        blocks: i32 [R / tile], the block of each tile.
        lead, rows: of the result, [*lead, rows, N]; rows beyond are padding.
    """

    x: Array
    d: Array
    left: Array | Generated
    blocks: np.ndarray
    lead: tuple[int, ...]
    rows: int

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.x.shape[0] // len(self.blocks)


@functools.lru_cache(maxsize=32)
def _owners(lead: tuple[int, ...], have: tuple[int, ...], rows: int) -> np.ndarray:
    """Number of the factor of each row."""
    numbers = np.arange(int(np.prod(have, dtype=np.int64)), dtype=np.int32).reshape(have)
    return np.repeat(np.broadcast_to(numbers, lead).reshape(-1), rows)


def _block(owners: np.ndarray, tile: int) -> int:
    """The smallest block of factors that always holds those of a whole tile; 0: none does."""
    padded = np.pad(owners, (0, -len(owners) % tile), mode="edge").reshape(-1, tile)
    sizes = [BLOCK << i for i in range(20) if BLOCK << i <= max(tile, BLOCK)]
    return next((b for b in sizes if (padded // b == padded[:, :1] // b).all()), 0)


def _tile(left: Array | Generated, lead: tuple[int, ...], rows: int, tile: int) -> int:
    """Rows of a tile, fewer where each would otherwise have a factor of its own and D were too wide."""
    block = _block(_owners(lead, left.shape[:-2], rows), tile) or tile
    while block > BLOCK and block * left.shape[-2] > WIDEST and tile > SMALLEST:
        tile, block = tile // 2, block // 2
    return tile


def kind(x: Array, left: Array | Generated) -> str:
    """What block sizes depend on besides sizes: the type, where factors come from, and whether members share them."""
    shared = "shared" if left.ndim > 2 and np.prod(left.shape[:-2]) < np.prod(x.shape[:-2]) else "own"
    return f"{x.dtype.name} {left.kind if isinstance(left, Generated) else 'stored'} {shared}"


def in_rows(x: Array, right: Array | Generated, left: Array | Generated, scale: Array, tile: int) -> Rows:
    """Lays a product out, `tile` rows at a time or fewer; factors that no block holds for a tile are repeated once per row."""
    lead = np.broadcast_shapes(x.shape[:-2], right.shape[:-2], left.shape[:-2], scale.shape)
    rows, rank = x.shape[-2], left.shape[-2]
    if (smaller := _tile(left, lead, rows, tile)) < tile:
        return in_rows(x, right, left, scale, smaller)
    stored = right.array() if isinstance(right, Generated) else right
    full = "highest" if x.dtype == jnp.float32 else None
    t = jnp.einsum("...mk,...rk->...mr", x, stored.astype(x.dtype), preferred_element_type=jnp.float32, precision=full)
    t = jnp.broadcast_to(scale[..., None, None] * t, (*lead, rows, rank)).reshape(-1, rank)
    x = jnp.broadcast_to(x, (*lead, rows, x.shape[-1])).reshape(-1, x.shape[-1])
    owners = _owners(lead, left.shape[:-2], rows)
    block = _block(owners, tile)
    if not block:
        left = _each_row(left, owners)
        owners = np.arange(len(owners), dtype=np.int32)
        block = _block(owners, tile)
    fill = -len(owners) % tile
    place = np.pad(owners, (0, fill), mode="edge")
    column = jnp.asarray(place % block)[:, None, None] == jnp.arange(block)[:, None]
    t = jnp.pad(t, ((0, fill), (0, 0)))
    d = jnp.where(column, t[:, None, :], 0).reshape(len(place), block * rank).astype(x.dtype)
    return Rows(jnp.pad(x, ((0, fill), (0, 0))), d, _blocked(left, block, x.dtype), place[::tile] // block, lead, rows)


def _each_row(left: Array | Generated, owners: np.ndarray) -> Array | Generated:
    if isinstance(left, Generated):
        return _with_ids(left, left.ids.reshape(-1)[owners])
    return left.reshape(-1, *left.shape[-2:])[owners]


def _blocked(left: Array | Generated, block: int, dtype) -> Array | Generated:
    count = int(np.prod(left.shape[:-2], dtype=np.int64))
    fill = -count % block
    if isinstance(left, Generated):
        return _with_ids(left, jnp.pad(left.ids.reshape(-1), (0, fill)))
    flat = jnp.pad(left.reshape(count, *left.shape[-2:]), ((0, fill), (0, 0), (0, 0)))
    return flat.reshape(-1, block * left.shape[-2], left.shape[-1]).astype(dtype)


def _with_ids(left: Generated, ids: Array) -> Generated:
    return Generated(left.key, ids, left.layer, left.role, left.kind, left.rank, left.size)


def addresses(laid: Rows) -> tuple[Array, Array]:
    """Of a block of generated factors, row by row: u32 [F / block, C], the factor's identity and its first element."""
    left, columns = laid.left, laid.d.shape[1]
    ids = jnp.repeat(left.ids, left.rank).reshape(-1, columns)
    start = np.tile(np.arange(left.rank, dtype=np.uint32) * np.uint32(left.size), columns // left.rank)
    return ids, jnp.broadcast_to(start, ids.shape)
