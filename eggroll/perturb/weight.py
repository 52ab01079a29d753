"""A weight plus a low-rank perturbation that is never formed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll.perturb.interpreter import Weight


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "left", "right", "scale"),
    meta_fields=("path", "activation"),
)
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """base + scale * sum_k left[..., k] * right[..., k].

    The factors have the axes of the base, size 1 where they do not depend on an axis, and the rank axis last. For a matrix
    [n, m] with left [1, m, r] and right [n, 1, r] this is base + scale * right left^T; an axis on which both factors are
    full is a stack of independent matrices. Slicing, transposing and reshaping act on each factor by itself.

    Attributes:
        base: [*shape], shared by all members.
        left: [*(d or 1 for d in shape), r], f32.
        right: [*(1 or d for d in shape), r], f32.
        scale: scalar: a member's sign, where sigma / sqrt(r) is in the left factor.
        path: the parameter it came from, for messages.
        activation: whether it may be an activation by now: rows of it picked by index, or an array added to it.
    """

    base: Array
    left: Array
    right: Array
    scale: Array
    path: str
    activation: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Of the base."""
        return self.base.ndim

    @property
    def rank(self) -> int:
        """r."""
        return self.left.shape[-1]

    @property
    def resolvable(self) -> bool:
        """True if one factor alone is as large as the base (a vector in disguise), or it may be an activation."""
        return self.activation or self.base.size * self.rank in (self.left.size, self.right.size)

    def perturbation(self) -> Array:
        """scale * sum_k left * right, f32 (or wider), with the base's shape."""
        outer = jnp.sum(self.left * self.right, axis=-1) if self.rank > 1 else self.left[..., 0] * self.right[..., 0]
        return jnp.broadcast_to(self.scale * outer, self.shape)

    def resolve(self) -> Array:
        """base + perturbation, in the base's type."""
        return self.base + self.perturbation().astype(self.base.dtype)

    def leading(self):
        """Slices along axis 0; a factor that does not depend on it is closed over."""
        parts = {"base": self.base, "left": self.left, "right": self.right}
        sliced = {name: x for name, x in parts.items() if x.shape[0] == self.shape[0]}
        fixed = {name: lax.squeeze(x, (0,)) for name, x in parts.items() if name not in sliced}
        return sliced, lambda row: dataclasses.replace(self, **fixed, **row)

    def map(self, fn) -> "LowRank":
        """Applies a structural operation: fn(array, trailing) on base (trailing 0) and factors (trailing 1, the rank axis)."""
        return dataclasses.replace(self, base=fn(self.base, 0), left=fn(self.left, 1), right=fn(self.right, 1))
