"""The projection that takes whole tensors: some are in a window's optimizer with memory, the others are not.

Tensors of one shape form a family with a fixed number of slots, so that arrays keep their shapes whichever tensors are active,
and choosing others recompiles nothing. A slot holds what the optimizer keeps of one tensor. State bytes are therefore exact at
all times: slots x size of the tensor, summed over families.

Orders, for a family of c tensors and k slots: a list of the tensors, and a window of k that moves on by k at every refresh and
wraps round: "ascending" and "descending" (all tensors once in ceil(c / k) refreshes), "mirror" (from both ends alternately),
"reshuffled" (a new order after each round), "random" (k anew at every refresh). Tensors are listed by path, numbers in it by
value, and inside a stack by index.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rl.optim import groups
from rl.optim.projection import Projection, columns


class Member(NamedTuple):
    """A leaf of a family: the number of the leaf in its tree, its stack axes, and the numbers of its tensors in the list."""

    leaf: int
    lead: int
    order: tuple[int, ...]


class Family(NamedTuple):
    """Tensors of one shape."""

    name: str  # path of its first leaf
    seed: int
    shape: tuple[int, ...]
    slots: int
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """How many tensors."""
        return sum(len(member.order) for member in self.members)


Families = Callable[[Any], Sequence[Family]]


def _shapes(params) -> dict[tuple, list]:
    """(shape, dtype) of a tensor -> (path, number of the leaf, stack axes of the leaf)."""
    shapes: dict[tuple, list] = {}
    for i, (path, leaf) in enumerate(groups.leaves(params)):
        lead = leaf.ndim - 2 if groups.is_matrix(path, leaf) else groups.stacked(path)
        shapes.setdefault((leaf.shape[lead:], leaf.dtype), []).append((path, i, leaf.shape[:lead]))
    return shapes


def by_shape(density: float) -> Families:
    """Families of equal shape, one matrix a tensor, with round(density c) slots.

    Raises:
        ValueError: a family whose slots round to none although density > 0, which would never be active.
    """

    def families(params):
        made = [_family(shape, parts, lambda c: round(density * c)) for (shape, _), parts in _shapes(params).items()]
        for family in made:
            if density > 0 and not family.slots:
                raise ValueError(
                    f"density {density:g} of {family.size} tensors of shape {family.shape} rounds to none ({family.name}): "
                    "take a larger density, 0, or the group 'full' by a rule"
                )
        return made

    return families


def by_role(active: int, pattern: str) -> Families:
    """Families of equal role in the blocks of a network (its layers), `active` blocks at a time, the same in all families.

    Args:
        pattern: finds "layer_3" and the like in a path, number included; a stack over layers needs none.

    Raises:
        ValueError: leaves outside blocks, blocks that differ, or fewer blocks than `active`.
    """

    def families(params):
        roles: dict[str, list] = {}
        for i, (path, leaf) in enumerate(groups.leaves(params)):
            lead = leaf.shape[: groups.stacked(path)]
            if not lead and not re.search(pattern, path):
                raise ValueError(
                    f"{path} is in no block of pattern {pattern!r}: put it into the group 'full' or 'frozen'"
                )
            roles.setdefault(re.sub(pattern, "*", path, count=1), []).append((path, i, lead, leaf.shape[len(lead) :]))
        made = []
        for role, parts in roles.items():
            if len({shape for *_, shape in parts}) > 1:
                raise ValueError(
                    f"blocks must be alike to share a slot; {role} has shapes {sorted({p[-1] for p in parts})}"
                )
            made.append(_family(parts[0][-1], [part[:3] for part in parts], lambda c: active)._replace(seed=0))
        if len({family.size for family in made}) > 1:
            counts = {family.name: family.size for family in made}
            raise ValueError(f"blocks must have the same parameters to share a slot; counts differ: {counts}")
        if made and active > made[0].size:
            raise ValueError(f"active must be at most the number of blocks; got {active} of {made[0].size}")
        return made

    return families


def _family(shape, parts, slots: Callable[[int], int]) -> Family:
    natural = lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)]
    parts = sorted(parts, key=lambda part: natural(part[0]))
    members, count = [], 0
    for _, leaf, lead in parts:
        size = math.prod(lead)
        members.append(Member(leaf, len(lead), tuple(range(count, count + size))))
        count += size
    return Family(parts[0][0], groups.seed_word(parts[0][0]), tuple(shape), slots(count), tuple(members))


def _fixed(listed: Callable[[int], np.ndarray]) -> Callable:
    def order(count, slots, window, key):
        return jnp.asarray(listed(count))[(window * slots + jnp.arange(slots)) % count]

    return order


def _reshuffled(count, slots, window, key):
    rounds = -(-count // slots)
    order = jax.random.permutation(jax.random.fold_in(key, window // rounds), count)
    return order[(window % rounds * slots + jnp.arange(slots)) % count]


ORDERS = {
    "ascending": _fixed(np.arange),
    "descending": _fixed(lambda count: np.arange(count)[::-1]),
    "mirror": _fixed(lambda count: np.stack([np.arange(count), np.arange(count)[::-1]], axis=1).reshape(-1)[:count]),
    "reshuffled": _reshuffled,
    "random": lambda count, slots, window, key: jax.random.permutation(jax.random.fold_in(key, window), count)[:slots],
}


def active(family: Family, order: str, window: Array, seed: int) -> Array:
    """Numbers of the tensors that are active, i32 [slots]."""
    key = jax.random.fold_in(jax.random.key(seed), family.seed)
    return ORDERS[order](family.size, family.slots, window, key).astype(jnp.int32)


def gather(family: Family, leaves: Sequence[Array], ids: Array) -> Array:
    """The tensors of these numbers, [slots, *shape]: each is copied once, the inactive ones are not touched."""
    stacks = [leaves[member.leaf].reshape(-1, *family.shape) for member in family.members]
    if len(stacks) == 1:
        return jnp.take(stacks[0], ids, axis=0, mode="clip")
    slot = jnp.full(family.size, -1).at[ids].set(jnp.arange(family.slots))
    out = jnp.zeros((family.slots, *family.shape), stacks[0].dtype)
    for i, tensor in enumerate(tensor for stack in stacks for tensor in stack):
        place = lambda out, tensor=tensor, i=i: lax.dynamic_update_index_in_dim(out, tensor, slot[i], 0)
        out = lax.cond(slot[i] >= 0, place, lambda out: out, out)
    return out


def scatter(family: Family, member: Member, leaf: Array, ids: Array, slots: Array, rest: Array) -> Array:
    """A leaf's tensors from the slots where they are active, else from `rest`."""
    place = jnp.full(family.size, -1).at[ids].set(jnp.arange(family.slots))[jnp.asarray(member.order)]
    if not member.lead:
        taken = lax.dynamic_index_in_dim(slots, jnp.maximum(place[0], 0), keepdims=False)
        return jnp.where(place[0] >= 0, taken, rest)
    taken = jnp.take(slots, jnp.maximum(place, 0), axis=0, mode="clip")
    flat = rest.reshape(-1, *family.shape)
    chosen = jnp.where(place.reshape(-1, *[1] * len(family.shape)) >= 0, taken, flat)
    return chosen.reshape(leaf.shape)


def blocks(families: Families, order: str = "random", seed: int = 0) -> Projection:
    """The projection of some whole tensors."""
    groups.choose("order", order, ORDERS)

    def zeros(params):
        dtypes = [leaf.dtype for _, leaf in groups.leaves(params)]
        return {f.name: jnp.zeros((f.slots, *f.shape), dtypes[f.members[0].leaf]) for f in families(params)}

    def where(stored, window, gradients):
        return {f.name: active(f, order, window, seed) for f in families(gradients) if f.slots}

    def down(where, gradients):
        leaves = jax.tree.leaves(gradients)
        return {
            f.name: gather(f, leaves, where[f.name])
            if f.slots
            else jnp.zeros((0, *f.shape), leaves[f.members[0].leaf].dtype)
            for f in families(gradients)
        }

    def join(where, small, gradients, projected, free):
        leaves = jax.tree.leaves(gradients)
        out = [jnp.zeros_like(leaf) if free is None else free(leaf) for leaf in leaves]
        for f in families(gradients):
            for member in f.members if f.slots else ():
                leaf = leaves[member.leaf]
                out[member.leaf] = scatter(f, member, leaf, where[f.name], small[f.name], out[member.leaf])
        return jax.tree.unflatten(jax.tree.structure(gradients), out)

    return Projection(lambda params: {}, zeros, lambda stored, window, gradients: stored, where, down, join)


def or_columns(density: float, order: str = "random", seed: int = 0) -> Projection:
    """Blocks of equal shape; the columns of a matrix whose shape is too rare for a slot (round(density c) = 0)."""
    whole, part = blocks(by_shape(density), order, seed), columns(density, seed)

    def rare(params) -> set[str]:
        few = lambda parts: density > 0 and round(density * sum(math.prod(lead) for *_, lead in parts)) == 0
        found = {path for parts in _shapes(params).values() if few(parts) for path, *_ in parts}
        return {path for path, leaf in groups.leaves(params) if path in found and groups.is_matrix(path, leaf)}

    def parts(tree, left):
        named = groups.leaves(tree)
        return {path: x for path, x in named if path not in left}, {path: x for path, x in named if path in left}

    def zeros(params):
        common, left = parts(params, rare(params))
        return {"blocks": whole.zeros(common), "columns": part.zeros(left)}

    def where(stored, window, gradients):
        common, left = parts(gradients, rare(gradients))
        return {"blocks": whole.where({}, window, common), "columns": part.where({}, window, left)}

    def down(where, gradients):
        common, left = parts(gradients, rare(gradients))
        return {"blocks": whole.down(where["blocks"], common), "columns": part.down(where["columns"], left)}

    def join(where, small, gradients, projected, free):
        common, left = parts(gradients, rare(gradients))
        made = whole.join(where["blocks"], small["blocks"], common, projected["blocks"], free)
        made |= part.join(where["columns"], small["columns"], left, projected["columns"], free)
        return jax.tree.unflatten(jax.tree.structure(gradients), [made[path] for path, _ in groups.leaves(gradients)])

    return Projection(lambda params: {}, zeros, lambda stored, window, gradients: stored, where, down, join)
