"""Which members exist, and which noise factors they share.

One design covers all: N = G * P * Q * S members in G blocks of P rows x Q columns, S = 2 with antithetic signs, else 1.
Member (g, i, j, s) has the index n = ((g*P + i)*Q + j)*S + s, the output-side factor of row (g, i), the input-side factor of
column (g, j), and the sign + for s = 0, - for s = 1. Independent members are blocks of one; crossed members pay for
G*(P + Q) factors instead of N. Distinct members are uncorrelated in every design.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Population:
    """A layout of N = blocks * rows * columns * signs members; build it with `independent`, `antithetic` or `crossed`."""

    blocks: int
    rows: int
    columns: int
    signs: int

    def __post_init__(self):
        for name in ("blocks", "rows", "columns", "signs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"a population needs whole {name} >= 1; got {getattr(self, name)!r}")
        if self.signs > 2:
            raise ValueError(f"signs is 1 (one-sided) or 2 (antithetic pairs); got {self.signs}")

    @property
    def size(self) -> int:
        """N, the number of members evaluated per generation."""
        return self.blocks * self.rows * self.columns * self.signs

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(blocks, rows, columns, signs): the axes a member index unfolds into, last one fastest."""
        return (self.blocks, self.rows, self.columns, self.signs)

    @property
    def directions(self) -> int:
        """Distinct perturbation directions: members without their signs."""
        return self.size // self.signs

    def row_ids(self) -> Array:
        """u32 [G, P]: identity of each output-side factor."""
        return jnp.arange(self.blocks * self.rows, dtype=jnp.uint32).reshape(self.blocks, self.rows)

    def column_ids(self) -> Array:
        """u32 [G, Q]: identity of each input-side factor."""
        return jnp.arange(self.blocks * self.columns, dtype=jnp.uint32).reshape(self.blocks, self.columns)

    def grid(self, members: Array) -> Array:
        """[N, ...] by member index -> [G, P, Q, S, ...]."""
        if members.ndim < 1 or members.shape[0] != self.size:
            raise ValueError(
                f"the leading axis must hold one entry per member: expected {self.size}, got shape {members.shape}"
            )
        return members.reshape(*self.shape, *members.shape[1:])

    def coordinates(self, member: Array) -> tuple[Array, Array, Array]:
        """Member index -> (row factor id, column factor id, sign as 0 for + and 1 for -), each of `member`'s shape."""
        pair, sign = member // self.signs, member % self.signs
        row, column = pair // self.columns, pair % self.columns
        return row, (row // self.rows) * self.columns + column, sign


def independent(members: int) -> Population:
    """N members, each with factors of its own."""
    return Population(blocks=members, rows=1, columns=1, signs=1)


def antithetic(members: int) -> Population:
    """N/2 independent directions, each evaluated at +sigma and -sigma.

    Raises:
        ValueError: N is odd.
    """
    if members % 2:
        raise ValueError(f"antithetic members come in pairs: N must be even, got {members}; use {members + 1}")
    return Population(blocks=members // 2, rows=1, columns=1, signs=2)


def crossed(members: int, blocks: int = 1, rows: int | None = None, signs: int = 1) -> Population:
    """N members as `blocks` grids of P rows x Q columns: P + Q factors serve P*Q members, or with signs 2*P*Q.

    Second moment for a linear objective, m x n weight, Gaussian factors, one block:
    E|g|^2 = (1 + (m+1)/P)(1 + (n+1)/Q)|G|^2, against about (1 + mn/N)|G|^2 for independent members.

    Args:
        members: N, over all blocks.
        blocks: independent grids the members are divided among.
        rows: P; by default the largest divisor of N/(blocks*signs) not above its square root.
        signs: 2: each of the P*Q directions at +sigma and -sigma.

    Raises:
        ValueError: N is not blocks * P * Q * signs with P, Q >= 2.
    """
    parts = blocks * signs
    if blocks < 1 or signs not in (1, 2) or members < parts or members % parts:
        raise ValueError(
            f"N must divide into the blocks, of 1 or 2 signs: {members} members in {blocks} blocks, {signs} signs"
        )
    per_block = members // parts
    if rows is None:
        rows = max(p for p in range(1, math.isqrt(per_block) + 1) if per_block % p == 0)
    if rows < 2 or per_block % rows or per_block // rows < 2:
        nearest = math.isqrt(per_block)
        raise ValueError(
            f"a crossed block is P x Q members with P, Q >= 2; {per_block} members per block do not make {rows} rows; "
            f"use for example {parts * max(nearest, 2) ** 2} members, or eggroll.independent({members})"
        )
    return Population(blocks=blocks, rows=rows, columns=per_block // rows, signs=signs)
