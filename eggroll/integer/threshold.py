"""From sums of noise to steps of one unit: a two-sided test per entry, the schedule of its level, and integer momentum.

Z = sum over pairs of f A B^T. Without signal, Z has mean 0 and standard deviation sqrt(pairs) E[x^2], x a number of the noise.
An entry moves by the sign of Z where |Z| reaches Phi^-1(1 - alpha / 2) of these: about the share alpha of entries moves where
nothing can be learned, and more where Z has a signal. Thresholds are tables of integers, one entry per generation.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
from jax import Array

_MOMENTUM_BITS = 8  # log2 of the units that one standard deviation of Z becomes, rounded down
_INT16 = 2**15 - 1


def schedule(alpha: float, decay: int, steps: int) -> tuple[float, ...]:
    """alpha_t for `steps` generations: alpha itself up to 1; above it 1 / ((2^alpha - 1) t / decay + 1).

    Raises:
        ValueError: alpha not positive, or decay or steps below 1.
    """
    if not 0 < alpha < 64 or decay < 1 or steps < 1:
        raise ValueError(
            f"alpha must be in (0, 64) and decay and steps at least 1; got alpha {alpha}, decay {decay}, steps {steps}: up "
            "to 1 it is the share of entries that move without a signal, above it -log2 of that share after `decay` generations"
        )
    if alpha <= 1:
        return (alpha,)
    return tuple(1 / ((2**alpha - 1) * t / decay + 1) for t in range(steps))


def quantile(alpha: float) -> float:
    """Phi^-1(1 - alpha / 2): of a standard normal, |x| is above it with probability alpha.

    Raises:
        ValueError: alpha outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"the share alpha of entries that move without a signal must be in (0, 1]; got {alpha}")
    return -NormalDist().inv_cdf(alpha / 2)


def limits(
    alphas: Sequence[float], pairs: int, second_moment: float, excess: float = 0.0, momentum: int = 0
) -> np.ndarray:
    """The smallest |Z| that moves an entry, i32 [generations]; the last one stays.

    Args:
        alphas: one per generation.
        pairs: in Z.
        second_moment: E[x^2] of the noise.
        excess: kurtosis of Z, by which quantiles of a normal are corrected: q + (q^3 - 3 q) excess / 24 (Cornish and Fisher).
        momentum: decay of `accumulate`; 0: none. The deviation of the sum grows in the first generations, limits with it.
    """
    deviation = math.sqrt(pairs) * second_moment
    if momentum:
        alphas = [*alphas, *alphas[-1:] * (8 << momentum)]
        kept, deviation = 1 - 2.0**-momentum, deviation / 2 ** momentum_shift(pairs, second_moment)

    def limit(t, alpha):
        # sums of powers of what is kept after 0 .. t generations
        second, fourth = ((1 - kept ** (p * t + p)) / (1 - kept**p) if momentum else 1 for p in (2, 4))
        q = quantile(alpha)
        q += (q**3 - 3 * q) * excess * fourth / second**2 / 24
        return math.ceil(q * deviation * math.sqrt(second))

    return np.array([limit(t, a) for t, a in enumerate(alphas)], np.int32)


def released_limits(alphas: Sequence[float], pairs: int) -> np.ndarray:
    """The released limits: 16 |Z| reaches int(16 Phi^-1(1 - alpha / 2)) int(sqrt(pairs)) 256."""
    return np.array([16 * int(16 * quantile(a)) * math.isqrt(pairs) for a in alphas], np.int32)


def step(weight: Array, z: Array, limit: Array, faithful: bool = False) -> Array:
    """w + sign(z) where |z| >= limit, clipped to [-127, 127]; zero sums change nothing, with `faithful` they count as -1."""
    direction = jnp.where(z > 0, 1, -1) if faithful else jnp.sign(z)
    moved = weight.astype(jnp.int32) + jnp.where(jnp.abs(z) >= limit, direction, 0)
    return jnp.clip(moved, -127, 127).astype(jnp.int8)


def momentum_shift(pairs: int, second_moment: float) -> int:
    """Bits that Z loses before it is accumulated: one standard deviation is then 2^8 to 2^9 units of int16."""
    return max(0, math.floor(math.log2(math.sqrt(pairs) * second_moment)) - _MOMENTUM_BITS)


def accumulate(momentum: Array, z: Array, shift: int, decay: int) -> Array:
    """m - sign(m) round(|m| / 2^decay) + round(z / 2^shift), clipped to int16: about a sum over the last 2^decay generations.

    Halves are rounded up.
    """
    m = momentum.astype(jnp.int32)
    added = z if shift == 0 else z + (1 << shift - 1) >> shift
    lost = jnp.abs(m) + (1 << decay - 1) >> decay
    return jnp.clip(m - jnp.sign(m) * lost + added, -_INT16, _INT16).astype(jnp.int16)
