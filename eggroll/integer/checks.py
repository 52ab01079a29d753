"""What an integer strategy refuses."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from eggroll import sharding
from eggroll.integer import noise
from eggroll.population import Population

_INT32 = 2**31 - 1
_MOST = 2**20  # members


def check_settings(
    population: Population, sigma_shift: int, kind: str, faithful: bool, momentum: int, chunk: int | None
) -> None:
    """Refuses settings that do not fit together; see `eggroll.integer.strategy`."""
    if population.signs != 2:
        raise ValueError(
            f"integer fitness compares pairs: the population needs signs = 2, got {population.signs}; use "
            f"eggroll.antithetic({population.size}) or eggroll.crossed({population.size}, signs=2)"
        )
    if kind not in (*noise.KINDS, "released"):
        raise ValueError(f"the noise is one of {', '.join(noise.KINDS)}; got {kind!r}")
    if faithful and (momentum or population.rows * population.columns > 1 or kind != "released"):
        raise ValueError(
            f"faithful means independent pairs, Gaussian noise and no momentum; got {population.rows} x {population.columns} "
            f"pairs a block, {kind} noise and momentum {momentum}"
        )
    if population.size > _MOST:
        raise ValueError(f"at most 2^20 members, so that the sum of their scores fits; got {population.size}")
    for name, value, most in (("sigma_shift", sigma_shift, 27), ("momentum", momentum, 6)):
        if not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 0 to {most}; got {value!r}")
    if chunk is not None and chunk < 2:
        raise ValueError(f"a chunk must hold at least one pair, 2 members; got {chunk}")
    pairs, top = population.directions, noise.largest(kind)
    if pairs * top**2 > _INT32:
        raise ValueError(
            f"sums over pairs must fit int32: {pairs} pairs of {kind} noise could reach {pairs * top**2} > {_INT32}; at most "
            f"{2 * (_INT32 // top**2)} members, or noise='rademacher'"
        )


def check_division(population: Population, mesh: Mesh, axes: Sequence[str]) -> None:
    """Refuses a mesh over which the members do not divide, or not so that those of a device are next to each other: what they
    carry would travel."""
    sharding.check(population, mesh, axes)
    devices, members = sharding.count(mesh, axes), np.arange(population.size)
    if (sharding.divide(population, devices, sharding.CONTIGUOUS).by_device(members).reshape(-1) != members).any():
        raise ValueError(
            "over devices pairs are cut along blocks, then rows, then columns, each to single ones before the next; got "
            f"{' x '.join(map(str, population.shape[:3]))} pairs over {devices} devices: choose members so that the blocks, or "
            f"the rows of one block, are a multiple of {devices}"
        )
