"""Who uses which factor, row by row: all rows of a tile find theirs in one block of factors."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.int8_matmul import reference

TILE = 32  # rows of an int8 tile: factors of a block at least


class Rows(NamedTuple):
    """The rows of all members one below the other, each with the factor A that is its own.

    Attributes:
        x: int8 [R, in], R a multiple of the tile.
        rows: i32 [R / tile, 2, tile], of each row sign (x . B) and the number of its factor in the block.
        left: int8 [F / block, block, out].
        blocks: i32 [R / tile], the block of factors of each tile.
        shape: of the result without its columns; rows beyond are padding.
    """

    x: Array
    rows: Array
    left: Array
    blocks: Array
    shape: tuple[int, ...]

    def result(self, out: Array, n: int) -> Array:
        """Without padding, in the population's axes."""
        return out[: math.prod(self.shape), :n].reshape(*self.shape, n)


def in_rows(x: Array, right: Array, left: Array, sign: Array, tile: int, least: int) -> Rows:
    """Lays a product out, with the smallest block of factors, `least` doubled, that holds those of any tile.

    Where none up to the tile does, factors are repeated once per row.
    """
    lead = np.broadcast_shapes(x.shape[:-2], right.shape[:-1], left.shape[:-1], sign.shape)
    rows, n = x.shape[-2], left.shape[-1]
    have = np.arange(math.prod(left.shape[:-1]), dtype=np.int32).reshape(left.shape[:-1])
    owners = np.repeat(np.broadcast_to(have, lead), rows)
    left, fill = left.reshape(-1, n), -len(owners) % tile
    place = np.pad(owners, (0, fill), mode="edge")
    tiles = place.reshape(-1, tile)
    sizes = [least]
    while sizes[-1] < tile:
        sizes.append(2 * sizes[-1])
    block = next((b for b in sizes if (tiles // b == tiles[:, :1] // b).all()), None)
    if block is None:
        block, left, place = sizes[-1], left[owners], np.arange(len(place), dtype=np.int32)
    s = jnp.broadcast_to(reference.coefficient(x, right, sign), (*lead, rows)).reshape(-1)
    x = jnp.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    return Rows(
        jnp.pad(x, ((0, fill), (0, 0))),
        jnp.stack([jnp.pad(s, (0, fill)).reshape(-1, tile), (place % block).reshape(-1, tile)], 1),
        jnp.pad(left, ((0, -len(left) % block), (0, 0))).reshape(-1, block, n),
        jnp.asarray(place[::tile] // block),
        (*lead, rows),
    )
