"""Which rule moves which parameter: groups by path, and what every optimizer of this folder is made of.

A matrix is a leaf of two axes [m, n]; further axes in front are stacks of matrices, each treated by itself. A leaf below a key
"layers" is a stack over layers, so [layers, n] is one vector a layer, unless a numbered layer follows ("layers/0",
"layers/layer_0"). Names that end in "bias" or "scale" are of vectors, whatever their axes. By default a linear layer's
weight is a matrix, stacked over layers or "experts" at most: kernels with more axes (convolutions, heads) are not.
"""

import numbers
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from eggroll.noise import path_name
from eggroll.sharding import owners, ways

Rules = Sequence[tuple[str, str]]
_LOOKUP = re.compile(
    r"(^|/)(\w*embed\w*|(\w+_)?emb|wte|wpe|\w*head|\w*logits\w*|\w*classifier\w*)(/|$)|^(params/)?output(_\w+)?(/|$)",
    re.IGNORECASE,
)
_STACK = re.compile(r"(^|/)layers/(?!(\w*(layer|block)s?_?)?\d+(/|$))", re.IGNORECASE)
_VECTOR = re.compile(r"(bias|scale)$", re.IGNORECASE)


def leaves(tree) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in flattening order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def stacked(path: str) -> int:
    """How many of a leaf's axes are stacks whatever its shape: 1 for layers under a scan."""
    return int(_STACK.search(path) is not None)


def is_matrix(path: str, leaf) -> bool:
    """Whether a leaf is a matrix or a stack of them."""
    return jnp.ndim(leaf) - stacked(path) >= 2 and not _VECTOR.search(path)


def is_plain(path: str, leaf) -> bool:
    """Whether a leaf is a matrix, stacked over layers or experts at most."""
    experts = int("expert" in path.lower())
    return is_matrix(path, leaf) and jnp.ndim(leaf) - stacked(path) <= 2 + experts


def is_lookup(path: str) -> bool:
    """Whether a path is of an embedding or of the output layer."""
    return _LOOKUP.search(path) is not None


def is_linear(path: str, leaf) -> bool:
    """Whether a leaf is taken for the weight of a linear layer: a plain matrix outside embeddings and the output layer."""
    return is_plain(path, leaf) and not is_lookup(path)


def check_rank(path: str, leaf, rank: int) -> None:
    """Checks that a leaf can be projected to this rank.

    Raises:
        ValueError: it is no matrix, or has a side below the rank.
    """
    if not is_matrix(path, leaf):
        raise ValueError(
            f"projections need matrices; {path} has shape {leaf.shape}: put it into the group 'full' by a rule, or take the "
            "projection 'block', which takes any tensor"
        )
    if rank > min(leaf.shape[-2:]):
        raise ValueError(
            f"rank must be at most a matrix's smaller side; got {rank} for {path} of shape {leaf.shape[-2:]}: lower it, or "
            "put the leaf into the group 'full' by a rule"
        )


def seed_word(path: str) -> int:
    """A number of the path's own: random choices depend on (seed, time, path) and on nothing else."""
    return zlib.crc32(path.encode())


def over_stack(fn: Callable, lead: int) -> Callable:
    """Maps a function of one matrix over so many leading axes of all its arguments."""
    for _ in range(lead):
        fn = jax.vmap(fn)
    return fn


def labels(params, rules: Rules, default: Callable[[str, Any], str], groups: Mapping[str, Any]):
    """The group of every leaf: the first rule whose pattern is found in its path decides, else `default`.

    Raises:
        ValueError: a rule that names no group, or whose pattern is found in no path.
    """
    named = leaves(params)
    for pattern, group in rules:
        if group not in groups:
            raise ValueError(f"rule {(pattern, group)} must name one of the groups {', '.join(groups)}; got {group!r}")
        if named and not any(re.search(pattern, path) for path, _ in named):
            some = ", ".join(path for path, _ in named[:5])
            raise ValueError(
                f"rule {(pattern, group)} matches none of {len(named)} paths, such as {some}: mend its pattern"
            )
    chosen = [
        next((group for pattern, group in rules if re.search(pattern, path)), None) or default(path, leaf)
        for path, leaf in named
    ]
    return jax.tree.unflatten(jax.tree.structure(params), chosen)


def grouped(
    learning_rate: optax.ScalarOrSchedule,
    groups: Mapping[str, optax.GradientTransformation],
    *,
    rules: Rules,
    default: Callable[[str, Any], str],
    weight_decay: Any,
    mask: Any = None,
    decayed: Callable[[str], bool] = lambda group: group != "frozen",
) -> optax.GradientTransformation:
    """An optimizer of several rules: W <- W - lr (rule of its group(G) + weight_decay W).

    Args:
        groups: name -> transformation to a descent direction.
        rules, default: see `labels`.
        mask: what decays, as of `optax.adamw`: a tree of bools or a function that makes it of the parameters; None: all.
        decayed: group -> whether its weights decay.
    """
    label = lambda tree: labels(tree, rules, default, groups)

    def decaying(tree):
        chosen = jax.tree.map(decayed, label(tree))
        own = mask(tree) if callable(mask) else mask
        return chosen if own is None else jax.tree.map(lambda a, b: a and bool(b), chosen, own)

    return sharded(
        optax.chain(
            wide(optax.partition(dict(groups), label)),
            optax.add_decayed_weights(weight_decay, decaying),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def wide(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes and keeps its state in f32 where gradients and parameters are narrower; updates have the gradients' types."""
    widen = lambda tree: jax.tree.map(_widened, tree)

    def update(updates, state, params=None):
        new, state = tx.update(widen(updates), state, None if params is None else widen(params))
        return jax.tree.map(lambda x, old: x.astype(jnp.result_type(old)), new, updates), state

    return optax.GradientTransformation(lambda params: tx.init(widen(params)), update)


def _widened(x):
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise ValueError(
            f"these optimizers are of real numbers; got a leaf {x.dtype}{list(x.shape)}: give it to another one by "
            "optax.partition"
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x if x.dtype == dtype else x.astype(dtype)


def sharded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lays every array of the first state out as the parameter it belongs to, axis by axis, under `jax.jit`, too.

    An array belongs to the parameter whose keys its own end with; smaller axes are sharded alike where they divide. Meshes
    with automatic axes only.
    """

    def init(params):
        state = tx.init(params)
        owner = owners(jax.tree.map(jnp.asarray, params))

        def spread(path, x):
            found = owner(path)
            return x if found is None else _alike(x, found[1])

        return jax.tree_util.tree_map_with_path(spread, state)

    return optax.GradientTransformation(init, tx.update)


def _alike(x, param):
    extra = x.ndim - param.ndim
    if extra not in (0, 1) or any(a > b for a, b in zip(x.shape[extra:], param.shape, strict=True)) or not x.size:
        return x
    if isinstance(x, jax.core.Tracer) or isinstance(param, jax.core.Tracer):
        like = param[tuple(slice(size) for size in x.shape[extra:])]
        never = jax.lax.optimization_barrier(False)  # not folded away, so the compiler lays both arms out alike
        return jnp.where(never, like.astype(x.dtype), x)
    sharding = getattr(param, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return x
    spec = (*sharding.spec, *[None] * (param.ndim - len(sharding.spec)))
    fits = [name if x.shape[extra + i] % ways(sharding.mesh, name) == 0 else None for i, name in enumerate(spec)]
    return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * extra, *fits)))


def number(name: str, value, low: float, high: float = float("inf"), *, whole: bool = True) -> None:
    """Checks a setting that shapes depend on.

    Raises:
        ValueError: not a plain number (a schedule, an array of `optax.inject_hyperparams`), not a whole one, or out of
            [low, high].
    """
    if isinstance(value, numbers.Real) and whole and not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"{name} must be a plain number, because the shapes of the state depend on it; got {value!r}: schedules go into "
            f"learning_rate, and optax.inject_hyperparams takes it as static_args=({name!r},)"
        )
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}; got {value}")


def choose(name: str, value: str, known: Mapping[str, Any]) -> Any:
    """The named entry of a table.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    return known[value]
