"""The integer-only language model EGG in plain NumPy and Python integers: one token at a time, slow, from its equations alone.

Values are whole numbers in [-127, 127]; 16 stands for 1.0, and 127 for 1.0 in a recurrent state. Everything is int64 here, and
sums are asserted to fit the int32 of fast implementations. `//` and `>>` round towards minus infinity, so f(-x) is not -f(x).
D is the width, L the number of layers, V the number of tokens, P the number of pairs (two members, signs +1 and -1).

Source: arXiv 2511.16652, appendices G to I; "released" is what the code published with it does where that differs.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

LIMIT = 127
INT32 = 2**31 - 1


def wide(x: Any) -> np.ndarray:
    """int64 copy of whole numbers of any width; anything else is an error."""
    x = np.asarray(x)
    assert x.dtype.kind in "iu", f"whole numbers only, got {x.dtype}"
    return x.astype(np.int64)


def int32(x: np.ndarray) -> np.ndarray:
    """x, which must fit an int32."""
    assert np.all(np.abs(x) <= INT32), f"an int32 overflows: {np.abs(x).max()} > {INT32}"
    return x


def clip(x: Any) -> np.ndarray:
    """min(127, max(-127, x)): the number -128 never appears."""
    x = np.minimum(LIMIT, np.maximum(-LIMIT, wide(x)))
    assert np.all((x >= -LIMIT) & (x <= LIMIT))
    return x


def divisor(n: int, faithful: bool = True) -> int:
    """What a product over n inputs is divided by: 16 * int(sqrt(n)) (released), else 16 * sqrt(n) to the nearest integer."""
    if faithful:
        return 16 * math.isqrt(n)
    root = math.isqrt(256 * n)
    return root + (256 * n - root * root > root)  # (root + 1/2)^2 = root^2 + root + 1/4: no ties


# ---- one use of one weight ------------------------------------------------------------------------------------------


def product(x: Any, w: Any, divisor: int) -> np.ndarray:
    """clip((W x) // divisor). x [..., in], w [out, in] -> [..., out]."""
    return clip(int32(wide(x) @ wide(w).T) // divisor)


def perturbed_product(x: Any, w: Any, right: Any, left: Any, sign: int, shift: int, divisor: int) -> np.ndarray:
    """clip((W x + ((x . right) * sign * left >> shift)) // divisor): one floor per output, so a pair is not symmetric.

    x [..., in], w [out, in], right [in], left [out] -> [..., out]; shift = 4 + the noise's own shift.
    """
    x, right, left = wide(x), wide(right), wide(left)
    noise = int32((x @ right)[..., None] * (sign * left)) >> shift
    return clip(int32(x @ wide(w).T + noise) // divisor)


def perturbed_row(emb: Any, left: Any, right: Any, sign: int, shift: int, token: int) -> np.ndarray:
    """clip(emb[token] + (sign * left[token] * right >> shift)). emb [V, D], left [V], right [D] -> [D]."""
    return clip(wide(emb)[token] + (sign * wide(left)[token] * wide(right) >> shift))


def perturbed_vector(w: Any, n1: Any, n2: Any, sign: int, shift: int) -> np.ndarray:
    """clip(w + (sign * n1 * n2 >> shift)), elementwise: the product of two draws has a matrix's noise scale."""
    return clip(wide(w) + (sign * wide(n1) * wide(n2) >> shift))


class Perturbed(NamedTuple):
    """A weight as one member uses it. left, right: [out], [in] of a matrix, [V], [D] of an embedding, n1, n2 of a vector."""

    base: np.ndarray
    left: np.ndarray
    right: np.ndarray
    sign: int
    shift: int


def member(weights: Any, factors: Any, sign: int, shift: int) -> Any:
    """The weights of one member. factors: the tree of weights with (left, right) for each array; None leaves one as it is."""
    if factors is None:
        return weights
    if isinstance(weights, dict):
        return {name: member(weights[name], factors[name], sign, shift) for name in weights}
    if isinstance(weights, list):
        return [member(w, f, sign, shift) for w, f in zip(weights, factors, strict=True)]
    left, right = factors
    return Perturbed(weights, left, right, sign, shift)


def _product(x: np.ndarray, w: Any, faithful: bool) -> np.ndarray:
    scale = divisor(x.shape[-1], faithful)
    if isinstance(w, Perturbed):
        return perturbed_product(x, w.base, w.right, w.left, w.sign, w.shift, scale)
    return product(x, w, scale)


def _row(w: Any, token: int) -> np.ndarray:
    if isinstance(w, Perturbed):
        return perturbed_row(w.base, w.left, w.right, w.sign, w.shift, token)
    return wide(w)[token]


def _vector(w: Any) -> np.ndarray:
    if isinstance(w, Perturbed):
        return perturbed_vector(w.base, w.left, w.right, w.sign, w.shift)
    return wide(w)


# ---- the model ------------------------------------------------------------------------------------------------------


def norm(x: Any, w: Any) -> np.ndarray:
    """clip(floor(x * w / s)), s = max(1, sum|x| // D). x [..., D], w [D]; no mean is subtracted.

    The released table has a row for s = 0, a division by zero whose result is left to the hardware; here s is at least 1.
    """
    x = wide(x)
    s = np.maximum(1, np.abs(x).sum(-1, keepdims=True) // x.shape[-1])
    return clip(x * wide(w) // s)


def gated(f: Any, x: Any) -> np.ndarray:
    """(f + 127) * x >> 8: the gate f stands for (f + 127) / 256, in [0, 254/256]."""
    return (wide(f) + LIMIT) * wide(x) >> 8


def recurrent(weights: dict, x: Any, h: Any, faithful: bool = True) -> np.ndarray:
    """The new state, which is also the output, of a GRU without sigmoid and tanh. x, h [D].

    f = clip(Wf x + Uf h + bf); c = clip(Wh x + Uh gated(f, h) + bh); h + gated(f, c - h). Each product is clipped by itself.
    """
    x, h = wide(x), wide(h)
    f = clip(_product(x, weights["Wf"], faithful) + _product(h, weights["Uf"], faithful) + _vector(weights["bf"]))
    past = gated(f, h)
    c = clip(_product(x, weights["Wh"], faithful) + _product(past, weights["Uh"], faithful) + _vector(weights["bh"]))
    new = h + gated(f, c - h)
    assert np.all((new >= np.minimum(h, c)) & (new <= np.maximum(h, c)))  # so no clip is needed
    return new


def block(weights: dict, x: Any, h: Any, faithful: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(x, h) after one layer: the residual takes the GRU's output, then the MLP's, and is clipped each time. x, h [D]."""
    h = recurrent(weights["gru"], norm(x, _vector(weights["norm_1"])), h, faithful)
    x = clip(wide(x) + h)
    hidden = _product(norm(x, _vector(weights["norm_2"])), weights["mlp"]["up"], faithful)
    return clip(x + _product(hidden, weights["mlp"]["down"], faithful)), h


def residual(weights: dict, state: Any, byte: int, faithful: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(x [D], state [L, D]) after the last layer. An input of 0, which separates documents, first sets the state to 0."""
    state = np.zeros_like(wide(state)) if byte == 0 else wide(state)
    x, new = _row(weights["embed"], byte), []
    assert len(weights["blocks"]) == len(state), (
        f"one state per layer: {len(weights['blocks'])} layers, {len(state)} states"
    )
    for layer, h in zip(weights["blocks"], state, strict=True):
        x, h = block(layer, x, h, faithful)
        new.append(h)
    return x, np.stack(new)


def token(weights: dict, state: Any, byte: int, faithful: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(logits [V] for the next token, new state [L, D]) from {"embed", "blocks", "norm", "head"} and one input."""
    x, state = residual(weights, state, byte, faithful)
    return _product(norm(x, _vector(weights["norm"])), weights["head"], faithful), state


def initial(rng: np.random.Generator, width: int, layers: int, vocabulary: int = 256) -> dict:
    """Weights before training, int8: matrices round(16 * N(0, 1)), norms 16, biases 0."""
    matrix = lambda rows, columns: clip(np.rint(16 * rng.standard_normal((rows, columns))).astype(int)).astype(np.int8)
    one, zero = lambda: np.full(width, 16, np.int8), lambda: np.zeros(width, np.int8)

    def layer():
        gru = {name: matrix(width, width) for name in ("Wf", "Uf", "Wh", "Uh")} | {"bf": zero(), "bh": zero()}
        mlp = {"up": matrix(4 * width, width), "down": matrix(width, 4 * width)}
        return {"norm_1": one(), "gru": gru, "norm_2": one(), "mlp": mlp}

    blocks = [layer() for _ in range(layers)]
    return {"embed": matrix(vocabulary, width), "blocks": blocks, "norm": one(), "head": matrix(vocabulary, width)}


# ---- the loss -------------------------------------------------------------------------------------------------------


def exp2(i: int) -> int:
    """int(16 * 2^(i/16)), exactly: the 16th root of 2^(64 + i), four integer square roots.

    Flooring between the roots changes nothing: isqrt(floor(y)) = floor(sqrt(y)).
    """
    root = 1 << (64 + i)
    for _ in range(4):
        root = math.isqrt(root)
    return root


def log2(k: int) -> int:
    """int(16 * log2(k / 16)), k >= 1, exactly: 2^v <= (k/16)^16 exactly if v <= 16 log2(k/16), so the bit length is the floor.

    Truncation is towards zero, above the floor for k < 16; a model's sum is at least 16 V, so it never gets there.
    """
    floor = (k**16).bit_length() - 1 - 64
    whole = k & (k - 1) == 0  # a power of two has an integer logarithm
    return floor if floor >= 0 or whole else floor + 1


EXP2 = tuple(exp2(i) for i in range(256))


def log_likelihood(logits: Any, target: int) -> int:
    """y[target] - LOG2(sum_j EXP2[y_j]), y = logits + 128 in 1..255: the base-2 log-probability of target, in 1/16 bits.

    Logits [V] are base-2 log-weights in 1/16 bits. The sum stays below 2^28 for V = 256.
    """
    y = [int(v) + 128 for v in wide(logits)]
    assert all(1 <= v <= 255 for v in y)
    return y[target] - log2(sum(EXP2[v] for v in y))


def sequence(
    weights: dict, state: Any, inputs: Sequence, targets: Sequence, faithful: bool = True
) -> tuple[int, np.ndarray]:
    """(sum of the log-likelihoods of targets, in 1/16 bits; the state after the last input)."""
    total = 0
    for byte, target in zip(inputs, targets, strict=True):
        logits, state = token(weights, state, int(byte), faithful)
        total += log_likelihood(logits, int(target))
    return total, state


# ---- fitness and update ---------------------------------------------------------------------------------------------


def fitness(scores: Any) -> np.ndarray:
    """sign(score of the member with +1 - score of the member with -1). scores [P, 2] -> [P] of -1, 0, 1."""
    scores = wide(scores)
    return np.sign(scores[:, 0] - scores[:, 1])


def direction(fitness: Any, lefts: Any, rights: Any) -> np.ndarray:
    """Z = sum_p F_p left_p right_p^T. fitness [P], lefts [P, out], rights [P, in] -> [out, in]."""
    return sum(f * np.outer(a, b) for f, a, b in zip(wide(fitness), wide(lefts), wide(rights), strict=True))


def direction_crossed(fitness: Any, lefts: Any, rights: Any) -> np.ndarray:
    """Z = sum_pq F_pq left_p right_q^T. fitness [P, Q], lefts [P, out], rights [Q, in] -> [out, in]."""
    fitness, lefts, rights = wide(fitness), wide(lefts), wide(rights)
    assert fitness.shape == (len(lefts), len(rights))
    return sum(fitness[p, q] * np.outer(lefts[p], rights[q]) for p, q in np.ndindex(*fitness.shape))


def direction_vector(fitness: Any, n1: Any, n2: Any) -> np.ndarray:
    """Z = sum_p F_p n1_p n2_p, elementwise. fitness [P], n1, n2 [P, k] -> [k]."""
    return sum(f * a * b for f, a, b in zip(wide(fitness), wide(n1), wide(n2), strict=True))


def direction_vector_crossed(fitness: Any, n1: Any, n2: Any) -> np.ndarray:
    """Z = sum_pq F_pq n1_p n2_q, elementwise. fitness [P, Q], n1 [P, k], n2 [Q, k] -> [k]."""
    fitness, n1, n2 = wide(fitness), wide(n1), wide(n2)
    assert fitness.shape == (len(n1), len(n2))
    return sum(fitness[p, q] * n1[p] * n2[q] for p, q in np.ndindex(*fitness.shape))


def update(w: Any, z: Any, limit: int) -> np.ndarray:
    """clip(w + sign(z)) where |z| >= limit, else w; z = 0 never moves an entry."""
    z = wide(z)
    return clip(wide(w) + np.where(np.abs(z) >= limit, np.sign(z), 0))


def update_released(w: Any, z: Any, pairs: int, thr: int) -> np.ndarray:
    """w where 16 |z| < thr * int(sqrt(P)) * 256, else clip(w + 1) if z > 0, clip(w - 1) if not: also at z = 0 = thr."""
    z = wide(z)
    step = np.where(z > 0, 1, -1)
    return clip(wide(w) + np.where(np.abs(z) * 16 < thr * math.isqrt(pairs) * 256, 0, step))


def released_threshold(alpha: float) -> int:
    """int(16 * Phi^-1(1 - alpha/2)), in 1/16 standard deviations: about a share alpha of the entries moves by chance."""
    return int(16 * NormalDist().inv_cdf(1 - alpha / 2))


def alpha_at(alpha: float, t: int, T: int = 1000) -> float:
    """alpha up to 1 is constant; above, 1 / ((2^alpha - 1) t/T + 1), which falls from 1 at t = 0 to 2^-alpha at T."""
    return alpha if alpha <= 1 else 1 / ((2**alpha - 1) * t / T + 1)


def momentum(m: Any, z: Any, shift_in: int, decay: int) -> np.ndarray:
    """m - sign(m) |m| / 2^decay + z / 2^shift_in (both to the nearest, ties up), clipped to an int16 without -32768."""
    m, z = wide(m), wide(z)
    half = 2 ** (shift_in - 1) if shift_in else 0
    return np.clip(m - np.sign(m) * (np.abs(m) + 2**decay // 2 >> decay) + (z + half >> shift_in), -32767, 32767)


# ---- noise ----------------------------------------------------------------------------------------------------------


def gaussian_int8(words: Any) -> np.ndarray:
    """Near-Gaussian whole numbers of standard deviation about 16, in [-67, 67], one from each u32 word.

    v = 2 (65536 (ones of the high half - 8) + low half - 32768) + 1, an odd number; (1013 v + 2^23) >> 24 rounds 1013 v / 2^24.
    """
    words = wide(words)
    count = np.bitwise_count(words >> 16).astype(np.int64) - 8
    v = 2 * (count * 65536 + (words & 0xFFFF) - 32768) + 1
    return clip(int32(v * 1013 + 2**23) >> 24)


def gaussian_moments() -> tuple[Fraction, Fraction]:
    """The exact mean and second moment of gaussian_int8 over all 2^32 words: 17 counts of ones times 2^16 low halves."""
    first = second = 0
    for ones in range(17):
        values = gaussian_int8(((1 << ones) - 1 << 16) + np.arange(2**16))
        first += math.comb(16, ones) * int(values.sum())
        second += math.comb(16, ones) * int((values**2).sum())
    return Fraction(first, 2**32), Fraction(second, 2**32)


def hash_start(tid: int) -> int:
    """((tid >> 16) ^ tid) * 0x45d9f3b mod 2^32: what the released code mixes into a pair's start in its table of noise."""
    return ((tid >> 16) ^ tid) * 0x45D9F3B % 2**32
