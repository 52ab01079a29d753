"""Rotary position embeddings and the scalings of them that released checkpoints use."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Settings of the rotary embedding; which of them are read depends on the type.

    Attributes:
        type: one of `TYPES`.
        theta: base of the frequencies theta^(-2i/d).
        factor: by how much the context is stretched (all types but default).
        original_length: context length before stretching, in tokens (yarn, llama3); None is the model's `max_length`.
        low_frequency_factor, high_frequency_factor: llama3's band, in turns per original context.
        beta_fast, beta_slow: yarn's band, in turns per original context.
        attention_factor, mscale, mscale_all_dim: yarn's factor on cos and sin, or how to compute it.
        truncate: whether yarn rounds its band to whole dimensions.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"the rotary embedding's type must be one of {list(TYPES)}; got {self.type!r}")


def rotation(rope: Rope, head_dim: int, max_length: int, positions: Array, length: Array | int) -> tuple[Array, Array]:
    """cos and sin of position times frequency, f32 [L, head_dim / 2], scaled where the type says so.

    Args:
        positions: [L] i32.
        length: of the sequence so far, in tokens; only "dynamic" reads it, and like the reference implementation it rotates
            the tokens of one call by the frequencies of that call, so beyond `max_length` a cache holds older ones.
    """
    if rope.type == "dynamic":
        frequencies, scale = _dynamic(rope, head_dim, max_length, length), 1.0
    else:
        frequencies, scale = _fixed(rope, head_dim, max_length)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (x_i, x_{i + d/2}) of x [L, heads, d] by the angle i of its position; computed in f32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _fixed(rope: Rope, head_dim: int, max_length: int) -> tuple[np.ndarray, float]:
    """Frequencies [head_dim / 2] that do not depend on the sequence, and the factor on cos and sin."""
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    original = rope.original_length or max_length
    match rope.type:
        case "linear":
            return frequencies / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, frequencies, original), 1.0
        case "yarn":
            return _yarn(rope, frequencies, original), _yarn_scale(rope)
        case _:
            return frequencies, 1.0


def _dynamic(rope: Rope, head_dim: int, max_length: int, length: Array | int) -> Array:
    """theta grows with the length once it exceeds max_length: theta (factor n / max - (factor - 1))^(d / (d - 2))."""
    stretch = rope.factor * jnp.maximum(length, max_length) / max_length - (rope.factor - 1)
    # In logarithms: a f32 power of a large base would cost digits.
    log_theta = math.log(rope.theta) + jnp.log(stretch) * (head_dim / (head_dim - 2))
    return jnp.exp(-log_theta * jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32))


def _llama3(rope: Rope, frequencies: np.ndarray, original: int) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, a linear blend in turns per context between."""
    turns = original * frequencies / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(rope: Rope, frequencies: np.ndarray, original: int) -> np.ndarray:
    """Blend of kept (fast) and divided (slow) frequencies, linear in the dimension (arXiv 2309.00071)."""
    d = 2 * len(frequencies)
    dimension_of = lambda turns: d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    width = high - low if high != low else 0.001
    slow = np.clip((np.arange(d // 2) - low) / width, 0.0, 1.0)
    return frequencies * (1 - slow) + frequencies / rope.factor * slow


def _yarn_scale(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    grown = lambda m: 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)
