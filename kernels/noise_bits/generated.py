"""A factor that is made where it is used: its address in place of its numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels.noise_bits import reference

KINDS = ("gaussian", "rademacher")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key", "ids"), meta_fields=("layer", "role", "kind", "rank", "size")
)
@dataclasses.dataclass(frozen=True)
class Generated:
    """Factors [*ids.shape, rank, size] of unit variance, f32, of which only the address exists.

    Number (k, n) of factor `id` is element k * size + n of stream (id, layer, role) under the key: for "gaussian" made from
    the word of that element, for "rademacher" its bit (element mod 32 of word element // 32).

    Attributes:
        key: u32 [4]: seed, seed, leaf, generation.
        ids: u32 [...], factor identities.
        layer, role: words of the stream.
        kind: "gaussian" or "rademacher".
        rank, size: of each factor.
    """

    key: Array
    ids: Array
    layer: int
    role: int
    kind: str
    rank: int
    size: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"noise is one of {KINDS}; got {self.kind!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factors."""
        return (*self.ids.shape, self.rank, self.size)

    @property
    def ndim(self) -> int:
        """Of the factors."""
        return len(self.shape)

    def array(self) -> Array:
        """The factors, drawn."""
        count = self.rank * self.size
        stream = (self.ids, np.uint32(self.layer), np.uint32(self.role))
        key = [self.key[i] for i in range(4)]

        def numbers(key, *stream):
            if self.kind == "gaussian":
                return reference.gaussian(reference.words(key, stream, count))
            return reference.signs(reference.words(key, stream, -(-count // 32)), count)

        return numbers(key, *stream).reshape(self.shape)


def tile(key: list, ids: Array, element: Array, factor: Generated) -> Array:
    """Numbers of single elements inside a kernel: f32 of the broadcast shape of ids and element.

    Args:
        key: four u32 scalars.
        ids: u32, factor identities.
        element: u32: k * size + n.
        factor: what they are of; its arrays are not read.
    """
    stream = (ids, np.uint32(factor.layer), np.uint32(factor.role))
    if factor.kind == "gaussian":
        return reference.gaussian(reference.words_at(key, stream, element), reference.ones_of_16)
    bit = (reference.words_at(key, stream, element >> np.uint32(5)) >> (element & np.uint32(31))) & np.uint32(1)
    return lax.bitcast_convert_type((bit << np.uint32(31)) | np.uint32(0x3F800000), jnp.float32)
