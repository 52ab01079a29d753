"""Noise factors as a pure function of (seed, leaf path, generation, factor identity), and the plan of who gets which.

Every number is addressed, never drawn in sequence: the Threefry key is (seed, seed, hash of the leaf's path, generation) and
the stream is (factor identity, index along stacked axes, role). Chunking, order and device count cannot change it.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels import noise_bits

KINDS = ("gaussian", "rademacher")
LEFT, RIGHT, ROW, COLUMN = range(4)  # roles: the two low-rank factors, and the row and column parts of full-rank noise
_LETTERS = re.compile(r"[sio]+")

Rules = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter is perturbed.

    Attributes:
        path: its path in the tree, "/" between keys.
        shape, dtype: of the parameter.
        form: "frozen", "full" (one number per entry), or one letter per axis: i (input side), o (output side),
            s (stacked: an independent matrix per index).
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    form: str

    @property
    def low_rank(self) -> bool:
        """Whether it gets factors instead of full noise."""
        return self.form not in ("full", "frozen")

    def extent(self, letters: str) -> int:
        """Product of the axes with one of these letters."""
        return math.prod(n for n, letter in zip(self.shape, self.form, strict=True) if letter in letters)

    def factor_shape(self, side: str) -> tuple[int, ...]:
        """The parameter's shape with 1 on the axes the factor of this side ("o" left, "i" right) does not have."""
        return tuple(n if letter in ("s", side) else 1 for n, letter in zip(self.shape, self.form, strict=True))

    @property
    def hash(self) -> int:
        """32 bits of SHA-256 of the path: the leaf's word of the noise key."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4], "little")


def plan(params, rules: Rules, rank: int) -> tuple[Leaf, ...]:
    """Decides the form of every leaf, in flattening order.

    The first rule whose pattern is found in the leaf's path decides. A rule's value is "frozen", "full", "lowrank", or one
    letter per axis (see `Leaf`). Without a rule, scalars and vectors are "full" and matrices low-rank; a leaf of three or more
    axes must be named, because nothing in its shape tells which axes are inputs (`eggroll.infer_rules` reads it off the model).

    Raises:
        TypeError: an integer (or key) leaf that is not frozen.
        ValueError: a rule that matches nothing, an unknown form, a rank above a matrix's size.
    """
    leaves = [(path_name(path), jnp.asarray(leaf)) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    unused = [p for p, _ in rules if not any(re.search(p, path) for path, _ in leaves)]
    if unused:
        raise ValueError(f"each rule must match a parameter; {unused} match none of {[path for path, _ in leaves]}")
    planned = tuple(_plan_leaf(path, leaf, rules, rank) for path, leaf in leaves)
    return distinct(planned)


def distinct(leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """The leaves, whose noise has addresses of its own.

    Raises:
        ValueError: two paths share a hash.
    """
    by_hash: dict[int, str] = {}
    for leaf in leaves:
        if by_hash.setdefault(leaf.hash, leaf.path) != leaf.path:
            raise ValueError(f"paths {by_hash[leaf.hash]!r} and {leaf.path!r} share a 32-bit hash: rename one of them")
    return tuple(leaves)


def path_name(path) -> str:
    """A parameter's path with "/" between keys; the `.value` of a Flax NNX variable is no part of it."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _plan_leaf(path: str, leaf: Array, rules: Rules, rank: int) -> Leaf:
    form = next((form for pattern, form in rules if re.search(pattern, path)), None)
    if form == "frozen":
        return Leaf(path, leaf.shape, leaf.dtype, form)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"parameters must be floating point to be perturbed; {path!r} is {leaf.dtype}{list(leaf.shape)}: keep it out of "
            f"the parameters (close over it in the score function) or freeze it with rules=(({path!r}, 'frozen'), ...)"
        )
    if form is None:
        form = "full" if leaf.ndim < 2 else "lowrank"
    if form == "full":
        return Leaf(path, leaf.shape, leaf.dtype, form)
    if form == "lowrank":
        if leaf.ndim != 2:
            raise ValueError(
                f"only a matrix is low-rank without further ado; {path!r} has shape {leaf.shape}: name its axes with one "
                f"letter each, i (input), o (output) or s (stacked), for example rules=(({path!r}, "
                f"'{'s' * max(leaf.ndim - 2, 0)}io'),), let eggroll.infer_rules(score, params, row) find them, or use 'full'"
            )
        form = "io"
    if not _LETTERS.fullmatch(form) or len(form) != leaf.ndim or "i" not in form or "o" not in form:
        raise ValueError(
            f"a rule's form is 'lowrank', 'full', 'frozen', or one letter i, o or s per axis with at least one i and one o; "
            f"got {form!r} for {path!r} of shape {leaf.shape}"
        )
    planned = Leaf(path, leaf.shape, leaf.dtype, form)
    size = min(planned.extent("i"), planned.extent("o"))
    if rank > size:
        raise ValueError(
            f"the rank must not exceed the matrix's smaller side; rank {rank} > {size} for {path!r} of shape {leaf.shape} "
            f"with axes {form!r}: lower the rank or perturb it in full with rules=(({path!r}, 'full'), ...)"
        )
    return planned


def seed_words(key: Array) -> tuple[Array, Array]:
    """The two seed words of a key made by `jax.random.key(seed)`.

    Raises:
        TypeError: not a typed key of two words (the default implementation, threefry2x32).
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or jax.random.key_data(key).shape != (2,):
        raise TypeError(
            f"the key must be one typed key of two words, jax.random.key(seed) with the default implementation; got {key}"
        )
    data = jax.random.key_data(key)
    return data[0], data[1]


def draw(requests: Sequence[tuple[Leaf, int]], key: Sequence[Array], ids: Array, rank: int, kind: str) -> list[Array]:
    """The noise of several leaves for every factor identity in `ids`.

    Streams of about one length are drawn in one call, whichever leaf they belong to: a model then compiles a handful of
    copies of the generator instead of one per leaf and role. A stream's numbers do not depend on the company it is drawn in.

    Args:
        requests: (leaf, role) pairs; role LEFT or RIGHT for low-rank leaves, ROW or COLUMN for full ones.
        key: (seed word, seed word, generation word), u32 scalars.
        ids: u32 [...]: factor identities.
        rank: r, of low-rank leaves.
        kind: "gaussian" or "rademacher". The column part of full noise is Rademacher in either case.

    Returns:
        Per request, f32: [*ids.shape, stacked, r, elements] for a low-rank leaf, its stacked axes and this side's axes each in
        one; [*ids.shape, *leaf.shape] for full noise.
    """
    streams = [_Stream(leaf, role, rank, kind) for leaf, role in requests]
    lengths = sorted({stream.length for stream in streams})
    drawn: dict[int, Array] = {}
    for length in lengths:
        mine = [i for i, stream in enumerate(streams) if stream.length == length]
        rows = [(s.leaf.hash, layer, s.role) for s in (streams[i] for i in mine) for layer in range(s.stacked)]
        hashes, layers, roles = np.asarray(rows, np.uint32).T
        words = noise_bits.words((key[0], key[1], hashes, key[2]), (ids[..., None], layers, roles), length)
        ends = np.cumsum([streams[i].stacked for i in mine])
        drawn |= dict(zip(mine, jnp.split(words, ends[:-1], axis=-2), strict=True))
    numbers = lambda key, words: [stream.numbers(row) for stream, row in zip(streams, words, strict=True)]
    return noise_bits.once(numbers, tuple(key), [drawn[i] for i in range(len(streams))])


def factors(
    leaves: Sequence[Leaf], key: Sequence[Array], rows: Array, columns: Array, rank: int, kind: str, crossed: bool
) -> tuple[list[Array | None], list[Array | None]]:
    """Row parts and column parts of the noise of every leaf, as `draw` returns them.

    Args:
        rows, columns: u32 [..., P] and [..., Q], factor identities.
        crossed: whether several columns share a row, so that full noise needs a column part.

    Returns:
        Two lists with one entry per leaf, None where a leaf has no such part.
    """

    def side(ids, low_rank_role, full_role, with_full):
        wanted = [leaf.low_rank or (leaf.form == "full" and with_full) for leaf in leaves]
        requests = [
            (leaf, low_rank_role if leaf.low_rank else full_role) for leaf, w in zip(leaves, wanted, strict=True) if w
        ]
        drawn = iter(draw(requests, key, ids, rank, kind))
        return [next(drawn) if w else None for w in wanted]

    return side(rows, LEFT, ROW, True), side(columns, RIGHT, COLUMN, crossed)


def addresses(
    leaf: Leaf, key: Sequence[Array], ids: Array, role: int, rank: int, kind: str
) -> tuple[noise_bits.Generated, ...]:
    """One side of a low-rank leaf's noise, one address per stacked index: what `draw` gives, not drawn."""
    words = jnp.stack([jnp.asarray(word, jnp.uint32) for word in (key[0], key[1], np.uint32(leaf.hash), key[2])])
    size = leaf.extent("o" if role == LEFT else "i")
    return tuple(noise_bits.Generated(words, ids, s, role, kind, rank, size) for s in range(leaf.extent("s")))


class _Stream:
    """One request's words: how many rows and words a row, and what becomes of them."""

    def __init__(self, leaf: Leaf, role: int, rank: int, kind: str):
        self.leaf, self.role, self.rank = leaf, role, rank
        self.packed = kind == "rademacher" or role == COLUMN
        full = role in (ROW, COLUMN)
        self.stacked = 1 if full else leaf.extent("s")
        elements = math.prod(leaf.shape) if full else leaf.extent("o" if role == LEFT else "i")
        self.shape = leaf.shape if full else (self.stacked, rank, elements)
        self.count = max(elements, 1) * (1 if full else rank)
        words = -(-self.count // 32) if self.packed else self.count
        # Short streams round up to a power of two (a longer draw starts with the shorter one), long ones are drawn as they are.
        self.length = words if words > 1024 else max(64, 1 << (words - 1).bit_length())

    def numbers(self, words: Array) -> Array:
        """u32 [*ids, stacked, length] -> the noise."""
        lead = words.shape[:-2]
        if self.packed:
            values = noise_bits.signs(words[..., : -(-self.count // 32)], self.count)
        else:
            values = noise_bits.gaussian(words[..., : self.count])
        return values.reshape(*lead, *self.shape)


def unfold(leaf: Leaf, factor: Array, role: int) -> Array:
    """[..., stacked, r, elements] -> [..., *leaf.shape with 1 on the axes this factor lacks, r]."""
    side = "o" if role == LEFT else "i"
    lead = factor.ndim - 3
    axes = [a for letter in ("s", side) for a, mine in enumerate(leaf.form) if mine == letter]
    stacked = leaf.form.count("s")
    sizes = [leaf.shape[a] for a in axes]
    split = factor.reshape(*factor.shape[:lead], *sizes[:stacked], factor.shape[-2], *sizes[stacked:])
    position = {a: lead + i + (i >= stacked) for i, a in enumerate(axes)}
    order = (*range(lead), *(position[a] for a in sorted(axes)), lead + stacked)
    return split.transpose(order).reshape(*factor.shape[:lead], *leaf.factor_shape(side), factor.shape[-2])


def fold(leaf: Leaf, gradient: Array) -> Array:
    """[stacked, output elements, input elements] -> the leaf's shape."""
    axes = [a for letter in "soi" for a, mine in enumerate(leaf.form) if mine == letter]
    split = gradient.reshape([leaf.shape[a] for a in axes])
    return split.transpose([axes.index(a) for a in range(len(axes))])
