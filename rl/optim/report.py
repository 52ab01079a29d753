"""How many bytes an optimizer's state takes, from shapes alone."""

import math
from typing import Any, NamedTuple

import jax
import optax

from eggroll.noise import path_name
from eggroll.sharding import owners


class Report(NamedTuple):
    """State bytes.

    Attributes:
        total: all of the state.
        groups: group of `optax.partition` -> bytes ("" outside of groups).
        parameters: path -> bytes that belong to this parameter alone.
        shared: bytes of counters, seeds and slots that several parameters use in turn.
    """

    total: int
    groups: dict[str, int]
    parameters: dict[str, int]
    shared: int

    def __str__(self) -> str:
        """Such as "12.0 MiB (full 3.0, split 9.0)"."""
        mib = lambda size: f"{size / 2**20:.1f}"
        parts = ", ".join(f"{name} {mib(size)}" for name, size in self.groups.items() if name)
        return f"{mib(self.total)} MiB" + (f" ({parts})" if parts else "")


def report(tx: optax.GradientTransformation, params: Any) -> Report:
    """The state that `tx.init(params)` would make; nothing is allocated.

    Args:
        tx: any optax transformation.
        params: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The `Report`: a state array belongs to the parameter whose keys its own end with, and to a group of
        `optax.partition` where one of its keys names it.
    """
    params = jax.eval_shape(lambda params: params, params)
    state = jax.eval_shape(tx.init, params)
    owner, total, shared, by_group = owners(params), 0, 0, {}
    parameters = {path_name(keys): 0 for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        size = math.prod(x.shape) * x.dtype.itemsize
        total += size
        group = _group(path)
        by_group[group] = by_group.get(group, 0) + size
        found = owner(path)
        if found is None or x.ndim > len(found[1].shape):
            shared += size
        else:
            parameters[path_name(found[0])] += size
    return Report(total, by_group, parameters, shared)


def _group(path) -> str:
    """The label that follows `inner_states`, the field of `optax.partition`."""
    after = (b for a, b in zip(path, path[1:], strict=False) if a == jax.tree_util.GetAttrKey("inner_states"))
    return next((key.key for key in after if isinstance(key, jax.tree_util.DictKey)), "")
