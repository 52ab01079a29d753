"""init / evaluate / update of the integer evolution strategy."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eggroll import sharding
from eggroll.integer import fitness, noise, threshold
from eggroll.integer.arithmetic import Perturbed, vector
from eggroll.integer.checks import check_division, check_settings
from eggroll.members import map_members
from eggroll.noise import LEFT, RIGHT, Leaf, seed_words
from eggroll.population import Population

# (weights, carry, rows) -> (int32 scalar, carry); matrices are `Perturbed`, vectors int8
Score = Callable[[Any, Any, Any], tuple[Array, Any]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "momentum", "generation", "key"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes from one generation to the next but what members carry, and all a checkpoint needs.

    Attributes:
        params: int8.
        momentum: int16 of the same shapes, or None.
        generation: i32, updates made so far.
        key: typed PRNG key; never changes.
    """

    params: Any
    momentum: Any
    generation: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Strategy:
    """The strategy as pure functions of `State`; made by `strategy`, whose docstring explains the fields."""

    population: Population
    sigma_shift: int
    limits: tuple[int, ...]
    noise: str
    momentum: int
    chunk: int | None
    mesh: Mesh | None
    axes: tuple[str, ...]

    def init(self, params: Any, key: Array) -> State:
        """State at generation 0.

        Raises:
            TypeError: parameters that are not int8; a key that is not `jax.random.key(seed)`.
            ValueError: parameters that are no matrices or vectors.
        """
        seed_words(key)
        noise.plan(params)
        params = jax.tree.map(jnp.asarray, params)
        momentum = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int16), params) if self.momentum else None
        return self._everywhere(State(params, momentum, jnp.zeros((), jnp.int32), key))

    def carry(self, one: Any) -> Any:
        """What all members carry at first: one member's, [N, ...], on the devices that evaluate them."""
        every = lambda x: jnp.broadcast_to(x, (self.population.size, *jnp.shape(x)))
        if self.mesh is None:
            return jax.tree.map(lambda x: jnp.array(every(x)), one)
        spread = NamedSharding(self.mesh, PartitionSpec(self.axes))
        return jax.jit(lambda one: jax.tree.map(every, one), out_shardings=spread)(one)

    def evaluate(self, state: State, score: Score, carry: Any, batch: Any) -> tuple[Array, Any]:
        """Every member's score on its rows of the batch.

        Args:
            score: (weights, carry, rows) -> (int32 scalar, carry), higher is better. Weights are of one member: matrices are
                `Perturbed`, for `arithmetic.row` and `arithmetic.product`, vectors int8.
            carry: [N, ...], from `carry` or the generation before.
            batch: tree of arrays with leading axis S, rows. With P pairs, S <= P: each is shared by P / S pairs; S > P: S / P
                rows a pair. `rows` has the leading axis max(1, S / P).

        Returns:
            (scores int32 [N], carry [N, ...]), left on the devices that made them.

        Raises:
            ValueError: S does not fit the pairs.
        """
        chex.assert_shape(state.generation, ())
        wide = self.rows(jax.tree.leaves(batch)[0].shape[0])
        first = self._first_rows(jax.tree.leaves(batch)[0].shape[0])
        plan = noise.plan(state.params)
        inputs = (dataclasses.replace(state, momentum=None), batch)

        def some(inputs, data, population, ids):
            state, batch = inputs

            def member(lefts, rights, sign, data):
                carry, first = data
                rows = jax.tree.map(lambda x: x[first + jnp.arange(wide)], batch)
                value, carry = score(self._perturbed(plan, state.params, lefts, rights, sign), carry, rows)
                if jnp.shape(value) or value.dtype != jnp.int32:
                    raise ValueError(f"a score is one int32; got {value.dtype}{list(jnp.shape(value))}")
                return value, carry

            draw = functools.partial(self._draw, plan, state)
            return map_members(member, draw, population, ids, data, True, self.chunk)

        data = (carry, jnp.asarray(first))
        if self.mesh is None:
            ids = self.population.row_ids(), self.population.column_ids()
            return some(inputs, data, self.population, ids)
        return sharding.evaluate(
            some, self.population, self.mesh, self.axes, inputs, data, True, order=sharding.CONTIGUOUS, gather=False
        )

    def rows(self, size: int) -> int:
        """How many of a batch's rows each member sees.

        Raises:
            ValueError: they cannot be shared out equally.
        """
        pairs = self.population.directions
        groups = min(size, pairs)
        if size < 1 or pairs % groups or size % groups:
            raise ValueError(
                f"rows must divide the pairs, or pairs the rows, so that all count alike; got {size} rows and {pairs} pairs "
                f"({self.population.size} members): choose for example {math.gcd(size, pairs)} rows"
            )
        return size // groups

    def member_params(self, state: State, member: int | Array) -> Any:
        """One member's parameters: matrices as `Perturbed`, vectors int8."""
        plan = noise.plan(state.params)
        row, column, sign = self.population.coordinates(jnp.asarray(member))
        lefts, rights = self._draw(plan, state, row.astype(jnp.uint32), column.astype(jnp.uint32))
        return self._perturbed(plan, state.params, lefts, rights, 1 - 2 * sign)

    def update(self, state: State, scores: Array, used: Any = None) -> tuple[State, dict[str, Array]]:
        """One generation's step.

        Over a mesh each device compares its own pairs, packs what it finds into two bits a pair, and gathers the others';
        then every device makes the whole update.

        Args:
            scores: int32 [N] from `evaluate`.
            used: None, or a tree like the parameters' of booleans that broadcast to them: what the batch can tell anything of.
                The rest, for example the embeddings of bytes that no row had, would move by noise alone: it does not move, and
                no noise is added to its momentum.

        Returns:
            (state, metrics): i32 `score_mean` (rounded down), `ties` (pairs), `moved` (entries), `limit`.
        """
        chex.assert_shape(scores, (self.population.size,))
        trits, score_mean = self._compared(scores)
        sums = self._sums(noise.plan(state.params), state, trits)
        masks = [True] * len(sums) if used is None else jax.tree.leaves(used)
        sums = [z if mask is True else jnp.where(mask, z, 0) for z, mask in zip(sums, masks, strict=True)]
        limit = jnp.asarray(self.limits, jnp.int32)[jnp.minimum(state.generation, len(self.limits) - 1)]
        leaves, tree = jax.tree.flatten(state.params)
        momentum = None
        if self.momentum:
            shift = threshold.momentum_shift(self.population.directions, noise.second_moment(self.noise))
            momentum = [
                threshold.accumulate(m, z, shift, self.momentum)
                for m, z in zip(jax.tree.leaves(state.momentum), sums, strict=True)
            ]
            sums = [m.astype(jnp.int32) for m in momentum]
            momentum = jax.tree.unflatten(tree, momentum)
        stepped = [threshold.step(w, z, limit, self.noise == "released") for w, z in zip(leaves, sums, strict=True)]
        if used is not None:
            stepped = [jnp.where(mask, new, old) for mask, new, old in zip(masks, stepped, leaves, strict=True)]
        moved = sum(jnp.sum(new != old, dtype=jnp.int32) for new, old in zip(stepped, leaves, strict=True))
        metrics = {
            "score_mean": score_mean,
            "ties": jnp.sum(trits == 0, dtype=jnp.int32),
            "moved": moved,
            "limit": limit,
        }
        params = jax.tree.unflatten(tree, stepped)
        state = dataclasses.replace(state, params=params, momentum=momentum, generation=state.generation + 1)
        return self._everywhere(state), metrics

    # -- parts -------------------------------------------------------------------------------------------------------

    def _everywhere(self, tree: Any) -> Any:
        return tree if self.mesh is None else sharding.place(self.mesh, (), tree)

    def _draw(self, plan: Sequence[Leaf], state: State, rows: Array, columns: Array) -> tuple[list[Array], list[Array]]:
        side = lambda ids, side: noise.draw(plan, state.key, state.generation, ids, side, self.noise)
        return side(rows, LEFT), side(columns, RIGHT)

    def _perturbed(self, plan: Sequence[Leaf], params: Any, lefts: list, rights: list, sign: Array) -> Any:
        shift = 4 + self.sigma_shift
        leaves, tree = jax.tree.flatten(params)
        one = lambda leaf, w, a, b: (
            Perturbed(w, a, b, sign, shift) if len(leaf.shape) == 2 else vector(w, a, b, sign, shift)
        )
        return jax.tree.unflatten(tree, [one(*x) for x in zip(plan, leaves, lefts, rights, strict=True)])

    def _groups(self, groups: int) -> np.ndarray:
        """[pairs]: which rows a pair shares: independent neighbours the same ones, crossed neighbours different ones."""
        blocks, rows, columns = self.population.shape[:3]
        block, row, column = np.meshgrid(np.arange(blocks), np.arange(rows), np.arange(columns), indexing="ij")
        turn = row if columns % groups == 0 else columns * row
        return ((block * groups // blocks + turn + column) % groups).reshape(-1)

    def _first_rows(self, size: int) -> np.ndarray:
        """i32 [N]: the first row of a batch that each member sees."""
        groups = min(size, self.population.directions)
        return np.repeat(self._groups(groups) * (size // groups), 2).astype(np.int32)

    def _compared(self, scores: Array) -> tuple[Array, Array]:
        """Fitness int8 [pairs] and the mean score, rounded down; on every device."""
        sums = lambda x: (jnp.sum(x >> 10, dtype=jnp.int32), jnp.sum(x & 1023, dtype=jnp.int32))
        if self.mesh is None:
            return fitness.signs(scores.reshape(-1, 2)), _mean(*sums(scores), self.population.size)
        pairs = self.population.directions // sharding.count(self.mesh, self.axes)

        def own(device, scores):
            packed = fitness.pack(fitness.signs(scores.reshape(-1, 2)))
            trits = fitness.unpack(lax.all_gather(packed, self.axes), pairs).reshape(-1)
            return trits, _mean(*lax.psum(sums(scores), self.axes), self.population.size)

        everywhere = PartitionSpec()
        return sharding.per_device(own, self.mesh, self.axes, (PartitionSpec(self.axes),), (everywhere, everywhere))(
            scores
        )

    def _sums(self, plan: Sequence[Leaf], state: State, trits: Array) -> list[Array]:
        """Z of every leaf: sum over pairs of f A B^T, or f u v; int32."""
        blocks, rows, columns, _ = self.population.shape
        grid = trits.reshape(blocks, rows, columns)
        at_once = max(1, min(blocks, (self.chunk or self.population.size) // (2 * rows * columns)))

        def some(first):
            part = lambda x: lax.dynamic_slice_in_dim(x, first, at_once, 0)
            lefts, rights = self._draw(plan, state, part(self.population.row_ids()), part(self.population.column_ids()))
            return [_contract(leaf, part(grid), a, b) for leaf, a, b in zip(plan, lefts, rights, strict=True)]

        whole = blocks - blocks % at_once
        # the last blocks, that make no whole chunk, are a chunk of blocks of which the first have counted already
        zeros = [jnp.zeros(leaf.shape, jnp.int32) for leaf in plan]
        add = lambda i, sums: [s + z for s, z in zip(sums, some(i * at_once), strict=True)]
        sums = lax.fori_loop(0, whole // at_once, add, zeros)
        if whole == blocks:
            return sums
        grid = jnp.where(jnp.arange(blocks)[:, None, None] < whole, 0, grid)
        return [s + z for s, z in zip(sums, some(blocks - at_once), strict=True)]


def strategy(
    *,
    population: Population,
    alpha: float | Sequence[float],
    sigma_shift: int = 4,
    noise: str = "gaussian",
    momentum: int = 0,
    faithful: bool = False,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    axes: Sequence[str] | None = None,
) -> Strategy:
    """Integer EGGROLL: pairs of members of rank 1, ternary fitness, steps of one unit.

    A pair perturbs each matrix by +-(A B^T >> (4 + sigma_shift)), rounding down, and tells which of both is better; with
    Z = sum over pairs of f A B^T an entry moves by sign(Z) where |Z| is significant at level alpha (`threshold`).

    Args:
        population: with signs = 2, `eggroll.antithetic(N)` or `eggroll.crossed(N, signs=2)`.
        alpha: share of entries that move where nothing can be learned, in (0, 1]: one number, or one per generation
            (`threshold.schedule`), of which the last one stays. In crossed grids of fewer than 16 x 16 it is met roughly.
        sigma_shift: the noise of a weight has the standard deviation 2^-sigma_shift in units of 1.0 (16).
        noise: "gaussian" or "rademacher", whose exact variance is in the thresholds.
        momentum: k > 0: an int16 sum of Z, which loses 2^-k of itself a generation, takes the place of Z; 0: none.
        faithful: as in the released code: noise from a table (`noise.released`), thresholds of its nominal variance, and zero
            sums count as -1. For independent pairs without momentum.
        chunk: about this many members at once, of a crossed block at least a column; None: all. Changes memory and speed alone.
        mesh: members are divided over devices, one bit per member is sent per generation, and no bit depends on how many
            devices there are; None: one device.
        axes: of the mesh, that members are divided over; None: all.

    Raises:
        ValueError: members that are not pairs, alpha outside (0, 1], sums that could overflow int32, a population that does not
            divide over the mesh, unknown noise, a momentum or sigma_shift out of range.

    Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652, section 6.1 and appendices G to I;
    crossed populations, momentum, and the exact variance in the thresholds are this project's.
    """
    kind = "released" if faithful and noise == "gaussian" else noise
    check_settings(population, sigma_shift, kind, faithful, momentum, chunk)
    axes = () if mesh is None else mesh.axis_names if axes is None else tuple(axes)
    if mesh is not None:
        check_division(population, mesh, axes)
    return Strategy(
        population, sigma_shift, _limits(kind, population, alpha, momentum), kind, momentum, chunk, mesh, axes
    )


def _limits(kind: str, population: Population, alpha: float | Sequence[float], momentum: int) -> tuple[int, ...]:
    """The smallest |Z| that moves an entry, one per generation."""
    alphas = np.asarray(alpha, float).reshape(-1).tolist()
    if not alphas:
        raise ValueError("alpha must be a number, or one per generation; got none")
    if kind == "released":
        limits = threshold.released_limits(alphas, population.directions)
    else:
        moments = noise.second_moment(kind), noise.excess(kind, population)
        limits = threshold.limits(alphas, population.directions, *moments, momentum)
    return tuple(map(int, limits))


def _contract(leaf: Leaf, trits: Array, left: Array, right: Array) -> Array:
    """sum_gpq f_gpq A_gp B_gq^T, of a vector f u v elementwise: int32."""
    if (
        trits.shape[2] == 1
    ):  # one factor of either side per pair: the whole sum is one product of int8, fast with pairs last
        by_row = (trits * right).reshape(-1, right.shape[-1])
        left = left.reshape(-1, left.shape[-1])
        if len(leaf.shape) == 2:
            return lax.dot_general(left.T, by_row.T, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return jnp.sum(left.astype(jnp.int32) * by_row, 0)
    by_row = jnp.einsum("gpq,gqi->gpi", trits, right, preferred_element_type=jnp.int32)
    equation = "gpo,gpi->oi" if len(leaf.shape) == 2 else "gpi,gpi->i"
    return jnp.einsum(equation, left.astype(jnp.int32), by_row, preferred_element_type=jnp.int32)


def _mean(high: Array, low: Array, count: int) -> Array:
    """floor of (1024 high + low) / count, whose numerator need not fit int32, while all scores together stay below 2^41."""
    return high // count * 1024 + (high % count * 1024 + low) // count
