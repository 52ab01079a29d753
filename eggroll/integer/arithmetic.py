"""The integer number format, and the operations of a model written in it.

Values are int8 in [-127, 127], never -128; 16 stands for 1.0. Sums are int32 and are brought back by a division or a shift,
both rounding to minus infinity, and `clip`. Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652,
appendices G to I.

A weight is an int8 array, or a `Perturbed` one; `row` and `product` take both. `rl.models.egg_float` has the same operations in
floating point.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels import int8_matmul

ONE = 16  # stands for 1.0; log-probabilities are in 1/16 bits
LARGEST = 127
_RECIPROCAL_BITS = 22


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "left", "right", "sign"), meta_fields=("shift",)
)
@dataclasses.dataclass(frozen=True)
class Perturbed:
    """One member's matrix: W + ((sign A B^T) >> shift), never formed.

    Attributes:
        base: W, int8 [out, in], the same for all members.
        left: A, int8 [out].
        right: B, int8 [in].
        sign: int32, +1 or -1.
        shift: static; 4 + s for noise of standard deviation 2^-s in units of 1.0.
    """

    base: Array
    left: Array
    right: Array
    sign: Array
    shift: int


Weight = Array | Perturbed


def clip(x: Array) -> Array:
    """int32 -> int8 in [-127, 127]."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.int8)


def add(*terms: Array) -> Array:
    """Clipped sum of int8 arrays."""
    return clip(sum(term.astype(jnp.int32) for term in terms))


def row(weight: Weight, index: Array) -> Array:
    """Rows of a matrix, an embedding: clip(W_t + ((sign A_t B) >> shift)).

    Args:
        weight: [rows, width].
        index: integers [M].

    Returns:
        int8 [M, width].
    """
    if not isinstance(weight, Perturbed):
        return weight[index]
    s = weight.sign * weight.left[index].astype(jnp.int32)
    return clip(weight.base[index] + (s[..., None] * weight.right >> weight.shift))


def vector(base: Array, left: Array, right: Array, sign: Array, shift: int) -> Array:
    """One member's vector: clip(w + ((sign u v) >> shift)), all int8 [k]."""
    return clip(base + (sign * left.astype(jnp.int32) * right >> shift))


def divisor(inputs: int, faithful: bool = False) -> int:
    """What a product over this many inputs is divided by: 16 sqrt(inputs), rounded.

    The products are in units of 1/256, and of `inputs` independent terms the variance is then kept. The released code
    (`faithful`) rounds the root down before it multiplies; for powers of 4 both are the same.
    """
    return ONE * math.isqrt(inputs) if faithful else round(ONE * math.sqrt(inputs))


def product(weight: Weight, x: Array, faithful: bool = False) -> Array:
    """clip((W x + ((sign (x . B) A) >> shift)) // divisor(in)): int8 [M, in] -> int8 [M, out].

    Its saturation is the only nonlinearity of a multilayer perceptron in this format. See `kernels.int8_matmul`.
    """
    if not isinstance(weight, Perturbed):
        out, inputs = weight.shape
        zeros = functools.partial(jnp.zeros, dtype=jnp.int8)
        weight = Perturbed(weight, zeros(out), zeros(inputs), jnp.int32(0), 8)
    return int8_matmul.matmul(
        x,
        weight.base,
        weight.right,
        weight.left,
        weight.sign,
        shift=weight.shift,
        divisor=divisor(x.shape[-1], faithful),
    )


def norm(x: Array, weight: Array) -> Array:
    """clip(floor(x w / s)) with s = max(1, sum |x| // width), the integer mean of |x|; int8 [M, width], weight [width].

    The division is one multiplication with ceil(2^22 / s): for numerators moved into [0, 254 s] it rounds down exactly, because
    254 s (s - 1) < 2^22 for s <= 127, and stays below 2^31.
    """
    mean = jnp.maximum(jnp.sum(jnp.abs(x.astype(jnp.int32)), -1, keepdims=True) // x.shape[-1], 1)
    top = LARGEST * mean
    reciprocal = -(-(1 << _RECIPROCAL_BITS) // mean)
    scaled = jnp.clip(x.astype(jnp.int32) * weight, -top, top) + top
    return ((scaled * reciprocal >> _RECIPROCAL_BITS) - LARGEST).astype(jnp.int8)


def gated(gate: Array, x: Array) -> Array:
    """(gate + 127) x >> 8: x times what a gate in [-127, 127] stands for, from 0 to 254/256. All int8."""
    return _gated(gate, x.astype(jnp.int32)).astype(jnp.int8)


def blend(gate: Array, old: Array, new: Array) -> Array:
    """old + ((gate + 127) (new - old) >> 8): never leaves [-127, 127], so the sum needs no clip. All int8."""
    return (old + _gated(gate, new.astype(jnp.int32) - old)).astype(jnp.int8)


def _gated(gate: Array, x: Array) -> Array:
    return (gate.astype(jnp.int32) + LARGEST) * x >> 8


def log_likelihood(logits: Array, target: Array) -> Array:
    """log2 p(target) of logits in 1/16 bits: y_target - floor(16 log2(sum_j exp2(y_j) / 16)), y = logits + 128.

    Args:
        logits: int8 [..., classes], at most 512 classes.
        target: integers [...].

    Returns:
        int32 [...], in 1/16 bits, at most 0 but for rounding.
    """
    y = logits.astype(jnp.int32) + 128
    chosen = jnp.take_along_axis(y, target[..., None].astype(jnp.int32), -1)[..., 0]
    return chosen - log2(jnp.sum(exp2(y), -1))


def exp2(y: Array) -> Array:
    """floor(16 * 2^(y / 16)) for y in 0 .. 255, exactly: int32 -> int32."""
    mantissa = _pick(y & 15, _MANTISSA)
    return mantissa >> (26 - (y >> 4))


def log2(k: Array) -> Array:
    """floor(16 log2(k / 16)) for k in 16 .. 2^31 - 1, exactly: int32 -> int32.

    The octave is the number of bits; within it k, moved to 31 bits, is compared with the 15 bounds 2^(30 + f/16).
    """
    octave = 31 - lax.clz(k)
    moved = k << (30 - octave)
    return 16 * octave + sum((moved >= int(bound)).astype(jnp.int32) for bound in _BOUND[1:]) - 64


def _root(f: int, up: bool) -> int:
    """2^(30 + f/16), rounded down or up: the integer 16th root of 2^(480 + f), by bisection."""
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**16 <= 1 << (480 + f) else (low, middle)
    return low + (up and low**16 != 1 << (480 + f))


_MANTISSA = tuple(_root(f, up=False) for f in range(16))
_BOUND = tuple(_root(f, up=True) for f in range(16))


def _pick(index: Array, table: tuple[int, ...]) -> Array:
    """table[index] by comparisons bit by bit: vector instructions, where a CPU would gather number by number."""
    level = [jnp.int32(entry) for entry in table]
    bit = 0
    while len(level) > 1:
        odd = (index >> bit & 1) == 1
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]
