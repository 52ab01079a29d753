"""Arrays on a mesh of devices: which members a device evaluates, where parameters lie, and optimizer state beside them.

Two kinds of axes. Over those that members are divided over, each device runs the program of its own members inside
`jax.shard_map`, where kernels serve. Over the others, the compiler divides the arrays of that program, as the rules of a
`Layout` lay the parameters out.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eggroll.noise import path_name
from eggroll.population import Population

Layout = Sequence[tuple[str, PartitionSpec]]
ALIKE = ("blocks", "columns", "rows")  # chunks of members have the same shapes on any number of devices
CONTIGUOUS = ("blocks", "rows", "columns")  # a device has members next to each other, so that their order costs nothing


@dataclasses.dataclass(frozen=True)
class Division:
    """Members over devices: the grid blocks x rows x columns of a population, cut into equal parts.

    Device d = (b R + r) C + c of B x R x C has block range b, row range r and column range c.

    Attributes:
        population: of all members.
        ways: (B, R, C).
    """

    population: Population
    ways: tuple[int, int, int]

    @property
    def part(self) -> Population:
        """The members of one device, as a population."""
        sizes = (n // w for n, w in zip(self.population.shape[:3], self.ways, strict=True))
        return Population(*sizes, self.population.signs)

    def ids(self, device: Array) -> tuple[Array, Array]:
        """Identities u32 [g, p] and [g, q] of the row and column factors of one device's members."""
        return self._cut(self.population.row_ids(), device, 1), self._cut(self.population.column_ids(), device, 2)

    def weights(self, weights: Array, device: Array) -> Array:
        """[G, P, Q] -> [g, p, q], one device's part."""
        return self._cut(weights, device, 1, 2)

    def _cut(self, x: Array, device: Array, *axes: int) -> Array:
        """One device's part of an array over blocks and these axes of the grid."""
        _, r, c = self.ways
        at = (device // (r * c), device // c % r, device % c)
        for position, axis in enumerate((0, *axes)):
            size = x.shape[position] // self.ways[axis]
            x = lax.dynamic_slice_in_dim(x, at[axis] * size, size, position)
        return x

    def by_device(self, x: Array) -> Array:
        """[N, ...] by member -> [D, n, ...], the members of each device in its part's order."""
        split = [size for n, w in zip(self.population.shape[:3], self.ways, strict=True) for size in (w, n // w)]
        grid = x.reshape(*split, self.population.signs, *x.shape[1:])
        rest = range(6, grid.ndim)
        return grid.transpose(0, 2, 4, 1, 3, 5, *rest).reshape(math.prod(self.ways), self.part.size, *x.shape[1:])

    def by_member(self, x: Array) -> Array:
        """The inverse of `by_device`."""
        grid = x.reshape(*self.ways, *self.part.shape, *x.shape[2:])
        rest = range(6, grid.ndim)
        return grid.transpose(0, 3, 1, 4, 2, 5, *rest).reshape(self.population.size, *x.shape[2:])


def divide(population: Population, devices: int, order: Sequence[str] = ALIKE) -> Division:
    """Cuts the axes of the grid in this order, `ALIKE` or `CONTIGUOUS`.

    Raises:
        ValueError: the grid does not divide over the devices.
    """
    left, ways = devices, {}
    for name in order:
        ways[name] = math.gcd(getattr(population, name), left)
        left //= ways[name]
    if left > 1:
        blocks, rows, columns, _ = population.shape
        raise ValueError(
            f"a population's blocks x rows x columns must divide over the devices of its mesh axes; got {blocks} x {rows} x "
            f"{columns} over {devices}: choose members so that one of them is a multiple of {devices}, or fewer devices"
        )
    return Division(population, (ways["blocks"], ways["rows"], ways["columns"]))


def check(population: Population, mesh: Mesh, axes: Sequence[str]) -> None:
    """Refuses a mesh that the members cannot be divided over.

    Raises:
        ValueError: axes that the mesh does not have, that are not automatic, or that the population does not divide over.
    """
    absent = [axis for axis in axes if axis not in mesh.axis_names]
    if absent:
        raise ValueError(f"members are divided over axes of the mesh, {mesh.axis_names}; got {', '.join(absent)}")
    fixed = [str(kind) for kind in mesh.axis_types if kind != AxisType.Auto]
    if fixed:
        raise ValueError(
            f"the axes of a mesh must be automatic; got {', '.join(fixed)}: make it with "
            "jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)), or jax.sharding.Mesh"
        )
    divide(population, count(mesh, axes))


def evaluate(
    some: Callable,
    population: Population,
    mesh: Mesh,
    axes: Sequence[str],
    state,
    batch,
    per_member: bool,
    order: Sequence[str] = ALIKE,
    gather: bool = True,
):
    """Every device evaluates its own members; their scores are then gathered, once, and further results stay where they are.

    Args:
        some: (state, batch, population, (row ids, column ids)) -> (scores, aux) of these members, leading axis n.
        batch: of all members; with `per_member`, leading axis N.
        order: see `divide`.
        gather: False: scores stay where they are, too.

    Returns:
        (scores, aux), leading axis N.
    """
    division, spread = divide(population, count(mesh, axes), order), PartitionSpec(axes)

    def own(device, state, batch):
        batch = jax.tree.map(lambda x: x[0], batch) if per_member else batch
        out = some(state, batch, division.part, division.ids(device))
        return jax.tree.map(lambda x: x[None], out)

    run = per_device(own, mesh, axes, (PartitionSpec(), spread if per_member else PartitionSpec()), spread)
    scores, aux = run(state, jax.tree.map(division.by_device, batch) if per_member else batch)
    if gather:
        scores = lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
    return division.by_member(scores), jax.tree.map(division.by_member, aux)


def summed(sums: Callable, population: Population, mesh: Mesh, axes: Sequence[str], reduced: bool, *args):
    """The same sums on every device: each makes all of them, or those of its own members, which are then added.

    Args:
        sums: (*args) -> sums over all members; with the keywords `part` and `total` of `eggroll.estimate.gradients`, over some.
        args: the same on every device.
    """
    division = divide(population, count(mesh, axes))

    def own(device, *args):
        if not reduced:
            return sums(*args)
        part = lambda weights: (division.weights(weights, device), *division.ids(device))
        return sums(*args, part=part, total=lambda x: lax.psum(x, axes))

    everywhere = PartitionSpec()
    args = jax.tree.map(lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, everywhere)), args)
    return per_device(own, mesh, axes, (everywhere,) * len(args), everywhere)(*args)


def per_device(fn: Callable, mesh: Mesh, axes: Sequence[str], inputs: Any, outputs: Any) -> Callable:
    """`jax.shard_map` of fn(number of the device along the axes, *args), jitted, because it has to be."""
    # unchecked, because kernels do not say over which axes their results differ
    mapped = jax.shard_map(
        lambda device, *args: fn(device[0], *args), mesh=mesh, in_specs=(PartitionSpec(axes), *inputs), out_specs=outputs,
        axis_names=set(axes), check_vma=False,
    )  # fmt: skip
    # an argument, because the compiler cannot tell a device its number where it divides other axes
    return jax.jit(lambda *args: mapped(jnp.arange(count(mesh, axes), dtype=jnp.int32), *args))


def count(mesh: Mesh, axes: Sequence[str]) -> int:
    """Devices along these axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


# -- layouts ---------------------------------------------------------------------------------------------------------


def sharding(mesh: Mesh, layout: Layout, path: str, shape: Sequence[int]) -> NamedSharding:
    """Where an array of this path lies: the first rule whose pattern is found in its path decides, else it is everywhere.

    A rule's entries are of the last axes of an array, so that it serves stacked layers too. What the mesh does not have, or an
    axis does not divide over, leaves that axis whole.
    """
    spec = next((spec for pattern, spec in layout if re.search(pattern, path)), PartitionSpec())
    spec = tuple(spec)[-len(shape) :] if shape else ()
    entries = [None] * (len(shape) - len(spec)) + [_present(mesh, entry) for entry in spec]
    fits = [e if n % ways(mesh, e) == 0 else None for n, e in zip(shape, entries, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*fits))


def ways(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    """Parts that an entry of a `PartitionSpec` cuts an axis into."""
    return math.prod(mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry or ()))


def _present(mesh: Mesh, entry):
    names = (entry,) if isinstance(entry, str) else entry or ()
    kept = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return kept if len(kept) > 1 else kept[0] if kept else None


def shardings(mesh: Mesh, layout: Layout, params: Any) -> Any:
    """`sharding` of every leaf of a tree of arrays or shapes."""
    of = lambda path, x: sharding(mesh, layout, path_name(path), jnp.shape(x))
    return jax.tree_util.tree_map_with_path(of, params)


def place(mesh: Mesh, layout: Layout, tree: Any) -> Any:
    """A tree laid out on the mesh: arrays are moved, what is being traced is constrained."""

    return jax.tree.map(put, tree, shardings(mesh, layout, tree))


def put(x: Any, where: NamedSharding) -> Array:
    """One array laid out: moved, or constrained where it is being traced. Several processes give equal arrays of their own."""
    if isinstance(x, jax.core.Tracer):
        return lax.with_sharding_constraint(x, where)
    if where.is_fully_addressable or (isinstance(x, Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def place_beside(mesh: Mesh, layout: Layout, params: Any, state: Any) -> Any:
    """An optimizer's state being traced, every array that is as large as the parameter it belongs to laid out like it.

    Others, such as projected moments, lie as the optimizer has them, scalars everywhere.
    """
    lay = lambda x, where: x if where is None else lax.with_sharding_constraint(x, where)
    return jax.tree.map(lay, state, _beside(mesh, layout, params, state))


def init_beside(mesh: Mesh, layout: Layout, init: Callable[[Any], Any], params: Any) -> Any:
    """init(params) of an optimizer, laid out as `place_beside` does.

    A state made eagerly, or by `jax.jit` alone, leaves what starts at zero on one device: zeros depend on no parameter.
    """
    if isinstance(jax.tree.leaves(params)[0], jax.core.Tracer):
        return place_beside(mesh, layout, params, init(params))
    where = _beside(mesh, layout, params, jax.eval_shape(init, params))
    return jax.jit(init, out_shardings=where)(params)


def _beside(mesh: Mesh, layout: Layout, params: Any, state: Any) -> Any:
    owner = owners(params)

    def where(path, x):
        found = owner(path)
        if found is None:
            return NamedSharding(mesh, PartitionSpec())
        keys, param = found
        return sharding(mesh, layout, path_name(keys), x.shape) if param.shape == x.shape else None

    return jax.tree_util.tree_map_with_path(where, state)


def owners(params: Any) -> Callable[[tuple], tuple[tuple, Any] | None]:
    """path of a state array -> the (keys, parameter) that it belongs to, or None.

    The array's path ends with the parameter's keys, or its last key is their name; of several the longest ("a/kernel", not
    "kernel").
    """
    own = [pair for pair in jax.tree_util.tree_flatten_with_path(params)[0] if pair[0]]
    by_keys, by_name = ({form(keys): (keys, x) for keys, x in own} for form in (tuple, path_name))
    lengths = {len(keys) for keys in by_keys}

    def owner(path):
        names = [last.key for last in path[-1:] if isinstance(last, jax.tree_util.DictKey)]
        found = [*(by_keys.get(path[-n:]) for n in lengths), *map(by_name.get, names)]
        return max(filter(None, found), key=lambda pair: len(pair[0]), default=None)

    return owner
