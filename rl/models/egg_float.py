"""The operations of `eggroll.integer.arithmetic` in floating point, for backprop and as the model's twin in f32.

Numbers are the integers divided by 16: values saturate at 127/16, and nothing is rounded. Weights are plain arrays.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.integer.arithmetic import LARGEST, ONE

_TOP = LARGEST / ONE


def from_integers(params: Any, dtype=jnp.float32) -> Any:
    """The integer model's parameters in units of 1.0."""
    return jax.tree.map(lambda x: x.astype(dtype) / ONE, params)


def clip(x: Array) -> Array:
    """Saturates at +-127/16."""
    return jnp.clip(x, -_TOP, _TOP)


def add(*terms: Array) -> Array:
    """Saturated sum."""
    return clip(sum(terms))


def row(weight: Array, index: Array) -> Array:
    """Rows of a matrix."""
    return weight[index]


def product(weight: Array, x: Array, faithful: bool = False) -> Array:
    """clip(W x / sqrt(in)): [M, in] -> [M, out]."""
    return clip(x @ weight.T / math.sqrt(x.shape[-1]))


def norm(x: Array, weight: Array) -> Array:
    """clip(x w / max(1/16, mean |x|))."""
    return clip(x * weight / jnp.maximum(jnp.mean(jnp.abs(x), -1, keepdims=True), 1 / ONE))


def gated(gate: Array, x: Array) -> Array:
    """(16 gate + 127) / 256 times x."""
    return (ONE * gate + LARGEST) / 256 * x


def blend(gate: Array, old: Array, new: Array) -> Array:
    """old + gated(gate, new - old)."""
    return old + gated(gate, new - old)


def log_likelihood(logits: Array, target: Array) -> Array:
    """log2 p(target) in 1/16 bits; logits are log2-probabilities up to a constant."""
    logits = ONE * logits
    chosen = jnp.take_along_axis(logits, target[..., None].astype(jnp.int32), -1)[..., 0]
    return chosen - ONE / math.log(2) * jax.nn.logsumexp(logits * (math.log(2) / ONE), -1)


def of_integers(logits: Array, target: Array) -> Array:
    """`log_likelihood` of int8 logits: what they say exactly, without the integer likelihood's rounding."""
    return log_likelihood(logits.astype(jnp.float32) / ONE, target)
